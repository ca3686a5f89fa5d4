"""Whether two runs computed in one environment, so that their bits are equal. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What the bits of a portable run depend on besides the job. The other keys say where it ran.
_PORTABLE_KEYS = ("arithmetic", "noise_version", "self_test_digest")


def environment_differences(
    recorded: Mapping[str, Any], current: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two environments differ; none if they are one.

    Two portable environments are one if they follow the same arithmetic, on any machine.

    Args:
        recorded: The facts of a run: `environment` and `batch_invariance`.
        current: The same facts of another run.

    Returns:
        The recorded and the current value of each key.
    """
    before, now = _flat(recorded), _flat(current)
    is_portable = before["batch_invariance"] == now["batch_invariance"] == "portable"
    keys = _PORTABLE_KEYS if is_portable else tuple({**now, **before})
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **facts.get("environment", {}),
        "batch_invariance": facts.get("batch_invariance"),
    }
