"""A job before it runs: its checkpoint, tokenizer and input have been found, its rows can be checked and tokenized.

Knows: config and data. Does not know: the network. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipeline.config import JobConfig
from pipeline.data.checkpoint import Checkpoint, find_checkpoint
from pipeline.data.prompts import InputSummary, PromptReader, RowDefaults, open_source
from pipeline.data.tokenizer import PromptTokenizer
from pipeline.gpt.config import GPTConfig, parse_config
from pipeline.records import NOISE_VERSION, Completion, Prompt, TokenizedPrompt

TOKENIZE_ROWS = 256
# config keys that change tokens, besides the checkpoint and the input
_TOKEN_KEYS = (
    "seed",
    "temperature",
    "top_k",
    "max_new_tokens",
    "ignore_eos",
    "prompt_field",
    "parse_special",
    "context_overflow",
    "window_full",
)


class Job:
    """A config whose checkpoint, tokenizer and input have been found. Nothing heavy is loaded and nothing written."""

    def __init__(self, config: JobConfig) -> None:
        self.config = config
        self.checkpoint: Checkpoint = find_checkpoint(config.model, revision=config.revision, allow_pickle=config.allow_pickle)
        self.gpt_config: GPTConfig = parse_config(self.checkpoint.config, str(self.checkpoint.config_path))
        self.tokenizer = PromptTokenizer(
            self.checkpoint.folder,
            end_of_text=self.gpt_config.end_of_text,
            parse_special=config.parse_special,
            vocab_size=self.gpt_config.vocab_size,
        )
        source = open_source(
            path=config.input,
            dataset=config.dataset,
            dataset_config=config.dataset_config,
            split=config.split,
            dataset_revision=config.dataset_revision,
        )
        self.reader = PromptReader(
            source=source,
            limit=config.limit,
            defaults=RowDefaults(
                prompt_field=config.prompt_field,
                seed=config.seed,
                temperature=config.temperature,
                top_k=config.top_k,
                max_new_tokens=config.max_new_tokens,
            ),
        )

    def identity(self, summary: InputSummary) -> dict[str, Any]:
        """All that makes two runs the same job; `fingerprint` hashes the part of it that changes tokens of a given row."""
        tokens = {
            "model_digest": self.checkpoint.model_digest,
            "tokenizer_digest": self.checkpoint.tokenizer_digest,
            "dtype": self.config.engine.dtype,
            "noise_version": NOISE_VERSION,
        } | {key: getattr(self.config, key) for key in _TOKEN_KEYS}
        fingerprint = hashlib.sha256(json.dumps(tokens, sort_keys=True).encode()).hexdigest()
        return {
            "fingerprint": fingerprint,
            **tokens,
            "input_digest": summary.digest,
            "rows": summary.rows,
            "part_rows": self.config.part_rows,
            "record_logits_digest": self.config.record_logits_digest,
        }

    def tokenized(self, summary: InputSummary, reject: Callable[[Completion], None]) -> Iterator[TokenizedPrompt]:
        """All prompts as the engine takes them; those that it cannot take are given to `reject` as error rows."""
        prompts = self.reader.prompts(summary)
        while batch := list(islice(prompts, TOKENIZE_ROWS)):
            read_s = time.monotonic()
            for prompt, token_ids in zip(batch, self.tokenizer.encode([prompt.text for prompt in batch]), strict=True):
                kept, error = self._fit(prompt, token_ids)
                if error is None:
                    yield TokenizedPrompt(prompt=prompt, token_ids=kept, tokens_dropped=len(token_ids) - len(kept), read_s=read_s)
                else:
                    reject(_error_row(prompt, len(token_ids), error))

    def _fit(self, prompt: Prompt, token_ids: list[int]) -> tuple[list[int], str | None]:
        """The tokens of a prompt that go into the context, or why none do."""
        n_positions = self.gpt_config.n_positions
        if not token_ids:
            return [], "the prompt is empty, and the checkpoint has no end-of-text token to start from"
        if max(token_ids) >= self.gpt_config.vocab_size:
            return [], f"the prompt holds token {max(token_ids)}, which the model (vocab_size {self.gpt_config.vocab_size}) does not have"
        if len(token_ids) <= n_positions:
            return token_ids, None
        if self.config.context_overflow == "error":
            return [], f"the prompt has {len(token_ids)} tokens, more than n_positions ({n_positions})"
        return token_ids[-max(1, n_positions - prompt.params.max_new_tokens + 1) :], None


@dataclass(frozen=True, slots=True, kw_only=True)
class InputReport:
    """What a dry run says of an input. Prompt lengths are in tokens; too_long counts prompts above n_positions."""

    rows: int
    prompt_tokens: int
    prompt_tokens_min: int
    prompt_tokens_median: int
    prompt_tokens_max: int
    n_positions: int
    too_long: int
    max_new_tokens: int
    input_digest: str


def inspect_job(config: JobConfig) -> InputReport:
    """A dry run: check every row and count its tokens. Loads no model and writes nothing."""
    job = Job(config)
    summary = job.reader.check()
    lengths = array("q")
    for prompt in job.tokenized(summary, lambda completion: lengths.append(completion.prompt_tokens)):
        lengths.append(len(prompt.token_ids) + prompt.tokens_dropped)
    ordered = sorted(lengths)
    n_positions = job.gpt_config.n_positions
    return InputReport(
        rows=summary.rows,
        prompt_tokens=sum(ordered),
        prompt_tokens_min=ordered[0] if ordered else 0,
        prompt_tokens_median=ordered[len(ordered) // 2] if ordered else 0,
        prompt_tokens_max=ordered[-1] if ordered else 0,
        n_positions=n_positions,
        too_long=sum(length > n_positions for length in ordered),
        max_new_tokens=config.max_new_tokens,
        input_digest=summary.digest,
    )


def _error_row(prompt: Prompt, prompt_tokens: int, error: str) -> Completion:
    return Completion(
        prompt=prompt,
        prompt_tokens=prompt_tokens,
        prompt_tokens_dropped=0,
        token_ids=[],
        finish_reason="error",
        stop_reason=None,
        error=error,
        timing=None,
    )
