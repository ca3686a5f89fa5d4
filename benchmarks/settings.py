"""What each sampling setting costs: new tokens per second with it, relative to without it.

    python benchmarks/settings.py [--shape gpt2] [--dtypes float32 bfloat16] [--rows 64]
                                  [--max-new-tokens 32] [--repeats 3] [--threads N]
                                  [--settings TEXT]

Random weights on a CPU with the C++ kernels; prompts of 32 tokens, temperature 0.8, top_k 40.
Random weights give flat probabilities, so filters over the whole vocabulary are not measured here:
benchmarks/kernels.py measures them on logits with a spread like that of GPT-2. Each run with a
setting stands directly beside one without it, in alternating order. Prints a markdown table: the
median, the smallest and the largest ratio.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from gptbatch.pipeline.bench.machine import describe_machine
from gptbatch.pipeline.bench.random_model import random_model
from gptbatch.pipeline.bench.shapes import SHAPES, shape_config
from gptbatch.pipeline.bench.workloads import uniform_workload
from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.kernels.build import load_kernels
from gptbatch.pipeline.kv_cache.spec import RAGGED
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.types import TokenizedPrompt

PROMPT_TOKENS = 32
SETTINGS: dict[str, dict[str, Any]] = {
    "`top_p` 0.9": {"top_p": 0.9},
    "`min_p` 0.05": {"min_p": 0.05},
    "`stop`, 4 strings": {"stop": ("\nclass", "\ndef", "\n#", "\nif")},
    "`logprobs` 0": {"logprobs": 0},
    "`logprobs` 5": {"logprobs": 5},
    "`presence_penalty` 0.5": {"presence_penalty": 0.5},
    "`repetition_penalty` 1.1": {"repetition_penalty": 1.1},
    "`no_repeat_ngram_size` 3": {"no_repeat_ngram_size": 3},
    "`logit_bias`, 10 tokens": {"logit_bias": tuple((token, -1.0) for token in range(10))},
    "`allowed_token_ids`, 1,000 tokens": {"allowed_token_ids": tuple(range(1000))},
    "`bad_words`, 10 words": {"bad_words": tuple(f"word{i}" for i in range(10))},
    "`min_new_tokens` 32": {"min_new_tokens": 32},
}


def prompts(
    config_vocab: int, rows: int, new_tokens: int, repeat: int, settings: dict[str, Any]
) -> Iterator[TokenizedPrompt]:
    workload = uniform_workload(rows, PROMPT_TOKENS, new_tokens, vocab_size=config_vocab)
    for source in workload.prompts(repeat, vocab_size=config_vocab):
        params = dataclasses.replace(source.prompt.params, **settings)
        yield dataclasses.replace(source, prompt=dataclasses.replace(source.prompt, params=params))


def tokens_per_s(model: GPT, arguments: argparse.Namespace, repeat: int, **settings: Any) -> float:
    vocab_size = model.config.vocab_size
    engine = Engine(
        model=model,
        batch_size=arguments.rows,
        eos_token_ids=(),
        token_bytes=[b"%x" % token for token in range(vocab_size)],
    )
    rows = prompts(vocab_size, arguments.rows, arguments.max_new_tokens, repeat, settings)
    began = time.perf_counter()
    for _ in engine.generate(rows):
        pass
    return engine.stats.new_tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--settings", default="", help="Only those whose name holds this text.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = shape_config(arguments.shape)
    load_kernels()
    chosen = {name: some for name, some in SETTINGS.items() if arguments.settings in name}
    cells: dict[str, list[str]] = {name: [] for name in chosen}
    for dtype in arguments.dtypes:
        model = random_model(
            config, dtype=getattr(torch, dtype), device=torch.device("cpu"), backend=RAGGED
        )
        tokens_per_s(model, arguments, 0)
        for name, settings in chosen.items():
            ratios = []
            for repeat in range(1, arguments.repeats + 1):
                pair = [{}, settings] if repeat % 2 else [settings, {}]
                rates = [tokens_per_s(model, arguments, repeat, **some) for some in pair]
                ratios.append(rates[pair.index(settings)] / rates[pair.index({})])
            median, low, high = statistics.median(ratios), min(ratios), max(ratios)
            cells[name].append(f"{median:.2f} ({low:.2f} to {high:.2f})")
            print(dtype, name, cells[name][-1], flush=True)
    print(f"| setting | {' | '.join(arguments.dtypes)} |\n|---|{'---|' * len(arguments.dtypes)}")
    for name, row in cells.items():
        print(f"| {name} | {' | '.join(row)} |")
    print(json.dumps(describe_machine(torch.device("cpu"))))


if __name__ == "__main__":
    main()
