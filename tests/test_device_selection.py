"""Which engine and which attention a CUDA device gets: self-tests, and what is used instead."""

from __future__ import annotations

import dataclasses
import functools
import random
import sys
from typing import Any

import pytest
import torch

from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.kv_cache.spec import TRITON, Backend
from gptbatch.pipeline.model.gpt import GPT
from tests.conftest import our_model, random_model, tokenized

pytest.importorskip("triton")
from gptbatch.pipeline.engine.device_engine import DeviceEngine
from tests.device_cases import (
    EOS,
    SHAPE,
    TOKEN_BYTES,
    assert_equal,
    cpu_completions,
    packed_model,
    random_prompts,
    run,
)
from tests.fake_device import TWINS, LateStream


@pytest.fixture
def twins_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the layers of a model on the CPU run by the twins."""
    from gptbatch.pipeline.kernels.cuda import attend, linear, norm, store

    for module, name in ((attend, "attend"), (linear, "linear"), (norm, "norm"), (store, "store")):
        monkeypatch.setattr(module, name, getattr(module, f"{name}_twin"))


@pytest.mark.usefixtures("twins_everywhere")
def test_the_self_test_passes_and_finds_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptbatch.pipeline.engine import device_self_test
    from gptbatch.pipeline.engine.device_self_test import device_engine_problem

    # The sums of torch on a CPU depend on the number of rows.
    monkeypatch.setattr(device_self_test, "MARGIN_TOLERANCE", 1e-4)
    model = packed_model(TRITON)
    assert model.linear_kind == "triton"
    options: dict[str, Any] = {"kernels": TWINS, "stream": LateStream()}
    assert device_engine_problem(model, **options) == ""

    def reads_beyond(
        qkv: Any, cache: Any, tables: Any, seq: Any, positions: Any, *rest: Any
    ) -> None:
        TWINS.attend(qkv, cache, tables, seq, torch.where(positions == 50, 51, positions), *rest)

    def takes_another(*arguments: Any, **options: Any) -> None:
        TWINS.sample(*arguments, **options)
        arguments[4][2] ^= 1

    for wrong in ({"attend": reads_beyond}, {"sample": takes_another}):
        kernels = dataclasses.replace(TWINS, **wrong)
        problem = device_engine_problem(model, kernels=kernels, stream=LateStream())
        assert problem.startswith("tokens differ in batches of ")


@pytest.mark.usefixtures("twins_everywhere")
@pytest.mark.parametrize("problem", ["", "tokens differ", RuntimeError("no compiler")])
def test_the_engine_is_selected_by_its_self_test(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, problem: str | Exception
) -> None:
    from gptbatch.pipeline.engine import device_self_test, selection, streams

    calls = []

    def self_test(model: GPT, *, compares: bool) -> str:
        assert compares
        calls.append(model)
        if isinstance(problem, Exception):
            raise problem
        return problem

    monkeypatch.setattr(device_self_test, "device_engine_problem", self_test)
    monkeypatch.setattr(streams, "CudaStream", lambda device: LateStream())
    model = packed_model(TRITON)
    options: dict[str, Any] = {"batch_size": 2, "eos_token_ids": (), "stream": LateStream()}
    for _ in range(2):
        given_options = options if problem == "" else {**options}
        if problem != "":
            given_options.pop("stream")
        engine = selection.new_engine(model, **given_options)
        assert type(engine) is (Engine if problem else DeviceEngine)
    assert len(calls) == 1
    assert ("host takes every step" in caplog.text) == bool(problem)
    options.pop("stream")
    for needed in ({"record_logits": True}, {"window_full": "slide"}):
        assert type(selection.new_engine(model, **options, **needed)) is Engine
    assert type(selection.new_engine(our_model(random_model(**SHAPE)), **options)) is Engine


@pytest.mark.usefixtures("twins_everywhere")
def test_the_host_can_take_every_step() -> None:
    """The cache of the device with the engine of the host; windows slide."""
    cpu_model = our_model(random_model(**SHAPE))
    prompts = random_prompts(random.Random(5), 12)
    model = packed_model(TRITON)
    engine = Engine(model=model, batch_size=4, eos_token_ids=EOS, token_bytes=TOKEN_BYTES)
    assert_equal(run(engine, prompts), cpu_completions(cpu_model, prompts))
    sliding = [tokenized(i, [5] * 148, max_new_tokens=6, top_k=5) for i in range(2)]
    found = [
        run(Engine(model=m, batch_size=2, eos_token_ids=(), window_full="slide"), sliding)
        for m in (model, cpu_model)
    ]
    assert_equal(*found)


@pytest.mark.usefixtures("twins_everywhere")
def test_the_batch_invariance_self_test_runs_on_the_triton_layers() -> None:
    """The sums of torch may depend on the rows here, so its result is not compared."""
    from gptbatch.pipeline.model.self_test import select_batch_invariant_kernels

    report = select_batch_invariant_kernels(packed_model(TRITON))
    assert report.padding_plan in ("as_is", "pad_8", "pad_32", "fixed_64")
    assert not any("attention" in failure for failure in report.failures)


@pytest.mark.usefixtures("twins_everywhere")
@pytest.mark.parametrize("fails_by", ["a failure", "an exception", "nothing"])
def test_where_the_triton_kernels_fail_attention_is_padded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails_by: str
) -> None:
    from gptbatch.pipeline.config import EngineConfig
    from gptbatch.pipeline.errors import DeviceError
    from gptbatch.pipeline.kv_cache import interface
    from gptbatch.pipeline.model import self_test
    from gptbatch.pipeline.model.loading import prepare_model

    def self_test_of(model: GPT) -> self_test.SelfTestReport:
        is_wrong = model.backend.triton and fails_by != "nothing"
        if is_wrong and fails_by == "an exception":
            raise RuntimeError("no C compiler\nmore")
        failures = ("rows of mlp_in",) if is_wrong else ()
        return self_test.SelfTestReport(
            failures=failures, padding_plan="as_is", self_test_digest="0"
        )

    def load(backend: Backend) -> GPT:
        return packed_model(backend)

    monkeypatch.setattr(interface, "select_backend", lambda name, device: TRITON)
    monkeypatch.setattr(self_test, "select_batch_invariant_kernels", self_test_of)
    cpu = torch.device("cpu")
    loaded = prepare_model(EngineConfig(), cpu, load, batch_invariance="require")
    if fails_by == "nothing":
        assert loaded.model.backend is TRITON
        assert loaded.environment["attention"] == "ragged"
        assert loaded.environment["triton"].startswith("3.")
        assert len(loaded.environment["tiles"]) == 16
        return
    assert loaded.model.backend.name == loaded.environment["attention"] == "padded"
    assert "triton" not in loaded.environment
    words = "no C compiler)" if fails_by == "an exception" else "rows of mlp_in)"
    assert f"{words}; attention is padded" in caplog.text
    config = EngineConfig(attention="ragged")
    with pytest.raises(DeviceError):
        prepare_model(config, cpu, load, batch_invariance="require")


@pytest.mark.usefixtures("twins_everywhere")
@pytest.mark.parametrize(
    "wrong_rows", [range(0), range(1, 17), range(17, 65), range(65, 257), range(257, 1025)]
)
def test_the_self_test_covers_every_tile_of_the_logits(
    monkeypatch: pytest.MonkeyPatch, wrong_rows: range
) -> None:
    """Up to a full batch, whose logits the engine of the device computes at once."""
    from gptbatch.pipeline.kernels.cuda import linear
    from gptbatch.pipeline.model.self_test import select_batch_invariant_kernels

    model = packed_model(TRITON, n_layer=1)

    def differs(x: Any, w: Any, bias: Any, residual: Any, y: Any, *rest: Any) -> None:
        if len(w) == model.config.vocab_size:
            # Rounded from float64, so that torch gives equal bits for all numbers of rows.
            y.copy_(x.double() @ w.double().T)
            y[0] += len(x) in wrong_rows
        else:
            linear.linear_twin(x, w, bias, residual, y, *rest)

    monkeypatch.setattr(linear, "linear", differs)
    failures = select_batch_invariant_kernels(model).failures
    assert ("rows of lm_head" in failures) == (len(wrong_rows) > 0)


@pytest.mark.usefixtures("twins_everywhere")
@pytest.mark.parametrize("attention", ["auto", "ragged"])
@pytest.mark.parametrize("fails", ["", "to compile", "to run"])
def test_without_the_self_test_the_kernels_are_compiled_and_run_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, attention: Any, fails: str
) -> None:
    from gptbatch.pipeline.config import EngineConfig
    from gptbatch.pipeline.engine import device_self_test, selection, streams
    from gptbatch.pipeline.errors import DeviceError
    from gptbatch.pipeline.kernels.cuda import norm
    from gptbatch.pipeline.kv_cache import interface
    from gptbatch.pipeline.model import compiling
    from gptbatch.pipeline.model.loading import prepare_model

    def broken(*_: Any) -> None:
        raise RuntimeError(f"cannot {fails.removeprefix('to ')}\nmore")

    if fails:
        patched = (compiling, "compile_side_by_side") if fails == "to compile" else (norm, "norm")
        monkeypatch.setattr(*patched, broken)
    caplog.set_level("INFO", "gptbatch")
    monkeypatch.setattr(interface, "select_backend", lambda name, device: TRITON)
    monkeypatch.setattr(streams, "CudaStream", lambda device: LateStream())
    arguments = (EngineConfig(attention=attention), torch.device("cpu"), packed_model)
    if fails == "to run" and attention == "ragged":
        with pytest.raises(DeviceError, match=r"the Triton kernels do not work here: cannot run$"):
            prepare_model(*arguments, batch_invariance="off")
        return
    loaded = prepare_model(*arguments, batch_invariance="off")
    assert loaded.batch_invariance == "off"
    assert loaded.environment["self_test_digest"] is None
    assert loaded.environment["attention"] == ("padded" if fails == "to run" else "ragged")
    assert ("cannot run); attention is padded" in caplog.text) == (fails == "to run")
    assert ("are launched (cannot compile)" in caplog.text) == (fails == "to compile")
    if fails != "to run":
        # The engine of the device runs, and is not compared.
        works: list[int] = []
        stream = LateStream(fails=lambda: works.append(0))
        on_twins = functools.partial(DeviceEngine, kernels=TWINS, stream=stream)
        monkeypatch.setattr(device_self_test, "Engine", None)
        monkeypatch.setattr(device_self_test, "DeviceEngine", on_twins)
        options = {"batch_size": 2, "eos_token_ids": (), "stream": LateStream()}
        assert type(selection.new_engine(loaded.model, **options)) is DeviceEngine
        assert len(works) > 10
        assert "self-test" not in caplog.text


@pytest.mark.usefixtures("twins_everywhere")
@pytest.mark.parametrize("fails_in", ["the self-test", "the engine's self-test"])
def test_a_device_that_takes_no_more_work_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, fails_in: str
) -> None:
    """Padded attention, or the engine of the host, would fail with an unrelated message."""
    from gptbatch.pipeline.config import EngineConfig
    from gptbatch.pipeline.engine import device_self_test, selection
    from gptbatch.pipeline.errors import DeviceError
    from gptbatch.pipeline.kv_cache import interface
    from gptbatch.pipeline.model import self_test
    from gptbatch.pipeline.model.loading import prepare_model

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(interface, "select_backend", lambda name, device: TRITON)
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    monkeypatch.setattr(GPT, "device", torch.device("cuda"))
    monkeypatch.setattr(self_test, "select_batch_invariant_kernels", fails)
    monkeypatch.setattr(device_self_test, "device_engine_problem", fails)
    model, cpu = packed_model(TRITON), torch.device("cpu")
    message = r"cuda fail \(CUDA error: an illegal .* again with engine.attention: padded"
    if fails_in == "the self-test":
        with pytest.raises(DeviceError, match=message):
            prepare_model(EngineConfig(), cpu, lambda _: model, batch_invariance="auto")
    else:
        with pytest.raises(DeviceError, match=message):
            selection.new_engine(model, batch_size=2, eos_token_ids=())


def test_a_gpu_without_memory_for_the_model_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gptbatch.pipeline.config import EngineConfig
    from gptbatch.pipeline.errors import OutOfMemoryError
    from gptbatch.pipeline.model import loading

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(loading, "prepare_model", fails)
    with pytest.raises(OutOfMemoryError, match="model does not fit into the memory of cuda"):
        loading.load_model(
            None,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            EngineConfig(),
            torch.device("cuda"),
            batch_invariance="auto",
        )


def test_a_device_without_triton_or_too_old_has_padded_attention(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from gptbatch.pipeline.errors import DeviceError
    from gptbatch.pipeline.kv_cache.interface import select_backend

    cuda, capability = torch.device("cuda"), (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert select_backend("auto", cuda) is select_backend("ragged", cuda) is TRITON
    capability = (7, 5)
    assert select_backend("auto", cuda).name == "padded"
    assert "compute capability 7.5; 8.0 is needed" in caplog.text
    with pytest.raises(DeviceError, match="the Triton kernels are not available: the GPU has"):
        select_backend("ragged", cuda)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(DeviceError, match="triton cannot be imported"):
        select_backend("ragged", cuda)


@pytest.mark.parametrize(
    ("capability", "attention", "batch_size"), [((9, 0), "ragged", 1024), ((7, 5), "padded", 64)]
)
def test_doctor_shows_what_a_device_gets(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    attention: str,
    batch_size: int,
) -> None:
    from gptbatch.pipeline.config import EngineConfig
    from gptbatch.pipeline.doctor.defaults import probe_defaults
    from gptbatch.pipeline.model import loading

    monkeypatch.setattr(loading, "resolve_device", lambda engine: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**33, 2**34))
    section = probe_defaults(EngineConfig(threads=1), {"available": False, "reason": "none"})
    assert (section.facts["attention"], section.facts["batch_size"]) == (attention, batch_size)
    assert not section.problems
    refused = probe_defaults(EngineConfig(threads=1, attention="ragged"), {"available": True})
    problems = " ".join(refused.problems)
    assert ("the Triton kernels are not available" in problems) == (attention == "padded")
