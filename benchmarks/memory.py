"""Memory of a long run: 200,000 short prompts through a tiny model, resident memory against rows done.

    python benchmarks/memory.py [ROWS]

Prints resident memory at every tenth of the rows, then a JSON object with the growth from the first tenth to the last, in
bytes a row. Reading the input keeps 8 bytes a row and 16 for a moment.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from jobs.train_demo import END_OF_TEXT, train_tokenizer
from pipeline import JobConfig, run_job


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Watch:
    """A Progress that notes the resident memory at every tenth of the rows."""

    def begin(self, total_rows: int, done_rows: int) -> None:
        self.every = max(1, total_rows // 10)
        self.points: list[tuple[int, int]] = []

    def update(self, *, rows: int, errors: int, completion_tokens: int) -> None:
        if rows // self.every > len(self.points):
            self.points.append((rows, resident_bytes()))
            print(f"{rows:>9} rows  {self.points[-1][1] / 2**20:8.1f} MiB", flush=True)

    def end(self) -> None:
        pass


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokenizer = train_tokenizer(["a short prompt of a few words, and a number: 0123456789"] * 50, 280)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(work / "model")
        torch.manual_seed(0)
        config = GPT2Config(n_layer=1, n_head=1, n_embd=16, vocab_size=280, n_positions=64, bos_token_id=0, eos_token_id=0)
        GPT2LMHeadModel(config).save_pretrained(work / "model")
        with (work / "prompts.jsonl").open("w") as file:
            for index in range(rows):
                file.write(json.dumps({"id": f"row-{index}", "prompt": f"a short prompt, number {index}"}) + "\n")
        watch = Watch()
        settings = JobConfig(
            model=str(work / "model"), input=str(work / "prompts.jsonl"), output=str(work / "out"), max_new_tokens=4, part_rows=2048
        )
        summary = run_job(settings, watch)
    (first_rows, first), (last_rows, last) = watch.points[0], watch.points[-1]
    report = {
        "rows": summary.rows,
        "rows_per_s": round(summary.rows / summary.wall_s),
        "first_mib": round(first / 2**20, 1),
        "last_mib": round(last / 2**20, 1),
        "growth_bytes_a_row": round((last - first) / (last_rows - first_rows), 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
