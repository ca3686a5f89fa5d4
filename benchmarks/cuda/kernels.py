"""Section `kernels`: each kernel of a step beside its twin in torch, or the C++ sampler."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.cases import (
    FILTERS,
    N_TOKEN_BYTES,
    Case,
    adjust_case,
    sampler_case,
    sampler_params,
)
from benchmarks.cuda.common import (
    DEVICE,
    DTYPES,
    INNER,
    POSITIONS,
    VOCAB,
    C,
    random,
    report,
    weight,
)
from gptbatch.pipeline.engine.sampling import sample_tokens
from gptbatch.pipeline.kernels.cuda.adjust import adjust, adjust_twin
from gptbatch.pipeline.kernels.cuda.adjustments import AdjustmentLayout, Adjustments
from gptbatch.pipeline.kernels.cuda.attend import attend_twin
from gptbatch.pipeline.kernels.cuda.linear import linear, linear_twin
from gptbatch.pipeline.kernels.cuda.logprobs import WIDTH, measure
from gptbatch.pipeline.kernels.cuda.norm import norm, norm_twin
from gptbatch.pipeline.kernels.cuda.sample import sample
from gptbatch.pipeline.kernels.cuda.state import LOGPROBS, MARGIN
from gptbatch.pipeline.kernels.cuda.store import store_twin
from tests.conftest import has_kernels
from tests.fake_device import measure_twin


def kernels() -> None:
    """Compare each kernel with its twin: relative differences, or whether bits are equal."""
    torch.manual_seed(1)
    found: dict[str, Any] = {"problems": []}
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
        for context in (1, 64, 65, POSITIONS - 24):
            for int8 in (False, True):
                case = Case(4, context, dtype, int8=int8)
                case.run()
                out = case.out.clone()
                case.run(attend_twin, store_twin)
                key = f"attend {name} {context}{' int8' * int8}"
                note_difference(found, key, out, case.out)
    found["adjust equal"] = adjust_bits()
    report(found)
    found["measure equal"] = measure_bits()
    report(found)
    sampler_bits(found)
    report(found)


def note_difference(found: dict[str, Any], key: str, a: Tensor, b: Tensor) -> None:
    """Report |a - b| / |b|, as a problem where rounding cannot explain it."""
    largest = 0.02 if b.dtype != torch.float32 or "int8" in key else 1e-4
    a, b = a.float().cpu(), b.float().cpu()
    value = float((a - b).norm() / b.norm())
    found[key] = value
    if math.isnan(value) or value > largest:
        found["problems"].append(key)
    report(found)


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


def sampler_bits(found: dict[str, Any]) -> None:
    """Note whether tokens and margins are those of the C++ sampler, by settings."""
    if not has_kernels():
        found["problems"].append("sampler: the C++ kernels cannot be built here")
        return
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
            report(found)
