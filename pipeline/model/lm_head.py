"""The two-pass LM head: approximate logits of all tokens, exact logits of the candidates.

The next token depends on the largest few logits of a row, but the head computes one per token of
the vocabulary: a third of the arithmetic of gpt2. The first pass computes all logits in bfloat16,
twice the speed of float32 on a CPU with bfloat16 instructions. It bounds the error of each one. The
second pass rescores the candidates in float32: every token whose logit may be at least a threshold.
These equal the head's logits bit for bit. The candidates of a row depend only on that row.

The bound follows from Cauchy-Schwarz. Let h be a row of the hidden state, w a row of the weight,
and h', w' the same rounded to bfloat16:

    |h w - h' w'|  <=  |h - h'| |w| + |h'| |w - w'|

Both sums over C products are rounded too, together by less than C 2^-22 |h| |w|.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.profiler import record_function

from gptbatch.pipeline.kernels.constants import TOKENS_PER_GROUP
from gptbatch.pipeline.kernels.huge_pages import HugePages
from gptbatch.pipeline.model.linear import Linear

# Name of the head's work in torch.profiler.
HEAD_EVENT = "gptbatch::head"
# Rows per call of the head. More rows are no faster, and the self-test covers this many.
MAX_HEAD_ROWS = 128
# With more than one fallback per this many rows, two passes cost more than they save.
ROWS_PER_FALLBACK = 2
# Rows before the rate of fallbacks counts.
MIN_ROWS_MEASURED = 2 * MAX_HEAD_ROWS
# In a smaller head, two passes take longer than one.
MIN_WEIGHTS = 2**19
# In a smaller vocabulary, the candidates are too large a part of it.
MIN_VOCAB_SIZE = 1024
# bfloat16 instructions flush subnormals (below 1.2e-38) to 0. A row of these has a smaller norm.
SUBNORMAL_NORM = 1e-36
# Covers the rounding of a float64 norm.
NORM_ROUNDING = 1 + 1e-9


class TwoPassHead:
    """Two passes over one head without a bias.

    Attributes:
        weight: (V, C) float32, the rows of the head.
        n_rows: Rows rescored so far.
        n_fallbacks: Rows among these that needed all logits instead.
    """

    def __init__(self, weight: Tensor, memory: HugePages) -> None:
        """Pack a bfloat16 copy of the weight and compute the norms that bound its errors."""
        assert weight.dtype == torch.float32
        self.weight = weight = weight.contiguous()
        rounded = weight.bfloat16()
        self._packed = memory.pack(rounded)
        # One buffer per thread: new memory for every call would come slowly from the system.
        self._buffers = threading.local()
        rows = 128 * TOKENS_PER_GROUP
        group_norms = [
            torch.stack(
                [_max_norms(part), _max_norms(part - rounded_part.float()) + SUBNORMAL_NORM], dim=1
            )
            for part, rounded_part in zip(weight.split(rows), rounded.split(rows), strict=True)
        ]
        self._group_norms = torch.cat(group_norms)
        self.n_rows = self.n_fallbacks = 0

    @property
    def is_worthwhile(self) -> bool:
        """Whether two passes have saved work so far: with some weights too many rows fall back."""
        return (
            self.n_rows <= MIN_ROWS_MEASURED or self.n_fallbacks * ROWS_PER_FALLBACK <= self.n_rows
        )

    def approximate_logits(self, hidden: Tensor) -> Tensor:
        """Compute the first pass: hidden (S, C), S <= MAX_HEAD_ROWS -> logits (S, V).

        The result is valid until the next call in this thread.
        """
        with record_function(HEAD_EVENT):
            if not hasattr(self._buffers, "logits"):
                self._buffers.logits = self.weight.new_empty(MAX_HEAD_ROWS, self.weight.shape[0])
            logits: Tensor = self._buffers.logits[: len(hidden)]
            torch.ops.gptbatch.linear_float32_out(hidden.bfloat16(), self._packed, logits)
            return logits

    def rescore(
        self, logits: Tensor, hidden: Tensor, kept_sizes: Tensor, exact_ranges: Tensor
    ) -> Tensor:
        """Compute the second pass: make every logit exact that may be at least the row's threshold.

        Args:
            logits: Approximate logits (S, V); changed in place.
            hidden: (S, C).
            kept_sizes: (S,), 1 to V - 1.
            exact_ranges: (S,) float64, at least 0: how far below the kept_sizes-th largest logit
                the threshold lies, at least.

        Returns:
            Thresholds (S,) float64. NaN means fallback: computing all logits is faster, or one is
            not finite. The row is then unchanged.
        """
        with record_function(HEAD_EVENT):
            rounded = hidden.bfloat16().float()
            norm = torch.linalg.vector_norm(hidden, dim=1, dtype=torch.float64)
            rounding_norm = torch.linalg.vector_norm(hidden - rounded, dim=1, dtype=torch.float64)
            times_weight_norm = rounding_norm + hidden.shape[1] * 2**-22 * norm + SUBNORMAL_NORM
            times_weight_rounding = torch.linalg.vector_norm(rounded, dim=1, dtype=torch.float64)
            # error of a logit <= row_factors[row] . group_norms[group of its token]
            row_factors = torch.stack([times_weight_norm, times_weight_rounding], dim=1)
            thresholds: Tensor = torch.ops.gptbatch.rescore(
                logits,
                hidden,
                self.weight,
                row_factors,
                self._group_norms,
                kept_sizes,
                exact_ranges,
            )
        self.n_rows += len(hidden)
        self.n_fallbacks += int(thresholds.isnan().sum())
        return thresholds


def make_two_pass_head(head: Linear, weight: Tensor, memory: HugePages) -> TwoPassHead | None:
    """Return a two-pass head for a packed head, or None where it would not be faster.

    It needs a float32 model of some size, a large vocabulary and bfloat16 instructions.

    Args:
        head: The packed head.
        weight: Its plain weight (V, C), which a tied embedding keeps.
        memory: Takes the packed copy.
    """
    is_large = weight.numel() >= MIN_WEIGHTS and len(weight) >= MIN_VOCAB_SIZE
    if (
        head.kind == "native"
        and weight.dtype == torch.float32
        and is_large
        and torch.ops.gptbatch.has_bfloat16()
    ):
        return TwoPassHead(weight.detach(), memory)
    return None


def logits_bytes(logits: Tensor) -> bytes:
    """Return the bits of logits in memory order; -0 and NaN are compared as bits too."""
    return logits.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _max_norms(rows: Tensor) -> Tensor:
    """Bound the row norms in each group of tokens: rows (V, C) -> (groups,) float64."""
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    padded = torch.nn.functional.pad(norms, (0, -len(norms) % TOKENS_PER_GROUP))
    return padded.view(-1, TOKENS_PER_GROUP).amax(dim=1) * NORM_ROUNDING
