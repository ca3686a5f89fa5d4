"""The command `gptbatch`: its group of commands, logging, and how errors become messages and exit codes."""

from __future__ import annotations

import logging
import os
import sys

import click

from jobs.check_model import check_model
from jobs.diff import diff
from jobs.generate import generate
from jobs.replay import replay
from jobs.train_demo import train_demo
from jobs.verify import verify
from pipeline.errors import GptbatchError, StorageError

STOPPED_BY_SIGNAL = 75
BUG = 70

logger = logging.getLogger("gptbatch")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="gptbatch", prog_name="gptbatch")
@click.option("-v", "--verbose", is_flag=True, help="Log more to standard error.")
def cli(verbose: bool) -> None:
    """Reproducible batch text generation with GPT-2: prompts in, seeded completions out, as Parquet.

    \b
    Exit codes: 0 done, error rows included; 1 verify or diff found a difference; 2 a bad option; 65 bad input rows;
    66 no such input or output; 70 a bug; 73 output cannot be created; 74 I/O error; 75 stopped by Ctrl-C; 78 bad
    config, model or machine, or an output folder that holds something else.
    """
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(name)s %(levelname)s: %(message)s"
    )
    # it takes so long, and is so rare, that it must not look as if nothing happened
    logging.getLogger("gptbatch.kernels").setLevel(logging.INFO)


cli.add_command(generate)
cli.add_command(verify)
cli.add_command(replay)
cli.add_command(check_model)
cli.add_command(diff)
cli.add_command(train_demo)


def main() -> None:
    """The console script: run the command and exit with a documented code."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run `gptbatch ARGUMENTS...` and return its exit code; messages go to standard error."""
    try:
        code = cli.main(args=arguments, prog_name="gptbatch", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("gptbatch: stopped; run the same command again", err=True)
        return STOPPED_BY_SIGNAL
    except GptbatchError as error:
        click.echo(f"gptbatch: {error}", err=True)
        return error.exit_code
    except SystemExit:  # how click ends when whoever read our standard output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed at exit
        return StorageError.exit_code
    except OSError as error:
        click.echo(f"gptbatch: {error.filename or 'I/O'}: {error.strerror or error}", err=True)
        return StorageError.exit_code
    except Exception:
        logger.exception("this is a bug in gptbatch; please report it with the lines below")
        return BUG
