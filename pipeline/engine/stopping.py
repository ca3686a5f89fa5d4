"""When a row ends: EOS tokens, stop tokens, stop strings, max_new_tokens and the context.

Stop strings are matched on the bytes of the new tokens, not on tokens or decoded text. So a match
does not depend on how the text is divided into tokens, it may begin and end inside of tokens, and
bytes that are no UTF-8 do not disturb it.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.types import StopReason, WindowFull


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRule:
    """What ends the rows of a run.

    Attributes:
        eos_token_ids: Token ids that end a row; empty for none.
        n_positions: Length of the context.
        window_full: What happens when the context is full. `stop` ends the row. `slide` continues:
            each step takes the n_positions most recent tokens at positions from 0.
        token_bytes: The bytes of each token's text; empty where no row has stop strings.
    """

    eos_token_ids: tuple[int, ...]
    n_positions: int
    window_full: WindowFull
    token_bytes: Sequence[bytes] = ()

    def end_token_ids(self, params: SamplingParams) -> tuple[int, ...]:
        """Return the token ids that end a row: EOS tokens and stop tokens."""
        return (*self.eos_token_ids, *params.stop_token_ids)


@dataclass(slots=True, kw_only=True)
class StopCheck:
    """Follows one row, and tells after each new token whether it ends.

    The first of these that holds is the reason: an EOS token, a stop token, a stop string,
    max_new_tokens, a full context. Before min_new_tokens tokens, only the last two end the row.

    Attributes:
        rule: What ends the rows of the run.
        params: The settings of the row.
        n_prompt_tokens: Tokens of its prompt.
        n_new_tokens: New tokens so far.
        stop_string: The stop string that ended the row.
        text_bytes: How many bytes of the text of the new tokens are before the end of the
            completion; None for all.
    """

    rule: StopRule
    params: SamplingParams
    n_prompt_tokens: int
    n_new_tokens: int = field(default=0, init=False)
    stop_string: str | None = field(default=None, init=False)
    text_bytes: int | None = field(default=None, init=False)
    _search: _StopSearch | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.params.stop:
            self._search = _StopSearch(self.params.stop)

    def add(self, token: int) -> StopReason | None:
        """Take the next token; return why the row ends with it, None where it goes on."""
        rule, params = self.rule, self.params
        self.n_new_tokens += 1
        may_stop = self.n_new_tokens >= params.min_new_tokens
        if may_stop and token in rule.eos_token_ids:
            return "end_of_text"
        if may_stop and token in params.stop_token_ids:
            return "stop_token"
        if self._search is not None:
            match = self._search.add(rule.token_bytes[token], searches=may_stop)
            if match is not None:
                self.stop_string, start = match
                end = start + len(self.stop_string.encode())
                self.text_bytes = end if params.include_stop_str_in_output else start
                return "stop_string"
        if self.n_new_tokens >= params.max_new_tokens:
            return "max_new_tokens"
        is_full = self.n_prompt_tokens + self.n_new_tokens > rule.n_positions
        return "window" if rule.window_full == "stop" and is_full else None


class _StopSearch:
    """Searches the bytes of a growing text for the first stop string that is complete."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [(text, text.encode()) for text in stop]
        self._max_kept = max(len(data) for _, data in self._stop) - 1
        # the last bytes before the next token, and where they begin in the text
        self._tail, self._tail_start = b"", 0

    def add(self, data: bytes, *, searches: bool) -> tuple[str, int] | None:
        """Take the bytes of a token; return the match that it completes, and where that begins.

        Of several matches the one that ends first counts; of those that end at the same byte, the
        one that is listed first.

        Args:
            data: The bytes.
            searches: False: the token ends no row.
        """
        window, start = self._tail + data, self._tail_start
        if searches:
            # a match must end inside of the new bytes
            ends = [
                (at + len(stop), number)
                for number, (_, stop) in enumerate(self._stop)
                if (at := window.find(stop, max(0, len(self._tail) - len(stop) + 1))) >= 0
            ]
            if ends:
                end, number = min(ends)
                text, stop = self._stop[number]
                return text, start + end - len(stop)
        kept = min(len(window), self._max_kept)
        self._tail, self._tail_start = window[len(window) - kept :], start + len(window) - kept
        return None
