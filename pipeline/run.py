"""run_job: run one job, from its config to a complete output folder.

    1. find      output folder, checkpoint, tokenizer and input (exit codes 65, 66, 78)
    2. check     every row of the input (65)
    3. lock      the output folder (69, 73); a continued run locks it before it checks
    4. inspect   the output: which parts are kept (78)
    5. load      the model, and check its batch invariance (78)
    6. generate  rows -> token ids -> engine -> parts, then the final manifest and _SUCCESS

Heavy libraries are imported where they are used: a complete output is recognised without torch.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from gptbatch.pipeline.config import EngineConfig, JobConfig
from gptbatch.pipeline.errors import InputRowsError, OutputConflictError, StorageError
from gptbatch.pipeline.job import CheckedJob, Job, check_job, find_job, lock_output
from gptbatch.pipeline.model.loading import LoadedModel, load_model, resolve_device, threads_to_use
from gptbatch.pipeline.output.error_limit import ErrorLimitError
from gptbatch.pipeline.output.existing_run import (
    ExistingRun,
    Target,
    confirm_complete,
    inspect_output,
)
from gptbatch.pipeline.output.part_runner import PartRunner, Stop
from gptbatch.pipeline.output.part_source import ListedParts, PartSource
from gptbatch.pipeline.output.resume import (
    check_same_environment,
    is_up_to_date,
)
from gptbatch.pipeline.output.row_runner import Progress
from gptbatch.pipeline.output.run_facts import collect_run_facts
from gptbatch.pipeline.output.run_output import RunOutput
from gptbatch.pipeline.output.runs import last_speed, open_run_folder
from gptbatch.pipeline.output.shards import NO_SHARD, Shard, find_shard
from gptbatch.pipeline.output.summary import RunSummary, summarize_complete_output
from gptbatch.pipeline.storage.location import location_of
from gptbatch.pipeline.system.machine import CpuUse, describe_cores
from gptbatch.pipeline.system.nouns import noun
from gptbatch.pipeline.system.redact import redact

logger = logging.getLogger("gptbatch")
loading_logger = logging.getLogger("gptbatch.loading")


class _NeverStops:
    def deferred(self) -> AbstractContextManager[None]:
        return nullcontext()

    def requested(self) -> None:
        return None


def run_job(
    config: JobConfig, progress: Progress | None = None, stop: Stop | None = None
) -> RunSummary:
    """Run a job until its output is complete.

    Args:
        config: The settings of the job.
        progress: Takes the counts after every step.
        stop: Is queried for requests to stop after every step.

    Raises:
        GptbatchError: See errors.py for the kinds.
    """
    shard = find_shard(config.shard, os.environ)
    return _run(config, progress, stop, shard, None, _Models())


def run_parts(
    config: JobConfig,
    parts: PartSource | Iterable[int],
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> RunSummary:
    """Generate some parts of an output that other runs write, too.

    The output is not marked complete: `finish_folder` does that, when all parts are written.

    Args:
        config: The settings of the job; `shard` is ignored.
        parts: Numbers of parts, in ascending order, of which those that are written are left out;
            or a source that deals out numbers.
        progress: Takes the counts after every step.
        stop: Is queried for requests to stop after every step.

    Raises:
        GptbatchError: See errors.py for the kinds.
    """
    if isinstance(parts, Iterable):
        parts = ListedParts(parts, location_of(config.output))
    return PartWorker(config).run(parts, progress, stop)


class PartWorker:
    """Generates parts as `run_parts` does, any number of times with a model that is loaded once.

    Args:
        config: The settings of the job.
    """

    def __init__(self, config: JobConfig) -> None:
        self._config, self._models = config, _Models()

    def run(
        self, source: PartSource, progress: Progress | None = None, stop: Stop | None = None
    ) -> RunSummary:
        """Generate the parts that a source deals. The errors are those of `run_parts`."""
        return _run(self._config, progress, stop, NO_SHARD, source, self._models)


@dataclass(slots=True)
class _Models:
    """The model of a worker, once it is loaded."""

    loaded: LoadedModel | None = None


def _run(
    config: JobConfig,
    progress: Progress | None,
    stop: Stop | None,
    shard: Shard,
    source: PartSource | None,
    models: _Models,
) -> RunSummary:
    began_s, cpu_use = time.monotonic(), CpuUse()
    job = find_job(config, shard)
    if job.continued is not None and is_up_to_date(
        config, job.continued, job.reader.source, job.hashes
    ):
        wall_s = time.monotonic() - began_s
        return summarize_complete_output(config, job.continued.manifest, wall_s)
    with ExitStack() as stack:
        lock = None
        # A continued run is locked before its input is read. A new folder is created only for a
        # valid input.
        if job.continued is not None and job.folder.work.is_dir():
            lock = stack.enter_context(lock_output(job))
        checked = check_job(job)
        if lock is None:
            _create_folder(job)
            lock = stack.enter_context(lock_output(job))
        target = Target(
            config=config,
            folder=job.folder,
            hashes=job.hashes,
            plan=checked.plan,
            shard=job.shard,
        )
        existing = inspect_output(target, lock, job.identity, checked.summary)
        if existing.is_complete(target):
            assert existing.state is not None
            confirm_complete(target, existing)
            wall_s = time.monotonic() - began_s
            return summarize_complete_output(config, existing.state.manifest, wall_s)
        output = RunOutput(
            target=target,
            run=stack.enter_context(
                open_run_folder(
                    job.folder.work,
                    job.identity["config_hash"],
                    shared=not job.shard.is_whole,
                    lock_works=lock.works,
                )
            ),
            defaults=job.reader.defaults,
            existing=existing,
        )
        progress_file = output.progress_file()
        with progress_file.recording_state():
            checked.rows.write(job.folder, output.writer)
            if source is None and not output.has_work():
                progress_file.take_over(last_speed(job.folder.work))
                complete = output.finish(existing.kept.parts)
                facts = {**existing.kept.footer, "identity": checked.plan.identity}
                facts |= {"rows": existing.kept.rows, "complete": complete}
                return summarize_complete_output(config, facts, time.monotonic() - began_s)
            if not checked.summary.rows:
                facts = _write_no_rows(job, checked, output, source)
                return summarize_complete_output(config, facts, time.monotonic() - began_s)
            resolve_device(config.engine)
            loaded, load_s = _load(job, checked, existing, models, cpu_use)
            progress_file.threads = _cpu_threads(config.engine, loaded.model.device.type)
            stop = stop or _NeverStops()
            with stop.deferred():
                facts = collect_run_facts(config, checked.plan.identity, job.checkpoint, loaded)
                output.claim(facts)
                runner = PartRunner(
                    config=config,
                    prompts=checked.prompts,
                    summary=checked.summary,
                    loaded=loaded,
                    sink=output.open_sink(facts, checked.prompts.tokenizer.text_of),
                    observers=[progress_file] if progress is None else [progress, progress_file],
                    stop=stop,
                    source=source or output.open_source(),
                )
                try:
                    _generate(runner, output)
                except ErrorLimitError:
                    raise
                except InputRowsError:
                    checked.rows.forget(job.folder, output.writer)
                    raise
                complete = source is None and output.finish(runner.sink.parts)
        seconds = {
            "load_s": load_s,
            "generate_s": progress_file.seconds,
            "wall_s": time.monotonic() - began_s,
        }
        return _summarize(job, checked, runner, existing.kept.rows, complete, seconds)


def _write_no_rows(
    job: Job, checked: CheckedJob, output: RunOutput, source: PartSource | None
) -> dict[str, Any]:
    """Write the output of an input without rows: one part without rows. Loads no model.

    Returns the facts of the run.
    """
    facts = collect_run_facts(job.config, checked.plan.identity, job.checkpoint, None)
    output.claim(facts)
    sink = output.open_sink(facts, checked.prompts.tokenizer.text_of)
    parts = source or output.open_source()
    try:
        if parts.next() is not None:
            sink.add_empty()
            for part in sink.written(wait=True):
                parts.committed(part)
    finally:
        sink.close()
    sink.close_journal()
    complete = source is None and output.finish(sink.parts)
    loading_logger.info("0 rows: the output is an empty table, and no model was loaded")
    return facts | {"rows": 0, "complete": complete}


def _create_folder(job: Job) -> None:
    """Create the output folder of a new run, if the device exists."""
    resolve_device(job.config.engine)
    job.folder.create()


def _load(
    job: Job, checked: CheckedJob, existing: ExistingRun, models: _Models, cpu_use: CpuUse
) -> tuple[LoadedModel, float]:
    """Load the model, and check that it computes as it did for the kept rows.

    Returns the seconds that it took, too.
    """
    config, recorded = job.config, existing.facts(job.shard)
    plan, shard = checked.plan, job.shard
    rows = sum(plan.rows_of(number) for number in shard.parts(plan.n_parts))
    if shard.count > 1 and not shard.parts(plan.n_parts):
        logger.warning(
            "shard %s has no part of its own: the job has %d part%s of up to %d rows, fewer than "
            "shards; a new output with a smaller part_rows has more",
            shard,
            plan.n_parts,
            "s" if plan.n_parts > 1 else "",
            plan.part_rows,
        )
    engine = _engine_config(config, recorded)
    _log_loading(config.model, engine, shard, rows - existing.kept.rows, cpu_use)
    began_s = time.monotonic()
    loaded = models.loaded = models.loaded or load_model(
        job.checkpoint,
        checked.prompts.gpt_config,
        engine,
        resolve_device(engine),
        batch_invariance=config.batch_invariance,
    )
    check_same_environment(config, recorded, loaded.environment, loaded.batch_invariance)
    return loaded, time.monotonic() - began_s


def _engine_config(config: JobConfig, recorded: dict[str, Any]) -> EngineConfig:
    """Return the engine's settings, where `auto` takes what computed the recorded rows.

    That is their attention backend, and a CPU if they are portable.
    """
    engine, changes = config.engine, {}
    attention = recorded.get("environment", {}).get("attention")
    if attention is None or config.allow_other_environment:
        return engine
    if engine.attention == "auto":
        changes["attention"] = attention
    if engine.device == "auto" and recorded.get("batch_invariance") == "portable":
        changes["device"] = "cpu"
    return engine.model_copy(update=changes)


def _log_loading(
    model: str, engine: EngineConfig, shard: Shard, rows: int, cpu_use: CpuUse
) -> None:
    """Log the model, the device and the rows, and limits on the cores.

    This is the first line of a run.
    """
    device = resolve_device(engine)
    threads = _cpu_threads(engine, device.type)
    where = f"cpu with {threads} {noun(threads, 'thread')}" if device.type == "cpu" else str(device)
    loading_logger.info(
        "loading %s as %s on %s for %d %s%s",
        redact(model),
        engine.dtype,
        where,
        rows,
        noun(rows, "row"),
        "" if shard.is_whole else f" of shard {shard}",
    )
    if device.type == "cpu" and (shared := describe_cores(threads, cpu_use)):
        loading_logger.info("the cores are shared, which costs speed: %s", shared)


def _cpu_threads(engine: EngineConfig, device_type: str) -> int:
    """Return the number of CPU threads that compute; on a GPU, the one that launches kernels."""
    return threads_to_use(engine.threads) if device_type == "cpu" else 1


def _generate(runner: PartRunner, output: RunOutput) -> None:
    """Generate the missing parts."""
    sink = runner.sink
    try:
        with _frozen_heap():
            runner.run()
    except OutputConflictError:
        # The files in .gptbatch belong to another job now.
        raise
    except BaseException:
        with suppress(StorageError):
            sink.close_journal()
            if output.target.shard.is_whole:
                output.write_error_rows(sink.parts.values())
        raise
    sink.close_journal()
    logger.info("%d rows are written", runner.counts.rows)


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """Keep what is loaded by now out of garbage collections: each would stop the engine for 0.1 s.

    A program that has frozen its heap keeps it frozen.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _summarize(
    job: Job,
    checked: CheckedJob,
    runner: PartRunner,
    rows_kept: int,
    complete: bool,
    seconds: dict[str, float],
) -> RunSummary:
    counts, loaded, generate_s = runner.counts, runner.loaded, seconds["generate_s"]
    return RunSummary(
        output=job.config.output,
        rows=counts.rows,
        samples=counts.samples,
        ok=counts.rows - counts.errors,
        errors=counts.errors,
        rows_kept=rows_kept,
        complete=complete,
        rows_capped=checked.prompts.rows_capped,
        batch_size_halvings=counts.batch_size_halvings,
        prompt_tokens=counts.prompt_tokens,
        completion_tokens=counts.completion_tokens,
        tokens_per_s=round(counts.completion_tokens / generate_s, 1) if generate_s > 0 else 0.0,
        device=loaded.model.device.type,
        dtype=job.config.engine.dtype,
        batch_invariance=loaded.batch_invariance,
        config_hash=job.identity["config_hash"],
        **{name: round(value, 3) for name, value in seconds.items()},
    )
