"""Times, memory and file size of `gptbatch report` on runs of many rows.

    python benchmarks/report.py [--rows 1000000] [--part-rows 512] [--keep FOLDER] [--two]

Writes a synthetic run with the schema of real ones: rows in the order in which a batch of 64 would
have run them, a gap of two hours, errors, reused prefixes. Then runs the command in a process of
its own. With --two, it writes a second run, in which 2 % of the rows differ, and compares both.

Prints seconds, peak memory and size; the last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gptbatch.pipeline.input.input_digest import input_digest
from gptbatch.pipeline.output.claim import claim
from gptbatch.pipeline.output.folder import OutputFolder
from gptbatch.pipeline.output.part_file import FOOTER_KEY, part_name
from gptbatch.pipeline.output.schema import FORMAT, SCHEMA, content_digest
from gptbatch.pipeline.storage.atomic_write import FileWriter

BATCH_SIZE = 64
GAP_S = 7200.0
SENTENCE = "the king of a night is fair and we shall not rest till morning comes my lord"
FACTS = {
    "model": "gpt2",
    "input": "prompts.jsonl",
    "dtype": "float32",
    "device": "cpu",
    "batch_invariance": "verified",
    "environment": {"attention": "ragged", "torch": "2.13.0", "device_class": "x86_64 AVX512"},
    "versions": {"gptbatch": "0.1.0"},
}
CONFIG = """\
model: gpt2
input: prompts.jsonl
temperature: 0.8
top_k: 40
max_new_tokens: 128
engine:
  batch_size: 64
"""


def write_run(path: Path, rows: int, part_rows: int, *, changed: float = 0.0) -> None:
    """Write a run.

    Args:
        path: The output folder.
        rows: Rows of the table.
        part_rows: Rows per part.
        changed: Share of rows with another token than in a run without this.
    """
    n_parts = -(-rows // part_rows)
    digests = ["0" * 64] * n_parts
    identity = {
        "config_hash": "f" * 64,
        "seed": 0,
        "rows": rows,
        "part_rows": part_rows,
        "input_digest": input_digest(digests),
        "temperature": 0.8 + changed,
    }
    facts = {"format": FORMAT, "identity": identity, **FACTS}
    folder = OutputFolder(path)
    folder.create()
    claim(folder, FileWriter(path / ".gptbatch"), CONFIG, facts)
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(SENTENCE.split(), 8 + index % 60)) for index in range(1500)]
    pool = pa.array(texts, pa.string())
    clock = 1.7e9
    for number in range(n_parts):
        first = number * part_rows
        count = min(part_rows, rows - first)
        generator = np.random.default_rng(number)
        table, clock = _table(generator, first, count, clock, pool)
        if changed:
            table = _changed(table, np.random.default_rng(number + rows), changed)
        if number == n_parts // 2:
            clock += GAP_S
        errors = count - table["error"].null_count
        footer = {
            **facts,
            "first_row": first,
            "rows": count,
            "samples": count,
            "error_kinds": {"too_long": errors} if errors else {},
            "prompt_tokens": int(np.sum(table["prompt_tokens"].to_numpy())),
            "completion_tokens": int(np.sum(table["completion_tokens"].to_numpy())),
            "input_rows_digest": digests[number],
            "content_digest": content_digest(table),
        }
        schema = SCHEMA.with_metadata({FOOTER_KEY: json.dumps(footer)})
        pq.write_table(
            table.cast(schema),
            path / part_name(number),
            compression="zstd",
            write_page_checksum=True,
        )


def _table(
    generator: np.random.Generator, first: int, count: int, clock: float, pool: pa.Array
) -> tuple[pa.Table, float]:
    """Return the rows of a part, and the time at which a batch has run them."""
    is_error = generator.random(count) < 0.004
    prompts = (20 + generator.gamma(2.0, 40.0, count)).astype(np.int32)
    new = np.where(generator.random(count) < 0.3, 128, generator.integers(4, 128, count))
    new = np.where(is_error, 0, new).astype(np.int32)
    decode = np.maximum(new - 1, 0) * generator.normal(0.021, 0.001, count) * (1 + prompts / 2000)
    prefill = prompts * generator.normal(4e-4, 4e-5, count)
    starts = clock + np.cumsum((prefill + decode) / BATCH_SIZE)
    ran = ~is_error
    index = np.arange(first, first + count)
    null = pa.array(is_error)

    def where_ran(values: np.ndarray[Any, Any]) -> pa.Array:
        return pa.array(values, mask=is_error)

    tokens = generator.integers(0, 50257, int(new.sum())).astype(np.int32)
    reasons = np.where(new == 128, "max_new_tokens", "end_of_text")
    columns: dict[str, Any] = {
        "prompt_id": [f"row-{row:07d}" for row in index],
        "prompt_index": index,
        "sample_index": np.zeros(count, np.int32),
        "prompt": pool.take(pa.array(generator.integers(0, len(pool), count))),
        "completion": pa.compute.if_else(
            null, None, pool.take(pa.array(generator.integers(0, len(pool), count)))
        ),
        "completion_token_ids": pa.ListArray.from_arrays(
            pa.array(np.concatenate([[0], np.cumsum(new)]).astype(np.int32)), pa.array(tokens)
        ),
        "finish_reason": np.where(is_error, "error", np.where(new == 128, "length", "stop")),
        "stop_reason": where_ran(reasons),
        "error": pa.array(
            [f"the prompt has {1025 + row} tokens, more than n_positions (1024)" for row in index],
            mask=ran,
        ),
        "prompt_tokens": prompts,
        "completion_tokens": new,
        "prompt_tokens_dropped": np.zeros(count, np.int32),
        "seed": generator.integers(0, 2**63 - 1, count),
        "temperature": np.full(count, 0.8),
        "top_k": np.full(count, 40, np.int32),
        "top_p": np.ones(count),
        "min_p": np.zeros(count),
        "max_new_tokens": np.full(count, 128, np.int32),
        "min_decision_margin": where_ran(generator.lognormal(-4.0, 1.6, count)),
        "queue_s": where_ran(generator.gamma(2.0, 1.5, count)),
        "prefill_s": where_ran(prefill),
        "decode_s": where_ran(decode),
        "started_at": pa.array((starts * 1e6).astype(np.int64), mask=is_error),
        "cached_tokens": where_ran((prompts * (generator.random(count) < 0.4) // 2).astype("i4")),
    }
    arrays = [
        pa.array(columns[name]).cast(type_) if name in columns else pa.nulls(count, type_)
        for name, type_ in zip(SCHEMA.names, SCHEMA.types, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA), float(starts[-1])


def _changed(table: pa.Table, generator: np.random.Generator, share: float) -> pa.Table:
    """Return a table in which some rows have another token and another text."""
    rows = table.to_pylist()
    for row in rows:
        tokens = row["completion_token_ids"]
        if tokens and generator.random() < share:
            at = int(generator.integers(0, len(tokens)))
            tokens[at] = (tokens[at] + 1) % 50257
            text = row["completion"]
            place = len(text) * at // len(tokens)
            row["completion"] = text[:place] + " another" + text[place:]
            row["min_decision_margin"] *= 1e-3
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def measure(*outputs: Path, html: Path) -> dict[str, Any]:
    """Run the command, and return its seconds, peak memory in MB and the size of the file."""
    command = [sys.executable, "-m", "gptbatch", "report", *map(str, outputs), "--html", str(html)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the command failed: {' '.join(command)}")
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mb": round(usage.ru_maxrss / 1024),
        "html_kb": round(html.stat().st_size / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--part-rows", type=int, default=512)
    parser.add_argument("--keep", type=Path, help="folder for the runs, used again if it has them")
    parser.add_argument("--two", action="store_true", help="compare two runs")
    parser.add_argument("--only-write", action="store_true", help="write the runs, measure nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        outputs = [folder / "a", folder / "b"][: 1 + arguments.two]
        for path, changed in zip(outputs, (0.0, 0.02), strict=False):
            if not path.exists():
                write_run(path, arguments.rows, arguments.part_rows, changed=changed)
        if arguments.only_write:
            return
        found = {"rows": arguments.rows, **measure(*outputs, html=folder / "report.html")}
    print(f"{found['seconds']} s, {found['peak_mb']} MB, {found['html_kb']} KB of HTML")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
