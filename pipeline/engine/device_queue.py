"""Launches steps on a device: uploads what the host changes, and brings the tokens back.

What a step uploads lies in a buffer of the host until the device has copied it, and its tokens
arrive in another one. Each step in flight has buffers of its own.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptbatch.pipeline.engine.device_changes import PendingChanges
from gptbatch.pipeline.engine.device_rows import Bools
from gptbatch.pipeline.kernels.cuda.state import POSITION
from gptbatch.pipeline.model.device_step import CHUNK_SIZES

if TYPE_CHECKING:
    from gptbatch.pipeline.engine.streams import Mark, Stream
    from gptbatch.pipeline.model.device_step import DeviceStep, StepShape

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Arrival:
    """The tokens of a step, once they are there.

    Attributes:
        mark: The point in the stream after them.
        out: (S, 2): tokens, and bits of the smallest margins. Valid until `max_in_flight` more
            steps were launched.
        logprobs: (S, WIDTH), as long; None where no row has log probabilities.
    """

    mark: Mark
    out: Int64s
    logprobs: Int64s | None

    def wait(self) -> tuple[Int64s, npt.NDArray[np.float64]]:
        """Wait for them; return tokens and margins (S,)."""
        self.mark.wait()
        return self.out[:, 0].copy(), self.out[:, 1].copy().view(np.float64)


@dataclass(slots=True, kw_only=True)
class LaunchedStep:
    """A step whose tokens are to arrive. Arrays are by index at the time of the launch.

    Attributes:
        arrival: Its tokens.
        handles: Of the sequences.
        is_sampled: Rows that get a token on the device.
        host_rows: Rows that the host samples.
        n_rows: Sequences that it computes.
        n_prefilled: Prompt tokens among the prefill rows.
        context: Sum of the contexts of the sequences that decode.
        n_padding: Rows without a token.
        released: Handles that only this step and those before it hold.
    """

    arrival: Arrival
    handles: Int64s
    is_sampled: Bools
    host_rows: list[int]
    n_rows: int
    n_prefilled: int
    context: int
    n_padding: int
    released: list[int] = field(default_factory=list)


class DeviceQueue:
    """The steps of one engine, in order.

    Attributes:
        step: The buffers of the device.
        stream: Where it works.
    """

    def __init__(self, step: DeviceStep, stream: Stream, max_in_flight: int) -> None:
        self.step, self.stream = step, stream
        seqs, width = step.state.shape
        # At most: a move, an empty row or a row of the state per sequence, and prompt tokens.
        size = seqs * (width + 4) + 3 * CHUNK_SIZES[-1]
        self._inbox = torch.zeros(size, dtype=torch.int64, device=step.state.device)
        self._uploads = deque(stream.host_buffer(size) for _ in range(max_in_flight))
        # Tokens and margins, and behind them log probabilities.
        size = step.out.numel() + step.logprobs.numel()
        self._outs = deque(stream.host_buffer(size) for _ in range(max_in_flight))

    def launch(self, shape: StepShape, changes: PendingChanges, prompt: Int64s) -> Arrival:
        """Launch a step after those before it.

        Args:
            shape: Of the step.
            changes: What the host changes in the state before it.
            prompt: Tokens, positions and sequences of prompt tokens, (3, at most P).
        """
        chunk = np.zeros((3, shape.chunk_rows), np.int64)
        chunk[1] = -1
        chunk[:, : prompt.shape[1]] = prompt
        indices = [[*changes.moves], [*changes.moves.values()], [*changes.empty], [*changes.rows]]
        rows = np.concatenate([*changes.rows.values()]) if changes.rows else np.empty(0, np.int64)
        pieces = [*(np.array(each, np.int64) for each in indices), rows, chunk.ravel()]
        upload, out = self._uploads[0], self._outs[0]
        self._uploads.rotate(-1)
        self._outs.rotate(-1)
        flat = np.concatenate(pieces)
        upload.numpy()[: len(flat)] = flat
        sizes = [len(piece) for piece in pieces]
        self.stream.run(lambda: self._apply(upload, sizes))
        if changes.adjustments:
            self._write_adjustments(np.concatenate(changes.adjustments, axis=1))
        self.stream.repeat(shape, lambda: self.step.run(shape))
        seqs = shape.decode_rows
        n_out = self.step.out.numel()
        target = out[:n_out].view_as(self.step.out)[:seqs]
        self.stream.run(lambda: _copy_rows(target, self.step.out))
        if not shape.logprobs:
            return Arrival(self.stream.mark(), target.numpy(), None)
        logprobs = out[n_out:].view_as(self.step.logprobs)[:seqs]
        self.stream.run(lambda: _copy_rows(logprobs, self.step.logprobs))
        return Arrival(self.stream.mark(), target.numpy(), logprobs.numpy())

    def _apply(self, upload: Tensor, sizes: list[int]) -> None:
        """Copy an upload to the device and change the state and the chunk."""
        count = sum(sizes)
        if count == 0:
            return
        self._inbox[:count].copy_(upload[:count], non_blocking=True)
        targets, sources, empty, indices, rows, chunk = self._inbox[:count].split(sizes)
        state = self.step.state
        if len(targets):
            state.index_copy_(0, targets, state.index_select(0, sources))
        if len(empty):
            state[:, POSITION.value].index_fill_(0, empty, -1)
        if len(indices):
            state.index_copy_(0, indices, rows.view(len(indices), -1))
        if len(chunk):
            tokens = chunk.view(3, -1)
            self.step.chunk[:, : tokens.shape[1]].copy_(tokens)

    def _write_adjustments(self, numbers: Int64s) -> None:
        # Rarely more than a few rows start at once, so the buffer is as large as they need.
        upload = self.stream.host_buffer(numbers.size).view(2, -1)
        upload.numpy()[:] = numbers
        self.stream.run(lambda: self.step.write_adjustments(upload))


def _copy_rows(target: Tensor, source: Tensor) -> None:
    target.copy_(source[: len(target)], non_blocking=True)
