"""Sections `kernels`, `cpu-bits` and `kernel-times`: the kernels of a step but the linears."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.common import (
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
from gptbatch.pipeline.kernels.cuda.attend import attend, attend_twin
from gptbatch.pipeline.kernels.cuda.linear import linear, linear_twin
from gptbatch.pipeline.kernels.cuda.norm import norm, norm_twin
from gptbatch.pipeline.kernels.cuda.sample import sample, scratch_sizes
from gptbatch.pipeline.kernels.cuda.store import LayerCache, store, store_twin
from gptbatch.pipeline.kernels.cuda.tiles import MAX_COLUMNS
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.types import TokenizedPrompt


class Case:
    """Rows of one length over a cache in random blocks; unused places hold garbage."""

    def __init__(self, rows: int, context: int, dtype: torch.dtype, *, int8: bool = False) -> None:
        per_row = -(-context // 64)
        n_blocks, shape = rows * per_row, (rows * per_row, 2, H, 64)
        self.tables = torch.randperm(n_blocks, device="cuda").view(rows, per_row)
        self.seq_indices = torch.arange(rows, device="cuda", dtype=torch.int32)
        self.positions = torch.full((rows,), context - 1, device="cuda", dtype=torch.int32)
        self.qkv = random(rows, 3 * C, dtype=dtype)
        self.out = torch.empty(rows, C, dtype=dtype, device="cuda")
        if int8:
            data = torch.randint(-127, 128, (*shape, C // H), dtype=torch.int8, device="cuda")
            self.cache = LayerCache(data, torch.rand(shape, device="cuda") / 100)
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

    logits = torch.randn(rows, VOCAB, device="cuda") * width
    padded = torch.nn.functional.pad(logits, (0, -VOCAB % MAX_COLUMNS), value=float("-inf"))
    params = sampler_params(rows, **settings)
    block_max = padded.view(rows, -1, MAX_COLUMNS).amax(dim=2)
    small, large = scratch_sizes(block_max.shape[1])
    return {
        "logits": logits,
        "block_max": block_max,
        "state": state_of(
            [{"step": 5, "params": each} for each in params], vocab_size=VOCAB
        ).cuda(),
        "scratch": (
            torch.zeros(rows, small, dtype=torch.int32, device="cuda"),
            torch.zeros(rows, large, dtype=torch.int64, device="cuda"),
        ),
        "sampled": torch.zeros(rows, dtype=torch.int32, device="cuda"),
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


def difference(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b|."""
    a, b = a.float().cpu(), b.float().cpu()
    return float((a - b).norm() / b.norm())


def kernels() -> None:
    """Compare each kernel with its twin; report relative differences."""
    torch.manual_seed(1)
    found: dict[str, Any] = sampler_bits()
    for name, dtype in DTYPES.items():
        x, w, b = (random(*shape, dtype=dtype) for shape in ((65, C), (C,), (C,)))
        y, twin = torch.empty_like(x), torch.empty_like(x)
        norm(x, w, b, y, 1e-5)
        norm_twin(x, w, b, twin, 1e-5)
        found[f"norm {name}"] = difference(y, twin)
        matrix = weight(INNER, C, name)
        y, twin = (torch.empty(65, INNER, dtype=dtype, device="cuda") for _ in range(2))
        bias = random(INNER, dtype=dtype)
        linear(x, matrix, bias, None, y, "gelu_tanh")
        linear_twin(x, matrix, bias, None, twin, "gelu_tanh")
        found[f"linear {name}"] = difference(y, twin)
        report(found)
        for context in (1, 64, 65, 1000):
            for int8 in (False, True):
                case = Case(4, context, dtype, int8=int8)
                case.run()
                out = case.out.clone()
                case.run(attend_twin, store_twin)
                found[f"attend {name} {context}{' int8' * int8}"] = difference(out, case.out)
        report(found)


def cpu_bits() -> None:
    """Compare the float32 kernels with the C++ kernels of the CPU, bit for bit.

    The digests of all logits, tokens and margins of a model as wide as GPT-2, with every activation
    and both caches: the engines of the host, and the engine of the device.
    """
    from gptbatch.pipeline.bench.random_model import random_model
    from gptbatch.pipeline.engine.device_engine import DeviceEngine
    from gptbatch.pipeline.engine.engine import Engine
    from gptbatch.pipeline.kv_cache.spec import RAGGED, TRITON
    from gptbatch.pipeline.model.config import GPTConfig
    from tests.arithmetic_digests import prompts
    from tests.conftest import has_kernels

    if not has_kernels():
        report({"error": "the C++ kernels cannot be built here"})
        return
    found: dict[str, Any] = {}
    rows = prompts(VOCAB, (3, 70, 1, 129, 17, 40, 66, 5, 30, 9), 12)
    rows += filtered_prompts(rows)
    for activation in ("gelu_tanh", "gelu", "silu", "tanh", "relu"):
        config = GPTConfig(
            vocab_size=VOCAB,
            n_positions=POSITIONS,
            n_embd=C,
            n_inner=INNER,
            n_layer=2 if activation == "gelu_tanh" else 1,
            n_head=H,
            activation=activation,
        )
        for cache_dtype in ("auto", "int8"):
            models = {
                device: random_model(
                    config,
                    dtype=torch.float32,
                    device=torch.device(device),
                    backend=RAGGED if device == "cpu" else TRITON,
                    cache_dtype=cache_dtype,
                )
                for device in ("cpu", "cuda")
            }
            engines = [
                Engine(model=model, batch_size=7, eos_token_ids=(), record_logits=True)
                for model in models.values()
            ]
            engines.append(DeviceEngine(model=models["cuda"], batch_size=7, eos_token_ids=()))
            cpu, host, device_ = (
                sorted(
                    (done for some in engine.generate(iter(rows)) for done in some),
                    key=lambda done: done.prompt.index,
                )
                for engine in engines
            )
            key = f"{activation} {cache_dtype}"
            found[f"{key}: logits equal"] = sum(
                a.logits_digest == b.logits_digest for a, b in zip(cpu, host, strict=True)
            ) == len(rows)
            found[f"{key}: tokens equal"] = all(
                a.token_ids == b.token_ids == c.token_ids
                for a, b, c in zip(cpu, host, device_, strict=True)
            )
            found[f"{key}: margins of the device equal"] = all(
                a.min_decision_margin == b.min_decision_margin
                for a, b in zip(cpu, device_, strict=True)
            )
            report(found)


def filtered_prompts(rows: list[TokenizedPrompt]) -> list[TokenizedPrompt]:
    """Return the rows once more, with the settings of FILTERS."""
    made = []
    for number, row in enumerate(rows):
        filters: dict[str, Any] = {"temperature": 0.9, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        filters |= FILTERS[number % len(FILTERS)]
        index = len(rows) + number
        params = dataclasses.replace(row.prompt.params, **filters)
        prompt = dataclasses.replace(row.prompt, index=index, prompt_id=str(index), params=params)
        made.append(dataclasses.replace(row, prompt=prompt))
    return made


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
    report(found)
