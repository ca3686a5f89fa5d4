"""Compare `gptbatch plan` with the run that it predicts, for runs of different kinds.

    python benchmarks/plan.py [--pairs uniform ragged ...] [--seconds 10] [--layers 4]

Uses gpt2's shape with fewer layers and random weights, and the model of the demo, which stops by
itself. Each pair is a plan, the whole run, and the plan again, in processes of their own: the speed
of a shared machine drifts, and the mean of the two plans stands for the time between. Prints a
markdown table: seconds, new tokens, peak memory and bytes of the parts. Ratios are predicted
divided by actual.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptbatch.pipeline.bench.machine import describe_machine
from gptbatch.pipeline.bench.random_model import write_random_checkpoint
from gptbatch.pipeline.bench.shapes import SHAPES

# Of the demo's tokenizer, one token each.
WORDS = (" the", " and", " you", " my", " to", " of", " that", " not")
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Pair:
    """A run: its rows, its model and its options."""

    rows: Callable[[random.Random], list[dict[str, Any]]]
    options: tuple[str, ...] = ()
    model: str = ""


def text(rng: random.Random, tokens: int) -> str:
    return "".join(rng.choice(WORDS) for _ in range(tokens))


def uniform(count: int, prompt: int = 32, **settings: Any) -> Any:
    def rows(rng: random.Random) -> list[dict[str, Any]]:
        return [{"prompt": text(rng, prompt), **settings} for _ in range(count)]

    return rows


def ragged(count: int, *, is_sorted: bool = False) -> Any:
    def rows(rng: random.Random) -> list[dict[str, Any]]:
        def length(sigma: float, low: int, high: int) -> int:
            return max(low, min(high, round(64 * rng.lognormvariate(0, sigma))))

        made = [
            {"prompt": text(rng, length(0.9, 4, 640)), "max_new_tokens": length(0.8, 8, 256)}
            for _ in range(count)
        ]
        return sorted(made, key=lambda row: len(row["prompt"])) if is_sorted else made

    return rows


def shared_prefixes(count: int) -> Any:
    def rows(rng: random.Random) -> list[dict[str, Any]]:
        prefix = text(rng, 384)
        return [{"prompt": prefix + text(rng, rng.randint(16, 48))} for _ in range(count)]

    return rows


def plays(count: int) -> Any:
    def rows(rng: random.Random) -> list[dict[str, Any]]:
        names = ("KING", "QUEEN", "ROMEO", "JULIET", "HAMLET", "DUKE", "NURSE", "CLOWN")
        return [
            {"prompt": f"{rng.choice(names)}:\n{rng.choice(names).title()}"} for _ in range(count)
        ]

    return rows


TOP_K = ("--temperature", "0.8", "--top-k", "40")
PAIRS = {
    "uniform": Pair(uniform(300), (*TOP_K, "--max-new-tokens", "128")),
    "ragged": Pair(ragged(400), TOP_K),
    "ragged, sorted by length": Pair(ragged(400, is_sorted=True), TOP_K),
    "shared prefixes": Pair(shared_prefixes(500), (*TOP_K, "--max-new-tokens", "48")),
    "8 samples per prompt": Pair(uniform(40, 200), (*TOP_K, "--max-new-tokens", "96", "--n", "8")),
    "int8 cache, long contexts": Pair(
        uniform(96, 600), (*TOP_K, "--max-new-tokens", "128", "--cache-dtype", "int8")
    ),
    "bfloat16, top_p 0.9": Pair(
        uniform(300), ("--dtype", "bfloat16", "--top-p", "0.9", "--max-new-tokens", "96")
    ),
    "greedy, batch size 8": Pair(
        uniform(128), ("--temperature", "0", "--batch-size", "8", "--max-new-tokens", "128")
    ),
    "one thread, presence penalty": Pair(
        uniform(100), (*TOP_K, "--threads", "1", "--presence-penalty", "0.5")
    ),
    "stops by itself (demo)": Pair(
        plays(8000),
        ("--temperature", "0.8", "--max-new-tokens", "200", "--stop", "\n\n"),
        "bundled:demo/model",
    ),
}


def run(arguments: list[str], folder: Path) -> tuple[dict[str, Any], float]:
    """Return the JSON object of a command, and its peak memory in MiB."""
    with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-m", "gptbatch", *arguments],
            cwd=folder,
            stdout=stdout,
            stderr=stderr,
        )
        # The maximum that the system reports at the end counts this process before exec, too.
        status, peak_kib = Path(f"/proc/{child.pid}/status"), 0
        while child.poll() is None:
            if found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii")):
                peak_kib = int(found[1])
            time.sleep(0.2)
    if child.returncode:
        raise SystemExit((folder / "stderr").read_text(encoding="utf-8"))
    printed = (folder / "stdout").read_text(encoding="utf-8")
    return json.loads(printed.splitlines()[-1]), peak_kib / 1024


def measure(name: str, pair: Pair, model: Path, seconds: float, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    rows = pair.rows(random.Random(name))
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", pair.model or str(model), "--input", "in.jsonl", "--output", "out"]
    options += pair.options
    if not pair.model:
        options.append("--ignore-eos")
    plan = ["plan", *options, "--json", "--seconds", str(seconds)]
    before, _ = run(plan, folder)
    done, peak_mib = run(["generate", *options], folder)
    (folder / "out").rename(folder / "done")
    after, _ = run(plan, folder)
    plans = [before, after]
    return {
        "pair": name,
        "predicted_s": [planned["time"]["expected_s"] for planned in plans],
        "low_s": [planned["time"]["low_s"] for planned in plans],
        "high_s": [planned["time"]["high_s"] for planned in plans],
        "actual_s": done["wall_s"],
        "predicted_tokens": before["new_tokens"],
        "actual_tokens": done["completion_tokens"],
        "predicted_mib": before["memory"]["expected_bytes"] / MIB,
        "limit_mib": before["memory"]["limit_bytes"] / MIB,
        "actual_mib": peak_mib,
        "predicted_disk": before["disk_bytes"],
        "actual_disk": sum(file.stat().st_size for file in folder.glob("done/*.parquet")),
        "r_squared": before["pilot"]["r_squared"],
        "step_cost": before["pilot"]["step_cost"],
    }


def table_row(found: dict[str, Any]) -> str:
    first, second = found["predicted_s"]
    return (
        f"| {found['pair']} | {first:.1f}, {second:.1f} | {found['actual_s']:.1f} | "
        f"{(first + second) / 2 / found['actual_s']:.2f} | "
        f"{found['predicted_tokens'] / found['actual_tokens']:.2f} | "
        f"{found['predicted_mib']:.0f} to {found['limit_mib']:.0f} | {found['actual_mib']:.0f} | "
        f"{found['predicted_disk'] / found['actual_disk']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    _, n_head, n_embd = SHAPES["gpt2"]
    found = []
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        write_random_checkpoint(model, n_layer=arguments.layers, n_head=n_head, n_embd=n_embd)
        for number, pair in enumerate(arguments.pairs):
            folder = Path(name) / str(number)
            found.append(measure(pair, PAIRS[pair], model, arguments.seconds, folder))
            print(json.dumps(found[-1]), flush=True)
    print("| run | predicted s | actual s | time | tokens | predicted MiB | actual | disk |")
    print("|---|---|---|---|---|---|---|---|")
    for row in found:
        print(table_row(row))
    print(json.dumps(describe_machine(torch.device("cpu"))))


if __name__ == "__main__":
    main()
