"""Memory of a run, and warnings about its settings and this machine."""

from __future__ import annotations

import os
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

from gptbatch.pipeline.engine.row_adjustments import RowAdjustments
from gptbatch.pipeline.engine.sampling import kept_set_size
from gptbatch.pipeline.estimate.walk import Batching
from gptbatch.pipeline.estimate.workload import Workload
from gptbatch.pipeline.input.tokenize import TokenizedInput
from gptbatch.pipeline.kernels.huge_pages import memory_of_ranges
from gptbatch.pipeline.kv_cache.block_pool import blocks_for
from gptbatch.pipeline.kv_cache.spec import KVCacheSpec
from gptbatch.pipeline.model.lm_head import MAX_HEAD_ROWS
from gptbatch.pipeline.model.loading import LoadedModel, threads_to_use
from gptbatch.pipeline.output.part_runner import max_parts_in_flight
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.storage.location import location_of
from gptbatch.pipeline.system.machine import describe_cores
from gptbatch.pipeline.system.nouns import noun

FLOAT32_BYTES = 4
# Fewer rows per step than this share of the batch size are worth a warning.
SMALL_BATCH = 0.8
# Settings of fewer rows cost nothing worth a warning.
MIN_SHARE = 0.02
# Parts with finished rows at one time: the rows that run span two, as a rule.
TYPICAL_PARTS_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes of the process.

    Attributes:
        expected_bytes: The sum, with the cache of the running rows and the rows of two parts.
        limit_bytes: The sum, with all that the cache may keep and the rows of all parts in flight.
        process_bytes: Weights, libraries and the rest of the process.
        weights_bytes: The weights among these, in the layout of the kernels.
        cache_bytes: Keys and values of the running rows at their longest, on whole huge pages where
            the system has these.
        cache_limit_bytes: The same with the prefixes of finished rows, which stay while they fit.
        cache_bytes_per_token: Keys and values of one token.
        logits_bytes: The logits of a step.
        rows_bytes: Rows that wait for their part.
        rows_limit_bytes: The most of these.
    """

    expected_bytes: int
    limit_bytes: int
    process_bytes: int
    weights_bytes: int
    cache_bytes: int
    cache_limit_bytes: int
    cache_bytes_per_token: int
    logits_bytes: int
    rows_bytes: int
    rows_limit_bytes: int


def estimate_memory(
    loaded: LoadedModel,
    process_bytes: int,
    work: Workload,
    batching: Batching,
    row_bytes: float,
    part_rows: int,
) -> MemoryEstimate:
    """Return the memory of a run.

    Args:
        loaded: The model.
        process_bytes: Of the process after the pilot, without its cache.
        work: The rows.
        batching: How the run schedules.
        row_bytes: Of a row that waits for its part.
        part_rows: Rows per part.
    """
    spec, size = loaded.model.cache_spec, batching.block_size
    longest = sorted(
        (
            min(
                batching.n_positions,
                len(prompt.token_ids) + prompt.prompt.params.max_new_tokens,
            )
            for prompt in work.sampled
        ),
        reverse=True,
    )[: batching.batch_size]
    running = sum(blocks_for(length, size) for length in longest)
    kept = blocks_for(work.prompt_tokens, size) if batching.share_prefixes else 0
    rows = batching.batch_size + batching.max_waiting
    cache = _cache_bytes(spec, running, batching.n_blocks)
    cache_limit = _cache_bytes(spec, running + kept, batching.n_blocks)
    logits = min(batching.batch_size, MAX_HEAD_ROWS) * spec.config.vocab_size * FLOAT32_BYTES
    rows_held = min(work.n_rows, TYPICAL_PARTS_IN_FLIGHT * part_rows) * row_bytes
    rows_limit = min(work.n_rows, max_parts_in_flight(rows, part_rows) * part_rows) * row_bytes
    return MemoryEstimate(
        expected_bytes=round(process_bytes + cache + logits + rows_held),
        limit_bytes=round(process_bytes + cache_limit + logits + rows_limit),
        process_bytes=process_bytes,
        weights_bytes=loaded.model.weights_bytes(),
        cache_bytes=cache,
        cache_limit_bytes=cache_limit,
        cache_bytes_per_token=spec.bytes_per_token,
        logits_bytes=logits,
        rows_bytes=round(rows_held),
        rows_limit_bytes=round(rows_limit),
    )


def _cache_bytes(spec: KVCacheSpec, n_used: int, n_blocks: int) -> int:
    """Return the memory of a KV cache of which the first `n_used` blocks are written."""
    used = min(n_used, n_blocks) * spec.block_size * spec.bytes_per_token
    if not (spec.backend.paged and spec.device.type == "cpu"):
        return used
    # The blocks of a head are neighbours; see `PagedKVCache`.
    n_layer, n_head = spec.config.n_layer, spec.config.n_head
    head_block_bytes = spec.block_size * spec.bytes_per_token // (n_layer * n_head)
    return n_layer * memory_of_ranges(
        min(n_used, n_blocks) * head_block_bytes, n_blocks * head_block_bytes, n_head
    )


def resident_bytes() -> int:
    """Return the memory of this process."""
    try:
        resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        # No Linux: the most so far, in bytes on macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident * os.sysconf("SC_PAGE_SIZE")


def find_row_warnings(work: Workload) -> list[str]:
    """Return how many rows become error rows, or lose tokens."""
    found = []
    for kind, count in sorted(work.error_kinds.items()):
        advice = "; context_overflow: truncate_left cuts them" if kind == "too_long" else ""
        what = noun(count, "row will be an error row", "rows will be error rows")
        found.append(f"{count:,} {what}: {kind}{advice}")
    if work.truncated:
        whose = noun(work.truncated, "prompt loses its", "prompts lose their")
        found.append(f"{work.truncated:,} {whose} first tokens (context_overflow)")
    return found


def find_warnings(
    prompts: TokenizedInput,
    work: Workload,
    loaded: LoadedModel,
    batching: Batching,
    mean_batch_size: float,
) -> list[str]:
    """Return what makes the run slower than it need be."""
    found = _costs_of_settings(prompts, work, loaded)
    requested = min(loaded.batch_size(prompts.config.engine.batch_size), work.n_samples)
    if batching.batch_size < requested:
        found.append(
            f"memory limits the batch size to {batching.batch_size}, instead of {requested}"
        )
    elif work.n_samples > 4 * requested and mean_batch_size < SMALL_BATCH * requested:
        found.append(
            f"the KV cache holds about {mean_batch_size:.0f} rows of this length at once, not "
            f"{requested}; a larger memory_gib or a smaller max_new_tokens lets more run"
        )
    if loaded.model.device.type == "cpu":
        threads = threads_to_use(prompts.config.engine.threads)
        if shared := describe_cores(threads):
            found.append(f"the cores are shared, and the estimate includes that: {shared}")
    return found


def _costs_of_settings(prompts: TokenizedInput, work: Workload, loaded: LoadedModel) -> list[str]:
    params = [prompt.prompt.params for prompt in work.sampled]
    vocab_size = loaded.model.config.vocab_size
    found = []
    many = sum(kept_set_size(row, vocab_size) == vocab_size for row in params)
    if many > MIN_SHARE * len(params):
        found.append(
            f"{_share(many, len(params))} sample from the whole vocabulary (top_k: 0), which needs "
            "all logits and more noise than top_k: 40"
        )
    if loaded.model.two_pass_head is None:
        return found
    if prompts.config.record_logits_digest:
        found.append("record_logits_digest needs all logits, and turns the two-pass LM head off")
    masked = sum(_needs_all_logits(row) for row in params)
    if masked > MIN_SHARE * len(params):
        found.append(
            f"{_share(masked, len(params))} have penalties, masks or log probabilities, which turn "
            "the two-pass LM head off"
        )
    return found


def _needs_all_logits(params: SamplingParams) -> bool:
    return params.logprobs is not None or RowAdjustments.are_needed(params)


def _share(count: int, total: int) -> str:
    return "all rows" if count == total else f"{count:,} of {total:,} rows"


def find_disk_warning(output: str, disk_bytes: int) -> str | None:
    """Return a warning if the file system of the output has less space than that."""
    path = location_of(output)
    if not isinstance(path, Path):
        return None
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if free > disk_bytes:
        return None
    return f"{path} has {free / 2**30:.1f} GiB free, less than the parts need"
