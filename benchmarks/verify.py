"""Compare the time of `gptbatch verify --all` with that of generating the rows.

    python benchmarks/verify.py [--rows 1000] [--repeats 3]

Runs both commands in turn on the demo model. Compares `generate_s` and `verify_s` of their last
lines, which exclude the start of Python and loading. The last line is a JSON object; quote medians
and ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gptbatch.pipeline.system.bundled import locate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    prompts = [
        json.loads(line)["prompt"]
        for line in Path(locate("bundled:demo/prompts.jsonl"))
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    generate_s: list[float] = []
    verify_s: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        rows = (
            json.dumps({"id": f"r{i}", "prompt": prompts[i % len(prompts)]}) + "\n"
            for i in range(args.rows)
        )
        (Path(folder) / "prompts.jsonl").write_text("".join(rows), encoding="utf-8")
        for repeat in range(args.repeats):
            output = f"out-{repeat}"
            ran = last_line(
                folder,
                "generate",
                "--config",
                "demo",
                "--input",
                "prompts.jsonl",
                "--output",
                output,
            )
            checked = last_line(folder, "verify", output, "--all")
            assert checked["rows_checked"] == args.rows
            assert checked["mismatches"] == 0
            generate_s.append(ran["generate_s"])
            verify_s.append(checked["verify_s"])
            print(
                f"repeat {repeat}: generated in {generate_s[-1]:.1f} s, "
                f"verified in {verify_s[-1]:.1f} s",
                flush=True,
            )
    report = {
        "rows": args.rows,
        "generate_s": statistics.median(generate_s),
        "verify_s": statistics.median(verify_s),
        "ratio": round(
            statistics.median(a / b for a, b in zip(generate_s, verify_s, strict=True)), 2
        ),
    }
    print(json.dumps(report))


def last_line(folder: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "gptbatch", *arguments],
        cwd=folder,
        check=True,
        stdout=subprocess.PIPE,
    )
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


if __name__ == "__main__":
    main()
