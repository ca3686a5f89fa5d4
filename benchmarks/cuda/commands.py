"""Sections `start`, `command` and `host`: what a user meets, and what the host costs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda.common import (
    CONFIG,
    DEVICE,
    DTYPES,
    INNER,
    IS_FAKE,
    LAYERS,
    POSITIONS,
    VOCAB,
    C,
    H,
    report,
    run_part,
)
from gptbatch.pipeline.bench.random_model import random_model, write_random_checkpoint
from gptbatch.pipeline.kv_cache.spec import TRITON
from gptbatch.pipeline.system.machine import cores

FEW, MANY, NEW_TOKENS = (10, 40, 8) if IS_FAKE else (400, 20_000, 128)
PROMPT = " the" * 32


def start() -> None:
    """Compile the kernels of a run in empty caches: side by side, and one after the other."""
    found: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        for threads in (cores().threads, 1):
            part = f"start-one:{int(dtype == 'float32')}:{threads}"
            with tempfile.TemporaryDirectory() as cache:
                found[f"{dtype}, {threads} threads"] = run_part(part, TRITON_CACHE_DIR=cache)
            report(found)


def start_one(is_float32: int, threads: int) -> None:
    """Compile for a model of one dtype; report the kernels and the seconds."""
    from gptbatch.pipeline.model.compiling import compile_kernels

    dtype = DTYPES["float32" if is_float32 else "bfloat16"]
    model = random_model(CONFIG, dtype=dtype, device=torch.device(DEVICE), backend=TRITON)
    began = time.monotonic()
    count = 0 if IS_FAKE else compile_kernels(model, threads)
    report({"kernels": count, "seconds": round(time.monotonic() - began, 2)})


def command() -> None:
    """Run `generate` on 20,000 rows, and verify all rows of a smaller run on the CPU."""
    found: dict[str, Any] = {"problems": []}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shape = {"n_embd": C, "n_layer": LAYERS, "n_head": H, "n_inner": INNER}
        write_random_checkpoint(work / "model", vocab_size=VOCAB, n_positions=POSITIONS, **shape)
        for count in (FEW, MANY):
            rows = (json.dumps({"id": f"row-{i}", "prompt": f"{i}{PROMPT}"}) for i in range(count))
            (work / f"{count}.jsonl").write_text("".join(f"{row}\n" for row in rows))
        for config, count in (
            ("gpt2-cuda", FEW),
            ("gpt2-cuda-fast", MANY),
            ("gpt2-cuda", MANY),
        ):
            key = f"{config}, {count} rows"
            output = f"out-{config}-{count}"
            options = ["--config", config, "--input", f"{count}.jsonl", "--output", output]
            options += ["--max-new-tokens", str(NEW_TOKENS), "--ignore-eos", "--model", "model"]
            found[key] = run(work, found, "generate", *options, *(["--device", "cpu"] * IS_FAKE))
            report(found)
            if count == FEW:
                verdict = run(work, found, "verify", output, "--all", "--device", "cpu")
                found[f"{key}, verified on the CPU"] = verdict
                report(found)


def run(work: Path, found: dict[str, Any], *arguments: str) -> dict[str, Any]:
    """Run a gptbatch command; return its last line, which is a JSON object, and its seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "gptbatch", *arguments],
        cwd=work,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        found["problems"].append(f"{' '.join(arguments[:3])}: exit {done.returncode}")
    lines = done.stdout.splitlines()
    said: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    rows = said.get("rows") or said.get("rows_checked") or 1
    seconds = said.get("generate_s") or said.get("verify_s") or 0.0
    return {**said, "ms_per_row": seconds * 1e3 / rows, "seconds": time.monotonic() - began}


def host() -> None:
    """Measure the host beside a device that takes no time; see benchmarks/cuda_host.py."""
    from benchmarks.cuda_host import measure

    report(measure((16,) if IS_FAKE else (64, 256, 1024)))
