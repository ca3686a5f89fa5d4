"""Log probabilities from what the device found of a step; see `logprobs.py` for the formula."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gptbatch.pipeline.engine.logarithm import logs
from gptbatch.pipeline.engine.nucleus import mass_bits
from gptbatch.pipeline.kernels.cuda import logprobs as fields
from gptbatch.pipeline.types import TokenLogprobs

Int64s = npt.NDArray[np.int64]


def token_logprobs(found: Int64s, n_top: int, vocab_size: int) -> list[TokenLogprobs]:
    """Return the log probabilities of tokens, bit for bit those of `logprobs.token_logprobs`.

    Args:
        found: Of each token (n, WIDTH); see kernels/cuda/logprobs.py.
        n_top: How many of the most likely tokens to list.
        vocab_size: V.
    """
    found = found[:, : fields.TOP.value + min(n_top, vocab_size)]
    total = found[:, fields.TOTAL.value].astype(np.float64)
    log_total = logs(total * 2.0 ** -mass_bits(vocab_size))
    logits = _floats(found)
    numbers = (logits - logits[:, fields.LARGEST.value, None]) - log_total[:, None]
    rounded = numbers.astype(np.float32)
    return [
        TokenLogprobs(logprob=logprob, top_ids=top_ids, top_logprobs=top_logprobs)
        for logprob, top_ids, top_logprobs in zip(
            rounded[:, fields.OWN.value].tolist(),
            (found[:, fields.TOP.value :] >> 32).tolist(),
            rounded[:, fields.TOP.value :].tolist(),
            strict=True,
        )
    ]


def _floats(found: Int64s) -> npt.NDArray[np.float64]:
    """Return the float32 whose bits are the lower half of each number."""
    floats = (found & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
    # These are the bits of a mass.
    floats[:, fields.TOTAL.value] = 0
    return floats.astype(np.float64)
