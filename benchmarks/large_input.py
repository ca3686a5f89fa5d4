"""Times and memory of an input of many rows in many files, apart from the model.

    python benchmarks/large_input.py [--rows 10000000] [--files 40] [--write-rows 1000000]

Makes files of tiny rows, and then measures, each in a process of its own:

    plan     gptbatch plan --index: read and check all rows, write the index
    shard    the first of ten shards of it: count all rows, check a tenth of them
    join     the last one: the same, and join the pieces
    again    the same once more: the index is found
    seek     read the index, and the first row of the last part
    write    write the parts of the first --write-rows rows, with empty completions
    finish   gptbatch finish of these parts, whose hashes are recorded
    unknown  the same without records: the content of each part is read

Prints seconds and peak memory of each; the last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gptbatch.pipeline import JobConfig, plan_job
from gptbatch.pipeline.input.open_input import open_input
from gptbatch.pipeline.input.prompt_reader import PromptReader
from gptbatch.pipeline.input.rows import BadRow
from gptbatch.pipeline.output.claim import claim
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.finish_folder import finish_folder
from gptbatch.pipeline.output.folder import DIGESTS, WORK, OutputFolder
from gptbatch.pipeline.output.index_file import INDEX, read_index
from gptbatch.pipeline.output.local_run import LocalRunFolder
from gptbatch.pipeline.output.part_plan import PartPlan
from gptbatch.pipeline.output.part_writer import PartWriter
from gptbatch.pipeline.output.schema import FORMAT
from gptbatch.pipeline.storage.atomic_write import FileWriter
from gptbatch.pipeline.types import Completion, Prompt, Sample


def job(folder: Path, **more: Any) -> JobConfig:
    """Return the job; its model is never loaded."""
    return JobConfig(
        model="none", input=str(folder / "in"), output=str(folder / "out"), max_new_tokens=1, **more
    )


def make_input(folder: Path, rows: int, files: int) -> None:
    """Write files of rows with ids."""
    (folder / "in").mkdir()
    for number in range(files):
        with (folder / "in" / f"{number:03d}.jsonl").open("w") as file:
            for index in range(rows * number // files, rows * (number + 1) // files):
                file.write(f'{{"id": "row {index}", "prompt": "{index}"}}\n')


def plan(folder: Path, limit: int) -> dict[str, Any]:
    """Check all rows, or find the index."""
    found = plan_job(job(folder))
    return {"rows": found.rows, "parts": found.parts, "part_rows": found.part_rows}


def plan_shard(folder: Path, limit: int) -> dict[str, Any]:
    """Check a tenth of the rows."""
    config = job(folder, shard="0/10").model_copy(update={"output": str(folder / "shards")})
    return {"complete": plan_job(config).complete}


def join(folder: Path, limit: int) -> dict[str, Any]:
    """Check the last tenth of the rows, and join the pieces."""
    config = job(folder, shard="9/10").model_copy(update={"output": str(folder / "shards")})
    return {"complete": plan_job(config).complete}


def seek(folder: Path, limit: int) -> dict[str, Any]:
    """Read the first row of the last part."""
    reader: PromptReader = open_input(job(folder))
    index = read_index(OutputFolder(folder / "out").work / INDEX)
    assert index is not None
    row = next(reader.prompts(index, [len(index.part_digests) - 1]))
    return {"row": row.index}


def write(folder: Path, limit: int) -> dict[str, Any]:
    """Write parts as a run does, without a model."""
    config = job(folder, limit=limit)
    reader = open_input(config)
    summary = reader.check()
    output = OutputFolder(folder / "parts")
    output.create()
    identity = {
        "config_hash": "0" * 64,
        "rows": summary.rows,
        "part_rows": summary.part_rows,
        "input_digest": summary.digest,
    }
    facts = {"format": FORMAT, "identity": identity, "environment": {}}
    hashes = FileHashes()
    with LocalRunFolder(folder / "parts" / WORK) as run:
        claim(output, run.writer, config.to_yaml(), facts)
        parts = PartWriter(
            output.path,
            run.writer,
            hashes,
            plan=PartPlan(identity=identity, input_digests=summary.part_digests),
            facts=facts,
        )
        rows = reader.prompts(summary)
        for number in range(len(summary.part_digests)):
            found = [completion_of(row) for row in islice(rows, summary.part_rows)]
            part = parts.write(number, [[Sample(done, "")] for done in found])
            run.record(part, parts.sha256_of(part))
    return {"rows": summary.rows, "parts": len(summary.part_digests)}


def completion_of(row: Prompt | BadRow) -> Completion:
    """Return a completion of one token."""
    assert not isinstance(row, BadRow)
    return Completion(
        prompt=row,
        prompt_tokens=1,
        prompt_tokens_dropped=0,
        token_ids=[1],
        finish_reason="length",
        stop_reason="max_new_tokens",
        error=None,
        timing=None,
    )


def finish(folder: Path, limit: int) -> dict[str, Any]:
    """Finish the parts."""
    return {"parts": finish_folder(folder / "parts").parts}


def finish_without_records(folder: Path, limit: int) -> dict[str, Any]:
    """Finish the parts after all records are lost."""
    work = folder / "parts" / WORK
    FileWriter(work).remove(work / DIGESTS)
    shutil.rmtree(work / "runs")
    return {"parts": finish_folder(folder / "parts").parts}


STEPS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "plan": plan,
    "shard": plan_shard,
    "join": join,
    "again": plan,
    "seek": seek,
    "write": write,
    "finish": finish,
    "unknown": finish_without_records,
}


def measure(step: str, folder: Path, limit: int, result: Connection) -> None:
    """Run one step in this process, and send its time, peak memory and outcome."""
    before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.perf_counter()
    found = STEPS[step](folder, limit)
    seconds = time.perf_counter() - began
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result.send(
        {
            "seconds": round(seconds, 2),
            "peak_mib": round(peak_mib),
            "more_than_imports_mib": round(peak_mib - before_mib),
            **found,
        }
    )


def main() -> None:
    """Run all steps and print what they give."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--write-rows", type=int, default=1_000_000)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_input(folder, args.rows, args.files)
        # Files that are younger than the clock of the file system ticks are read again.
        time.sleep(2.5)
        for step in STEPS:
            if step == "join":
                for index in range(1, 9):
                    config = job(folder, shard=f"{index}/10")
                    plan_job(config.model_copy(update={"output": str(folder / "shards")}))
            ours, theirs = context.Pipe()
            process = context.Process(target=measure, args=(step, folder, args.write_rows, theirs))
            process.start()
            theirs.close()
            results[step] = ours.recv()
            process.join()
            print(step, results[step], flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
