"""estimate_job: predict the time, memory and disk of a run. Writes nothing.

1. count   rows and tokens that are left, exactly
2. pilot   some rows for some seconds on the engine of the run
3. fit     the time of a step (step_cost.py) and the lengths of completions (lengths.py)
4. walk    the scheduler's steps of all rows, or of a sample
5. sum     the expected work and the most, times its cost; a bootstrap gives the range
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from gptbatch.pipeline.bench.measure import measure_reading
from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.estimate.forecast import Forecast, TimeEstimate, forecast
from gptbatch.pipeline.estimate.pilot import Pilot, run_pilot
from gptbatch.pipeline.estimate.resources import (
    MemoryEstimate,
    estimate_memory,
    find_disk_warning,
    find_row_warnings,
    find_warnings,
    resident_bytes,
)
from gptbatch.pipeline.estimate.step_cost import WORK, r_squared
from gptbatch.pipeline.estimate.walk import Batching
from gptbatch.pipeline.estimate.workload import Workload, count_workload
from gptbatch.pipeline.job import CheckedJob, Job, check_job, find_job
from gptbatch.pipeline.model.loading import LoadedModel, load_model, resolve_device
from gptbatch.pipeline.output.kept_parts import find_kept_parts, numbers_to_inspect
from gptbatch.pipeline.output.resume import check_same_input
from gptbatch.pipeline.output.row_runner import make_engine
from gptbatch.pipeline.output.shards import find_shard
from gptbatch.pipeline.system.nouns import noun

# the output of a job without one: nothing can be there
NO_OUTPUT = f"{os.devnull}/out"
# float32 elements to measure memory with: 256 MiB, more than a cache holds
ELEMENTS_READ = 2**26
# Below it, the fit of the pilot's steps is worth a warning.
MIN_R_SQUARED = 0.5
# The fit has four costs, so that it explains a few steps in any case.
MIN_STEPS_OF_R_SQUARED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotReport:
    """What the pilot has measured.

    Attributes:
        seconds: Seconds of its steps.
        steps: Number of its steps.
        rows: Rows that it has begun.
        rows_stopped: Rows among them that stopped by themselves.
        step_cost: Seconds per unit of work of a step; see `step_cost.WORK`.
        r_squared: Share of the variance between steps that these explain. None for fewer than
            MIN_STEPS_OF_R_SQUARED steps.
    """

    seconds: float
    steps: int
    rows: int
    rows_stopped: int
    step_cost: dict[str, float]
    r_squared: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEstimate:
    """What a run will take.

    Attributes:
        output: The output folder; None without one.
        rows_total: Rows of this run's parts.
        rows: Rows among them that are left; the others are written.
        samples: Samples of the rows that reach the model.
        error_kinds: Number of rows left that become errors before the model runs, by kind.
        prompt_tokens: Prompt tokens of all samples.
        prompt_tokens_median: Prompt tokens of the median row.
        prompt_tokens_max: Prompt tokens of the longest row.
        new_tokens: Expected new tokens.
        new_tokens_limit: New tokens if every row reaches max_new_tokens.
        parts: Parts that are left.
        part_rows: Rows per part.
        batch_size: The most rows that run at once.
        mean_batch_size: Expected rows per step, before the end.
        time: The predicted seconds. None if no row is left that reaches the model.
        price: Price of the times expected_s, low_s, high_s and limit_s, by these names. None
            without `--price-per-hour`.
        memory: The predicted bytes. None if no row is left that reaches the model.
        disk_bytes: Size of the parts.
        kill_rows: Rows that a kill typically costs at most: those of one part, and those that the
            engine holds, which finish out of order.
        kill_s: Expected seconds to generate them.
        pilot: The measurements of the pilot. None if no row is left that reaches the model.
        warnings: A sentence each.
    """

    output: str | None
    rows_total: int
    rows: int
    samples: int = 0
    error_kinds: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    prompt_tokens_median: int = 0
    prompt_tokens_max: int = 0
    new_tokens: int = 0
    new_tokens_limit: int = 0
    parts: int = 0
    part_rows: int = 0
    batch_size: int | None = None
    mean_batch_size: float | None = None
    time: TimeEstimate | None = None
    price: dict[str, float] | None = None
    memory: MemoryEstimate | None = None
    disk_bytes: int | None = None
    kill_rows: int | None = None
    kill_s: float | None = None
    pilot: PilotReport | None = None
    warnings: list[str] = field(default_factory=list)


def estimate_job(
    config: JobConfig,
    *,
    seconds: float = 20.0,
    price_per_hour: float | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> RunEstimate:
    """Predict what `run_job` would take with this config, here and now.

    Args:
        config: The settings of the job. With a shard, its parts. The output NO_OUTPUT stands for a
            new run in any folder.
        seconds: Seconds of the pilot.
        price_per_hour: Price of an hour of this machine, in any currency.
        report: Receives a line per step of the work.

    Raises:
        GptbatchError: The errors that `run_job` raises before its first row.
    """
    began_s = time.monotonic()
    shard = find_shard(config.shard, os.environ)
    job = find_job(config, shard, "predicted")
    output = None if config.output == NO_OUTPUT else config.output
    if output is not None:
        job.folder.check_creatable()
    resolve_device(config.engine)
    checked = check_job(job)
    check_s = time.monotonic() - began_s
    share = shard.parts(checked.plan.n_parts)
    kept = _kept_parts(job, checked, share)
    parts = [number for number in share if number not in kept]
    if output is not None and parts:
        job.folder.check_writable()
    rows = sum(checked.plan.rows_of(number) for number in parts)
    report(f"tokenizing {rows:,} {noun(rows, 'row')}")
    work = count_workload(checked.prompts, checked.summary, parts, report)
    checked.prompts.log_warnings()
    lengths = sorted(work.prompt_lengths.elements())
    counted = RunEstimate(
        output=output,
        rows_total=sum(checked.plan.rows_of(number) for number in share),
        rows=rows,
        samples=work.n_samples,
        error_kinds=dict(sorted(work.error_kinds.items())),
        prompt_tokens=work.prompt_tokens,
        prompt_tokens_median=lengths[len(lengths) // 2] if lengths else 0,
        prompt_tokens_max=lengths[-1] if lengths else 0,
        new_tokens_limit=work.max_new_tokens,
        parts=len(parts),
        part_rows=checked.plan.part_rows,
        warnings=find_row_warnings(work),
    )
    if not work.n_rows:
        return counted
    report(f"loading {config.model}")
    began_s = time.monotonic()
    loaded = load_model(
        job.checkpoint,
        checked.prompts.gpt_config,
        config.engine,
        resolve_device(config.engine),
        batch_invariance=config.batch_invariance,
    )
    start_s = check_s + time.monotonic() - began_s
    pilot, batching = _run_pilot(checked, work, loaded, seconds, report)
    predicted = forecast(
        pilot,
        work,
        batching,
        checked.prompts,
        context_s=_seconds_per_cached_token(loaded),
        start_s=start_s,
    )
    rows_held = (batching.batch_size + batching.max_waiting) * work.n_rows // work.n_samples
    return _with_prediction(
        replace(counted, kill_rows=min(rows, counted.part_rows + rows_held)),
        pilot,
        predicted,
        price_per_hour,
        memory=estimate_memory(
            loaded,
            resident_bytes(),
            work,
            batching,
            pilot.written.memory_bytes * _tokens_per_row(work, predicted),
            counted.part_rows,
        ),
        warnings=find_warnings(checked.prompts, work, loaded, batching, predicted.mean_batch_size),
    )


def _seconds_per_cached_token(loaded: LoadedModel) -> float:
    """Return the time of reading the keys and values of one token from memory."""
    rate = measure_reading(loaded.model.device, n_elements=ELEMENTS_READ) * 1e9
    return loaded.model.cache_spec.bytes_per_token / rate


def _tokens_per_row(work: Workload, predicted: Forecast) -> float:
    """Return the prompt and new tokens of a row of the input, with all of its samples."""
    return (work.prompt_tokens + predicted.new_tokens) / work.n_rows


def _with_prediction(
    counted: RunEstimate,
    pilot: Pilot,
    predicted: Forecast,
    price_per_hour: float | None,
    *,
    memory: MemoryEstimate,
    warnings: list[str],
) -> RunEstimate:
    took, cost = predicted.time, predicted.cost
    written, tokens = pilot.written, counted.prompt_tokens + predicted.new_tokens
    assert counted.kill_rows is not None
    disk_bytes = round(written.file_bytes * tokens + written.bytes_per_file * counted.parts)
    warnings = [*counted.warnings, *warnings]
    if counted.output is not None and (warning := find_disk_warning(counted.output, disk_bytes)):
        warnings.append(warning)
    explained = None
    if len(pilot.seconds) >= MIN_STEPS_OF_R_SQUARED:
        explained = r_squared(pilot.work, pilot.seconds, cost)
    if explained is not None and explained < MIN_R_SQUARED:
        warnings.append(
            f"the work of the pilot's {len(pilot.seconds)} steps explains little of their times "
            f"(R2 {explained:z.2f}), so the time may be off by more than its range"
        )
    return replace(
        counted,
        new_tokens=predicted.new_tokens,
        batch_size=pilot.batch_size,
        mean_batch_size=round(predicted.mean_batch_size, 1),
        time=took,
        price=None
        if price_per_hour is None
        else {
            name: round(value / 3600 * price_per_hour, 4)
            for name, value in asdict(took).items()
            if name != "start_s"
        },
        memory=memory,
        disk_bytes=disk_bytes,
        kill_s=(took.expected_s - took.start_s) * counted.kill_rows / counted.rows,
        pilot=PilotReport(
            seconds=float(pilot.seconds.sum()),
            steps=len(pilot.seconds),
            rows=len(pilot.observed),
            rows_stopped=sum(row.stopped for row in pilot.observed),
            step_cost=dict(zip(WORK, cost.tolist(), strict=True)),
            r_squared=explained,
        ),
        warnings=warnings,
    )


def _kept_parts(job: Job, checked: CheckedJob, share: range) -> set[int]:
    """Return the numbers of the parts that a run of this share keeps."""
    state, plan = job.continued, checked.plan
    if state is None:
        return set()
    check_same_input(job.config, state, checked.summary)
    files = job.folder.inspect_parts(
        state, job.hashes, numbers_to_inspect(state, share, plan.n_parts)
    )
    return set(find_kept_parts(files, plan).parts)


def _run_pilot(
    checked: CheckedJob,
    work: Workload,
    loaded: LoadedModel,
    seconds: float,
    report: Callable[[str], None],
) -> tuple[Pilot, Batching]:
    """Run the pilot. Returns how the run will schedule, too."""
    from gptbatch.pipeline.engine.engine import Engine, SchedulingOptions

    config = checked.prompts.config
    n_samples = checked.summary.rows * checked.summary.max_n
    batch_size = max(1, min(loaded.batch_size(config.engine.batch_size), n_samples))
    memory = loaded.cache_memory_bytes(config.engine.memory_gib)

    def new_engine(size: int) -> Engine:
        # Rows start in the order of the pilot, not the longest first.
        scheduling = SchedulingOptions(max_waiting=0)
        return make_engine(config, checked.prompts, loaded, size, scheduling)

    report(f"pilot of {seconds:g} s at batch size {batch_size}")
    pilot = run_pilot(new_engine, work.sampled, batch_size, seconds, checked.prompts.tokenizer)
    engine = make_engine(config, checked.prompts, loaded, pilot.batch_size)
    backend, spec = loaded.model.backend, loaded.model.cache_spec
    capacity = memory // spec.bytes_per_token if memory is not None and backend.paged else None
    return pilot, Batching(
        batch_size=pilot.batch_size,
        max_waiting=engine.max_waiting,
        step_tokens=engine.scheduling.step_tokens,
        n_positions=spec.config.n_positions,
        n_blocks=spec.n_blocks(pilot.batch_size, capacity),
        block_size=spec.block_size,
        interleave_prefill=backend.interleaves_prefill,
        share_prefixes=backend.paged,
        slide=config.window_full == "slide",
    )
