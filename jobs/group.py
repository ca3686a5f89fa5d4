"""The group of commands. A command's module is imported when the command is called."""

from __future__ import annotations

from importlib import import_module

import click

# name -> module, and its text in `gptbatch --help`
COMMANDS = {
    "generate": ("gptbatch.jobs.generate", "Generate a completion for every prompt of an input."),
    "plan": ("gptbatch.jobs.plan", "Predict the time, memory and disk of a run."),
    "status": ("gptbatch.jobs.status", "Show the rows, parts and errors of an output folder."),
    "finish": ("gptbatch.jobs.finish", "Mark an output complete whose parts are all written."),
    "verify": ("gptbatch.jobs.verify", "Check recorded rows against the weights."),
    "export": (
        "gptbatch.jobs.export",
        "Write the rows of a run to JSON lines, Parquet or CSV.",
    ),
    "score": ("gptbatch.jobs.score", "Compute log probabilities of given continuations."),
    "replay": ("gptbatch.jobs.replay", "Generate one row of a run again and explain its tokens."),
    "diff": ("gptbatch.jobs.diff", "Compare two runs, row by row."),
    "report": ("gptbatch.jobs.report", "Write an HTML file that shows a run, or compares two."),
    "check-model": (
        "gptbatch.jobs.check_model",
        "Compare a checkpoint in gptbatch and in transformers.",
    ),
    "doctor": (
        "gptbatch.jobs.doctor",
        "Check this machine: kernels, limits, packages, batch invariance.",
    ),
    "bench": ("gptbatch.jobs.bench", "Measure new tokens per second."),
    "train-demo": ("gptbatch.jobs.train_demo", "Train the small GPT-2 of the demo."),
}
# commands that always import torch; generate imports it only if rows are missing
TORCH_COMMANDS = {"verify", "replay", "check-model", "bench", "train-demo"}


class LazyGroup(click.Group):
    """A group that imports the module of a command when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        from gptbatch.jobs.limits import check_limits

        check_limits(computes=cmd_name in TORCH_COMMANDS)
        module = import_module(COMMANDS[cmd_name][0])
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name in COMMANDS or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        from gptbatch.pipeline.config.problems import nearest_name

        raise click.UsageError(
            f"no such command: {name!r}{nearest_name(name, list(COMMANDS))}", ctx
        )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.version_option(package_name="gptbatch", prog_name="gptbatch")
@click.option("-v", "--verbose", is_flag=True, help="Log more to standard error.")
def cli(verbose: bool) -> None:
    # \b, the character, keeps click from rewrapping a paragraph; a raw string would lose it
    """Reproducible batch text generation with GPT-2, from a file of prompts to Parquet files.

    \b
    Exit codes:
       0  done (error rows do not count as a failure)
       1  verify or diff found a difference
       2  bad option
      65  bad input rows
      66  input or output not found
      69  another run holds the output
      70  bug in gptbatch
      73  output cannot be created
      74  I/O error
      75  stopped by a signal, or out of memory; the same command continues
          finish, export: rows are missing; `generate` continues
      78  bad config, model or machine, or the output folder holds another job
    """  # noqa: D301
    from gptbatch.jobs.messages import set_up_logging

    set_up_logging(verbose)
