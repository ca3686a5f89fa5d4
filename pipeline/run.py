"""run_job: one job from config to a complete output folder. The one place that sees data, generation and gpt.

    1. look at the output folder: another job's? (78) Complete, with an input that has not changed? Then that was all
    2. find the input, read all rows once and check them                (65, 66: nothing has been loaded or written)
    3. lock the folder (69, 73), sweep what dead runs left, find the parts that can be trusted (78)
    4. load the model, and check that its bits do not depend on the batch (network.py)
    5. rows -> token ids -> engine -> rows of a part -> files: part after part is committed as it becomes whole
    6. manifest, _SUCCESS

Heavy libraries are imported where they are used: a complete output is recognised without torch.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.config import JobConfig
from pipeline.data.attempts import Attempts
from pipeline.data.checkpoint import find_checkpoint
from pipeline.data.digests import DigestMemory
from pipeline.data.durable import sweep
from pipeline.data.error_rows import write_error_rows
from pipeline.data.lock import OutputLock
from pipeline.data.output_folder import FORMAT, FolderState, OutputFolder, facts_of
from pipeline.data.parts import Part, PartWriter, count_parts
from pipeline.data.progress_file import ProgressFile
from pipeline.data.rows import RowSource
from pipeline.errors import InputRowsError, OutputBusyError, StoppedError, StorageError
from pipeline.job import Job, find_source, job_identity
from pipeline.machine import free_memory_bytes
from pipeline.network import Network, load_network, resolve_device
from pipeline.records import Completion
from pipeline.redact import redact
from pipeline.resume import (
    Trusted,
    check_replaceable,
    check_same_input,
    check_same_job,
    check_same_profile,
    is_same_job,
    part_rows_of,
    trusted_parts,
)

if TYPE_CHECKING:
    from pipeline.generation.engine import Engine

logger = logging.getLogger("gptbatch")

MOST_OPEN_PARTS = 8  # besides those that the slots can reach into: rows that are done wait in memory until their part is whole
MEMORY_SHARE = 0.5  # of what is free, for the cache
MANIFEST_EVERY_S = 5.0


class Progress(Protocol):
    """Who watches a run. Called often: must be quick."""

    def begin(self, total_rows: int, done_rows: int) -> None:
        """total_rows: of the output. done_rows: those of them that earlier runs have done."""

    def update(self, *, rows: int, errors: int, completion_tokens: int) -> None:
        """All counts are since `begin`."""

    def end(self) -> None: ...


class Stop(Protocol):
    """Who may ask a run to stop."""

    def deferred(self) -> AbstractContextManager[None]:
        """Inside, a wish to stop is kept until it is asked for; outside, it may end the run wherever it is."""

    def requested(self) -> str | None:
        """Who wants the run to stop ("SIGTERM"); None for nobody. Asked at every step."""


class _NobodyStops:
    def deferred(self) -> AbstractContextManager[None]:
        return nullcontext()

    def requested(self) -> None:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a run did. `skipped` rows were there already; all other counts, times and rates are this run's."""

    output: str
    rows: int
    ok: int
    errors: int
    skipped: int
    prompt_tokens: int
    completion_tokens: int
    load_s: float
    generate_s: float
    wall_s: float
    tokens_per_s: float
    device: str
    dtype: str
    numerics: str
    fingerprint: str


def run_job(config: JobConfig, progress: Progress | None = None, stop: Stop | None = None) -> RunSummary:
    """Run a job to the end and say what was done. Raises GptbatchError (see errors.py for the kinds)."""
    began = time.monotonic()
    folder = OutputFolder(Path(config.output))
    state = folder.state()
    memory = DigestMemory() if state is None else folder.memory()
    checkpoint = find_checkpoint(config.model, revision=config.revision, allow_pickle=config.allow_pickle, memory=memory)
    identity = job_identity(config, checkpoint)
    if state is not None and not _is_replaced(config, state, identity):
        check_same_job(config, state, identity)
    source = find_source(config)
    with ExitStack() as stack:
        lock = None
        if state is not None and not _is_replaced(config, state, identity):
            if _is_done(config, source, state, memory):
                return _nothing_to_do(config, state.manifest, time.monotonic() - began)
            lock = stack.enter_context(OutputLock(folder.work)) if folder.work.is_dir() else None
        run = _Run(config, folder, Job(config, checkpoint, source), identity, memory, began, stop or _NobodyStops())
        run.check_input(state)
        if lock is None:
            resolve_device(config.engine)  # before a folder is made for nothing
            folder.create()
            lock = stack.enter_context(OutputLock(folder.work))
        return run.go(lock, progress)


def _is_replaced(config: JobConfig, state: FolderState, identity: dict[str, Any]) -> bool:
    """overwrite replaces what is complete or another job's; what it has begun itself goes on when it is said again."""
    return config.overwrite and (state.marked_complete or not is_same_job(state, identity))


def _input_settings(config: JobConfig) -> dict[str, Any]:
    keys = ("input", "dataset", "dataset_config", "dataset_revision", "split", "prompt_field", "limit", "on_bad_row", "skip_row")
    return config.model_dump(include=set(keys))


def _is_done(config: JobConfig, source: RowSource, state: FolderState, memory: DigestMemory) -> bool:
    """Whether nothing is left to do, as far as sizes and times of files say: the look that takes no time."""
    if not state.marked_complete:
        return False
    known = memory.same_input(_input_settings(config), source.files())
    if known is None or known != {"rows": state.identity.get("rows"), "digest": state.identity.get("input_digest")}:
        return False
    recorded = [part["name"] for part in state.manifest["parts"]]
    return recorded == [path.name for path in state.parts.values()] and all(memory.same_part(path) for path in state.parts.values())


class _Run:
    """One run on its way: what it has found so far."""

    def __init__(
        self,
        config: JobConfig,
        folder: OutputFolder,
        job: Job,
        identity: dict[str, Any],
        memory: DigestMemory,
        began: float,
        stop: Stop,
    ) -> None:
        self.config, self.folder, self.job, self.memory = config, folder, job, memory
        self.job_identity, self.began, self.stop = identity, began, stop

    def check_input(self, state: FolderState | None) -> None:
        """Read and check all rows. state: of the folder, whose part_rows decide how they are cut."""
        config = self.config
        replaced = state is not None and _is_replaced(config, state, self.job_identity)
        kept = None if replaced else state
        self.part_rows = part_rows_of(config, kept)
        counts = [] if kept is None else [kept.identity.get("rows", 0)]
        began_ns = time.time_ns()
        self.summary = self.job.reader.check(part_rows=self.part_rows, counts=counts, must_hold=config.skip_row)
        found = {"rows": self.summary.rows, "digest": self.summary.digest}
        self.memory.remember_input(_input_settings(config), self.job.reader.source.files(), began_ns, found)
        self.identity = {
            **self.job_identity,
            "input_digest": self.summary.digest,
            "rows": self.summary.rows,
            "limit": config.limit,
            "part_rows": self.part_rows,
        }
        self.most_errors = most_errors(config.max_row_errors, self.summary.rows)
        self.check_errors(self.summary.bad_rows)

    def check_errors(self, errors: int) -> None:
        """Raises InputRowsError when there are more error rows than max_row_errors allows."""
        if errors > self.most_errors:
            raise InputRowsError(
                f"{errors} of {self.summary.rows} rows are errors, more than max_row_errors ({self.config.max_row_errors}) allows; "
                "what is written stays, and the same command with a larger one goes on"
            )

    def go(self, lock: OutputLock, progress: Progress | None) -> RunSummary:
        """All that needs the lock."""
        config, folder = self.config, self.folder
        state = folder.state()
        replaced = state is not None and _is_replaced(config, state, self.job_identity)
        trusted = Trusted(parts={}, footer={})
        if state is not None and replaced:
            check_replaceable(config, state, folder.inspect_parts(state, self.memory))
        elif state is not None:
            trusted = self._trusted(state)
            if len(trusted.parts) == count_parts(self.part_rows, self.summary.rows):
                return self._finish(state, trusted, lock)
        device = resolve_device(config.engine)
        if lock.works:
            sweep(folder.work)
        watch = ProgressFile(folder.work, folder.writer, total=self.summary.rows, done=trusted.rows, failed=trusted.errors)
        watch.write("loading")
        try:
            logger.info("%d rows checked; loading %s on %s as %s", self.summary.rows, config.model, device, config.engine.dtype)
            load_began = time.monotonic()
            network = load_network(self.job.checkpoint, self.job.gpt_config, self._engine_config(trusted), device, numerics=config.numerics)
            check_same_profile(config, trusted, network.profile, network.numerics)
            load_s = time.monotonic() - load_began
            with self.stop.deferred():
                if state is not None and replaced:
                    folder.clear(state)
                summary = self._generate(network, trusted, lock, progress, watch, load_s)
        except StoppedError:
            watch.write("stopped")
            raise
        except BaseException:
            watch.write("failed")
            raise
        watch.write("complete")
        return summary

    def _trusted(self, state: FolderState) -> Trusted:
        """Looks at the folder under the lock: what was seen before it was had may have changed."""
        config = self.config
        check_same_job(config, state, self.job_identity)
        if part_rows_of(config, state) != self.part_rows:
            raise OutputBusyError(f"{config.output}: another run began there while this one looked at the input; run it again")
        check_same_input(config, state, self.summary)
        found = self.folder.inspect_parts(state, self.memory)
        trusted = trusted_parts(config, state, found, self.job_identity, self.summary)
        logger.info("%d of %d parts are there", len(trusted.parts), count_parts(self.part_rows, self.summary.rows))
        return trusted

    def _finish(self, state: FolderState, trusted: Trusted, lock: OutputLock) -> RunSummary:
        """Every part is there: say so in the folder, unless it does already."""
        manifest = {**facts_of(trusted.footer), "format": FORMAT, "identity": self.identity}
        with suppress(StorageError) if state.marked_complete else nullcontext():  # of a read-only folder, there is nothing to write
            if not state.marked_complete:
                self.folder.create()
            if lock.works:
                sweep(self.folder.work)
            if state.marked_complete and state.identity == self.identity:
                self.memory.settle_parts(self.folder.path / part.name for part in trusted.parts.values())
                self.folder.remember(self.memory)
            else:
                self.folder.complete(manifest, trusted.parts.values(), self.memory)
        done = {**manifest, "rows": trusted.rows}
        return _nothing_to_do(self.config, done, time.monotonic() - self.began)

    def _engine_config(self, trusted: Trusted) -> Any:
        """auto takes the attention backend that the rows which are there were made with."""
        recorded = trusted.footer.get("profile", {}).get("attention")
        if recorded is None or self.config.engine.attention != "auto" or self.config.allow_other_profile:
            return self.config.engine
        return self.config.engine.model_copy(update={"attention": recorded})

    def _generate(
        self, network: Network, trusted: Trusted, lock: OutputLock, progress: Progress | None, watch: ProgressFile, load_s: float
    ) -> RunSummary:
        config, folder, summary = self.config, self.folder, self.summary
        facts = {"format": FORMAT, "identity": self.identity, **self._facts(network)}
        parts = dict(trusted.parts)
        folder.begin(config.to_yaml(), facts, parts.values())
        self.memory.forget_other_parts(part.name for part in parts.values())
        folder.remember(self.memory)
        writer = PartWriter(
            folder.path,
            folder.writer,
            self.memory,
            part_rows=self.part_rows,
            total_rows=summary.rows,
            facts=facts,
            input_digests=summary.part_digests,
        )
        attempts = Attempts(folder.work, folder.writer) if lock.works else None
        if attempts is not None:
            for number in parts:
                attempts.written(number)
        loop = _Loop(self, network, writer, attempts, parts, trusted.errors, progress, watch)
        began = time.monotonic()
        try:
            loop.run([number for number in range(count_parts(self.part_rows, summary.rows)) if number not in parts])
        finally:
            with suppress(StorageError):
                if attempts is not None:
                    attempts.end()
                folder.remember(self.memory)
                write_error_rows(folder, parts.values(), config.prompt_field)
        write_error_rows(folder, parts.values(), config.prompt_field)
        generate_s = time.monotonic() - began
        logger.info("%d rows written in %.1f s", loop.rows, generate_s)
        halvings = {"memory_halvings": loop.halvings} if loop.halvings else {}
        folder.complete({**facts, **halvings}, parts.values(), self.memory)
        return RunSummary(
            output=config.output,
            rows=loop.rows,
            ok=loop.rows - loop.errors,
            errors=loop.errors,
            skipped=trusted.rows,
            prompt_tokens=loop.prompt_tokens,
            completion_tokens=loop.completion_tokens,
            load_s=round(load_s, 3),
            generate_s=round(generate_s, 3),
            wall_s=round(time.monotonic() - self.began, 3),
            tokens_per_s=round(loop.completion_tokens / generate_s, 1) if generate_s > 0 else 0.0,
            device=str(network.model.device),
            dtype=config.engine.dtype,
            numerics=network.numerics,
            fingerprint=self.identity["fingerprint"],
        )

    def _facts(self, network: Network) -> dict[str, Any]:
        """What the manifest and each part's footer say of the run."""
        config = self.config
        return {
            "fingerprint": self.identity["fingerprint"],
            "model": redact(config.model),
            "model_path": str(self.job.checkpoint.folder.resolve()),
            "model_digest": self.identity["model_digest"],
            "tokenizer_digest": self.identity["tokenizer_digest"],
            "input": redact(config.input if config.input is not None else f"{config.dataset}[{config.split}]"),
            "input_digest": self.identity["input_digest"],
            "dtype": config.engine.dtype,
            "device": str(network.model.device),
            "numerics": network.numerics,
            "profile": network.profile,
            "versions": {
                "python": platform.python_version(),
                **{name: _version(name) for name in ("gptbatch", "torch", "tokenizers", "datasets", "pyarrow", "numpy")},
            },
        }


class _Loop:
    """Runs parts through the engine and commits them as they become whole. Counts are of rows that this run has finished."""

    def __init__(
        self,
        run: _Run,
        network: Network,
        writer: PartWriter,
        attempts: Attempts | None,
        parts: dict[int, Part],
        errors_before: int,
        progress: Progress | None,
        watch: ProgressFile,
    ) -> None:
        self.run_, self.network, self.writer, self.attempts, self.parts = run, network, writer, attempts, parts
        self.errors_before, self.progress, self.watch = errors_before, progress, watch
        self.rows = self.errors = self.prompt_tokens = self.completion_tokens = self.halvings = 0
        self.started: set[int] = set()  # parts of which a row has been taken and that are not written
        self.manifest_written = time.monotonic()

    def run(self, numbers: list[int]) -> None:
        run, summary = self.run_, self.run_.summary
        if summary.rows == 0:
            self._written(self.writer.add_empty())
            return
        suspects = self.attempts.suspects & set(numbers) if self.attempts else set()
        if self.progress is not None:
            self.progress.begin(summary.rows, sum(part.rows for part in self.parts.values()))
        self.watch.begin()
        try:
            if suspects:
                logger.warning(
                    "runs have died twice while parts %s were in flight%s: they run one row at a time",
                    ", ".join(map(str, sorted(suspects))),
                    f" (the last one while row {self.attempts.last_row!r} ran alone; --skip-row leaves it out)"
                    if self.attempts and self.attempts.last_row is not None
                    else "",
                )
                self._run_parts(suspects, batch_size=1)
            if others := set(numbers) - suspects:
                self._run_parts(others, batch_size=run.config.engine.batch_size)
        finally:
            if self.progress is not None:
                self.progress.end()

    def _run_parts(self, numbers: set[int], *, batch_size: int) -> None:
        engine = self._engine(batch_size)
        self.most_started = MOST_OPEN_PARTS + -(-engine.batch_size // self.run_.part_rows)
        self.alone = batch_size == 1
        prompts = self.run_.job.tokenized(self.run_.summary, reject=self._take, parts=numbers, may_start=self._may_start)
        if self.alone and self.attempts is not None:
            prompts = self._named(prompts, self.attempts)
        tokens_before, halvings_before = self.completion_tokens, self.halvings
        for ended in engine.generate(prompts):
            for completion in ended:
                self._take(completion)
            tokens = tokens_before + engine.stats.new_tokens
            if self.progress is not None:
                self.progress.update(rows=self.rows, errors=self.errors, completion_tokens=tokens)
            self.watch.update(rows=self.rows, errors=self.errors, completion_tokens=tokens)
            self.halvings = halvings_before + engine.stats.halvings
            if (who := self.run_.stop.requested()) is not None:
                raise StoppedError(f"stopped by {who}; {len(self.parts)} parts are written; run the same command again to go on")

    def _named(self, prompts: Iterator[Any], attempts: Attempts) -> Iterator[Any]:
        """Notes the row that runs alone before it does."""
        for prompt in prompts:
            if prompt is not None:
                attempts.note(sorted(self.started), prompt.prompt.prompt_id)
            yield prompt

    def _may_start(self, number: int) -> bool:
        if number not in self.started:
            if len(self.started) >= self.most_started:
                return False
            self.started.add(number)
            self._note()
        return True

    def _note(self) -> None:
        if self.attempts is not None:
            self.attempts.note(sorted(self.started))

    def _take(self, completion: Completion) -> None:
        failed = completion.finish_reason == "error"
        self.rows += 1
        self.errors += failed
        self.prompt_tokens += completion.prompt_tokens
        self.completion_tokens += len(completion.token_ids)
        text = None if failed else self.run_.job.tokenizer.completion_text(completion.token_ids, completion.finish_reason)
        if (part := self.writer.add(completion, text)) is not None:
            self._written(part)
        if failed:
            self.run_.check_errors(self.errors_before + self.errors)

    def _written(self, part: Part) -> None:
        self.parts[part.number] = part
        self.started.discard(part.number)
        if self.attempts is not None:
            self.attempts.written(part.number)
            self._note()
        if time.monotonic() - self.manifest_written >= MANIFEST_EVERY_S:
            self.run_.folder.write_manifest(self.writer.facts, self.parts.values(), complete=False)
            self.run_.folder.remember(self.run_.memory)
            self.manifest_written = time.monotonic()

    def _engine(self, batch_size: int) -> Engine:
        from pipeline.generation.engine import Engine

        config, rows = self.run_.config, self.run_.summary.rows
        return Engine(
            model=self.network.model,
            batch_size=max(1, min(batch_size, rows)),
            end_of_text=None if config.ignore_eos else self.run_.job.gpt_config.end_of_text,
            memory_bytes=cache_memory_bytes(config.engine.memory_gib, self.network),
            window_full=config.window_full,
            record_logits=config.record_logits_digest,
        )


def most_errors(setting: str | None, rows: int) -> int:
    """How many error rows max_row_errors ("5", "2.5%", None for any number) allows."""
    if setting is None:
        return rows
    return int(float(setting[:-1]) / 100 * rows) if setting.endswith("%") else int(setting)


def cache_memory_bytes(memory_gib: float | None, network: Network) -> int | None:
    """Memory for the cache: as set, or a share of what is free. None where nobody knows what is."""
    if memory_gib is not None:
        return int(memory_gib * 2**30)
    if network.model.device.type == "cuda":
        import torch

        free: int | None = torch.cuda.mem_get_info(network.model.device)[0]
    else:
        free = free_memory_bytes()
    return None if free is None else int(free * MEMORY_SHARE)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _nothing_to_do(config: JobConfig, manifest: dict[str, Any], wall_s: float) -> RunSummary:
    return RunSummary(
        output=config.output,
        rows=0,
        ok=0,
        errors=0,
        skipped=manifest["rows"],
        prompt_tokens=0,
        completion_tokens=0,
        load_s=0.0,
        generate_s=0.0,
        wall_s=round(wall_s, 3),
        tokens_per_s=0.0,
        device=manifest["device"],
        dtype=manifest["dtype"],
        numerics=manifest["numerics"],
        fingerprint=manifest["fingerprint"],
    )
