"""The loop: prompts in, completions out, many sequences at a time through one KV cache.

A step is one call of the network. Each round of the loop
  1. admits waiting prompts to free slots and prefills them, in groups that fit a token budget;
  2. runs one decode step: every running sequence gives its last token and gets its next one;
  3. retires the sequences that ended; the last slots move into the gaps, so that running slots are always 0 to B-1.
A row never sees another: its tokens follow from its prompt, its parameters and the weights.

Knows: token ids, slots, clocks. Does not know: text, files, or what happens to a completion.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pipeline.generation.sampling import Choice, choose_tokens
from pipeline.gpt.model import GPT
from pipeline.records import Completion, StopReason, Timing, TokenizedPrompt

PREFILL_TOKENS = 1024  # of a call with more than one sequence: linears are as fast as with more, and the start-up check tries as many
RESERVE_TOKENS = 256  # new tokens of a row that the cache has room for from the start; more is made when it is needed

WindowFull = Literal["stop", "slide"]


@dataclass(slots=True)
class Sequence:
    """One running row. `tokens` is the prompt and what has been generated; `cached` of them (from the front) are cached."""

    source: TokenizedPrompt
    tokens: list[int]
    admitted_s: float
    started_at_s: float
    steps_before: int
    rows_before: int
    cached: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    min_margin: float = math.inf
    logits_hash: hashlib._Hash | None = None
    stop_reason: StopReason | None = None
    error: str | None = None

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - len(self.source.token_ids)

    @property
    def ended(self) -> bool:
        return self.stop_reason is not None or self.error is not None


@dataclass(slots=True)
class EngineStats:
    """What an engine has done so far. `rows` sums the rows of all steps."""

    steps: int = 0
    rows: int = 0
    prefilled_tokens: int = 0
    new_tokens: int = 0


@dataclass(kw_only=True)
class Engine:
    """Generates completions for a stream of prompts.

    batch_size: most sequences at a time. end_of_text: the token id that ends a row, None if there is none (or none is to).
    window_full: what happens when a sequence fills the context. stop ends it; slide goes on as the tutorial does, each step
    on the n_positions most recent tokens, positions from 0, the whole window computed again.
    prefill_tokens: most tokens of a prefill call with more than one sequence. record_logits: hash the bits of every logit.
    """

    model: GPT
    batch_size: int
    end_of_text: int | None
    window_full: WindowFull = "stop"
    prefill_tokens: int = PREFILL_TOKENS
    record_logits: bool = False
    stats: EngineStats = field(default_factory=EngineStats)

    def __post_init__(self) -> None:
        self._cache = self.model.new_cache(self.batch_size)
        self._running: list[Sequence] = []  # sequence i stands in slot i
        self._n_positions = self.model.config.n_positions

    def generate(self, prompts: Iterator[TokenizedPrompt]) -> Iterator[list[Completion]]:
        """Yields after every round what ended in it (often nothing), in no particular order.

        Prompts are taken from the iterator as slots fall free; each must have 1 to n_positions tokens.
        """
        while True:
            ended = self._admit(prompts)
            if not self._running and not ended:
                return
            if self._running:
                ended += self._decode()
            yield ended

    # -- one round -----------------------------------------------------------------------------------------------------

    def _admit(self, prompts: Iterator[TokenizedPrompt]) -> list[Completion]:
        admitted: list[Sequence] = []
        while len(self._running) + len(admitted) < self.batch_size and (prompt := next(prompts, None)) is not None:
            assert 1 <= len(prompt.token_ids) <= self._n_positions
            admitted.append(
                Sequence(
                    source=prompt,
                    tokens=list(prompt.token_ids),
                    admitted_s=0.0,
                    started_at_s=time.time(),
                    steps_before=0,
                    rows_before=0,
                    logits_hash=hashlib.sha256() if self.record_logits else None,
                )
            )
        # likes together, the long ones first: what is padded or done in rounds inside a call then loses least
        admitted.sort(key=lambda sequence: -len(sequence.tokens))
        first = len(self._running)
        self._running += admitted
        self._reserve(admitted)
        for slots in self._groups(list(range(first, len(self._running)))):
            now = time.monotonic()
            for slot in slots:
                sequence = self._running[slot]
                sequence.admitted_s, sequence.steps_before, sequence.rows_before = now, self.stats.steps, self.stats.rows
                self.stats.prefilled_tokens += len(sequence.tokens)
            self._step(slots)
        return self._retire()

    @torch.inference_mode()
    def _reserve(self, admitted: list[Sequence]) -> None:
        """Room in the cache for what the admitted rows will likely need, at once: growing it step by step copies it."""
        wanted = [len(s.tokens) + min(s.source.prompt.params.max_new_tokens, RESERVE_TOKENS) for s in admitted]
        self._cache.reserve([min(self._n_positions, length) for length in wanted])

    def _decode(self) -> list[Completion]:
        inside: list[int] = []  # slots whose next token has a position left
        full: list[int] = []  # slots whose window slides
        for slot, sequence in enumerate(self._running):
            (inside if len(sequence.tokens) <= self._n_positions else full).append(slot)
        if inside:
            self._step(inside)
        for slots in self._groups(full):
            for slot in slots:
                self._running[slot].cached = 0
            self._step(slots)
        return self._retire()

    def _groups(self, slots: list[int]) -> Iterator[list[int]]:
        """Cut slots into groups of at most `prefill_tokens` tokens, at least one slot each."""
        group: list[int] = []
        total = 0
        for slot in slots:
            length = min(len(self._running[slot].tokens), self._n_positions)
            if group and total + length > self.prefill_tokens:
                yield group
                group, total = [], 0
            group.append(slot)
            total += length
        if group:
            yield group

    @torch.inference_mode()
    def _step(self, slots: list[int]) -> None:
        """One call of the network: each slot's tokens that are not cached yet go in, its next token comes out."""
        sequences = [self._running[slot] for slot in slots]
        tokens: list[int] = []
        token_slots: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for slot, sequence in zip(slots, sequences, strict=True):
            window = max(0, len(sequence.tokens) - self._n_positions)  # where the context begins
            new = sequence.tokens[window + sequence.cached :]
            tokens += new
            token_slots += [slot] * len(new)
            positions += range(sequence.cached, sequence.cached + len(new))
            last.append(len(tokens) - 1)
            sequence.cached += len(new)
        logits = self.model.extend(self._cache, tokens=tokens, slots=token_slots, positions=positions, wanted=last)
        if self.record_logits:
            for sequence, row in zip(sequences, logits.cpu(), strict=True):
                assert sequence.logits_hash is not None
                sequence.logits_hash.update(logits_bytes(row))
        choices = choose_tokens(
            logits, [s.source.prompt.params for s in sequences], [s.new_tokens for s in sequences], [s.min_margin for s in sequences]
        )
        now = time.monotonic()
        self.stats.steps += 1
        self.stats.rows += len(slots)
        for sequence, choice in zip(sequences, choices, strict=True):
            self._accept(sequence, choice, now)

    def _accept(self, sequence: Sequence, choice: Choice, now: float) -> None:
        """Give a sequence its next token and decide whether it ends."""
        params, token = sequence.source.prompt.params, choice.token
        sequence.last_token_s = now
        if sequence.new_tokens == 0:
            sequence.first_token_s = now
        if token is None:
            sequence.error = f"the logits of new token {sequence.new_tokens} hold NaN or infinity"
            return
        sequence.tokens.append(token)
        if choice.margin is not None:
            sequence.min_margin = min(sequence.min_margin, choice.margin)
        self.stats.new_tokens += 1
        sequence.stop_reason = stop_reason(
            token,
            new_tokens=sequence.new_tokens,
            total_tokens=len(sequence.tokens),
            max_new_tokens=params.max_new_tokens,
            n_positions=self._n_positions,
            end_of_text=self.end_of_text,
            window_full=self.window_full,
        )

    @torch.inference_mode()
    def _retire(self) -> list[Completion]:
        ended = []
        for slot in reversed(range(len(self._running))):
            sequence = self._running[slot]
            if not sequence.ended:
                continue
            self._cache.clear(slot)
            last = self._running.pop()
            if last is not sequence:
                self._cache.move(len(self._running), slot)
                self._running[slot] = last
            ended.append(self._completion(sequence))
        return ended

    def _completion(self, sequence: Sequence) -> Completion:
        source = sequence.source
        steps = self.stats.steps - sequence.steps_before
        return Completion(
            prompt=source.prompt,
            prompt_tokens=len(source.token_ids),
            prompt_tokens_dropped=source.tokens_dropped,
            token_ids=[] if sequence.error else sequence.tokens[len(source.token_ids) :],
            finish_reason="error" if sequence.error else "stop" if sequence.stop_reason == "end_of_text" else "length",
            stop_reason=None if sequence.error else sequence.stop_reason,
            error=sequence.error,
            min_margin=None if sequence.error or not math.isfinite(sequence.min_margin) else sequence.min_margin,
            logits_digest=None if sequence.error or sequence.logits_hash is None else sequence.logits_hash.hexdigest(),
            timing=Timing(
                queue_s=sequence.admitted_s - source.read_s,
                prefill_s=sequence.first_token_s - sequence.admitted_s,
                decode_s=sequence.last_token_s - sequence.first_token_s,
                mean_batch_size=(self.stats.rows - sequence.rows_before) / steps,
                started_at_s=sequence.started_at_s,
            ),
        )


def stop_reason(
    token: int,
    *,
    new_tokens: int,
    total_tokens: int,
    max_new_tokens: int,
    n_positions: int,
    end_of_text: int | None,
    window_full: WindowFull,
) -> StopReason | None:
    """Why a row ends with its latest token, None if it goes on. total_tokens counts the prompt's and the new ones, this one included."""
    if token == end_of_text:
        return "end_of_text"
    if new_tokens >= max_new_tokens:
        return "max_new_tokens"
    return "window" if window_full == "stop" and total_tokens > n_positions else None


def logits_bytes(logits: Tensor) -> bytes:
    """The bits of logits in memory order; equal bytes are equal bits, -0 and NaN included."""
    return logits.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()
