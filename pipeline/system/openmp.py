"""How threads of OpenMP wait for each other. Stands in the environment before torch is imported.

At the end of every parallel loop a thread waits for the others. By default it spins for
milliseconds, which takes a core from the very thread that it waits for as soon as anything else
runs on the cores. Here it spins for some ten microseconds, longer than the wait on a quiet machine,
and then sleeps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

SPIN_COUNT = "1000"  # iterations, for libgomp, which the wheels of torch bring
BLOCK_TIME_MS = "1"  # for libiomp, the least above none


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables unless the user has. Without effect once torch has been imported."""
    if "torch" in sys.modules or environment.get("OMP_WAIT_POLICY"):
        return
    environment.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    environment.setdefault("KMP_BLOCKTIME", BLOCK_TIME_MS)
