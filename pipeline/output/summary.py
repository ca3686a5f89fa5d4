"""What a run says of itself when it has ended: the last line on standard output. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gptbatch.pipeline.config import JobConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a run did. `rows_kept` rows were there already; all other counts, times and rates are this run's."""

    output: str
    rows: int
    ok: int
    errors: int
    rows_kept: int
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
    """Of a run that found everything there. manifest: of the output."""
    return RunSummary(
        output=config.output,
        rows=0,
        ok=0,
        errors=0,
        rows_kept=manifest.get("rows", 0),
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
