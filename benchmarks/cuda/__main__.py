"""The sections of cuda_check.py: `python -m benchmarks.cuda SECTION`.

A section prints a JSON object after each finding, so that a section that is cut off keeps them.
`preflight SECTION ...` imports what these sections need, and exits with what is missing.
"""

from __future__ import annotations

import importlib
import logging
import sys

from benchmarks.cuda.preflight import is_fake, modules_of, preflight

# Module and function of each section.
SECTIONS = {
    "machine": "machine:machine",
    "graph-nodes": "machine:graph_nodes",
    "build": "build:build",
    "start": "build:start",
    "start-one": "build:start_one",
    "kernels": "kernels:kernels",
    "cpu-bits": "cpu_bits:cpu_bits",
    "kernel-times": "kernel_times:kernel_times",
    "compile": "linears:compile_all",
    "linear-bits": "linears:linear_bits",
    "linear-times": "linears:linear_times",
    "engine": "engines:engine",
    "dependent-launch": "dependent:dependent_launch",
    "dependent-one": "dependent:dependent_one",
    "transformers": "engines:transformers_rates",
    "command": "commands:command",
    "host": "commands:host",
    "tests": "tests:tests",
}


def main() -> None:
    if sys.argv[1] == "preflight":
        preflight(modules_of(SECTIONS, sys.argv[2:]), needs_gpu=not is_fake())
        return
    if is_fake():
        from benchmarks.cuda.fake import install

        install()
    import torch

    torch.set_float32_matmul_precision("highest")
    # The log says what is compiled, and why a self-test fails.
    logging.basicConfig(format="%(relativeCreated)d ms %(message)s")
    logging.getLogger("gptbatch").setLevel(logging.INFO)
    # A part of a section has numbers: start-one:1:16.
    section, *numbers = sys.argv[1].split(":")
    module, _, name = SECTIONS[section].partition(":")
    getattr(importlib.import_module(f"benchmarks.cuda.{module}"), name)(*map(int, numbers))


if __name__ == "__main__":
    main()
