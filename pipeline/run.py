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
from collections import Counter
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptbatch.pipeline.config import EngineConfig, JobConfig
from gptbatch.pipeline.errors import (
    OutputBusyError,
    OutputConflictError,
    StoppedError,
    StorageError,
)
from gptbatch.pipeline.input.config_hash import job_identity
from gptbatch.pipeline.input.prompt_reader import PromptReader, open_input
from gptbatch.pipeline.input.tokenize import TokenizedInput
from gptbatch.pipeline.input.tokenizer_loading import load_tokenizer
from gptbatch.pipeline.model.checkpoint import find_checkpoint
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.loading import LoadedModel, load_model, resolve_device, threads_to_use
from gptbatch.pipeline.output.atomic_write import sweep
from gptbatch.pipeline.output.crash_journal import CrashJournal
from gptbatch.pipeline.output.error_advice import describe_errors
from gptbatch.pipeline.output.error_rows import write_error_rows
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.folder import (
    ERRORS,
    FolderState,
    OutputFolder,
    refuse_stray_tables,
    run_facts,
)
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.lock import OutputLock
from gptbatch.pipeline.output.part_runner import ErrorLimit, PartRunner, Progress, Stop
from gptbatch.pipeline.output.parts import FORMAT, PartPlan, PartWriter
from gptbatch.pipeline.output.placement import check_placement
from gptbatch.pipeline.output.progress_file import PROGRESS, ProgressFile, seems_running
from gptbatch.pipeline.output.resume import (
    KeptParts,
    check_replaceable,
    check_same_environment,
    check_same_input,
    check_same_job,
    find_kept_parts,
    is_replaced,
    is_same_job,
    part_rows_of,
)
from gptbatch.pipeline.output.summary import RunSummary, summarize_complete_output
from gptbatch.pipeline.system.machine import describe_cores
from gptbatch.pipeline.system.redact import redact

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("gptbatch")
loading_logger = logging.getLogger("gptbatch.loading")


class _NobodyStops:
    def deferred(self) -> AbstractContextManager[None]:
        return nullcontext()

    def requested(self) -> None:
        return None


def run_job(
    config: JobConfig, progress: Progress | None = None, stop: Stop | None = None
) -> RunSummary:
    """Run a job to the end and say what was done. Raises GptbatchError (see errors.py for the kinds)."""
    began = time.monotonic()
    check_placement(config)
    folder = OutputFolder(Path(config.output))
    folder.refuse_links()
    state = folder.state()
    if state is not None:
        refuse_stray_tables(folder.path, state.stray_tables)
    memory = FileHashes() if state is None else folder.memory()
    checkpoint = find_checkpoint(
        config.model,
        revision=config.revision,
        allow_pickle=config.allow_pickle,
        sha256=memory.sha256,
    )
    parse_config(
        checkpoint.config, str(checkpoint.config_path)
    )  # before a tokenizer that takes seconds to make
    tokenizer = load_tokenizer(checkpoint.folder)
    identity = job_identity(config, checkpoint, tokenizer)
    if state is not None and not is_replaced(config, state, identity):
        check_same_job(config, state, identity)
    reader = open_input(config)
    with ExitStack() as stack:
        lock = None
        if state is not None and not is_replaced(config, state, identity):
            if _is_done(config, reader, state, memory):
                return summarize_complete_output(config, state.manifest, time.monotonic() - began)
            lock = stack.enter_context(OutputLock(folder.work)) if folder.work.is_dir() else None
        run = _Run(
            config,
            folder,
            TokenizedInput(config, checkpoint, tokenizer, reader),
            identity,
            memory,
            began,
            stop or _NobodyStops(),
        )
        run.check_input(state)
        if lock is None:
            resolve_device(config.engine)  # before a folder is made for nothing
            folder.create()
            lock = stack.enter_context(OutputLock(folder.work))
        return run.go(lock, progress)


def _input_settings(config: JobConfig) -> dict[str, Any]:
    keys = {
        "input",
        "dataset",
        "dataset_config",
        "dataset_revision",
        "split",
        "csv_delimiter",
        "limit",
        "on_bad_row",
        "skip_row",
    }
    return config.model_dump(include=keys | {"prompt_field", "id_field", "metadata_field"})


def _is_done(
    config: JobConfig, reader: PromptReader, state: FolderState, memory: FileHashes
) -> bool:
    """Whether nothing is left to do, as far as sizes and times of files say: the look that takes no time."""
    if not state.marked_complete:
        return False
    known = memory.find_input(_input_settings(config), reader.source.files())
    if known is None or known != {
        "rows": state.identity.get("rows"),
        "digest": state.identity.get("input_digest"),
    }:
        return False
    recorded = [part["name"] for part in state.manifest.get("parts", [])]
    return recorded == [path.name for path in state.parts.values()] and all(
        memory.is_unchanged(path) for path in state.parts.values()
    )


class _Run:
    """One run on its way: what it has found so far."""

    def __init__(
        self,
        config: JobConfig,
        folder: OutputFolder,
        prompts: TokenizedInput,
        identity: dict[str, Any],
        memory: FileHashes,
        began: float,
        stop: Stop,
    ) -> None:
        self.config, self.folder, self.prompts, self.memory = config, folder, prompts, memory
        self.job_identity, self.began, self.stop = identity, began, stop

    def check_input(self, state: FolderState | None) -> None:
        """Read and check all rows. state: of the folder, whose part_rows decide how they are cut."""
        config = self.config
        replaced = state is not None and is_replaced(config, state, self.job_identity)
        kept = None if replaced else state
        self.part_rows = part_rows_of(config, kept)
        counts = [] if kept is None else [kept.identity.get("rows", 0)]
        began_ns = time.time_ns()
        self.summary = self.prompts.reader.check(
            part_rows=self.part_rows, prefix_rows=counts, required_ids=config.skip_row
        )
        found = {"rows": self.summary.rows, "digest": self.summary.digest}
        self.memory.record_input(
            _input_settings(config), self.prompts.reader.source.files(), began_ns, found
        )
        self.identity = {
            **self.job_identity,
            "input_digest": self.summary.digest,
            "rows": self.summary.rows,
            "limit": config.limit,
            "part_rows": self.part_rows,
        }
        self.plan = PartPlan(identity=self.identity, input_digests=self.summary.part_digests)
        self.limit = ErrorLimit(config.max_row_errors, self.summary.rows)
        self.limit.check(self.summary.bad_rows)

    def go(self, lock: OutputLock, progress: Progress | None) -> RunSummary:
        """All that needs the lock."""
        config, folder = self.config, self.folder
        state = folder.state()
        replaced = state is not None and is_replaced(config, state, self.job_identity)
        trusted = KeptParts(parts={}, footer={})
        if (
            state is not None
            and not (lock.works or state.holds_job or is_same_job(state, self.job_identity))
            and seems_running(folder.work)
        ):
            raise OutputBusyError(
                f"{config.output}: another job is beginning there, says {folder.work / PROGRESS}; name another output"
            )
        if state is not None and replaced:
            check_replaceable(state, folder.inspect_parts(state, self.memory))
        elif state is not None:
            trusted = self._trusted(state)
            if len(trusted.parts) == self.plan.n_parts:
                return self._finish(state, trusted, lock)
        device = resolve_device(config.engine)
        if lock.works:
            sweep(folder.work)
        watch = self._watch(trusted)
        watch.write("loading")
        try:
            self._say_loading(device, trusted)
            load_began = time.monotonic()
            loaded = load_model(
                self.prompts.checkpoint,
                self.prompts.gpt_config,
                self._engine_config(trusted),
                device,
                batch_invariance=config.batch_invariance,
            )
            check_same_environment(config, trusted, loaded.environment, loaded.batch_invariance)
            load_s = time.monotonic() - load_began
            with self.stop.deferred():
                if state is not None and replaced:
                    folder.clear(
                        state, keep_journal=state.identity == self.identity and not state.holds_job
                    )
                replaces = state.identity if state is not None and replaced else None
                folder.begin(
                    config.to_yaml(),
                    self._facts(loaded),
                    trusted.parts.values(),
                    replaces=replaces,
                )
                summary = self._generate(loaded, trusted, lock, progress, watch, load_s)
        except (StoppedError, KeyboardInterrupt):
            watch.write("stopped")
            raise
        except OutputConflictError:
            raise
        except BaseException:
            watch.write("failed")
            raise
        watch.write("complete")
        return summary

    def _say_loading(self, device: torch.device, trusted: KeptParts) -> None:
        """What is about to be loaded, and why the cores are not ours. It is the first line of a run."""
        config = self.config
        threads = threads_to_use(config.engine.threads)
        where = (
            f"cpu with {threads} thread{'s' if threads > 1 else ''}"
            if device.type == "cpu"
            else str(device)
        )
        left = self.summary.rows - trusted.rows
        loading_logger.info(
            "loading %s as %s on %s for %d rows",
            redact(config.model),
            config.engine.dtype,
            where,
            left,
        )
        if device.type == "cpu" and (shared := describe_cores()):
            loading_logger.info("the cores are not this run's own: %s", shared)

    def _watch(self, trusted: KeptParts) -> ProgressFile:
        folder = self.folder
        return ProgressFile(
            folder.work,
            folder.writer,
            total=self.summary.rows,
            done=trusted.rows,
            failed=trusted.errors,
        )

    def _trusted(self, state: FolderState) -> KeptParts:
        """Looks at the folder under the lock: what was seen before it was had may have changed."""
        config = self.config
        check_same_job(config, state, self.job_identity)
        if part_rows_of(config, state) != self.part_rows:
            raise OutputBusyError(
                f"{config.output}: another run began there while this one looked at the input; run it again"
            )
        check_same_input(config, state, self.summary)
        found = self.folder.inspect_parts(state, self.memory)
        trusted = find_kept_parts(found, self.plan)
        logger.info("%d of %d parts are there", len(trusted.parts), self.plan.n_parts)
        return trusted

    def _finish(self, state: FolderState, trusted: KeptParts, lock: OutputLock) -> RunSummary:
        """Every part is there: say so in the folder, unless it does already."""
        manifest = {**run_facts(trusted.footer), "format": FORMAT, "identity": self.identity}
        with (
            suppress(StorageError) if state.marked_complete else nullcontext()
        ):  # of a read-only folder, there is nothing to write
            if not state.marked_complete:
                self.folder.create()
            if lock.works:
                sweep(self.folder.work)
            if state.marked_complete and state.identity == self.identity:
                self.memory.confirm_parts(
                    self.folder.path / part.name for part in trusted.parts.values()
                )
                self.folder.remember(self.memory)
            else:
                self._leave(trusted.parts, journal=None)
                self.folder.complete(manifest, trusted.parts, self.memory, self.plan)
                self._watch(trusted).write("complete")
        done = {**manifest, "rows": trusted.rows}
        return summarize_complete_output(self.config, done, time.monotonic() - self.began)

    def _engine_config(self, trusted: KeptParts) -> EngineConfig:
        """auto takes the attention backend that the rows which are there were made with."""
        recorded = trusted.footer.get("environment", {}).get("attention")
        if (
            recorded is None
            or self.config.engine.attention != "auto"
            or self.config.allow_other_environment
        ):
            return self.config.engine
        return self.config.engine.model_copy(update={"attention": recorded})

    def _generate(
        self,
        loaded: LoadedModel,
        trusted: KeptParts,
        lock: OutputLock,
        progress: Progress | None,
        watch: ProgressFile,
        load_s: float,
    ) -> RunSummary:
        config, folder, summary = self.config, self.folder, self.summary
        facts = self._facts(loaded)
        parts = dict(trusted.parts)
        self.memory.keep_parts(part.name for part in parts.values())
        folder.remember(self.memory)
        writer = PartWriter(folder.path, folder.writer, self.memory, plan=self.plan, facts=facts)
        journal = CrashJournal(folder.work, folder.writer) if lock.works else None
        if journal is not None:
            for number in parts:
                journal.written(number)
        loop = PartRunner(
            config=config,
            prompts=self.prompts,
            summary=summary,
            loaded=loaded,
            folder=folder,
            memory=self.memory,
            writer=writer,
            parts=parts,
            limit=self.limit,
            errors_before=trusted.errors,
            journal=journal,
            watch=watch,
            progress=progress,
            stop=self.stop,
        )
        began = time.monotonic()
        try:
            loop.run([number for number in range(self.plan.n_parts) if number not in parts])
        except OutputConflictError:  # the files in .gptbatch are another job's now
            raise
        except BaseException:
            with suppress(StorageError):
                self._leave(parts, journal)
            raise
        self._leave(parts, journal)
        generate_s = time.monotonic() - began
        logger.info("%d rows written in %.1f s", loop.rows, generate_s)
        halvings = {"batch_size_halvings": loop.halvings} if loop.halvings else {}
        folder.complete({**facts, **halvings}, parts, self.memory, self.plan)
        self._say_errors(parts)
        return RunSummary(
            output=config.output,
            rows=loop.rows,
            ok=loop.rows - loop.errors,
            errors=loop.errors,
            rows_kept=trusted.rows,
            prompt_tokens=loop.prompt_tokens,
            completion_tokens=loop.completion_tokens,
            load_s=round(load_s, 3),
            generate_s=round(generate_s, 3),
            wall_s=round(time.monotonic() - self.began, 3),
            tokens_per_s=round(loop.completion_tokens / generate_s, 1) if generate_s > 0 else 0.0,
            device=loaded.model.device.type,
            dtype=config.engine.dtype,
            batch_invariance=loaded.batch_invariance,
            config_hash=self.identity["config_hash"],
        )

    def _say_errors(self, parts: dict[int, Part]) -> None:
        """One warning about the error rows of the output."""
        kinds: Counter[str] = Counter()
        for part in parts.values():
            kinds.update(part.error_kinds)
        if said := describe_errors(kinds, self.summary.rows):
            logger.warning("%s; %s has their prompts and reasons", said, self.folder.work / ERRORS)

    def _leave(self, parts: dict[int, Part], journal: CrashJournal | None) -> None:
        """What a run leaves however it ends, as long as it ends by itself."""
        if journal is not None:
            journal.end()
        self.folder.remember(self.memory)
        write_error_rows(self.folder, parts.values(), self.prompts.reader.defaults)

    def _facts(self, loaded: LoadedModel) -> dict[str, Any]:
        """What the manifest and each part's footer say of the run."""
        config = self.config
        return {
            "format": FORMAT,
            "identity": self.identity,
            "config_hash": self.identity["config_hash"],
            "model": redact(config.model),
            "model_path": str(self.prompts.checkpoint.folder.resolve()),
            "model_digest": self.identity["model_digest"],
            "tokenizer_digest": self.identity["tokenizer_digest"],
            "input": redact(
                config.input if config.input is not None else f"{config.dataset}[{config.split}]"
            ),
            "input_digest": self.identity["input_digest"],
            "dtype": config.engine.dtype,
            "device": loaded.model.device.type,
            "batch_invariance": loaded.batch_invariance,
            "environment": loaded.environment,
            "versions": {
                "python": platform.python_version(),
                **{
                    name: _version(name)
                    for name in ("gptbatch", "torch", "tokenizers", "datasets", "pyarrow", "numpy")
                },
            },
        }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
