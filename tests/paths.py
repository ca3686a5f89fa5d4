"""Paths of the repository."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCE = REPOSITORY / "src"
# for child processes: the package and the tests
PYTHONPATH = os.pathsep.join((str(SOURCE), str(REPOSITORY)))
