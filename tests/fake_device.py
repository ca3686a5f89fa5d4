"""A device on the CPU that works late, with the torch twins as kernels.

It shows that the host neither reads what has not arrived nor writes what the device still reads,
and that tokens do not depend on when they arrive. The kernels themselves have their own tests.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptbatch.pipeline.engine.nucleus import mass_bits, masses
from gptbatch.pipeline.engine.sampling import _Rows, _sample
from gptbatch.pipeline.engine.streams import Work
from gptbatch.pipeline.kernels.cuda.adjust import adjust_twin
from gptbatch.pipeline.kernels.cuda.advance import advance_twin
from gptbatch.pipeline.kernels.cuda.attend import attend_twin
from gptbatch.pipeline.kernels.cuda.embed import embed_twin
from gptbatch.pipeline.kernels.cuda.kernels import Kernels
from gptbatch.pipeline.kernels.cuda.linear import linear_twin
from gptbatch.pipeline.kernels.cuda.logprobs import LARGEST, TOP, TOTAL, look_up_twin
from gptbatch.pipeline.kernels.cuda.norm import norm_twin
from gptbatch.pipeline.kernels.cuda.state import (
    FULL_VOCAB,
    HOST_SAMPLES,
    KEPT_RANGE,
    LOGPROBS,
    MARGIN,
    NO_TOKEN,
    POSITION,
    SEED,
    STEP,
    TEMPERATURE,
    TOP_K,
    TOP_P,
)
from gptbatch.pipeline.kernels.cuda.store import store_twin


def sample_twin(
    logits: Tensor,
    block_max: Tensor,
    state: Tensor,
    scratch: tuple[Tensor, Tensor],
    sampled: Tensor,
    *,
    full_vocab: bool,
    top_p: bool,
) -> None:
    """Compute by engine/sampling.py what `sample` computes."""
    for row, (own, values) in enumerate(zip(state[: len(logits)], logits, strict=True)):
        top_k = int(own[TOP_K.value])
        if own[POSITION.value] < 0 or top_k == HOST_SAMPLES.value:
            continue
        numbers = own.view(torch.float64)
        is_filtered = numbers[TOP_P.value] < 1 or numbers[KEPT_RANGE.value] < math.inf
        assert full_vocab or is_filtered or top_k != FULL_VOCAB.value
        assert top_p or numbers[TOP_P.value] == 1
        rows = _Rows(
            seeds=own[SEED.value, None],
            steps=own[STEP.value, None],
            temperatures=numbers[TEMPERATURE.value, None],
            kept_ranges=numbers[KEPT_RANGE.value, None],
            top_ps=numbers[TOP_P.value, None],
            margin_bounds=numbers[MARGIN.value, None].clone(),
        )
        token, margin = _sample(values[None], [top_k or len(values)], rows)
        if token < 0:
            sampled[row] = NO_TOKEN.value
        else:
            sampled[row] = token[0]
            numbers[MARGIN.value] = torch.minimum(numbers[MARGIN.value], margin[0])


def measure_twin(logits: Tensor, block_max: Tensor, state: Tensor, found: Tensor) -> None:
    """Compute by engine/nucleus.py what `measure` computes."""
    bits = mass_bits(logits.shape[1])
    for row, z in enumerate(logits):
        n_top, largest = int(state[row, LOGPROBS.value]) - 1, z.amax()
        if state[row, POSITION.value] < 0 or n_top < 0 or not largest.isfinite():
            continue
        found[row, TOTAL.value] = masses(z.double() - largest.double(), bits).sum()
        found[row, LARGEST.value] = _float_bits(largest)
        # Stable: the smaller id first among ties.
        top = z.sort(descending=True, stable=True)
        listed = (top.indices << 32) | _float_bits(top.values)
        found[row, TOP.value : TOP.value + min(n_top, len(z))] = listed[:n_top]


def _float_bits(x: Tensor) -> Tensor:
    return x.view(torch.int32).long() & 0xFFFFFFFF


TWINS = Kernels(
    embed=embed_twin,
    norm=norm_twin,
    linear=linear_twin,
    store=store_twin,
    attend=attend_twin,
    measure=measure_twin,
    adjust=adjust_twin,
    sample=sample_twin,
    look_up=look_up_twin,
    advance=advance_twin,
)


@dataclass
class _Mark:
    stream: LateStream
    count: int

    def wait(self) -> None:
        self.stream.run_until(self.count)


class LateStream:
    """Work waits until somebody waits for it, or until `max_waiting` more works have come.

    Args:
        max_waiting: 0 runs all work at once.
        fails: Called before each work; it may raise.
    """

    def __init__(
        self, max_waiting: float = math.inf, fails: Callable[[], None] = lambda: None
    ) -> None:
        self._works: deque[Work] = deque()
        self._n_done = self._n_added = 0
        self._max_waiting, self._fails = max_waiting, fails

    def run(self, work: Work) -> None:
        """Add work."""
        self._works.append(work)
        self._n_added += 1
        self.run_until(self._n_added - self._max_waiting)

    def repeat(self, key: Hashable, work: Work) -> None:
        """Add work."""
        self.run(work)

    def catch_up(self) -> None:
        """Do nothing: other means write at once."""

    def mark(self) -> _Mark:
        """Return the point after all work so far."""
        return _Mark(self, self._n_added)

    def run_until(self, count: float) -> None:
        """Run all work up to this number."""
        while self._n_done < count:
            self._fails()
            self._n_done += 1
            # A device has no modes of torch.
            with torch.inference_mode():
                self._works.popleft()()

    def reset(self) -> None:
        """Drop all work."""
        self._works.clear()
        self._n_done = self._n_added

    def host_buffer(self, size: int) -> Tensor:
        """Return memory with garbage in it."""
        return torch.full((size,), -7, dtype=torch.int64)


class GraphStream(LateStream):
    """Works at once, and replays a key as a CUDA graph does: with the arguments of its capture.

    Attributes:
        kernels: Kernels whose launches can be captured.
    """

    def __init__(self, kernels: Kernels = TWINS) -> None:
        super().__init__(0)
        names = [field.name for field in dataclasses.fields(Kernels)]
        launches = {name: partial(self._launch, getattr(kernels, name)) for name in names}
        self.kernels = Kernels(**launches)
        self._graphs: dict[Hashable, list[Work] | None] = {}
        self._captured: list[Work] | None = None
        self.n_replays = 0

    def repeat(self, key: Hashable, work: Work) -> None:
        """Run work; capture it the second time, and replay it from then on."""
        if key not in self._graphs:
            self._graphs[key] = None
            work()
            return
        graph = self._graphs[key]
        if graph is None:
            self._captured = graph = self._graphs[key] = []
            work()
            self._captured = None
        for launch in graph:
            launch()
        self.n_replays += 1

    def reset(self) -> None:
        """Forget all keys."""
        super().reset()
        self._graphs.clear()

    def _launch(self, kernel: Callable[..., None], *arguments: Any, **options: Any) -> None:
        launch = partial(kernel, *arguments, **options)
        if self._captured is None:
            launch()
        else:
            self._captured.append(launch)
