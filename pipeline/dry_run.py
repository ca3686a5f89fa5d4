"""inspect_job: the dry run of a job. It loads no model and writes nothing."""

from __future__ import annotations

import logging
import os
from array import array
from collections import Counter
from dataclasses import dataclass, field
from functools import cache

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.input.config_hash import job_identity
from gptbatch.pipeline.input.open_input import open_input
from gptbatch.pipeline.input.row_warnings import FieldCounts
from gptbatch.pipeline.input.tokenize import TokenizedInput, log_generation_warnings
from gptbatch.pipeline.input.tokenizer_loading import load_tokenizer
from gptbatch.pipeline.job import plan_parts
from gptbatch.pipeline.model.checkpoint import find_checkpoint
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.loading import resolve_device
from gptbatch.pipeline.output.error_rows import describe_errors
from gptbatch.pipeline.output.folder import FolderState, OutputFolder
from gptbatch.pipeline.output.kept_parts import (
    check_replaceable,
    find_kept_parts,
    numbers_to_inspect,
)
from gptbatch.pipeline.output.part_plan import PartPlan
from gptbatch.pipeline.output.placement import check_placement
from gptbatch.pipeline.output.resume import (
    check_same_input,
    find_continued_run,
    find_run,
    part_rows_of,
)
from gptbatch.pipeline.output.shards import find_shard
from gptbatch.pipeline.storage.location import location_of
from gptbatch.pipeline.types import Completion

logger = logging.getLogger("gptbatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputReport:
    """The result of a dry run.

    Attributes:
        rows: Rows of the input.
        bad_rows: Rows that on_bad_row records as errors.
        error_kinds: Number of rows that become errors before the model runs, by kind.
        prompt_tokens: Tokens of all prompts.
        prompt_tokens_min: Tokens of the shortest prompt.
        prompt_tokens_median: Tokens of the median prompt.
        prompt_tokens_max: Tokens of the longest prompt.
        n_positions: The context length of the model, in tokens.
        too_long: Prompts with more tokens than n_positions.
        max_new_tokens: Default limit of new tokens per row.
        rows_capped: Rows whose limit is more than the context leaves after the prompt.
        input_digest: SHA-256 of the content of all rows that decides the output.
        rows_kept: Rows that the output holds and a run keeps; with a shard, those of its parts.
        prompt_fields: The fields that prompts are made of.
        setting_fields: Field that is a setting -> number of rows that have it.
        metadata_fields: Field that is metadata -> number of rows that have it; the first 1,000
            fields.
    """

    rows: int
    bad_rows: int
    error_kinds: dict[str, int]
    prompt_tokens: int
    prompt_tokens_min: int
    prompt_tokens_median: int
    prompt_tokens_max: int
    n_positions: int
    too_long: int
    max_new_tokens: int
    rows_capped: int
    input_digest: str
    rows_kept: int
    prompt_fields: list[str] = field(default_factory=list)
    setting_fields: dict[str, int] = field(default_factory=dict)
    metadata_fields: dict[str, int] = field(default_factory=dict)


def inspect_job(config: JobConfig) -> InputReport:
    """Check the output folder and every row of the input, and count the tokens of the prompts.

    Args:
        config: The settings of the job.

    Raises:
        GptbatchError: The errors that `run_job` raises before it loads the model.
    """
    shard = find_shard(config.shard, os.environ)
    check_placement(config)
    folder = OutputFolder(location_of(config.output))
    folder.check_creatable()
    if config.engine.device == "cuda" or config.engine.dtype == "float16":
        # Not for others, because it imports torch.
        resolve_device(config.engine)
    checkpoint = find_checkpoint(
        config.model, revision=config.revision, allow_pickle=config.allow_pickle
    )
    # A bad config.json is reported before the tokenizer is loaded, which takes seconds.
    parse_config(checkpoint.config, str(checkpoint.config_path))
    tokenizer = load_tokenizer(checkpoint.folder)
    log_generation_warnings(checkpoint)
    prompts = TokenizedInput(config, checkpoint, tokenizer, open_input(config))
    identity = cache(lambda: job_identity(config, checkpoint, tokenizer))
    state = find_run(folder)
    continued = find_continued_run(config, state, identity)
    field_counts = FieldCounts()
    summary = prompts.reader.check(
        part_rows=part_rows_of(config, continued),
        prefix_rows=[] if continued is None else [continued.identity.get("rows") or 0],
        required_ids=config.skip_row,
        field_counts=field_counts,
    )
    rows_kept = 0
    if continued is not None:
        check_same_input(config, continued, summary)
        plan = plan_parts(config, identity(), summary)
        rows_kept = _count_kept_rows(folder, continued, plan, shard.parts(plan.n_parts))
    elif state is not None:
        check_replaceable(state, folder.inspect_parts(state, folder.read_hashes(), state.parts))
        folder.check_writable()
    lengths = array("q")
    errors: Counter[str] = Counter()

    def reject(completion: Completion) -> None:
        assert completion.error is not None
        lengths.append(completion.prompt_tokens)
        errors[completion.error.kind] += 1

    for prompt in prompts.prompts(summary, reject=reject, all_samples=False):
        if prompt is not None:
            lengths.append(len(prompt.token_ids) + prompt.tokens_dropped)
    if described := describe_errors(errors, summary.rows):
        logger.warning("a run would record errors: %s", described)
    prompts.log_warnings()
    ordered = sorted(lengths)
    n_positions = prompts.gpt_config.n_positions
    return InputReport(
        rows=summary.rows,
        bad_rows=summary.bad_rows,
        error_kinds=dict(sorted(errors.items())),
        prompt_tokens=sum(ordered),
        prompt_tokens_min=ordered[0] if ordered else 0,
        prompt_tokens_median=ordered[len(ordered) // 2] if ordered else 0,
        prompt_tokens_max=ordered[-1] if ordered else 0,
        n_positions=n_positions,
        too_long=sum(length > n_positions for length in ordered),
        max_new_tokens=config.max_new_tokens,
        rows_capped=prompts.rows_capped,
        input_digest=summary.digest,
        rows_kept=rows_kept,
        prompt_fields=prompts.reader.defaults.prompt_paths,
        setting_fields=dict(field_counts.settings),
        metadata_fields=dict(field_counts.metadata),
    )


def _count_kept_rows(folder: OutputFolder, state: FolderState, plan: PartPlan, share: range) -> int:
    """Return the rows that a run keeps, and check that it can write the others."""
    numbers = numbers_to_inspect(state, share, plan.n_parts)
    kept = find_kept_parts(folder.inspect_parts(state, folder.read_hashes(), numbers), plan)
    if len(kept.parts) < len(share):
        folder.check_writable()
    return kept.rows
