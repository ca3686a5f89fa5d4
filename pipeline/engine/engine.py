"""The engine: prompts in, completions out, many sequences at once through one KV cache.

A step schedules tokens, runs one forward pass, samples, and frees finished sequences. A sequence's
tokens depend only on its prompt, its parameters and the weights. So when memory runs out, the
running sequences start again in a smaller batch and give the same completions.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from gptbatch.pipeline.engine.bad_words import BadWords
from gptbatch.pipeline.engine.row_adjustments import RowAdjustments, next_adjustments
from gptbatch.pipeline.engine.sampling import SampledToken
from gptbatch.pipeline.engine.sampling_step import SampleRequest, sample_for_model
from gptbatch.pipeline.engine.scheduler import Scheduler
from gptbatch.pipeline.engine.sequence import ScheduledChunk, Sequence
from gptbatch.pipeline.engine.stopping import StopCheck, StopRule
from gptbatch.pipeline.engine.two_pass_sampling import sample_from_hidden
from gptbatch.pipeline.errors import OutOfMemoryError
from gptbatch.pipeline.kv_cache.interface import KVCache
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.lm_head import logits_bytes
from gptbatch.pipeline.model.padding import STEP_TOKENS
from gptbatch.pipeline.system.error_text import first_line
from gptbatch.pipeline.types import Completion, RowError, TokenizedPrompt, WindowFull

logger = logging.getLogger("gptbatch")

MAX_WAITING_PER_SEQ = 3


@dataclass(slots=True)
class EngineStats:
    """Counters of an engine.

    Attributes:
        steps: Forward passes.
        rows: Sum of the batch sizes of all steps.
        prefilled_tokens: Prompt tokens that went through the model.
        decoded_tokens: New tokens that went through the model. The last one of a row does not.
        decode_context: Sum of the context lengths that these tokens attended to.
        cached_tokens: Prompt tokens taken from the prefix cache.
        padding_tokens: Rows of the forward passes that held no token.
        new_tokens: Tokens sampled, but for rows that ended with an error.
        prefill_s: Seconds of all steps, each divided between prefill and decode by token count:
            prefill's part.
        decode_s: Decode's part.
        halvings: How often memory ran out and the batch was halved.
    """

    steps: int = 0
    rows: int = 0
    prefilled_tokens: int = 0
    decoded_tokens: int = 0
    decode_context: int = 0
    cached_tokens: int = 0
    padding_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    halvings: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingOptions:
    """How steps are filled. None of these changes a completion.

    Attributes:
        step_tokens: The most tokens of a step.
        max_waiting: Prompts that are held to choose from; None is 3 times batch_size, and 0 for a
            batch_size of 1.
        share_prefixes: Compute common beginnings of prompts once (prefix caching).
    """

    step_tokens: int = STEP_TOKENS
    max_waiting: int | None = None
    share_prefixes: bool = True


@dataclass(kw_only=True)
class Engine:
    """Generates completions for a stream of prompts.

    Attributes:
        model: A packed model.
        batch_size: The most sequences that run at once. The engine lowers it when memory runs out.
        eos_token_ids: Token ids that end a completion; empty for none.
        memory_bytes: Memory of the KV cache; None is enough for batch_size full contexts.
        window_full: See `StopRule`.
        scheduling: How steps are filled.
        record_logits: Hash the bits of all logits into `Completion.logits_digest`.
        token_bytes: The bytes of each token's text, for stop strings and bad words; empty where
            no row has any.
        stats: Counters so far.
    """

    model: GPT
    batch_size: int
    eos_token_ids: tuple[int, ...]
    memory_bytes: int | None = None
    window_full: WindowFull = "stop"
    scheduling: SchedulingOptions = SchedulingOptions()
    record_logits: bool = False
    token_bytes: abc.Sequence[bytes] = ()
    stats: EngineStats = field(default_factory=EngineStats, init=False)

    def __post_init__(self) -> None:
        self._max_waiting = self.scheduling.max_waiting
        if self._max_waiting is None:
            self._max_waiting = MAX_WAITING_PER_SEQ * self.batch_size if self.batch_size > 1 else 0
        self._n_positions = self.model.config.n_positions
        self._stop_rule = StopRule(
            eos_token_ids=self.eos_token_ids,
            n_positions=self._n_positions,
            window_full=self.window_full,
            token_bytes=self.token_bytes,
        )
        self._bad_words = BadWords(self.token_bytes)
        self._is_exhausted = False
        self._cache, self._scheduler = self._new_cache()

    @property
    def max_rows_held(self) -> int:
        """The most sequences that run or wait at once."""
        return self.batch_size + self.max_waiting

    @property
    def max_waiting(self) -> int:
        """The most sequences that wait at once."""
        assert self._max_waiting is not None
        return self._max_waiting

    def unfinished(self) -> list[Completion]:
        """Return the completions of the running sequences as far as they are generated."""
        return [
            self._completion(sequence)
            for sequence in self._scheduler.running
            if sequence.scheduled_s is not None
        ]

    def generate(self, prompts: Iterator[TokenizedPrompt | None]) -> Iterator[list[Completion]]:
        """Yield, after every step, the completions that finished in it, in no particular order.

        If memory runs out, the running sequences start again in half the batch.

        Args:
            prompts: Prompts of 1 to n_positions tokens, taken while fewer than max_rows_held run or
                wait. None means "none now": the caller gets the next completions before another
                prompt is taken.

        Raises:
            OutOfMemoryError: Memory does not suffice for one sequence; the message names the row.
        """
        self._is_exhausted = False
        while True:
            # Outside of the retry: an iterator that has raised cannot continue.
            self._add_waiting(prompts)
            if self._is_idle():
                if self._is_exhausted:
                    return
                yield []
                continue
            failure = None
            completions: list[Completion] = []
            try:
                completions = self.step()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = first_line(error)
            # After the except clause, because the traceback holds the old cache.
            if failure is not None:
                self._restart_with_half_the_batch(failure)
            yield completions

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Schedule tokens, run the model, and return the completions that finished."""
        began = time.monotonic()
        chunks = self._scheduler.schedule()
        self._start_new(chunks, began)
        sampled = self._run(chunks)
        self._postprocess(chunks, sampled, began)
        return [self._completion(sequence) for sequence in self._scheduler.free_finished()]

    def _n_held(self) -> int:
        return len(self._scheduler.running) + len(self._scheduler.waiting)

    def _is_idle(self) -> bool:
        return not self._scheduler.running and not self._scheduler.waiting

    def _add_waiting(self, prompts: Iterator[TokenizedPrompt | None]) -> None:
        if self._is_exhausted:
            return
        for _ in range(self.max_rows_held - self._n_held()):
            try:
                prompt = next(prompts)
            except StopIteration:
                self._is_exhausted = True
                return
            if prompt is None:
                return
            assert 1 <= len(prompt.token_ids) <= self._n_positions
            self._scheduler.add(prompt)

    def _start_new(self, chunks: list[ScheduledChunk], now: float) -> None:
        """Note the start of sequences that are in a step for the first time."""
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.scheduled_s is not None:
                continue
            sequence.scheduled_s, sequence.started_at_s = now, time.time()
            sequence.steps_before, sequence.rows_before = self.stats.steps, self.stats.rows
            sequence.logits_hash = hashlib.sha256() if self.record_logits else None
            params, prompt = sequence.params, sequence.source.token_ids
            sequence.stop_check = StopCheck(
                rule=self._stop_rule, params=params, n_prompt_tokens=len(prompt)
            )
            sequence.adjustments = self._new_adjustments(sequence)
            self.stats.cached_tokens += sequence.n_cached_tokens

    def _new_adjustments(self, sequence: Sequence) -> RowAdjustments | None:
        params, prompt = sequence.params, sequence.source.token_ids
        if not RowAdjustments.are_needed(params):
            return None
        return RowAdjustments(params, prompt, self._stop_rule, self._bad_words)

    def _run(self, chunks: list[ScheduledChunk]) -> list[SampledToken]:
        """Run one forward pass and sample the next token of each chunk that needs one."""
        tokens: list[int] = []
        seq_indices: list[int] = []
        positions: list[int] = []
        logits_indices: list[int] = []
        for chunk in chunks:
            count = len(chunk.tokens)
            tokens += chunk.tokens
            seq_indices += [chunk.seq_index] * count
            positions += range(chunk.first, chunk.first + count)
            if chunk.needs_logits:
                logits_indices.append(len(tokens) - 1)
        hidden = self.model.hidden(
            self._cache,
            tokens=tokens,
            seq_indices=seq_indices,
            positions=positions,
            logits_indices=logits_indices,
        )
        sequences = [chunk.sequence for chunk in chunks if chunk.needs_logits]
        requests = [
            SampleRequest(
                params=sequence.params,
                step=sequence.n_new_tokens,
                margin_bound=sequence.min_decision_margin,
                adjustments=next_adjustments(sequence.adjustments),
            )
            for sequence in sequences
        ]
        if not self.record_logits:
            return sample_from_hidden(self.model, hidden, requests)
        logits = self.model.logits(hidden)
        for sequence, row in zip(sequences, logits.cpu(), strict=True):
            assert sequence.logits_hash is not None
            sequence.logits_hash.update(logits_bytes(row))
        return sample_for_model(self.model, logits, requests)

    def _postprocess(
        self, chunks: list[ScheduledChunk], sampled: list[SampledToken], began: float
    ) -> None:
        """Count the step and append the sampled tokens."""
        now = time.monotonic()
        n_tokens = sum(len(chunk.tokens) for chunk in chunks)
        n_prefilled = sum(len(chunk.tokens) for chunk in chunks if chunk.sequence.n_new_tokens == 0)
        stats = self.stats
        stats.steps += 1
        stats.rows += len(chunks)
        stats.prefilled_tokens += n_prefilled
        stats.decoded_tokens += n_tokens - n_prefilled
        stats.decode_context += sum(
            chunk.context for chunk in chunks if chunk.sequence.n_new_tokens > 0
        )
        stats.padding_tokens += self.model.padding_plan.padded(n_tokens) - n_tokens
        stats.prefill_s += (now - began) * n_prefilled / n_tokens
        stats.decode_s += (now - began) * (1 - n_prefilled / n_tokens)
        sequences = [chunk.sequence for chunk in chunks if chunk.needs_logits]
        for sequence, token in zip(sequences, sampled, strict=True):
            self._append(sequence, token, now)

    def _append(self, sequence: Sequence, sampled: SampledToken, now: float) -> None:
        """Append the next token of a sequence and decide whether it is finished."""
        sequence.last_token_s = now
        if sequence.n_new_tokens == 0:
            sequence.first_token_s = now
        if sampled.token is None:
            sequence.error = _error_without_token(sequence, sampled)
            # The row has no completion.
            self.stats.new_tokens -= sequence.n_new_tokens
            return
        sequence.tokens.append(sampled.token)
        self.stats.new_tokens += 1
        if len(sequence.tokens) > self._n_positions:
            # The window slides, and every position in it changes.
            sequence.n_computed_tokens = 0
        if sampled.decision_margin is not None:
            sequence.min_decision_margin = min(
                sequence.min_decision_margin, sampled.decision_margin
            )
        if sampled.logprobs is not None:
            sequence.logprobs.append(sampled.logprobs)
        if sequence.adjustments is not None:
            sequence.adjustments.add(sampled.token)
        assert sequence.stop_check is not None
        sequence.stop_reason = sequence.stop_check.add(sampled.token)

    def _completion(self, sequence: Sequence) -> Completion:
        steps = self.stats.steps - sequence.steps_before
        rows = self.stats.rows - sequence.rows_before
        return sequence.to_completion(mean_batch_size=rows / steps)

    def _new_cache(self) -> tuple[KVCache, Scheduler]:
        """Create the cache and its scheduler; lower batch_size to what memory allows."""
        spec = self.model.cache_spec
        while True:
            capacity = None
            if self.memory_bytes is not None:
                capacity = self.memory_bytes // spec.bytes_per_token
            if (max_seqs := spec.max_seqs(capacity)) is not None:
                self.batch_size = min(self.batch_size, max_seqs)
            try:
                with torch.inference_mode():
                    cache = self._allocate(capacity)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.batch_size == 1:
                    raise OutOfMemoryError(
                        f"out of memory: the KV cache of one row does not fit ({first_line(error)})"
                    ) from error
                self.batch_size //= 2
                self.stats.halvings += 1
            else:
                break
        scheduler = Scheduler(
            cache=cache,
            max_seqs=self.batch_size,
            n_positions=self._n_positions,
            max_step_tokens=self.scheduling.step_tokens,
            interleave_prefill=self.model.backend.interleaves_prefill,
            share_prefixes=self.scheduling.share_prefixes,
            slide=self.window_full == "slide",
        )
        return cache, scheduler

    def _allocate(self, capacity: int | None) -> KVCache:
        """Create a cache for batch_size sequences, of this many positions."""
        return self.model.new_cache(self.batch_size, capacity=capacity)

    def _restart_with_half_the_batch(self, failure: str) -> None:
        """Start the running sequences again in half the batch. No completion changes."""
        running, waiting = self._scheduler.running, self._scheduler.waiting
        if self.batch_size == 1:
            name = f"row {running[0].source.prompt.prompt_id!r}" if running else "the next row"
            raise OutOfMemoryError(
                f"out of memory, even with {name} alone ({failure}); "
                "give the process more, or leave the row out with --skip-row"
            )
        for sequence in running:
            self.stats.new_tokens -= sequence.n_new_tokens
            if sequence.scheduled_s is not None:
                self.stats.cached_tokens -= sequence.n_cached_tokens
        self.batch_size = max(1, min(self.batch_size, len(running) or self.batch_size) // 2)
        self.stats.halvings += 1
        running = sorted(running, key=lambda sequence: sequence.schedule_order)
        sources = [sequence.source for sequence in (*running, *waiting)]
        # Free the old cache before the new one is made.
        del self._cache, self._scheduler
        self._cache, self._scheduler = self._new_cache()
        for source in sources:
            self._scheduler.add(source)
        logger.warning("out of memory: going on with at most %d rows at a time", self.batch_size)


def _error_without_token(sequence: Sequence, sampled: SampledToken) -> RowError:
    step = sequence.n_new_tokens
    if sampled.is_forbidden:
        return RowError(
            kind="no_token_allowed",
            reason=f"the settings of the row forbid every token as new token {step}",
        )
    return RowError(
        kind="not_finite", reason=f"the logits of new token {step} hold NaN or infinity"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed; torch has an error type only for some of them.

    An error that came up while an allocation failed counts, too: the end of the capture of a CUDA
    graph has one of its own.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if error.__context__ is not None and is_out_of_memory(error.__context__):
        return True
    return any(
        words in str(error)
        for words in (
            *("can't allocate memory", "not enough memory", "std::bad_alloc"),
            # Of CUDA outside torch's allocator: graphs, modules of triton, pinned memory.
            "out of memory",
        )
    )
