"""A recorded run brought back to life: its settings, tokenizer and weights loaded again, its rows as the network takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.config import EngineConfig, JobConfig
from gptbatch.pipeline.errors import ModelError, OutputConflictError
from gptbatch.pipeline.input.config_hash import special_token_identity
from gptbatch.pipeline.input.tokenize import prompt_tokenizer
from gptbatch.pipeline.input.tokenizer import LoadedTokenizer
from gptbatch.pipeline.input.tokenizer_loading import file_digest, load_tokenizer
from gptbatch.pipeline.model.checkpoint import Checkpoint, find_checkpoint
from gptbatch.pipeline.model.config import GPTConfig, parse_config
from gptbatch.pipeline.model.loading import LoadedModel, load_model, resolve_device
from gptbatch.pipeline.output.folder import CONFIG, WORK
from gptbatch.pipeline.output.json_models import validated
from gptbatch.pipeline.output.manifest import MANIFEST
from gptbatch.pipeline.output.schema import FORMAT
from gptbatch.pipeline.system.bundled import locate
from gptbatch.pipeline.types import SAMPLING_SETTINGS, SamplingParams

_FILES_OF_OLD_DIGESTS = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
)  # runs from before transformers' way was followed


_RANGES = {name: (setting.minimum, setting.maximum) for name, setting in SAMPLING_SETTINGS.items()}
_RANGES["prompt_tokens_dropped"] = (0, 2**31 - 1)


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What is taken otherwise than recorded; None takes it as recorded. model: a folder or hub name of the same weights.

    allow_pickle: read pickled weights; what the folder says of it does not count, as anybody may have written it. threads: None takes
    what torch finds, whatever the run took, since bits do not depend on it.
    """

    model: str | None = None
    allow_pickle: bool = False
    allow_other_weights: bool = False
    device: str | None = None
    threads: int | None = None


class LoadedRun:
    """A run whose checkpoint has been found again. The network is loaded when it is first asked for.

    Raises ModelError when the weights or the tokenizer are not those of the run, OutputConflictError when its settings cannot be
    read.
    """

    def __init__(self, run: RunReader, overrides: Overrides) -> None:
        self.run = run
        try:
            recorded = validated(JobConfig, run.config)
        except ValueError as error:
            raise OutputConflictError(
                f"{run.path / WORK / CONFIG}: {error}; it was changed, or another version of gptbatch wrote it"
            ) from error
        self.is_older = run.manifest["format"] != FORMAT
        changes: dict[str, Any] = {"engine": _engine(recorded.engine, run.facts, overrides)}
        if "add_special_tokens" not in run.config:
            changes["add_special_tokens"] = False  # the run is from before there was a template
        self.config = recorded.model_copy(update=changes)
        self.checkpoint, tokenizer = self._find_checkpoint(overrides)
        self.gpt_config: GPTConfig = parse_config(
            self.checkpoint.config, str(self.checkpoint.config_path)
        )
        self.tokenizer = prompt_tokenizer(self.config, self.checkpoint.special_tokens, tokenizer)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The weights, loaded and checked on this machine."""
        engine = self.config.engine
        return load_model(
            self.checkpoint,
            self.gpt_config,
            engine,
            resolve_device(engine),
            batch_invariance="auto",
        )

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Token ids that end a row; empty if none was to."""
        return () if self.config.ignore_eos else self.checkpoint.special_tokens.ends

    def reasons_bits_may_differ(self) -> list[str]:
        """Why bits here may differ from those recorded; empty when they must not."""
        recorded: dict[str, Any] = self.run.facts.get("environment", {})
        reasons = [
            f"{key} differs"
            for key, value in self.loaded.environment.items()
            if recorded.get(key) != value
            and not (key == "self_test_digest" and recorded.get(key) is None)
        ]
        batch_invariance = self.run.facts.get("batch_invariance")
        if batch_invariance == "off":
            reasons.append("the run skipped the start-up check (batch_invariance: off)")
        elif batch_invariance != "verified":
            reasons.append("the machine of the run did not pass the start-up check")
        if len(self.run.environments) > 1:
            reasons.append("its parts were made in more than one way")
        if self.loaded.batch_invariance != "verified":
            reasons.append("this machine does not pass the start-up check")
        identity = self.run.manifest["identity"]
        if self.checkpoint.model_digest != identity["model_digest"]:
            reasons.append("the weights differ")
        return reasons

    def prompt_token_ids(self, rows: Sequence[dict[str, Any]]) -> list[tuple[list[int], str]]:
        """The token ids of each row's prompt as the network saw them, and why they cannot be those, "" when they can."""
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
        for name, (least, most) in _RANGES.items():
            if not least <= row[name] <= most:
                return f"its {name} is {row[name]}"
        if len(token_ids) != row["prompt_tokens"]:
            return f"its prompt is {len(token_ids)} tokens, but prompt_tokens is {row['prompt_tokens']}"
        if not 1 <= len(token_ids) <= n_positions:
            return f"its prompt is {len(token_ids)} tokens; 1 to n_positions ({n_positions}) fit the context"
        if max(token_ids) >= vocab_size:
            return f"its prompt holds token {max(token_ids)}, which the model (vocab_size {vocab_size}) does not have"
        return ""

    def _find_checkpoint(self, overrides: Overrides) -> tuple[Checkpoint, LoadedTokenizer]:
        identity = self.run.manifest["identity"]
        for key in ("model_digest", "tokenizer_digest"):
            if key not in identity:
                raise OutputConflictError(
                    f"{self.run.path / MANIFEST}: identity.{key} is missing; the run does not say which weights it used"
                )
        name = overrides.model or recorded_model(self.run)
        try:
            checkpoint = find_checkpoint(
                name, revision=self.config.revision, allow_pickle=overrides.allow_pickle
            )
        except ModelError as error:
            if overrides.model is None and not locate(name).exists():
                raise ModelError(
                    f"the run's checkpoint is not where it was; name a copy of it with --model ({error})"
                ) from error
            raise
        tokenizer = load_tokenizer(checkpoint.folder)
        if identity["tokenizer_digest"] not in (
            tokenizer.digest,
            file_digest(checkpoint.folder, _FILES_OF_OLD_DIGESTS),
        ):
            raise ModelError(
                f"{name}: its tokenizer is not the run's (by digest); name a copy of the run's checkpoint with --model"
            )
        for key, value in special_token_identity(checkpoint, tokenizer).items():
            if key in identity and identity[key] != value:  # earlier versions did not record them
                raise ModelError(
                    f"{name}: its {key} is {value}, the run's {identity[key]!r:.200}; name a copy of the run's checkpoint with --model, "
                    "generation_config.json included"
                )
        if (
            checkpoint.model_digest != identity["model_digest"]
            and not overrides.allow_other_weights
        ):
            raise ModelError(
                f"{name}: its weights are not the run's (by digest); name a copy of the run's checkpoint with --model, or say "
                "--allow-other-weights to compare with these"
            )
        return checkpoint, tokenizer


def recorded_model(run: RunReader) -> str:
    """The checkpoint that a run names: its folder where it is still there, else what the settings say."""
    path = run.facts.get("model_path")
    return str(path if path and Path(path).is_dir() else run.config.get("model"))


def row_params(row: dict[str, Any]) -> SamplingParams:
    """The parameters that a row was generated with."""
    return SamplingParams(**{name: row[name] for name in SAMPLING_SETTINGS})


def _engine(recorded: EngineConfig, facts: dict[str, Any], overrides: Overrides) -> EngineConfig:
    """As recorded, with the attention backend that was used, if it can be had here."""
    backend = facts.get("environment", {}).get("attention")
    changes: dict[str, Any] = {
        "attention": "padded" if backend == "padded" else "auto",
        "threads": overrides.threads,
    }
    if overrides.device is not None:
        changes["device"] = overrides.device
    return recorded.model_copy(update=changes)
