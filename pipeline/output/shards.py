"""Shards: several runs of one job, on one or more machines, that write into one folder.

Shard i of n generates the parts [i P / n, (i + 1) P / n) of P parts. Then it helps: it generates
missing parts of other shards that no run has in flight. Two runs may generate the same part. They
write the same rows, and the first one keeps the name.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from gptbatch.pipeline.config.sources import SHARDS_VARIABLE
from gptbatch.pipeline.config.values import AUTO_SHARD, index_and_count
from gptbatch.pipeline.errors import ConfigError
from gptbatch.pipeline.output.folder import OutputFolder
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.part_plan import PartPlan
from gptbatch.pipeline.output.run_folder import RunFolder

logger = logging.getLogger("gptbatch")

# Progress is written every 2 s. A wrong guess generates a part twice.
MAX_SILENCE_S = 60.0
# A listing of a million names takes seconds.
LOOK_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` shards; `index` counts from 0. With a count of 0 it has no parts."""

    index: int = 0
    count: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether this is the only shard of its job."""
        return self.count == 1

    def parts(self, n_parts: int) -> range:
        """Return the numbers of its parts: an n-th of all parts, rounded up or down."""
        if self.count == 0:
            return range(0)
        first, end = (n_parts * index // self.count for index in (self.index, self.index + 1))
        return range(first, end)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


# Of a run whose parts are dealt out.
NO_SHARD = Shard(0, 0)


class ShardParts:
    """The missing parts of a shard, in order, and then missing parts of other shards.

    A shard takes parts of others from the end of a gap between written parts, since the shard that
    owns the gap comes from its beginning. Shards that end at the same time seldom take the same.

    Args:
        missing: The missing parts of the shard, in ascending order.
        find_free: Returns the missing parts of all shards that no live run has in flight, in
            ascending order.
        is_written: Returns whether a part is written by now.
        seed: Of the choice among gaps: the name of the run.
        clock: Returns seconds.
    """

    def __init__(
        self,
        missing: Iterable[int],
        find_free: Callable[[], list[int]],
        is_written: Callable[[int], bool],
        *,
        seed: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._own = iter(missing)
        self._find_free, self._is_written, self._clock = find_free, is_written, clock
        self._random = random.Random(seed)
        self._pulled: set[int] = set()
        self._free: list[int] = []
        self._helps = False
        self._looked_s = -math.inf

    def next(self) -> int | None:
        """Return the next part.

        None comes after the last part of the shard, and then when each missing part is in flight in
        some run. The shard helps only after its own parts are written: others may begin later.
        """
        for number in self._own:
            # Another shard may have helped.
            if not self._is_written(number):
                self._pulled.add(number)
                return number
        if not self._helps:
            self._helps = True
            if self._pulled:
                return None
        while self._look():
            number = self._take_from_a_gap()
            if not self._is_written(number):
                logger.info("generating part %d of another shard", number)
                self._pulled.add(number)
                return number
        return None

    def committed(self, part: Part) -> None:
        """Do nothing: the file of the part is the record."""

    def given_up(self, number: int) -> None:
        """Do nothing: another run finds that the part is missing."""

    def _look(self) -> bool:
        """Return whether free parts are known. Look again if the last look was some time ago."""
        if not self._free or self._clock() - self._looked_s >= LOOK_INTERVAL_S:
            self._free = [number for number in self._find_free() if number not in self._pulled]
            self._looked_s = self._clock()
        return bool(self._free)

    def _take_from_a_gap(self) -> int:
        """Take the last part of a gap, chosen with a probability that grows with its length."""
        index = self._random.randrange(len(self._free))
        while index + 1 < len(self._free) and self._free[index + 1] == self._free[index] + 1:
            index += 1
        return self._free.pop(index)


def find_free_parts(folder: OutputFolder, run: RunFolder, plan: PartPlan) -> list[int]:
    """Return the missing parts that no live run beside this one has in flight.

    Args:
        folder: The output folder.
        run: The folder of this run.
        plan: The parts of the job.
    """
    taken = run.others_in_flight(MAX_SILENCE_S)
    return [number for number in folder.missing_parts(plan.n_parts) if number not in taken]


def find_shard(setting: str | None, environment: Mapping[str, str]) -> Shard:
    """Return the shard of this process.

    Args:
        setting: "3/16", "auto", or None for the whole job.
        environment: The environment variables, for "auto".

    Raises:
        ConfigError: The setting or a variable is invalid, or "auto" finds no variable.
    """
    if setting is None:
        return Shard()
    if setting != AUTO_SHARD:
        return parse_shard(setting)
    # The task of an array or job, and within it one of several processes.
    task, process = _find(_TASKS, environment), _find(_PROCESSES, environment)
    if task is None and process is None:
        raise ConfigError(
            f"shard: auto finds no variables of {', '.join((*_TASKS, *_PROCESSES))} in the "
            "environment; name the shard: --shard 0/4",
            keys=("shard",),
        )
    outer, inner = task or Shard(), process or Shard()
    shard = Shard(outer.index * inner.count + inner.index, outer.count * inner.count)
    logger.info("shard %s, by the environment", shard)
    return shard


def parse_shard(text: str) -> Shard:
    """Return the shard that "3/16" names.

    Raises:
        ConfigError: The text is none, or the index is too large.
    """
    numbers = index_and_count(text)
    if numbers is None:
        raise ConfigError(
            f"shard: {text!r} is not INDEX/COUNT with an index from 0 to COUNT - 1; "
            "four shards are 0/4, 1/4, 2/4 and 3/4",
            keys=("shard",),
        )
    return Shard(*numbers)


def _from_slurm_array(environment: Mapping[str, str]) -> Shard | None:
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return None
    first = _number(environment, "SLURM_ARRAY_TASK_MIN")
    step = max(1, _number(environment, "SLURM_ARRAY_TASK_STEP", default=1))
    # Not SLURM_ARRAY_TASK_COUNT: with gaps (--array=3,17), others help with the shards between.
    count = (_number(environment, "SLURM_ARRAY_TASK_MAX") - first) // step + 1
    return _checked((_number(environment, "SLURM_ARRAY_TASK_ID") - first) // step, count)


def _from_slurm_step(environment: Mapping[str, str]) -> Shard | None:
    count = _number(environment, "SLURM_NTASKS", default=1)
    if count == 1 or "SLURM_PROCID" not in environment:
        return None
    return _checked(_number(environment, "SLURM_PROCID"), count)


def _from_kubernetes(environment: Mapping[str, str]) -> Shard | None:
    """Take the index of an Indexed Job. Kubernetes does not tell the count."""
    if "JOB_COMPLETION_INDEX" not in environment:
        return None
    if SHARDS_VARIABLE not in environment:
        raise ValueError(
            f"JOB_COMPLETION_INDEX is set, and {SHARDS_VARIABLE} is not; set it to the completions "
            "of the Job"
        )
    return _checked(
        _number(environment, "JOB_COMPLETION_INDEX"), _number(environment, SHARDS_VARIABLE)
    )


def _from_pair(index: str, count: str) -> Callable[[Mapping[str, str]], Shard | None]:
    def find(environment: Mapping[str, str]) -> Shard | None:
        if index not in environment or count not in environment:
            return None
        return _checked(_number(environment, index), _number(environment, count))

    return find


_Find = Callable[[Mapping[str, str]], Shard | None]
_TASKS: dict[str, _Find] = {
    "Slurm arrays": _from_slurm_array,
    "Kubernetes": _from_kubernetes,
    "SkyPilot": _from_pair("SKYPILOT_JOB_RANK", "SKYPILOT_NUM_JOBS"),
}
# Slurm sets its variables for the processes of the others, too.
_PROCESSES: dict[str, _Find] = {
    "torchrun": _from_pair("RANK", "WORLD_SIZE"),
    "Open MPI": _from_pair("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPICH": _from_pair("PMI_RANK", "PMI_SIZE"),
    "srun": _from_slurm_step,
}


def _find(kinds: Mapping[str, _Find], environment: Mapping[str, str]) -> Shard | None:
    for scheduler, find in kinds.items():
        try:
            shard = find(environment)
        except ValueError as error:
            raise ConfigError(f"shard: auto: {scheduler}: {error}", keys=("shard",)) from error
        if shard is not None:
            return shard
    return None


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name)
    if value is None and default is not None:
        return default
    if value is None or not value.isdecimal():
        seen = "not set" if value is None else repr(value)
        raise ValueError(f"{name} is {seen}, and a number is needed")
    return int(value)


def _checked(index: int, count: int) -> Shard:
    if not 0 <= index < count:
        raise ValueError(f"index {index} of {count} shards")
    return Shard(index, count)
