"""RunSummary: the result of a run, the last line on standard output. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gptbatch.pipeline.config import JobConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a run did.

    Attributes:
        output: The output folder.
        rows: Rows of the input that this run has generated, those with an error included.
        ok: Rows of the input without an error.
        errors: Rows of the input with an error, in at least one sample.
        rows_kept: Rows that the output, or the run's shard, already held.
        complete: Whether the output holds all rows now. False after a shard, while others run.
        rows_capped: Rows of this run whose max_new_tokens is more than the context leaves.
        batch_size_halvings: How often memory was too small for the batch.
        samples: Rows of the table that this run has written: n per row of the input.
        prompt_tokens: Tokens of the prompts of all samples.
        completion_tokens: Tokens that this run has generated.
        load_s: Seconds to load the model.
        generate_s: Seconds to generate and write the rows, as in progress.json.
        wall_s: Seconds of the whole run.
        tokens_per_s: completion_tokens / generate_s.
        device: "cpu" or "cuda"; "unknown" where the output does not record it.
        dtype: Type of weights and activations.
        batch_invariance: "portable", "verified", "unverified" or "off".
        config_hash: Hash of all settings that decide tokens.
    """

    output: str
    rows: int
    ok: int
    errors: int
    rows_kept: int
    complete: bool
    rows_capped: int
    batch_size_halvings: int
    samples: int
    prompt_tokens: int
    completion_tokens: int
    load_s: float
    generate_s: float
    wall_s: float
    tokens_per_s: float
    device: str
    dtype: str
    batch_invariance: str
    config_hash: str


def summarize_complete_output(
    config: JobConfig, manifest: dict[str, Any], wall_s: float
) -> RunSummary:
    """Return the summary of a run whose output already held every row.

    Args:
        config: The settings of the job.
        manifest: The manifest of the output.
        wall_s: Seconds of the run.
    """
    return RunSummary(
        output=config.output,
        rows=0,
        samples=0,
        ok=0,
        errors=0,
        rows_kept=manifest.get("rows", 0),
        complete=manifest.get("complete", True),
        rows_capped=0,
        batch_size_halvings=0,
        prompt_tokens=0,
        completion_tokens=0,
        load_s=0.0,
        generate_s=0.0,
        wall_s=round(wall_s, 3),
        tokens_per_s=0.0,
        device=manifest.get("device") or "unknown",
        dtype=manifest.get("dtype") or "unknown",
        batch_invariance=manifest.get("batch_invariance") or "unknown",
        config_hash=manifest["identity"]["config_hash"],
    )
