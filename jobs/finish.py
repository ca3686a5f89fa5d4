"""`gptbatch finish`: marks an output complete whose parts are all written."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from gptbatch.jobs.arguments import OutputArgument
from gptbatch.jobs.messages import echo
from gptbatch.jobs.options import Command
from gptbatch.pipeline.output.finish_folder import finish_folder
from gptbatch.pipeline.storage.location import Location


@click.command(cls=Command)
@click.argument("output", type=OutputArgument())
def finish(output: Location) -> None:
    """Write the final manifest and _SUCCESS of the output folder OUTPUT.

    Each run does so at its end, when no part is missing. This command is for the case that none
    came to its end. It needs neither the input nor the model. The last line is a JSON object.

    Exits with 75 if parts are missing.
    """
    echo(json.dumps(asdict(finish_folder(output))))
