"""The keys and values of the sequences that are running.

Knows: a slot (a sequence's place) and a position in it. Does not know: whose sequence it is.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Per layer keys and values (B, H, width, D): B slots, positions 0 to width - 1.

    The width grows on demand (`reserve`), so a run of short sequences never pays for n_positions. What no sequence has
    written is 0, never left-overs: a masked position still enters attention as 0 x value, and 0 x NaN is NaN.
    """

    def __init__(
        self, *, n_layer: int, n_slots: int, n_head: int, head_size: int, n_positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.n_slots, self.n_positions = n_slots, n_positions
        self.width = 0
        empty = torch.zeros(n_slots, n_head, 0, head_size, dtype=dtype, device=device)
        self.keys: list[Tensor] = [empty] * n_layer
        self.values: list[Tensor] = [empty] * n_layer

    def reserve(self, width: int) -> None:
        """Make room for positions 0 to width - 1; what is there stays. At least doubles, so that the copies stay few."""
        assert width <= self.n_positions
        if width <= self.width:
            return
        self.width = min(self.n_positions, max(round_up(width), 2 * self.width))
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                grown = old.new_empty(*old.shape[:2], self.width, old.shape[3])
                grown[:, :, : old.shape[2]] = old
                grown[:, :, old.shape[2] :] = 0
                tensors[layer] = grown

    def write(self, layer: int, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """slots, positions (N,); keys, values (N, H, D)."""
        self.keys[layer][slots, :, positions] = keys
        self.values[layer][slots, :, positions] = values

    def move(self, source: int, target: int, length: int) -> None:
        """Positions 0 to length - 1 of a slot take the place of another's, which must have been cleared."""
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[target, :, :length] = tensor[source, :, :length]
        self.clear(source, length)

    def clear(self, slot: int, length: int) -> None:
        """Zero positions 0 to length - 1 of a slot, so that nothing of its sequence reaches a later one."""
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[slot, :, :length] = 0


def round_up(width: int) -> int:
    """The next multiple of 16: attention over padded widths then meets few shapes."""
    return -(-width // 16) * 16
