"""Speed of two versions of gptbatch in turn: tokens per second of the second over the first.

    git worktree add ../before COMMIT
    python benchmarks/versions.py ../before . [--dtypes float32 bfloat16] [--pairs 5]
                                  [--workloads uniform ragged shared_prefix repeated]

Both are checkouts of this repository. Each runs in a process of its own that loads the shape of
gpt2 with random weights once; in a pair, one directly follows the other, in alternating order.
`repeated` is 435 prompts of 65 tokens, twice in order. Prints the median and all ratios, and
whether tokens and decision margins are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

# rows and new tokens per row
WORKLOADS = {
    "uniform": (64, 32),
    "ragged": (96, 32),
    "shared_prefix": (64, 24),
    "repeated": (870, 8),
}
# It runs in the checkout, so it takes only names that both versions have.
WORKER = """
import dataclasses, hashlib, json, sys, time
import torch
from gptbatch.pipeline.bench.random_model import random_model
from gptbatch.pipeline.bench.shapes import shape_config
from gptbatch.pipeline.bench.workloads import make_workload, uniform_workload
from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.kernels.build import load_kernels
from gptbatch.pipeline.kv_cache.spec import RAGGED
load_kernels()
config = shape_config("gpt2")
model = random_model(config, dtype=getattr(torch, sys.argv[1]), device=torch.device("cpu"),
                     backend=RAGGED)

def run(name, rows, new_tokens, repeat):
    size = config.vocab_size
    if name == "repeated":
        once = uniform_workload(rows // 2, 65, new_tokens, vocab_size=size)
        workload = dataclasses.replace(once, rows=once.rows * 2)
    else:
        workload = make_workload(name, vocab_size=size, n_positions=config.n_positions).first(rows)
    engine = Engine(model=model, batch_size=64, eos_token_ids=())
    prompts = workload.prompts(repeat, vocab_size=size, max_new_tokens=new_tokens)
    began, found = time.perf_counter(), []
    for completions in engine.generate(prompts):
        found += [(c.prompt.index, c.token_ids, c.min_decision_margin) for c in completions]
    rate = engine.stats.new_tokens / (time.perf_counter() - began)
    return rate, hashlib.sha256(repr(sorted(found)).encode()).hexdigest()

run("uniform", 8, 4, 0)
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(run(*json.loads(line))), flush=True)
"""


def start(checkout: Path, dtype: str) -> subprocess.Popen[str]:
    """Start the worker of a version, and wait until its model is loaded."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve() / "src")}
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, dtype],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=checkout,
        env=environment,
    )
    assert worker.stdout is not None
    assert worker.stdout.readline().strip() == "ready"
    return worker


def ask(worker: subprocess.Popen[str], *request: Any) -> tuple[float, str]:
    """Return new tokens per second, and a hash of tokens and margins."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps(request) + "\n")
    worker.stdin.flush()
    rate, digest = json.loads(worker.stdout.readline())
    return rate, digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    for dtype in arguments.dtypes:
        workers = [start(checkout, dtype) for checkout in (arguments.before, arguments.after)]
        for name in arguments.workloads:
            ratios, is_equal = [], True
            for pair in range(arguments.pairs):
                order = (0, 1) if pair % 2 == 0 else (1, 0)
                found = {i: ask(workers[i], name, *WORKLOADS[name], pair + 1) for i in order}
                ratios.append(found[1][0] / found[0][0])
                is_equal &= found[0][1] == found[1][1]
            listed = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            same = "equal" if is_equal else "different"
            median = statistics.median(ratios)
            print(f"{dtype} {name}: {median:.3f} ({listed}), tokens {same}", flush=True)
        for worker in workers:
            worker.communicate()


if __name__ == "__main__":
    main()
