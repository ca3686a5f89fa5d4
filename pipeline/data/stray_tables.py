"""Tables in an output folder that are not its parts, and that readers of the folder would add to it.

Such files are copies: of sync programs (`part-00000 (1).parquet`), of editors and rsync (`part-00000.parquet.~1~`), of hand.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.data.parts import part_number
from pipeline.data.regular_file import open_regular

MAX_NAMED = 3
PARQUET_MAGIC = b"PAR1"
_HIDDEN = (".", "_")  # pandas, pyarrow, Spark and datasets pass over files and folders of such names


def stray_tables(folder: Path) -> list[str]:
    """Return the paths of stray tables, relative to `folder`, sorted; subfolders are searched, links to folders are not.

    A table is a file that is named `*.parquet`, or that begins as Parquet files do under any other name.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(_HIDDEN)]
        at_top = parent == str(folder)
        for name in names:
            path = Path(parent, name)
            if not (name.startswith(_HIDDEN) or (at_top and part_number(name) is not None)) and _is_table(path):
                found.append(str(path.relative_to(folder)))
    return sorted(found)


def describe_strays(names: list[str]) -> str:
    """Return `readers will also read A, B, C and 2 more, which are no parts of the run; move them away`."""
    shown = ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
    if len(names) == 1:
        return f"readers will also read {shown}, which is no part of the run; move it away"
    return f"readers will also read {shown}, which are no parts of the run; move them away"


def _is_table(path: Path) -> bool:
    if path.name.lower().endswith(".parquet"):
        return True
    try:
        with open_regular(path) as file:
            return file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
    except OSError:
        return False
