"""The linear layer of the network, in the form that is fast on the device at hand.

Knows: weights (out, in) as plain parameters, and the same weights laid out for our kernel, or for oneDNN, on CPU.
`Projection`, which attention follows, also knows heads. Does not know: where it stands in the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
_FUSED: dict[Activation, tuple[str, str]] = {
    "none": ("none", ""),
    "gelu_tanh": ("gelu", "tanh"),
    "gelu": ("gelu", "none"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "tanh": ("tanh", ""),
}

ALIGNED_FEATURES = 16

LinearKind = Literal["native", "native_float32", "prepacked", "prepacked_float32", "plain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddingPlan:
    """At how many rows the linears run: a row's bits may depend on that, in a way that differs from machine to machine.

    least: the fewest rows, 1 for just as many as there are; one alone takes another path inside oneDNN, and a few do in other
    libraries. constant: as many rows
    at a time, whatever there is to do, or one of the smaller numbers, each linear its own; () runs all at once.
    """

    name: str
    least: int
    constant: tuple[int, ...] = ()

    def rows(self, logits_indices: int) -> int:
        """The number of rows to run for `logits_indices` (at least 1): at most 7 more, or an eighth more above 128; or as planned.

        oneDNN builds a kernel for every number of rows that it meets and keeps it, about half a megabyte each: a run whose
        batches are of every size would slow down for each new one, and hold a gigabyte in the end.
        """
        if self.constant:
            return -(-logits_indices // self.constant[0]) * self.constant[0]
        if self.least == 1:
            return logits_indices
        step = 8
        while logits_indices > 16 * step:
            step *= 2
        return max(self.least, -(-logits_indices // step) * step)


AS_IS = PaddingPlan(name="as_is", least=1)  # for our own kernel, which sums each row by itself

# From the fastest to the surest; the start-up check takes the first under which a row's bits do not depend on other rows. On a CPU
# with matrix instructions (AMX) oneDNN cuts a sum in other places for other row counts, and at 64 rows of many inputs for other
# numbers of threads.
PADDING_PLANS = (
    PaddingPlan(name="pad_8", least=8),
    PaddingPlan(name="pad_32", least=32),
    PaddingPlan(name="fixed_64", least=64, constant=(64, 32, 16)),
)


class Linear(nn.Module):
    """y = activation(x W^T + b), or x W^T + b + residual.

    x (N, in) -> y (N, out). `pack` trades the plain weight for one laid out for our kernel, or by oneDNN, which on a CPU are
    several times as fast as the plain one and take the activation or the addition in the same pass.
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
        self._packed: Any = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        assert residual is None or self.activation == "none"
        rows = self.fixed_rows
        if rows is None or x.shape[0] == rows:
            return self._apply_to(x, residual)
        assert x.shape[0] % rows == 0, "the row plan fills up"
        chunks = x.split(rows)
        residuals = [None] * len(chunks) if residual is None else residual.split(rows)
        return torch.cat([self._apply_to(*pair) for pair in zip(chunks, residuals, strict=True)])

    def _apply_to(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self._packed is not None:
            return self._packed_forward(x, residual)
        y = F.linear(x, self.weight, self.bias)
        if y.shape[1] != self.out_features:
            y = y[:, : self.out_features].contiguous()
        y = _activate(self.activation, y)
        return y if residual is None else y + residual

    def _packed_forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        dtype = x.dtype
        if widened := self.kind in ("prepacked_float32", "native_float32"):
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
            name, algorithm = _FUSED[self.activation]
            y = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, name, [], algorithm)
        return y.to(dtype) if widened else y

    def tie(self, embedding: nn.Embedding) -> None:
        """Share the weight of an embedding of the same shape (a head that is the transposed embedding)."""
        assert isinstance(embedding.weight, nn.Parameter)
        self.weight = embedding.weight

    def pack(self, *, native: bool) -> None:
        """Lay the weight out for a CPU and drop the plain one, unless someone else (a tied embedding) holds it. native: our kernels
        are there.

        bfloat16 on a CPU without instructions for it is widened to float32: sums are then the same or better, each result is
        rounded to bfloat16 once, and it is several times as fast. Where there is no layout for such a weight, a CPU gets it with
        out_features rounded up: products of odd widths have been seen to depend on how many threads share them.
        """
        if self._packed is not None:
            return
        kind = packed_kind(self.weight, native=native)
        if kind == "plain":
            extra = -self.weight.shape[0] % ALIGNED_FEATURES
            if extra and self.weight.device.type == "cpu":
                self.weight = nn.Parameter(
                    F.pad(self.weight.detach(), (0, 0, 0, extra)), requires_grad=False
                )
                self.bias = (
                    None
                    if self.bias is None
                    else nn.Parameter(F.pad(self.bias.detach(), (0, extra)), requires_grad=False)
                )
            return
        weight = self.weight.detach().contiguous()
        if kind in ("prepacked_float32", "native_float32"):
            weight = weight.float()
        if kind != "prepacked" and self.bias is not None:
            self.bias = nn.Parameter(self.bias.detach().float(), requires_grad=False)
        self.kind = kind
        pack = (
            torch.ops.gptbatch.pack_weight
            if kind in ("native", "native_float32")
            else torch.ops.mkldnn._reorder_linear_weight
        )
        self._packed = pack(weight)
        self.weight = nn.Parameter(torch.empty(0, dtype=self.weight.dtype), requires_grad=False)

    @property
    def packed(self) -> Tensor | None:
        """The weight as our kernels take it in the network's own dtype; None where it is laid out otherwise, or constant numbers
        of rows are planned."""
        return self._packed if self.kind == "native" and self.fixed_rows is None else None


class Projection(Linear):
    """A linear that makes queries, keys and values of H heads: x (N, C) -> (N, 3, H, D).

    Packed for our kernels the outputs of a head stand together, as gptbatch::qkv_paged_attention wants them.
    """

    def __init__(self, width: int, n_head: int) -> None:
        super().__init__(width, 3 * width)
        self.n_head, self.by_head = n_head, False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y, head_size = super().forward(x, residual), self.in_features // self.n_head
        if self.by_head:
            return y.view(len(x), self.n_head, 3, head_size).transpose(1, 2)
        return y.view(len(x), 3, self.n_head, head_size)

    def pack(self, *, native: bool) -> None:
        if native and not self.by_head:
            assert self.bias is not None
            self.by_head = True
            self.weight, self.bias = (
                nn.Parameter(
                    numbers.detach()
                    .unflatten(0, (3, self.n_head, -1))
                    .transpose(0, 1)
                    .flatten(0, 2),
                    requires_grad=False,
                )
                for numbers in (self.weight, self.bias)
            )
        super().pack(native=native)


def packed_kind(weight: Tensor, *, native: bool) -> LinearKind:
    """What `Linear.pack` makes of this weight on this machine."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return "plain"
    onednn = torch.backends.mkldnn.is_available()
    if weight.dtype == torch.float32:
        return "native" if native else "prepacked" if onednn else "plain"
    if onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "native" if native and torch.ops.gptbatch.has_bfloat16() else "prepacked"
    return "native_float32" if native else "prepacked_float32" if onednn else "plain"


def _activate(activation: Activation, x: Tensor) -> Tensor:
    """The activation of each number of x, by the same instructions wherever it stands in x."""
    function = ACTIVATIONS[activation]
    if x.device.type != "cpu" or activation in ("none", "relu") or x.requires_grad:
        return function(x)
    # A tensor is cut among the threads, and what does not fill a vector at the end of a piece is computed in another way, with
    # other bits. In one piece that is a multiple of every vector's length there is no such end.
    with use_threads(1):
        return function(F.pad(x.flatten(), (0, -x.numel() % 64)))[: x.numel()].view_as(x)


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
