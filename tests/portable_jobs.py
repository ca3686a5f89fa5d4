"""Run the jobs of a folder: every FOLDER/*.yaml, with its output in OUTPUT/NAME.

    python -m tests.portable_jobs FOLDER OUTPUT [--threads N] [--untested PREFIX]

Jobs whose name begins with PREFIX skip the self-test.

tests/test_portable_jobs.py runs it in child processes, with other instruction sets and compilers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gptbatch.pipeline import load_config, run_job


def main() -> None:
    """Run the jobs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--untested")
    args = parser.parse_args()
    for path in sorted(args.folder.glob("*.yaml")):
        options: dict[str, Any] = {
            "output": str(args.output / path.stem),
            "engine.threads": args.threads,
        }
        if args.untested is not None and path.stem.startswith(args.untested):
            options["batch_invariance"] = "off"
        run_job(load_config(str(path), options=options))


if __name__ == "__main__":
    main()
