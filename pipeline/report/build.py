"""build_report: the report of one run, or of two, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from gptbatch.pipeline.report.compare import compare_section
from gptbatch.pipeline.report.distribution_sections import distribution_section, margin_section
from gptbatch.pipeline.report.document import Document, Section, to_json
from gptbatch.pipeline.report.row_sample import MAX_BYTES
from gptbatch.pipeline.report.run_view import RunView
from gptbatch.pipeline.report.sections import ends_section, rows_section, summary_section
from gptbatch.pipeline.report.time_section import time_section
from gptbatch.pipeline.storage.location import Location

# Of the JSON of all sections; the rest of a report takes about 150 KB.
MAX_DATA = 1_830_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A report.

    Attributes:
        html: The document.
        facts: Its main numbers, for the last line of the command.
    """

    html: str
    facts: dict[str, Any]


def build_report(
    path: Location,
    other: Location | None = None,
    *,
    with_text: bool = True,
    more: Sequence[Section] = (),
) -> Report:
    """Build the report of the run in an output folder.

    Args:
        path: The output folder. The run may be going on.
        other: The output folder of a run to compare with.
        with_text: Whether the report holds prompts, completions and metadata.
        more: Further sections, after those of the run.

    Raises:
        InputNotFoundError: A folder holds no run.
        OutputConflictError: A folder holds parts of several jobs.
        StorageError: A folder cannot be read, or the rows of two runs cannot be paired.
    """
    view = RunView(path)
    facts: dict[str, Any] = {
        "state": view.status.state,
        "rows": view.status.rows_done,
        "errors": sum(view.status.errors.values()),
        "samples": view.totals.rows,
    }
    compared: list[Section] = []
    if other is not None:
        summary, section = compare_section(view, RunView(other), with_text=with_text)
        compared.append(section)
        counts = ("equal", "different", "missing_in_a", "missing_in_b")
        facts |= {name: getattr(summary, name) for name in counts}
    # Before the charts, which use the memory again that reading rows takes.
    others = sum(len(to_json(section.data).encode()) for section in (*compared, *more))
    rows = rows_section(view, with_text=with_text, max_bytes=min(MAX_BYTES, MAX_DATA - others))
    sections = [
        summary_section(view),
        *compared,
        time_section(view),
        distribution_section(view),
        ends_section(view),
        margin_section(view),
        rows,
        *more,
    ]
    model, dataset = view.run.facts.get("model"), view.run.facts.get("input")
    document = Document(
        title=f"{model or 'a run'} on {dataset or 'its input'}",
        subtitle=f"{path}, read {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        sections=sections,
    )
    return Report(html=document.render(), facts=facts)
