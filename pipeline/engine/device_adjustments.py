"""The data by which the device applies bias, penalties and masks of rows.

A row's data lies at one place of `Adjustments` (kernels/cuda/adjustments.py) while the row decodes.
The host writes it once: the kernels follow the new tokens.
"""

from __future__ import annotations

from collections import abc

import numpy as np
import numpy.typing as npt

from gptbatch.pipeline.engine.device_automata import DeviceAutomata
from gptbatch.pipeline.engine.sequence import Sequence
from gptbatch.pipeline.engine.stopping import StopRule
from gptbatch.pipeline.kernels.cuda import adjustments as fields
from gptbatch.pipeline.kernels.cuda.adjustments import AdjustmentLayout
from gptbatch.pipeline.params.sampling_params import SamplingParams

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]


class DeviceAdjustments:
    """The places of the rows that decode, and what is written to them.

    Args:
        layout: Where the device keeps them.
        rule: Has the tokens that end rows, and the bytes of tokens.
    """

    def __init__(self, layout: AdjustmentLayout, rule: StopRule) -> None:
        self._layout, self._rule = layout, rule
        self._automata = DeviceAutomata(layout, rule.token_bytes)
        self._free = list(range(layout.rows))
        self._bad_words: list[tuple[str, ...]] = [()] * layout.rows

    @property
    def n_free(self) -> int:
        """Places without a row."""
        return len(self._free)

    def hold(self, bad_words: tuple[str, ...]) -> bool:
        """Take space for the bad words of a row that will start; return whether there is enough."""
        return not bad_words or self._automata.hold(bad_words)

    def start(self, sequence: Sequence) -> tuple[int, Int64s]:
        """Take a place for a row before its first new token. Its bad words must be held.

        Returns:
            The place, and what to write to `Adjustments.flat`: indices and numbers (2, n).
        """
        place, params, prompt = self._free.pop(), sequence.params, sequence.source.token_ids
        repeats, masks = params.repetition_penalty != 1, self._masks(params)
        tokens, times, bias = _entries(params, prompt if repeats else ())
        history = prompt if params.no_repeat_ngram_size else []
        header = np.zeros(fields.FIELDS.value, np.int32)
        header[fields.N_ENTRIES.value] = len(tokens)
        header[fields.HAS_PENALTIES.value] = (
            repeats or params.frequency_penalty != 0 or params.presence_penalty != 0
        )
        header[fields.NGRAM_SIZE.value] = params.no_repeat_ngram_size
        header[fields.N_HISTORY.value] = len(history)
        header[fields.MIN_NEW_TOKENS.value] = params.min_new_tokens
        header[fields.MASKS.value] = (1 << len(masks)) - 1
        header[fields.AUTOMATON.value] = -1
        self._bad_words[place], pieces = params.bad_words, []
        if params.bad_words:
            header[fields.AUTOMATON.value] = self._automata.first(params.bad_words)
            pieces = self._automata.unwritten(params.bad_words)
        penalties = np.zeros(fields.N_PENALTIES.value, np.float32)
        penalties[fields.REPETITION.value] = params.repetition_penalty
        penalties[fields.FREQUENCY.value] = params.frequency_penalty
        penalties[fields.PRESENCE.value] = params.presence_penalty
        sections = {
            "header": header,
            "penalties": penalties.view(np.int32),
            "tokens": tokens,
            "times": times,
            "bias": bias.view(np.int32),
            "history": np.array(history, np.int32),
            "masks": np.concatenate([np.empty(0, np.int32), *masks]),
        }
        pieces += [(self._layout.first(name, place), each) for name, each in sections.items()]
        indices = [np.arange(first, first + len(numbers)) for first, numbers in pieces]
        numbers = [numbers for _, numbers in pieces]
        return place, np.stack([np.concatenate(indices), np.concatenate(numbers)])

    def free(self, place: int) -> None:
        """Let another row have a place. Its row must be empty in all later steps."""
        self._free.append(place)
        if self._bad_words[place]:
            self._automata.release(self._bad_words[place])

    def _masks(self, params: SamplingParams) -> list[Int32s]:
        """Return the mask of the steps before min_new_tokens, and that of the later ones.

        The second one, or both, are left out where they allow every token.
        """
        end_token_ids = self._rule.end_token_ids(params) if params.min_new_tokens else ()
        if params.allowed_token_ids is None:
            return [self._mask(None, end_token_ids)] if end_token_ids else []
        return [self._mask(params.allowed_token_ids, each) for each in (end_token_ids, ())]

    def _mask(self, allowed: abc.Sequence[int] | None, forbidden: abc.Sequence[int]) -> Int32s:
        bits = np.full(self._layout.mask_words * 32, allowed is None)
        bits[[*(allowed or ())]] = True
        bits[[*forbidden]] = False
        return np.packbits(bits, bitorder="little").view(np.int32)


def _entries(
    params: SamplingParams, repeated: abc.Sequence[int]
) -> tuple[Int32s, Int32s, npt.NDArray[np.float32]]:
    """Return tokens, times and bias of the entries; `repeated` has tokens in the prompt."""
    biases, in_prompt = dict(params.logit_bias), dict.fromkeys(repeated)
    tokens = [*biases, *(token for token in in_prompt if token not in biases)]
    times, bias = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.float32)
    times[: len(biases)] = [0 if token in in_prompt else -1 for token in biases]
    bias[: len(biases)] = [*biases.values()]
    return np.array(tokens, np.int32), times, bias
