"""The cost of durability: time per stage beside the model, per run and per row, and memory.

    python benchmarks/overhead.py [--shape gpt2] [--rows 2048]
    python benchmarks/overhead.py --shape tiny --rows 1000000

gpt2 generates 32 + 128 tokens per row. tiny generates 1 + 4 tokens per row, so the stages are
nearly all of the time. Times are of the named calls, all in one process. A stage inside another
counts once, in the inner one. Parts are written in a thread beside the model, which has lines of
its own and is no part of the shares. Resident memory is noted at every tenth of the rows. The last
line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import Clock
from gptbatch.pipeline import JobConfig, run_job
from gptbatch.pipeline.bench.random_model import write_random_checkpoint
from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.input.prompt_reader import PromptReader
from gptbatch.pipeline.input.tokenizer import PromptTokenizer
from gptbatch.pipeline.output.crash_journal import CrashJournal
from gptbatch.pipeline.output.folder import OutputFolder
from gptbatch.pipeline.output.local_run import LocalRunFolder
from gptbatch.pipeline.output.part_writer import PartWriter
from gptbatch.pipeline.output.progress_file import ProgressFile
from gptbatch.pipeline.output.row_runner import RowRunner
from gptbatch.pipeline.output.run_output import RunOutput

TINY = {
    "n_layer": 1,
    "n_head": 1,
    "n_embd": 16,
    "n_positions": 64,
    "vocab_size": 1024,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"config": {}, "prompt": " the" * 32, "new_tokens": 128},
    "tiny": {"config": TINY, "prompt": " the", "new_tokens": 4},
}
# Stages of durability, and other stages beside the model.
DURABILITY = {
    "check input": (PromptReader, "check"),
    "commit part": (PartWriter, "write"),
    "claim": (RunOutput, "claim"),
    "finish": (RunOutput, "finish"),
    "digests": (OutputFolder, "write_hashes"),
    "records": (LocalRunFolder, "record"),
    "journal": (CrashJournal, "record"),
    "progress file": (ProgressFile, "write"),
}
OTHERS = {
    "tokenize": (PromptTokenizer, "encode"),
    "decode text": (PromptTokenizer, "text_of"),
    "add row": (RowRunner, "add"),
}


class Watch:
    """A Progress that notes resident memory at every tenth of the rows."""

    def begin(self, total_rows: int, done_rows: int) -> None:
        self.every, self.points = max(1, total_rows // 10), list[tuple[int, int]]()

    def update(self, *, rows: int, **counts: float | None) -> None:
        if rows // self.every > len(self.points):
            resident = int(Path("/proc/self/statm").read_text().split()[1])
            self.points.append((rows, resident * resource.getpagesize()))
            print(f"{rows:>9} rows  {self.points[-1][1] / 2**20:8.1f} MiB", flush=True)

    def end(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    clock, watch = Clock(), Watch()
    for stage, (owner, name) in {**DURABILITY, **OTHERS}.items():
        clock.watch(owner, name, stage)
    clock.watch_steps(PromptReader, "prompts", "read rows again")
    clock.watch_steps(Engine, "generate", "model and sampling")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_random_checkpoint(work / "model", **shape["config"])
        with (work / "prompts.jsonl").open("w") as file:
            for index in range(args.rows):
                file.write(json.dumps({"id": f"row-{index}", "prompt": shape["prompt"]}) + "\n")
        config = JobConfig(
            model=str(work / "model"),
            input=str(work / "prompts.jsonl"),
            output=str(work / "out"),
            max_new_tokens=shape["new_tokens"],
            temperature=0.8,
            top_k=40,
            ignore_eos=True,
        )
        config = config.model_copy(
            update={"engine": config.engine.model_copy(update={"threads": args.threads})}
        )
        summary = run_job(config, watch)
    durability_s = sum(clock.seconds[stage] for stage in DURABILITY)
    for where, found in (("", clock.seconds), (" (beside)", clock.beside)):
        for stage, seconds in sorted(found.items(), key=lambda item: -item[1]):
            print(
                f"{stage + where:<28} {seconds:8.2f} s  {1e6 * seconds / args.rows:9.1f} us per "
                f"row  {100 * seconds / summary.wall_s:6.2f} %"
            )
    report = {
        "shape": args.shape,
        "rows": summary.rows,
        "wall_s": summary.wall_s,
        "tokens_per_s": summary.tokens_per_s,
        "durability_s": round(durability_s, 2),
        "durability_share": round(durability_s / summary.wall_s, 5),
        "us_per_row": {
            stage: round(1e6 * seconds / args.rows, 1) for stage, seconds in clock.seconds.items()
        },
        "us_per_row_beside": {
            stage: round(1e6 * seconds / args.rows, 1) for stage, seconds in clock.beside.items()
        },
        "first_mib": round(watch.points[0][1] / 2**20, 1),
        "last_mib": round(watch.points[-1][1] / 2**20, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
