"""Limits the time that OpenMP threads spin at barriers.

At the end of every parallel loop a thread waits for the others. By default it spins for
milliseconds. If other processes use the cores, the spinning thread takes a core from the thread
that it waits for. The limit here is about 10 microseconds. After it the thread sleeps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

# iterations, for libgomp, which the wheels of torch contain
SPIN_COUNT = "1000"
# for libiomp; 0 would never spin
BLOCK_TIME_MS = "1"


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the environment variables that are unset. Has no effect after the import of torch."""
    if "torch" in sys.modules or environment.get("OMP_WAIT_POLICY"):
        return
    environment.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    environment.setdefault("KMP_BLOCKTIME", BLOCK_TIME_MS)
