"""describe_pending: says why workers on a Ray cluster do not start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence


def describe_pending(
    workers: str, *, cpus: float, gpus: float, nodes: Sequence[Mapping[str, float]]
) -> str:
    """Return what pending workers request, what the cluster has, and what to do.

    Args:
        workers: The pending workers: "3 of 8 workers".
        cpus: CPUs that each of them requests.
        gpus: GPUs that each of them requests.
        nodes: The resources of each node, free or not, by Ray's names.
    """
    kinds = Counter((node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)
    listed = ", ".join(
        f"{count} with {_amounts(*kind)}" for kind, count in sorted(kinds.items(), reverse=True)
    )
    if any(has_cpus >= cpus and has_gpus >= gpus for has_cpus, has_gpus in kinds):
        advice = "the others go on; --workers sets the number"
    else:
        advice = "no node has them; --worker-cpus and --worker-gpus set what a worker requests"
    return (
        f"{workers} are pending: each requests {_amounts(cpus, gpus)}; the nodes of the cluster: "
        f"{listed or 'none'}; they wait for more nodes, and {advice}"
    )


def _amounts(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs and {gpus:g} GPUs"
