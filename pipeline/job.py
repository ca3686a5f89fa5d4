"""The first steps of a run: find the job, check its input, open its output. Loads no model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.input.config_hash import job_identity
from gptbatch.pipeline.input.open_input import open_input
from gptbatch.pipeline.input.prompt_reader import InputSummary, PromptReader, Purpose
from gptbatch.pipeline.input.tokenize import TokenizedInput, log_generation_warnings
from gptbatch.pipeline.input.tokenizer import LoadedTokenizer
from gptbatch.pipeline.input.tokenizer_loading import load_tokenizer
from gptbatch.pipeline.model.checkpoint import Checkpoint, find_checkpoint
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.output.error_limit import ErrorLimit
from gptbatch.pipeline.output.existing_run import Target, inspect_output
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.folder import FolderState, OutputFolder
from gptbatch.pipeline.output.input_record import CheckedInput, check_input
from gptbatch.pipeline.output.lock import OutputLock, open_lock
from gptbatch.pipeline.output.part_plan import PartPlan
from gptbatch.pipeline.output.placement import check_placement
from gptbatch.pipeline.output.resume import find_continued_run, find_run
from gptbatch.pipeline.output.run_output import RunOutput
from gptbatch.pipeline.output.runs import open_run_folder
from gptbatch.pipeline.output.shards import NO_SHARD, Shard
from gptbatch.pipeline.storage.location import location_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job whose model and input are found.

    Attributes:
        config: Its settings.
        folder: The output folder.
        shard: The parts of this run.
        continued: The run that the job continues; None where it starts anew.
        hashes: The hashes of the output folder.
        checkpoint: The checkpoint of the model.
        tokenizer: Its tokenizer.
        identity: The identity of the job, without its input.
        reader: The input.
    """

    config: JobConfig
    folder: OutputFolder
    shard: Shard
    continued: FolderState | None
    hashes: FileHashes
    checkpoint: Checkpoint
    tokenizer: LoadedTokenizer
    identity: dict[str, Any]
    reader: PromptReader


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedJob:
    """The input of a job, after every row was checked.

    Attributes:
        prompts: The input as token ids.
        rows: The result of the check.
        plan: The parts. Their identity includes the input.
    """

    prompts: TokenizedInput
    rows: CheckedInput
    plan: PartPlan

    @property
    def summary(self) -> InputSummary:
        """The result of checking the rows."""
        return self.rows.summary


def find_job(config: JobConfig, shard: Shard, purpose: Purpose = "generated") -> Job:
    """Find the model and the input, and check that the output folder holds no other job.

    Args:
        config: The settings of the job.
        shard: The parts of this run.
        purpose: What is done with the rows, for messages.
    """
    check_placement(config)
    folder = OutputFolder(location_of(config.output))
    state = find_run(folder)
    hashes = folder.read_hashes()
    checkpoint = find_checkpoint(
        config.model,
        revision=config.revision,
        allow_pickle=config.allow_pickle,
        sha256=hashes.sha256,
    )
    # A bad config.json is reported before the tokenizer is loaded, which takes seconds.
    parse_config(checkpoint.config, str(checkpoint.config_path))
    tokenizer = load_tokenizer(checkpoint.folder)
    identity = job_identity(config, checkpoint, tokenizer)
    return Job(
        config=config,
        folder=folder,
        shard=shard,
        continued=find_continued_run(config, state, lambda: identity),
        hashes=hashes,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        identity=identity,
        reader=open_input(config, purpose=purpose),
    )


def check_job(job: Job) -> CheckedJob:
    """Check the rows, and make the plan of their parts."""
    config = job.config
    log_generation_warnings(job.checkpoint)
    prompts = TokenizedInput(config, job.checkpoint, job.tokenizer, job.reader)
    checked = check_input(
        config, job.folder, job.reader, job.hashes, job.continued, is_whole=job.shard.is_whole
    )
    summary = checked.summary
    ErrorLimit(config.max_row_errors, summary.rows).check(summary.bad_rows)
    return CheckedJob(prompts=prompts, rows=checked, plan=plan_parts(config, job.identity, summary))


def plan_parts(config: JobConfig, identity: dict[str, Any], summary: InputSummary) -> PartPlan:
    """Return the parts of a job whose input is checked.

    Args:
        config: The settings of the job.
        identity: The identity of the job, without its input.
        summary: The result of checking the input.
    """
    whole = {
        **identity,
        "input_digest": summary.digest,
        "rows": summary.rows,
        "limit": config.limit,
        "part_rows": summary.part_rows,
    }
    return PartPlan(identity=whole, input_digests=summary.part_digests)


def lock_output(job: Job) -> OutputLock:
    """Return the lock of the output; shards share it."""
    return open_lock(job.folder.work, shared=not job.shard.is_whole)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOutput:
    """The output of a job whose parts a driver deals out.

    Attributes:
        plan: The parts of the job.
        missing: Numbers of the parts to generate: those that are missing, damaged, or not whole.
        errors_kept: Error rows in the parts that are kept.
    """

    plan: PartPlan
    missing: list[int]
    errors_kept: int
    _output: RunOutput

    def finish(self) -> int:
        """Mark the output complete. Returns the number of error rows.

        Raises:
            IncompleteError: A part is not whole.
            OutputConflictError: The folder holds other parts or tables.
            StorageError: A file cannot be written, or a part is gone.
        """
        return self._output.finish_all()


@contextmanager
def open_output(config: JobConfig) -> Iterator[OpenOutput]:
    """Check the input and inspect the output of a job, for a driver that deals out its parts.

    Args:
        config: The settings of the job; `shard` is ignored.

    Raises:
        GptbatchError: The errors that `run_job` raises before it loads the model.
    """
    job = find_job(config, NO_SHARD)
    checked = check_job(job)
    job.folder.create()
    whole = Target(
        config=config, folder=job.folder, hashes=job.hashes, plan=checked.plan, shard=Shard()
    )
    with (
        lock_output(job) as lock,
        open_run_folder(job.folder.work, job.identity["config_hash"]) as run,
    ):
        existing = inspect_output(whole, lock, job.identity, checked.summary)
        output = RunOutput(target=whole, run=run, defaults=job.reader.defaults, existing=existing)
        checked.rows.write(job.folder, run.writer)
        missing = [number for number in whole.share if number not in existing.kept.parts]
        yield OpenOutput(
            plan=checked.plan,
            missing=missing,
            errors_kept=existing.kept.errors,
            _output=output,
        )
