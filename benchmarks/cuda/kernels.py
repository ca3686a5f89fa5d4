"""Sections `kernels` and `kernel-times`: the kernels of a step but the linears."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.common import (
    DEVICE,
    DTYPES,
    INNER,
    LAYERS,
    POSITIONS,
    ROW_COUNTS,
    VOCAB,
    C,
    H,
    random,
    report,
    time_us,
    weight,
)
from gptbatch.pipeline.kernels.cuda.adjust import adjust, adjust_twin
from gptbatch.pipeline.kernels.cuda.adjustments import AdjustmentLayout, Adjustments
from gptbatch.pipeline.kernels.cuda.attend import attend, attend_twin
from gptbatch.pipeline.kernels.cuda.linear import linear, linear_twin
from gptbatch.pipeline.kernels.cuda.logprobs import WIDTH, measure
from gptbatch.pipeline.kernels.cuda.norm import norm, norm_twin
from gptbatch.pipeline.kernels.cuda.sample import sample, scratch_sizes
from gptbatch.pipeline.kernels.cuda.state import ADJUSTMENTS, LOGPROBS, POSITION, STEP, TOKEN
from gptbatch.pipeline.kernels.cuda.store import LayerCache, store, store_twin
from gptbatch.pipeline.kernels.cuda.tiles import MAX_COLUMNS
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.types import TokenizedPrompt


class Case:
    """Rows of one length over a cache in random blocks; unused places hold garbage."""

    def __init__(self, rows: int, context: int, dtype: torch.dtype, *, int8: bool = False) -> None:
        per_row = -(-context // 64)
        n_blocks, shape = rows * per_row, (rows * per_row, 2, H, 64)
        self.tables = torch.randperm(n_blocks, device=DEVICE).view(rows, per_row)
        self.seq_indices = torch.arange(rows, device=DEVICE, dtype=torch.int32)
        self.positions = torch.full((rows,), context - 1, device=DEVICE, dtype=torch.int32)
        self.qkv = random(rows, 3 * C, dtype=dtype)
        self.out = torch.empty(rows, C, dtype=dtype, device=DEVICE)
        if int8:
            data = torch.randint(-127, 128, (*shape, C // H), dtype=torch.int8, device=DEVICE)
            self.cache = LayerCache(data, torch.rand(shape, device=DEVICE) / 100)
        else:
            data = random(*shape, C // H, dtype=dtype)
            data[self.tables[:, -1], :, :, (context - 1) % 64 + 1 :] = float("nan")
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


# Settings whose cutoff may lie anywhere in the vocabulary.
FILTERS: tuple[dict[str, Any], ...] = (
    {"top_p": 0.9},
    {"top_k": 1000},
    {"min_p": 0.05},
    {"top_k": 1000, "top_p": 0.9},
)


def sampler_params(rows: int, **settings: Any) -> list[SamplingParams]:
    """Return the settings of rows: temperature 0.8 but where another is given."""
    given = {"temperature": 0.8, "top_k": 0, "max_new_tokens": 9, **settings}
    return [SamplingParams(seed=seed, **given) for seed in range(rows)]


def sampler_case(rows: int, *, width: float = 3.0, **settings: Any) -> dict[str, Any]:
    """Return the arguments of `sample` for random logits."""
    from tests.device_state import state_of

    logits = torch.randn(rows, VOCAB, device=DEVICE) * width
    padded = torch.nn.functional.pad(logits, (0, -VOCAB % MAX_COLUMNS), value=float("-inf"))
    params = sampler_params(rows, **settings)
    block_max = padded.view(rows, -1, MAX_COLUMNS).amax(dim=2)
    small, large = scratch_sizes(block_max.shape[1])
    return {
        "logits": logits,
        "block_max": block_max,
        "state": state_of([{"step": 5, "params": each} for each in params], vocab_size=VOCAB).to(
            DEVICE
        ),
        "scratch": (
            torch.zeros(rows, small, dtype=torch.int32, device=DEVICE),
            torch.zeros(rows, large, dtype=torch.int64, device=DEVICE),
        ),
        "sampled": torch.zeros(rows, dtype=torch.int32, device=DEVICE),
    }


def sampler_bits() -> dict[str, bool]:
    """Return whether tokens and margins are those of the C++ sampler, by settings."""
    from gptbatch.pipeline.engine.sampling import sample_tokens
    from gptbatch.pipeline.kernels.build import load_kernels
    from gptbatch.pipeline.kernels.cuda.state import MARGIN
    from tests.conftest import has_kernels

    if not has_kernels():
        return {}
    load_kernels()
    found = {}
    for settings in ({"top_k": 40}, *FILTERS, {"temperature": 1.0}):
        for width in (0.1, 3.0):
            case = sampler_case(64, width=width, **settings)
            sample(**case, full_vocab=True, top_p=True)
            margins = case["state"][:, MARGIN.value].contiguous().view(torch.float64).tolist()
            params = sampler_params(64, **settings)
            expected = sample_tokens(case["logits"].cpu(), params, [5] * 64, native=True)
            found[f"sample {settings}, width {width}: equal"] = [
                (each.token, each.decision_margin) for each in expected
            ] == [*zip(case["sampled"].tolist(), margins, strict=True)]
    return found


# A text of one to three bytes per token.
TOKEN_BYTES = [
    bytes(97 + token // 26**i % 26 for i in range(1 + token % 3)) for token in range(VOCAB)
]

N_TOKEN_BYTES = sum(map(len, TOKEN_BYTES))


def adjust_case(
    rows: int, context: int, bad_words: tuple[str, ...] = ()
) -> tuple[Tensor, Tensor, Tensor, Adjustments]:
    """Return the arguments of `adjust`: random logits, penalties, a mask and n-grams per row."""
    from gptbatch.pipeline.engine.device_adjustments import DeviceAdjustments
    from gptbatch.pipeline.engine.sequence import Sequence
    from gptbatch.pipeline.engine.stopping import StopRule
    from gptbatch.pipeline.params.sampling_params import SamplingParams
    from gptbatch.pipeline.types import Prompt

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


def adjust_bits() -> bool:
    """Return whether `adjust` has the logits and maxima of its twin on the CPU."""
    logits, block_max, state, own = adjust_case(4, 100, ("ab", "bca", "z"))
    twin_own = Adjustments(
        AdjustmentLayout(
            rows=4, n_positions=POSITIONS, vocab_size=VOCAB, n_token_bytes=N_TOKEN_BYTES
        ),
        torch.device("cpu"),
    )
    twin_own.flat.copy_(own.flat)
    twin, twin_max = logits.cpu(), block_max.cpu()
    adjust(logits, block_max, state, own)
    adjust_twin(twin, twin_max, state.cpu(), twin_own)
    pairs = ((logits, twin), (block_max, twin_max), (own.flat, twin_own.flat))
    return all(torch.equal(a.cpu(), b) for a, b in pairs)


def measure_bits() -> bool:
    """Return whether `measure` has the numbers of its twin on the CPU; one row has ties."""
    from tests.fake_device import measure_twin

    case = sampler_case(16)
    case["logits"][0] = case["logits"][0].round()
    case["block_max"][0] = case["block_max"][0].round()
    case["state"][:, LOGPROBS.value] = 21
    arguments = (case["logits"], case["block_max"], case["state"])
    found = torch.zeros(16, WIDTH, dtype=torch.int64, device=DEVICE)
    twin = torch.zeros(16, WIDTH, dtype=torch.int64)
    measure(*arguments, found)
    logits, block_max, state = (each.cpu() for each in arguments)
    measure_twin(logits, block_max, state, twin)
    return torch.equal(found.cpu(), twin)


def note_difference(found: dict[str, Any], key: str, a: Tensor, b: Tensor) -> None:
    """Keep |a - b| / |b|, as a problem where rounding cannot explain it."""
    largest = 0.02 if b.dtype != torch.float32 or "int8" in key else 1e-4
    a, b = a.float().cpu(), b.float().cpu()
    value = float((a - b).norm() / b.norm())
    found[key] = value
    if math.isnan(value) or value > largest:
        found["problems"].append(key)


def kernels() -> None:
    """Compare each kernel with its twin; report relative differences."""
    torch.manual_seed(1)
    found: dict[str, Any] = {"adjust equal": adjust_bits(), "measure equal": measure_bits()}
    found |= sampler_bits()
    found["problems"] = [key for key, is_equal in found.items() if not is_equal]
    for name, dtype in DTYPES.items():
        x, w, b = (random(*shape, dtype=dtype) for shape in ((65, C), (C,), (C,)))
        y, twin = torch.empty_like(x), torch.empty_like(x)
        norm(x, w, b, y, 1e-5)
        norm_twin(x, w, b, twin, 1e-5)
        note_difference(found, f"norm {name}", y, twin)
        matrix = weight(INNER, C, name)
        y, twin = (torch.empty(65, INNER, dtype=dtype, device=DEVICE) for _ in range(2))
        bias = random(INNER, dtype=dtype)
        linear(x, matrix, bias, None, y, "gelu_tanh")
        linear_twin(x, matrix, bias, None, twin, "gelu_tanh")
        note_difference(found, f"linear {name}", y, twin)
        report(found)
        for context in (1, 64, 65, POSITIONS - 24):
            for int8 in (False, True):
                case = Case(4, context, dtype, int8=int8)
                case.run()
                out = case.out.clone()
                case.run(attend_twin, store_twin)
                key = f"attend {name} {context}{' int8' * int8}"
                note_difference(found, key, out, case.out)
        report(found)


def kernel_times() -> None:
    """Microseconds of store and attend, norm and sample, with the time of the bytes at 3 TB/s."""
    found: dict[str, Any] = {}
    for name in ("bfloat16", "float32"):
        for rows in ROW_COUNTS:
            for context in (96, 160):
                for int8 in (False, True):
                    cases = [Case(rows, context, DTYPES[name], int8=int8) for _ in range(4)]
                    size = 1 if int8 else cases[0].qkv.element_size()
                    floor = rows * context * 2 * C * size / 3e6

                    def attends(cases: list[Case] = cases) -> None:
                        for case in cases:
                            case.run()

                    key = f"store and attend {name} {rows} rows, {context} tokens{' int8' * int8}"
                    found[key] = [round(time_us(attends, 4, 5), 2), round(floor, 2)]
            report(found)
            x = random(rows, C, dtype=DTYPES[name])
            w, b, y = random(C, dtype=x.dtype), random(C, dtype=x.dtype), x.clone()

            def norms(x: Tensor = x, w: Tensor = w, b: Tensor = b, y: Tensor = y) -> None:
                for _ in range(2 * LAYERS + 1):
                    norm(x, w, b, y, 1e-5)

            found[f"norm {name} {rows} rows"] = round(time_us(norms, 2 * LAYERS + 1, 5), 2)
    for rows in ROW_COUNTS:
        for settings in ({"top_k": 40}, *FILTERS, {"temperature": 1.0}):
            flags = {"full_vocab": "temperature" in settings, "top_p": "top_p" in settings}
            case = {**sampler_case(rows, **settings), **flags}
            us = time_us(functools.partial(sample, **case), 1)
            found[f"sample {rows} rows, {settings}"] = round(us, 2)
        # Each launch appends a token; a graph of one launch runs a few dozen times.
        for bad_words in ((), ("ab", "bca", "z")):
            us = time_us(functools.partial(adjust, *adjust_case(rows, 128, bad_words)), 1)
            found[f"adjust {rows} rows of 128 tokens{', bad words' * bool(bad_words)}"] = round(
                us, 2
            )
        case = sampler_case(rows)
        arguments = [case[name] for name in ("logits", "block_max", "state")]
        arguments[2][:, LOGPROBS.value] = 6
        arguments.append(torch.zeros(rows, WIDTH, dtype=torch.int64, device=DEVICE))
        us = time_us(functools.partial(measure, *arguments), 1)
        found[f"measure {rows} rows, 5 most likely tokens"] = round(us, 2)
    report(found)
