"""Section `kernels`: each kernel of a step beside its twin in torch, or the C++ sampler."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda import parts
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
from benchmarks.cuda.parts import Found
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
from gptbatch.pipeline.system.machine import cores
from tests.conftest import has_kernels
from tests.fake_device import measure_twin

# The most seconds of a case.
LIMIT = 20


def kernels(first: int = 0) -> None:
    """Compare each kernel with its twin: relative differences, or whether bits are equal.

    Samplers come first: no other section compares them with C++ over the same logits.
    """
    # The import of tests.conftest leaves one thread.
    torch.set_num_threads(cores().threads)
    torch.manual_seed(1)
    cases: dict[str, parts.Case] = {
        f"sample {settings}": partial(note_sample, settings)
        for settings in ({"top_k": 40}, *FILTERS, {"temperature": 1.0})
    }
    cases |= {"adjust": note_adjust, "measure": note_measure}
    for name in DTYPES:
        for int8 in (False, True):
            cases[f"attend {name}{' int8' * int8}"] = partial(note_attend, name, int8)
        cases[f"linear {name}"] = partial(note_linear, name)
        cases[f"norm {name}"] = partial(note_norm, name)
    parts.run_cases(cases, first, LIMIT)


def note_sample(settings: dict[str, Any], found: Found) -> None:
    """Note whether tokens and margins are those of the C++ sampler."""
    assert has_kernels(), "the C++ kernels cannot be built here"
    for width in (0.1, 3.0):
        case = sampler_case(64, width=width, **settings)
        sample(**case, full_vocab=True, top_p=True)
        margins = case["state"][:, MARGIN.value].contiguous().view(torch.float64).tolist()
        params = sampler_params(64, **settings)
        expected = sample_tokens(case["logits"].cpu(), params, [5] * 64, native=True)
        pairs = zip(case["sampled"].tolist(), margins, strict=True)
        rows = [
            row
            for row, (own, other) in enumerate(zip(pairs, expected, strict=True))
            if own != (other.token, other.decision_margin)
        ]
        key = f"sample {settings}, width {width}"
        found[f"{key}: equal"] = not rows
        if rows:
            found[f"{key}: rows that differ"] = rows
        report(found)


def note_adjust(found: Found) -> None:
    """Note whether `adjust` has the logits and maxima of its twin on the CPU."""
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
    found["adjust equal"] = all(torch.equal(a.cpu(), b) for a, b in pairs)


def note_measure(found: Found) -> None:
    """Note whether `measure` has the numbers of its twin on the CPU; one row has ties."""
    case = sampler_case(16)
    case["logits"][0] = case["logits"][0].round()
    case["block_max"][0] = case["block_max"][0].round()
    case["state"][:, LOGPROBS.value] = 21
    arguments = (case["logits"], case["block_max"], case["state"])
    measured = torch.zeros(16, WIDTH, dtype=torch.int64, device=DEVICE)
    twin = torch.zeros(16, WIDTH, dtype=torch.int64)
    measure(*arguments, measured)
    logits, block_max, state = (each.cpu() for each in arguments)
    measure_twin(logits, block_max, state, twin)
    found["measure equal"] = torch.equal(measured.cpu(), twin)


def note_attend(name: str, int8: bool, found: Found) -> None:
    """Compare `store` and `attend` at several lengths."""
    for context in (1, 64, 65, POSITIONS - 24):
        case = Case(4, context, DTYPES[name], int8=int8)
        case.run()
        out = case.out.clone()
        case.run(attend_twin, store_twin)
        note_difference(found, f"attend {name} {context}{' int8' * int8}", out, case.out)


def note_linear(name: str, found: Found) -> None:
    """Compare `linear`, with a bias and an activation."""
    dtype = DTYPES[name]
    x, matrix, bias = random(65, C, dtype=dtype), weight(INNER, C, name), random(INNER, dtype=dtype)
    y, twin = (torch.empty(65, INNER, dtype=dtype, device=DEVICE) for _ in range(2))
    linear(x, matrix, bias, None, y, "gelu_tanh")
    linear_twin(x, matrix, bias, None, twin, "gelu_tanh")
    note_difference(found, f"linear {name}", y, twin)


def note_norm(name: str, found: Found) -> None:
    """Compare `norm`."""
    x, w, b = (random(*shape, dtype=DTYPES[name]) for shape in ((65, C), (C,), (C,)))
    y, twin = torch.empty_like(x), torch.empty_like(x)
    norm(x, w, b, y, 1e-5)
    norm_twin(x, w, b, twin, 1e-5)
    note_difference(found, f"norm {name}", y, twin)


def note_difference(found: Found, key: str, a: Tensor, b: Tensor) -> None:
    """Report |a - b| / |b|, as a problem where rounding cannot explain it."""
    largest = 0.02 if b.dtype != torch.float32 or "int8" in key else 1e-4
    a, b = a.float().cpu(), b.float().cpu()
    value = float((a - b).norm() / b.norm())
    found[key] = value
    if math.isnan(value) or value > largest:
        found["problems"].append(key)
    report(found)
