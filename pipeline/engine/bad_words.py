"""Texts that a completion must not hold: the tokens that would complete one, by an automaton.

The automaton is that of Aho and Corasick ("Efficient string matching", 1975), as one table: its
state is the longest end of the text so far that begins a bad word. A token is banned in a state if
a bad word ends inside of its bytes. So the bytes of a completion never hold a bad word, however
they are divided into tokens.

Imports no torch.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Automata of different settings that are kept, of at most 4 MB each.
MAX_AUTOMATA = 16
# States of an automaton whose banned tokens are kept; one takes a few milliseconds to compute.
MAX_KEPT_STATES = 1024


class BadWords:
    """The automata of the settings of a run.

    Args:
        token_bytes: The bytes of each token's text.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._automata: OrderedDict[tuple[str, ...], BadWordAutomaton] = OrderedDict()
        self._columns: list[npt.NDArray[np.uint8]] = []
        self._order = np.empty(0, np.int64)

    def automaton(self, words: tuple[str, ...]) -> BadWordAutomaton:
        """Return the automaton of some bad words."""
        if words in self._automata:
            self._automata.move_to_end(words)
        else:
            if not self._columns:
                self._index_tokens()
            self._automata[words] = BadWordAutomaton(words, self._columns, self._order)
            if len(self._automata) > MAX_AUTOMATA:
                self._automata.popitem(last=False)
        return self._automata[words]

    def _index_tokens(self) -> None:
        """Order the tokens by length, longest first. Column i has the i-th byte of each of them."""
        lengths = np.array([len(data) for data in self._token_bytes])
        self._order = np.argsort(-lengths, kind="stable")
        ordered = [self._token_bytes[token] for token in self._order.tolist()]
        for i in range(int(lengths.max(initial=0))):
            count = int((lengths > i).sum())
            column = bytes(data[i] for data in ordered[:count])
            self._columns.append(np.frombuffer(column, np.uint8))


class BadWordAutomaton:
    """The automaton of some bad words. State 0 is the start.

    Args:
        words: The bad words.
        columns: Column i has the i-th byte of each token that has one, longest tokens first.
        order: The ids of the tokens in that order.
    """

    def __init__(
        self,
        words: Sequence[str],
        columns: Sequence[npt.NDArray[np.uint8]],
        order: npt.NDArray[np.int64],
    ) -> None:
        self._table, self._accepts = automaton_table([word.encode() for word in words])
        self._columns, self._order = columns, order
        self._banned: dict[int, npt.NDArray[np.int64]] = {}

    def next_state(self, state: int, data: bytes) -> int:
        """Return the state after more bytes."""
        for byte in data:
            state = int(self._table[state, byte])
        return state

    def banned(self, state: int) -> npt.NDArray[np.int64]:
        """Return the ids of the tokens that would complete a bad word in a state."""
        if state not in self._banned:
            states = np.full(len(self._order), state, np.int16)
            is_banned = np.zeros(len(self._order), bool)
            for column in self._columns:
                count = len(column)
                states[:count] = self._table[states[:count], column]
                is_banned[:count] |= self._accepts[states[:count]]
            if len(self._banned) == MAX_KEPT_STATES:
                self._banned.clear()
            self._banned[state] = np.sort(self._order[is_banned])
        return self._banned[state]


def count_states(words: Sequence[bytes]) -> int:
    """Return the states of the automaton of bad words, without making it."""
    return len({word[:end] for word in words for end in range(len(word) + 1)})


def automaton_table(words: Sequence[bytes]) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.bool_]]:
    """Return the next state by state and byte, and whether a bad word ends in each state.

    At most one state more than the words have bytes.
    """
    children: list[dict[int, int]] = [{}]
    accepts = [False]
    for word in words:
        state = 0
        for byte in word:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                accepts.append(False)
            state = children[state][byte]
        accepts[state] = True
    table = np.zeros((len(children), 256), np.int16)
    # the state of the longest proper end of each state's text, shorter texts first
    fallback = [0] * len(children)
    queue = deque([0])
    while queue:
        state = queue.popleft()
        table[state] = table[fallback[state]]
        for byte, child in children[state].items():
            fallback[child] = int(table[state, byte]) if state else 0
            accepts[child] = accepts[child] or accepts[fallback[child]]
            table[state, byte] = child
            queue.append(child)
    return table, np.array(accepts)
