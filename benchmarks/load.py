"""Seconds from a checkpoint on disk to the first token: loading, packing, self-test, one prompt.

    python benchmarks/load.py [--dtypes float32 bfloat16] [--threads N] [--repeats 3]

Uses gpt2's shape with random weights and a prompt of 32 tokens. The checkpoint is in the
system's file cache, and the kernels are built before. Python's imports do not count. The last line
is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from gptbatch.pipeline.bench.random_model import write_random_checkpoint
from gptbatch.pipeline.config import EngineConfig
from gptbatch.pipeline.kv_cache.interface import select_backend
from gptbatch.pipeline.model.checkpoint import find_checkpoint
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.loading import load_model

PROMPT = [5] * 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    select_backend("auto", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder))
        results = {}
        for dtype in args.dtypes:
            engine = EngineConfig(device="cpu", dtype=dtype, threads=args.threads)
            results[dtype] = statistics.median(
                first_token_s(Path(folder), engine) for _ in range(args.repeats)
            )
    for dtype, seconds in results.items():
        print(f"{dtype:<9} {seconds:.2f} s to the first token")
    print(
        json.dumps(
            {"repeats": args.repeats, "threads": torch.get_num_threads(), "first_token_s": results}
        )
    )


def first_token_s(folder: Path, engine: EngineConfig) -> float:
    began = time.perf_counter()
    checkpoint = find_checkpoint(str(folder))
    config = parse_config(checkpoint.config, str(folder))
    model = load_model(
        checkpoint, config, engine, torch.device("cpu"), batch_invariance="auto"
    ).model
    with torch.inference_mode():
        cache = model.new_cache(1, capacity=model.cache_spec.capacity_for([len(PROMPT)]))
        count = len(PROMPT)
        model.logits(
            model.hidden(
                cache,
                tokens=PROMPT,
                seq_indices=[0] * count,
                positions=range(count),
                logits_indices=[count - 1],
            )
        ).argmax().item()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
