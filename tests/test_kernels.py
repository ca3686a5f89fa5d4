"""The C++ kernels: built once, whole or not at all; they compute what torch computes; and everything works without them."""

from __future__ import annotations

import math
import os
import platform
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch.nn import functional as F

from gptbatch.pipeline.engine.sampling import sample_tokens
from gptbatch.pipeline.errors import DeviceError
from gptbatch.pipeline.kernels import build
from gptbatch.pipeline.kernels.build import KernelError, build_kernels
from gptbatch.pipeline.kv_cache.interface import select_backend
from gptbatch.pipeline.kv_cache.spec import PADDED
from gptbatch.pipeline.model.config import Activation
from gptbatch.pipeline.model.linear import ACTIVATIONS, use_threads
from gptbatch.pipeline.types import SamplingParams
from tests.conftest import has_kernels, run_gptbatch
from tests.paths import PYTHONPATH

BUILD = "import sys; from pathlib import Path; from gptbatch.pipeline.kernels.build import build_kernels; build_kernels(Path(sys.argv[1]))"


def needs_compiler() -> None:
    if not has_kernels():
        pytest.skip("no C++ compiler")


def build_in_child(folder: Path, compiler: str | None = None) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH} | (
        {} if compiler is None else {"CXX": compiler}
    )
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(folder)], env=environment, start_new_session=True
    )


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
def test_a_build_killed_half_way_neither_hangs_nor_breaks_the_next(tmp_path: Path) -> None:
    """Killed while the compiler runs, which has written half of its files; then two builds at once."""
    needs_compiler()
    folder = tmp_path / "kernels"
    started = tmp_path / "started"
    slow = script(
        tmp_path / "slow-c++",
        f'while [ "$1" != -o ]; do shift; done; echo half > "$2"; echo $$ >> {started}; exec sleep 600',
    )
    child = build_in_child(folder, slow)
    try:
        deadline = time.monotonic() + 60
        while not started.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "half\n" in [left_over.read_text() for left_over in folder.glob("build-*/*.o")]
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    while any(is_running(int(compiler)) for compiler in started.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not list(folder.glob("*.so"))
    children = [build_in_child(folder), build_in_child(folder)]
    assert [child.wait(timeout=240) for child in children] == [0, 0]
    (library,) = folder.glob("*.so")
    assert not list(folder.glob("build-*"))
    load = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]); torch.ops.gptbatch.paged_attention"
    )
    subprocess.run([sys.executable, "-c", load, str(library)], check=True, timeout=120)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
@pytest.mark.parametrize("cpu", ["AVX512 with AMX", "AVX2", "DEFAULT"])
def test_they_build_for_other_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: str
) -> None:
    """Compiled and linked, whatever this machine has; a CPU without the instructions could not load it."""
    needs_compiler()
    capability, _, amx = cpu.partition(" with ")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for name in ("_is_avx512_bf16_supported", "_is_vnni_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: bool(amx))
    assert ("-mamx-bf16" in build.compile_flags()) == bool(amx)
    assert build_kernels(tmp_path).exists()


RUNS = len(build.SOURCES) + 1  # of the compiler: each source, then all together


def test_a_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name holds all that it depends on, so that another flag or source builds another one."""
    calls = tmp_path / "calls"
    fake = script(
        tmp_path / "c++",
        f'echo x >> {calls}\nwhile [ "$1" != -o ]; do shift; done; echo ok > "$2"',
    )
    monkeypatch.setenv("CXX", fake)
    first = build_kernels(tmp_path / "kernels")
    assert build_kernels(tmp_path / "kernels") == first
    assert first.read_text() == "ok\n"
    assert calls.read_text() == "x\n" * RUNS
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build_kernels(tmp_path / "kernels") == first, "what is built needs no compiler"
    monkeypatch.setenv("CXX", f"{fake} -some-flag")
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-DANOTHER"))
    assert build_kernels(tmp_path / "kernels") != first
    assert calls.read_text() == "x\n" * 2 * RUNS
    assert "-ffast-math" not in build.compile_flags()
    assert {"-fopenmp", "-ffp-contract=off"} <= set(build.compile_flags())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exit 3", "exit code 3): no message"),
        (
            '[ "$1" = --version ] && exit 0\necho "linear.cpp:1: error: no such header" >&2; exit 1',
            "exit code 1): linear.cpp:1: error: no such",
        ),
    ],
)
def test_compilers_that_fail_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "bad-c++", text))
    with pytest.raises(KernelError, match="bad-c\\+\\+") as caught:
        build_kernels(tmp_path / "kernels")
    assert message in str(caught.value)
    assert not list(tmp_path.glob("kernels/*.so")) + list(tmp_path.glob("kernels/build-*"))


def test_a_lock_that_never_opens_and_a_folder_that_cannot_be_written(
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


def test_compilers_end_with_a_build_that_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their children too: g++ starts others."""
    pids = tmp_path / "pids"
    monkeypatch.setenv(
        "CXX",
        script(
            tmp_path / "c++",
            f"trap '' TERM\nsleep 600 &\necho $! >> {pids}; echo $$ >> {pids}\nwait; wait",
        ),
    )
    started = 2 * len(build.SOURCES)

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
    deadline = time.monotonic() + 30
    for pid in pids.read_text().split():
        while is_running(int(pid)):
            assert time.monotonic() < deadline, f"process {pid} goes on"
            time.sleep(0.01)
    assert not list(tmp_path.glob("kernels/build-*"))


def is_running(pid: int) -> bool:
    """False for a zombie, which nobody may have waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the path look as if it were another user's."""
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
def test_a_cache_that_others_may_write_is_not_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
    mode: int | None,
) -> None:
    """The library that lies there is not loaded; one is built elsewhere, and is gone afterwards."""
    monkeypatch.setenv(
        "CXX", script(tmp_path / "c++", 'while [ "$1" != -o ]; do shift; done; echo ok > "$2"')
    )
    monkeypatch.setattr(build, "user_cache_path", lambda name: tmp_path / name)
    loaded: list[Path] = []
    monkeypatch.setattr(build, "_load", loaded.append)
    load_kernels = build.load_kernels.__wrapped__
    load_kernels()
    folder = tmp_path / "gptbatch" / "kernels"
    assert loaded == list(folder.glob("*.so"))
    assert not caplog.records
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
def test_a_library_that_others_may_have_changed_is_built_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: int | None,
) -> None:
    calls = tmp_path / "calls"
    fake = script(
        tmp_path / "c++", f'echo x >> {calls}\nwhile [ "$1" != -o ]; do shift; done; echo ok > "$2"'
    )
    monkeypatch.setenv("CXX", fake)
    library = build_kernels(tmp_path / "kernels")
    if mode is None:
        if os.geteuid() != 0:
            pytest.skip("only root can give files away")
        give_away(library, monkeypatch)
    else:
        library.chmod(mode)
    again = build_kernels(tmp_path / "kernels")
    assert calls.read_text() == "x\n" * 2 * RUNS
    assert build.distrust(again) is None
    assert "not trusted; building it again" in caplog.text


def test_folders_are_private_whatever_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "CXX", script(tmp_path / "c++", 'while [ "$1" != -o ]; do shift; done; echo ok > "$2"')
    )
    before = os.umask(0)
    try:
        library = build_kernels(tmp_path / "cache" / "gptbatch" / "kernels")
    finally:
        os.umask(before)
    assert [build.distrust(path) for path in (library, *library.parents[:3])] == [None] * 4


def test_without_a_compiler_everything_works(tmp_path: Path) -> None:
    """One warning that says how to get it; asked for by name it is an error."""
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


def test_ragged_is_for_cpus() -> None:
    with pytest.raises(DeviceError, match="CPU only"):
        select_backend("ragged", torch.device("cuda"))
    assert select_backend("auto", torch.device("cuda")) == PADDED
    assert select_backend("padded", torch.device("cpu")) == PADDED


@pytest.mark.slow
def test_the_first_run_says_what_it_builds_and_a_damaged_library_is_built_again(
    tmp_path: Path,
) -> None:
    needs_compiler()
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    arguments = (
        "generate",
        "--config",
        "demo",
        "--limit",
        "2",
        "--max-new-tokens",
        "2",
        "--attention",
        "ragged",
        "--output",
    )
    first = run_gptbatch(*arguments, tmp_path / "a", env=environment)
    assert first.code == 0, first.stderr
    assert "building the kernels" in first.stderr
    (library,) = (tmp_path / "cache" / "gptbatch" / "kernels").glob("kernels-*.so")
    assert "building" not in run_gptbatch(*arguments, tmp_path / "b", env=environment).stderr
    library.write_bytes(library.read_bytes()[:5000])
    again = run_gptbatch(*arguments, tmp_path / "c", env=environment)
    assert again.code == 0, again.stderr
    assert "damaged; building it again" in again.stderr
    assert run_gptbatch("diff", tmp_path / "a", tmp_path / "c").code == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(1, 1), (5, 47), (33, 48), (64, 49), (768, 100), (301, 500)]
)
def test_linears_are_those_of_torch_and_rows_do_not_know_each_other(
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
def test_activations_are_those_of_torch(activation: Activation) -> None:
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
def test_norms_are_those_of_torch_and_rows_do_not_know_each_other(
    width: int, dtype: torch.dtype
) -> None:
    needs_compiler()
    torch.manual_seed(0)
    x = (torch.randn(300, width) * torch.logspace(-3, 3, 300)[:, None] + 5).to(dtype)
    x[7] = 3
    weight, bias = torch.randn(width, dtype=dtype), torch.randn(width, dtype=dtype)
    y = torch.ops.gptbatch.layer_norm(x, weight, bias, 1e-5)
    exact = F.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-5)
    # what rounding x - mean leaves is stretched where a row hardly varies
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


def test_linears_say_what_does_not_fit() -> None:
    needs_compiler()
    packed = torch.ops.gptbatch.pack_weight(torch.zeros(5, 3))
    with pytest.raises(RuntimeError, match="shapes"):
        torch.ops.gptbatch.linear(torch.zeros(2, 3), packed, 500, None, None, "none")
    with pytest.raises(RuntimeError, match="types"):
        torch.ops.gptbatch.linear(
            torch.zeros(2, 3, dtype=torch.float64), packed, 5, None, None, "none"
        )
    with pytest.raises(RuntimeError, match="no activation selu"):
        torch.ops.gptbatch.linear(torch.zeros(2, 3), packed, 5, None, None, "selu")
    with pytest.raises(RuntimeError, match="layer_norm: the shapes or types do not fit"):
        torch.ops.gptbatch.layer_norm(torch.zeros(2, 3), torch.zeros(3), torch.zeros(4), 1e-5)


def test_attention_says_what_does_not_fit() -> None:
    needs_compiler()
    bias, x = torch.zeros(3 * 2 * 16), torch.zeros(1, 8)
    packed = torch.ops.gptbatch.pack_weight(torch.zeros(len(bias), 8))
    table, one = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.long)

    def attend(
        cache: torch.Tensor, bias: torch.Tensor = bias, seq_indices: torch.Tensor = one
    ) -> None:
        torch.ops.gptbatch.qkv_paged_attention(x, packed, bias, cache, table, seq_indices, one, 1.0)

    attend(torch.zeros(2, 1, 2 * 16 * 32))
    with pytest.raises(RuntimeError, match="the pages of the cache are of another size"):
        attend(torch.zeros(2, 1, 2 * 16 * 16))
    with pytest.raises(RuntimeError, match="the cache is of the type of qkv, or uint8"):
        attend(torch.zeros(2, 1, 2 * 16 * 32, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="a head takes whole panels"):
        attend(torch.zeros(2, 1, 2 * 16 * 32), bias=torch.zeros(3 * 2 * 16 + 2))
    with pytest.raises(RuntimeError, match="paged_attention: the shapes do not fit each other"):
        attend(torch.zeros(2, 1, 2 * 16 * 32), seq_indices=torch.zeros(2, dtype=torch.long))
    with pytest.raises(RuntimeError, match=r"qkv is to be \(R, 3, H, D\)"):
        torch.ops.gptbatch.paged_attention(
            torch.zeros(1, 3 * 2 * 16), torch.zeros(2, 1, 2 * 16 * 32), table, one, one, 1.0
        )


def test_blocks_say_what_does_not_fit() -> None:
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

    for some, scales in ((weights[1:], [1.0]), (weights, [])):
        with pytest.raises(
            RuntimeError, match=r"weights, 1 caches and . scales do not fit each other"
        ):
            run(some, 1, scales)
    for n_head in (0, 7):
        with pytest.raises(RuntimeError, match="the heads of the cache do not fit the projection"):
            run(weights, n_head, [1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 2, 5, 31, 32, 33, 65, 700, 5003])
def test_the_kernel_chooses_the_tokens_that_torch_chooses(
    vocab_size: int, dtype: torch.dtype
) -> None:
    """Ties, infinities, NaN, any parameters; margins agree but for the last bits of their logarithms."""
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
            )
            for _ in range(60)
        ]
        steps = [rng.randrange(1000) for _ in range(60)]
        bounds = [rng.choice([math.inf, 0.01, 1.0]) for _ in range(60)]
        theirs, ours = (
            sample_tokens(logits, rows, steps, bounds, native=native) for native in (False, True)
        )
        assert [choice.token for choice in ours] == [choice.token for choice in theirs]
        for row, a, b in zip(rows, ours, theirs, strict=True):
            assert a.decision_margin == b.decision_margin or a.decision_margin == pytest.approx(
                b.decision_margin, rel=1e-9, abs=1e-9 * max(1, row.temperature)
            )
        with use_threads(3):
            assert sample_tokens(logits, rows, steps, bounds, native=True) == ours
        differing += len({choice.token for choice in ours})
    assert vocab_size == 1 or differing > 3
