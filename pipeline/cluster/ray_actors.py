"""The actors of a job on a Ray cluster: the dealer, and the workers that pull parts from it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from gptbatch.pipeline.cluster.dealer import Dealer
from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.errors import StoppedError
from gptbatch.pipeline.output.json_models import Part


class DealerActor:
    """The dealer of a job, and the sums of what its workers have written."""

    def __init__(self, missing: list[int], workers: int) -> None:
        self._dealer = Dealer(missing, workers)
        self._rows = self._errors = self._tokens = 0

    def next(self, worker: str) -> int | None:
        return self._dealer.next(worker)

    def committed(self, number: int, rows: int, errors: int, tokens: int) -> None:
        if self._dealer.committed(number):
            self._rows += rows
            self._errors += errors
            self._tokens += tokens

    def given_up(self, worker: str, number: int) -> None:
        self._dealer.given_up(worker, number)

    def lost(self, worker: str, crashed: bool) -> None:
        self._dealer.lost(worker, crashed=crashed)

    def state(self) -> dict[str, Any]:
        counts = self._dealer.counts
        return {
            "is_done": self._dealer.is_done,
            "has_parts": self._dealer.has_parts,
            "set_aside": self._dealer.set_aside,
            "written": counts.written,
            "copies": counts.copies,
            "rows": self._rows,
            "errors": self._errors,
            "tokens": self._tokens,
        }


class DealtParts:
    """The parts that a dealer in another process gives to one worker."""

    def __init__(self, dealer: Any, worker: str) -> None:
        self._dealer, self._worker = dealer, worker

    def next(self) -> int | None:
        import ray

        number: int | None = ray.get(self._dealer.next.remote(self._worker))
        return number

    def committed(self, part: Part) -> None:
        self._dealer.committed.remote(part.number, part.rows, part.errors, part.completion_tokens)

    def given_up(self, number: int) -> None:
        self._dealer.given_up.remote(self._worker, number)


class WorkerActor:
    """Loads the model once, and generates the parts that a dealer gives to it.

    Args:
        config: The settings of the job.
        dealer: The actor that deals.
        name: Of this worker, for the dealer.
        memory_share: Share of the node's free memory; None where the device is no CPU.
    """

    def __init__(
        self, config: JobConfig, dealer: Any, name: str, memory_share: float | None
    ) -> None:
        from gptbatch.pipeline.model.loading import CACHE_MEMORY_SHARE
        from gptbatch.pipeline.run import PartWorker
        from gptbatch.pipeline.system.machine import free_memory_bytes

        free = free_memory_bytes()
        if config.engine.memory_gib is None and memory_share is not None and free is not None:
            memory_gib = free * CACHE_MEMORY_SHARE * memory_share / 2**30
            engine = config.engine.model_copy(update={"memory_gib": memory_gib})
            config = config.model_copy(update={"engine": engine})
        self._worker = PartWorker(config)
        self._source = DealtParts(dealer, name)
        self._stopped = False

    def node(self) -> str:
        import ray

        node: str = ray.get_runtime_context().get_node_id()
        return node

    def run(self) -> None:
        """Generate parts until the dealer has none, or until `stop` is called.

        Raises:
            GptbatchError: See errors.py for the kinds.
        """
        with suppress(StoppedError):
            self._worker.run(self._source, stop=self)

    def stop(self) -> None:
        """End `run` after its step. A killed process would count as a crash of its parts."""
        self._stopped = True

    def deferred(self) -> AbstractContextManager[None]:
        return nullcontext()

    def requested(self) -> str | None:
        return "the driver" if self._stopped else None
