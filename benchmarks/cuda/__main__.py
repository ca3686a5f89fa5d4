"""The sections of cuda_check.py: `python -m benchmarks.cuda SECTION`.

A section prints a JSON object after each finding, so that a section that is cut off keeps them.
"""

from __future__ import annotations

import importlib
import os
import sys

# Module and function of each section.
SECTIONS = {
    "machine": "machine:machine",
    "graph-nodes": "machine:graph_nodes",
    "kernels": "kernels:kernels",
    "cpu-bits": "cpu_bits:cpu_bits",
    "kernel-times": "kernels:kernel_times",
    "compile": "linears:compile_all",
    "linear-bits": "linears:linear_bits",
    "linear-times": "linears:linear_times",
    "engine": "engines:engine",
    "dependent-launch": "engines:dependent_launch",
    "dependent-one": "engines:dependent_one",
    "transformers": "engines:transformers_rates",
    "command": "commands:command",
    "start": "commands:start",
    "start-one": "commands:start_one",
    "host": "commands:host",
    "tests": "tests:tests",
}


def main() -> None:
    if os.environ.get("CUDA_CHECK_FAKE") == "1":
        from benchmarks.cuda.fake import install

        install()
    import torch

    torch.set_float32_matmul_precision("highest")
    # A part of a section has numbers: start-one:1:16.
    section, *numbers = sys.argv[1].split(":")
    module, _, name = SECTIONS[section].partition(":")
    getattr(importlib.import_module(f"benchmarks.cuda.{module}"), name)(*map(int, numbers))


if __name__ == "__main__":
    main()
