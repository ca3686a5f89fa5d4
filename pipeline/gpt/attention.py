"""Masked self-attention over flat tokens, padded only in here.

Knows: queries, keys and values of one layer, and which slot and position each token has.
Does not know: the layer's weights, or what the tokens mean.

The formula is that of Vaswani et al. 2017, section 3.2.1, with a causal mask: softmax(q k^T * scale) v over the keys at
positions 0 to the query's own. It is computed as matmul and softmax, since torch's fused attention is slower on a CPU for
one query a sequence and its bits depend on the batch.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.gpt.kv_cache import KVCache, round_up


class Attention(Protocol):
    """Attention of one call of the network: takes qkv (N, 3C) of a layer, returns (N, C)."""

    def __call__(self, layer: int, qkv: Tensor, scale: float) -> Tensor: ...


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float, *, upcast: bool) -> Tensor:
    """q (S, H, Tq, D), k and v (S, H, W, D), hidden (S or 1, 1, Tq, W), true where a query may not look
    -> (S, H, Tq, D).

    `upcast` computes in float32 whatever the type of q (the config switch reorder_and_upcast_attn).
    """
    dtype = q.dtype
    if upcast:
        q, k, v = q.float(), k.float(), v.float()
    q = (q * scale).transpose(-1, -2)
    # the same products either way; for one query a sequence, keys first reads them faster
    scores = (k @ q).transpose(-1, -2) if q.shape[-1] == 1 else q.transpose(-1, -2) @ k.transpose(-1, -2)
    scores = scores.masked_fill_(hidden, float("-inf"))
    return (torch.softmax(scores, dim=-1) @ v).to(dtype)


class WholeContextAttention:
    """Attention without a cache: N = B * T tokens, every sequence whole and of the same length T."""

    def __init__(self, *, batch: int, length: int, n_head: int, upcast: bool, device: torch.device) -> None:
        self.shape = (batch, length, 3, n_head, -1)
        self.upcast = upcast
        self.hidden = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)[None, None]

    def __call__(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        q, k, v = qkv.view(self.shape).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        out = softmax_attention(q, k, v, self.hidden, scale, upcast=self.upcast)
        return out.transpose(1, 2).reshape(qkv.shape[0], -1)


class CachedAttention:
    """Attention of the new tokens of some slots over everything that those slots hold, for one step.

    Sequence i of the step stands in slot slots[i], has starts[i] tokens in the cache and counts[i] >= 1 new ones. The flat
    tokens are those of sequence 0, then of sequence 1, and so on; further rows of qkv belong to nobody and come back as 0.
    The tokens' keys and values are written to the cache first.
    """

    def __init__(self, cache: KVCache, *, slots: list[int], starts: list[int], counts: list[int], n_head: int, upcast: bool) -> None:
        self.cache, self.n_head, self.upcast = cache, n_head, upcast
        device = cache.keys[0].device
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        cache.reserve(max(ends))
        self.n_sequences, self.queries = len(slots), max(counts)  # S, Tq
        self.width = min(cache.width, round_up(max(ends)))  # W
        count = torch.tensor(counts, device=device)
        sequence = torch.repeat_interleave(torch.arange(len(slots), device=device), count)  # (N,)
        first = torch.cumsum(count, 0) - count
        offset = torch.arange(len(sequence), device=device) - first[sequence]
        start = torch.tensor(starts, device=device)
        self.token_slots = torch.tensor(slots, device=device)[sequence]
        self.positions = start[sequence] + offset
        self.last_tokens = first + count - 1  # (S,): where each sequence's last token stands among the flat ones
        # where the flat tokens stand among the padded queries; nothing to pad when every sequence has as many
        self.padded = None if min(counts) == self.queries else sequence * self.queries + offset
        query_positions = start[:, None] + torch.arange(self.queries, device=device)  # (S, Tq)
        self.hidden = (torch.arange(self.width, device=device) > query_positions[:, :, None])[:, None]
        contiguous = slots == list(range(slots[0], slots[0] + len(slots)))
        self.slot_index: slice | Tensor = slice(slots[0], slots[0] + len(slots)) if contiguous else torch.tensor(slots, device=device)

    def __call__(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        n_tokens = len(self.token_slots)
        q, k, v = qkv[:n_tokens].view(n_tokens, 3, self.n_head, -1).unbind(1)  # each (N, H, D)
        self.cache.write(layer, self.token_slots, self.positions, k, v)
        keys = self.cache.keys[layer][self.slot_index, :, : self.width]
        values = self.cache.values[layer][self.slot_index, :, : self.width]
        if self.padded is not None:
            q = q.new_zeros(self.n_sequences * self.queries, *q.shape[1:]).index_copy_(0, self.padded, q)
        q = q.view(self.n_sequences, self.queries, self.n_head, -1).transpose(1, 2)
        out = softmax_attention(q, keys, values, self.hidden, scale, upcast=self.upcast)
        out = out.transpose(1, 2).reshape(self.n_sequences * self.queries, -1)
        out = out if self.padded is None else out[self.padded]
        return out if len(qkv) == n_tokens else F.pad(out, (0, 0, 0, len(qkv) - n_tokens))
