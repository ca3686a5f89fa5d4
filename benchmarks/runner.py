"""Run one program on a workload on request; compare.py starts it in the program's environment.

    python runner.py PROGRAM MODEL WORKLOAD.jsonl --dtype float32 --threads 2

Prints "@ready" and the versions. Then, for each repeat number read from standard input, it
generates all rows and prints "@seconds" and the time. Every program samples with temperature 0.8
and top-k 40, with a seed per row where it can, ignores end-of-text, and runs at most 64 rows at
once. Loading and one small warm-up are not timed. Repeats use other token ids, so that none finds
the prefixes of another one in a cache.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

TEMPERATURE, TOP_K = 0.8, 40
MAX_ROWS = 64
VOCAB_SIZE = 50257
MEMORY_GIB = 4

Rows = list[dict[str, Any]]
Generate = Callable[[Rows], None]


def gptbatch(
    args: argparse.Namespace, cache_dtype: Literal["auto", "int8"] = "auto"
) -> tuple[Generate, str]:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import torch

    from gptbatch.pipeline.bench.workloads import Row, Workload
    from gptbatch.pipeline.config import EngineConfig
    from gptbatch.pipeline.engine.engine import Engine
    from gptbatch.pipeline.model.checkpoint import find_checkpoint
    from gptbatch.pipeline.model.config import parse_config
    from gptbatch.pipeline.model.loading import load_model

    checkpoint = find_checkpoint(args.model, revision=None, allow_pickle=False)
    config = parse_config(checkpoint.config, args.model)
    settings = EngineConfig(
        device=args.device, dtype=args.dtype, cache_dtype=cache_dtype, threads=args.threads
    )
    loaded = load_model(
        checkpoint, config, settings, torch.device(args.device), batch_invariance="require"
    )
    memory = loaded.cache_memory_bytes(MEMORY_GIB if args.device == "cpu" else None)
    engine = Engine(model=loaded.model, batch_size=MAX_ROWS, eos_token_ids=(), memory_bytes=memory)

    def generate(rows: Rows) -> None:
        work = Workload(
            "rows",
            tuple(Row(tuple(row["prompt_token_ids"]), row["max_new_tokens"]) for row in rows),
        )
        prompts = work.prompts(0, vocab_size=config.vocab_size)
        ended = [
            completion for completions in engine.generate(prompts) for completion in completions
        ]
        assert sum(len(completion.token_ids) for completion in ended) == work.new_tokens

    return generate, f"gptbatch {version('gptbatch')}, torch {torch.__version__}"


def gptbatch_int8_cache(args: argparse.Namespace) -> tuple[Generate, str]:
    return gptbatch(args, cache_dtype="int8")


def transformers(args: argparse.Namespace) -> tuple[Generate, str]:
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(args.threads)
    model = (
        GPT2LMHeadModel.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
        .eval()
        .to(args.device)
    )

    @torch.inference_mode()
    def generate(rows: Rows) -> None:
        likes = sorted(rows, key=lambda row: (row["max_new_tokens"], len(row["prompt_token_ids"])))
        for first in range(0, len(likes), MAX_ROWS):
            batch = likes[first : first + MAX_ROWS]
            width = max(len(row["prompt_token_ids"]) for row in batch)
            idx = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(idx)
            for i, row in enumerate(batch):
                count = len(row["prompt_token_ids"])
                idx[i, -count:], mask[i, -count:] = torch.tensor(row["prompt_token_ids"]), 1
            new = max(row["max_new_tokens"] for row in batch)
            tokens = model.generate(
                idx.to(args.device),
                attention_mask=mask.to(args.device),
                min_new_tokens=new,
                max_new_tokens=new,
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=TOP_K,
                pad_token_id=0,
            )
            # Wait for a GPU.
            tokens.cpu()

    return generate, f"transformers {version('transformers')}, torch {torch.__version__}"


def openvino(args: argparse.Namespace, **more: str) -> tuple[Generate, str]:
    import numpy as np
    import openvino_genai
    from openvino import Tensor

    settings = openvino_genai.SchedulerConfig()
    settings.cache_size = MEMORY_GIB
    settings.max_num_seqs = MAX_ROWS
    settings.max_num_batched_tokens = 4096
    settings.dynamic_split_fuse = True
    settings.enable_prefix_caching = args.share
    precision = "f32" if args.dtype == "float32" else "bf16"
    properties = {
        "INFERENCE_NUM_THREADS": args.threads,
        "INFERENCE_PRECISION_HINT": precision,
        **more,
    }
    pipeline = openvino_genai.ContinuousBatchingPipeline(args.model, settings, "CPU", properties)

    def config(index: int, row: dict[str, Any]) -> Any:
        made = openvino_genai.GenerationConfig()
        made.do_sample, made.temperature, made.top_k, made.top_p = True, TEMPERATURE, TOP_K, 1.0
        made.rng_seed, made.ignore_eos = index, True
        made.min_new_tokens = made.max_new_tokens = row["max_new_tokens"]
        return made

    def generate(rows: Rows) -> None:
        prompts = [Tensor(np.array([row["prompt_token_ids"]], dtype=np.int64)) for row in rows]
        pipeline.generate(prompts, [config(index, row) for index, row in enumerate(rows)])

    return generate, f"openvino-genai {version('openvino-genai')}"


def openvino_full_cache(args: argparse.Namespace) -> tuple[Generate, str]:
    return openvino(args, KV_CACHE_PRECISION="f32" if args.dtype == "float32" else "bf16")


def vllm(args: argparse.Namespace) -> tuple[Generate, str]:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(args.threads),
        "VLLM_CPU_KVCACHE_SPACE": str(MEMORY_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}",
    }
    from vllm import LLM, SamplingParams

    llm = LLM(
        args.model,
        dtype=args.dtype,
        max_model_len=1024,
        max_num_seqs=MAX_ROWS,
        enable_prefix_caching=args.share,
        skip_tokenizer_init=True,
        seed=0,
    )

    def generate(rows: Rows) -> None:
        prompts = [{"prompt_token_ids": row["prompt_token_ids"]} for row in rows]
        # No seeds per row: with them vllm-cpu 0.32 stops when rows of a batch end at other steps.
        params = [
            SamplingParams(
                temperature=TEMPERATURE,
                top_k=TOP_K,
                ignore_eos=True,
                min_tokens=row["max_new_tokens"],
                max_tokens=row["max_new_tokens"],
                detokenize=False,
            )
            for row in rows
        ]
        llm.generate(prompts, params, use_tqdm=False)

    return generate, f"vllm-cpu {version('vllm-cpu')}"


PROGRAMS = {
    "gptbatch": gptbatch,
    "gptbatch-int8-cache": gptbatch_int8_cache,
    "transformers": transformers,
    "openvino": openvino,
    "openvino-full-cache": openvino_full_cache,
    "vllm": vllm,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("model")
    parser.add_argument("workload", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="of gptbatch and transformers"
    )
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument(
        "--share",
        action="store_true",
        help="use prefix caching where it is optional",
    )
    args = parser.parse_args()
    # A program must not import this folder's files as its own modules.
    here = Path(__file__).resolve().parent
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != here]
    rows = [json.loads(line) for line in args.workload.read_text(encoding="utf-8").splitlines()]
    generate, versions = PROGRAMS[args.program](args)

    def moved(repeat: int, most: int) -> Rows:
        return [
            {
                "prompt_token_ids": [
                    (token + 1009 * repeat) % VOCAB_SIZE for token in row["prompt_token_ids"]
                ],
                "max_new_tokens": min(row["max_new_tokens"], most),
            }
            for row in rows
        ]

    generate(moved(0, 4))
    print(f"@ready {versions}", flush=True)
    for line in sys.stdin:
        work = moved(int(line), 10**9)
        began = time.perf_counter()
        generate(work)
        print(f"@seconds {time.perf_counter() - began}", flush=True)


if __name__ == "__main__":
    main()
