"""Build the C++ kernels on first use, keep them in the user's cache folder, and load them.

The file name of a library holds two hashes. The first is of all inputs of the build: sources,
flags, torch version, CPU capability. Machines of several kinds can share a cache folder. The
second is of the library's content and detects damage.

A library is compiled in a temporary folder, under a file lock, and moved into place when it is
complete. A JSON file beside it records compiler and time, for `doctor`. The next build removes the
folder of a killed one. A library runs with the rights of the process, so files that other users
could have written are not loaded.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from gptbatch.pipeline.kernels.compiler import (
    KernelError,
    compiler_command,
    compiler_version,
    run_compilers,
)
from gptbatch.pipeline.kernels.constants import LAYOUT

logger = logging.getLogger("gptbatch.kernels")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One translation unit: sources that are compiled together, which parses their headers once."""

    name: str
    sources: tuple[str, ...]
    optimization: str = "-O3"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The C++ files of a library. Headers are all files *.h in the folder."""

    folder: Path
    units: tuple[Unit, ...]


# Only the first unit includes headers of torch, which take most of its time. It computes nothing,
# so -O1 does for it.
KERNELS = Sources(
    folder=Path(__file__).parent / "cpu",
    units=(
        Unit(
            name="ops",
            sources=("ops.cpp", "transformer_blocks.cpp", "threads.cpp"),
            optimization="-O1",
        ),
        Unit(name="attention", sources=("attention.cpp",)),
        Unit(
            name="dense",
            sources=(
                "embedding.cpp",
                "linear.cpp",
                "layer_norm.cpp",
                "sample.cpp",
                "total_masses.cpp",
                "rescore.cpp",
            ),
        ),
    ),
)
# Another process builds for seconds. The limit is for one that hangs.
LOCK_TIMEOUT_S = 600.0
_TEMPORARY = "build-"
# By torch.backends.cpu.get_cpu_capability().
CAPABILITY_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
# -ffp-contract=off and no -ffast-math keep the order and rounding of every sum. at::parallel_for
# needs -fopenmp: without it, it runs on one thread and reports nothing.
COMMON_FLAGS = ("-std=c++20", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno")


@functools.cache
def load_kernels() -> None:
    """Make torch.ops.gptbatch available.

    Builds the library if the cache has none. If other users may write the cache folder, the library
    is built in a private folder, for this process only.

    Raises:
        KernelError: There is no compiler, or it fails, or the library cannot be stored or loaded.
    """
    folder = cache_folder()
    if problem := distrust_folder(folder):
        logger.warning(
            "%s: the kernels are built for this run only; correct the owner and mode, "
            "or set XDG_CACHE_HOME to another cache folder",
            problem,
        )
        with tempfile.TemporaryDirectory(prefix="gptbatch-kernels-") as private:
            _load(build_kernels(Path(private)))
    else:
        _load(build_kernels(folder))


def cache_folder() -> Path:
    """Return the folder of the libraries in the user's cache."""
    return user_cache_path("gptbatch") / "kernels"


def find_library(folder: Path) -> Path | None:
    """Return the intact library of the kernels in `folder`; None if it must be built."""
    return _find(folder, _key(KERNELS))


def lock_path(folder: Path) -> Path:
    """Return the file that a build locks."""
    return folder / "lock"


def _load(library: Path) -> None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise KernelError(f"{library}: cannot be loaded ({error}); delete the file") from error


def distrust(path: Path) -> str | None:
    """Say why another user could have written this path; None if only this user and root could.

    A path that does not exist is trusted.
    """
    # Windows has no such owners and modes.
    if not hasattr(os, "geteuid"):
        return None
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{path}: cannot read owner and mode ({error.strerror})"
    if status.st_uid not in (os.geteuid(), 0):
        return f"{path}: belongs to another user (uid {status.st_uid})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path}: other users may write it (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def distrust_folder(folder: Path) -> str | None:
    """Say why another user could have written files in a cache folder; None if not."""
    return distrust(folder.parent) or distrust(folder)


def build_kernels(folder: Path, sources: Sources = KERNELS) -> Path:
    """Return the library in `folder`; build it if it is missing.

    A library that exists needs no compiler.

    Raises:
        KernelError: There is no compiler, or it fails, or the folder cannot be written.
    """
    key = _key(sources)
    if (library := _find(folder, key)) is not None:
        return library
    compiler = compiler_command()
    if shutil.which(compiler[0]) is None:
        raise KernelError(
            f"no C++ compiler {compiler[0]} found; install g++ or clang++, or name one in CXX"
        )
    try:
        _make_private_folder(folder)
        with FileLock(lock_path(folder), timeout=LOCK_TIMEOUT_S):
            return _find(folder, key) or _build(compiler, folder, key, sources)
    except Timeout as error:
        raise KernelError(
            f"{lock_path(folder)}: another process has held it for {LOCK_TIMEOUT_S:.0f} s; "
            "end that process, or set XDG_CACHE_HOME to another cache folder"
        ) from error
    # filelock raises NotImplementedError on a file system without locks.
    except (OSError, NotImplementedError) as error:
        # No memory or process for a compiler: not a property of the folder.
        if isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EAGAIN):
            raise
        raise KernelError(
            f"{folder}: cannot be written ({error}); set XDG_CACHE_HOME to another cache folder"
        ) from error


def record_path(library: Path) -> Path:
    """Return the JSON file beside a library: its compiler, and the seconds of the build."""
    return library.with_suffix(".json")


def compile_flags() -> list[str]:
    """Return the flags that decide the machine code."""
    capability = torch.backends.cpu.get_cpu_capability()
    extensions = []
    if capability == "AVX512":
        extensions += ["-mavx512bf16"] if torch.cpu._is_avx512_bf16_supported() else []
        extensions += ["-mavx512vnni"] if torch.cpu._is_vnni_supported() else []
        extensions += ["-mamx-tile", "-mamx-bf16"] if torch.cpu._is_amx_tile_supported() else []
    return [
        *COMMON_FLAGS,
        *CAPABILITY_FLAGS.get(capability, ()),
        *extensions,
        *(f"-DGPTBATCH_{name}={value}" for name, value in LAYOUT.items()),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]


def _key(sources: Sources) -> str:
    """Hash all inputs of a build, except the compiler, to 16 hexadecimal digits."""
    files = [*sorted(sources.folder.glob("*.h")), *sorted(sources.folder.glob("*.cpp"))]
    parts = [
        *(path.name for path in files),
        *(path.read_text(encoding="utf-8") for path in files),
        repr(sources.units),
        *compile_flags(),
        torch.__version__,
        platform.machine(),
        platform.system(),
    ]
    return hashlib.sha256("\0".join(parts).encode("utf-8")).hexdigest()[:16]


def _name(key: str, library: Path) -> str:
    return f"kernels-{key}-{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so"


def _find(folder: Path, key: str) -> Path | None:
    """Return the intact library of this key; loading a damaged one could crash the process."""
    for library in folder.glob(f"kernels-{key}-*.so"):
        if library.is_file() and distrust(library) is None and library.name == _name(key, library):
            return library
    return None


def _make_private_folder(folder: Path) -> None:
    """Create the folder and missing parents, writable by this user only, whatever the umask is."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


def _build(compiler: list[str], folder: Path, key: str, sources: Sources) -> Path:
    """Compile and link; the caller holds the lock."""
    # A temporary folder that exists belongs to a killed build, which held this lock.
    for left_over in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    for damaged in folder.glob(f"kernels-{key}-*.so"):
        problem = "not trusted" if distrust(damaged) else "damaged"
        logger.warning("%s: %s; building it again", damaged, problem)
        damaged.unlink()
        record_path(damaged).unlink(missing_ok=True)
    logger.info(
        "building the C++ kernels with %s, once for this machine and this version of torch "
        "(under a minute); the library is kept in %s",
        compiler[0],
        folder,
    )
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=folder) as temporary:
        headers, libraries = (Path(torch.__file__).parent / name for name in ("include", "lib"))
        compiles, objects = [], []
        for unit in sources.units:
            source = Path(temporary) / f"unit_{unit.name}.cpp"
            source.write_text("".join(f'#include "{name}"\n' for name in unit.sources))
            objects.append(str(source.with_suffix(".o")))
            flags = [unit.optimization, *compile_flags(), f"-I{headers}", f"-I{sources.folder}"]
            compiles.append([*compiler, *flags, "-c", str(source), "-o", objects[-1]])
        target = Path(temporary) / "kernels.so"
        link = [*compiler, "-shared", "-fopenmp", *objects, "-o", str(target)]
        began = time.monotonic()
        run_compilers(compiles, temporary)
        run_compilers([[*link, f"-L{libraries}", "-ltorch_cpu", "-lc10"]], temporary)
        build_s = time.monotonic() - began
        target.chmod(0o755)
        library = folder / _name(key, target)
        record = {
            "compiler": compiler_version(compiler) or compiler[0],
            "build_s": round(build_s, 3),
        }
        record_path(library).write_text(json.dumps(record), encoding="utf-8")
        return target.replace(library)
