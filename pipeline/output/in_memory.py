"""Generates the table of some prompts in memory: the rows that a job writes as parts."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.input.prompt_reader import InputSummary
from gptbatch.pipeline.input.tokenize import TokenizedInput
from gptbatch.pipeline.model.loading import LoadedModel
from gptbatch.pipeline.output.part_writer import count_errors
from gptbatch.pipeline.output.row_runner import Progress, RowRunner
from gptbatch.pipeline.output.schema import SCHEMA, to_table
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
    rows: dict[int, list[Completion]] = {}

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
        runner.complete()
    finally:
        runner.end()
    ordered = (rows.pop(index) for index in range(summary.rows))
    kinds: Counter[str] = Counter()
    tables = [SCHEMA.empty_table()]
    while chunk := list(islice(ordered, TABLE_ROWS)):
        samples = [[Sample(done, prompts.tokenizer.text_of(done)) for done in row] for row in chunk]
        kinds += count_errors(samples)
        tables.append(to_table([sample for row in samples for sample in row]))
    return GeneratedTable(pa.concat_tables(tables), kinds)


def with_facts(table: pa.Table, facts: dict[str, Any]) -> pa.Table:
    """Return a table with facts of its run in the metadata of its schema."""
    return table.replace_schema_metadata({FACTS_KEY: json.dumps(facts)})
