"""The blocks of the network: masked self-attention and an MLP, each after a norm and added to what comes in (pre-norm GPT-2).

Knows: tokens, as rows of (N, C), and the layer that a block is. Does not know: sequences, embeddings, the head.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from pipeline.gpt.attention import Attention
from pipeline.gpt.config import GPTConfig
from pipeline.gpt.linear import Linear, Projection
from pipeline.gpt.norm import Norm
from pipeline.gpt.ragged import PackedBlocks, RaggedAttention


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        width = config.n_embd
        self.layer, self.scale = layer, config.attention_scale(layer)
        self.ln_1 = Norm(width, config.layer_norm_epsilon)
        self.attn_qkv = Projection(width, config.n_head)
        self.attn_out = Linear(width, width)
        self.ln_2 = Norm(width, config.layer_norm_epsilon)
        self.mlp_in = Linear(width, config.n_inner, activation=config.activation)
        self.mlp_out = Linear(config.n_inner, width)

    def forward(self, x: Tensor, attention: Attention, wanted: Tensor | None = None) -> Tensor:
        """x (N, C) -> (N, C), or (S, C) of the tokens `wanted` (S,) alone: of the others nothing is computed after attention."""
        attended = attention(self.layer, self.attn_qkv(self.ln_1(x)), self.scale)
        if wanted is not None:
            x, attended = x[wanted], attended[wanted]
        x = self.attn_out(attended, residual=x)
        return self.mlp_out(self.mlp_in(self.ln_2(x)), residual=x)  # type: ignore[no-any-return]

    @property
    def packed(self) -> list[Tensor] | None:
        """The weights in the order in which the kernel `blocks` takes them; None where a linear is not laid out for our kernels."""
        weights: list[Tensor] = []
        for part in (self.ln_1, self.attn_qkv, self.attn_out, self.ln_2, self.mlp_in, self.mlp_out):
            weight = part.packed if isinstance(part, Linear) else part.weight
            if weight is None:
                return None
            weights += [weight, part.get_parameter("bias")]
        return weights


class Blocks(nn.ModuleList):
    """Blocks, one after the other; once they are packed for our kernels, in one call."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(blocks)
        self.use_kernel()

    def forward(self, x: Tensor, attention: Attention, wanted: Tensor | None = None) -> Tensor:
        """x (N, C) -> (N, C), or (S, C) of the tokens `wanted` (S,) alone: of the others the last block computes keys and values."""
        if self._packed is not None and isinstance(attention, RaggedAttention):
            return attention.through(self._packed, x, wanted)
        *blocks, last = self
        for block in blocks:
            x = block(x, attention)
        return last(x, attention, wanted)  # type: ignore[no-any-return]

    def use_kernel(self) -> None:
        """Look whether the weights are laid out for our kernels, and where all are, compute in one call from now on."""
        blocks = [block for block in self if isinstance(block, Block)]
        packed = [block.packed for block in blocks]
        self._packed = None
        if all(packed):
            self._packed = PackedBlocks(
                weights=[weight for weights in packed for weight in weights or []],
                layers=[block.layer for block in blocks],
                scales=[block.scale for block in blocks],
                epsilon=blocks[0].ln_1.eps,
                activation=blocks[0].mlp_in.activation,
            )

    @property
    def in_one_call(self) -> bool:
        return self._packed is not None
