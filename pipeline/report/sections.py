"""The sections of what ran, of ends and errors, and of rows."""

from __future__ import annotations

import numpy as np

from gptbatch.pipeline.report import series, svg
from gptbatch.pipeline.report.document import Section, moment, render, template_text
from gptbatch.pipeline.report.part_facts import describe_facts, value_text
from gptbatch.pipeline.report.row_sample import browsed_rows
from gptbatch.pipeline.report.run_view import RunView


def summary_section(view: RunView) -> Section:
    """Return the section of what ran, how it ended, and its totals."""
    status = view.status
    facts = describe_facts(view.run)
    names = {
        "model": "model",
        "input": "input",
        "dtype": "dtype",
        "device": "device",
        "environment.device_class": "device class",
        "batch_invariance": "batch invariance",
        "host": "host",
    }
    ran = {shown: facts[name] for name, shown in names.items() if name in facts}
    axis = view.axis
    if axis is not None:
        ran["first step"] = moment(axis.began_s)
        ran["last new token"] = moment(axis.ended_s)
    html = render(
        "summary.html",
        status=status,
        ended=view.ended,
        tiles=_tiles(view),
        ran=ran,
        n_environments=len(view.run.environments),
        changed={key: value_text(value) for key, value in view.changed_settings.items()},
        config={key: value_text(value) for key, value in view.config.items()},
        environment=_group(facts, "environment"),
        versions=_group(facts, "versions"),
        digests={
            "config hash": status.config_hash,
            "content digest": view.run.content_digest if view.run.parts else "",
            **{
                name.replace("_", " "): value
                for name, value in view.run.manifest["identity"].items()
                if name.endswith("_digest") and value
            },
        },
        gaps=[] if axis is None else axis.gaps,
        duration=svg.duration,
        moment=moment,
    )
    return Section(id="run", title="Run", html=html)


def _tiles(view: RunView) -> list[tuple[str, str, str]]:
    """Return (value, label, note) of the figures at the top."""
    status, totals = view.status, view.totals
    samples = f"{totals.rows:,} samples" if totals.rows != status.rows_done else ""
    left = f"{status.rows_missing:,} not done" if status.rows_missing else samples
    tiles = [(f"{status.rows_done:,}", f"of {status.rows_total:,} rows", left)]
    errors = sum(status.errors.values())
    share = f"{errors / status.rows_done:.2%} of rows" if status.rows_done and errors else ""
    tiles.append((f"{errors:,}", "error rows", share))
    tiles.append((f"{totals.new_tokens:,}", "new tokens", f"{totals.prompt_tokens:,} of prompts"))
    if totals.tokens_per_s is not None and totals.active_s and totals.wall_s:
        tiles.append((f"{totals.tokens_per_s:,.0f}", "new tokens/s", "while rows ran"))
        gap_s = totals.wall_s - totals.active_s
        note = f"{svg.duration(gap_s)} in gaps" if gap_s > series.MIN_GAP_S else ""
        tiles.append((svg.duration(totals.active_s), "of work", note))
    if totals.cached_share is not None:
        tiles.append((f"{totals.cached_share:.1%}", "prefix reuse", "of prompt tokens"))
    return tiles


def ends_section(view: RunView) -> Section:
    """Return the section of finish reasons, and of errors by kind."""
    columns = view.columns
    counts = np.bincount(columns.ends, minlength=len(columns.end_names))
    total = max(len(columns), 1)
    order = np.argsort(-counts, kind="stable")
    styles = ("c1", "c5", "c3", "c2", "c6", "c4")
    ends = []
    for rank, index in enumerate(order):
        name = columns.end_names[index] if columns.end_names else ""
        style = "c4 hatched" if name == "error" else styles[rank % len(styles)]
        ends.append((name, int(counts[index]), counts[index] / total, style))
    ends = [end for end in ends if end[1]]
    bar = svg.share_bar(
        [
            (f"{name}: {count:,} {view.unit}, {share:.1%}", share, style)
            for name, count, share, style in ends
        ],
        "Finish reasons",
    )
    html = render(
        "ends.html",
        unit=view.unit,
        ends=ends,
        bar=bar,
        kinds=view.status.errors,
        groups=columns.errors,
        has_error_file=view.has_error_file,
    )
    return Section(id="ends", title="Ends and errors", html=html)


def rows_section(view: RunView, *, with_text: bool, max_bytes: int) -> Section:
    """Return the section with the browser of rows, which take at most a number of bytes as JSON."""
    rows, characters = browsed_rows(
        view.run, view.columns, with_text=with_text, max_bytes=max_bytes
    )
    html = render(
        "rows.html",
        shown=len(rows),
        total=len(view.columns),
        unit=view.unit,
        with_text=with_text,
    )
    data = {
        "rows": rows,
        "unit": view.unit,
        "cut": characters,
        "output": str(view.run.path),
        "with_text": with_text,
    }
    return Section(id="rows", title="Rows", html=html, data=data, script=template_text("rows.js"))


def _group(facts: dict[str, str], group: str) -> dict[str, str]:
    """Return the facts of a group, without its name."""
    prefix = f"{group}."
    return {
        name.removeprefix(prefix): value for name, value in facts.items() if name.startswith(prefix)
    }
