"""Arguments of the kernels: caches, logits, and states of rows, by random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.common import DEVICE, POSITIONS, VOCAB, C, H, random
from gptbatch.pipeline.engine.device_adjustments import DeviceAdjustments
from gptbatch.pipeline.engine.sequence import Sequence
from gptbatch.pipeline.engine.stopping import StopRule
from gptbatch.pipeline.kernels.cuda.adjustments import AdjustmentLayout, Adjustments
from gptbatch.pipeline.kernels.cuda.attend import attend
from gptbatch.pipeline.kernels.cuda.linear import new_logits
from gptbatch.pipeline.kernels.cuda.sample import scratch_sizes
from gptbatch.pipeline.kernels.cuda.state import ADJUSTMENTS, HEADER, POSITION, STEP, TOKEN
from gptbatch.pipeline.kernels.cuda.store import LayerCache, store
from gptbatch.pipeline.kernels.cuda.tiles import MAX_COLUMNS
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.types import Prompt, TokenizedPrompt
from tests.device_state import state_of

# Settings whose cutoff may lie anywhere in the vocabulary.
FILTERS: tuple[dict[str, Any], ...] = (
    {"top_p": 0.9},
    {"top_k": 1000},
    {"min_p": 0.05},
    {"top_k": 1000, "top_p": 0.9},
)

# A text of one to three bytes per token.
TOKEN_BYTES = [
    bytes(97 + token // 26**i % 26 for i in range(1 + token % 3)) for token in range(VOCAB)
]

N_TOKEN_BYTES = sum(map(len, TOKEN_BYTES))

# Blocks per table, as in the engine: their stride is compiled into the kernels.
TABLE_BLOCKS = -(-POSITIONS // 64)


class Case:
    """Rows of one length over a cache in random blocks; unused places hold garbage."""

    def __init__(self, rows: int, context: int, dtype: torch.dtype, *, int8: bool = False) -> None:
        per_row = -(-context // 64)
        n_blocks, shape = rows * per_row, (rows * per_row, 2, H, 64)
        blocks = torch.randperm(n_blocks, device=DEVICE).view(rows, per_row)
        state = torch.zeros(rows, HEADER + TABLE_BLOCKS, dtype=torch.int64, device=DEVICE)
        self.tables = state[:, HEADER:]
        self.tables[:, :per_row] = blocks
        self.seq_indices = torch.arange(rows, device=DEVICE, dtype=torch.int32)
        self.positions = torch.full((rows,), context - 1, device=DEVICE, dtype=torch.int32)
        self.qkv = random(rows, 3 * C, dtype=dtype)
        self.out = torch.empty(rows, C, dtype=dtype, device=DEVICE)
        if int8:
            data = torch.randint(-127, 128, (*shape, C // H), dtype=torch.int8, device=DEVICE)
            self.cache = LayerCache(data, torch.rand(shape, device=DEVICE) / 100)
        else:
            data = random(*shape, C // H, dtype=dtype)
            data[blocks[:, -1], :, :, (context - 1) % 64 + 1 :] = float("nan")
            self.cache = LayerCache(data)

    @property
    def where(self) -> tuple[LayerCache, Tensor, Tensor, Tensor]:
        """Arguments of store and attend."""
        return self.cache, self.tables, self.seq_indices, self.positions

    def run(
        self, attends: Callable[..., None] = attend, stores: Callable[..., None] = store
    ) -> None:
        """Store and attend."""
        stores(self.qkv, *self.where)
        attends(self.qkv, *self.where, self.out, 0.125)


def sampler_params(rows: int, **settings: Any) -> list[SamplingParams]:
    """Return the settings of rows: temperature 0.8 but where another is given."""
    given = {"temperature": 0.8, "top_k": 0, "max_new_tokens": 9, **settings}
    return [SamplingParams(seed=seed, **given) for seed in range(rows)]


def sampler_case(rows: int, *, width: float = 3.0, **settings: Any) -> dict[str, Any]:
    """Return the arguments of `sample` for random logits, laid out as those of the engine."""
    logits, block_max = new_logits(rows, VOCAB, torch.device(DEVICE))
    logits.copy_(torch.randn(rows, VOCAB, device=DEVICE) * width)
    padded = torch.nn.functional.pad(logits, (0, -VOCAB % MAX_COLUMNS), value=float("-inf"))
    block_max.copy_(padded.view(rows, -1, MAX_COLUMNS).amax(dim=2))
    params = sampler_params(rows, **settings)
    small, large = scratch_sizes(block_max.shape[1])
    fields = [{"step": 5, "params": each} for each in params]
    states = state_of(fields, blocks=TABLE_BLOCKS, vocab_size=VOCAB)
    return {
        "logits": logits,
        "block_max": block_max,
        "state": states.to(DEVICE),
        "scratch": (
            torch.zeros(rows, small, dtype=torch.int32, device=DEVICE),
            torch.zeros(rows, large, dtype=torch.int64, device=DEVICE),
        ),
        "sampled": torch.zeros(rows, dtype=torch.int32, device=DEVICE),
    }


def adjust_case(
    rows: int, context: int, bad_words: tuple[str, ...] = ()
) -> tuple[Tensor, Tensor, Tensor, Adjustments]:
    """Return the arguments of `adjust`: random logits, penalties, a mask and n-grams per row."""
    rule = StopRule(
        eos_token_ids=(VOCAB - 1,),
        n_positions=POSITIONS,
        window_full="stop",
        token_bytes=TOKEN_BYTES,
    )
    layout = AdjustmentLayout(
        rows=rows, n_positions=POSITIONS, vocab_size=VOCAB, n_token_bytes=N_TOKEN_BYTES
    )
    places, own = DeviceAdjustments(layout, rule), Adjustments(layout, torch.device(DEVICE))
    case = sampler_case(rows)
    state, tokens = case["state"], torch.randint(VOCAB // 9, (rows, context)).tolist()
    for row, token_ids in enumerate(tokens):
        params = SamplingParams(
            seed=row,
            temperature=0.8,
            top_k=40,
            max_new_tokens=99,
            repetition_penalty=1.2,
            frequency_penalty=0.1,
            presence_penalty=0.3,
            no_repeat_ngram_size=2,
            logit_bias=tuple((token, 0.1 * token) for token in range(9)),
            min_new_tokens=50,
            bad_words=bad_words,
        )
        prompt = Prompt(index=row, prompt_id=str(row), text="", params=params, metadata=None)
        source = TokenizedPrompt(prompt=prompt, token_ids=token_ids, tokens_dropped=0, read_s=0.0)
        places.hold(bad_words)
        place, numbers = places.start(Sequence(source))
        indices, values = torch.from_numpy(numbers).to(DEVICE)
        own.flat[indices] = values.int()
        state[row, ADJUSTMENTS.value] = place
        state[row, POSITION.value] = state[row, TOKEN.value] = token_ids[-1]
        state[row, STEP.value] = 1
    return case["logits"], case["block_max"], state, own
