"""export_run: writes the rows of a run to one file."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any, BinaryIO, Literal, get_args

from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.errors import ConfigError, IncompleteError, ModelError, StorageError
from gptbatch.pipeline.export.columns import ExportTable, Selection
from gptbatch.pipeline.export.formats import (
    rows_of,
    write_csv,
    write_lines,
    write_parquet,
)
from gptbatch.pipeline.export.openai_results import OPENAI_COLUMNS, OpenaiResults
from gptbatch.pipeline.output.run_facts import public_facts
from gptbatch.pipeline.output.single_file import SingleFile
from gptbatch.pipeline.output.stray_tables import describe_stray_tables
from gptbatch.pipeline.system.bundled import locate

logger = logging.getLogger("gptbatch")

Format = Literal["jsonl", "openai", "parquet", "csv"]
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
}
_COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSummary:
    """The result of an export.

    Attributes:
        output: The file.
        format: Its format.
        rows: Rows of the run's input in it.
        samples: Rows of the run's table in it: n per row of the input.
        columns: Its columns; those that the lines are made of with the format openai.
        bytes: Its size.
        complete: Whether the run was complete.
    """

    output: str
    format: Format
    rows: int
    samples: int
    columns: list[str]
    bytes: int
    complete: bool


def export_run(
    run: RunReader,
    output: str,
    *,
    file_format: Format | None = None,
    selection: Selection | None = None,
    allow_incomplete: bool = False,
    overwrite: bool = False,
) -> ExportSummary:
    """Write the rows of a run to one file, in their order. Reads batches of 2,048 rows.

    Args:
        run: The run.
        output: The file. It appears whole, or not at all.
        file_format: None follows from the suffix of the file.
        selection: The columns; None takes all. Not with the format openai.
        allow_incomplete: Export the rows of a run that is not complete.
        overwrite: Replace an existing file.

    Raises:
        ConfigError: The format and the file, or the columns, do not fit.
        IncompleteError: The run is not complete.
        InputNotFoundError: No row has one of the metadata fields.
        InputRowsError: A metadata field has values of several types.
        OutputConflictError: The file exists, or lies in the output of a run.
        StorageError: A part cannot be read, or the file cannot be written.
    """
    if output == "-":
        raise ConfigError("cannot write to standard output; name a file", keys=("output",))
    file_format = _format_of(output, file_format)
    if file_format == "openai":
        if selection is not None and selection != Selection():
            raise ConfigError("the format openai has fixed fields; leave the columns out")
        selection = Selection(columns=OPENAI_COLUMNS)
    target = SingleFile(output, command="export")
    if target.exists() and not overwrite:
        raise target.conflict("exists")
    if run.stray_tables:
        raise StorageError(f"{run.path}: {describe_stray_tables(run.stray_tables)}")
    if not (run.complete or allow_incomplete):
        raise IncompleteError(
            f"{run.path}: is not complete; run its command again, or export the "
            f"{run.described_rows} that it holds with --allow-incomplete"
        )
    table = ExportTable(run, selection or Selection())
    schema = table.schema
    suffix = PurePath(output).suffix.lower()

    def content(file: BinaryIO) -> None:
        if file_format == "parquet":
            write_parquet(file, schema, table.batches(), _facts(run))
        elif file_format == "csv":
            write_csv(file, schema, table.batches(), suffix)
        elif file_format == "openai":
            write_lines(file, _openai_results(run).lines(rows_of(table.batches())), suffix)
        else:
            write_lines(file, rows_of(table.batches()), suffix)

    with target.writer() as writer:
        if not writer.write(target.path, content, only_if_absent=not overwrite):
            raise target.conflict("was written by another process in the meantime")
    return ExportSummary(
        output=output,
        format=file_format,
        rows=run.rows_done,
        samples=run.n_rows,
        columns=schema.names,
        bytes=target.path.stat().st_size,
        complete=run.complete,
    )


def _format_of(output: str, given: Format | None) -> Format:
    """Return the format that an option or the suffix gives.

    Raises:
        ConfigError: They contradict each other, or the suffix is of none.
    """
    path = PurePath(output)
    is_compressed = path.suffix.lower() in _COMPRESSED
    suffix = PurePath(path.stem).suffix if is_compressed else path.suffix
    by_suffix = _SUFFIXES.get(suffix.lower())
    if given is None and by_suffix is None:
        raise ConfigError(
            f"{output}: its format does not follow from the suffix {suffix!r}; "
            f"name a file such as rows.jsonl, rows.parquet or rows.csv, or give --format "
            f"({', '.join(get_args(Format))})"
        )
    found = given or by_suffix
    assert found is not None
    is_lines = {"jsonl", "openai"}
    if by_suffix not in (None, found) and not {by_suffix, found} <= is_lines:
        raise ConfigError(
            f"{output}: the format {found} does not fit the suffix {suffix}; "
            f"name a file such as rows.{found}, or leave --format out"
        )
    if found == "parquet" and is_compressed:
        raise ConfigError(
            f"{output}: Parquet is compressed inside; name a file without .gz or .zst"
        )
    return found


def _facts(run: RunReader) -> dict[str, Any]:
    """Return the facts of the run that name no folder and no machine."""
    facts = public_facts(run.facts)
    return {**facts, "content_digest": run.content_digest, "complete": run.complete}


def _openai_results(run: RunReader) -> OpenaiResults:
    model = str(run.facts.get("model") or "")
    is_hub_name = model.count("/") <= 1 and not model.startswith((".", "/", "~"))
    return OpenaiResults(
        # the name without folders
        model=model if is_hub_name else PurePath(model).name,
        is_chat=run.manifest["identity"].get("messages_field") is not None,
        find_token_bytes=partial(_find_token_bytes, run),
    )


def _find_token_bytes(run: RunReader) -> list[bytes]:
    """Return the bytes of each token's text; nothing, with a warning, where they are unknown."""
    from gptbatch.pipeline.input.tokenizer import PromptTokenizer
    from gptbatch.pipeline.input.tokenizer_loading import load_tokenizer

    name = str(run.facts.get("model_path") or run.facts.get("model") or "")
    folder = locate(name)
    try:
        if not (name and folder.is_dir()):
            raise ModelError(f"its checkpoint is not at {name}")
        tokenizer = load_tokenizer(folder)
        if tokenizer.digest != run.manifest["identity"].get("tokenizer_digest"):
            raise ModelError(f"the tokenizer at {name} is not that of the run")
        if found := PromptTokenizer(tokenizer, start_token=None).token_bytes:
            return found
        raise ModelError("the tokens of its tokenizer are no bytes of text")
    except (ModelError, StorageError) as error:
        logger.warning(
            "%s: log probabilities are left out, since the texts of tokens are unknown: %s",
            run.path,
            error,
        )
        return []
