"""`gptbatch export`: writes the rows of a run to one file."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from gptbatch.jobs.arguments import OutputArgument
from gptbatch.jobs.messages import echo
from gptbatch.jobs.options import Command
from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.export.columns import Selection
from gptbatch.pipeline.export.run import export_run
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.system.paths import expand_path


@click.command(cls=Command)
@click.argument("run", metavar="OUTPUT", type=OutputArgument())
@click.option(
    "--to",
    "output",
    required=True,
    metavar="FILE",
    help="File to write, in any folder: rows.jsonl, rows.jsonl.gz, rows.jsonl.zst, rows.parquet, "
    "rows.csv.",
)
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["jsonl", "openai", "parquet", "csv"]),
    help=(
        "Format of the file. jsonl: a JSON object per row. openai: a result of OpenAI's batch API "
        "per prompt. parquet: one Parquet file. csv: a header, and a record per row. "
        "Default: by the suffix of the file."
    ),
)
@click.option(
    "--columns",
    multiple=True,
    metavar="NAMES",
    help="Columns to export, with commas between them; may be repeated. Default: all.",
)
@click.option(
    "--metadata",
    multiple=True,
    metavar="FIELD",
    help=(
        "Metadata field to make a column of, with the type of its values. Dots select nested "
        "values. May be repeated."
    ),
)
@click.option(
    "--metadata-json",
    multiple=True,
    metavar="FIELD",
    help="The same, as a column of JSON text, for values of several types. May be repeated.",
)
@click.option(
    "--all-metadata",
    is_flag=True,
    help="Make a column of every metadata field, instead of the column metadata.",
)
@click.option(
    "--allow-incomplete", is_flag=True, help="Export the rows of a run that is not complete."
)
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def export(
    run: Location, output: str, columns: tuple[str, ...], all_metadata: bool, **options: Any
) -> None:
    """Write the rows of the output folder OUTPUT to one file, in their order.

    JSON lines have the columns of the table, or those of --columns. Metadata fields become columns
    with one type over all rows. The file appears whole, or not at all. The last line is a JSON
    object.
    """
    names = [name.strip() for text in columns for name in text.split(",") if name.strip()]
    selection = Selection(
        columns=names if columns else None,
        metadata=options.pop("metadata"),
        metadata_json=options.pop("metadata_json"),
        all_metadata=all_metadata,
    )
    path = expand_path(output, writes=True, stores=True)
    echo(json.dumps(asdict(export_run(RunReader(run), path, selection=selection, **options))))
