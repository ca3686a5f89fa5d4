"""`gptbatch status`: prints the state of an output folder."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import asdict

import click

from gptbatch.jobs.arguments import OutputArgument
from gptbatch.jobs.messages import echo
from gptbatch.jobs.options import Command
from gptbatch.jobs.signals import Signals
from gptbatch.pipeline.output.folder import OutputFolder
from gptbatch.pipeline.output.runs import processes_here
from gptbatch.pipeline.output.status import OutputStatus, output_status
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.system.machine import CpuUse, cores, describe_cores

MAX_NAMED = 10
WATCH_INTERVAL_S = 2.0
# The use of the cores is measured for this long.
CORES_S = 0.3
# How a run without a process has ended, by its last state.
_ENDED = {"stopped": "stopped", "loading": "killed", "running": "killed"}
_BATCH_INVARIANCE = {
    "portable": "portable: bits depend on neither the batch nor the machine",
    "verified": "verified: bits do not depend on the batch",
    "unverified": "unverified: bits may depend on the batch",
    "off": "off: not tested",
}


@click.command(cls=Command)
@click.argument("output", type=OutputArgument())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
@click.option(
    "--watch",
    is_flag=True,
    help="Print the state again every two seconds, until no run is going on. Ctrl-C ends it.",
)
@click.pass_context
def status(context: click.Context, /, output: Location, as_json: bool, watch: bool) -> None:
    """Show the state of the output folder OUTPUT: rows, parts and errors.

    Lists missing and damaged parts, and errors by kind. For a running job it adds the speed and
    the remaining time. Only the footers of the files are read; `gptbatch verify` checks the rows.
    With --watch, a terminal shows the latest state; a file or pipe gets each one that differs.
    """
    if not watch:
        found = output_status(output)
        echo(_json(found) if as_json else "\n".join(_lines(found, output)))
        return
    try:
        _watch(output, as_json)
    except KeyboardInterrupt:
        signals = context.find_object(Signals)
        if signals is None or signals.requested() != "SIGINT":
            raise


def _watch(output: Location, as_json: bool) -> None:
    """Print each state that differs from the one before, until no run is going on."""
    shown, lines = None, list[str]()
    while True:
        found = output_status(output)
        if found != shown:
            if shown is not None and not as_json:
                _erase(lines)
            shown, lines = found, [_json(found)] if as_json else _lines(found, output)
            echo("\n".join(lines))
        if found.state != "running":
            return
        time.sleep(WATCH_INTERVAL_S)


def _erase(lines: list[str]) -> None:
    """Erase the last lines of a terminal; other outputs keep them, and get an empty line."""
    if not sys.stdout.isatty():
        click.echo()
        return
    width = shutil.get_terminal_size().columns
    rows = sum(-(-max(1, len(line)) // width) for line in lines)
    click.echo(f"\x1b[{rows}F\x1b[J", nl=False)


def _json(found: OutputStatus) -> str:
    return json.dumps(asdict(found))


def _lines(found: OutputStatus, output: Location) -> list[str]:
    damaged = _first(found.parts_damaged, len(found.parts_damaged))
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.errors.items())
    lines = [
        f"{found.output}: {found.state}" + (f", {found.runs} runs" if found.runs > 1 else ""),
        f"rows     {found.rows_done} of {found.rows_total}"
        + (f", {found.rows_missing} left" if found.rows_missing else "")
        + (
            f", of which {found.rows_waiting} are finished and wait for their part"
            if found.rows_waiting
            else ""
        ),
        f"parts    {found.parts_done} of {found.parts_total}"
        + _parts_left(found)
        + (
            f", damaged {damaged}: generated again by a run of the same shard, or without --shard"
            if found.parts_damaged
            else ""
        ),
        f"errors   {sum(found.errors.values())}" + (f" ({kinds})" if kinds else ""),
        f"tokens   {found.prompt_tokens} of prompts, {found.completion_tokens} of completions",
    ]
    if (level := found.batch_invariance) is not None:
        lines.append(f"batch invariance  {_BATCH_INVARIANCE.get(level, level)}")
    lines += [f"problem  {problem}" for problem in found.problems]
    if found.state == "unfinished" and found.last_state in _ENDED:
        lines.append(f"next     the run was {_ENDED[found.last_state]}; run the same command again")
    if found.state == "indexed":
        lines.append("next     `gptbatch generate` with the same settings begins the run")
    if found.tokens_per_s is not None:
        left = "" if found.remaining_s is None else f", about {found.remaining_s:.0f} s left"
        lines.append(f"speed    {found.tokens_per_s:.0f} tokens/s{left} (at {found.updated_at})")
    elif found.state == "running":
        lines.append("speed    not known yet: the run checks its input, or loads the model")
    if found.state == "running" and (shared := _shared_cores(output)):
        lines.append(f"cores    shared: {shared}")
    return lines


def _shared_cores(output: Location) -> str:
    """Measure what other programs take from the runs on this machine; "" without such runs."""
    runs = processes_here(OutputFolder(output).work)
    if not runs:
        return ""
    use = CpuUse(runs)
    time.sleep(CORES_S)
    return describe_cores(sum(threads or cores().threads for threads in runs.values()), use)


def _parts_left(found: OutputStatus) -> str:
    """Return the number of parts that are not written, and which are between written ones."""
    count = found.n_parts_missing
    if not count or not found.parts_done or found.state == "running":
        return f", {count} left" if count else ""
    return f", {count} left (part{'s' * (count > 1)} {_first(found.parts_missing, count)})"


def _first(numbers: list[int], count: int) -> str:
    shown = ", ".join(map(str, numbers[:MAX_NAMED]))
    return shown if count <= MAX_NAMED else f"{shown} and {count - MAX_NAMED} more"
