"""`gptbatch plan`: predicts the time, memory and disk of a run; or checks the rows for many shards.

Heavy libraries are imported where they are used: with --index, no torch is needed.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from gptbatch.jobs.generate import command_config, config_file_option
from gptbatch.jobs.limits import check_limits
from gptbatch.jobs.messages import echo, print_message
from gptbatch.jobs.options import GroupedCommand, config_options
from gptbatch.pipeline.cluster.plan import plan_job
from gptbatch.pipeline.system.nouns import noun

if TYPE_CHECKING:
    from gptbatch.pipeline.estimate.estimate import RunEstimate
    from gptbatch.pipeline.estimate.resources import MemoryEstimate

EXAMPLES = """\
gptbatch plan --config gpt2-cpu --input prompts.jsonl
gptbatch plan --config gpt2-cpu --input prompts.jsonl --output out/mine --price-per-hour 0.19
gptbatch plan --index --config gpt2-cpu --input 'data/*.jsonl.gz' --output out/mine"""

ESTIMATE_OPTIONS = ("seconds", "price_per_hour", "as_json")


class _Plan(GroupedCommand):
    example = EXAMPLES
    lists_settings = False


@click.command(cls=_Plan)
@config_file_option
@config_options
@click.option(
    "--seconds",
    type=click.FloatRange(1, 3600),
    default=20.0,
    show_default=True,
    metavar="S",
    help="Seconds of the pilot; up to three times as many with long prompts.",
)
@click.option(
    "--price-per-hour",
    type=click.FloatRange(0),
    metavar="P",
    help="Price of an hour of this machine, for the price of the run.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
@click.option(
    "--index",
    is_flag=True,
    help="Predict nothing. Check every row, and write the index of the input into the output "
    "folder, for the runs of many shards.",
)
@click.pass_context
def plan(
    context: click.Context,
    /,
    config_file: str | None,
    seconds: float,
    price_per_hour: float | None,
    as_json: bool,
    index: bool,
    **settings: Any,
) -> None:
    """Predict how long a run will take on this machine, and its memory and disk.

    Takes all settings of `generate` as options: see `gptbatch generate --help`.

    Counts rows and tokens exactly, and runs rows for --seconds. Writes nothing. With --output, it
    checks that folder and its disk, and plans the rest of a run that is partly done there; with
    --shard, the parts of that shard.

    With --index, it writes the index of the input instead: `generate` with the same settings then
    begins without reading the input, and a shard begins at its own rows. Neither the model nor its
    tokenizer is loaded. With --shard, the check is divided among processes or machines that share
    the output folder. The last one to finish writes the index; the others print
    "complete": false.
    """
    if index:
        config = command_config(context, config_file, settings, {})
        for name in ESTIMATE_OPTIONS:
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                option = "--json" if name == "as_json" else "--" + name.replace("_", "-")
                raise click.UsageError(f"{option} and --index cannot be given together")
        echo(json.dumps(asdict(plan_job(config))))
        return
    check_limits(computes=True)
    from gptbatch.pipeline.estimate.estimate import NO_OUTPUT, estimate_job

    config = command_config(context, config_file, settings, {}, {"output": NO_OUTPUT})
    estimate = estimate_job(
        config, seconds=seconds, price_per_hour=price_per_hour, report=print_message
    )
    echo(json.dumps(asdict(estimate)) if as_json else "\n".join(_lines(estimate)))


def _lines(estimate: RunEstimate) -> list[str]:
    done = estimate.rows_total - estimate.rows
    rows = f"{estimate.rows:,}" + (
        f" left of {estimate.rows_total:,}; {done:,} are written" if done else ""
    )
    prefix = "" if estimate.output is None else f"{estimate.output}: "
    lines = [f"{prefix}a prediction; nothing is written", f"rows     {rows}"]
    if estimate.time is None:
        reason = "all rows left become error rows" if estimate.rows else "nothing is left to do"
        return [*lines, f"time     {reason}", *(f"warning  {w}" for w in estimate.warnings)]
    samples = f" of {estimate.samples:,} samples" if estimate.samples != estimate.rows else ""
    took, pilot = estimate.time, estimate.pilot
    assert pilot is not None
    assert estimate.memory is not None
    assert estimate.disk_bytes is not None
    assert estimate.kill_rows is not None
    assert estimate.kill_s is not None
    at_most = f"; at most {_time(took.limit_s)}, if every row reaches its max_new_tokens"
    limit = at_most if took.limit_s > 1.01 * took.expected_s else ""
    low, high = _time(took.low_s), _time(took.high_s)
    between = f" ({low} to {high})" if low != high else ""
    fit = "" if pilot.r_squared is None else f", R2 {pilot.r_squared:z.2f}"
    lines += [
        f"tokens   {estimate.prompt_tokens:,} of prompts{samples} (median "
        f"{estimate.prompt_tokens_median} per row, at most {estimate.prompt_tokens_max}), about "
        f"{estimate.new_tokens:,} new ones (at most {estimate.new_tokens_limit:,})",
        f"time     about {_time(took.expected_s)}{between}{limit}; {_speed(estimate)}",
    ]
    if estimate.price is not None:
        price = estimate.price
        lines.append(
            f"price    about {_money(price['expected_s'])}, {_money(price['low_s'])} to "
            f"{_money(price['high_s'])}; at most {_money(price['limit_s'])}"
        )
    return [
        *lines,
        f"memory   {_memory(estimate.memory)}",
        f"disk     about {_size(estimate.disk_bytes)} in {estimate.parts:,} "
        f"{noun(estimate.parts, 'part')} of at most {estimate.part_rows:,} "
        f"{noun(estimate.part_rows, 'row')}",
        f"a kill   costs up to about {estimate.kill_rows:,} {noun(estimate.kill_rows, 'row')} of "
        "unfinished parts, or "
        f"{_time(estimate.kill_s)}",
        f"pilot    {pilot.rows:,} {noun(pilot.rows, 'row')} in {pilot.seconds:.1f} s, of which "
        f"{pilot.rows_stopped:,} stopped by themselves; {pilot.steps:,} "
        f"{noun(pilot.steps, 'step')}{fit}",
        *(f"warning  {warning}" for warning in estimate.warnings),
    ]


def _speed(estimate: RunEstimate) -> str:
    assert estimate.time is not None
    assert estimate.batch_size is not None
    seconds = estimate.time.expected_s - estimate.time.start_s
    return (
        f"{estimate.new_tokens / seconds:,.0f} tokens/s with up to {estimate.batch_size} "
        f"{noun(estimate.batch_size, 'row')} at once"
    )


def _memory(memory: MemoryEstimate) -> str:
    return (
        f"about {_size(memory.expected_bytes)}, at most {_size(memory.limit_bytes)}: "
        f"{_size(memory.process_bytes)} process with {_size(memory.weights_bytes)} of weights, "
        f"{_range(_size(memory.cache_bytes), _size(memory.cache_limit_bytes))} KV cache "
        f"({memory.cache_bytes_per_token / 1024:.0f} KiB per token), "
        f"{_size(memory.logits_bytes)} logits, "
        f"{_range(_size(memory.rows_bytes), _size(memory.rows_limit_bytes))} finished rows"
    )


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _money(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.2g}"


def _size(n_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if n_bytes >= size / 2:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes / 2**10:.1f} KiB"
