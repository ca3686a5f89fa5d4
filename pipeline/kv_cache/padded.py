"""The padded backend: matmul and softmax of torch over the seq_indices side by side, padded to one width.

Each product takes one query of a sequence at a time, whatever the call holds: the tokens of a prefill are taken in rounds, the
first of every sequence, then the second of every sequence, and so on. A query so meets the same shapes in prefill, in a chunk
and in decode, and the same bits come out; only the number of sequences beside it and the width differ, on which these products
do not depend (the start-up check looks). Where they do, as in float32 on some GPUs, sums of neighbours two by two take their
place: number by number, so that nothing can depend on the shape. torch's fused attention is slower on a CPU for one query a sequence, and
its bits depend on the batch.

Knows: queries, keys and values of one layer, and which seq_index and position each token has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gptbatch.pipeline.kv_cache.quantization import CacheDtype, through_int8
from gptbatch.pipeline.model.config import GPTConfig

ReductionOrder = Literal["matmul", "pairwise"]

RESERVE_TOKENS = 256  # new tokens of a sequence that there is room for from the start; more is made when it is needed


class PaddedKVCache:
    """Per layer keys and values (B, H, width, depth): B seq_indices, positions 0 to width - 1; depth is D rounded up, the rest 0.

    The width grows on demand, so that a run of short sequences never pays for n_positions. What no sequence has written is 0,
    never left-overs: a masked position still enters attention as 0 x value, and 0 x NaN is NaN.
    With int8 numbers are rounded as in the ragged cache, so that a run can be verified here, and stored in the network's dtype.
    reduction_order: how attention is computed.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        max_seqs: int,
        dtype: torch.dtype,
        cache_dtype: CacheDtype,
        reduction_order: ReductionOrder,
        device: torch.device,
    ) -> None:
        self.cache_dtype, self.reduction_order = cache_dtype, reduction_order
        self.n_head, self.n_positions, self.device = config.n_head, config.n_positions, device
        # in bfloat16 a CPU has other products again, which would have to be as independent of what runs beside them
        self.upcast = config.upcast_attention or device.type == "cpu"
        self.width = 0
        # the order in which a product sums over an odd head size has been seen to depend on what runs beside it, and products of
        # fewer than 400 multiplications (16 keys of 16 numbers) take a path of their own inside torch
        depth = max(32, round_up(config.head_size))
        empty = torch.zeros(max_seqs, config.n_head, 0, depth, dtype=dtype, device=device)
        self.keys: list[Tensor] = [empty] * config.n_layer
        self.values: list[Tensor] = [empty] * config.n_layer
        self._lengths = [0] * max_seqs

    def allocate(
        self, seq_index: int, token_ids: Sequence[int], length: int, *, share: bool
    ) -> int | None:
        """There is always room, every seq_index can hold a full context, and nothing is shared."""
        self._widen(min(length, len(token_ids) + RESERVE_TOKENS))
        return 0

    def is_ready(self, seq_index: int) -> bool:
        return True

    def mark_computed(self, seq_index: int, first: int, last: int) -> None:
        pass

    def _widen(self, width: int) -> None:
        if width <= self.width:
            return
        assert width <= self.n_positions
        # at least twice as wide, so that the copies stay few
        self.width = min(round_up(self.n_positions), max(round_up(width), 2 * self.width))
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                grown = old.new_empty(*old.shape[:2], self.width, old.shape[3])
                grown[:, :, : old.shape[2]] = old
                grown[:, :, old.shape[2] :] = 0
                tensors[layer] = grown

    def step(self, seq_indices: Sequence[int], positions: Sequence[int]) -> PaddedAttention:
        self._widen(max(positions) + 1)
        for seq_index, position in zip(seq_indices, positions, strict=True):
            self._lengths[seq_index] = max(self._lengths[seq_index], position + 1)
        return PaddedAttention(self, seq_indices, positions)

    def move(self, source: int, target: int) -> None:
        length = self._lengths[source]
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[target, :, :length] = tensor[source, :, :length]
        self._lengths[target] = length
        self.free(source)

    def free(self, seq_index: int) -> None:
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[seq_index, :, : self._lengths[seq_index]] = 0
        self._lengths[seq_index] = 0


@dataclass(frozen=True, slots=True)
class _Round:
    """At most one token of each seq_index: which ones of the call (None: all, in order), their seq_indices, and what they may not see."""

    tokens: Tensor | None  # (S,)
    seq_indices: slice | Tensor  # (S,)
    width: int  # W
    hidden: Tensor  # (S, 1, 1, W), true at the positions after the token's own


class PaddedAttention:
    """Attention of one call."""

    def __init__(
        self, cache: PaddedKVCache, seq_indices: Sequence[int], positions: Sequence[int]
    ) -> None:
        self.cache = cache
        self.seq_indices = torch.tensor(seq_indices, device=cache.device)
        self.positions = torch.tensor(positions, device=cache.device)
        rounds: list[list[int]] = []
        seen: dict[int, int] = {}
        for token, seq_index in enumerate(seq_indices):
            turn = seen.get(seq_index, 0)
            seen[seq_index] = turn + 1
            if turn == len(rounds):
                rounds.append([])
            rounds[turn].append(token)
        self.rounds = [self._round(tokens, seq_indices, positions) for tokens in rounds]

    def _round(
        self, tokens: list[int], seq_indices: Sequence[int], positions: Sequence[int]
    ) -> _Round:
        device = self.cache.device
        width = round_up(max(positions[token] for token in tokens) + 1)
        own = [seq_indices[token] for token in tokens]
        index = torch.tensor(tokens, device=device)
        contiguous = own == list(range(own[0], own[0] + len(own)))
        return _Round(
            tokens=None if len(tokens) == len(seq_indices) else index,
            seq_indices=slice(own[0], own[0] + len(own))
            if contiguous
            else torch.tensor(own, device=device),
            width=width,
            hidden=(torch.arange(width, device=device) > self.positions[index, None])[
                :, None, None
            ],
        )

    def __call__(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        n_tokens, keys, values = (
            len(self.seq_indices),
            self.cache.keys[layer],
            self.cache.values[layer],
        )
        heads = qkv[:n_tokens]
        head_size, depth = heads.shape[-1], keys.shape[-1]
        if depth > head_size:
            heads = F.pad(heads, (0, depth - head_size))
        q, k, v = heads.unbind(1)  # each (N, H, depth)
        if self.cache.cache_dtype == "int8":
            k, v = through_int8(k), through_int8(v)
        keys[self.seq_indices, :, self.positions] = k
        values[self.seq_indices, :, self.positions] = v
        mixed = [
            self._attend(now, q if now.tokens is None else q[now.tokens], keys, values, scale)
            for now in self.rounds
        ]
        if len(mixed) == 1 and n_tokens == len(qkv):
            (out,) = mixed
        else:
            out = q.new_zeros(len(qkv), *q.shape[1:])
            for now, some in zip(self.rounds, mixed, strict=True):
                out[slice(n_tokens) if now.tokens is None else now.tokens] = some
        return out[..., :head_size].flatten(1)

    def _attend(self, now: _Round, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        pairwise = self.cache.reduction_order == "pairwise"
        dtype = torch.float32 if self.cache.upcast or pairwise else q.dtype
        k, v = (numbers[now.seq_indices, :, : now.width].to(dtype) for numbers in (keys, values))
        attend = _attend_pairwise if pairwise else _attend
        return attend(q.to(dtype) * scale, k, v, now.hidden).to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """q (S, H, depth), k and v (S, H, W, depth), hidden (S, 1, 1, W) -> (S, H, depth)."""
    if (
        q.shape[0] * q.shape[1] == 1
    ):  # one matrix alone takes another path, with other bits: run it as two
        return _attend(*(tensor.expand(2, *tensor.shape[1:]) for tensor in (q, k, v, hidden)))[:1]
    scores = (k @ q[..., None]).transpose(-1, -2)  # keys first: the same products, read faster
    weights = F.softmax(scores.masked_fill_(hidden, float("-inf")), dim=-1)
    return (weights @ v)[:, :, 0]


def _attend_pairwise(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """As `_attend`, number by number: the keys that a wider call adds have the weight 0, which changes no sum."""
    scores = _sum(k * q[:, :, None], 3).masked_fill_(hidden[:, :, 0], float("-inf"))  # (S, H, W)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return _sum(weights[..., None] * v, 2) / _sum(weights, 2)[..., None]


def _sum(x: Tensor, dim: int) -> Tensor:
    """The sum over a dimension: of neighbours two by two, then of these sums, and so on."""
    while (size := x.shape[dim]) > 1:
        if size % 2:
            x = torch.cat([x, torch.zeros_like(x.narrow(dim, 0, 1))], dim)
        first, second = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
        x = first + second
    return x.squeeze(dim)


def round_up(size: int) -> int:
    """The next multiple of 16."""
    return -(-size // 16) * 16
