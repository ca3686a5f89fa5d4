"""The decode step of the CUDA design, bare: kernels over a paged cache, replayed as a CUDA graph.

No scheduler and no ends: a fixed number of rows generates a fixed number of tokens. It shows what
the kernels allow, and whether a row's bits depend on its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from gptbatch.pipeline.kernels.cuda.attend import attend_kernel
from gptbatch.pipeline.kernels.cuda.linear import (
    BLOCK_TOKENS,
    GELU_TANH,
    Tile,
    linear,
    partial_kernel,
    qkv_kernel,
)
from gptbatch.pipeline.kernels.cuda.norm import add_norm_kernel, embed_kernel, norm_kernel
from gptbatch.pipeline.kernels.cuda.sample import (
    MAX_BLOCKS,
    MAX_KEPT,
    advance_kernel,
    sample_kernel,
)
from gptbatch.pipeline.model.gpt import GPT, Block
from gptbatch.pipeline.model.linear import Linear
from gptbatch.pipeline.model.norm import Norm

HEAD_COLUMNS = 128
RING_STEPS = 256
# With more rows, one program per output tile is enough to fill the GPU.
MAX_SPREAD_ROWS = 256
# Options of the launches of kernels with one configuration: the compiler fuses nothing.
EXACT: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Options:
    """How the kernels run; `tiles` and `spread` change no bit.

    Attributes:
        tiles: The tile of each linear by name.
        segment: Length of a chain over K. Bits depend on it.
        spread: The segments of out and mlp_out run side by side, and the norm adds them.
        dot: Sums of attention are chains of fma, else trees of `tl.sum`. Bits depend on it.
        attend_warps: Bits depend on it without `dot`.
        sample_warps: Warps per row of the sampler.
    """

    tiles: dict[str, Tile]
    segment: int
    spread: bool
    dot: bool
    attend_warps: int
    sample_warps: int = 8


def weights_of(model: GPT) -> dict[int, Tensor]:
    """Return the weight (N, K) of each linear by the id of its module; float32 has N contiguous."""
    return {
        id(module): column_major(module.weight) if model.dtype == torch.float32 else module.weight
        for module in model.modules()
        if isinstance(module, Linear)
    }


def column_major(weight: Tensor) -> Tensor:
    """Copy w (N, K) so that N is contiguous, with rows of a multiple of 128."""
    columns, depth = weight.shape
    padded = weight.new_zeros(depth, -(-columns // 128) * 128)
    padded[:, :columns] = weight.t()
    return padded[:, :columns].t()


class Buffers:
    """Activations of a forward pass over M tokens, and what decides their next tokens."""

    def __init__(self, model: GPT, rows: int, *, logits: bool) -> None:
        config, device, dtype = model.config, model.device, model.dtype

        def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*shape, device=device, dtype=dtype)

        self.rows = rows
        self.tokens, self.seq_indices = (new(rows, dtype=torch.int32) for _ in range(2))
        self.positions = new(rows, dtype=torch.int32) - 1
        self.x, self.h, self.q, self.attended = (new(rows, config.n_embd) for _ in range(4))
        self.inner = new(rows, config.n_inner)
        self.partials = new(0, dtype=torch.float32)
        if logits:
            columns = triton.cdiv(config.vocab_size, HEAD_COLUMNS)
            # Rows of a multiple of 16 bytes are stored in one go.
            padded = new(rows, columns * HEAD_COLUMNS, dtype=torch.float32)
            self.logits = padded[:, : config.vocab_size]
            self.block_max = new(rows, columns, dtype=torch.float32)
            self.sampled = new(rows, dtype=torch.int32)
            self.steps, self.budgets, self.seeds = (new(rows, dtype=torch.int64) for _ in range(3))
            self.top_k = new(rows, dtype=torch.int32) + 40
            self.temperatures = new(rows, dtype=torch.float64) + 0.8
            self.margins = new(rows, dtype=torch.float64)
            self.blocks_scratch = new(rows, MAX_BLOCKS, dtype=torch.int32)
            self.kept_scratch = new(rows, MAX_KEPT, dtype=torch.int32)
            self.ring = new(rows, RING_STEPS, dtype=torch.int32) - 1


class Decoder:
    """Generates for a fixed set of rows.

    Args:
        model: A model on the device with plain weights.
        rows: Sequences, a multiple of 64.
        max_tokens: Longest sequence.
        options: How the kernels run.
        shuffle: Deal the blocks of the cache in a random order of this seed; None in order.
    """

    def __init__(
        self, model: GPT, rows: int, max_tokens: int, options: Options, shuffle: int | None = None
    ) -> None:
        if any(rows % tile.bm for tile in options.tiles.values()):
            raise ValueError(f"{rows} rows are no multiple of every tile in {options.tiles}")
        self.model, self.rows, self.options = model, rows, options
        self.weights = weights_of(model)
        config = model.config
        per_row = -(-max_tokens // BLOCK_TOKENS.value)
        blocks = torch.arange(rows * per_row)
        if shuffle is not None:
            generator = torch.Generator().manual_seed(shuffle)
            blocks = torch.randperm(rows * per_row, generator=generator)
        self.block_tables = blocks.view(rows, per_row).int().to(model.device)
        # Unused places hold NaN: nothing of them may reach a result.
        self.caches = [
            torch.full(
                (rows * per_row, 2, config.n_head, BLOCK_TOKENS.value, config.head_size),
                float("nan"),
                device=model.device,
                dtype=model.dtype,
            )
            for _ in range(config.n_layer)
        ]
        self.decode = Buffers(model, rows, logits=True)
        self.decode.seq_indices.copy_(torch.arange(rows))
        self.graph: torch.cuda.CUDAGraph | None = None

    def start(self, prompts: Tensor, new_tokens: int, seeds: Tensor, chunk: int = 2048) -> None:
        """Prefill prompts (rows, T) but their last token, `chunk` tokens at a time.

        Rows of prompts may be fewer than `rows`; the others stay idle.
        """
        count, length = prompts.shape
        device, decode = self.model.device, self.decode
        seq_indices = torch.arange(count).repeat_interleave(length - 1).int()
        positions = torch.arange(length - 1).repeat(count).int()
        flat = prompts[:, :-1].flatten().int()
        buffers = Buffers(self.model, chunk, logits=False)
        for first in range(0, len(flat), chunk):
            piece = slice(first, min(first + chunk, len(flat)))
            size = piece.stop - first
            buffers.positions.fill_(-1)
            buffers.tokens[:size] = flat[piece].to(device)
            buffers.positions[:size] = positions[piece].to(device)
            buffers.seq_indices[:size] = seq_indices[piece].to(device)
            self.hidden(buffers)
        decode.positions.fill_(-1)
        decode.positions[:count] = length - 1
        decode.tokens[:count] = prompts[:, -1].int().to(device)
        decode.steps.zero_()
        decode.budgets.fill_(new_tokens)
        decode.seeds[:count] = seeds.to(device)
        decode.margins.fill_(float("inf"))
        decode.ring.fill_(-1)

    def run(self, steps: int, *, graph: bool = True) -> None:
        """Run decode steps, as replays of a CUDA graph or eagerly."""
        if graph and self.graph is None:
            raise RuntimeError("capture() first")
        for _ in range(steps):
            if graph:
                assert self.graph is not None
                self.graph.replay()
            else:
                self.step()

    def capture(self) -> None:
        """Capture one step; a warm-up with all rows idle compiles the kernels before."""
        self.decode.positions.fill_(-1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def step(self) -> None:
        """Run one decode step of all rows."""
        buffers, options = self.decode, self.options
        self.hidden(buffers)
        linear(
            buffers.h,
            self.weights[id(self.model.lm_head)],
            None,
            None,
            buffers.logits,
            tile=options.tiles["head"],
            segment=min(options.segment, self.model.config.n_embd),
            block_max=buffers.block_max,
        )
        sample(buffers, options.sample_warps)
        advance_kernel[(triton.cdiv(self.rows, 128),)](
            buffers.sampled,
            buffers.tokens,
            buffers.positions,
            buffers.steps,
            buffers.budgets,
            buffers.ring,
            -5,
            self.rows,
            SIZE=128,
            RING=RING_STEPS,
        )

    def hidden(self, b: Buffers) -> None:
        """Run embeddings, blocks and the last norm: b.tokens -> b.h (M, C)."""
        model, options = self.model, self.options
        config = model.config
        width = config.n_embd
        epsilon = config.layer_norm_epsilon
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        embed_kernel[(b.rows,)](
            b.tokens,
            b.positions,
            model.wte.weight,
            model.wpe.weight,
            blocks[0].ln_1.weight,
            blocks[0].ln_1.bias,
            b.x,
            b.h,
            epsilon,
            C=width,
            SIZE=triton.next_power_of_2(width),
            **EXACT,
        )
        next_norms = [*(block.ln_1 for block in blocks[1:]), model.ln_f]
        for block, cache, next_norm in zip(blocks, self.caches, next_norms, strict=True):
            tile = options.tiles["qkv"]
            weight = self.weights[id(block.attn_qkv)]
            qkv_kernel[b.rows // tile.bm, triton.cdiv(3 * width, tile.bn)](
                b.h,
                weight,
                block.attn_qkv.bias,
                b.q,
                cache,
                self.block_tables,
                b.seq_indices,
                b.positions,
                self.block_tables.shape[1],
                *weight.stride(),
                width,
                config.n_head,
                min(options.segment, width),
                **tile.options,
            )
            attend_kernel[b.rows, config.n_head](
                b.q,
                cache,
                self.block_tables,
                b.seq_indices,
                b.positions,
                b.attended,
                block.scale,
                self.block_tables.shape[1],
                C=width,
                H=config.n_head,
                SIZE=triton.next_power_of_2(config.head_size),
                DOT=options.dot,
                num_warps=options.attend_warps,
                enable_fp_fusion=False,
            )
            self._add(b, block.attn_out, b.attended, block.ln_2, "out")
            linear(
                b.h,
                self.weights[id(block.mlp_in)],
                block.mlp_in.bias,
                None,
                b.inner,
                tile=options.tiles["mlp_in"],
                activation=GELU_TANH,
                segment=min(options.segment, width),
            )
            self._add(b, block.mlp_out, b.inner, next_norm, "mlp_out")

    def _add(self, b: Buffers, module: Linear, x: Tensor, after: Norm, name: str) -> None:
        """Run b.x += linear(x), b.h = norm(b.x)."""
        options, weight, tile = self.options, self.weights[id(module)], self.options.tiles[name]
        epsilon, (columns, depth) = self.model.config.layer_norm_epsilon, weight.shape
        segment = min(options.segment, depth)
        segments = depth // segment
        if options.spread and segments > 1 and b.rows <= MAX_SPREAD_ROWS:
            size = segments * b.rows * columns
            if b.partials.numel() < size:
                b.partials = torch.empty(size, device=x.device, dtype=torch.float32)
            partial_kernel[b.rows // tile.bm, triton.cdiv(columns, tile.bn), segments](
                x,
                weight,
                b.partials,
                b.rows,
                columns,
                *weight.stride(),
                depth,
                segment,
                **tile.options,
            )
            add_norm_kernel[(b.rows,)](
                b.partials,
                module.bias,
                b.x,
                after.weight,
                after.bias,
                b.h,
                epsilon,
                b.rows,
                C=columns,
                SIZE=triton.next_power_of_2(columns),
                SEGMENTS=segments,
                **EXACT,
            )
        else:
            linear(x, weight, module.bias, b.x, b.x, tile=tile, segment=segment)
            norm_kernel[(b.rows,)](
                b.x,
                after.weight,
                after.bias,
                b.h,
                epsilon,
                C=columns,
                num_warps=1,
                enable_fp_fusion=False,
            )


def sample(b: Buffers, warps: int) -> None:
    """Launch `sample_kernel` for all rows."""
    columns = b.block_max.shape[1]
    sample_kernel[(len(b.logits),)](
        b.logits,
        b.block_max,
        b.positions,
        b.seeds,
        b.steps,
        b.temperatures,
        b.top_k,
        b.blocks_scratch,
        b.kept_scratch,
        b.sampled,
        b.margins,
        b.logits.shape[1],
        b.logits.stride(0),
        columns,
        BN=HEAD_COLUMNS,
        SIZE=triton.next_power_of_2(columns),
        GATHERED=MAX_BLOCKS,
        KEPT=MAX_KEPT,
        num_warps=warps,
        enable_fp_fusion=False,
    )
