"""The network: GPT-2 (Radford et al. 2019), written out.

Token and position embeddings are summed, then come L pre-norm blocks of masked self-attention and an MLP, a final norm and
a linear head. All layers work on flat tokens: a token is a row of (N, C), whichever sequence it belongs to; only attention
knows sequences.

Knows: tokens, slots and positions. Does not know: prompts, text, sampling.
Shapes: N tokens of a call, B sequences or slots, T tokens of a sequence, C n_embd, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.gpt.attention import Attention, CachedAttention, WholeContextAttention
from pipeline.gpt.config import GPTConfig
from pipeline.gpt.kv_cache import KVCache
from pipeline.gpt.linear import Linear, round_rows


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        width = config.n_embd
        self.layer, self.scale = layer, config.attention_scale(layer)
        self.ln_1 = nn.LayerNorm(width, config.layer_norm_epsilon)
        self.attn_qkv = Linear(width, 3 * width)
        self.attn_out = Linear(width, width)
        self.ln_2 = nn.LayerNorm(width, config.layer_norm_epsilon)
        self.mlp_in = Linear(width, config.n_inner, activation=config.activation)
        self.mlp_out = Linear(config.n_inner, width)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        """x (N, C) -> (N, C)."""
        attended = attention(self.layer, self.attn_qkv(self.ln_1(x)), self.scale)
        x = self.attn_out(attended, residual=x)
        return self.mlp_out(self.mlp_in(self.ln_2(x)), residual=x)  # type: ignore[no-any-return]


class GPT(nn.Module):
    """The whole network. The head is a layer of its own, which may share the token embedding's weight (tied)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.tie(self.wte)

    def forward(self, idx: Tensor) -> Tensor:
        """The plain network: idx (B, T) -> logits (B, T, V), every position over its whole context, no cache.

        Raises ValueError when T is 0 or above n_positions.
        """
        batch, length = idx.shape
        if not 1 <= length <= self.config.n_positions:
            raise ValueError(f"a sequence of {length} tokens does not fit: 1 to n_positions ({self.config.n_positions}) do")
        attention = WholeContextAttention(
            batch=batch, length=length, n_head=self.config.n_head, upcast=self.config.upcast_attention, device=idx.device
        )
        positions = torch.arange(length, device=idx.device).repeat(batch)
        logits: Tensor = self.lm_head(self._hidden(idx.reshape(-1), positions, attention))
        return logits.view(batch, length, -1)

    def new_cache(self, n_slots: int) -> KVCache:
        """An empty cache for this network's sequences."""
        return KVCache(
            n_layer=self.config.n_layer,
            n_slots=n_slots,
            n_head=self.config.n_head,
            head_size=self.config.head_size,
            n_positions=self.config.n_positions,
            dtype=self.dtype,
            device=self.device,
        )

    def extend(self, cache: KVCache, *, slots: list[int], starts: list[int], tokens: list[list[int]]) -> Tensor:
        """Run new tokens of some sequences through the network -> logits (S, V) that follow the last token of each.

        Sequence i stands in slots[i]; its tokens[i] (at least one) take the positions from starts[i] on, and everything
        before them must be in the cache. Prefill and decode are this same call.
        """
        attention = CachedAttention(
            cache,
            slots=slots,
            starts=starts,
            counts=[len(new) for new in tokens],
            n_head=self.config.n_head,
            upcast=self.config.upcast_attention,
        )
        flat = torch.tensor([token for new in tokens for token in new], device=self.device)
        x = self._hidden(self._padded(flat), self._padded(attention.positions), attention, self._padded(attention.last_tokens))
        logits: Tensor = self.lm_head(x)
        return logits[: len(tokens)]

    def _padded(self, rows: Tensor) -> Tensor:
        """(N,) -> (N or more,): where the linears are packed, as many rows as they have a kernel for; zeros fill up."""
        return F.pad(rows, (0, round_rows(len(rows)) - len(rows))) if self.lm_head.packed else rows

    def _hidden(self, tokens: Tensor, positions: Tensor, attention: Attention, wanted: Tensor | None = None) -> Tensor:
        """tokens, positions (N,) -> what the head reads (N, C), or only the rows `wanted`."""
        x = self.wte(tokens) + self.wpe(positions)
        for block in self.blocks:
            x = block(x, attention)
        x = x if wanted is None else x[wanted]
        normed: Tensor = self.ln_f(x)
        return normed

    def pack(self) -> None:
        """Lay the linears out for this CPU (see Linear.pack); the network can no longer be copied into or moved."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()

    def parameter_count(self) -> int:
        """Parameters with the head counted as its own, as transformers counts an untied model. Before `pack` only."""
        return sum(parameter.numel() for _, parameter in self.named_parameters(remove_duplicate=False))

    @property
    def linear_kind(self) -> str:
        """ "prepacked" when the linears are laid out for oneDNN, "plain" otherwise."""
        return "prepacked" if self.lm_head.packed else "plain"

    @property
    def dtype(self) -> torch.dtype:
        return self.wpe.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.wpe.weight.device
