"""`gptbatch report`: writes an HTML file that shows a run, or compares two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptbatch.jobs.arguments import FolderArgument, OutputArgument
from gptbatch.jobs.messages import echo, print_message
from gptbatch.jobs.options import Command, option_name, print_checkpoint, reopen_options
from gptbatch.pipeline.errors import InputNotFoundError, OutputConflictError, OutputCreationError
from gptbatch.pipeline.storage.location import Location

if TYPE_CHECKING:
    from gptbatch.pipeline.audit.loaded_run import Overrides
    from gptbatch.pipeline.output.single_file import SingleFile
    from gptbatch.pipeline.report.document import Section


@click.command(cls=Command)
@click.argument("output", type=OutputArgument())
@click.argument("other", type=OutputArgument(), required=False)
@click.option(
    "--html",
    type=FolderArgument(),
    metavar="FILE",
    help="File to write, outside of the output folders of runs; a report that is there is "
    "replaced. Default: NAME-report.html in the current folder, with the name of the output "
    "folder.",
)
@click.option("--no-text", is_flag=True, help="Leave out prompts, completions and metadata.")
@click.option(
    "--explain",
    multiple=True,
    metavar="ID",
    help="Explain each token of this row of OUTPUT, with sliders for other settings; ID#I is "
    "sample I, from 0. Needs the weights. May be repeated.",
)
@reopen_options
def report(
    output: Location,
    other: Location | None,
    html: Path | None,
    no_text: bool,
    explain: tuple[str, ...],
    **options: Any,
) -> None:
    """Write an HTML file that shows the run in the output folder OUTPUT.

    It shows what ran and how it ended, tokens per second over time, times, lengths, errors,
    decision margins, and a browser of up to 530 rows. With OTHER, it compares the two runs. The
    file has at most 2 MB and is self-contained: it makes no network requests.

    With --explain, it shows why each token of a row was sampled, and which token other settings
    would have sampled with the same noise.

    OUTPUT may hold a run that is going on or was killed. The last line is a JSON object.
    """
    import pyarrow as pa

    from gptbatch.pipeline.audit.loaded_run import Overrides
    from gptbatch.pipeline.report.build import build_report

    _check_options(explain, options, no_text=no_text)
    # Arrow's own pool keeps what was freed: 30 MB more for a run of a million rows.
    pa.set_memory_pool(pa.system_memory_pool())
    for path in (output, other):
        _refuse_scores(path)
    target = _target(html or Path(_default_name(output, other)))
    more = []
    if explain:
        more.append(_explorer(output, explain, Overrides(**options), is_beside=other is not None))
    built = build_report(output, other, with_text=not no_text, more=more)
    with target.writer() as writer:
        writer.write_text(target.path, built.html)
    size = target.path.stat().st_size
    echo(json.dumps({"html": str(target.path), "bytes": size, **built.facts}))


def _check_options(explain: tuple[str, ...], options: dict[str, Any], *, no_text: bool) -> None:
    """Refuse options that contradict each other.

    Raises:
        click.UsageError: They do.
    """
    if explain and no_text:
        raise click.UsageError("--explain shows the tokens of rows, and --no-text leaves texts out")
    for name, value in options.items():
        if value and not explain:
            raise click.UsageError(f"{option_name(name)} has no effect without --explain")


def _explorer(
    output: Location, names: tuple[str, ...], overrides: Overrides, *, is_beside: bool
) -> Section:
    """Return the section that explains rows. Unknown rows are refused before the model loads."""
    from gptbatch.pipeline.audit.loaded_run import LoadedRun
    from gptbatch.pipeline.audit.run_reader import RunReader
    from gptbatch.pipeline.report.explain import (
        MAX_BYTES,
        MAX_BYTES_BESIDE,
        MAX_STEPS,
        explain_section,
        find_rows,
    )

    run = RunReader(output)
    rows = find_rows(run, names)
    print_checkpoint(run, overrides.model)
    max_bytes = MAX_BYTES_BESIDE if is_beside else MAX_BYTES
    section = explain_section(LoadedRun(run, overrides), rows, max_bytes)
    for row in section.data["rows"]:
        if (shown := len(row["steps"])) < row["tokens"]:
            sample = f", sample {row['sample']}" if row["sample"] else ""
            print_message(
                f"row {row['id']!r}{sample}: the first {shown} of its {row['tokens']} tokens are "
                f"explained; a report explains at most {MAX_STEPS} in all"
            )
    return section


def _refuse_scores(path: Location | None) -> None:
    """Refuse a file of gptbatch score, which is no output folder."""
    if not isinstance(path, Path) or not path.is_file():
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    from gptbatch.pipeline.score.table import FACTS_KEY

    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):
        return
    if FACTS_KEY in metadata:
        raise InputNotFoundError(
            f"{path}: is a file of gptbatch score, and report shows runs of gptbatch generate; "
            "name an output folder"
        )


def _default_name(output: Location, other: Location | None) -> str:
    given = [path for path in (output, other) if path is not None]
    names = [(path.absolute() if isinstance(path, Path) else path).name or "run" for path in given]
    return f"{'-and-'.join(names)}-report.html"


def _target(path: Path) -> SingleFile:
    """Return the file to write. One that must not be written is refused before the run is read."""
    from gptbatch.pipeline.output.single_file import SingleFile
    from gptbatch.pipeline.report.document import MARK

    target = SingleFile(str(path), command="report")
    if not path.absolute().parent.is_dir():
        raise OutputCreationError(f"{path}: there is no folder {path.absolute().parent}")
    try:
        # opening a pipe would wait for its other end
        if path.exists() and not path.is_file():
            raise OutputConflictError(f"{path}: is no regular file; name another file")
        with path.open("rb") as file:
            is_report = file.read(len(MARK)) == MARK.encode()
    except FileNotFoundError:
        return target
    except OSError as error:
        raise OutputConflictError(f"{path}: cannot be read ({error.strerror})") from error
    if not is_report:
        raise OutputConflictError(f"{path}: is another file, not a report; name another file")
    return target
