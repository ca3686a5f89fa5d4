"""LoadedRun: a recorded run with its checkpoint found again, to compute its rows again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.config import EngineConfig, JobConfig
from gptbatch.pipeline.engine.bad_words import BadWords
from gptbatch.pipeline.engine.row_adjustments import RowAdjustments
from gptbatch.pipeline.engine.stopping import StopRule
from gptbatch.pipeline.errors import ModelError, OutputConflictError
from gptbatch.pipeline.input.config_hash import special_token_identity
from gptbatch.pipeline.input.tokenize import (
    prompt_tokenizer,
    setting_problem,
    token_bytes_of_model,
)
from gptbatch.pipeline.input.tokenizer import LoadedTokenizer
from gptbatch.pipeline.input.tokenizer_loading import file_digest, load_tokenizer
from gptbatch.pipeline.model.checkpoint import Checkpoint, find_checkpoint
from gptbatch.pipeline.model.config import GPTConfig, parse_config
from gptbatch.pipeline.model.loading import LoadedModel, load_model, resolve_device
from gptbatch.pipeline.output.environment import environment_differences
from gptbatch.pipeline.output.folder import CONFIG, WORK
from gptbatch.pipeline.output.json_models import validated
from gptbatch.pipeline.output.manifest import MANIFEST
from gptbatch.pipeline.output.schema import FORMAT
from gptbatch.pipeline.params.sampling_params import SamplingParams, from_row
from gptbatch.pipeline.system.bundled import locate
from gptbatch.pipeline.types import BATCH_INVARIANT

# The files in the tokenizer digest of outputs from before gptbatch loaded tokenizers like
# transformers.
_FILES_OF_OLD_DIGESTS = ("tokenizer.json", "vocab.json", "merges.txt")

MAX_TOKENS_DROPPED = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """Settings that replace those of the run; None keeps the recorded one.

    Attributes:
        model: A folder or hub name of the same weights.
        allow_pickle: Read pickled weights. The recorded setting is ignored, because anyone may have
            written the folder.
        allow_other_weights: Accept weights with another digest.
        device: "cpu" or "cuda". None takes a CPU for portable runs.
        threads: CPU threads. None takes the default of torch, not the recorded number: bits do not
            depend on it.
    """

    model: str | None = None
    allow_pickle: bool = False
    allow_other_weights: bool = False
    device: str | None = None
    threads: int | None = None


class LoadedRun:
    """A run whose checkpoint is found. The model is loaded at the first use of `loaded`.

    Args:
        run: The run.
        overrides: Settings that replace those of the run.

    Attributes:
        run: The run.
        is_older: Whether an older version wrote the run.
        config: Its settings, with the overrides.
        checkpoint: Its checkpoint.
        gpt_config: The architecture of the model.
        tokenizer: The tokenizer, with the run's settings.

    Raises:
        ModelError: The weights or the tokenizer are not those of the run.
        OutputConflictError: The recorded settings cannot be read.
    """

    def __init__(self, run: RunReader, overrides: Overrides) -> None:
        self.run = run
        try:
            recorded = validated(JobConfig, run.config)
        except ValueError as error:
            raise OutputConflictError(
                f"{run.path / WORK / CONFIG}: {error}; it was changed, or another version of "
                "gptbatch wrote it"
            ) from error
        self.is_older = run.manifest["format"] != FORMAT
        changes: dict[str, Any] = {"engine": _engine(recorded.engine, run.facts, overrides)}
        if "add_special_tokens" not in run.config:
            # The version that wrote the run did not apply the tokenizer's template.
            changes["add_special_tokens"] = False
        self.config = recorded.model_copy(update=changes)
        self.checkpoint, tokenizer = self._find_checkpoint(overrides)
        self.gpt_config: GPTConfig = parse_config(
            self.checkpoint.config, str(self.checkpoint.config_path)
        )
        self.tokenizer = prompt_tokenizer(self.config, self.checkpoint.special_tokens, tokenizer)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model on this machine, after the self-test."""
        engine = self.config.engine
        return load_model(
            self.checkpoint,
            self.gpt_config,
            engine,
            resolve_device(engine),
            batch_invariance="auto",
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Token ids that end a row; empty with ignore_eos."""
        return () if self.config.ignore_eos else self.checkpoint.special_tokens.eos_token_ids

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token of the model; empty unless tokens are bytes of text."""
        return token_bytes_of_model(self.tokenizer, self.gpt_config)

    @cached_property
    def stop_rule(self) -> StopRule:
        """What ends the rows of the run."""
        return StopRule(
            eos_token_ids=self.eos_token_ids,
            n_positions=self.gpt_config.n_positions,
            window_full=self.config.window_full,
            token_bytes=self.token_bytes,
        )

    def setting_problem(self, params: SamplingParams) -> str:
        """Return which setting the model or its tokenizer cannot follow; "" for none."""
        return params.problem() or setting_problem(
            params, self.gpt_config, has_token_bytes=bool(self.token_bytes)
        )

    def row_adjustments(
        self, params: SamplingParams, prompt_token_ids: Sequence[int]
    ) -> RowAdjustments | None:
        """Return the adjustments of a row's logits, before its first step; None for none."""
        if not RowAdjustments.are_needed(params):
            return None
        return RowAdjustments(params, prompt_token_ids, self.stop_rule, self._bad_words)

    @cached_property
    def _bad_words(self) -> BadWords:
        return BadWords(self.token_bytes)

    def reasons_bits_may_differ(self) -> list[str]:
        """Return why bits computed here may differ from the recorded ones; empty for no reason."""
        batch_invariance = self.run.facts.get("batch_invariance")
        here = {
            "environment": self.loaded.environment,
            "batch_invariance": self.loaded.batch_invariance,
        }
        if self.run.facts.get("environment") == {}:
            # An input without rows: nothing ran.
            return []
        reasons = [
            f"{key} differs"
            for key, (before, _) in environment_differences(self.run.facts, here).items()
            # The reasons below say more.
            if key != "batch_invariance"
            and not (batch_invariance == "off" and key in ("arithmetic", "self_test_digest"))
            and not (key == "self_test_digest" and before is None)
        ]
        if batch_invariance == "off":
            reasons.append("the run skipped the self-test (batch_invariance: off)")
        elif batch_invariance not in BATCH_INVARIANT:
            reasons.append("the machine of the run did not pass the self-test")
        if len(self.run.environments) > 1:
            reasons.append("its parts were computed in several environments")
        if self.loaded.batch_invariance not in BATCH_INVARIANT:
            reasons.append("this machine does not pass the self-test")
        identity = self.run.manifest["identity"]
        if self.checkpoint.model_digest != identity["model_digest"]:
            reasons.append("the weights differ")
        return reasons

    def prompt_token_ids(self, rows: Sequence[dict[str, Any]]) -> list[tuple[list[int], str]]:
        """Return the token ids of each row's prompt, and why the run cannot have used them, or "".

        Args:
            rows: Rows of the run.
        """
        encoded = self.tokenizer.encode([row["prompt"] or "" for row in rows])
        kept = [
            prompt.token_ids[row["prompt_tokens_dropped"] :]
            for row, prompt in zip(rows, encoded, strict=True)
        ]
        return [
            (token_ids, self._prompt_problem(row, token_ids))
            for row, token_ids in zip(rows, kept, strict=True)
        ]

    def _prompt_problem(self, row: dict[str, Any], token_ids: list[int]) -> str:
        n_positions, vocab_size = self.gpt_config.n_positions, self.gpt_config.vocab_size
        if row["prompt"] is None:
            return "it has no prompt"
        try:
            params = from_row(row)
        except ValueError as error:
            return str(error)
        if problem := self.setting_problem(params):
            return problem
        if not 0 <= row["prompt_tokens_dropped"] <= MAX_TOKENS_DROPPED:
            return f"its prompt_tokens_dropped is {row['prompt_tokens_dropped']}"
        if len(token_ids) != row["prompt_tokens"]:
            return (
                f"its prompt is {len(token_ids)} tokens, but prompt_tokens is "
                f"{row['prompt_tokens']}"
            )
        if not 1 <= len(token_ids) <= n_positions:
            return (
                f"its prompt is {len(token_ids)} tokens; 1 to n_positions ({n_positions}) fit the "
                "context"
            )
        if max(token_ids) >= vocab_size:
            return (
                f"its prompt holds token {max(token_ids)}, which the model (vocab_size "
                f"{vocab_size}) does not have"
            )
        return ""

    def _find_checkpoint(self, overrides: Overrides) -> tuple[Checkpoint, LoadedTokenizer]:
        identity = self.run.manifest["identity"]
        for key in ("model_digest", "tokenizer_digest"):
            if key not in identity:
                raise OutputConflictError(
                    f"{self.run.path / MANIFEST}: identity.{key} is missing; the run does not say "
                    "which weights it used"
                )
        name = overrides.model or recorded_model(self.run)
        try:
            checkpoint = find_checkpoint(
                name, revision=self.config.revision, allow_pickle=overrides.allow_pickle
            )
        except ModelError as error:
            if overrides.model is None and not locate(name).exists():
                raise ModelError(
                    "the run's checkpoint is not where it was; name a copy of it with --model "
                    f"({error})"
                ) from error
            raise
        tokenizer = load_tokenizer(checkpoint.folder)
        if identity["tokenizer_digest"] not in (
            tokenizer.digest,
            file_digest(checkpoint.folder, _FILES_OF_OLD_DIGESTS),
        ):
            raise ModelError(
                f"{name}: its tokenizer is not the run's (by digest); name a copy of the run's "
                "checkpoint with --model"
            )
        for key, value in special_token_identity(self.config, checkpoint, tokenizer).items():
            if key in identity and identity[key] != value:  # earlier versions did not record them
                raise ModelError(
                    f"{name}: its {key} is {value}, the run's {identity[key]!r:.200}; name a copy "
                    "of the run's checkpoint with --model, "
                    "generation_config.json included"
                )
        if (
            checkpoint.model_digest != identity["model_digest"]
            and not overrides.allow_other_weights
        ):
            raise ModelError(
                f"{name}: its weights are not the run's (by digest); name a copy of the run's "
                "checkpoint with --model, or say "
                "--allow-other-weights to compare with these"
            )
        return checkpoint, tokenizer


def recorded_model(run: RunReader) -> str:
    """Return the checkpoint of a run: its folder if that still exists, else the setting."""
    path = run.facts.get("model_path")
    return str(path if path and Path(path).is_dir() else run.config.get("model"))


def _engine(recorded: EngineConfig, facts: dict[str, Any], overrides: Overrides) -> EngineConfig:
    """Return the recorded settings with the overrides and with the attention of the run."""
    backend = facts.get("environment", {}).get("attention")
    changes: dict[str, Any] = {
        "attention": "padded" if backend == "padded" else "auto",
        "threads": overrides.threads,
    }
    if overrides.device is not None:
        changes["device"] = overrides.device
    elif facts.get("batch_invariance") == "portable":
        # Only there the comparison is exact.
        changes["device"] = "cpu"
    return recorded.model_copy(update=changes)
