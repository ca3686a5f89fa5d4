"""The padded backend: torch matmul and softmax over all sequences, padded to one width.

Every product takes one query per sequence. Prefill therefore runs in rounds: the first token of
every sequence, then the second of every sequence, and so on. A query meets the same shapes in
prefill, in a chunk and in decode, so its bits are the same. Only the number of sequences and the
width vary. The products must not depend on these; the batch-invariance self-test checks that. Where
they do, as in float32 on some GPUs, the `pairwise` reduction order replaces them: elementwise
operations alone, which cannot depend on the shape.

torch's fused attention is not used. With one query per sequence it is slower on a CPU, and its bits
depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gptbatch.pipeline.kv_cache.quantization import round_trip_int8
from gptbatch.pipeline.kv_cache.spec import KVCacheSpec, round_up

# New tokens per sequence that fit at first. The cache grows when more are needed.
RESERVED_NEW_TOKENS = 256
# Products over heads of odd sizes were seen to depend on the batch, and torch computes products of
# fewer than 400 multiplications (16 keys of 16 elements) on another path.
MIN_HEAD_SIZE = 32


class PaddedKVCache:
    """KV cache of one tensor per layer: keys and values (B, H, W, depth) of B sequences.

    The width W grows on demand, so short sequences do not pay for n_positions. depth is the head
    size D, rounded up; the rest is 0. Unwritten positions are 0 too: a masked position still enters
    attention as 0 times its value, and 0 times NaN is NaN.

    With int8, elements are rounded as in the paged cache, so that a run can be verified here. They
    are stored in the model's dtype.
    """

    def __init__(self, spec: KVCacheSpec, max_seqs: int) -> None:
        """Create an empty cache for max_seqs sequences of up to n_positions."""
        config = spec.config
        self.spec, self.device, self.n_positions = spec, spec.device, config.n_positions
        # bfloat16 products on a CPU take other paths than float32, with bits of their own.
        self.upcast = config.upcast_attention or spec.device.type == "cpu"
        self.width = 0
        depth = max(MIN_HEAD_SIZE, round_up(config.head_size))
        shape = (max_seqs, config.n_head, 0, depth)
        empty = torch.zeros(shape, dtype=spec.dtype, device=spec.device)
        self.keys: list[Tensor] = [empty] * config.n_layer
        self.values: list[Tensor] = [empty] * config.n_layer
        self._lengths = [0] * max_seqs

    def allocate(
        self, seq_index: int, token_ids: Sequence[int], length: int, *, share_prefix: bool
    ) -> int | None:
        """Grow the cache if needed. Every sequence can reach a full context; none shares."""
        self._widen(min(length, len(token_ids) + RESERVED_NEW_TOKENS))
        return 0

    def is_ready(self, seq_index: int) -> bool:
        """Return True: there are no shared prefixes to wait for."""
        return True

    def mark_scheduled(self, seq_index: int, first: int, end: int) -> None:
        """Do nothing: there are no shared prefixes."""

    def attention_for(
        self, seq_indices: Sequence[int], positions: Sequence[int]
    ) -> PaddedAttention:
        """Return the attention of one forward pass; see `KVCache`."""
        self._widen(max(positions) + 1)
        for seq_index, position in zip(seq_indices, positions, strict=True):
            self._lengths[seq_index] = max(self._lengths[seq_index], position + 1)
        return PaddedAttention(self, seq_indices, positions)

    def move(self, source: int, target: int) -> None:
        """Copy a sequence to an empty index and clear its old one."""
        length = self._lengths[source]
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]
        self._lengths[target] = length
        self.free(source)

    def free(self, seq_index: int) -> None:
        """Set the positions of a sequence to 0."""
        for tensor in (*self.keys, *self.values):
            tensor[seq_index, :, : self._lengths[seq_index]] = 0
        self._lengths[seq_index] = 0

    def _widen(self, width: int) -> None:
        if width <= self.width:
            return
        assert width <= self.n_positions
        # Doubling keeps the number of copies small.
        self.width = min(round_up(self.n_positions), max(round_up(width), 2 * self.width))
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                grown = old.new_empty(*old.shape[:2], self.width, old.shape[3])
                grown[:, :, : old.shape[2]] = old
                grown[:, :, old.shape[2] :] = 0
                tensors[layer] = grown


@dataclass(frozen=True, slots=True)
class _Round:
    """At most one token of each sequence: S of the N tokens of a forward pass.

    Attributes:
        tokens: Their indices (S,) among the N tokens; None for all of them in order.
        seq_indices: Their sequences (S,).
        width: Keys that attention reads, W.
        masked: (S, 1, 1, W), true at the positions after the token's own.
    """

    tokens: Tensor | None
    seq_indices: slice | Tensor
    width: int
    masked: Tensor


class PaddedAttention:
    """Attention of one forward pass over a padded cache. seq_indices, positions: (N,)."""

    def __init__(
        self, cache: PaddedKVCache, seq_indices: Sequence[int], positions: Sequence[int]
    ) -> None:
        self.cache = cache
        self.seq_indices = torch.tensor(seq_indices, device=cache.device)
        self.positions = torch.tensor(positions, device=cache.device)
        rounds: list[list[int]] = []
        n_seen: dict[int, int] = {}
        for token, seq_index in enumerate(seq_indices):
            index = n_seen.get(seq_index, 0)
            n_seen[seq_index] = index + 1
            if index == len(rounds):
                rounds.append([])
            rounds[index].append(token)
        self.rounds = [self._round(tokens, seq_indices, positions) for tokens in rounds]

    def __call__(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        """Attend: qkv (>= N, 3, H, D) -> (>= N, C)."""
        cache, n_tokens = self.cache, len(self.seq_indices)
        keys, values = cache.keys[layer], cache.values[layer]
        heads = qkv[:n_tokens]
        head_size, depth = heads.shape[-1], keys.shape[-1]
        if depth > head_size:
            heads = F.pad(heads, (0, depth - head_size))
        q, k, v = heads.unbind(1)  # each (N, H, depth)
        if cache.spec.cache_dtype == "int8":
            k, v = round_trip_int8(k), round_trip_int8(v)
        keys[self.seq_indices, :, self.positions] = k
        values[self.seq_indices, :, self.positions] = v
        attended = [
            self._attend(
                round_, q if round_.tokens is None else q[round_.tokens], keys, values, scale
            )
            for round_ in self.rounds
        ]
        if len(attended) == 1 and n_tokens == len(qkv):
            (out,) = attended
        else:
            out = q.new_zeros(len(qkv), *q.shape[1:])
            for round_, part in zip(self.rounds, attended, strict=True):
                out[slice(n_tokens) if round_.tokens is None else round_.tokens] = part
        return out[..., :head_size].flatten(1)

    def _round(
        self, tokens: list[int], seq_indices: Sequence[int], positions: Sequence[int]
    ) -> _Round:
        device = self.cache.device
        width = round_up(max(positions[token] for token in tokens) + 1)
        own = [seq_indices[token] for token in tokens]
        index = torch.tensor(tokens, device=device)
        is_contiguous = own == list(range(own[0], own[0] + len(own)))
        masked = torch.arange(width, device=device) > self.positions[index, None]
        return _Round(
            tokens=None if len(tokens) == len(seq_indices) else index,
            seq_indices=slice(own[0], own[0] + len(own))
            if is_contiguous
            else torch.tensor(own, device=device),
            width=width,
            masked=masked[:, None, None],
        )

    def _attend(
        self, round_: _Round, q: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        is_pairwise = self.cache.spec.reduction_order == "pairwise"
        dtype = torch.float32 if self.cache.upcast or is_pairwise else q.dtype
        k, v = (x[round_.seq_indices, :, : round_.width].to(dtype) for x in (keys, values))
        attend = _attend_pairwise if is_pairwise else _attend
        return attend(q.to(dtype) * scale, k, v, round_.masked).to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    """Attend: q (S, H, depth), k and v (S, H, W, depth), masked (S, 1, 1, W) -> (S, H, depth)."""
    if q.shape[0] * q.shape[1] == 1:
        # torch multiplies a single matrix with another kernel, which rounds differently: run two.
        return _attend(*(x.expand(2, *x.shape[1:]) for x in (q, k, v, masked)))[:1]
    # Keys first: the same products, read faster.
    scores = (k @ q[..., None]).transpose(-1, -2)  # (S, H, 1, W)
    weights = F.softmax(scores.masked_fill_(masked, float("-inf")), dim=-1)
    return (weights @ v)[:, :, 0]


def _attend_pairwise(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    """Attend elementwise, as `_attend`. Keys that only widen the call have weight 0 in all sums."""
    scores = _pairwise_sum(k * q[:, :, None], 3)  # (S, H, W)
    scores = scores.masked_fill_(masked[:, :, 0], float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return _pairwise_sum(weights[..., None] * v, 2) / _pairwise_sum(weights, 2)[..., None]


def _pairwise_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over a dimension as a binary tree: neighbours first, then their sums."""
    while (size := x.shape[dim]) > 1:
        if size % 2:
            x = torch.cat([x, torch.zeros_like(x.narrow(dim, 0, 1))], dim)
        left, right = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
        x = left + right
    return x.squeeze(dim)
