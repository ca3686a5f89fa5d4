"""Compare the whole command with the engine alone: the cost of input, output and start-up.

    python benchmarks/command.py [--rows 512] [--dtype float32] [--threads N] [--repeats 3]

Uses gpt2's shape with random weights, about 33 prompt tokens and 128 new tokens per row,
temperature 0.8 and top-k 40. Runs in turn `gptbatch generate` in a process of its own, from start
to end without its `load_s`, and the engine in this process on the same tokens. The last line is a
JSON object; quote medians and ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptbatch.pipeline.bench.random_model import write_random_checkpoint
from gptbatch.pipeline.config import EngineConfig
from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.input.tokenizer import PromptTokenizer
from gptbatch.pipeline.input.tokenizer_loading import load_tokenizer
from gptbatch.pipeline.model.checkpoint import find_checkpoint
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.loading import load_model
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.types import Prompt, TokenizedPrompt

PROMPT, NEW_TOKENS = " the" * 32, 128
SAMPLING = (
    "--temperature",
    "0.8",
    "--top-k",
    "40",
    "--max-new-tokens",
    str(NEW_TOKENS),
    "--ignore-eos",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    command_s: list[float] = []
    engine_s: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_random_checkpoint(work / "model")
        rows = (
            json.dumps({"id": f"row-{i}", "prompt": f"{i}{PROMPT}"}) + "\n"
            for i in range(args.rows)
        )
        (work / "prompts.jsonl").write_text("".join(rows), encoding="utf-8")
        alone = engine_alone(work / "model", args)
        for repeat in range(args.repeats):
            command_s.append(whole_command(work, f"out-{repeat}", args))
            engine_s.append(alone())
            print(
                f"repeat {repeat}: the command {command_s[-1]:.2f} s, "
                f"the engine alone {engine_s[-1]:.2f} s",
                flush=True,
            )
    ratio = statistics.median(
        command / engine for command, engine in zip(command_s, engine_s, strict=True)
    )
    report = {
        "rows": args.rows,
        "dtype": args.dtype,
        "threads": args.threads,
        "command_s": command_s,
        "engine_s": engine_s,
    }
    print(json.dumps({**report, "ratio": round(ratio, 3)}))


def whole_command(work: Path, output: str, args: argparse.Namespace) -> float:
    """Return the seconds of the command without loading the model."""
    command = [
        sys.executable,
        "-m",
        "gptbatch",
        "generate",
        "--model",
        work / "model",
        "--input",
        work / "prompts.jsonl",
        "--output",
        output,
    ]
    command += ["--dtype", args.dtype, "--threads", str(args.threads), *SAMPLING]
    began = time.perf_counter()
    done = subprocess.run(
        [str(part) for part in command],
        cwd=work,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - began
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert summary["completion_tokens"] == args.rows * NEW_TOKENS
    return seconds - float(summary["load_s"])


def engine_alone(model: Path, args: argparse.Namespace) -> Callable[[], float]:
    """Return a function that runs the same rows through the engine and returns the seconds."""
    checkpoint = find_checkpoint(str(model))
    config = parse_config(checkpoint.config, str(model))
    settings = EngineConfig(device="cpu", dtype=args.dtype, threads=args.threads)
    loaded = load_model(checkpoint, config, settings, torch.device("cpu"), batch_invariance="auto")
    texts = [f"{i}{PROMPT}" for i in range(args.rows)]
    tokenizer = PromptTokenizer(
        load_tokenizer(checkpoint.folder), start_token=checkpoint.special_tokens.start
    )
    token_ids = [prompt.token_ids for prompt in tokenizer.encode(texts)]

    def prompts() -> list[TokenizedPrompt]:
        params = [
            SamplingParams(seed=i, temperature=0.8, top_k=40, max_new_tokens=NEW_TOKENS)
            for i in range(args.rows)
        ]
        rows = [
            Prompt(index=i, prompt_id=str(i), text="", params=params[i], metadata=None)
            for i in range(args.rows)
        ]
        return [
            TokenizedPrompt(prompt=row, token_ids=ids, tokens_dropped=0, read_s=time.monotonic())
            for row, ids in zip(rows, token_ids, strict=True)
        ]

    def run() -> float:
        engine = Engine(
            model=loaded.model,
            batch_size=loaded.batch_size(None),
            eos_token_ids=(),
            memory_bytes=loaded.cache_memory_bytes(None),
        )
        rows = prompts()
        began = time.perf_counter()
        for _ in engine.generate(iter(rows)):
            pass
        return time.perf_counter() - began

    return run


if __name__ == "__main__":
    main()
