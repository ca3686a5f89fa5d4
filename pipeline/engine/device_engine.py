"""The engine of a device that keeps its own state: steps are launched ahead, tokens arrive late.

Decoding needs nothing of the host: the device takes each new token as its next input and ends rows
by EOS tokens and by length (kernels/cuda/advance.py). The host launches a step, and reads the
tokens of the step `lag` steps before it. It schedules prompts and writes what changes
(device_batch.py). A row's tokens depend on nothing but the row, so the lag changes none.

    host    launch 7   read 5   launch 8   read 6
    device     ... 6 ......... 7 ......... 8

- An end by length is known ahead: the next sequence takes the index at once, while the last tokens
  of the one before it are still to arrive.
- An end by EOS token leaves the row empty for at most `lag` steps. After a stop string or a stop
  token, which the host finds, the tokens that follow are dropped.
- Rows that the device cannot sample (`_left_to_host`) run one step at a time: the host samples from
  the logits of the device, and starts the row again with its next token. While there are any, no
  step is launched ahead.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch

from gptbatch.pipeline.engine.device_adjustments import DeviceAdjustments
from gptbatch.pipeline.engine.device_batch import DeviceBatch
from gptbatch.pipeline.engine.device_queue import DeviceQueue, LaunchedStep
from gptbatch.pipeline.engine.device_rows import DeviceRows
from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.engine.row_adjustments import RowAdjustments, next_adjustments
from gptbatch.pipeline.engine.sampling import SampledToken
from gptbatch.pipeline.engine.sampling_step import SampleRequest, sample_for_model
from gptbatch.pipeline.engine.sequence import Sequence
from gptbatch.pipeline.engine.streams import CudaStream, Stream
from gptbatch.pipeline.kernels.cuda.kernels import TRITON, Kernels
from gptbatch.pipeline.kernels.cuda.state import NO_TOKEN
from gptbatch.pipeline.kernels.cuda.store import LayerCache
from gptbatch.pipeline.kv_cache.device import DeviceKVCache
from gptbatch.pipeline.kv_cache.interface import KVCache
from gptbatch.pipeline.model.device_step import (
    CHUNK_SIZES,
    DeviceStep,
)
from gptbatch.pipeline.types import Completion, TokenizedPrompt

# The host has this many steps of time to read, schedule and launch.
LAG = 2
# A step takes more prompt tokens by this factor while less than half of the batch decodes.
FILLING = 4


@dataclass(kw_only=True)
class DeviceEngine(Engine):
    """An `Engine` whose sequences decode on the device. It neither records logits nor slides.

    Attributes:
        lag: Steps that are launched ahead of the one that is read.
        kernels: What computes a step.
        stream: Where it runs; None is a stream of the model's CUDA device.
    """

    lag: int = LAG
    kernels: Kernels = TRITON
    stream: Stream | None = None

    def __post_init__(self) -> None:
        assert not self.record_logits
        assert self.window_full == "stop"
        if self.stream is None:
            self.stream = CudaStream(self.model.device)
        # Sources of rows that the device cannot sample, by identity: more states of bad words than
        # it can hold, or no token that is allowed.
        self._left_to_host: set[int] = set()
        # A step that fails leaves what it has finished to the next one.
        self._finished: list[Completion] = []
        super().__post_init__()

    @property
    def cache_layers(self) -> list[LayerCache]:
        """Keys and values of each layer."""
        assert isinstance(self._cache, DeviceKVCache)
        return self._cache.layers

    def generate(self, prompts: Iterator[TokenizedPrompt | None]) -> Iterator[list[Completion]]:
        """Yield completions; see `Engine`.

        If the caller stops early or anything fails, the device first finishes the steps in flight:
        they write to the memory of this engine, which another one may get.
        """
        try:
            yield from super().generate(prompts)
        except BaseException:
            assert self.stream is not None
            # The device may have failed, too.
            with suppress(Exception):
                self.stream.mark().wait()
            raise

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Launch a step if there is work; read the steps that are due; return what finished."""
        is_launched = self._launch()
        assert is_launched or self._in_flight or self._finished, "sequences run without work"
        n_ahead = 0 if not is_launched or self._in_flight[-1].host_rows else self.lag
        while len(self._in_flight) > n_ahead:
            self._read(self._in_flight.popleft())
            if not is_launched:
                break
        finished, self._finished = self._finished, []
        return finished

    def unfinished(self) -> list[Completion]:
        """Return the completions of the running sequences as far as their tokens have arrived."""
        rows, completions = self._rows, []
        for handle in rows.live():
            sequence = copy(rows.sequence(handle))
            if rows.n_read[handle]:
                rows.write_to(sequence, handle, self._read_s)
            if sequence.n_new_tokens:
                completions.append(self._completion(sequence))
        return completions

    def _n_held(self) -> int:
        return super()._n_held() + self._rows.n_draining

    def _is_idle(self) -> bool:
        return super()._is_idle() and not self._in_flight and not self._finished

    def _allocate(self, capacity: int | None) -> KVCache:
        cache = super()._allocate(capacity)
        assert isinstance(cache, DeviceKVCache)
        assert self.stream is not None
        n_token_bytes = sum(len(data) for data in self.token_bytes)
        step = DeviceStep(
            self.model, cache, self.kernels, self.eos_token_ids, n_token_bytes=n_token_bytes
        )
        self._queue = DeviceQueue(step, self.stream, max_in_flight=self.lag + 1)
        self._rows = DeviceRows(
            len(step.state),
            self.lag + 1,
            n_positions=self._n_positions,
            vocab_size=self.model.config.vocab_size,
        )
        adjustments = DeviceAdjustments(step.adjustment_layout, self._stop_rule)
        self._batch = DeviceBatch(
            self._rows, adjustments, cache.tables, self.model.config.vocab_size
        )
        self._in_flight: deque[LaunchedStep] = deque()
        self._read_s = time.monotonic()
        self.stream.catch_up()
        return cache

    def _restart_with_half_the_batch(self, failure: str) -> None:
        """Start all sequences again whose tokens have not all arrived; see `Engine`."""
        rows, running = self._rows, self._scheduler.running
        for handle in rows.live():
            if rows.index_of[handle] < 0:
                running.append(rows.sequence(handle))
            if not rows.needs_host[handle]:
                self.stats.new_tokens -= int(rows.n_read[handle])
        # Free the buffers of the device before there are new ones.
        self._in_flight.clear()
        assert self.stream is not None
        self.stream.reset()
        del self._queue, self._rows, self._batch
        super()._restart_with_half_the_batch(failure)

    def _launch(self) -> bool:
        """Schedule and launch a step; return whether there was anything to compute."""
        rows, running = self._rows, self._scheduler.running
        is_filling = 2 * int(rows.decodes.sum()) < self.batch_size
        budget = self.scheduling.step_tokens * (FILLING if is_filling else 1)
        prefilling: list[int] = np.flatnonzero(~rows.has_prompt[: len(running)]).tolist()
        chunks = self._scheduler.schedule_prefill(prefilling, min(budget, CHUNK_SIZES[-1]))
        self._start_new(chunks, time.monotonic())
        prompt = self._batch.take_chunks(chunks, self._needs_host)
        decodes = rows.decodes[: len(running)].copy()
        n_decoding, n_prefilled = int(decodes.sum()), prompt.shape[1]
        if not n_decoding and not n_prefilled:
            return False
        if not n_decoding:
            decodes = decodes[:0]
        handles = rows.handle_at[: len(decodes)].copy()
        shape = self._batch.shape(decodes, len(running), n_prefilled)
        arrival = self._queue.launch(shape, self._batch.take_changes(), prompt)
        is_sampled = decodes & ~rows.needs_host[handles]
        host_rows: list[int] = np.flatnonzero(decodes & ~is_sampled).tolist()
        launched = LaunchedStep(
            arrival=arrival,
            handles=handles,
            is_sampled=is_sampled,
            host_rows=host_rows,
            # The last chunk of a prompt is a sequence that decodes.
            n_rows=n_decoding + sum(not chunk.needs_logits for chunk in chunks),
            n_prefilled=n_prefilled,
            context=int((rows.n_prompt + rows.n_launched)[handles[is_sampled]].sum())
            + sum(len(rows.sequence(int(handles[index])).tokens) for index in host_rows),
            n_padding=shape.decode_rows + shape.chunk_rows - n_decoding - n_prefilled,
        )
        self._in_flight.append(launched)
        # The device ends these rows, until the host has sampled.
        rows.decodes[host_rows] = False
        rows.n_launched[handles[is_sampled]] += 1
        ended = is_sampled & (rows.n_launched[handles] >= rows.budgets[handles])
        self._free(np.flatnonzero(ended).tolist())
        return True

    def _needs_host(self, sequence: Sequence) -> bool:
        is_left = id(sequence.source) in self._left_to_host
        return is_left or self.model.config.vocab_size == 1

    def _new_adjustments(self, sequence: Sequence) -> RowAdjustments | None:
        if not self._needs_host(sequence):
            if self._batch.hold(sequence.params):
                return None
            self._left_to_host.add(id(sequence.source))
        return super()._new_adjustments(sequence)

    def _free(self, seq_indices: list[int]) -> None:
        """Take sequences out of the batch, finished or with their last token on its way."""
        self._batch.leave(seq_indices)
        _, moves = self._scheduler.free(seq_indices)
        self._batch.move(moves)

    def _read(self, launched: LaunchedStep) -> None:
        """Take the tokens of a step."""
        rows, handles = self._rows, launched.handles
        tokens, margins = launched.arrival.wait()
        tokens, margins = tokens[: len(handles)], margins[: len(handles)]
        now = time.monotonic()
        # A row that has ended, here or on the device, may still be in steps that were launched.
        is_read = launched.is_sampled & ~rows.is_done[handles]
        is_token = is_read & (tokens >= 0)
        read = handles[is_token]
        rows.first_s[read[rows.n_read[read] == 0]] = now
        rows.append(read, tokens[is_token], margins[is_token])
        if launched.arrival.logprobs is not None:
            rows.keep_logprobs(read, launched.arrival.logprobs[: len(handles)][is_token])
        self._count(launched, len(read) + len(launched.host_rows), now)
        self.stats.new_tokens += len(read)
        is_last = np.isin(tokens, self.eos_token_ids) | (
            rows.n_read[handles] >= rows.budgets[handles]
        )
        for index in np.flatnonzero(is_token & (is_last | rows.is_watched[handles])).tolist():
            self._check(int(handles[index]), now)
        for index in np.flatnonzero(is_read & (tokens < 0)).tolist():
            self._fail(int(handles[index]), int(tokens[index]), now)
        if launched.host_rows:
            self._sample_on_host(launched, now)
        for handle in launched.released:
            rows.release(handle)

    def _count(self, launched: LaunchedStep, n_decoded: int, now: float) -> None:
        """Count a step."""
        stats = self.stats
        stats.steps += 1
        stats.rows += launched.n_rows
        stats.prefilled_tokens += launched.n_prefilled
        stats.decoded_tokens += n_decoded
        stats.decode_context += launched.context
        stats.padding_tokens += launched.n_padding
        seconds, self._read_s = now - self._read_s, now
        share = launched.n_prefilled / max(1, launched.n_prefilled + n_decoded)
        stats.prefill_s += seconds * share
        stats.decode_s += seconds * (1 - share)

    def _check(self, handle: int, now: float) -> None:
        """Take the latest token of a row; finish the row if it ends with it."""
        rows = self._rows
        sequence = rows.sequence(handle)
        assert sequence.stop_check is not None
        n_read = int(rows.n_read[handle])
        # The host looks only at the last token of most rows.
        sequence.stop_check.n_new_tokens = n_read - 1
        reason = sequence.stop_check.add(int(rows.tokens[handle, n_read - 1]))
        if reason is not None:
            sequence.stop_reason = reason
            rows.write_to(sequence, handle, now)
            self._finish(handle, sequence)

    def _fail(self, handle: int, token: int, now: float) -> None:
        """Finish a row without a token; start it again where the host can tell why."""
        rows = self._rows
        sequence = rows.sequence(handle)
        assert token == NO_TOKEN.value
        if rows.adjustments[handle] < 0:
            sequence.tokens += rows.read_tokens(handle)
            sequence.first_token_s = float(rows.first_s[handle]) if rows.n_read[handle] else now
            self._append(sequence, SampledToken(None, None), now)
            self._finish(handle, sequence)
            return
        self.stats.new_tokens -= int(rows.n_read[handle])
        self.stats.cached_tokens -= sequence.n_cached_tokens
        self._left_to_host.add(id(sequence.source))
        self._take_out(handle)
        self._scheduler.add(sequence.source)

    def _sample_on_host(self, launched: LaunchedStep, now: float) -> None:
        """Sample rows from the logits of the step before which nothing else was launched."""
        handles = [int(launched.handles[index]) for index in launched.host_rows]
        sequences = [self._rows.sequence(handle) for handle in handles]
        requests = [
            SampleRequest(
                params=sequence.params,
                step=sequence.n_new_tokens,
                margin_bound=sequence.min_decision_margin,
                adjustments=next_adjustments(sequence.adjustments),
            )
            for sequence in sequences
        ]
        logits = self._queue.step.logits[launched.host_rows]
        sampled = sample_for_model(self.model, logits, requests)
        for handle, sequence, token in zip(handles, sequences, sampled, strict=True):
            self._append(sequence, token, now)
            if sequence.is_finished:
                self._finish(handle, sequence)
            else:
                self._batch.decode(handle)

    def _finish(self, handle: int, sequence: Sequence) -> None:
        self._left_to_host.discard(id(sequence.source))
        self._take_out(handle)
        self._finished.append(self._completion(sequence))

    def _take_out(self, handle: int) -> None:
        """Free the index of a sequence, and its handle when no step holds it any more."""
        rows = self._rows
        rows.is_done[handle] = True
        if (index := int(rows.index_of[handle])) >= 0:
            self._free([index])
        if self._in_flight:
            self._in_flight[-1].released.append(handle)
        else:
            rows.release(handle)
