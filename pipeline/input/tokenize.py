"""Tokenizes an input: each row becomes a TokenizedPrompt, or an error row of the output."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.errors import ConfigError, ModelError
from gptbatch.pipeline.input.chat_template import check_chat_template
from gptbatch.pipeline.input.config_hash import message_end_token, start_token
from gptbatch.pipeline.input.message_tokenizer import MessageTokenizer
from gptbatch.pipeline.input.prompt_reader import InputSummary, PromptReader
from gptbatch.pipeline.input.rows import BadRow, sample_seed
from gptbatch.pipeline.input.tokenizer import EncodedText, LoadedTokenizer, PromptTokenizer
from gptbatch.pipeline.model.checkpoint import Checkpoint
from gptbatch.pipeline.model.config import GPTConfig, parse_config
from gptbatch.pipeline.model.generation_config import SpecialTokens
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.system.threads import Worker
from gptbatch.pipeline.types import Completion, Prompt, RowError, TokenizedPrompt

logger = logging.getLogger("gptbatch")

# Rows per call of the tokenizers library. One more call is ahead.
TOKENIZE_ROWS = 128
_SPECIAL_TEXT = (
    "prompts with the text of a special token: %d; it is plain text there, parse_special takes it "
    "as the token"
)
_SPECIAL_TEXT_IN_MESSAGES = (
    "prompts with the text of a special token in a message: %d; it is plain text there"
)
_UNKNOWN_TEXT = (
    "prompts with text that the tokenizer has no token for: %d; its token for unknown text stands "
    "there"
)
_LOST_TEXT = (
    "prompts with characters that the tokenizer drops: %d; they run without these "
    "(on_lost_text: warn)"
)
_ADDED_AFTER = (
    "prompts that the tokenizer's template adds tokens after, such as an EOS token: %d; "
    "add_special_tokens: false leaves them out"
)
_CAPPED = (
    "rows whose max_new_tokens is more than the context leaves after the prompt: %d; they end "
    "sooner, where the context is full (window_full: slide goes on)"
)


class TokenizedInput:
    """The input of a job as token ids.

    Args:
        config: The settings of the job.
        checkpoint: Its config.json limits prompts to n_positions tokens below vocab_size.
        tokenizer: The tokenizer of the checkpoint.
        reader: The input.

    Raises:
        ModelError: The tokenizer's template adds a token that the model does not have, or the
            checkpoint joins messages of chats in another way.
        ConfigError: The model or its tokenizer cannot follow a setting of the run.

    Attributes:
        rows_capped: Rows so far whose max_new_tokens is more than the context leaves.
    """

    def __init__(
        self,
        config: JobConfig,
        checkpoint: Checkpoint,
        tokenizer: LoadedTokenizer,
        reader: PromptReader,
    ) -> None:
        self.config, self.checkpoint, self.reader = config, checkpoint, reader
        self.gpt_config: GPTConfig = parse_config(checkpoint.config, str(checkpoint.config_path))
        self.special_tokens = checkpoint.special_tokens
        if config.messages_field is not None:
            check_chat_template(checkpoint.folder)
        self.tokenizer = prompt_tokenizer(config, self.special_tokens, tokenizer)
        self._check_template()
        self._check_settings()
        self._warned_rows: Counter[str] = Counter()
        self.rows_capped = 0

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token of the model; empty unless tokens are bytes of text."""
        return token_bytes_of_model(self.tokenizer, self.gpt_config)

    def prompts(
        self,
        summary: InputSummary,
        *,
        reject: Callable[[Completion], object],
        parts: Iterable[int] | None = None,
        try_begin_part: Callable[[int], bool] = lambda part: True,
        all_samples: bool = True,
    ) -> Iterator[TokenizedPrompt | None]:
        """Yield the prompts of a checked input in order, ready for the engine.

        Args:
            summary: The result of `PromptReader.check`.
            reject: Receives the error row of each row that the engine cannot run.
            parts: Numbers of the parts to read, pulled one at a time. None reads all.
            try_begin_part: Begins a part, unless too many are in flight, and returns whether the
                part has begun. Called before its first row. While it returns False, None is
                yielded.
            all_samples: Yield each sample of a row, not only the first.

        Raises:
            InputRowsError: The input has changed since it was checked.
        """
        current = None
        for row, encoded, read_s in self._encoded(self.reader.prompts(summary, parts)):
            part = row.index // summary.part_rows
            while part != current:
                if try_begin_part(part):
                    current = part
                else:
                    yield None
            if isinstance(row, BadRow):
                for sample in samples_of(self._prompt_of(row), all_samples=all_samples):
                    reject(_error_row(sample, 0, RowError(kind="bad_row", reason=row.reason)))
                continue
            error = self._error(row, encoded)
            self._count_warnings(encoded, error)
            samples = samples_of(row, all_samples=all_samples)
            if error is not None:
                for sample in samples:
                    reject(_error_row(sample, len(encoded.token_ids), error))
                continue
            prompt = self._fit(row, encoded.token_ids, read_s)
            if self.new_token_limit(prompt) < row.params.max_new_tokens:
                self.rows_capped += 1
                self._warned_rows[_CAPPED] += 1
            for sample in samples:
                yield replace(prompt, prompt=sample)

    def new_token_limit(self, prompt: TokenizedPrompt) -> int:
        """Return the most new tokens of a prompt: max_new_tokens, or what the context holds."""
        limit = prompt.prompt.params.max_new_tokens
        if self.config.window_full == "slide":
            return limit
        return min(limit, self.gpt_config.n_positions - len(prompt.token_ids) + 1)

    def log_warnings(self) -> None:
        """Log a warning per kind of prompt whose tokens may not be the intended ones."""
        for warning, rows in sorted(self._warned_rows.items()):
            logger.warning(warning, rows)
        self._warned_rows.clear()

    def _encoded(
        self, rows: Iterator[Prompt | BadRow]
    ) -> Iterator[tuple[Prompt | BadRow, EncodedText, float]]:
        """Yield each row with its tokens and the time when it was read. A bad row has no text.

        While the rows of one call are taken, a thread encodes those of the next, without the GIL.
        """
        worker = Worker("tokens")

        def begin() -> tuple[list[Prompt | BadRow], Future[list[EncodedText]], float]:
            batch = list(islice(rows, TOKENIZE_ROWS))
            texts = [row.text if isinstance(row, Prompt) else "" for row in batch]
            return batch, worker.submit(partial(self.tokenizer.encode, texts)), time.monotonic()

        try:
            following = begin()
            while following[0]:
                (batch, encoding, read_s), following = following, begin()
                for row, encoded in zip(batch, encoding.result(), strict=True):
                    yield row, encoded, read_s
        finally:
            worker.close()

    def _error(self, prompt: Prompt, encoded: EncodedText) -> RowError | None:
        """Return why the engine cannot run a prompt, None where it can."""
        n_positions, vocab_size = self.gpt_config.n_positions, self.gpt_config.vocab_size
        token_ids = encoded.token_ids
        if prompt.prompt_id in self.config.skip_row:
            return RowError(kind="skipped", reason="skipped by skip_row")
        if encoded.problem:
            return RowError(
                kind="unencodable", reason=f"the prompt cannot be encoded: {encoded.problem}"
            )
        if encoded.lost and self.config.on_lost_text == "error":
            return RowError(
                kind="unencodable",
                reason=f"the tokenizer drops {encoded.lost} of the prompt's {encoded.characters} "
                "characters; on_lost_text: warn runs the rest",
            )
        if not token_ids:
            return RowError(
                kind="empty_prompt",
                reason="the prompt is empty, and the checkpoint names no token to start from",
            )
        if max(token_ids) >= vocab_size:
            return RowError(
                kind="unknown_token",
                reason=f"the prompt holds token {max(token_ids)}, which the model "
                f"(vocab_size {vocab_size}) does not have",
            )
        if problem := self._setting_problem(prompt.params):
            return RowError(kind="invalid_setting", reason=problem)
        if len(token_ids) > n_positions and self.config.context_overflow == "error":
            return RowError(
                kind="too_long",
                reason=f"the prompt has {len(token_ids)} tokens, more than n_positions "
                f"({n_positions})",
            )
        return None

    def _setting_problem(self, params: SamplingParams) -> str:
        return setting_problem(params, self.gpt_config, has_token_bytes=bool(self.token_bytes))

    def _check_settings(self) -> None:
        """Raise ConfigError if the model cannot follow a setting of the run."""
        if problem := self._setting_problem(self.config.sampling):
            raise ConfigError(f"{problem} ({self.config.model})", keys=(problem.split()[0],))

    def _fit(self, prompt: Prompt, token_ids: list[int], read_s: float) -> TokenizedPrompt:
        """Drop tokens from the front of a prompt that is longer than the context.

        The kept tokens and the new tokens fit into the context. The last new token does not count,
        since its keys and values are not needed.
        """
        n_positions = self.gpt_config.n_positions
        kept = token_ids
        if len(token_ids) > n_positions:
            kept = token_ids[-max(1, n_positions - prompt.params.max_new_tokens + 1) :]
        return TokenizedPrompt(
            prompt=prompt,
            token_ids=kept,
            tokens_dropped=len(token_ids) - len(kept),
            read_s=read_s,
        )

    def _prompt_of(self, row: BadRow) -> Prompt:
        """Return the prompt of a row that is not a valid one."""
        return Prompt(
            index=row.index,
            prompt_id=row.prompt_id,
            text=row.text,
            params=self.reader.defaults.params(row.prompt_id, {}),
            metadata=row.metadata,
        )

    def _count_warnings(self, encoded: EncodedText, error: RowError | None) -> None:
        if encoded.has_special_text:
            is_chat = self.config.messages_field is not None
            self._warned_rows[_SPECIAL_TEXT_IN_MESSAGES if is_chat else _SPECIAL_TEXT] += 1
        if error is not None:
            return
        if encoded.has_unknown:
            self._warned_rows[_UNKNOWN_TEXT] += 1
        if encoded.lost:
            self._warned_rows[_LOST_TEXT] += 1
        if self.tokenizer.adds_after:
            self._warned_rows[_ADDED_AFTER] += 1

    def _check_template(self) -> None:
        """Raise ModelError if the template adds a token that the model does not have."""
        vocab_size = self.gpt_config.vocab_size
        if lacking := [token for token in self.tokenizer.template_tokens if token >= vocab_size]:
            raise ModelError(
                f"{self.config.model}: the tokenizer's template adds "
                f"{self.tokenizer.name(lacking[0])!r} (token {lacking[0]}) to every prompt, which "
                f"the model (vocab_size {vocab_size}) does not have; "
                "add_special_tokens: false leaves the template out"
            )


def log_generation_warnings(checkpoint: Checkpoint) -> None:
    """Log a warning for each generation setting of a checkpoint that is not followed."""
    for warning in checkpoint.generation_warnings:
        logger.warning("%s", warning)


def setting_problem(params: SamplingParams, gpt_config: GPTConfig, *, has_token_bytes: bool) -> str:
    """Return which setting the model or its tokenizer cannot follow; "" for none."""
    vocab_size = gpt_config.vocab_size
    for name, token_ids in (
        ("stop_token_ids", params.stop_token_ids),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("logit_bias", [token for token, _ in params.logit_bias]),
    ):
        if (largest := max(token_ids, default=0)) >= vocab_size:
            return (
                f"{name} holds token {largest}, which the model (vocab_size {vocab_size}) does not "
                "have"
            )
    if (params.stop or params.bad_words) and not has_token_bytes:
        name = "stop" if params.stop else "bad_words"
        return (
            f"{name} needs a byte-level tokenizer, such as GPT-2's; stop_token_ids and "
            "allowed_token_ids work with every tokenizer"
        )
    return ""


def token_bytes_of_model(tokenizer: PromptTokenizer, gpt_config: GPTConfig) -> list[bytes]:
    """Return the bytes of each token of the model, empty where the tokenizer lacks the token.

    The list is empty unless tokens are bytes of text.
    """
    found = tokenizer.token_bytes[: gpt_config.vocab_size]
    return found and [*found, *[b""] * (gpt_config.vocab_size - len(found))]


def prompt_tokenizer(
    config: JobConfig, special_tokens: SpecialTokens, tokenizer: LoadedTokenizer
) -> PromptTokenizer:
    """Return the tokenizer of prompts with the settings of a job.

    Raises:
        ModelError: Prompts are chats, and the checkpoint has no token that ends a message.
    """
    if config.messages_field is not None:
        end_token = message_end_token(special_tokens, tokenizer)
        if end_token is None:
            ends = ", ".join(map(str, special_tokens.eos_token_ids)) or "none"
            raise ModelError(
                f"{config.model}: messages_field needs an EOS token after each message: that of "
                f"the tokenizer is {tokenizer.eos_token}, those of the model are {ends}"
            )
        return MessageTokenizer(tokenizer, end_token=end_token)
    return PromptTokenizer(
        tokenizer,
        start_token=start_token(special_tokens, tokenizer),
        parse_special=config.parse_special,
        add_special_tokens=config.add_special_tokens,
    )


def samples_of(prompt: Prompt, *, all_samples: bool = True) -> Iterator[Prompt]:
    """Yield the samples of a row, or the first one, which is the row itself."""
    yield prompt
    for index in range(1, prompt.params.n if all_samples else 1):
        seed = sample_seed(prompt.params.seed, index)
        yield replace(prompt, sample_index=index, params=replace(prompt.params, seed=seed))


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
