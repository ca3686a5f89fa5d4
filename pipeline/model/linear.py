"""The linear layer of the model, packed for the device at hand.

Weights are plain parameters (out, in) until `pack` lays them out for the C++ kernel, or for oneDNN.
Both are several times faster than the plain layout on a CPU and fuse the epilogue (bias,
activation, residual) into the GEMM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptbatch.pipeline.kernels.huge_pages import HugePages
from gptbatch.pipeline.model.config import Activation

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}

# (activation, algorithm) as torch.ops.mkldnn._linear_pointwise names them
_ONEDNN_ACTIVATIONS: dict[Activation, tuple[str, str]] = {
    "none": ("none", ""),
    "gelu_tanh": ("gelu", "tanh"),
    "gelu": ("gelu", "none"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "tanh": ("tanh", ""),
}

# Plain weights on a CPU get a multiple of this many output features.
GRAIN_FEATURES = 16
# A multiple of the length of every vector register, in numbers.
GRAIN_ACTIVATIONS = 64

LinearKind = Literal[
    "native", "native_float32", "prepacked", "prepacked_float32", "triton", "plain"
]


class Linear(nn.Module):
    """y = activation(x W^T + b), or x W^T + b + residual.

    Attributes:
        kind: Layout of the weight. native: the C++ kernel's, in the model's dtype. prepacked:
            oneDNN's. With _float32, bfloat16 weights are widened. triton: (out, in) for the Triton
            kernel; in float32, the outputs are contiguous. plain: (out, in).
        is_head: With kind triton: the result is float32, by the kernel of the head.
        fixed_rows: Run x in pieces of this many rows; None runs all rows at once (see padding.py).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        activation: Activation = "none",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.kind: LinearKind = "plain"
        self.fixed_rows: int | None = None
        self.is_head = False
        self._packed: Any = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply the layer: x (N, in) -> (N, out); residual (N, out) only without an activation."""
        assert residual is None or self.activation == "none"
        rows = self.fixed_rows
        if rows is None or x.shape[0] == rows:
            return self._apply_to(x, residual)
        assert x.shape[0] % rows == 0, "the padding plan fills the last piece"
        pieces = x.split(rows)
        residuals = [None] * len(pieces) if residual is None else residual.split(rows)
        return torch.cat([self._apply_to(*pair) for pair in zip(pieces, residuals, strict=True)])

    def tie(self, embedding: nn.Embedding) -> None:
        """Share the weight of an embedding of the same shape."""
        assert isinstance(embedding.weight, nn.Parameter)
        self.weight = embedding.weight

    def pack(self, memory: HugePages, *, native: bool) -> None:
        """Lay the weight out for this CPU and drop the plain one, unless a tied embedding holds it.

        On a CPU where oneDNN does not support bfloat16, bfloat16 weights are widened to float32.
        Sums are then at least as accurate, each result is rounded to bfloat16 once, and it is
        several times faster. Where no packed layout exists, out_features is rounded up: products of
        odd widths were seen to depend on how many threads share them.

        Args:
            memory: Takes the layouts of the C++ kernels.
            native: The C++ kernels are available.
        """
        if self._packed is not None:
            return
        kind = packed_kind(self.weight, native=native)
        if kind == "plain":
            self._round_up_features()
            return
        weight = self.weight.detach().contiguous()
        if kind in ("prepacked_float32", "native_float32"):
            weight = weight.float()
        if kind != "prepacked" and self.bias is not None:
            self.bias = _frozen(self.bias.detach().float())
        self.kind = kind
        if kind in ("native", "native_float32"):
            self._packed = memory.pack(weight)
        else:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.weight = _frozen(torch.empty(0, dtype=self.weight.dtype))

    def pack_for_triton(self) -> None:
        """Lay the weight out for the Triton kernel."""
        from gptbatch.pipeline.kernels.cuda.linear import column_major

        self.kind = "triton"
        if self.weight.dtype == torch.float32:
            self.weight = _frozen(column_major(self.weight.detach()))

    @property
    def packed(self) -> Tensor | None:
        """The weight for fused kernels: native, in the model's dtype, without fixed_rows."""
        return self._packed if self.kind == "native" and self.fixed_rows is None else None

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weight; 0 before packing, and for the plain layouts."""
        # A tensor of oneDNN has no nbytes.
        return 0 if self._packed is None else self._packed.numel() * self._packed.dtype.itemsize

    def _apply_to(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self._packed is not None:
            return self._packed_forward(x, residual)
        if self.kind == "triton":
            return self._triton_forward(x, residual)
        y = F.linear(x, self.weight, self.bias)
        if y.shape[1] != self.out_features:
            y = y[:, : self.out_features].contiguous()
        y = _activate(self.activation, y)
        return y if residual is None else y + residual

    def _packed_forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        dtype = x.dtype
        is_widened = self.kind in ("prepacked_float32", "native_float32")
        if is_widened:
            x, residual = x.float(), None if residual is None else residual.float()
        y: Tensor
        if self.kind in ("native", "native_float32"):
            y = torch.ops.gptbatch.linear(
                x, self._packed, self.out_features, self.bias, residual, self.activation
            )
        elif residual is not None:
            y = torch.ops.mkldnn._linear_pointwise.binary(
                x, residual, self._packed, self.bias, "add"
            )
        else:
            name, algorithm = _ONEDNN_ACTIVATIONS[self.activation]
            y = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, name, [], algorithm)
        return y.to(dtype) if is_widened else y

    def _triton_forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        from gptbatch.pipeline.kernels.cuda.linear import linear, new_logits

        block_max = None
        if self.is_head:
            y, block_max = new_logits(len(x), self.out_features, x.device)
        else:
            y = torch.empty(len(x), self.out_features, dtype=x.dtype, device=x.device)
        linear(x.contiguous(), self.weight, self.bias, residual, y, self.activation, block_max)
        return y

    def _round_up_features(self) -> None:
        extra = -self.weight.shape[0] % GRAIN_FEATURES
        if not extra or self.weight.device.type != "cpu":
            return
        self.weight = _frozen(F.pad(self.weight.detach(), (0, 0, 0, extra)))
        if self.bias is not None:
            self.bias = _frozen(F.pad(self.bias.detach(), (0, extra)))


class QKVProjection(Linear):
    """The linear that makes queries, keys and values: x (N, C) -> (N, 3, H, D).

    Packed for the C++ kernels, the 3 D outputs of a head are adjacent, as the kernel that fuses
    projection and attention needs them.
    """

    def __init__(self, width: int, n_head: int) -> None:
        super().__init__(width, 3 * width)
        self.n_head, self.by_head = n_head, False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Project x (N, C) -> (N, 3, H, D)."""
        y, head_size = super().forward(x, residual), self.in_features // self.n_head
        if self.by_head:
            return y.view(len(x), self.n_head, 3, head_size).transpose(1, 2)
        return y.view(len(x), 3, self.n_head, head_size)

    def pack(self, memory: HugePages, *, native: bool) -> None:
        """Sort the outputs by head if `native`, then pack as `Linear.pack`."""
        if native and not self.by_head:
            assert self.bias is not None
            self.by_head = True
            self.weight, self.bias = (
                _frozen(x.detach().unflatten(0, (3, self.n_head, -1)).transpose(0, 1).flatten(0, 2))
                for x in (self.weight, self.bias)
            )
        super().pack(memory, native=native)


def packed_kind(weight: Tensor, *, native: bool) -> LinearKind:
    """Return the layout that `Linear.pack` gives this weight on this machine."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return "plain"
    has_onednn = torch.backends.mkldnn.is_available()
    if weight.dtype == torch.float32:
        return "native" if native else "prepacked" if has_onednn else "plain"
    if has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "native" if native and torch.ops.gptbatch.has_bfloat16() else "prepacked"
    return "native_float32" if native else "prepacked_float32" if has_onednn else "plain"


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Let torch use `count` CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _activate(activation: Activation, x: Tensor) -> Tensor:
    """Apply the activation with the same instructions to every number, wherever it stands in x."""
    function = ACTIVATIONS[activation]
    if x.device.type != "cpu" or activation in ("none", "relu") or x.requires_grad:
        return function(x)
    # torch splits a tensor among threads. The remainder of a piece that does not fill a vector is
    # computed with other instructions, which round differently. One thread and a multiple of every
    # vector length leave no remainder.
    with use_threads(1):
        padded = F.pad(x.flatten(), (0, -x.numel() % GRAIN_ACTIVATIONS))
        return function(padded)[: x.numel()].view_as(x)


def _frozen(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)
