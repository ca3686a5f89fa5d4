"""run_job: one job from config to a complete output folder. The one place that sees data, generation and gpt.

    1. find the checkpoint, read its config.json, open the tokenizer
    2. read all rows once and check them                              (65, 66: nothing has been loaded or written)
    3. look at the output folder: complete already, or another job's? (78) Can it be written? (73)
    4. load the model, and check that its bits do not depend on the batch (network.py)
    5. rows -> token ids -> engine -> rows of a part -> files
    6. manifest, _SUCCESS

Heavy libraries are imported where they are used: a complete output is recognised without torch.
"""

from __future__ import annotations

import logging
import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.config import JobConfig
from pipeline.data.completions import to_row
from pipeline.data.output_folder import OutputFolder
from pipeline.data.parts import PartWriter
from pipeline.data.prompts import InputSummary
from pipeline.errors import OutputConflictError
from pipeline.job import Job
from pipeline.network import Network, load_network, resolve_device
from pipeline.records import Completion

if TYPE_CHECKING:
    from pipeline.generation.engine import Engine

logger = logging.getLogger("gptbatch")


class Progress(Protocol):
    """Who watches a run. Called often: must be quick."""

    def begin(self, total_rows: int) -> None: ...

    def update(self, *, rows: int, errors: int, completion_tokens: int) -> None:
        """All counts are since `begin`."""

    def end(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a run did. `skipped` rows were there already; all other counts, times and rates are this run's."""

    output: str
    rows: int
    ok: int
    errors: int
    skipped: int
    prompt_tokens: int
    completion_tokens: int
    load_s: float
    generate_s: float
    wall_s: float
    tokens_per_s: float
    device: str
    dtype: str
    numerics: str
    fingerprint: str


def run_job(config: JobConfig, progress: Progress | None = None) -> RunSummary:
    """Run a job to the end and say what was done. Raises GptbatchError (see errors.py for the kinds)."""
    began = time.monotonic()
    output = OutputFolder(Path(config.output))
    manifest = output.manifest()
    job = Job(config)
    summary = job.reader.check()
    identity = job.identity(summary)
    if manifest is not None and not config.overwrite:
        output.check_identity(manifest, identity)
        if output.is_complete(manifest):
            _check_machine(config, manifest)
            return _nothing_to_do(config, manifest, time.monotonic() - began)
    device = resolve_device(config.engine)
    logger.info("%d rows checked; loading %s on %s as %s", summary.rows, config.model, device, config.engine.dtype)
    output.create()
    load_began = time.monotonic()
    network = load_network(job.checkpoint, job.gpt_config, config.engine, device, numerics=config.numerics)
    engine = _engine(config, job, network, summary)
    load_s = time.monotonic() - load_began
    logger.info("loaded in %.1f s; up to %d rows at a time; numerics %s", load_s, engine.batch_size, network.numerics)
    if manifest is not None and config.overwrite:
        output.clear()
    output.begin(config.to_yaml(), identity)
    facts = _run_facts(job, network, identity)
    writer = PartWriter(output.path, output.work, part_rows=config.part_rows, total_rows=summary.rows, facts=facts)
    generate_began = time.monotonic()
    counts = _generate(job, engine, writer, progress, summary)
    generate_s = time.monotonic() - generate_began
    logger.info("%d rows in %d parts written in %.1f s", counts.rows, len(writer.parts), generate_s)
    output.complete({"identity": identity, **facts, "rows": counts.rows, "errors": counts.errors}, writer.parts)
    return RunSummary(
        output=config.output,
        rows=counts.rows,
        ok=counts.rows - counts.errors,
        errors=counts.errors,
        skipped=0,
        prompt_tokens=counts.prompt_tokens,
        completion_tokens=counts.completion_tokens,
        load_s=round(load_s, 3),
        generate_s=round(generate_s, 3),
        wall_s=round(time.monotonic() - began, 3),
        tokens_per_s=round(counts.completion_tokens / generate_s, 1) if generate_s > 0 else 0.0,
        device=str(network.model.device),
        dtype=config.engine.dtype,
        numerics=facts["numerics"],
        fingerprint=identity["fingerprint"],
    )


@dataclass
class _Counts:
    rows: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def _engine(config: JobConfig, job: Job, network: Network, summary: InputSummary) -> Engine:
    from pipeline.generation.engine import Engine

    return Engine(
        model=network.model,
        batch_size=max(1, min(config.engine.batch_size, summary.rows)),
        end_of_text=None if config.ignore_eos else job.gpt_config.end_of_text,
        window_full=config.window_full,
        record_logits=config.record_logits_digest,
    )


def _generate(job: Job, engine: Engine, writer: PartWriter, progress: Progress | None, summary: InputSummary) -> _Counts:
    counts = _Counts()

    def write(completion: Completion) -> None:
        failed = completion.finish_reason == "error"
        text = None if failed else job.tokenizer.completion_text(completion.token_ids, completion.finish_reason)
        writer.add(to_row(completion, text))
        counts.rows += 1
        counts.errors += failed
        counts.prompt_tokens += completion.prompt_tokens
        counts.completion_tokens += len(completion.token_ids)

    if progress is not None:
        progress.begin(summary.rows)
    try:
        for ended in engine.generate(job.tokenized(summary, reject=write)):
            for completion in ended:
                write(completion)
            if progress is not None:
                progress.update(rows=counts.rows, errors=counts.errors, completion_tokens=engine.stats.new_tokens)
    finally:
        if progress is not None:
            progress.end()
    writer.close()
    return counts


def _run_facts(job: Job, network: Network, identity: dict[str, Any]) -> dict[str, Any]:
    """What the manifest and each part's footer say of the run."""
    config = job.config
    return {
        "fingerprint": identity["fingerprint"],
        "model": config.model,
        "model_path": str(job.checkpoint.folder.resolve()),
        "model_digest": identity["model_digest"],
        "tokenizer_digest": identity["tokenizer_digest"],
        "input": config.input if config.input is not None else f"{config.dataset}[{config.split}]",
        "input_digest": identity["input_digest"],
        "dtype": config.engine.dtype,
        "device": str(network.model.device),
        "numerics": network.numerics,
        "profile": network.profile,
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("gptbatch", "torch", "tokenizers", "datasets", "pyarrow", "numpy")},
        },
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _check_machine(config: JobConfig, manifest: dict[str, Any]) -> None:
    """Raises OutputConflictError when a complete run was made in another way than is asked for now."""
    recorded = manifest["profile"]["attention"]
    if config.engine.attention not in ("auto", recorded):
        raise OutputConflictError(
            f"{config.output}: holds a complete run with engine.attention {recorded}, not {config.engine.attention}; "
            "name another output, or use --overwrite"
        )
    if config.numerics == "exact" and manifest["numerics"] != "exact":
        raise OutputConflictError(
            f"{config.output}: holds a complete run whose numerics are {manifest['numerics']}, not exact; "
            "name another output, or use --overwrite"
        )


def _nothing_to_do(config: JobConfig, manifest: dict[str, Any], wall_s: float) -> RunSummary:
    return RunSummary(
        output=config.output,
        rows=0,
        ok=0,
        errors=0,
        skipped=manifest["rows"],
        prompt_tokens=0,
        completion_tokens=0,
        load_s=0.0,
        generate_s=0.0,
        wall_s=round(wall_s, 3),
        tokens_per_s=0.0,
        device=manifest["device"],
        dtype=manifest["dtype"],
        numerics=manifest["numerics"],
        fingerprint=manifest["fingerprint"],
    )
