"""The logits that can matter, exactly, and the others nearly: half of the head's work.

The next token follows from the few largest logits of a row, but the head computes one for every token of the vocabulary, which is a
quarter of all the work of gpt2. A two_pass_head computes them in bfloat16, which a CPU with instructions for it does twice as fast as float32,
says by how much each can be off, and computes those again in float32 that may be large enough. Which those are
depends on nothing but the row, and they are the same bits as the head's.

With h a row of the hidden state and w one of the weight, h' and w' rounded to bfloat16 (Cauchy and Schwarz):
    |h w - h' w'|  <=  |h - h'| |w| + |h'| |w - w'|
and both sums, of C products, are themselves rounded, together by less than C 2^-22 |h| |w|.

Knows: hidden states and the weight of the head. Does not know: what a token is chosen by.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.profiler import record_function

from gptbatch.pipeline.model.linear import Linear

HEAD = "gptbatch::head"  # the name of the head's work in a profile
HEAD_ROWS = 128  # that the head runs at once: it is as fast as with more, and the start-up check tries as many
BLOCK = 32  # tokens that have one bound (maxima.h)
MOST_MISSED = 2  # one row in so many may need all logits, as many first tokens do; where more do, a two_pass_head costs more than it saves
GRACE = 2 * HEAD_ROWS  # rows before that is looked at
LEAST_WEIGHTS = (
    2**19
)  # of a head: a smaller one takes no longer than what a two_pass_head does besides
LEAST_TOKENS = (
    1024  # of a vocabulary: the largest logits of a smaller one are too large a part of it
)
SUBNORMAL = 1e-36  # instructions for bfloat16 take numbers below 1.2e-38 for 0: the norm of a row of them is less


class TwoPassHead:
    """Of one head without a bias. weight (V, C) in float32: the rows of the head, where they stand anyway."""

    def __init__(self, weight: Tensor) -> None:
        assert weight.dtype == torch.float32
        self.weight = weight = weight.contiguous()
        rounded = weight.bfloat16()
        self._packed = torch.ops.gptbatch.pack_weight(rounded)
        self._kept = threading.local()  # each thread's logits, always in the same place: the system would give new memory, slowly
        pieces = [
            torch.stack(
                [_largest_norms(some), _largest_norms(some - of_some.float()) + SUBNORMAL], dim=1
            )
            for some, of_some in zip(
                weight.split(128 * BLOCK), rounded.split(128 * BLOCK), strict=True
            )
        ]
        self._errors = torch.cat(pieces)
        self.rows = self.missed = 0

    @property
    def is_worthwhile(self) -> bool:
        """Whether it has saved work so far: with other weights too many logits may be near the largest ones."""
        return self.rows <= GRACE or self.missed * MOST_MISSED <= self.rows

    def approximate_logits(self, hidden: Tensor) -> Tensor:
        """hidden (S, C), S at most HEAD_ROWS -> logits (S, V), each nearly right. They are there until the thread's next call."""
        with record_function(HEAD):
            if not hasattr(self._kept, "logits"):
                self._kept.logits = self.weight.new_empty(HEAD_ROWS, self.weight.shape[0])
            logits: Tensor = self._kept.logits[: len(hidden)]
            torch.ops.gptbatch.linear_float32_out(hidden.bfloat16(), self._packed, logits)
            return logits

    def rescore(self, logits: Tensor, hidden: Tensor, kept: Tensor, slack: Tensor) -> Tensor:
        """Compute again those of the logits (S, V) that are at least a row's floor (S,), or may be: such are exact from now on.

        The floor is below the kept-th largest by the slack at least; NaN where it is quicker to compute all logits, or where one is
        not finite, and the row is as it was. kept (S,): 1 to V - 1. slack (S,) float64.
        """
        with record_function(HEAD):
            rounded = hidden.bfloat16().float()
            norm = torch.linalg.vector_norm(hidden, dim=1, dtype=torch.float64)
            of_hidden = (
                torch.linalg.vector_norm(hidden - rounded, dim=1, dtype=torch.float64)
                + hidden.shape[1] * 2**-22 * norm
                + SUBNORMAL
            )
            of_weight = torch.linalg.vector_norm(rounded, dim=1, dtype=torch.float64)
            errors = torch.stack([of_hidden, of_weight], dim=1)
            floors: Tensor = torch.ops.gptbatch.rescore(
                logits, hidden, self.weight, errors, self._errors, kept, slack
            )
        self.rows += len(hidden)
        self.missed += int(floors.isnan().sum())
        return floors


def make_two_pass_head(head: Linear, weight: Tensor) -> TwoPassHead | None:
    """A two_pass_head for a packed head, whose weight still stands elsewhere (in a tied embedding); None where it would not be quicker: it
    takes a float32 network, neither small nor of few tokens, and instructions for bfloat16."""
    large = weight.numel() >= LEAST_WEIGHTS and len(weight) >= LEAST_TOKENS
    if (
        head.kind == "native"
        and weight.dtype == torch.float32
        and large
        and torch.ops.gptbatch.has_bfloat16()
    ):
        return TwoPassHead(weight.detach())
    return None


def _largest_norms(rows: Tensor) -> Tensor:
    """rows (V, C) -> (blocks,) float64: the largest norm of a row in each block, and a little more."""
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    padded = torch.nn.functional.pad(norms, (0, -len(norms) % BLOCK))
    return padded.view(-1, BLOCK).amax(dim=1) * (1 + 1e-9)
