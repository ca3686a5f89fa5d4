"""The linear layer of the network, in the form that is fast on the device at hand.

Knows: weights (out, in) as plain parameters, and the same weights prepacked for oneDNN on CPU.
Does not know: where it stands in the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.gpt.config import Activation

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}

# (activation, algorithm) as torch.ops.mkldnn._linear_pointwise names them; the others are applied unfused
_FUSED: dict[Activation, tuple[str, str]] = {"none": ("none", ""), "gelu_tanh": ("gelu", "tanh"), "gelu": ("gelu", "none")}


class Linear(nn.Module):
    """y = activation(x W^T + b), or x W^T + b + residual.

    x (N, in) -> y (N, out). `pack` trades the plain weight for one laid out by oneDNN, which on a CPU is several times as
    fast as the plain one and takes the activation or the addition in the same pass.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, activation: Activation = "none") -> None:
        super().__init__()
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self._packed: Any = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        assert residual is None or self.activation == "none"
        if self._packed is not None:
            return self._packed_forward(x, residual)
        y = ACTIVATIONS[self.activation](F.linear(x, self.weight, self.bias))
        return y if residual is None else y + residual

    def _packed_forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        rows = x.shape[0]
        if rows == 1:  # one row takes another path inside oneDNN, with other bits: run it as two
            x = x.expand(2, -1).contiguous()
            residual = None if residual is None else residual.expand(2, -1).contiguous()
        if residual is not None:
            y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._packed, self.bias, "add")
            return y[:rows]
        fused = _FUSED.get(self.activation)
        name, algorithm = fused or ("none", "")
        y = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, name, [], algorithm)
        return (y if fused else ACTIVATIONS[self.activation](y))[:rows]

    def tie(self, embedding: nn.Embedding) -> None:
        """Share the weight of an embedding of the same shape (a head that is the transposed embedding)."""
        assert isinstance(embedding.weight, nn.Parameter)
        self.weight = embedding.weight

    @property
    def packed(self) -> bool:
        return self._packed is not None

    def pack(self) -> None:
        """Lay the weight out for oneDNN and drop the plain one, unless someone else (a tied embedding) holds it.

        Does nothing where `can_pack` is false.
        """
        if self._packed is None and can_pack(self.weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach().contiguous())
            self.weight = nn.Parameter(torch.empty(0, dtype=self.weight.dtype), requires_grad=False)


def round_rows(rows: int) -> int:
    """The number of rows to run for `rows`: at most 7 more, or an eighth more above 128.

    oneDNN builds a kernel for every number of rows that it meets and keeps it, about half a megabyte each: a run whose
    batches are of every size would slow down for each new one, and hold a gigabyte in the end.
    """
    step = 8
    while rows > 16 * step:
        step *= 2
    return -(-rows // step) * step


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN takes this weight: on CPU, float32, or bfloat16 where the CPU has the instructions."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
