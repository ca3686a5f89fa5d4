"""run_on_ray: run a job on a Ray cluster.

    driver   checks the input, starts the actors, replaces workers, finishes the output
    dealer   one actor: deals out part numbers (dealer.py, ray_actors.py)
    workers  actors that load the model once, pull parts from the dealer and write them

Only part numbers travel between the actors. All of them see the input, the model and the output
under the same paths. The driver waits for parts, never for workers: the job is done when each part
is written, or set aside.
"""

from __future__ import annotations

import logging
import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from gptbatch.pipeline.cluster.connection import connected
from gptbatch.pipeline.cluster.pending import describe_pending
from gptbatch.pipeline.cluster.ray_actors import DealerActor, WorkerActor
from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.errors import (
    ConfigError,
    DeviceError,
    GptbatchError,
    IncompleteError,
    StoppedError,
)
from gptbatch.pipeline.job import open_output
from gptbatch.pipeline.output.error_limit import ErrorLimit
from gptbatch.pipeline.output.part_plan import PartPlan
from gptbatch.pipeline.output.part_runner import Progress, Stop
from gptbatch.pipeline.output.time_left import seconds_left_by_rows
from gptbatch.pipeline.system.bundled import PREFIX
from gptbatch.pipeline.system.paths import OBJECT_URL

logger = logging.getLogger("gptbatch")

POLL_S = 1.0
# Workers end after a step. Those that do not are killed.
STOP_S = 10.0
# Workers that are pending for this long are named once.
MAX_PENDING_S = 20.0
# A worker is replaced this often before the job is given up.
MAX_FAILURES_PER_WORKER = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySettings:
    """How a job uses a cluster.

    Attributes:
        workers: Number of workers.
        address: Of the cluster: "auto", or a host and port. None starts one on this machine.
        cpus: CPUs per worker; also its threads, unless engine.threads is set.
        gpus: GPUs per worker.
    """

    workers: int
    address: str | None = None
    cpus: float = 1
    gpus: float = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySummary:
    """What a job on a cluster did.

    Attributes:
        output: The output folder.
        rows: Rows of the output.
        errors: Error rows among them.
        parts: Parts that this job has written.
        parts_kept: Parts that the output already held.
        parts_copied: Copies of parts in flight that were generated at the end.
        workers_lost: Workers that crashed or whose machine was lost.
        wall_s: Seconds of the whole job.
        completion_tokens: Tokens that this job has generated.
    """

    output: str
    rows: int
    errors: int
    parts: int
    parts_kept: int
    parts_copied: int
    workers_lost: int
    wall_s: float
    completion_tokens: int


@dataclass(slots=True)
class _Worker:
    """A worker as the driver sees it.

    Attributes:
        name: The name under which the dealer counts it.
        actor: Its handle.
        node: Reference to the id of its node.
        running: Reference to its call of `run`; None while it has nothing to do.
    """

    name: str
    actor: Any
    node: Any
    running: Any = None


def run_on_ray(
    config: JobConfig,
    settings: RaySettings,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> RaySummary:
    """Run a job on a Ray cluster until its output is complete.

    Args:
        config: The settings of the job.
        settings: How it uses the cluster.
        progress: Takes the counts about once per second.
        stop: Is queried about once per second.

    Raises:
        IncompleteError: Parts were in flight at several crashes and are set aside. All others are
            written.
        GptbatchError: See errors.py for the other kinds.
    """
    began_s = time.monotonic()
    if config.shard is not None or config.overwrite or config.inputs == ["-"]:
        name = "shard" if config.shard else "overwrite" if config.overwrite else "input"
        raise ConfigError(
            f"{name}: {getattr(config, name)} cannot be combined with a cluster", keys=(name,)
        )
    config = _with_absolute_paths(config)
    with open_output(config) as output:
        missing = output.missing
        driver = _Driver(
            config=config,
            settings=settings,
            plan=output.plan,
            missing=missing,
            errors_kept=output.errors_kept,
        )
        state: dict[str, Any] = {"tokens": 0, "written": 0, "copies": 0, "set_aside": []}
        if missing:
            with connected(settings.address), nullcontext() if stop is None else stop.deferred():
                state = driver.run(progress, stop)
        if set_aside := state["set_aside"]:
            raise IncompleteError(
                f"{config.output}: parts {', '.join(map(str, set_aside))} were in flight at "
                "several crashes, and are left out; all others are written. Generate them on one "
                "machine with the same command, without the cluster: after two crashes it names "
                "the row"
            )
        errors = output.finish()
    return RaySummary(
        output=config.output,
        rows=output.plan.total_rows,
        errors=errors,
        parts=state["written"],
        parts_kept=output.plan.n_parts - len(missing),
        parts_copied=state["copies"],
        workers_lost=driver.n_lost,
        wall_s=round(time.monotonic() - began_s, 3),
        completion_tokens=state["tokens"],
    )


def _with_absolute_paths(config: JobConfig) -> JobConfig:
    """Return the config for processes in other folders. Names of the hub stay as they are."""
    changes: dict[str, Any] = {"output": _absolute(config.output)}
    for key in ("model", "dataset"):
        value = getattr(config, key)
        if value is not None and os.path.exists(value):
            changes[key] = os.path.abspath(value)
    if config.inputs:
        changes["input"] = [_absolute(name) for name in config.inputs]
    return config.model_copy(update=changes)


def _absolute(name: str) -> str:
    is_path = not (name.startswith(PREFIX) or OBJECT_URL.fullmatch(name))
    return os.path.abspath(name) if is_path else name


@dataclass(kw_only=True)
class _Driver:
    """Starts and replaces workers until all parts are written.

    Attributes:
        config: The settings of the job.
        settings: How it uses the cluster.
        plan: The parts of the job.
        missing: The parts to generate.
        errors_kept: Error rows in the other parts.
        n_lost: Workers that were lost.
    """

    config: JobConfig
    settings: RaySettings
    plan: PartPlan
    missing: list[int]
    errors_kept: int
    n_lost: int = 0
    _workers: list[_Worker] = field(default_factory=list)
    _n_started: int = 0
    _warn_at_s: float = 0.0

    def run(self, progress: Progress | None, stop: Stop | None) -> dict[str, Any]:
        """Run until each part is written or set aside. Returns the state of the dealer."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        count = min(self.settings.workers, len(self.missing))
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        make_dealer: Any = ray.remote(DealerActor)
        options = {"num_cpus": 0, "scheduling_strategy": here}
        dealer = make_dealer.options(**options).remote(self.missing, count)
        rows_missing = sum(self.plan.rows_of(number) for number in self.missing)
        if progress is not None:
            progress.begin(self.plan.total_rows, self.plan.total_rows - rows_missing)
        began_s = time.monotonic()
        try:
            self._workers = [self._start(dealer) for _ in range(count)]
            self._warn_at_s = time.monotonic() + MAX_PENDING_S
            limit = ErrorLimit(self.config.max_row_errors, self.plan.total_rows)
            while True:
                state: dict[str, Any] = ray.get(dealer.state.remote())
                if progress is not None:
                    progress.update(
                        rows=state["rows"],
                        errors=state["errors"],
                        completion_tokens=state["tokens"],
                        remaining_s=seconds_left_by_rows(
                            time.monotonic() - began_s, state["rows"], rows_missing - state["rows"]
                        ),
                    )
                limit.check(self.errors_kept + state["errors"])
                if state["is_done"]:
                    return state
                if stop is not None and (source := stop.requested()) is not None:
                    raise StoppedError(
                        f"stopped by {source}; {state['written']} parts are written; run the same "
                        "command again to go on"
                    )
                self._attend(dealer, has_parts=state["has_parts"])
                if time.monotonic() >= self._warn_at_s:
                    self._warn_of_pending_workers()
        except ray.exceptions.RayActorError as error:
            raise IncompleteError(
                f"{self.config.output}: the dealer was lost ({error}); run the same command again"
            ) from error
        finally:
            if progress is not None:
                progress.end()
            self._stop_workers()
            ray.kill(dealer)

    def _stop_workers(self) -> None:
        import ray

        for worker in self._workers:
            worker.actor.stop.remote()
        pending = set(self._pending_nodes())
        calls = [
            worker.running
            for worker in self._workers
            if worker.running is not None and worker.node not in pending
        ]
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=STOP_S)
        for worker in self._workers:
            ray.kill(worker.actor)

    def _attend(self, dealer: Any, *, has_parts: bool) -> None:
        """Wait a moment. Replace workers that are lost, and call those again that have ended."""
        import ray

        running = [worker for worker in self._workers if worker.running is not None]
        calls = [worker.running for worker in running]
        ended = ray.wait(calls, num_returns=len(calls), timeout=POLL_S)[0] if calls else []
        for worker in running:
            if worker.running in ended:
                self._end_call(worker, dealer)
        for worker in self._workers:
            if has_parts and worker.running is None:
                worker.running = worker.actor.run.remote()
        if not running and not has_parts:
            # The last parts are about to be counted, or are copies of a lost worker.
            time.sleep(POLL_S)

    def _pending_nodes(self) -> list[Any]:
        """Return the references to the nodes of workers that have not started."""
        import ray

        nodes = [worker.node for worker in self._workers]
        return ray.wait(nodes, num_returns=len(nodes), timeout=0)[1] if nodes else []

    def _warn_of_pending_workers(self) -> None:
        """Warn once, if workers are pending."""
        import ray

        self._warn_at_s = math.inf
        if pending := self._pending_nodes():
            resources = [entry["Resources"] for entry in ray.nodes() if entry["Alive"]]
            what = f"{len(pending)} of {len(self._workers)} workers"
            cpus, gpus = self.settings.cpus, self.settings.gpus
            logger.warning("%s", describe_pending(what, cpus=cpus, gpus=gpus, nodes=resources))

    def _end_call(self, worker: _Worker, dealer: Any) -> None:
        import ray

        call, worker.running = worker.running, None
        try:
            ray.get(call)
        except ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            raise cause if isinstance(cause, GptbatchError) else error from error
        except ray.exceptions.RayActorError as error:
            if getattr(error, "actor_init_failed", False):
                raise DeviceError(f"a worker cannot start: {error}") from error
            self.n_lost += 1
            crashed = not getattr(error, "preempted", False) and self._is_alive(worker)
            ray.get(dealer.lost.remote(worker.name, crashed))
            why = "its process crashed" if crashed else "its machine was lost"
            logger.warning("%s is lost (%s); another worker starts", worker.name, why)
            if self.n_lost > MAX_FAILURES_PER_WORKER * self.settings.workers:
                raise IncompleteError(
                    f"{self.config.output}: {self.n_lost} workers were lost; their log files show "
                    "why. What is written stays, and the same command goes on"
                ) from error
            self._workers[self._workers.index(worker)] = self._start(dealer)

    def _is_alive(self, worker: _Worker) -> bool:
        """Return whether the node of a lost worker is still there: then its process has crashed."""
        import ray

        try:
            node = ray.get(worker.node, timeout=POLL_S)
        except (ray.exceptions.RayError, TimeoutError):
            # It was lost before it could say where it ran.
            return False
        alive = {entry["NodeID"] for entry in ray.nodes() if entry["Alive"]}
        return node in alive

    def _start(self, dealer: Any) -> _Worker:
        """Create an actor. Without free resources it is pending, as demand for an autoscaler."""
        import ray

        settings = self.settings
        name = f"worker-{self._n_started}"
        self._n_started += 1
        make_worker: Any = ray.remote(WorkerActor)
        actor = make_worker.options(
            num_cpus=settings.cpus, num_gpus=settings.gpus, max_restarts=0, max_concurrency=2
        ).remote(self._config_of_worker(), dealer, name, self._memory_share())
        return _Worker(name=name, actor=actor, node=actor.node.remote(), running=actor.run.remote())

    def _config_of_worker(self) -> JobConfig:
        engine = self.config.engine
        if engine.threads is None:
            engine = engine.model_copy(update={"threads": max(1, int(self.settings.cpus))})
        return self.config.model_copy(update={"engine": engine})

    def _memory_share(self) -> float | None:
        """Return the share of a node's memory for one of its workers; None for GPUs."""
        import ray

        if self.settings.gpus:
            return None
        largest = max(
            (entry["Resources"].get("CPU", 1.0) for entry in ray.nodes() if entry["Alive"]),
            default=1.0,
        )
        per_node = largest // self.settings.cpus if self.settings.cpus else self.settings.workers
        return 1 / max(1, min(self.settings.workers, int(per_node)))
