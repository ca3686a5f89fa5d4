"""Probes of the C++ kernels: compiler, cache folder, build."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from gptbatch.pipeline.doctor.section import Section
from gptbatch.pipeline.storage.regular_file import read_json
from gptbatch.pipeline.system.file_lock import is_locked

# A build took 3 MiB with GCC 12, for its objects and the library.
MIN_FREE_BYTES = 16 * 2**20


def probe_compiler() -> Section:
    """Return the compiler that a build would use."""
    from gptbatch.pipeline.kernels.compiler import compiler_command, compiler_version

    command = compiler_command()
    path = shutil.which(command[0])
    return Section(
        facts={
            "command": " ".join(command),
            "path": path,
            "version": None if path is None else compiler_version(command),
            "CXX": os.environ.get("CXX"),
        }
    )


def probe_kernel_cache() -> Section:
    """Return the folder of the built kernels: its place, space and lock."""
    from gptbatch.pipeline.kernels.build import (
        cache_folder,
        distrust_folder,
        find_library,
        lock_path,
    )

    folder = cache_folder()
    existing = nearest_existing(folder)
    distrusted = distrust_folder(folder)
    libraries = list(folder.glob("kernels-*.so"))
    free = shutil.disk_usage(existing).free
    section = Section(
        facts={
            "folder": str(folder),
            "exists": folder.is_dir(),
            "writable": existing.is_dir() and os.access(existing, os.W_OK),
            "not_trusted": distrusted,
            "locked": is_locked(lock_path(folder)),
            "free_bytes": free,
            "libraries": len(libraries),
            "library_bytes": sum(library.stat().st_size for library in libraries),
        }
    )
    if distrusted is not None:
        section.warnings.append(
            f"{distrusted}: every run builds the kernels again; correct the owner and mode, or "
            "set XDG_CACHE_HOME to another cache folder"
        )
        return section
    is_built = find_library(folder) is not None
    if not is_built and free < MIN_FREE_BYTES:
        section.warnings.append(
            f"{existing}: {free / 2**20:.0f} MiB are free, too few to build the kernels; free "
            "some, or set XDG_CACHE_HOME to another cache folder"
        )
    if not is_built and section.facts["locked"]:
        section.warnings.append(
            f"{lock_path(folder)}: another process holds the lock and builds the kernels; run "
            "doctor again when it has ended"
        )
    return section


def probe_kernels() -> Section:
    """Load the kernels, and build them if the cache folder does not hold them."""
    from gptbatch.pipeline.kernels.build import (
        cache_folder,
        distrust_folder,
        find_library,
        load_kernels,
        lock_path,
        record_path,
    )
    from gptbatch.pipeline.kernels.compiler import KernelError

    folder = cache_folder()
    trusted = distrust_folder(folder) is None
    before = find_library(folder) if trusted else None
    if trusted and before is None and is_locked(lock_path(folder)):
        reason = "another process builds them"
        return Section(facts=_not_available(reason))
    began = time.monotonic()
    try:
        load_kernels()
    except KernelError as error:
        return Section(
            facts=_not_available(str(error)),
            warnings=[f"the C++ kernels are not available, so runs are slower: {error}"],
        )
    seconds = time.monotonic() - began
    library = find_library(folder) if trusted else None
    record: dict[str, Any] = _record(record_path(library)) if library is not None else {}
    return Section(
        facts={
            "available": True,
            "reason": None,
            "library": None if library is None else str(library),
            "compiler": record.get("compiler"),
            "build_s": record.get("build_s"),
            "built_now": before is None,
            "load_s": round(seconds, 2),
        }
    )


def nearest_existing(folder: Path) -> Path:
    """Return the folder, or its closest parent that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _not_available(reason: str) -> dict[str, Any]:
    return {"available": False, "reason": reason}


def _record(path: Path) -> dict[str, Any]:
    """Return the record of a build; empty where there is none, as for libraries from before."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
