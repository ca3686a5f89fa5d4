"""`gptbatch report`: writes an HTML file that shows a run, or compares two."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptbatch.jobs.messages import echo
from gptbatch.jobs.options import (
    Command,
    FolderArgument,
    OutputArgument,
    option_name,
    print_checkpoint,
    reopen_options,
)
from gptbatch.pipeline.errors import InputNotFoundError, OutputConflictError, OutputCreationError
from gptbatch.pipeline.storage.location import Location

if TYPE_CHECKING:
    from gptbatch.pipeline.audit.loaded_run import Overrides
    from gptbatch.pipeline.report.document import Section


@click.command(cls=Command)
@click.argument("output", type=OutputArgument())
@click.argument("other", type=OutputArgument(), required=False)
@click.option(
    "--html",
    type=FolderArgument(),
    metavar="FILE",
    help="File to write; a report that is there is replaced. Default: NAME-report.html in the "
    "current folder, with the name of the output folder.",
)
@click.option("--no-text", is_flag=True, help="Leave out prompts, completions and metadata.")
@click.option(
    "--explain",
    multiple=True,
    metavar="ID",
    help="Explain each token of this row of OUTPUT, with sliders for other settings; ID#I is "
    "sample I. Needs the weights. May be repeated.",
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
    decision margins, and a browser of some hundred rows. With OTHER, it compares the two runs. The
    file has at most 2 MB and loads nothing: any browser opens it without a network.

    With --explain, it shows why each token of a row was sampled, and which token other settings
    would have sampled with the same noise.

    OUTPUT may hold a run that is going on or was killed. The last line is a JSON object.
    """
    from gptbatch.pipeline.audit.loaded_run import Overrides
    from gptbatch.pipeline.report.build import build_report

    _check_options(explain, options, no_text=no_text)
    for path in (output, other):
        _refuse_scores(path)
    target = html or Path(_default_name(output, other))
    _check(target)
    more = []
    if explain:
        more.append(_explorer(output, explain, Overrides(**options), is_beside=other is not None))
    built = build_report(output, other, with_text=not no_text, more=more)
    _write(target, built.html.encode())
    echo(json.dumps({"html": str(target), "bytes": target.stat().st_size, **built.facts}))


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
        explain_section,
        find_rows,
    )

    run = RunReader(output)
    rows = find_rows(run, names)
    print_checkpoint(run, overrides.model)
    max_bytes = MAX_BYTES_BESIDE if is_beside else MAX_BYTES
    return explain_section(LoadedRun(run, overrides), rows, max_bytes)


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


def _check(target: Path) -> None:
    """Refuse a target that cannot be written, or is another file, before the run is read."""
    from gptbatch.pipeline.report.document import MARK

    if target.is_dir():
        raise OutputConflictError(f"{target}: is a folder; name a file, such as report.html")
    if not target.absolute().parent.is_dir():
        raise OutputCreationError(f"{target}: there is no folder {target.absolute().parent}")
    try:
        with target.open("rb") as file:
            is_report = file.read(len(MARK)) == MARK.encode()
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputConflictError(f"{target}: cannot be read ({error.strerror})") from error
    if not is_report:
        raise OutputConflictError(f"{target}: is another file, not a report; name another file")


def _write(target: Path, content: bytes) -> None:
    """Write the file under a temporary name first, so that it appears whole."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=target.absolute().parent, prefix=f".{target.name[:100]}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(content)
        # mkstemp gives the file to its owner alone
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    except OSError as error:
        raise OutputCreationError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
