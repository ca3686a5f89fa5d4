"""The loop: prompts in, completions out, many sequences at a time through one KV cache.

A step is one call of the network. Each round of the loop
  1. admits waiting prompts to free slots, as far as the cache has room, and prefills them in groups that fit a token budget;
  2. runs one decode step: every running sequence gives its last token and gets its next one;
  3. retires the sequences that ended; the last slots move into the gaps, so that running slots are always 0 to B-1.
A row never sees another: its tokens follow from its prompt, its parameters and the weights. So when memory runs out, the rows
that were running start again with half of the slots, and nothing shows it but the clock.

Knows: token ids, slots, clocks. Does not know: text, files, or what happens to a completion.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pipeline.errors import OutOfMemoryError
from pipeline.generation.sampling import Choice, choose_tokens
from pipeline.gpt.model import GPT
from pipeline.records import Completion, RowError, StopReason, Timing, TokenizedPrompt

logger = logging.getLogger("gptbatch")

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
    error: RowError | None = None

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - len(self.source.token_ids)

    @property
    def ended(self) -> bool:
        return self.stop_reason is not None or self.error is not None


@dataclass(slots=True)
class EngineStats:
    """What an engine has done so far. `rows` sums the rows of all steps. halvings: how often memory ran out and slots were halved."""

    steps: int = 0
    rows: int = 0
    prefilled_tokens: int = 0
    new_tokens: int = 0
    halvings: int = 0


@dataclass(kw_only=True)
class Engine:
    """Generates completions for a stream of prompts.

    batch_size: most sequences at a time; fewer run where the cache has no room for more. memory_bytes: for the cache; None is as
    much as batch_size full contexts take. end_of_text: the token id that ends a row, None if there is none (or none is to).
    window_full: what happens when a sequence fills the context. stop ends it; slide goes on as the tutorial does, each step
    on the n_positions most recent tokens, positions from 0, the whole window computed again.
    prefill_tokens: most tokens of a prefill call with more than one sequence. record_logits: hash the bits of every logit.
    """

    model: GPT
    batch_size: int
    end_of_text: int | None
    memory_bytes: int | None = None
    window_full: WindowFull = "stop"
    prefill_tokens: int = PREFILL_TOKENS
    record_logits: bool = False
    stats: EngineStats = field(default_factory=EngineStats)

    def __post_init__(self) -> None:
        self._n_positions = self.model.config.n_positions
        self._running: list[Sequence] = []  # sequence i stands in slot i
        self._waiting: deque[TokenizedPrompt] = deque()  # taken from the caller and not yet running
        self._exhausted = False
        self._make_cache()

    def generate(self, prompts: Iterator[TokenizedPrompt | None]) -> Iterator[list[Completion]]:
        """Yields after every step what ended in it (often nothing), in no particular order.

        Prompts are taken from the iterator as slots fall free; each must have 1 to n_positions tokens. None stands for "none now": the
        caller wants to see to what has ended first. Where memory runs out, half of the slots go on, from the start of their rows;
        raises OutOfMemoryError that names the row when not even one fits.
        """
        while True:
            self._take(prompts)
            if not self._running and not self._waiting:
                if self._exhausted:
                    return
                yield []
                continue
            ended: list[Completion] = []
            try:
                for slots in self._groups(self._admit()):
                    self._prefill(slots)
                    yield []
                ended += self._retire()
                inside = [slot for slot, sequence in enumerate(self._running) if len(sequence.tokens) <= self._n_positions]
                if inside:
                    self._step(inside)
                    ended += self._retire()
                    yield ended
                    ended = []
                for slots in self._groups([slot for slot, s in enumerate(self._running) if len(s.tokens) > self._n_positions]):
                    self._slide(slots)
                    yield []
                ended += self._retire()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(error)
            yield ended

    # -- one round -----------------------------------------------------------------------------------------------------

    def _take(self, prompts: Iterator[TokenizedPrompt | None]) -> None:
        """Prompts for the free slots. Outside of what is tried again when memory runs out: an iterator that has raised has ended."""
        while not self._exhausted and len(self._running) + len(self._waiting) < self.batch_size:
            try:
                prompt = next(prompts)
            except StopIteration:
                self._exhausted = True
                return
            if prompt is None:
                return
            assert 1 <= len(prompt.token_ids) <= self._n_positions
            self._waiting.append(prompt)

    def _admit(self) -> list[int]:
        """Move prompts that wait to slots, as far as the cache has room, and give these slots."""
        lengths = [self._length(sequence.source) for sequence in self._running]
        admitted: list[Sequence] = []
        while self._waiting and len(self._running) + len(admitted) < self.batch_size:
            lengths.append(self._length(self._waiting[0]))
            if len(lengths) > 1 and not self._cache.fits(lengths):
                break
            admitted.append(
                Sequence(
                    source=(prompt := self._waiting.popleft()),
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
        with torch.inference_mode():
            self._cache.reserve([min(self._length(s.source), len(s.tokens) + RESERVE_TOKENS) for s in admitted])
        return list(range(first, len(self._running)))

    def _length(self, prompt: TokenizedPrompt) -> int:
        """The most positions that a row comes to."""
        return min(self._n_positions, len(prompt.token_ids) + prompt.prompt.params.max_new_tokens)

    def _prefill(self, slots: list[int]) -> None:
        now = time.monotonic()
        for slot in slots:
            sequence = self._running[slot]
            sequence.admitted_s, sequence.steps_before, sequence.rows_before = now, self.stats.steps, self.stats.rows
            self.stats.prefilled_tokens += len(sequence.tokens)
        self._step(slots)

    def _slide(self, slots: list[int]) -> None:
        for slot in slots:
            self._running[slot].cached = 0
        self._step(slots)

    def _make_cache(self) -> None:
        """The cache, as large as memory_bytes says and there is memory for; sets batch_size to what it can hold."""
        while True:
            capacity = None if self.memory_bytes is None else self.memory_bytes // self.model.cache_bytes_a_token
            if (most := self.model.most_slots(capacity)) is not None:
                self.batch_size = min(self.batch_size, most)
            try:
                with torch.inference_mode():
                    self._cache = self.model.new_cache(self.batch_size, capacity=capacity)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.batch_size == 1:
                    raise OutOfMemoryError(f"out of memory: there is no room for the cache of one row ({_first_line(error)})") from error
                self.batch_size //= 2
                self.stats.halvings += 1
            else:
                return

    def _halve(self, error: Exception) -> None:
        """Go on with half of the slots after memory ran out; rows that were running start again, and come to the same bits."""
        if len(self._running) <= 1 or self.batch_size == 1:
            name = f"row {self._running[0].source.prompt.prompt_id!r}" if self._running else "the next row"
            raise OutOfMemoryError(
                f"out of memory, even with {name} alone ({_first_line(error)}); give the process more, or leave the row out with --skip-row"
            ) from error
        self.stats.new_tokens -= sum(sequence.new_tokens for sequence in self._running)
        self._waiting.extendleft(sequence.source for sequence in reversed(self._running))
        self.batch_size = len(self._running) // 2
        self.stats.halvings += 1
        self._running.clear()
        del self._cache  # before there is a new one
        self._make_cache()
        logger.warning("out of memory: going on with at most %d rows at a time", self.batch_size)

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
            reason = f"the logits of new token {sequence.new_tokens} hold NaN or infinity"
            sequence.error = RowError(kind="not_finite", reason=reason)
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


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of torch or Python says that an allocation failed. torch has an error of its own for that on CUDA only."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory", "std::bad_alloc"))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
