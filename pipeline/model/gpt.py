"""GPT-2 (Radford et al. 2019), written out: token and position embeddings, pre-norm blocks, head.

All layers work on flat tokens: the N tokens of a forward pass are the rows of an (N, C) tensor,
whichever sequences they belong to. Only attention tells sequences apart. Prefill, chunked prefill
and decode are therefore the same call.

Shapes: N tokens of a forward pass, S tokens whose logits are needed, B sequences, T tokens of a
sequence, C = n_embd, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from gptbatch.pipeline.kv_cache.interface import Attention, KVCache, new_cache
from gptbatch.pipeline.kv_cache.paged import PagedAttention
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.kv_cache.spec import PADDED, Backend, KVCacheSpec, ReductionOrder
from gptbatch.pipeline.model.config import GPTConfig
from gptbatch.pipeline.model.fused_blocks import FusedBlocks, fuse_blocks
from gptbatch.pipeline.model.linear import Linear, LinearKind, QKVProjection
from gptbatch.pipeline.model.lm_head import HEAD_EVENT, MAX_HEAD_ROWS, TwoPassHead
from gptbatch.pipeline.model.norm import Norm
from gptbatch.pipeline.model.padding import PADDING_PLANS


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        width = config.n_embd
        self.layer, self.scale = layer, config.attention_scale(layer)
        self.ln_1 = Norm(width, config.layer_norm_epsilon)
        self.attn_qkv = QKVProjection(width, config.n_head)
        self.attn_out = Linear(width, width)
        self.ln_2 = Norm(width, config.layer_norm_epsilon)
        self.mlp_in = Linear(width, config.n_inner, activation=config.activation)
        self.mlp_out = Linear(config.n_inner, width)

    def forward(
        self, x: Tensor, attention: Attention, logits_indices: Tensor | None = None
    ) -> Tensor:
        """Run the block: x (N, C) -> (N, C).

        Args:
            x: Hidden states (N, C).
            attention: The attention of this forward pass.
            logits_indices: Compute only these S tokens after attention; the result is (S, C).
        """
        qkv = self.attn_qkv(self.ln_1(x))  # (N, 3, H, D)
        attended = attention(self.layer, qkv, self.scale)  # (N, C)
        if logits_indices is not None:
            x, attended = x[logits_indices], attended[logits_indices]  # (S, C)
        x = self.attn_out(attended, residual=x)
        y: Tensor = self.mlp_out(self.mlp_in(self.ln_2(x)), residual=x)
        return y


class BlockStack(nn.ModuleList):
    """The blocks, one after the other, or in one kernel call where their weights are packed for it.

    In one call the modules of the blocks are not called.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(blocks)
        self.fused: FusedBlocks | None = None
        self.fuse()

    def forward(
        self, x: Tensor, attention: Attention, logits_indices: Tensor | None = None
    ) -> Tensor:
        """Run all blocks: x (N, C) -> (N, C), or (S, C) of the tokens logits_indices (S,).

        With logits_indices, the last block computes only keys and values of the other tokens.
        """
        if self.fused is not None and isinstance(attention, PagedAttention):
            return self.fused(x, attention, logits_indices)
        *blocks, last = self
        for block in blocks:
            x = block(x, attention)
        y: Tensor = last(x, attention, logits_indices)
        return y

    def fuse(self) -> None:
        """Look for packed weights again; call it after packing or after another padding plan."""
        self.fused = fuse_blocks(block for block in self if isinstance(block, Block))


class GPT(nn.Module):
    """The whole model. The head shares the token embedding's weight where they are tied.

    `reduction_order` and `padding_plan` decide how attention and linears compute. The
    batch-invariance self-test selects them (self_test.py); packing.py applies a plan.
    """

    def __init__(
        self, config: GPTConfig, *, backend: Backend = PADDED, cache_dtype: CacheDtype = "auto"
    ) -> None:
        """Create the modules with uninitialized weights.

        Args:
            config: Shape and switches.
            backend: Attention backend of the model's caches.
            cache_dtype: What these caches store.
        """
        super().__init__()
        self.config, self.backend, self.cache_dtype = config, backend, cache_dtype
        self.reduction_order: ReductionOrder = backend.reduction_orders[0]
        self.padding_plan = PADDING_PLANS[0]
        self.wte = _embedding(config.vocab_size, config.n_embd)
        self.wpe = _embedding(config.n_positions, config.n_embd)
        self.blocks = BlockStack(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = Norm(config.n_embd, config.layer_norm_epsilon)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.tie(self.wte)
        self.two_pass_head: TwoPassHead | None = None
        # What is wrong with the engine of the device; "" for nothing, None before its self-test.
        self.device_engine_problem: str | None = None
        self.has_self_test = True

    def forward(self, idx: Tensor) -> Tensor:
        """Run whole sequences without a cache of earlier tokens: idx (B, T) -> logits (B, T, V).

        Raises:
            ValueError: T is 0 or above n_positions.
        """
        batch, length = idx.shape
        if not 1 <= length <= self.config.n_positions:
            raise ValueError(
                f"a sequence of {length} tokens does not fit: "
                f"1 to n_positions ({self.config.n_positions}) do"
            )
        hidden = self.hidden(
            self.new_cache(batch, capacity=self.cache_spec.capacity_for([length] * batch)),
            tokens=idx.flatten().tolist(),
            seq_indices=[seq_index for seq_index in range(batch) for _ in range(length)],
            positions=[*range(length)] * batch,
        )  # (B * T, C)
        return self.logits(hidden).view(batch, length, -1)

    def hidden(
        self,
        cache: KVCache,
        *,
        tokens: Sequence[int],
        seq_indices: Sequence[int],
        positions: Sequence[int],
        logits_indices: Sequence[int] | None = None,
    ) -> Tensor:
        """Run N new tokens through the blocks -> the head's input (S, C).

        Args:
            cache: Holds all earlier tokens of these sequences.
            tokens: Token ids (N,).
            seq_indices: The sequence of each token (N,). Tokens of a sequence are in order.
            positions: The position of each token in its sequence (N,).
            logits_indices: Which of the N tokens need logits (S,); None is all of them.
        """
        attention = cache.attention_for(seq_indices, positions)
        x = self._embed(self._padded(tokens), self._padded(positions))  # (padded N, C)
        all_indices = range(len(tokens))
        logits_indices = all_indices if logits_indices is None else logits_indices
        needs_all = [*logits_indices] == [*all_indices]
        x = self.blocks(x, attention, None if needs_all else self._padded(logits_indices))
        y: Tensor = self.ln_f(x[: len(logits_indices)])
        return y

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the head: hidden (S, C) -> logits (S, V)."""
        pieces = [self._head(piece) for piece in hidden.split(MAX_HEAD_ROWS)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def new_cache(self, max_seqs: int, *, capacity: int | None = None) -> KVCache:
        """Create an empty KV cache for this model; see `kv_cache.interface.new_cache`."""
        return new_cache(self.cache_spec, max_seqs, capacity=capacity)

    @property
    def cache_spec(self) -> KVCacheSpec:
        """The layout of this model's KV caches."""
        return KVCacheSpec(
            backend=self.backend,
            config=self.config,
            dtype=self.dtype,
            cache_dtype=self.cache_dtype,
            reduction_order=self.reduction_order,
            device=self.device,
        )

    @property
    def linear_kind(self) -> LinearKind:
        """The layout of the linears' weights; see `Linear.pack`."""
        return self.lm_head.kind

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and hidden states."""
        return self.wpe.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of all weights."""
        return self.wpe.weight.device

    def parameter_count(self) -> int:
        """Count parameters, with a tied head counted on its own. Valid before packing only."""
        return sum(
            parameter.numel() for _, parameter in self.named_parameters(remove_duplicate=False)
        )

    def weights_bytes(self) -> int:
        """Return the bytes of all parameters and packed weights."""
        packed = (module.packed_bytes for module in self.modules() if isinstance(module, Linear))
        return sum(value.nbytes for value in self.parameters()) + sum(packed)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if not self.backend.native:
            x: Tensor = self.wte(tokens) + self.wpe(positions)
        else:
            x = torch.ops.gptbatch.embed(tokens, positions, self.wte.weight, self.wpe.weight)
        return x

    def _head(self, hidden: Tensor) -> Tensor:
        rows = len(hidden)
        if rows == 0:
            return hidden.new_empty(0, self.config.vocab_size)
        padding = self.padding_plan.padded(rows) - rows
        with record_function(HEAD_EVENT):
            logits: Tensor = self.lm_head(F.pad(hidden, (0, 0, 0, padding)))
        return logits[:rows]

    def _padded(self, values: Sequence[int]) -> Tensor:
        """Pad (N,) with zeros to the rows that the linears run, at least 1."""
        padding = self.padding_plan.padded(max(1, len(values))) - len(values)
        return torch.tensor([*values, *[0] * padding], device=self.device)


def _embedding(count: int, width: int) -> nn.Embedding:
    """Create an embedding without random weights.

    On the meta device random weights import torch's compiler, which takes 1.7 s.
    """
    embedding: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(count, width), freeze=False)
    return embedding
