"""The command `gptbatch`: its group of commands, logging, and how errors become messages and exit codes."""

from __future__ import annotations

import gc
import logging
import os
import sys
from contextlib import suppress

import click

from jobs.bench import bench
from jobs.check_model import check_model
from jobs.diff import diff
from jobs.generate import generate
from jobs.replay import replay
from jobs.status import status
from jobs.train_demo import train_demo
from jobs.verify import verify
from pipeline.errors import GptbatchError, StoppedError, StorageError
from pipeline.redact import redact

BUG = 70
GARBAGE_THRESHOLD = 100_000  # new objects before the collector looks; Python's own is 700 to 2,000

logger = logging.getLogger("gptbatch")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="gptbatch", prog_name="gptbatch")
@click.option("-v", "--verbose", is_flag=True, help="Log more to standard error.")
def cli(verbose: bool) -> None:
    """Reproducible batch text generation with GPT-2: prompts in, seeded completions out, as Parquet.

    \b
    Exit codes: 0 done, error rows included; 1 verify or diff found a difference; 2 a bad option; 65 bad input rows;
    66 no such input or output; 69 another run holds the output; 70 a bug; 73 output cannot be created; 74 I/O error;
    75 stopped by a signal, or out of memory: run it again; 78 bad config, model or machine, or an output folder that
    holds something else.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_WithoutSecrets("%(asctime)s %(name)s %(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO if verbose else logging.WARNING)
    # it takes so long, and is so rare, that it must not look as if nothing happened
    logging.getLogger("gptbatch.kernels").setLevel(logging.INFO)


cli.add_command(generate)
cli.add_command(status)
cli.add_command(verify)
cli.add_command(replay)
cli.add_command(bench)
cli.add_command(check_model)
cli.add_command(diff)
cli.add_command(train_demo)


def main() -> None:
    """The console script: run the command and exit with a documented code."""
    # torch and what comes with it are many objects that stay: to look through them for garbage again and again while they are
    # loaded, and a last time at the end, is a good part of a short run
    gc.set_threshold(GARBAGE_THRESHOLD)
    code = run_command(sys.argv[1:])
    gc.disable()
    sys.exit(code)


def run_command(arguments: list[str]) -> int:
    """Run `gptbatch ARGUMENTS...` and return its exit code; messages go to standard error."""
    try:
        code = cli.main(args=arguments, prog_name="gptbatch", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("stopped; run the same command again")
        return StoppedError.exit_code
    except GptbatchError as error:
        _say(str(error))
        return error.exit_code
    except SystemExit:  # how click ends when whoever read our standard output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed at exit
        return StorageError.exit_code
    except OSError as error:
        _say(f"{error.filename or 'I/O'}: {error.strerror or error}")
        return StorageError.exit_code
    except Exception:
        logger.exception("this is a bug in gptbatch; please report it with the lines below")
        return BUG


class _WithoutSecrets(logging.Formatter):
    """Of whole messages, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _say(message: str) -> None:
    with suppress(OSError):  # nobody may be left to read it
        click.echo(f"gptbatch: {redact(message)}", err=True)
