"""The C++ kernels: build, cache, and results. The ops are tested for each instruction set."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import platform
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional as F

from gptbatch.pipeline.engine.logprobs import total_masses
from gptbatch.pipeline.engine.reference import mass
from gptbatch.pipeline.engine.sampling import sample_tokens
from gptbatch.pipeline.errors import DeviceError
from gptbatch.pipeline.kernels import build
from gptbatch.pipeline.kernels.build import KERNELS, Sources, Unit, build_kernels
from gptbatch.pipeline.kernels.compiler import KernelError
from gptbatch.pipeline.kernels.constants import HEAD_SIZE_MULTIPLE
from gptbatch.pipeline.kv_cache.interface import select_backend
from gptbatch.pipeline.kv_cache.quantization import BLOCK_SIZES, CacheDtype, round_trip_int8
from gptbatch.pipeline.kv_cache.spec import PADDED
from gptbatch.pipeline.model.config import Activation
from gptbatch.pipeline.model.linear import ACTIVATIONS, use_threads
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.system.error_text import shortened
from tests.conftest import has_kernels, run_gptbatch
from tests.paths import REPOSITORY
from tests.processes import LIMIT_S, child_environment, is_running, wait_for

# Builds a stand-in for the kernels, which takes a fraction of a second, in another process.
BUILD = """
import sys
from pathlib import Path
from gptbatch.pipeline.kernels.build import Sources, Unit, build_kernels
folder, sources = map(Path, sys.argv[1:])
build_kernels(folder, Sources(folder=sources, units=(Unit(name="tiny", sources=("tiny.cpp",)),)))
"""
# A compiler that records each call and writes "ok" to its output file.
FAKE = (
    'case "$*" in *--version) echo "fake 1.0"; exit;; esac\n'
    'echo x >> {calls}\nwhile [ "$1" != -o ]; do shift; done; echo ok > "$2"'
)
CALLS_PER_BUILD = len(KERNELS.units) + 1  # each unit, and the link


@pytest.fixture
def tiny(tmp_path: Path) -> Sources:
    """Return sources that compile at once."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "tiny.h").write_text("int answer();\n")
    (folder / "tiny.cpp").write_text('#include "tiny.h"\nint answer() { return 42; }\n')
    return Sources(folder=folder, units=(Unit(name="tiny", sources=("tiny.cpp",)),))


def needs_compiler() -> None:
    if not has_kernels():
        pytest.skip("no C++ compiler")


def build_in_child(
    folder: Path, sources: Sources, compiler: str | None = None
) -> subprocess.Popen[bytes]:
    environment = child_environment(**({} if compiler is None else {"CXX": compiler}))
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(folder), str(sources.folder)],
        env=environment,
        start_new_session=True,
    )


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
def test_a_killed_build_leaves_nothing_and_two_builds_share_a_folder(
    tmp_path: Path, tiny: Sources
) -> None:
    """The process is killed while a compiler runs that has written half of its output."""
    needs_compiler()
    folder = tmp_path / "kernels"
    started = tmp_path / "started"
    slow = script(
        tmp_path / "slow-c++",
        'while [ "$1" != -o ]; do shift; done; echo half > "$2"; '
        f"echo $$ >> {started}; exec sleep 600",
    )
    child = build_in_child(folder, tiny, slow)
    try:
        wait_for(lambda: started.exists() and started.read_text(), "the compiler")
        assert "half\n" in [left_over.read_text() for left_over in folder.glob("build-*/*.o")]
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    compilers = [int(pid) for pid in started.read_text().split()]
    wait_for(lambda: not any(map(is_running, compilers)), "the end of the compilers")
    assert not list(folder.glob("*.so"))
    children = [build_in_child(folder, tiny), build_in_child(folder, tiny)]
    assert [child.wait(timeout=LIMIT_S) for child in children] == [0, 0]
    assert len(list(folder.glob("*.so"))) == 1
    assert not list(folder.glob("build-*"))


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
def test_kernels_for_avx512_and_amx_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled and linked only: a CPU without the instructions cannot run them."""
    needs_compiler()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for name in ("_is_avx512_bf16_supported", "_is_vnni_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True)
    assert {"-mavx512bf16", "-mavx512vnni", "-mamx-bf16"} <= set(build.compile_flags())
    assert build_kernels(tmp_path).exists()


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_ops_pass_their_tests_with_fewer_instructions(capability: str) -> None:
    """Kernels for AVX2, and for no vector instructions, are built once per machine and run."""
    needs_compiler()
    if capability.upper() == torch.backends.cpu.get_cpu_capability():
        pytest.skip("the tests of this process run these kernels")
    file = Path(__file__).relative_to(REPOSITORY)
    options = ("-q", "-x", "-p", "no:cacheprovider", "-k", "test_op_", "-m", "not slow")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)],
        cwd=REPOSITORY,
        env=child_environment(ATEN_CPU_CAPABILITY=capability, PYTEST_ADDOPTS=""),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_a_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another flag or source changes the name, and so builds another library."""
    calls = tmp_path / "calls"
    fake = script(
        tmp_path / "c++",
        FAKE.format(calls=calls),
    )
    monkeypatch.setenv("CXX", fake)
    first = build_kernels(tmp_path / "kernels")
    assert build_kernels(tmp_path / "kernels") == first
    assert first.read_text() == "ok\n"
    record = json.loads(build.record_path(first).read_text())
    assert record["compiler"] == "fake 1.0"
    assert 0 < record["build_s"] < LIMIT_S
    assert calls.read_text() == "x\n" * CALLS_PER_BUILD
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build_kernels(tmp_path / "kernels") == first, "what is built needs no compiler"
    monkeypatch.setenv("CXX", f"{fake} -some-flag")
    monkeypatch.setattr(build, "COMMON_FLAGS", (*build.COMMON_FLAGS, "-DANOTHER"))
    assert build_kernels(tmp_path / "kernels") != first
    assert calls.read_text() == "x\n" * 2 * CALLS_PER_BUILD
    assert "-ffast-math" not in build.compile_flags()
    assert {"-fopenmp", "-ffp-contract=off"} <= set(build.compile_flags())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exit 3", "exit code 3): no message"),
        (
            '[ "$1" = --version ] && exit 0\n'
            'echo "linear.cpp:1: error: no such header" >&2; exit 1',
            "exit code 1): linear.cpp:1: error: no such",
        ),
        (
            '[ "$1" = --version ] && exit 0\n'
            f'echo "linear.cpp:1: error: {"no such word " * 40}" >&2; exit 1',
            f"exit code 1): {shortened('linear.cpp:1: error: ' + 'no such word ' * 40)}",
        ),
    ],
)
def test_the_error_of_a_compiler_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "bad-c++", text))
    with pytest.raises(KernelError, match="bad-c\\+\\+") as caught:
        build_kernels(tmp_path / "kernels")
    assert message in str(caught.value)
    assert not list(tmp_path.glob("kernels/*.so")) + list(tmp_path.glob("kernels/build-*"))


def test_a_held_lock_and_a_folder_that_cannot_be_written_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "c++", "exit 0"))
    monkeypatch.setattr(build, "LOCK_TIMEOUT_S", 0.2)
    folder = tmp_path / "kernels"
    folder.mkdir()
    with FileLock(folder / "lock"), pytest.raises(KernelError, match="another process has held it"):
        build_kernels(folder)
    (tmp_path / "file").touch()
    with pytest.raises(KernelError, match="XDG_CACHE_HOME"):
        build_kernels(tmp_path / "file" / "kernels")


def test_a_compiler_that_cannot_be_parsed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "c++ '-O3")
    with pytest.raises(KernelError, match="CXX=c\\+\\+ '-O3: cannot be parsed"):
        build_kernels(tmp_path / "kernels")


def test_an_interrupted_build_kills_its_compilers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Including the processes that a compiler driver such as g++ starts."""
    pids = tmp_path / "pids"
    monkeypatch.setenv(
        "CXX",
        script(
            tmp_path / "c++",
            f"trap '' TERM\nsleep 600 &\necho $! >> {pids}; echo $$ >> {pids}\nwait; wait",
        ),
    )
    started = 2 * len(KERNELS.units)

    def interrupt(number: int, frame: object) -> None:
        if pids.exists() and len(pids.read_text().splitlines()) == started:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            build_kernels(tmp_path / "kernels")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    processes = [int(pid) for pid in pids.read_text().split()]
    wait_for(lambda: not any(map(is_running, processes)), f"the end of {processes}")
    assert not list(tmp_path.glob("kernels/build-*"))


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the path belong to another user."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


@pytest.mark.parametrize(
    "mode",
    [0o777, 0o775, 0o757, None],
    ids=["for all", "for the group", "for others", "of another user"],
)
@pytest.mark.parametrize("where", ["kernels", "its parent"])
def test_a_cache_that_other_users_may_write_is_not_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
    mode: int | None,
) -> None:
    """The kernels are built in a private folder, which is removed afterwards."""
    monkeypatch.setenv("CXX", script(tmp_path / "c++", FAKE.format(calls=tmp_path / "calls")))
    monkeypatch.setattr(build, "user_cache_path", lambda name: tmp_path / name)
    loaded: list[Path] = []
    monkeypatch.setattr(build, "_load", loaded.append)
    load_kernels = build.load_kernels.__wrapped__
    load_kernels()
    folder = tmp_path / "gptbatch" / "kernels"
    assert loaded == list(folder.glob("*.so"))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    path = folder if where == "kernels" else folder.parent
    if mode is None:
        give_away(path, monkeypatch)
    else:
        path.chmod(mode)
    load_kernels()
    assert folder not in loaded[1].parents
    assert not loaded[1].exists()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert str(path) in warning
    assert "another user" in warning or f"mode {mode:o}" in warning


@pytest.mark.parametrize("mode", [0o777, None])
def test_a_library_that_other_users_may_write_is_built_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: int | None,
) -> None:
    calls = tmp_path / "calls"
    fake = script(tmp_path / "c++", FAKE.format(calls=calls))
    monkeypatch.setenv("CXX", fake)
    library = build_kernels(tmp_path / "kernels")
    if mode is None:
        if os.geteuid() != 0:
            pytest.skip("only root can give files away")
        give_away(library, monkeypatch)
    else:
        library.chmod(mode)
    again = build_kernels(tmp_path / "kernels")
    assert calls.read_text() == "x\n" * 2 * CALLS_PER_BUILD
    assert build.distrust(again) is None
    assert "not trusted; building it again" in caplog.text


def test_cache_folders_are_private_whatever_the_umask_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "c++", FAKE.format(calls=tmp_path / "calls")))
    before = os.umask(0)
    try:
        library = build_kernels(tmp_path / "cache" / "gptbatch" / "kernels")
    finally:
        os.umask(before)
    assert [build.distrust(path) for path in (library, *library.parents[:3])] == [None] * 4


@pytest.mark.slow
def test_runs_and_verify_work_without_a_compiler(tmp_path: Path) -> None:
    """A warning says how to get one. With `--attention ragged` it is an error."""
    environment = {"CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    ran = run_gptbatch(
        "generate",
        "--config",
        "demo",
        "--limit",
        "20",
        "--output",
        tmp_path / "out",
        env=environment,
    )
    assert ran.code == 0, ran.stderr
    assert ran.stderr.count("WARNING") == 1
    assert "install g++ or clang++" in ran.stderr
    assert ran.summary["batch_invariance"] == "verified"
    verified = run_gptbatch("verify", tmp_path / "out", "--all", env=environment)
    assert verified.code == 0, verified.stderr
    assert verified.summary["judged"] == "exactly"
    refused = run_gptbatch(
        "generate",
        "--config",
        "demo",
        "--limit",
        "2",
        "--attention",
        "ragged",
        "--output",
        tmp_path / "other",
        env=environment,
    )
    assert refused.code == 78
    assert "no-such-compiler" in refused.stderr


def test_an_old_gpu_has_padded_attention_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(DeviceError, match=r"compute capability 7\.5"):
        select_backend("ragged", torch.device("cuda"))
    assert select_backend("auto", torch.device("cuda")) == PADDED
    assert select_backend("padded", torch.device("cpu")) == PADDED


def test_a_build_is_announced_and_a_damaged_library_is_built_again(
    tmp_path: Path, tiny: Sources, caplog: pytest.LogCaptureFixture
) -> None:
    needs_compiler()
    caplog.set_level(logging.INFO, logger="gptbatch.kernels")
    folder = tmp_path / "kernels"
    library = build_kernels(folder, tiny)
    assert "building the C++ kernels" in caplog.text
    assert str(folder) in caplog.text
    caplog.clear()
    assert build_kernels(folder, tiny) == library
    assert not caplog.text
    library.write_bytes(library.read_bytes()[:5000])
    again = build_kernels(folder, tiny)
    assert "damaged; building it again" in caplog.text
    assert [path.stem for path in folder.glob("kernels-*.json")] == [again.stem]
    assert build_kernels(folder, tiny) == again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(1, 1), (5, 47), (33, 48), (64, 49), (768, 100), (301, 500)]
)
def test_op_linear_matches_torch_and_rows_are_independent(
    in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    needs_compiler()
    if dtype == torch.bfloat16 and not torch.ops.gptbatch.has_bfloat16():
        pytest.skip("this CPU does not compute in bfloat16")
    generator = torch.Generator().manual_seed(in_features)
    weight = (
        torch.randn(out_features, in_features, generator=generator).to(dtype) / in_features**0.5
    )
    bias = torch.randn(out_features, generator=generator)
    x, residual = (
        torch.randn(300, size, generator=generator).to(dtype)
        for size in (in_features, out_features)
    )
    packed = torch.ops.gptbatch.pack_weight(weight)
    whole = torch.ops.gptbatch.linear(x, packed, out_features, bias, residual, "none")
    expected = F.linear(x.double(), weight.double(), bias.double()) + residual.double()
    assert (whole.double() - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 0.04)
    for threads in (1, 2, 3, 4):
        with use_threads(threads):
            for first, rows in [
                (0, 300),
                *((rows % 7, rows) for rows in (1, 2, 3, 5, 8, 13, 33, 64, 129, 257)),
            ]:
                part = slice(first, first + rows)
                y = torch.ops.gptbatch.linear(
                    x[part], packed, out_features, bias, residual[part], "none"
                )
                assert torch.equal(y, whole[part])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_op_linear_has_the_bits_of_single_rows_at_every_row_count(activation: Activation) -> None:
    needs_compiler()
    if not torch.ops.gptbatch.has_bfloat16():
        pytest.skip("this CPU does not compute in bfloat16")
    generator = torch.Generator().manual_seed(1)
    x, weight, residual = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((70, 96), (100, 96), (70, 100))
    )
    packed = torch.ops.gptbatch.pack_weight(weight)
    linear = torch.ops.gptbatch.linear
    single = torch.cat(
        [
            linear(x[r : r + 1], packed, 100, None, residual[r : r + 1], activation)
            for r in range(70)
        ]
    )
    for rows in range(1, 71):
        y = linear(x[:rows], packed, 100, None, residual[:rows], activation)
        assert torch.equal(y, single[:rows]), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_op_pack_weight_into_used_memory(dtype: torch.dtype) -> None:
    needs_compiler()
    if dtype == torch.bfloat16 and not torch.ops.gptbatch.has_bfloat16():
        pytest.skip("this CPU does not compute in bfloat16")
    weight = torch.randn(37, 29).to(dtype)
    packed = torch.ops.gptbatch.pack_weight(weight)
    assert torch.ops.gptbatch.packed_shape(weight) == list(packed.shape)
    used = torch.full_like(packed, math.nan)
    torch.ops.gptbatch.pack_weight_out(weight, used)
    assert torch.equal(used, packed)
    with pytest.raises(RuntimeError, match="of shape"):
        torch.ops.gptbatch.pack_weight_out(weight, used[1:])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_op_linear_activations_match_torch(activation: Activation) -> None:
    needs_compiler()
    x = torch.cat(
        [torch.linspace(-12, 12, 499), torch.tensor([-1e4, -90.0, -0.0, 0.0, 90.0, 1e4])]
    )[:, None]
    y = torch.ops.gptbatch.linear(
        x, torch.ops.gptbatch.pack_weight(torch.eye(1)), 1, None, None, activation
    )
    expected = ACTIVATIONS[activation](x.double())
    assert ((y.double() - expected).abs() <= 1e-6 * expected.abs().clamp(min=1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("width", [1, 5, 16, 33, 100, 768])
def test_op_layer_norm_matches_torch_and_rows_are_independent(
    width: int, dtype: torch.dtype
) -> None:
    needs_compiler()
    torch.manual_seed(0)
    x = (torch.randn(300, width) * torch.logspace(-3, 3, 300)[:, None] + 5).to(dtype)
    x[7] = 3
    weight, bias = torch.randn(width, dtype=dtype), torch.randn(width, dtype=dtype)
    y = torch.ops.gptbatch.layer_norm(x, weight, bias, 1e-5)
    exact = F.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-5)
    # The rounding error of x - mean is divided by the standard deviation.
    tolerance = (
        1e-2
        if dtype == torch.bfloat16
        else 1e-5 * (1 + 5 / x.float().std(dim=1, correction=0, keepdim=True).clamp(min=3e-3))
    )
    assert ((y.double() - exact).abs() <= tolerance * (1 + exact.abs())).all()
    assert torch.equal(y[7], bias), "a row without variance"
    for count in (1, 2, 3):
        with use_threads(count):
            for part in (slice(0, 1), slice(7, 8), slice(3, 200), slice(299, 300)):
                assert torch.equal(
                    torch.ops.gptbatch.layer_norm(x[part].clone(), weight, bias, 1e-5), y[part]
                )
    x[3, 0] = math.nan
    spoilt = torch.ops.gptbatch.layer_norm(x, weight, bias, 1e-5)
    assert spoilt.isnan().any(1).nonzero().flatten().tolist() == [3]


def test_op_linear_and_layer_norm_reject_wrong_inputs() -> None:
    needs_compiler()
    packed = torch.ops.gptbatch.pack_weight(torch.zeros(5, 3))
    with pytest.raises(RuntimeError, match="shapes"):
        torch.ops.gptbatch.linear(torch.zeros(2, 3), packed, 500, None, None, "none")
    with pytest.raises(RuntimeError, match="one supported dtype"):
        torch.ops.gptbatch.linear(
            torch.zeros(2, 3, dtype=torch.float64), packed, 5, None, None, "none"
        )
    with pytest.raises(RuntimeError, match="x has no columns"):
        torch.ops.gptbatch.linear(
            torch.zeros(2, 0),
            torch.ops.gptbatch.pack_weight(torch.zeros(5, 0)),
            5,
            None,
            None,
            "none",
        )
    with pytest.raises(RuntimeError, match="unknown activation selu"):
        torch.ops.gptbatch.linear(torch.zeros(2, 3), packed, 5, None, None, "selu")
    with pytest.raises(RuntimeError, match="layer_norm: the shapes or dtypes"):
        torch.ops.gptbatch.layer_norm(torch.zeros(2, 3), torch.zeros(3), torch.zeros(4), 1e-5)


def naive_attention(qkv: Tensor, scale: float, cache_dtype: CacheDtype) -> Tensor:
    """Attend causally over one sequence in float64: qkv (N, 3, H, D) -> (N, H D)."""
    q, k, v = qkv.transpose(0, 1).transpose(1, 2)  # (H, N, D) each
    if cache_dtype == "int8":
        k, v = round_trip_int8(k), round_trip_int8(v)
    scores = scale * q.double() @ k.double().mT
    mask = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    out: Tensor = (weights @ v.double()).transpose(0, 1).flatten(1)
    return out


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("head_size", [1, 16, 64, 80])
def test_op_paged_attention_matches_softmax_and_tokens_are_independent(
    head_size: int, dtype: torch.dtype, cache_dtype: CacheDtype
) -> None:
    """All tokens in one call, then in calls of 1 to 7: the results are equal bit for bit."""
    needs_compiler()
    heads, n_tokens, scale = 3, 150, head_size**-0.5
    generator = torch.Generator().manual_seed(head_size)
    qkv = torch.randn(n_tokens, 3, heads, head_size, generator=generator).to(dtype)
    size = BLOCK_SIZES[cache_dtype]
    padded = -(-head_size // HEAD_SIZE_MULTIPLE) * HEAD_SIZE_MULTIPLE
    n_blocks = -(-n_tokens // size)
    stored, numbers = (torch.uint8, padded + 4) if cache_dtype == "int8" else (dtype, padded)
    table = torch.randperm(n_blocks, generator=generator).to(torch.int32)[None]

    def attend(calls: list[slice]) -> Tensor:
        cache = torch.zeros(heads, n_blocks, 2 * size * numbers, dtype=stored)
        positions = torch.arange(n_tokens)
        outs = [
            torch.ops.gptbatch.paged_attention(
                qkv[part],
                cache,
                table,
                torch.zeros(len(positions[part]), dtype=torch.long),
                positions[part],
                scale,
            )
            for part in calls
        ]
        return torch.cat(outs)

    whole = attend([slice(0, n_tokens)])
    expected = naive_attention(qkv, scale, cache_dtype)
    # int8 also quantizes queries and weights, to 15 bits; bfloat16 rounds the result to 8.
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-3 if cache_dtype == "int8" else 1e-5
    assert (whole.double() - expected).abs().max() <= tolerance
    rng, ends = random.Random(0), [0]
    while ends[-1] < n_tokens:
        ends.append(min(n_tokens, ends[-1] + rng.randint(1, 7)))
    pieces = [slice(*pair) for pair in itertools.pairwise(ends)]
    for threads in (1, 3):
        with use_threads(threads):
            assert torch.equal(attend(pieces), whole)


def test_op_attention_rejects_wrong_inputs() -> None:
    needs_compiler()
    bias, x = torch.zeros(3 * 2 * 16), torch.zeros(1, 8)
    packed = torch.ops.gptbatch.pack_weight(torch.zeros(len(bias), 8))
    table, one = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.long)

    def attend(
        cache: torch.Tensor, bias: torch.Tensor = bias, seq_indices: torch.Tensor = one
    ) -> None:
        torch.ops.gptbatch.qkv_paged_attention(x, packed, bias, cache, table, seq_indices, one, 1.0)

    attend(torch.zeros(2, 1, 2 * 16 * 32))
    with pytest.raises(RuntimeError, match="a block of the cache has 512 elements, not 1024"):
        attend(torch.zeros(2, 1, 2 * 16 * 16))
    with pytest.raises(RuntimeError, match="the cache must be uint8 or have the dtype of qkv"):
        attend(torch.zeros(2, 1, 2 * 16 * 32, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="the columns of a head must fill whole panels"):
        attend(torch.zeros(2, 1, 2 * 16 * 32), bias=torch.zeros(3 * 2 * 16 + 2))
    with pytest.raises(RuntimeError, match="must have one shape"):
        attend(torch.zeros(2, 1, 2 * 16 * 32), seq_indices=torch.zeros(2, dtype=torch.long))
    with pytest.raises(RuntimeError, match=r"qkv must be \(R, 3, H, D\)"):
        torch.ops.gptbatch.paged_attention(
            torch.zeros(1, 3 * 2 * 16), torch.zeros(2, 1, 2 * 16 * 32), table, one, one, 1.0
        )


def test_op_transformer_blocks_rejects_wrong_inputs() -> None:
    needs_compiler()
    weights = [
        torch.zeros(8),
        torch.zeros(8),
        torch.ops.gptbatch.pack_weight(torch.zeros(24, 8)),
        *[torch.zeros(24)] * 9,
    ]
    table, one = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.long)

    def run(weights: list[torch.Tensor], n_head: int, scales: list[float]) -> None:
        caches = [torch.zeros(n_head, 1, 2 * 16 * 32)]
        torch.ops.gptbatch.transformer_blocks(
            torch.zeros(1, 8), weights, 1e-5, "relu", caches, scales, table, one, one, None
        )

    for given, scales in ((weights[1:], [1.0]), (weights, [])):
        with pytest.raises(RuntimeError, match=r"weights, 1 caches and . scales do not fit"):
            run(given, 1, scales)
    for n_head in (0, 7):
        with pytest.raises(RuntimeError, match="does not fit a projection"):
            run(weights, n_head, [1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 2, 5, 31, 32, 33, 65, 700, 5003])
def test_op_sample_matches_torch(vocab_size: int, dtype: torch.dtype) -> None:
    """Tokens are equal. Margins differ by the rounding of their logarithms at most.

    Logits include ties, infinities and NaN.
    """
    needs_compiler()
    rng = random.Random(vocab_size)
    generator = torch.Generator().manual_seed(vocab_size)
    differing = 0
    for spread in (0.02, 1.0, 20.0):
        logits = (torch.randn(60, vocab_size, generator=generator) * spread).to(dtype)
        logits[0] = logits[0].round()
        logits[1] = 0
        if vocab_size > 2:
            logits[2, 1], logits[3, 0], logits[4, -1], logits[5, 1] = (
                -math.inf,
                math.nan,
                math.nan,
                math.inf,
            )
            logits[6, :-1] = -math.inf
        logits[7] = -math.inf
        rows = [
            SamplingParams(
                seed=rng.getrandbits(63),
                temperature=rng.choice([0, 1e-300, 0.3, 1, 2.5, 1e300]),
                top_k=rng.choice([0, 1, 2, 40, 1000, max(1, vocab_size - 1), 10**6]),
                max_new_tokens=1,
                min_p=rng.choice([0, 0, 1e-9, 0.05, 0.5, 1]),
                top_p=rng.choice([1, 1, 1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 1e-12]),
            )
            for _ in range(60)
        ]
        steps = [rng.randrange(1000) for _ in range(60)]
        margin_bounds = [rng.choice([math.inf, 0.01, 1.0]) for _ in range(60)]
        expected, sampled = (
            sample_tokens(logits, rows, steps, margin_bounds, native=native)
            for native in (False, True)
        )
        assert [s.token for s in sampled] == [s.token for s in expected]
        for row, a, b in zip(rows, sampled, expected, strict=True):
            assert a.decision_margin == b.decision_margin or a.decision_margin == pytest.approx(
                b.decision_margin, rel=1e-9, abs=1e-9 * max(1, row.temperature)
            )
        with use_threads(3):
            assert sample_tokens(logits, rows, steps, margin_bounds, native=True) == sampled
        differing += len({s.token for s in sampled})
    assert vocab_size == 1 or differing > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 2, 33, 63, 64, 65, 700, 50257, 70000])
def test_op_total_masses_matches_torch_and_the_oracle(vocab_size: int, dtype: torch.dtype) -> None:
    """Masses are whole numbers, and equal."""
    needs_compiler()
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(12, vocab_size, generator=generator) * 8 - 30
    logits[1] = logits[1].round()
    logits[2] = 0.1
    logits[3, : vocab_size // 2] = -math.inf
    logits[4, : vocab_size - 1] = -math.inf
    logits[5] *= 1e30
    logits[6, vocab_size // 2] = math.nan
    logits[7, vocab_size // 2] = math.inf
    logits[8] = -math.inf
    logits = logits.to(dtype)
    totals, largest = total_masses(logits, native=True)
    expected, expected_largest = total_masses(logits, native=False)
    assert totals.tolist() == expected.tolist()
    assert torch.equal(largest.nan_to_num(7), expected_largest.float().nan_to_num(7))
    assert totals[6:9].tolist() == [0, 0, 0]
    bits = 46 if vocab_size <= 65_536 else 40
    assert totals[4].item() == 2**bits
    for row in range(6 if vocab_size < 1000 else 2):
        values = logits[row].double().tolist()
        largest_value = max(values)
        assert totals[row].item() == sum(mass(x - largest_value, bits) for x in values)
    with use_threads(3):
        assert torch.equal(total_masses(logits, native=True)[0], totals)
    assert torch.equal(total_masses(logits[3:4], native=True)[0], totals[3:4])


def test_op_total_masses_rejects_wrong_tensors() -> None:
    needs_compiler()
    for wrong in (
        torch.zeros(3),
        torch.zeros(3, 0),
        torch.zeros(3, 4).T,
        torch.zeros(3, 4, dtype=torch.float64),
    ):
        with pytest.raises(RuntimeError, match="total_masses: logits must be"):
            torch.ops.gptbatch.total_masses(wrong)
