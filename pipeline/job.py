"""A job before it runs: its checkpoint, tokenizer and input have been found, its rows can be checked and tokenized.

Knows: config and data. Does not know: the network. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.advice import describe_errors
from pipeline.config import JobConfig
from pipeline.data.checkpoint import Checkpoint, find_checkpoint
from pipeline.data.generation_config import SpecialTokens
from pipeline.data.output_folder import OutputFolder
from pipeline.data.prompts import BadRow, InputSummary, PromptReader, RowDefaults, open_source
from pipeline.data.rows import RowSource
from pipeline.data.tokenizer import EncodedPrompt, PromptTokenizer
from pipeline.data.tokenizer_files import LoadedTokenizer, load_tokenizer
from pipeline.errors import ModelError
from pipeline.gpt.config import GPTConfig, parse_config
from pipeline.placement import check_placement
from pipeline.records import NOISE_VERSION, Completion, Prompt, RowError, TokenizedPrompt
from pipeline.resume import check_same_input, kept_state, part_rows_of

logger = logging.getLogger("gptbatch")

TOKENIZE_ROWS = 256
_SPECIAL_TEXT = "prompts with the text of a special token: %d; it is plain text there, parse_special takes it as the token"
_UNKNOWN_TEXT = "prompts with text that the tokenizer has no token for: %d; its token for unknown text stands there"
_LOST_TEXT = "prompts with characters that the tokenizer drops: %d; they run without these (on_lost_text: warn)"
_ADDED_AFTER = "prompts that the tokenizer's template adds tokens after, as an end of text: %d; add_special_tokens: false leaves them out"

# config keys that change tokens, besides the checkpoint and the input
_TOKEN_KEYS = (
    "seed",
    "temperature",
    "top_k",
    "max_new_tokens",
    "ignore_eos",
    "prompt_field",
    "id_field",
    "metadata_field",
    "parse_special",
    "add_special_tokens",
    "on_lost_text",
    "context_overflow",
    "window_full",
)


def job_identity(config: JobConfig, checkpoint: Checkpoint, tokenizer: LoadedTokenizer) -> dict[str, Any]:
    """All that makes two runs the same job, its input aside; `fingerprint` hashes the part of it that changes tokens of a given row."""
    tokens = {
        "model_digest": checkpoint.model_digest,
        "tokenizer_digest": tokenizer.digest,
        **special_token_identity(checkpoint, tokenizer),
        "dtype": config.engine.dtype,
        "cache_dtype": config.engine.cache_dtype,
        "noise_version": NOISE_VERSION,
    } | {key: getattr(config, key) for key in _TOKEN_KEYS}
    fingerprint = hashlib.sha256(json.dumps(tokens, sort_keys=True).encode()).hexdigest()
    return {"fingerprint": fingerprint, **tokens, "record_logits_digest": config.record_logits_digest}


def special_token_identity(checkpoint: Checkpoint, tokenizer: LoadedTokenizer) -> dict[str, Any]:
    """The start token and the end tokens, by their names in the identity of a job."""
    special = checkpoint.special_tokens
    return {"start_token": _start_token(special, tokenizer), "end_tokens": list(special.ends)}


class Job:
    """A config whose checkpoint and input have been found, and its tokenizer. Nothing heavy is loaded and nothing written."""

    def __init__(
        self,
        config: JobConfig,
        checkpoint: Checkpoint | None = None,
        source: RowSource | None = None,
        tokenizer: LoadedTokenizer | None = None,
    ) -> None:
        self.config = config
        self.checkpoint = checkpoint or find_checkpoint(config.model, revision=config.revision, allow_pickle=config.allow_pickle)
        self.gpt_config: GPTConfig = parse_config(self.checkpoint.config, str(self.checkpoint.config_path))
        self.special_tokens = self.checkpoint.special_tokens
        for warning in self.checkpoint.generation_warnings:
            logger.warning("%s", warning)
        self.tokenizer = prompt_tokenizer(config, self.special_tokens, tokenizer or load_tokenizer(self.checkpoint.folder))
        self._check_template()
        self._warned_rows: Counter[str] = Counter()
        self.reader = PromptReader(
            source=source or find_source(config),
            limit=config.limit,
            record_bad=config.on_bad_row == "record",
            defaults=RowDefaults(
                prompt_field=config.prompt_field,
                id_field=config.id_field,
                metadata_fields=frozenset(config.metadata_field),
                seed=config.seed,
                temperature=config.temperature,
                top_k=config.top_k,
                max_new_tokens=config.max_new_tokens,
            ),
        )

    def tokenized(
        self,
        summary: InputSummary,
        *,
        reject: Callable[[Completion], object],
        parts: Collection[int] | None = None,
        may_start: Callable[[int], bool] = lambda number: True,
    ) -> Iterator[TokenizedPrompt | None]:
        """The prompts of these parts (by number; None takes all) as the engine takes them; None stands for "not now".

        Rows that the engine cannot take are given to `reject` as error rows. may_start: asked before the first row of each part, and
        again while it says no.
        """
        rows = self.reader.prompts(summary, parts)
        current = -1
        while batch := list(islice(rows, TOKENIZE_ROWS)):
            read_s = time.monotonic()
            texts = [row.text if isinstance(row, Prompt) else "" for row in batch]
            for row, encoded in zip(batch, self.tokenizer.encode(texts), strict=True):
                number = row.index // summary.part_rows
                while number != current:
                    if may_start(number):
                        current = number
                    else:
                        yield None
                if isinstance(row, BadRow):
                    params = self.reader.defaults.params(row.prompt_id)
                    prompt = Prompt(index=row.index, prompt_id=row.prompt_id, text="", params=params, metadata=None)
                    reject(_error_row(prompt, 0, RowError(kind="bad_row", reason=row.reason)))
                    continue
                kept, error = self._fit(row, encoded)
                self._count_warnings(encoded, error)
                count = len(encoded.token_ids)
                if error is None:
                    yield TokenizedPrompt(prompt=row, token_ids=kept, tokens_dropped=count - len(kept), read_s=read_s)
                else:
                    reject(_error_row(row, count, error))

    def warn_of_texts(self) -> None:
        """Warn, once per kind, of prompts that may not have become the tokens that their author meant."""
        for warning, rows in sorted(self._warned_rows.items()):
            logger.warning(warning, rows)
        self._warned_rows.clear()

    def _check_template(self) -> None:
        """Raises ModelError where every row would be an error: the template adds a token that the model lacks."""
        vocab_size = self.gpt_config.vocab_size
        if lacking := [token for token in self.tokenizer.template_tokens if token >= vocab_size]:
            raise ModelError(
                f"{self.config.model}: the tokenizer's template adds {self.tokenizer.name(lacking[0])!r} (token {lacking[0]}) to every "
                f"prompt, which the model (vocab_size {vocab_size}) does not have; add_special_tokens: false leaves the template out"
            )

    def _count_warnings(self, encoded: EncodedPrompt, error: RowError | None) -> None:
        if encoded.has_special_text:
            self._warned_rows[_SPECIAL_TEXT] += 1
        if error is None and encoded.has_unknown:
            self._warned_rows[_UNKNOWN_TEXT] += 1
        if error is None and encoded.lost:
            self._warned_rows[_LOST_TEXT] += 1
        if error is None and self.tokenizer.adds_after:
            self._warned_rows[_ADDED_AFTER] += 1

    def _fit(self, prompt: Prompt, encoded: EncodedPrompt) -> tuple[list[int], RowError | None]:
        """The tokens of a prompt that go into the context, or why none do."""
        n_positions, vocab_size = self.gpt_config.n_positions, self.gpt_config.vocab_size
        if prompt.prompt_id in self.config.skip_row:
            return [], RowError(kind="skipped", reason="skipped by skip_row")
        token_ids = encoded.token_ids
        if encoded.problem:
            return [], RowError(kind="unencodable", reason=f"the prompt cannot be encoded: {encoded.problem}")
        if encoded.lost and self.config.on_lost_text == "error":
            reason = f"the tokenizer drops {encoded.lost} of the prompt's {len(prompt.text)} characters; on_lost_text: warn runs the rest"
            return [], RowError(kind="unencodable", reason=reason)
        if not token_ids:
            return [], RowError(kind="empty_prompt", reason="the prompt is empty, and the checkpoint names no token to start from")
        if max(token_ids) >= vocab_size:
            reason = f"the prompt holds token {max(token_ids)}, which the model (vocab_size {vocab_size}) does not have"
            return [], RowError(kind="unknown_token", reason=reason)
        if len(token_ids) <= n_positions:
            return token_ids, None
        if self.config.context_overflow == "error":
            reason = f"the prompt has {len(token_ids)} tokens, more than n_positions ({n_positions})"
            return [], RowError(kind="too_long", reason=reason)
        return token_ids[-max(1, n_positions - prompt.params.max_new_tokens + 1) :], None


def prompt_tokenizer(config: JobConfig, special_tokens: SpecialTokens, tokenizer: LoadedTokenizer) -> PromptTokenizer:
    """The tokenizer as a job's settings want it."""
    return PromptTokenizer(
        tokenizer,
        start_token=_start_token(special_tokens, tokenizer),
        parse_special=config.parse_special,
        add_special_tokens=config.add_special_tokens,
    )


def _start_token(special_tokens: SpecialTokens, tokenizer: LoadedTokenizer) -> int | None:
    """What an empty prompt starts from: BOS as the model's files name it, else as the tokenizer's do, else the first end token."""
    candidates = (special_tokens.start, tokenizer.bos_token, *special_tokens.ends)
    return next((token for token in candidates if token is not None), None)


def find_source(config: JobConfig) -> RowSource:
    """The source that a config names. Raises InputNotFoundError for a file that is not there."""
    return open_source(
        path=config.input,
        dataset=config.dataset,
        dataset_config=config.dataset_config,
        split=config.split,
        dataset_revision=config.dataset_revision,
        csv_delimiter=config.csv_delimiter,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class InputReport:
    """What a dry run says of an input. Prompt lengths are in tokens; too_long counts prompts above n_positions.

    bad_rows: rows that on_bad_row records as errors. error_kinds: rows that end as errors before the network sees them, by kind.
    """

    rows: int
    bad_rows: int
    error_kinds: dict[str, int]
    prompt_tokens: int
    prompt_tokens_min: int
    prompt_tokens_median: int
    prompt_tokens_max: int
    n_positions: int
    too_long: int
    max_new_tokens: int
    input_digest: str


def inspect_job(config: JobConfig) -> InputReport:
    """A dry run: check the output, and every row, and count its tokens. Loads no model and writes nothing.

    Raises what the run would raise before it loads the model.
    """
    check_placement(config)
    folder = OutputFolder(Path(config.output))
    folder.check_creatable()
    checkpoint = find_checkpoint(config.model, revision=config.revision, allow_pickle=config.allow_pickle)
    parse_config(checkpoint.config, str(checkpoint.config_path))  # before a tokenizer that takes seconds to make
    tokenizer = load_tokenizer(checkpoint.folder)
    job = Job(config, checkpoint, tokenizer=tokenizer)
    kept = kept_state(config, folder, lambda: job_identity(config, checkpoint, tokenizer))
    counts = [] if kept is None else [kept.identity.get("rows") or 0]
    summary = job.reader.check(part_rows=part_rows_of(config, kept), counts=counts, must_hold=config.skip_row)
    if kept is not None:
        check_same_input(config, kept, summary)
    lengths = array("q")
    errors: Counter[str] = Counter()

    def reject(completion: Completion) -> None:
        assert completion.error is not None
        lengths.append(completion.prompt_tokens)
        errors[completion.error.kind] += 1

    for prompt in job.tokenized(summary, reject=reject):
        if prompt is not None:
            lengths.append(len(prompt.token_ids) + prompt.tokens_dropped)
    if said := describe_errors(errors, summary.rows):
        logger.warning("a run would record errors: %s", said)
    job.warn_of_texts()
    ordered = sorted(lengths)
    n_positions = job.gpt_config.n_positions
    return InputReport(
        rows=summary.rows,
        bad_rows=summary.bad_rows,
        error_kinds=dict(sorted(errors.items())),
        prompt_tokens=sum(ordered),
        prompt_tokens_min=ordered[0] if ordered else 0,
        prompt_tokens_median=ordered[len(ordered) // 2] if ordered else 0,
        prompt_tokens_max=ordered[-1] if ordered else 0,
        n_positions=n_positions,
        too_long=sum(length > n_positions for length in ordered),
        max_new_tokens=config.max_new_tokens,
        input_digest=summary.digest,
    )


def _error_row(prompt: Prompt, prompt_tokens: int, error: RowError) -> Completion:
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
