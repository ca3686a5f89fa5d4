"""Change the logits of rows with bias, penalties and masks, between the head and `sample`.

What is computed stands in `engine/logit_adjustments.py`: the same operations in the same order,
each rounded once. So the adjusted logits are those of the host, bit for bit.

`adjust_kernel`, one program per row:

    1. the latest new token joins the row's entries: times += 1 for it, or a new entry
    2. z[token] of each entry: + bias, repetition penalty, - frequency * times - presence
    3. -inf for tokens that complete an n-gram of the history

`mask_kernel`, one program per row and PER_PROGRAM blocks of columns:

    4. -inf where the row's mask has a 0: the first mask before min_new_tokens, then the second
    5. -inf for tokens in whose bytes a bad word ends, by the automaton of `engine/bad_words.py`
    6. the largest logit of each block, for `sample`

A row costs O(its distinct tokens) in 1 to 3, and O(V) in 4 to 6. vLLM counts tokens in (sequences,
V) instead, which is 200 KB per row for GPT-2.

Logits that are not finite stay as they are, so that `sample` finds them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptbatch.pipeline.kernels.cuda.adjustments import (
    AUTOMATON,
    FIELDS,
    FREQUENCY,
    HAS_PENALTIES,
    IS_FINITE,
    MASKS,
    MIN_NEW_TOKENS,
    N_ENTRIES,
    N_HISTORY,
    N_PENALTIES,
    NGRAM_SIZE,
    PRESENCE,
    REPETITION,
    TEXT_STATE,
    Adjustments,
)
from gptbatch.pipeline.kernels.cuda.launch import launch, wait_for_previous
from gptbatch.pipeline.kernels.cuda.state import ADJUSTMENTS, POSITION, STEP, TOKEN
from gptbatch.pipeline.kernels.cuda.tiles import MAX_COLUMNS
from gptbatch.pipeline.kernels.cuda.tokens import can_be_sampled

LANES = 256
# Blocks of columns per program.
PER_PROGRAM = 8


@triton.jit
def adjusted(z, times, bias, repetition, frequency, presence):
    """Return the adjusted logits of entries."""
    z = tl.where(bias != 0.0, z + bias, z)
    penalized = tl.where(z < 0.0, z * repetition, tl.div_rn(z, repetition))
    z = tl.where(times >= 0, penalized, z)
    return tl.where(times >= 1, (z - frequency * times.to(tl.float32)) - presence, z)


@triton.jit
def adjust_entries(
    logits, head, penalties, tokens, times, bias, originals, count, token, is_new, is_finite,
    LANES: tl.constexpr,
):  # fmt: skip
    """Adjust the logits of a row's entries, among them that of its latest new token."""
    repetition = tl.load(penalties + REPETITION)
    frequency = tl.load(penalties + FREQUENCY)
    presence = tl.load(penalties + PRESENCE)
    n_found = count * 0
    for first in range(0, count, LANES):
        e = first + tl.arange(0, LANES)
        is_entry = e < count
        t = tl.load(tokens + e, mask=is_entry, other=0)
        n = tl.load(times + e, mask=is_entry, other=-1)
        is_token = is_entry & is_new & (t == token)
        n = tl.where(is_token, tl.maximum(n, 0) + 1, n)
        tl.store(times + e, n, mask=is_token)
        n_found += tl.sum(is_token.to(tl.int32), axis=0)
        z = tl.load(logits + t, mask=is_entry, other=0.0)
        tl.store(originals + e, z, mask=is_entry)
        added = tl.load(bias + e, mask=is_entry, other=0.0)
        z = adjusted(z, n, added, repetition, frequency, presence)
        tl.store(logits + t, z, mask=is_entry & is_finite)
    if is_new & (n_found == 0) & (tl.load(head + HAS_PENALTIES) == 1):
        tl.store(tokens + count, token)
        tl.store(times + count, 1)
        tl.store(bias + count, 0.0)
        tl.store(head + N_ENTRIES, count + 1)
        z = tl.load(logits + token)
        tl.store(originals + count, z)
        z = adjusted(z, count * 0 + 1, frequency * 0.0, repetition, frequency, presence)
        tl.store(logits + token, z, mask=is_finite)


@triton.jit
def forbid_ngrams(
    logits, head, history, length, token, is_new, is_finite, LANES: tl.constexpr
):  # fmt: skip
    """Forbid the tokens that complete an n-gram of the history, with the latest token in it."""
    size = tl.load(head + NGRAM_SIZE)
    if size > 0:
        if is_new:
            tl.store(history + length, token)
            tl.store(head + N_HISTORY, length + 1)
        length += is_new.to(tl.int32)
        tl.debug_barrier()
        # Each n-gram i, i + 1, ..., i + size - 1 whose tokens but the last are the latest ones.
        n_ngrams = length - size + 1
        for first in range(0, n_ngrams, LANES):
            i = first + tl.arange(0, LANES)
            is_equal = i < n_ngrams
            for j in range(size - 1):
                earlier = tl.load(history + i + j, mask=is_equal, other=-1)
                is_equal = is_equal & (earlier == tl.load(history + n_ngrams + j))
            last = tl.load(history + i + size - 1, mask=is_equal, other=0)
            tl.store(logits + last, float("-inf"), mask=is_equal & is_finite)


@triton.jit
def follow_text(head, automata, token_starts, token_bytes, automaton, text_state, token):
    """Let the row's automaton take the bytes of its latest token."""
    table = automata + automaton.to(tl.int64) * 256
    for i in range(tl.load(token_starts + token), tl.load(token_starts + token + 1)):
        byte = tl.load(token_bytes + i).to(tl.int32)
        following = tl.load(table + text_state * 256 + byte).to(tl.int32)
        text_state = tl.maximum(following, -1 - following)
    tl.store(head + TEXT_STATE, text_state)


@triton.jit
def adjust_kernel(
    logits, block_max, state, header, penalties, tokens, times, bias, originals, history,
    automata, token_starts, token_bytes, stride, state_stride, entries, positions, BLOCKS,
    SIZE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Adjust one row per program where the row runs and has adjustments."""
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    own = state + row * state_stride
    place = tl.load(own + ADJUSTMENTS)
    if (tl.load(own + POSITION) >= 0) & (place >= 0):
        head = header + place * FIELDS
        b = tl.arange(0, SIZE)
        maxima = tl.load(block_max + row * BLOCKS + b, mask=b < BLOCKS, other=float("-inf"))
        is_finite = can_be_sampled(maxima)
        tl.store(head + IS_FINITE, is_finite.to(tl.int32))
        token = tl.load(own + TOKEN).to(tl.int32)
        # Of the first new token, the latest one is the last of the prompt.
        is_new = tl.load(own + STEP) > 0
        count, length = tl.load(head + N_ENTRIES), tl.load(head + N_HISTORY)
        automaton, text_state = tl.load(head + AUTOMATON), tl.load(head + TEXT_STATE)
        # All threads have read the header before one of them changes it.
        tl.debug_barrier()
        first = place * entries
        adjust_entries(
            logits + row * stride, head, penalties + place * N_PENALTIES, tokens + first,
            times + first, bias + first, originals + first, count, token, is_new, is_finite, LANES,
        )  # fmt: skip
        forbid_ngrams(
            logits + row * stride, head, history + place * positions, length, token, is_new,
            is_finite, LANES,
        )  # fmt: skip
        if is_new & (automaton >= 0):
            follow_text(head, automata, token_starts, token_bytes, automaton, text_state, token)


@triton.jit
def is_banned(table, text_state, token_starts, token_bytes, token, is_token):
    """Return in which tokens a bad word ends; token is 2-D."""
    start = tl.load(token_starts + token, mask=is_token, other=0)
    length = tl.load(token_starts + token + 1, mask=is_token, other=0) - start
    state = token * 0 + text_state
    is_bad = state < 0
    for i in range(tl.max(tl.max(length, axis=1), axis=0)):
        is_byte = i < length
        byte = tl.load(token_bytes + start + i, mask=is_byte, other=0).to(tl.int32)
        following = tl.load(table + state * 256 + byte, mask=is_byte, other=0).to(tl.int32)
        is_bad = is_bad | (following < 0)
        state = tl.maximum(following, -1 - following)
    return is_bad


@triton.jit
def mask_kernel(
    logits, block_max, state, header, masks, automata, token_starts, token_bytes,
    stride, state_stride, words, V, BLOCKS, BN: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """Mask PER blocks of one row, and find their largest logits."""
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    own = state + row * state_stride
    place = tl.load(own + ADJUSTMENTS)
    if (tl.load(own + POSITION) >= 0) & (place >= 0):
        head = header + place * FIELDS
        if tl.load(head + IS_FINITE) == 1:
            block = tl.program_id(1) * PER + tl.arange(0, PER)
            column = block[:, None] * BN + tl.arange(0, BN)[None, :]
            is_column = column < V
            own_logits = logits + row * stride + column
            z = tl.load(own_logits, mask=is_column, other=float("-inf"))
            step = tl.load(own + STEP).to(tl.int32)
            which = (step >= tl.load(head + MIN_NEW_TOKENS)).to(tl.int32)
            if (tl.load(head + MASKS) >> which) & 1 == 1:
                mask = masks + (place * 2 + which) * words
                word = tl.load(mask + column // 32, mask=is_column, other=0)
                is_masked = ((word >> (column % 32)) & 1) == 0
                z = tl.where(is_masked, float("-inf"), z)
                tl.store(own_logits, z, mask=is_column & is_masked)
            automaton = tl.load(head + AUTOMATON)
            if automaton >= 0:
                table = automata + automaton.to(tl.int64) * 256
                text_state = tl.load(head + TEXT_STATE)
                is_bad = is_banned(table, text_state, token_starts, token_bytes, column, is_column)
                z = tl.where(is_bad, float("-inf"), z)
                tl.store(own_logits, z, mask=is_bad)
            largest = tl.max(z, axis=1)
            tl.store(block_max + row * BLOCKS + block, largest, mask=block < BLOCKS)


def adjust(logits: Tensor, block_max: Tensor, state: Tensor, adjustments: Adjustments) -> None:
    """Adjust the logits of each row that runs and whose ADJUSTMENTS is 0 or more, in place.

    Called once per step: it takes the row's latest token.

    Args:
        logits: (S, V) float32, its rows contiguous.
        block_max: (S, blocks) float32: the largest logit of each MAX_COLUMNS columns; renewed.
        state: (sequences, fields) int64.
        adjustments: Of the rows.
    """
    rows, vocab_size = logits.shape
    blocks, own = block_max.shape[1], adjustments
    bad_words = (own.automata, own.token_starts, own.token_bytes)
    launch(
        adjust_kernel,
        (rows,),
        *(logits, block_max, state, own.header, own.penalties, own.tokens, own.times, own.bias),
        *(own.originals, own.history, *bad_words, logits.stride(0), state.stride(0)),
        *(own.tokens.shape[1], own.history.shape[1], blocks),
        *(triton.next_power_of_2(blocks), LANES),
        num_warps=4,
        enable_fp_fusion=False,
    )
    launch(
        mask_kernel,
        (rows, triton.cdiv(blocks, PER_PROGRAM)),
        *(logits, block_max, state, own.header, own.masks, *bad_words),
        *(logits.stride(0), state.stride(0), own.masks.shape[2], vocab_size, blocks),
        *(MAX_COLUMNS, PER_PROGRAM),
        num_warps=4,
        enable_fp_fusion=False,
    )


def adjust_twin(logits: Tensor, block_max: Tensor, state: Tensor, adjustments: Adjustments) -> None:
    """Compute in torch what `adjust` computes."""
    for row in range(len(logits)):
        place = int(state[row, ADJUSTMENTS.value])
        if state[row, POSITION.value] < 0 or place < 0:
            continue
        token, step = int(state[row, TOKEN.value]), int(state[row, STEP.value])
        if step > 0:
            _append(adjustments, place, token)
        z = logits[row]
        is_finite = bool(z.amax().isfinite())
        adjustments.header[place, IS_FINITE.value] = is_finite
        if is_finite:
            _adjust_row(z, adjustments, place, step)
            padded = torch.nn.functional.pad(z, (0, -len(z) % MAX_COLUMNS), value=-math.inf)
            block_max[row] = padded.view(-1, MAX_COLUMNS).amax(dim=1)


def _append(own: Adjustments, place: int, token: int) -> None:
    header = own.header[place]
    count, length = int(header[N_ENTRIES.value]), int(header[N_HISTORY.value])
    found = torch.nonzero(own.tokens[place, :count] == token)[:, 0]
    if len(found):
        own.times[place, found] = own.times[place, found].clamp(min=0) + 1
    elif header[HAS_PENALTIES.value]:
        own.tokens[place, count], own.times[place, count], own.bias[place, count] = token, 1, 0.0
        header[N_ENTRIES.value] += 1
    if header[NGRAM_SIZE.value]:
        own.history[place, length] = token
        header[N_HISTORY.value] += 1
    if header[AUTOMATON.value] >= 0:
        header[TEXT_STATE.value], _ = _follow(own, header, token)


def _adjust_row(z: Tensor, own: Adjustments, place: int, step: int) -> None:
    header, penalties = own.header[place].tolist(), own.penalties[place]
    entries = slice(0, header[N_ENTRIES.value])
    tokens, times = own.tokens[place, entries].long(), own.times[place, entries]
    own.originals[place, entries] = z[tokens]
    z[tokens] += own.bias[place, entries]
    seen, new = tokens[times >= 0], tokens[times >= 1]
    r = penalties[REPETITION.value]
    z[seen] = torch.where(z[seen] < 0, z[seen] * r, z[seen] / r)
    z[new] -= penalties[FREQUENCY.value] * times[times >= 1].float()
    z[new] -= penalties[PRESENCE.value]
    size, history = header[NGRAM_SIZE.value], own.history[place, : header[N_HISTORY.value]].tolist()
    for i in range(len(history) - size + 1 if size else 0):
        if history[i : i + size - 1] == history[len(history) - size + 1 :]:
            z[history[i + size - 1]] = -math.inf
    which = int(step >= header[MIN_NEW_TOKENS.value])
    if header[MASKS.value] >> which & 1:
        column = torch.arange(len(z))
        is_allowed = own.masks[place, which][column // 32] >> (column % 32) & 1
        z[is_allowed == 0] = -math.inf
    if header[AUTOMATON.value] >= 0:
        z[[_follow(own, own.header[place], token)[1] for token in range(len(z))]] = -math.inf


def _follow(own: Adjustments, header: Tensor, token: int) -> tuple[int, bool]:
    """Return the state after the bytes of a token, and whether a bad word ends in them."""
    first, state, is_bad = int(header[AUTOMATON.value]), int(header[TEXT_STATE.value]), False
    for byte in own.token_bytes[own.token_starts[token] : own.token_starts[token + 1]].tolist():
        following = int(own.automata[first + state, byte])
        state, is_bad = max(following, -1 - following), is_bad or following < 0
    return state, is_bad
