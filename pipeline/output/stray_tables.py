"""Stray tables: tables in an output folder that are not its parts, but are read with them.

Sync programs (`part-000000 (1).parquet`), editors and rsync (`part-000000.parquet.~1~`) and users
make such copies.
"""

from __future__ import annotations

import os
from pathlib import Path

from gptbatch.pipeline.errors import OutputConflictError
from gptbatch.pipeline.output.part_file import part_name, part_number
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.storage.object_path import ObjectPath
from gptbatch.pipeline.storage.regular_file import open_regular

MAX_NAMED = 3
# Files of subfolders that are searched: a subfolder may be a link to a data lake.
MAX_SEARCHED = 10_000
PARQUET_MAGIC = b"PAR1"
# pandas, pyarrow, Spark and datasets ignore files and folders whose names begin with these.
_HIDDEN = (".", "_")


def find_stray_tables(folder: Location) -> list[str]:
    """Return the paths of stray tables, relative to `folder`, sorted.

    A table is a file named `*.parquet`, or a file of any name that begins with the magic bytes of
    Parquet. Subfolders and links to folders are searched as readers search them, each folder once,
    up to MAX_SEARCHED files.
    """
    if not isinstance(folder, Path):
        return _stray_objects(folder)
    strays = []
    seen: set[tuple[int, int]] = set()
    searched = 0
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(_HIDDEN) and _is_new(Path(parent, name), seen)
        ]
        at_top = parent == str(folder)
        searched += 0 if at_top else len(names)
        if searched > MAX_SEARCHED:
            break
        for name in names:
            path = Path(parent, name)
            if not (name.startswith(_HIDDEN) or (at_top and _is_part(path))) and _is_table(path):
                strays.append(str(path.relative_to(folder)))
    return sorted(strays)


def _stray_objects(folder: ObjectPath) -> list[str]:
    """Do the same in an object store, by the names alone."""
    # One listing: a part may be written between two.
    names = [path.relative_to(folder) for path in folder.walk_files()]
    at_top = {str(name) for name in names}
    return sorted(
        str(name)
        for name in names
        if name.suffix.lower() == ".parquet"
        and not any(part.startswith(_HIDDEN) for part in name.parts)
        and not (len(name.parts) == 1 and _is_part_among(name.name, at_top))
    )


def describe_stray_tables(names: list[str]) -> str:
    """Return `readers will also read A, B, C and 2 more, which are no parts of the run; ...`."""
    shown = ", ".join(names[:MAX_NAMED]) + (
        f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    )
    if len(names) == 1:
        return f"readers will also read {shown}, which is no part of the run; move it away"
    return f"readers will also read {shown}, which are no parts of the run; move them away"


def refuse_stray_tables(path: Location, names: list[str]) -> None:
    """Check that a folder holds no stray tables.

    Args:
        path: The output folder.
        names: Its stray tables.

    Raises:
        OutputConflictError: There are stray tables.
    """
    if names:
        raise OutputConflictError(f"{path}: {describe_stray_tables(names)}, or name another output")


def _is_new(folder: Path, seen: set[tuple[int, int]]) -> bool:
    """Add a folder to `seen`.

    Returns False when it is in `seen`, as where a link points back to it, or when it cannot be
    reached.
    """
    try:
        status = folder.stat()
    except OSError:
        return False
    key = (status.st_dev, status.st_ino)
    if key in seen:
        return False
    seen.add(key)
    return True


def _is_part(path: Path) -> bool:
    """Return whether a file has a part's name, and no other file that of the same number."""
    number = part_number(path.name)
    if number is None:
        return False
    name = part_name(number)
    return path.name == name or not os.path.lexists(path.with_name(name))


def _is_part_among(name: str, names: set[str]) -> bool:
    """Do the same for an object, given the names beside it."""
    number = part_number(name)
    return number is not None and (name == part_name(number) or part_name(number) not in names)


def _is_table(path: Path) -> bool:
    if path.name.lower().endswith(".parquet"):
        return True
    try:
        with open_regular(path) as file:
            return file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
    except OSError:
        return False
