"""A job before it runs: its checkpoint, tokenizer and input have been found, its rows can be checked and tokenized.

Knows: config and data. Does not know: the network. Imports no torch.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from itertools import islice

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.errors import ModelError
from gptbatch.pipeline.input.config_hash import start_token
from gptbatch.pipeline.input.prompt_reader import InputSummary, PromptReader
from gptbatch.pipeline.input.rows import BadRow
from gptbatch.pipeline.input.tokenizer import EncodedText, LoadedTokenizer, PromptTokenizer
from gptbatch.pipeline.model.checkpoint import Checkpoint
from gptbatch.pipeline.model.config import GPTConfig, parse_config
from gptbatch.pipeline.model.generation_config import SpecialTokens
from gptbatch.pipeline.types import Completion, Prompt, RowError, TokenizedPrompt

logger = logging.getLogger("gptbatch")

TOKENIZE_ROWS = 256
_SPECIAL_TEXT = "prompts with the text of a special token: %d; it is plain text there, parse_special takes it as the token"
_UNKNOWN_TEXT = "prompts with text that the tokenizer has no token for: %d; its token for unknown text stands there"
_LOST_TEXT = "prompts with characters that the tokenizer drops: %d; they run without these (on_lost_text: warn)"
_ADDED_AFTER = "prompts that the tokenizer's template adds tokens after, as an end of text: %d; add_special_tokens: false leaves them out"


class TokenizedInput:
    """The input of a job as token ids.

    Args:
        config: The settings of the job.
        checkpoint: Its config.json limits prompts to n_positions tokens below vocab_size.
        tokenizer: The tokenizer of the checkpoint.
        reader: The input.

    Raises:
        ModelError: The tokenizer's template adds a token that the model does not have.
    """

    def __init__(
        self,
        config: JobConfig,
        checkpoint: Checkpoint,
        tokenizer: LoadedTokenizer,
        reader: PromptReader,
    ) -> None:
        self.config, self.checkpoint, self.reader = config, checkpoint, reader
        self.gpt_config: GPTConfig = parse_config(
            self.checkpoint.config, str(self.checkpoint.config_path)
        )
        self.special_tokens = self.checkpoint.special_tokens
        for warning in self.checkpoint.generation_warnings:
            logger.warning("%s", warning)
        self.tokenizer = prompt_tokenizer(config, self.special_tokens, tokenizer)
        self._check_template()
        self._warned_rows: Counter[str] = Counter()

    def prompts(
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
                    params = self.reader.defaults.params(row.prompt_id, {})
                    prompt = Prompt(
                        index=row.index,
                        prompt_id=row.prompt_id,
                        text="",
                        params=params,
                        metadata=None,
                    )
                    reject(_error_row(prompt, 0, RowError(kind="bad_row", reason=row.reason)))
                    continue
                kept, error = self._fit(row, encoded)
                self._count_warnings(encoded, error)
                count = len(encoded.token_ids)
                if error is None:
                    yield TokenizedPrompt(
                        prompt=row, token_ids=kept, tokens_dropped=count - len(kept), read_s=read_s
                    )
                else:
                    reject(_error_row(row, count, error))

    def log_warnings(self) -> None:
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

    def _count_warnings(self, encoded: EncodedText, error: RowError | None) -> None:
        if encoded.has_special_text:
            self._warned_rows[_SPECIAL_TEXT] += 1
        if error is None and encoded.has_unknown:
            self._warned_rows[_UNKNOWN_TEXT] += 1
        if error is None and encoded.lost:
            self._warned_rows[_LOST_TEXT] += 1
        if error is None and self.tokenizer.adds_after:
            self._warned_rows[_ADDED_AFTER] += 1

    def _fit(self, prompt: Prompt, encoded: EncodedText) -> tuple[list[int], RowError | None]:
        """The tokens of a prompt that go into the context, or why none do."""
        n_positions, vocab_size = self.gpt_config.n_positions, self.gpt_config.vocab_size
        if prompt.prompt_id in self.config.skip_row:
            return [], RowError(kind="skipped", reason="skipped by skip_row")
        token_ids = encoded.token_ids
        if encoded.problem:
            return [], RowError(
                kind="unencodable", reason=f"the prompt cannot be encoded: {encoded.problem}"
            )
        if encoded.lost and self.config.on_lost_text == "error":
            reason = f"the tokenizer drops {encoded.lost} of the prompt's {len(prompt.text)} characters; on_lost_text: warn runs the rest"
            return [], RowError(kind="unencodable", reason=reason)
        if not token_ids:
            return [], RowError(
                kind="empty_prompt",
                reason="the prompt is empty, and the checkpoint names no token to start from",
            )
        if max(token_ids) >= vocab_size:
            reason = f"the prompt holds token {max(token_ids)}, which the model (vocab_size {vocab_size}) does not have"
            return [], RowError(kind="unknown_token", reason=reason)
        if len(token_ids) <= n_positions:
            return token_ids, None
        if self.config.context_overflow == "error":
            reason = (
                f"the prompt has {len(token_ids)} tokens, more than n_positions ({n_positions})"
            )
            return [], RowError(kind="too_long", reason=reason)
        return token_ids[-max(1, n_positions - prompt.params.max_new_tokens + 1) :], None


def prompt_tokenizer(
    config: JobConfig, special_tokens: SpecialTokens, tokenizer: LoadedTokenizer
) -> PromptTokenizer:
    """The tokenizer as a job's settings want it."""
    return PromptTokenizer(
        tokenizer,
        start_token=start_token(special_tokens, tokenizer),
        parse_special=config.parse_special,
        add_special_tokens=config.add_special_tokens,
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
