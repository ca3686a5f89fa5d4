"""`gptbatch status`: what an output holds and what is missing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from gptbatch.jobs.messages import echo
from gptbatch.jobs.options import Command, PathArgument
from gptbatch.pipeline.output.status import OutputStatus, output_status
from gptbatch.pipeline.system.machine import cores, describe_cores

MAX_NAMED = 10


@click.command(cls=Command)
@click.argument("output", type=PathArgument())
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead.")
def status(output: Path, as_json: bool) -> None:
    """Say what the output folder OUTPUT holds: rows and parts that are there, missing or damaged, errors by kind, and, of a run
    that is going on, its speed and the time left. Reads footers only; `gptbatch verify` looks at the rows.
    """
    found = output_status(output)
    if as_json:
        echo(json.dumps(asdict(found)))
        return
    lines = _lines(found)
    if found.state == "running" and (shared := describe_cores(cores().threads)):
        lines.append(f"cores    not the run's own, if it runs on this machine: {shared}")
    echo("\n".join(lines))


def _lines(found: OutputStatus) -> list[str]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.errors.items())
    lines = [
        f"{found.output}: {found.state}",
        f"rows     {found.rows_done} of {found.rows_total}"
        + (f", {found.rows_missing} missing" if found.rows_missing else ""),
        f"parts    {found.parts_done} of {found.parts_total}"
        + (
            f", missing {_some(found.parts_missing, found.n_parts_missing)}"
            if found.parts_missing
            else ""
        )
        + (
            f", damaged {_some(found.parts_damaged, len(found.parts_damaged))}: the next run does them again"
            if found.parts_damaged
            else ""
        ),
        f"errors   {sum(found.errors.values())}" + (f" ({kinds})" if kinds else ""),
        f"tokens   {found.prompt_tokens} of prompts, {found.completion_tokens} of completions",
    ]
    lines += [f"problem  {problem}" for problem in found.problems]
    if found.tokens_per_s is not None:
        left = "" if found.remaining_s is None else f", about {found.remaining_s:.0f} s left"
        lines.append(f"speed    {found.tokens_per_s:.0f} tokens/s{left} (at {found.updated_at})")
    return lines


def _some(numbers: list[int], count: int) -> str:
    shown = ", ".join(map(str, numbers[:MAX_NAMED]))
    return shown if count <= MAX_NAMED else f"{shown} and {count - MAX_NAMED} more"
