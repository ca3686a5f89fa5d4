"""Generates the table of some prompts in memory: the rows that a job writes as parts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.input.prompt_reader import InputSummary
from gptbatch.pipeline.input.tokenize import TokenizedInput
from gptbatch.pipeline.model.loading import LoadedModel
from gptbatch.pipeline.output.row_runner import Progress, RowRunner
from gptbatch.pipeline.output.schema import SCHEMA, to_row, to_table
from gptbatch.pipeline.types import Completion, Sample

FACTS_KEY = b"gptbatch_generate"
TABLE_ROWS = 2048


@dataclass(frozen=True, slots=True)
class GeneratedTable:
    """The result of `generate_table`.

    Attributes:
        table: The rows in the order of the prompts, with the schema of a job's parts.
        error_kinds: Number of rows of the input with an error, by kind.
    """

    table: pa.Table
    error_kinds: Counter[str]


def generate_table(
    config: JobConfig,
    prompts: TokenizedInput,
    summary: InputSummary,
    loaded: LoadedModel,
    progress: Progress | None,
) -> GeneratedTable:
    """Generate the rows of a checked input.

    Args:
        config: The settings of the job.
        prompts: The input as token ids.
        summary: The result of checking the input.
        loaded: The model.
        progress: Takes the counts.

    Raises:
        OutOfMemoryError: Memory does not suffice for one row.
    """
    runner = RowRunner(
        config, prompts, summary, loaded, observers=[] if progress is None else [progress]
    )
    rows: dict[int, list[Sample]] = {}

    def take(completion: Completion) -> None:
        if (samples := runner.add(completion)) is not None:
            rows[completion.prompt.index] = samples

    runner.begin(summary.rows, 0)
    try:
        if summary.rows:
            engine = runner.engine()
            all_prompts = prompts.prompts(summary, reject=take)
            for _ in runner.steps(engine, all_prompts, take, rows=summary.rows):
                pass
    finally:
        runner.end()
    errors = (
        next((sample.completion.error for sample in samples if sample.completion.error), None)
        for samples in rows.values()
    )
    kinds: Counter[str] = Counter(error.kind for error in errors if error is not None)
    ordered = (sample for index in range(summary.rows) for sample in rows.pop(index))
    return GeneratedTable(pa.concat_tables([SCHEMA.empty_table(), *_tables(ordered)]), kinds)


def with_facts(table: pa.Table, facts: dict[str, Any]) -> pa.Table:
    """Return a table with facts of its run in the metadata of its schema."""
    return table.replace_schema_metadata({FACTS_KEY: json.dumps(facts)})


def _tables(samples: Iterator[Sample]) -> Iterator[pa.Table]:
    while chunk := list(islice(samples, TABLE_ROWS)):
        yield to_table([to_row(sample.completion, sample.text) for sample in chunk])
