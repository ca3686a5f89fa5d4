"""The sections of cuda_check.py: `python -m benchmarks.cuda SECTION`.

A section prints a JSON object after each finding, so that a section that is cut off keeps them.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.cuda.engines import engine, transformers_rates
from benchmarks.cuda.kernels import cpu_bits, kernel_times, kernels
from benchmarks.cuda.linears import compile_all, compile_some, linear_bits, linear_times
from benchmarks.cuda.machine import graph_nodes, machine
from benchmarks.cuda.tests import tests


def main() -> None:
    section = sys.argv[1]
    torch.backends.cuda.matmul.allow_tf32 = False
    if section.startswith("compile-"):
        _, index, count = section.split("-")
        compile_some(int(index), int(count))
        return
    {
        "machine": machine,
        "compile": compile_all,
        "graph-nodes": graph_nodes,
        "kernels": kernels,
        "cpu-bits": cpu_bits,
        "linear-bits": linear_bits,
        "linear-times": linear_times,
        "kernel-times": kernel_times,
        "engine": engine,
        "transformers": transformers_rates,
        "tests": tests,
    }[section]()


if __name__ == "__main__":
    main()
