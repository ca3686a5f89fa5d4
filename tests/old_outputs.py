"""Small outputs of each format that a version has written, kept in tests/data/outputs.

    python -m tests.old_outputs FOLDER

adds that of this version. It runs in FOLDER, an empty folder, whose name the output keeps; the name
of the machine it does not.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

from tests.paths import REPOSITORY

OUTPUTS = REPOSITORY / "tests" / "data" / "outputs"
MODEL = OUTPUTS / "model"
PROMPTS = OUTPUTS / "prompts.jsonl"


def write_output(folder: Path) -> Path:
    from gptbatch.pipeline import JobConfig, run_job
    from gptbatch.pipeline.config import EngineConfig
    from gptbatch.pipeline.output.schema import FORMAT

    shutil.copytree(MODEL, folder / MODEL.name, dirs_exist_ok=True)
    shutil.copy(PROMPTS, folder)
    os.chdir(folder)
    engine = EngineConfig(threads=1, attention="padded")
    run_job(
        JobConfig(
            model=MODEL.name,
            input=PROMPTS.name,
            output=FORMAT,
            part_rows=3,
            max_new_tokens=6,
            record_logits_digest=True,
            engine=engine,
        )
    )
    return folder / FORMAT


if __name__ == "__main__":
    socket.gethostname = lambda: "host"
    made = write_output(Path(sys.argv[1]))
    shutil.copytree(made, OUTPUTS / made.name)
