"""Sections `command` and `host`: what a user meets, and what the host costs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.cuda.common import (
    INNER,
    IS_FAKE,
    LAYERS,
    POSITIONS,
    VOCAB,
    C,
    H,
    report,
)
from benchmarks.cuda_check import last_object
from benchmarks.cuda_host import measure
from gptbatch.pipeline.bench.random_model import write_random_checkpoint

NEW_TOKENS = 8 if IS_FAKE else 128
# Config and rows of the run that is sampled again.
VERIFIED = ("gpt2-cuda", 10 if IS_FAKE else 400)
# Of each run, the fastest first.
RUNS = (
    ("gpt2-cuda-fast", 40 if IS_FAKE else 20_000),
    VERIFIED,
    ("gpt2-cuda", 20 if IS_FAKE else 8_000),
)
# The most seconds of a command.
LIMIT = 600 if IS_FAKE else 70
PROMPT = " the" * 32


def command() -> None:
    """Run `generate` on many rows; at last sample a small float32 run again on the CPU."""
    found: dict[str, Any] = {"problems": []}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shape = {"n_embd": C, "n_layer": LAYERS, "n_head": H, "n_inner": INNER}
        write_random_checkpoint(work / "model", vocab_size=VOCAB, n_positions=POSITIONS, **shape)
        for config, count in RUNS:
            rows = (json.dumps({"id": f"row-{i}", "prompt": f"{i}{PROMPT}"}) for i in range(count))
            (work / f"{count}.jsonl").write_text("".join(f"{row}\n" for row in rows))
            options = ["--config", config, "--input", f"{count}.jsonl"]
            options += ["--output", output_of(config, count)]
            options += ["--max-new-tokens", str(NEW_TOKENS), "--ignore-eos", "--model", "model"]
            options += ["--device", "cpu"] * IS_FAKE
            found[f"{config}, {count} rows"] = run(work, found, "generate", *options)
            report(found)
        note_verified(work, found)
        report(found)


def output_of(config: str, count: int) -> str:
    """Return the output folder of a run."""
    return f"out-{config}-{count}"


def note_verified(work: Path, found: dict[str, Any]) -> None:
    """Sample each token of a float32 run again on the CPU, after the recorded tokens before it.

    The CPU judges the output of a GPU by tolerance: a token that rounding explains is a near tie.
    In float32 the bits should be equal, so here it is a difference, as a mismatch is. Margins are
    not compared; section cpu-bits does that.
    """
    verdict = run(work, found, "verify", output_of(*VERIFIED), "--all", "--device", "cpu")
    checked, near_ties = verdict.get("rows_checked", 0), verdict.get("near_ties", 0)
    differing = verdict.get("mismatches", 0) + near_ties
    found["float32, sampled again on the CPU"] = {
        "rows": checked,
        "rows with another token": differing,
        "of them within rounding": near_ties,
        "verify": verdict,
    }
    if differing:
        found["problems"].append(f"the CPU samples other tokens in {differing} of {checked} rows")
    if checked != VERIFIED[1]:
        found["problems"].append(f"verify has checked {checked} of {VERIFIED[1]} rows")


def run(work: Path, found: dict[str, Any], *arguments: str) -> dict[str, Any]:
    """Run a gptbatch command; return its last line, which is a JSON object, and its seconds."""
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "gptbatch", *arguments],
            cwd=work,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        found["problems"].append(f"{' '.join(arguments[:3])}: stopped after {LIMIT} s")
        return {"seconds": time.monotonic() - began}
    said = last_object(done.stdout)
    if done.returncode or not said:
        print(done.stdout[-2000:], flush=True)
        found["problems"].append(f"{' '.join(arguments[:3])}: exit {done.returncode}")
    rows = said.get("rows") or said.get("rows_checked") or 1
    seconds = said.get("generate_s") or said.get("verify_s") or 0.0
    return {**said, "ms_per_row": seconds * 1e3 / rows, "seconds": time.monotonic() - began}


def host() -> None:
    """Measure the host beside a device that takes no time; see benchmarks/cuda_host.py."""
    found: dict[str, Any] = {}
    for rows in (16,) if IS_FAKE else (64, 256, 1024):
        found |= measure((rows,))
        report(found)
