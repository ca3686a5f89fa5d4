"""`gptbatch plan`: checks the rows of an input once, before the runs of many shards."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from gptbatch.jobs.generate import command_config, config_file_option
from gptbatch.jobs.messages import echo
from gptbatch.jobs.options import GroupedCommand, config_options
from gptbatch.pipeline.cluster.plan import plan_job

EXAMPLES = """\
gptbatch plan --config gpt2-cpu --input 'data/*.jsonl.gz' --output out/mine
gptbatch plan --config gpt2-cpu --input 'data/*.jsonl.gz' --output out/mine --shard auto
sbatch --array=0-15 slurm.sbatch --shard auto --config gpt2-cpu --input 'data/*.jsonl.gz' \\
    --output out/mine"""


class _Plan(GroupedCommand):
    example = EXAMPLES


@click.command(cls=_Plan)
@config_file_option
@config_options
@click.pass_context
def plan(context: click.Context, /, config_file: str | None, **settings: Any) -> None:
    """Check every row of an input, and write its index into the output folder.

    `generate` with the same settings then begins without reading the input, and a shard begins at
    its own rows. Without a plan, each shard checks all rows itself. Neither the model nor its
    tokenizer is loaded. The last line on standard output is a JSON object.

    With --shard, the check is divided among processes or machines that share the output folder.
    The last one to finish writes the index; the others print "complete": false.
    """
    config = command_config(context, config_file, settings, {})
    echo(json.dumps(asdict(plan_job(config))))
