"""The kernels of a step as one object, so that a step can run by others of the same signatures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gptbatch.pipeline.kernels.cuda.adjust import adjust
from gptbatch.pipeline.kernels.cuda.advance import advance
from gptbatch.pipeline.kernels.cuda.attend import attend
from gptbatch.pipeline.kernels.cuda.embed import embed
from gptbatch.pipeline.kernels.cuda.linear import linear
from gptbatch.pipeline.kernels.cuda.logprobs import look_up, measure
from gptbatch.pipeline.kernels.cuda.norm import norm
from gptbatch.pipeline.kernels.cuda.sample import sample
from gptbatch.pipeline.kernels.cuda.store import store


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The kernels of a step. Each writes its result into a tensor that it is given."""

    embed: Callable[..., None] = embed
    norm: Callable[..., None] = norm
    linear: Callable[..., None] = linear
    store: Callable[..., None] = store
    attend: Callable[..., None] = attend
    measure: Callable[..., None] = measure
    adjust: Callable[..., None] = adjust
    sample: Callable[..., None] = sample
    look_up: Callable[..., None] = look_up
    advance: Callable[..., None] = advance


TRITON = Kernels()
