"""What a whole job costs on the host, text and files included, beside a device that is not there.

    python benchmarks/cuda_host_job.py [--rows 8192] [--part-rows 512] [--step-ms 0]

A job of JSON lines, of 32 + 128 tokens per row, is run in this process: checked, tokenized,
scheduled, detokenized and written as Parquet. Only the model and its kernels are missing. The
tokenizer is a byte-level BPE of GPT-2's size. A step takes `--step-ms` on the device, and its
tokens are random. With 0 the rate is the most that the host allows. With 3.4 the device makes 2,350
rows/s of 1,024 at once, and the rate tells how much of that the host lets through.

Times are CPU seconds of the thread, without those of inner stages. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import gc
import json
import pstats
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from benchmarks.clock import Clock
from gptbatch.pipeline import JobConfig, run
from gptbatch.pipeline.bench.random_model import write_random_checkpoint
from gptbatch.pipeline.config import EngineConfig
from gptbatch.pipeline.engine import selection
from gptbatch.pipeline.engine.device_engine import DeviceEngine
from gptbatch.pipeline.engine.streams import Work
from gptbatch.pipeline.input.prompt_reader import PromptReader
from gptbatch.pipeline.input.tokenizer import PromptTokenizer
from gptbatch.pipeline.kernels.cuda.kernels import Kernels
from gptbatch.pipeline.kv_cache.spec import TRITON
from gptbatch.pipeline.model.config import GPTConfig
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.loading import LoadedModel
from gptbatch.pipeline.output import part_writer
from gptbatch.pipeline.output.crash_journal import CrashJournal
from gptbatch.pipeline.output.part_writer import PartWriter
from gptbatch.pipeline.output.progress_file import ProgressFile
from gptbatch.pipeline.output.row_runner import RowRunner
from gptbatch.pipeline.output.run_output import RunOutput
from gptbatch.pipeline.storage.atomic_write import FileWriter

VOCAB_SIZE = 50257
PROMPT_TOKENS, NEW_TOKENS = 32, 128
# Bytes of text to train the tokenizer on, which gives it about as many tokens as GPT-2's.
TRAINING_BYTES = 24_000_000
STAGES: dict[str, tuple[Any, str]] = {
    "check input": (PromptReader, "check"),
    "encode": (PromptTokenizer, "encode"),
    "decode": (PromptTokenizer, "text_of"),
    "collect rows": (RowRunner, "add"),
    "build table": (part_writer, "to_table"),
    "write part": (PartWriter, "write"),
    "Parquet": (part_writer, "write_table"),
    "read back": (part_writer, "read_part"),
    "files": (FileWriter, "write"),
    "journal": (CrashJournal, "record"),
    "progress": (ProgressFile, "update"),
    "finish": (RunOutput, "finish"),
}
GENERATORS: dict[str, tuple[Any, str]] = {
    "read rows": (PromptReader, "prompts"),
    "engine": (DeviceEngine, "generate"),
}


class Device:
    """A stream whose steps take their time, and bring random tokens. Nothing is computed.

    Args:
        step_s: Seconds per step.
        vocab_size: Tokens to choose from.
        rows: The most sequences of a step.
    """

    def __init__(self, step_s: float, vocab_size: int, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocab_size, (64, rows, 1), generator=generator)
        margins = torch.rand(64, rows, 1, generator=generator, dtype=torch.float64)
        self._tokens = torch.cat([tokens, margins.view(torch.int64)], 2)
        self._step_s, self._done_s, self._count = step_s, 0.0, 0
        self._outs: dict[Hashable, Tensor | None] = {}
        # For the host, before each step.
        self.waits_s: list[float] = []
        self._out: Tensor | None = None

    def advance(self, sampled: Tensor, state: Tensor, eos: Tensor, out: Tensor) -> None:
        """Take the place of the kernel."""
        self._out = out

    def run(self, work: Work) -> None:
        """Run work at once."""
        work()

    def repeat(self, key: Hashable, work: Work) -> None:
        """Take the time of a step. As of a CUDA graph, only the first launch runs Python."""
        if key not in self._outs:
            self._out = None
            work()
            self._outs[key] = self._out
        out = self._outs[key]
        if out is not None:
            out.copy_(self._tokens[self._count % 64, : len(out)])
        self._count += 1
        now = time.perf_counter()
        if self._step_s and self._done_s:
            self.waits_s.append(max(0.0, now - self._done_s))
        self._done_s = max(self._done_s, now) + self._step_s

    def catch_up(self) -> None:
        """Do nothing."""

    def mark(self) -> Mark:
        """Return the point after all steps so far."""
        return Mark(self._done_s)

    def reset(self) -> None:
        """Forget all keys."""
        self._outs.clear()

    def host_buffer(self, size: int) -> Tensor:
        """Return memory."""
        return torch.zeros(size, dtype=torch.int64)


class Mark:
    """A point in time."""

    def __init__(self, at_s: float) -> None:
        self._at_s = at_s

    def wait(self) -> None:
        """Wait for it."""
        if (left := self._at_s - time.perf_counter()) > 0:
            time.sleep(left)


class Collections:
    """Seconds of the garbage collector."""

    def __init__(self) -> None:
        self.seconds, self.longest_s, self._began = 0.0, 0.0, 0.0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        now = time.perf_counter()
        if phase == "start":
            self._began = now
        else:
            self.seconds += now - self._began
            self.longest_s = max(self.longest_s, now - self._began)


def nothing(*_: Any, **__: Any) -> None:
    """Take the place of a kernel."""


def training_text() -> str:
    """Return text of this machine: the standard library and the packages beside torch."""
    folders = [Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parents[1]]
    found, size = [], 0
    for path in (path for folder in folders for path in sorted(folder.rglob("*.py"))):
        text = path.read_text(encoding="utf-8", errors="ignore")
        found.append(text)
        size += len(text)
        if size >= TRAINING_BYTES:
            break
    return "".join(found)


def write_input(work: Path, rows: int) -> int:
    """Write a checkpoint and prompts; return the number of tokens of the tokenizer."""
    write_random_checkpoint(
        work / "model", n_embd=64, n_layer=1, n_head=1, vocab_size=VOCAB_SIZE, n_positions=1024
    )
    text = training_text()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(work / "model" / "tokenizer.json"))
    rng = random.Random(0)
    with (work / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for index in range(rows):
            at = rng.randrange(len(text) - 400)
            ids = tokenizer.encode(text[at : at + 400]).ids[1 : 1 + PROMPT_TOKENS]
            row = {"id": f"row-{index}", "prompt": tokenizer.decode(ids), "source": "a file"}
            file.write(json.dumps(row) + "\n")
    return tokenizer.get_vocab_size()


def install(args: argparse.Namespace, vocab_size: int) -> Device:
    """Let jobs of this process run on a `Device`."""
    device = Device(args.step_ms / 1e3, vocab_size, args.batch_size)
    names = [field.name for field in dataclasses.fields(Kernels)]
    kernels = Kernels(**{**dict.fromkeys(names, nothing), "advance": device.advance})

    def load(checkpoint: Any, config: GPTConfig, *_: Any, **__: Any) -> LoadedModel:
        model = GPT(config, backend=TRITON).eval().requires_grad_(False)
        return LoadedModel(model=model, batch_invariance="off", environment={})

    def engine(model: GPT, **options: Any) -> DeviceEngine:
        return DeviceEngine(model=model, kernels=kernels, stream=device, **options)

    vars(run)["load_model"] = load
    vars(selection)["new_engine"] = engine
    return device


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--part-rows", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--folder", type=Path, help="keeps checkpoint and input for other runs")
    parser.add_argument("--no-stages", action="store_true", help="measure the rate alone")
    parser.add_argument(
        "--profile", type=int, default=0, help="print this many functions of the loop"
    )
    parser.add_argument("--sort", default="tottime", help="of --profile")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = (args.folder or Path(folder)) / f"{args.rows}-rows"
        work.mkdir(parents=True, exist_ok=True)
        tokens = work / "tokens"
        if not tokens.exists():
            tokens.write_text(str(write_input(work, args.rows)))
        device = install(args, int(tokens.read_text()))
        found = measure(work, Path(folder) / "out", args)
        found["device_waits"] = {
            "seconds": round(sum(device.waits_s), 2),
            "longest": [round(wait, 3) for wait in sorted(device.waits_s)[-5:]],
        }
        print(json.dumps(found, indent=1))


def measure(work: Path, output: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run the job and return what it took."""
    clock, collections = Clock(time.thread_time), Collections()
    if not args.no_stages:
        for stage, (owner, name) in STAGES.items():
            clock.watch(owner, name, stage)
        for stage, (owner, name) in GENERATORS.items():
            clock.watch_steps(owner, name, stage)
    gc.callbacks.append(collections)
    config = JobConfig(
        model=str(work / "model"),
        input=str(work / "prompts.jsonl"),
        output=str(output),
        part_rows=args.part_rows,
        max_new_tokens=NEW_TOKENS,
        temperature=0.8,
        top_k=40,
        ignore_eos=True,
        engine=EngineConfig(batch_size=args.batch_size, memory_gib=1, device="cpu"),
    )
    profile = cProfile.Profile()
    began_s, began_cpu_s, process_s = time.perf_counter(), time.thread_time(), time.process_time()
    if args.profile:
        profile.enable()
    summary = run.run_job(config)
    profile.disable()
    wall_s, loop_s = time.perf_counter() - began_s, time.thread_time() - began_cpu_s
    process_s = time.process_time() - process_s
    if args.profile:
        pstats.Stats(profile, stream=sys.stdout).sort_stats(args.sort).print_stats(args.profile)
    assert summary.rows == args.rows
    per_row = 1e3 / args.rows
    return {
        "torch": torch.__version__,
        "rows": args.rows,
        "prompt_tokens_per_row": round(summary.prompt_tokens / args.rows, 1),
        "rows_per_s": round(args.rows / summary.generate_s),
        "rows_per_s_of_the_job": round(args.rows / wall_s),
        "seconds": {
            "job": round(wall_s, 2),
            "generate": summary.generate_s,
            "garbage collector": round(collections.seconds, 3),
            "its longest pause": round(collections.longest_s, 3),
        },
        "cpu_ms_per_row": {
            "loop's thread": round(loop_s * per_row, 4),
            "process": round(process_s * per_row, 4),
        },
        "loop_ms_per_row": per_row_ms(clock.seconds, args.rows),
        "beside_ms_per_row": per_row_ms(clock.beside, args.rows),
    }


def per_row_ms(seconds: dict[str, float], rows: int) -> dict[str, float]:
    """Return milliseconds per row of each stage, the largest first."""
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return {stage: round(spent / rows * 1e3, 4) for stage, spent in ordered}


if __name__ == "__main__":
    main()
