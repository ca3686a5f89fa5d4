"""`gptbatch status`: prints the state of an output folder."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from gptbatch.jobs.messages import echo
from gptbatch.jobs.options import Command, OutputArgument
from gptbatch.pipeline.output.status import OutputStatus, output_status
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.system.machine import cores, describe_cores

MAX_NAMED = 10
# By batch invariance.
_BITS = {
    "portable": "portable: they depend on neither the batch nor the machine",
    "verified": "verified: they do not depend on the batch",
    "unverified": "unverified: they may depend on the batch",
    "off": "not tested (batch_invariance: off)",
}


@click.command(cls=Command)
@click.argument("output", type=OutputArgument())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def status(output: Location, as_json: bool) -> None:
    """Show the state of the output folder OUTPUT: rows, parts and errors.

    Lists missing and damaged parts, and errors by kind. For a running job it adds the speed and
    the remaining time. Only the footers of the files are read; `gptbatch verify` checks the rows.
    """
    found = output_status(output)
    if as_json:
        echo(json.dumps(asdict(found)))
        return
    lines = _lines(found)
    if found.state == "running" and (shared := describe_cores(cores().threads)):
        lines.append(
            f"cores    shared with other programs, if the run is on this machine: {shared}"
        )
    echo("\n".join(lines))


def _lines(found: OutputStatus) -> list[str]:
    damaged = _first(found.parts_damaged, len(found.parts_damaged))
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.errors.items())
    lines = [
        f"{found.output}: {found.state}" + (f", {found.runs} runs" if found.runs > 1 else ""),
        f"rows     {found.rows_done} of {found.rows_total}"
        + (f", {found.rows_missing} missing" if found.rows_missing else ""),
        f"parts    {found.parts_done} of {found.parts_total}"
        + (
            f", missing {_first(found.parts_missing, found.n_parts_missing)}"
            if found.parts_missing
            else ""
        )
        + (f", damaged {damaged}: recomputed by the next run" if found.parts_damaged else ""),
        f"errors   {sum(found.errors.values())}" + (f" ({kinds})" if kinds else ""),
        f"tokens   {found.prompt_tokens} of prompts, {found.completion_tokens} of completions",
    ]
    if found.batch_invariance is not None:
        lines.append(f"bits     {_BITS.get(found.batch_invariance, found.batch_invariance)}")
    lines += [f"problem  {problem}" for problem in found.problems]
    if found.tokens_per_s is not None:
        left = "" if found.remaining_s is None else f", about {found.remaining_s:.0f} s left"
        lines.append(f"speed    {found.tokens_per_s:.0f} tokens/s{left} (at {found.updated_at})")
    return lines


def _first(numbers: list[int], count: int) -> str:
    shown = ", ".join(map(str, numbers[:MAX_NAMED]))
    return shown if count <= MAX_NAMED else f"{shown} and {count - MAX_NAMED} more"
