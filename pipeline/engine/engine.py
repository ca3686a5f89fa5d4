"""The loop: prompts in, completions out, many sequences at a time through one KV cache.

A step is one call of the network. Each round of the loop
  1. takes prompts from the caller, so that there are enough to choose from;
  2. asks the scheduler which tokens to compute, and computes them: every running sequence gives its last token and gets its next
     one, and prompts are prefilled in chunks beside them;
  3. retires the sequences that ended.
A row never sees another: its tokens follow from its prompt, its parameters and the weights. So when memory runs out, the rows
that were running start again with half of the seq_indices, and nothing shows it but the clock.

Knows: token ids, clocks. Does not know: text, files, or what happens to a completion.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gptbatch.pipeline.engine.next_tokens import next_tokens
from gptbatch.pipeline.engine.sampling import SampledToken, sample_tokens
from gptbatch.pipeline.engine.scheduler import Chunk, Scheduler, Sequence
from gptbatch.pipeline.errors import OutOfMemoryError
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.types import Completion, RowError, StopReason, Timing, TokenizedPrompt

logger = logging.getLogger("gptbatch")

STEP_TOKENS = 512
MAX_WAITING_PER_SEQ = 3  # times the seq_indices: rows that wait

WindowFull = Literal["stop", "slide"]


@dataclass(slots=True)
class EngineStats:
    """What an engine has done so far.

    rows sums the rows of all steps. prefilled_tokens and decoded_tokens were computed, cached_tokens had been by another row;
    padding_tokens belong to nobody. prefill_s and decode_s share the time of each step by its tokens. halvings: how often memory
    ran out and seq_indices were halved.
    """

    steps: int = 0
    rows: int = 0
    prefilled_tokens: int = 0
    decoded_tokens: int = 0
    cached_tokens: int = 0
    padding_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    halvings: int = 0


@dataclass(kw_only=True)
class Engine:
    """Generates completions for a stream of prompts.

    batch_size: most sequences at a time; fewer run where the cache has no room for more. memory_bytes: for the cache; None is as
    much as batch_size full contexts take. end_tokens: token ids that end a row; empty where none does.
    window_full: what happens when a sequence fills the context. stop ends it; slide goes on as the tutorial does, each step
    on the n_positions most recent tokens, positions from 0, the whole window computed again.
    step_tokens: most tokens of a step. max_waiting: rows that wait for a seq_index, to choose from; None is MAX_WAITING_PER_SEQ times the seq_indices, and
    none for a single one. share_prefixes: compute what prompts begin with in common once. record_logits: hash the bits of every logit.
    """

    model: GPT
    batch_size: int
    end_tokens: tuple[int, ...]
    memory_bytes: int | None = None
    window_full: WindowFull = "stop"
    step_tokens: int = STEP_TOKENS
    max_waiting: int | None = None
    share_prefixes: bool = True
    record_logits: bool = False
    stats: EngineStats = field(default_factory=EngineStats)

    def __post_init__(self) -> None:
        if self.max_waiting is None:
            self.max_waiting = MAX_WAITING_PER_SEQ * self.batch_size if self.batch_size > 1 else 0
        self._n_positions = self.model.config.n_positions
        self._exhausted = False
        self._make_cache()

    @property
    def max_rows_held(self) -> int:
        """Rows that it holds at a time, running or waiting."""
        assert self.max_waiting is not None
        return self.batch_size + self.max_waiting

    def generate(self, prompts: Iterator[TokenizedPrompt | None]) -> Iterator[list[Completion]]:
        """Yields after every step what ended in it (often nothing), in no particular order.

        Prompts are taken from the iterator as there is room for them; each must have 1 to n_positions tokens. None stands for "none
        now": the caller wants to see to what has ended first. Where memory runs out, half of the seq_indices go on, from the start of their
        rows; raises OutOfMemoryError that names the row when not even one fits.
        """
        self._exhausted = False
        while True:
            self._take(prompts)
            if not self._scheduler.running and not self._scheduler.waiting:
                if self._exhausted:
                    return
                yield []
                continue
            failure = None
            ended: list[Completion] = []
            try:
                ended = self._round()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = _first_line(error)
            if (
                failure is not None
            ):  # the error is gone, and with it what its frames held of the old cache
                self._halve(failure)
            yield ended

    @torch.inference_mode()
    def _round(self) -> list[Completion]:
        """One step, and what ended in it."""
        self._step(self._scheduler.plan())
        return [self._completion(sequence) for sequence in self._scheduler.retire()]

    def _take(self, prompts: Iterator[TokenizedPrompt | None]) -> None:
        """Prompts for the window. Outside of what is tried again when memory runs out: an iterator that has raised has ended."""
        scheduler = self._scheduler
        while (
            not self._exhausted
            and len(scheduler.running) + len(scheduler.waiting) < self.max_rows_held
        ):
            try:
                prompt = next(prompts)
            except StopIteration:
                self._exhausted = True
                return
            if prompt is None:
                return
            assert 1 <= len(prompt.token_ids) <= self._n_positions
            scheduler.add(prompt)

    def _make_cache(self) -> None:
        """The cache, as large as memory_bytes says and there is memory for; sets batch_size to what it can hold."""
        while True:
            capacity = (
                None
                if self.memory_bytes is None
                else self.memory_bytes // self.model.cache_bytes_a_token
            )
            if (most := self.model.max_seqs_for(capacity)) is not None:
                self.batch_size = min(self.batch_size, most)
            try:
                with torch.inference_mode():
                    cache = self.model.new_cache(self.batch_size, capacity=capacity)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.batch_size == 1:
                    raise OutOfMemoryError(
                        f"out of memory: there is no room for the cache of one row ({_first_line(error)})"
                    ) from error
                self.batch_size //= 2
                self.stats.halvings += 1
            else:
                break
        self._cache = cache
        self._scheduler = Scheduler(
            cache=cache,
            max_seqs=self.batch_size,
            n_positions=self._n_positions,
            step_tokens=self.step_tokens,
            spread=self.model.attention == "padded",
            share=self.share_prefixes,
            slide=self.window_full == "slide",
        )

    def _halve(self, failure: str) -> None:
        """Go on with half of the seq_indices after memory ran out; rows that were running start again, and come to the same bits."""
        running, waiting = self._scheduler.running, self._scheduler.waiting
        if self.batch_size == 1:
            name = f"row {running[0].source.prompt.prompt_id!r}" if running else "the next row"
            raise OutOfMemoryError(
                f"out of memory, even with {name} alone ({failure}); give the process more, or leave the row out with --skip-row"
            )
        self.stats.new_tokens -= sum(sequence.new_tokens for sequence in running)
        self.stats.cached_tokens -= sum(
            sequence.cached_tokens for sequence in running if sequence.admitted_s is not None
        )
        self.batch_size = max(1, min(self.batch_size, len(running) or self.batch_size) // 2)
        self.stats.halvings += 1
        sources = [
            sequence.source
            for sequence in (*sorted(running, key=lambda sequence: sequence.order), *waiting)
        ]
        del self._scheduler, self._cache  # before there is a new one
        self._make_cache()
        for source in sources:
            self._scheduler.add(source)
        logger.warning("out of memory: going on with at most %d rows at a time", self.batch_size)

    def _step(self, chunks: list[Chunk]) -> None:
        """One call of the network: the chunks' tokens go in; of those that end, the next token comes out."""
        now = began = time.monotonic()
        prefilled = 0
        tokens: list[int] = []
        seq_indices: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for chunk in chunks:
            count = len(chunk.tokens)
            tokens += chunk.tokens
            seq_indices += [chunk.seq_index] * count
            positions += range(chunk.first, chunk.first + count)
            if chunk.ends:
                last.append(len(tokens) - 1)
            if chunk.sequence.admitted_s is None:
                self._begin(chunk.sequence, now)
            if chunk.sequence.new_tokens == 0:
                prefilled += count
        hidden = self.model.hidden(
            self._cache,
            tokens=tokens,
            seq_indices=seq_indices,
            positions=positions,
            logits_indices=last,
        )
        sequences = [chunk.sequence for chunk in chunks if chunk.ends]
        params, steps = (
            [s.source.prompt.params for s in sequences],
            [s.new_tokens for s in sequences],
        )
        bounds = [s.min_decision_margin for s in sequences]
        if self.record_logits:
            logits = self.model.logits(hidden)
            for sequence, row in zip(sequences, logits.cpu(), strict=True):
                assert sequence.logits_hash is not None
                sequence.logits_hash.update(logits_bytes(row))
            choices = sample_tokens(logits, params, steps, bounds, native=self.model.native)
        else:
            choices = next_tokens(self.model, hidden, params, steps, bounds)
        now = time.monotonic()
        self.stats.steps += 1
        self.stats.rows += len(chunks)
        self.stats.prefilled_tokens += prefilled
        self.stats.decoded_tokens += len(tokens) - prefilled
        self.stats.padding_tokens += self.model.padding_plan.rows(len(tokens)) - len(tokens)
        self.stats.prefill_s += (now - began) * prefilled / len(tokens)
        self.stats.decode_s += (now - began) * (1 - prefilled / len(tokens))
        for sequence, choice in zip(sequences, choices, strict=True):
            self._accept(sequence, choice, now)

    def _begin(self, sequence: Sequence, now: float) -> None:
        """A sequence's first token enters a step."""
        sequence.admitted_s, sequence.started_at_s = now, time.time()
        sequence.steps_before, sequence.rows_before = self.stats.steps, self.stats.rows
        sequence.logits_hash = hashlib.sha256() if self.record_logits else None
        self.stats.cached_tokens += sequence.cached_tokens

    def _accept(self, sequence: Sequence, choice: SampledToken, now: float) -> None:
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
        if len(sequence.tokens) > self._n_positions:
            sequence.cached = 0  # the window slides, and every position in it changes
        if choice.margin is not None:
            sequence.min_decision_margin = min(sequence.min_decision_margin, choice.margin)
        self.stats.new_tokens += 1
        sequence.stop_reason = stop_reason(
            token,
            new_tokens=sequence.new_tokens,
            total_tokens=len(sequence.tokens),
            max_new_tokens=params.max_new_tokens,
            n_positions=self._n_positions,
            end_tokens=self.end_tokens,
            window_full=self.window_full,
        )

    def _completion(self, sequence: Sequence) -> Completion:
        source = sequence.source
        assert sequence.admitted_s is not None
        steps = self.stats.steps - sequence.steps_before
        return Completion(
            prompt=source.prompt,
            prompt_tokens=len(source.token_ids),
            prompt_tokens_dropped=source.tokens_dropped,
            prompt_token_ids=source.token_ids,
            token_ids=[] if sequence.error else sequence.tokens[len(source.token_ids) :],
            finish_reason="error"
            if sequence.error
            else "stop"
            if sequence.stop_reason == "end_of_text"
            else "length",
            stop_reason=None if sequence.error else sequence.stop_reason,
            error=sequence.error,
            min_decision_margin=None
            if sequence.error or not math.isfinite(sequence.min_decision_margin)
            else sequence.min_decision_margin,
            logits_digest=None
            if sequence.error or sequence.logits_hash is None
            else sequence.logits_hash.hexdigest(),
            timing=Timing(
                queue_s=sequence.admitted_s - source.read_s,
                prefill_s=sequence.first_token_s - sequence.admitted_s,
                decode_s=sequence.last_token_s - sequence.first_token_s,
                mean_batch_size=(self.stats.rows - sequence.rows_before) / steps,
                started_at_s=sequence.started_at_s,
                cached_tokens=sequence.cached_tokens,
            ),
        )


def stop_reason(
    token: int,
    *,
    new_tokens: int,
    total_tokens: int,
    max_new_tokens: int,
    n_positions: int,
    end_tokens: tuple[int, ...],
    window_full: WindowFull,
) -> StopReason | None:
    """Why a row ends with its latest token, None if it goes on. total_tokens counts the prompt's and the new ones, this one included."""
    if token in end_tokens:
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
    return any(
        words in str(error)
        for words in ("can't allocate memory", "not enough memory", "std::bad_alloc")
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
