"""What bias, penalties and masks of rows keep on a device, in one flat tensor.

A row's data has a place of its own, which ADJUSTMENTS of the state names. It stays there while the
sequence moves to other indices. The host writes it once; the kernels of adjust.py follow the new
tokens. One tensor, so that one copy writes all that begins in a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from gptbatch.pipeline.kernels.cuda.tiles import MAX_COLUMNS

# Fields of the header of a row; the rest of FIELDS is unused.
#   N_ENTRIES       entries so far
#   HAS_PENALTIES   new tokens become entries
#   NGRAM_SIZE      no_repeat_ngram_size
#   N_HISTORY       tokens of prompt and completion in `history`, which n-grams need
#   MIN_NEW_TOKENS  the first mask holds while STEP is below it
#   MASKS           bit i: mask i forbids a token
#   AUTOMATON       first state of the automaton of bad words in `automata`; -1: no bad words
#   TEXT_STATE      its state after the new tokens, from 0
#   IS_FINITE       written by adjust_kernel: the head's logits are finite
(N_ENTRIES, HAS_PENALTIES, NGRAM_SIZE, N_HISTORY, MIN_NEW_TOKENS, MASKS, AUTOMATON, TEXT_STATE) = (
    tl.constexpr(i) for i in range(8)
)
IS_FINITE = tl.constexpr(8)
FIELDS = tl.constexpr(16)
# Fields of `penalties`.
REPETITION, FREQUENCY, PRESENCE = (tl.constexpr(i) for i in range(3))
N_PENALTIES = tl.constexpr(4)
# The most tokens with a bias, by SAMPLING_SETTINGS.
MAX_BIASES = 1024
# States of all automata at once, of 512 bytes. One automaton has at most 8,193.
MAX_STATES = 16384
STATE_WORDS = 256 // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AdjustmentLayout:
    """Where the adjustments of R rows lie in one flat tensor of int32: a section per field.

    Attributes:
        rows: R.
        n_positions: Tokens of prompt and completion, at most.
        vocab_size: V.
        n_token_bytes: Bytes of the texts of all tokens; 0 where no row has bad words.
    """

    rows: int
    n_positions: int
    vocab_size: int
    n_token_bytes: int

    @property
    def sections(self) -> dict[str, tuple[int, int]]:
        """Rows and numbers per row of each section, in order."""
        entries, bad_words = self.n_positions + MAX_BIASES, self.n_token_bytes > 0
        widths = {
            "header": FIELDS.value,
            "penalties": N_PENALTIES.value,
            "tokens": entries,
            "times": entries,
            "bias": entries,
            "originals": entries,
            "history": self.n_positions,
            "masks": 2 * self.mask_words,
        }
        return {
            **{name: (self.rows, width) for name, width in widths.items()},
            "automata": (MAX_STATES * bad_words, STATE_WORDS),
            # A multiple of 16 bytes: the alignment of what follows is compiled into the kernels.
            "token_starts": (1, -(-(self.vocab_size + 1) // 4) * 4 * bad_words),
            "token_bytes": (1, -(-self.n_token_bytes // 4)),
        }

    @property
    def mask_words(self) -> int:
        """Words of 32 tokens per mask, for whole blocks of columns."""
        return -(-self.vocab_size // MAX_COLUMNS) * MAX_COLUMNS // 32

    def first(self, name: str, row: int = 0) -> int:
        """Return the place of the first number of a row in a section."""
        before = 0
        for section, (rows, width) in self.sections.items():
            if section == name:
                return before + width * row
            before += rows * width
        raise KeyError(name)

    @property
    def size(self) -> int:
        """Numbers in all."""
        return sum(rows * width for rows, width in self.sections.values())


class Adjustments:
    """The adjustments of R rows on a device.

    Attributes:
        flat: int32, see `AdjustmentLayout`; the others are views of it.
        header: (R, FIELDS) int32.
        penalties: (R, N_PENALTIES) float32.
        tokens: (R, E) int32: the entries' tokens, each once.
        times: (R, E) int32: how often the completion holds it; 0: only the prompt; -1: neither.
        bias: (R, E) float32.
        originals: (R, E) float32: the logits of the last step before they were adjusted.
        history: (R, n_positions) int32.
        masks: (R, 2, words) int32: bit i of word w is token 32 w + i; 1 is allowed.
        automata: (MAX_STATES, 256) int16: the next state by state and byte, both of one automaton;
            -1 - state where a bad word ends.
        token_starts: (V + 1,) int32: token i has the bytes from entry i to entry i + 1.
        token_bytes: uint8.
    """

    def __init__(self, layout: AdjustmentLayout, device: torch.device) -> None:
        self.flat = torch.zeros(layout.size, dtype=torch.int32, device=device)
        sections = layout.sections
        pieces = self.flat.split([rows * width for rows, width in sections.values()])
        views = {
            name: piece.view(shape)
            for (name, shape), piece in zip(sections.items(), pieces, strict=True)
        }
        self.header, self.tokens, self.times = views["header"], views["tokens"], views["times"]
        self.penalties, self.bias, self.originals = (
            views[name].view(torch.float32) for name in ("penalties", "bias", "originals")
        )
        self.history = views["history"]
        self.masks = views["masks"].view(layout.rows, 2, layout.mask_words)
        self.automata = views["automata"].view(torch.int16)
        self.token_starts = views["token_starts"][0]
        self.token_bytes = views["token_bytes"][0].view(torch.uint8)
