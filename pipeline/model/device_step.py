"""One forward pass and sampling on a device, by kernels over fixed buffers.

    rows  0 .. S - 1      the latest token of each sequence, from the state: they get a next token
          S .. S + P - 1  prompt tokens, from `chunk`: only their keys and values matter

The last token of a prompt is a row of the first kind, so that all rows with logits are those with a
sequence, in order: nothing is gathered. S and P are rounded up to a few sizes, by empty rows. Every
row is computed on its own, so sizes, empty rows and other sequences change no bit, and a launch of
the same S and P may be replayed as a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptbatch.pipeline.kernels.cuda.adjustments import AdjustmentLayout, Adjustments
from gptbatch.pipeline.kernels.cuda.linear import new_logits
from gptbatch.pipeline.kernels.cuda.logprobs import WIDTH
from gptbatch.pipeline.kernels.cuda.sample import scratch_sizes
from gptbatch.pipeline.kernels.cuda.state import HEADER, POSITION
from gptbatch.pipeline.model.gpt import GPT, Block

if TYPE_CHECKING:
    from gptbatch.pipeline.kernels.cuda.kernels import Kernels
    from gptbatch.pipeline.kv_cache.device import DeviceKVCache

MIN_DECODE_ROWS = 16
# Prompt tokens of a step; others are rounded up.
CHUNK_SIZES = (0, 32, 128, 512, 2048)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What decides the launches of a step.

    Attributes:
        decode_rows: S.
        chunk_rows: P.
        full_vocab: A row may keep the full vocabulary.
        top_p: A row may have a top_p.
        adjusts: A row may have bias, penalties or masks.
        logprobs: A row may have log probabilities.
    """

    decode_rows: int
    chunk_rows: int
    full_vocab: bool
    top_p: bool
    adjusts: bool
    logprobs: bool


def padded_decode_rows(count: int) -> int:
    """Round the number of sequences up: 0, 16, 32, 64, 128, ..."""
    rows = MIN_DECODE_ROWS if count else 0
    while rows < count:
        rows *= 2
    return rows


def padded_chunk_rows(count: int) -> int:
    """Round the number of prompt tokens up."""
    return next(size for size in CHUNK_SIZES if size >= count)


class DeviceStep:
    """The buffers of a step, on the device of the cache.

    Attributes:
        state: (sequences, fields) int64, see kernels/cuda/state.py.
        chunk: (3, P) int64: tokens, positions and sequences of prompt tokens.
        logits: (S, V) float32 of the last step.
        out: (S, 2) int64: tokens and the bits of margins of the last step, see `advance`.
        logprobs: (S, WIDTH) int64 of the last step, see kernels/cuda/logprobs.py.
        adjustment_layout: Of `adjustments`.
        adjustments: Of the rows with bias, penalties or masks; None before the first of them.
    """

    def __init__(
        self,
        model: GPT,
        cache: DeviceKVCache,
        kernels: Kernels,
        eos_token_ids: tuple[int, ...],
        *,
        n_token_bytes: int,
    ) -> None:
        config, device = model.config, cache.device
        max_seqs, per_context = cache.tables.shape
        decode_rows = padded_decode_rows(max_seqs)
        rows = decode_rows + CHUNK_SIZES[-1]
        width = config.n_embd
        self._model, self._cache, self._kernels = model, cache, kernels
        self._blocks = [block for block in model.blocks if isinstance(block, Block)]

        def new(*shape: int, dtype: torch.dtype = model.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.state = new(decode_rows, HEADER + per_context, dtype=torch.int64)
        self.state[:, POSITION.value] = -1
        self.chunk = new(3, CHUNK_SIZES[-1], dtype=torch.int64)
        self._seq_indices = new(rows, dtype=torch.int32)
        self._positions = new(rows, dtype=torch.int32)
        self._x, self._h, self._attended = (new(rows, width) for _ in range(3))
        self._qkv, self._inner = new(rows, 3 * width), new(rows, config.n_inner)
        self.logits, self._maxima = new_logits(decode_rows, config.vocab_size, device)
        small, large = scratch_sizes(self._maxima.shape[1])
        self._scratch = (
            new(decode_rows, small, dtype=torch.int32),
            new(decode_rows, large, dtype=torch.int64),
        )
        self._sampled = new(decode_rows, dtype=torch.int32)
        self._eos_token_ids = torch.tensor(eos_token_ids, dtype=torch.int64, device=device)
        self.out = new(decode_rows, 2, dtype=torch.int64)
        self.logprobs = new(decode_rows, WIDTH, dtype=torch.int64)
        self.adjustment_layout = AdjustmentLayout(
            rows=decode_rows,
            n_positions=config.n_positions,
            vocab_size=config.vocab_size,
            n_token_bytes=n_token_bytes,
        )
        self.adjustments: Adjustments | None = None

    def write_adjustments(self, upload: Tensor) -> None:
        """Write numbers to `adjustments`: their indices and they themselves (2, n) int64."""
        device = self.state.device
        if self.adjustments is None:
            self.adjustments = Adjustments(self.adjustment_layout, device)
        indices, numbers = upload.to(device, non_blocking=True)
        self.adjustments.flat.index_copy_(0, indices, numbers.int())

    def run(self, shape: StepShape) -> None:
        """Launch the kernels of a step."""
        kernels = self._kernels
        seqs, rows = shape.decode_rows, shape.decode_rows + shape.chunk_rows
        state, tables = self.state, self.state[:, HEADER:]
        x, h, qkv = self._x[:rows], self._h[:rows], self._qkv[:rows]
        attended, inner = self._attended[:rows], self._inner[:rows]
        seq_indices, positions = self._seq_indices[:rows], self._positions[:rows]
        wte, wpe = self._model.wte.weight, self._model.wpe.weight
        kernels.embed(state, self.chunk, seqs, wte, wpe, x, seq_indices, positions)
        where = (tables, seq_indices, positions)
        for block, layer in zip(self._blocks, self._cache.layers, strict=True):
            _norm(kernels, block.ln_1, x, h)
            kernels.linear(h, block.attn_qkv.weight, block.attn_qkv.bias, None, qkv)
            kernels.store(qkv, layer, *where)
            if block is self._blocks[-1]:
                # Of prompt tokens only keys and values were needed.
                x, h, qkv, attended, inner = (each[:seqs] for each in (x, h, qkv, attended, inner))
                where = (tables, seq_indices[:seqs], positions[:seqs])
                if seqs == 0:
                    return
            kernels.attend(qkv, layer, *where, attended, block.scale)
            kernels.linear(attended, block.attn_out.weight, block.attn_out.bias, x, x)
            _norm(kernels, block.ln_2, x, h)
            mlp_in, mlp_out = block.mlp_in, block.mlp_out
            kernels.linear(h, mlp_in.weight, mlp_in.bias, None, inner, mlp_in.activation)
            kernels.linear(inner, mlp_out.weight, mlp_out.bias, x, x)
        _norm(kernels, self._model.ln_f, x, h)
        logits, maxima = self.logits[:seqs], self._maxima[:seqs]
        kernels.linear(h, self._model.lm_head.weight, None, None, logits, "none", maxima)
        self.sample(shape)

    def sample(self, shape: StepShape) -> None:
        """Launch the kernels that follow the logits."""
        kernels, state, seqs = self._kernels, self.state, shape.decode_rows
        logits, maxima, sampled = self.logits[:seqs], self._maxima[:seqs], self._sampled[:seqs]
        adjustments = self.adjustments if shape.adjusts else None
        if shape.logprobs:
            kernels.measure(logits, maxima, state, self.logprobs)
        if adjustments is not None:
            kernels.adjust(logits, maxima, state, adjustments)
        flags = {"full_vocab": shape.full_vocab, "top_p": shape.top_p}
        kernels.sample(logits, maxima, state, self._scratch, sampled, **flags)
        if shape.logprobs:
            kernels.look_up(logits, sampled, state, adjustments, self.logprobs)
        kernels.advance(sampled, state, self._eos_token_ids, self.out[:seqs])


def _norm(kernels: Kernels, norm: torch.nn.LayerNorm, x: Tensor, y: Tensor) -> None:
    kernels.norm(x, norm.weight, norm.bias, y, norm.eps)
