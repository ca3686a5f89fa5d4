"""Where things are."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCE = REPOSITORY / "src"
# for a child process: the package, and the tests that it may import
PYTHONPATH = os.pathsep.join((str(SOURCE), str(REPOSITORY)))
