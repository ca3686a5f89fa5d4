"""Builds the C++ kernels on first use, into the user's cache folder, and loads them.

A library is kept under a key of all that it depends on (source, flags, torch, the CPU's vector instructions), so that a
cache folder which machines share holds one for each kind, and under a hash of its content. It is compiled in a temporary folder
and moved into place whole, under a file lock: a build that was killed leaves nothing that could be loaded, and the next one
sweeps its folder. A library runs with the rights of the process, so it is loaded only where nobody else but root can have put
it there. Compilers end with the build, also where its process is killed.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from platformdirs import user_cache_path

logger = logging.getLogger("gptbatch.kernels")

FOLDER = Path(__file__).parent / "cpu"
SOURCES = (
    "attention.cpp",
    "transformer_blocks.cpp",
    "sample.cpp",
    "linear.cpp",
    "layer_norm.cpp",
    "rescore.cpp",
)
HEADERS = (
    "common.h",
    "attention.h",
    "epilogue.h",
    "kv_blocks_full.h",
    "kv_blocks_int8.h",
    "maxima.h",
    "gemm.h",
    "tokens.h",
)
LOCK_TIMEOUT_S = (
    600.0  # another process that builds takes seconds; one that hangs must not stop us for ever
)
BUILD_TIMEOUT_S = 600.0
_TEMPORARY = "build-"
# Waits for the end of its standard input, which the kernel closes when the build's process ends, and kills its process group.
_GUARD = """
import os, signal
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
os.read(0, 1)
os.killpg(0, signal.SIGKILL)
"""

# by torch.backends.cpu.get_cpu_capability(): without these at::vec falls back to plain loops
_CAPABILITY_FLAGS = {
    "AVX512": (
        "-mavx512f",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx512bw",
        "-mfma",
        "-DCPU_CAPABILITY=AVX512",
        "-DCPU_CAPABILITY_AVX512",
    ),
    "AVX2": ("-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"),
}
# -ffp-contract=off and no -ffast-math: the order and rounding of every sum is as written. -fopenmp: at::parallel_for runs on
# one thread without it, and says nothing.
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno")


class KernelError(Exception):
    """The kernels cannot be had on this machine; the message says why and what would help."""


@functools.cache
def load_kernels() -> None:
    """Make torch.ops.gptbatch available; builds it first where the cache has none. Raises KernelError.

    A cache folder that other users may write is not used: the library is built in a private one, for this process alone.
    """
    folder = user_cache_path("gptbatch") / "kernels"
    if problem := distrust(folder.parent) or distrust(folder):
        logger.warning(
            "%s: the kernels are built for this run alone; mend it, or name another cache folder in XDG_CACHE_HOME",
            problem,
        )
        with tempfile.TemporaryDirectory(prefix="gptbatch-kernels-") as private:
            _load(build_kernels(Path(private)))
    else:
        _load(build_kernels(folder))


def _load(library: Path) -> None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise KernelError(f"{library}: cannot be loaded ({error})") from error


def distrust(path: Path) -> str | None:
    """Why other users may have put a file there or changed it; None where they cannot, or where there is nothing yet.

    The owner must be this user or root, and nobody else may write.
    """
    if not hasattr(os, "geteuid"):  # Windows has no such owners and modes
        return None
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{path}: cannot be looked at ({error.strerror})"
    if status.st_uid not in (os.geteuid(), 0):
        return f"{path}: belongs to another user (uid {status.st_uid})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path}: other users may write it (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def build_kernels(folder: Path) -> Path:
    """The library in `folder`, built there unless it is there already: then no compiler is needed. Raises KernelError."""
    key = _key()
    if (library := _find(folder, key)) is not None:
        return library
    compiler = shlex.split(os.environ.get("CXX") or "c++") or ["c++"]
    if shutil.which(compiler[0]) is None:
        raise KernelError(
            f"there is no C++ compiler {compiler[0]} here; install g++ or clang++, or name one in CXX"
        )
    try:
        _make_private_folder(folder)
        with FileLock(folder / "lock", timeout=LOCK_TIMEOUT_S):
            return _find(folder, key) or _build(compiler, folder, key)
    except Timeout as error:
        raise KernelError(
            f"{folder / 'lock'}: another process has held it for {LOCK_TIMEOUT_S:.0f} s"
        ) from error
    except (
        OSError,
        NotImplementedError,
    ) as error:  # filelock raises the latter where a file system has no locks
        if isinstance(error, OSError) and error.errno in (
            errno.ENOMEM,
            errno.EAGAIN,
        ):  # no memory or process for a compiler
            raise
        raise KernelError(
            f"{folder}: cannot be written ({error}); name another cache folder in XDG_CACHE_HOME"
        ) from error


def _find(folder: Path, key: str) -> Path | None:
    """The library of this key whose content is what its name says: a damaged one would end the process when it is loaded."""
    for library in folder.glob(f"kernels-{key}-*.so"):
        if library.is_file() and distrust(library) is None and library.name == _name(key, library):
            return library
    return None


def _make_private_folder(folder: Path) -> None:
    """Create the folder and its parents as far as they are missing, writable by this user alone whatever the umask is."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


def _name(key: str, library: Path) -> str:
    return f"kernels-{key}-{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so"


def compile_flags() -> list[str]:
    """The flags that decide what the machine code does."""
    capability = _CAPABILITY_FLAGS.get(
        torch.backends.cpu.get_cpu_capability(),
        ("-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"),
    )
    more = []
    if capability is _CAPABILITY_FLAGS["AVX512"]:
        more += ["-mavx512bf16"] if torch.cpu._is_avx512_bf16_supported() else []
        more += ["-mavx512vnni"] if torch.cpu._is_vnni_supported() else []
        more += ["-mamx-tile", "-mamx-bf16"] if torch.cpu._is_amx_tile_supported() else []
    return [
        *_FLAGS,
        *capability,
        *more,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]


def _key() -> str:
    """16 hexadecimal digits of a hash of all that the results of the library depend on; which compiler made it is not among that."""
    sources = [(FOLDER / name).read_text(encoding="utf-8") for name in (*HEADERS, *SOURCES)]
    parts = [*sources, *compile_flags(), torch.__version__, platform.machine(), platform.system()]
    return hashlib.sha256("\0".join(parts).encode("utf-8")).hexdigest()[:16]


def _build(compiler: list[str], folder: Path, key: str) -> Path:
    """Compile under the lock.

    Folders of killed builds are swept, since their builder held this lock; so are libraries that are damaged or another user's.
    """
    for left_over in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    for damaged in folder.glob(f"kernels-{key}-*.so"):
        logger.warning(
            "%s: %s; building it again", damaged, "not trusted" if distrust(damaged) else "damaged"
        )
        damaged.unlink()
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=folder) as temporary:
        target = Path(temporary) / "kernels.so"
        logger.info("building the kernels, once for this machine and this torch; up to a minute")
        headers, libraries = (Path(torch.__file__).parent / name for name in ("include", "lib"))
        objects = {
            FOLDER / name: str(Path(temporary) / Path(name).with_suffix(".o").name)
            for name in SOURCES
        }
        compile_one = [*compiler, *compile_flags(), f"-I{headers}", "-c"]
        _run_together(
            [[*compile_one, str(source), "-o", made] for source, made in objects.items()], temporary
        )
        link = [
            *compiler,
            "-shared",
            "-fopenmp",
            *objects.values(),
            "-o",
            str(target),
            f"-L{libraries}",
            "-ltorch_cpu",
            "-lc10",
        ]
        _run_together([link], temporary)
        target.chmod(0o755)
        return target.replace(folder / _name(key, target))


@contextmanager
def _process_group() -> Iterator[int]:
    """A process group of this session; all in it are killed at the end of the block or of this process, SIGKILL included.

    A parent-death signal would end the compiler driver alone, not the compiler that it starts.
    """
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        yield guard.pid
    finally:
        with suppress(ProcessLookupError):
            os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()
        if guard.stdin is not None:
            guard.stdin.close()


def _run_together(commands: list[list[str]], temporary: str) -> None:
    """Run compilers side by side, with their temporary files in `temporary`. Raises KernelError with the first error.

    None outlives the call, nor this process.
    """
    deadline = time.monotonic() + BUILD_TIMEOUT_S
    running: list[subprocess.Popen[str]] = []
    try:
        with _process_group() as group:
            for command in commands:
                running.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.PIPE,
                        text=True,
                        errors="replace",
                        env={**os.environ, "TMPDIR": temporary},
                        process_group=group,
                    )
                )
            for process in running:
                _, said = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
                if process.returncode != 0:
                    lines = (
                        [line for line in said.splitlines() if "error" in line.lower()]
                        or said.splitlines()
                        or ["no message"]
                    )
                    raise KernelError(
                        f"{commands[0][0]} cannot build it (exit code {process.returncode}): {lines[0][:300]}"
                    )
    except subprocess.TimeoutExpired as error:
        raise KernelError(
            f"{commands[0][0]} has not ended after {BUILD_TIMEOUT_S:.0f} s"
        ) from error
    finally:
        for process in running:
            process.wait()
            if process.stderr is not None:
                process.stderr.close()
