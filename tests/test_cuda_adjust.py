"""Bias, penalties and masks by the Triton kernels: against their twin and the host, bit for bit."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gptbatch.pipeline.engine.bad_words import BadWords
from gptbatch.pipeline.engine.logit_adjustments import adjusted_logits
from gptbatch.pipeline.engine.row_adjustments import RowAdjustments
from gptbatch.pipeline.engine.sampling import sample_tokens
from gptbatch.pipeline.engine.sequence import Sequence
from gptbatch.pipeline.engine.stopping import StopRule
from tests.conftest import tokenized
from tests.device_state import state_of
from tests.test_row_settings import TOKEN_BYTES, VOCAB_SIZE, random_settings
from tests.triton_interpreter import IS_INTERPRETED, interpreted

pytest.importorskip("triton")
from gptbatch.pipeline.engine import device_automata
from gptbatch.pipeline.engine.device_adjustments import DeviceAdjustments
from gptbatch.pipeline.engine.device_automata import DeviceAutomata
from gptbatch.pipeline.kernels.cuda.adjust import adjust, adjust_twin
from gptbatch.pipeline.kernels.cuda.adjustments import AdjustmentLayout, Adjustments
from gptbatch.pipeline.kernels.cuda.sample import sample, scratch_sizes
from gptbatch.pipeline.kernels.cuda.state import ADJUSTMENTS, MARGIN, POSITION, STEP, TOKEN

pytestmark = pytest.mark.skipif(
    not IS_INTERPRETED, reason="with a CUDA device the kernels are compiled: make cuda-check"
)

RULE = StopRule(eos_token_ids=(3, 17), n_positions=40, window_full="stop", token_bytes=TOKEN_BYTES)
N_BYTES = sum(map(len, TOKEN_BYTES))
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


class Rows:
    """Rows that decode random tokens, and their adjustments, by the host and on a device."""

    def __init__(self, settings: list[dict[str, Any]], seed: int) -> None:
        self.rng = random.Random(seed)
        prompts = [
            [self.rng.randrange(VOCAB_SIZE) for _ in range(self.rng.randint(1, 20))]
            for _ in settings
        ]
        self.sequences = [
            Sequence(tokenized(i, tokens, max_new_tokens=20, **each))
            for i, (tokens, each) in enumerate(zip(prompts, settings, strict=True))
        ]
        self.host = [
            RowAdjustments(sequence.params, sequence.tokens, RULE, BadWords(TOKEN_BYTES))
            for sequence in self.sequences
        ]
        # More places than rows, all of them with garbage.
        layout = AdjustmentLayout(
            rows=2 * len(settings), n_positions=40, vocab_size=VOCAB_SIZE, n_token_bytes=N_BYTES
        )
        places = DeviceAdjustments(layout, RULE)
        self.device = Adjustments(layout, CPU)
        self.device.flat.fill_(-7)
        self.state = state_of([{"params": sequence.params} for sequence in self.sequences])
        for row, sequence in enumerate(self.sequences):
            assert places.hold(sequence.params.bad_words)
            place, (indices, numbers) = places.start(sequence)
            self.device.flat[torch.from_numpy(indices)] = torch.from_numpy(numbers).int()
            self.state[row, ADJUSTMENTS.value] = place
            self.state[row, TOKEN.value] = sequence.tokens[-1]

    def add(self) -> None:
        """Append a token to each row, often one that it has already."""
        for row, sequence in enumerate(self.sequences):
            biased = [token for token, _ in sequence.params.logit_bias]
            token = self.rng.choice(
                [self.rng.randrange(VOCAB_SIZE), *self.rng.choices(sequence.tokens, k=3), *biased]
            )
            sequence.tokens.append(token)
            self.host[row].add(token)
            self.state[row, TOKEN.value] = token
            self.state[row, STEP.value] += 1

    def expected(self, logits: Tensor) -> Tensor:
        """Return the logits that the host adjusts."""
        steps = [row.next_step() for row in self.host]
        changed = [row for row, step in enumerate(steps) if step is not None]
        logits = logits.clone()
        logits[changed] = adjusted_logits(logits[changed], [s for s in steps if s is not None])
        return logits


def padded(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits as a step has them, and the largest of each block."""
    columns = -(-logits.shape[1] // 128) * 128
    buffer = torch.full((len(logits), columns), math.nan)[:, : logits.shape[1]]
    buffer.copy_(logits)
    return buffer, block_max(logits)


def block_max(logits: Tensor) -> Tensor:
    filled = torch.nn.functional.pad(logits, (0, -logits.shape[1] % 128), value=-math.inf)
    return filled.view(len(logits), -1, 128).amax(dim=2)


@pytest.mark.parametrize("seed", range(3))
def test_adjusted_logits_are_those_of_the_host(seed: int) -> None:
    rng = random.Random(seed)
    rows = Rows([random_settings(rng) for _ in range(12)], seed)
    own, twin_own = (
        rows.device,
        Adjustments(
            AdjustmentLayout(rows=24, n_positions=40, vocab_size=VOCAB_SIZE, n_token_bytes=N_BYTES),
            CPU,
        ),
    )
    twin_own.flat.copy_(own.flat)
    torch.manual_seed(seed)
    for _ in range(8):
        logits = torch.randn(12, VOCAB_SIZE) * 5
        expected = rows.expected(logits)
        (found, maxima), (twin, twin_maxima) = padded(logits), padded(logits)
        adjust(found, maxima, rows.state, own)
        adjust_twin(twin, twin_maxima, rows.state, twin_own)
        assert torch.equal(found, expected)
        assert torch.equal(twin, expected)
        assert torch.equal(maxima, block_max(expected))
        assert torch.equal(twin_maxima, maxima)
        rows.add()
    assert torch.equal(own.flat, twin_own.flat)


def test_rows_that_are_empty_unadjusted_or_not_finite_stay_as_they_are() -> None:
    setting = {"presence_penalty": 1.0, "logit_bias": ((7, 2.0),), "allowed_token_ids": (5, 7)}
    for run in (adjust, adjust_twin):
        rows = Rows([setting] * 5, seed=1)
        rows.state[0, POSITION.value] = rows.state[1, ADJUSTMENTS.value] = -1
        logits = torch.randn(5, VOCAB_SIZE)
        logits[2, 40], logits[3] = math.nan, -math.inf
        found, maxima = padded(logits)
        run(found, maxima, rows.state, rows.device)
        assert torch.equal(found[:4].nan_to_num(9), logits[:4].nan_to_num(9))
        assert torch.equal(maxima[:4].nan_to_num(9), block_max(logits)[:4].nan_to_num(9))
        assert torch.isfinite(found[4]).nonzero()[:, 0].tolist() == [5, 7]
        assert found[4, 7] == logits[4, 7] + 2


def test_penalties_and_long_ngrams_over_many_tokens() -> None:
    """More entries than lanes, and n-grams as long as the text."""
    prompt = [*range(280), *range(5)]
    settings: list[dict[str, Any]] = [
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": n} for n in (1, 6, 200, 10**9)
    ]
    rows = Rows(settings, seed=0)
    rows.sequences = [
        Sequence(tokenized(i, prompt, max_new_tokens=9, **each)) for i, each in enumerate(settings)
    ]
    layout = AdjustmentLayout(rows=4, n_positions=300, vocab_size=VOCAB_SIZE, n_token_bytes=N_BYTES)
    places, rows.device = DeviceAdjustments(layout, RULE), Adjustments(layout, CPU)
    for row, sequence in enumerate(rows.sequences):
        rows.host[row] = RowAdjustments(sequence.params, prompt, RULE, BadWords(TOKEN_BYTES))
        place, (indices, numbers) = places.start(sequence)
        rows.device.flat[torch.from_numpy(indices)] = torch.from_numpy(numbers).int()
        rows.state[row, ADJUSTMENTS.value] = place
    torch.manual_seed(0)
    n_masked = []
    for token in (5, 6, 290, 0):
        logits = torch.randn(4, VOCAB_SIZE)
        expected = rows.expected(logits)
        found, maxima = padded(logits)
        adjust(found, maxima, rows.state, rows.device)
        assert torch.equal(found, expected)
        n_masked.append((found == -math.inf).sum(dim=1).tolist())
        for row in range(4):
            rows.host[row].add(token)
            rows.state[row, TOKEN.value] = token
            rows.state[row, STEP.value] += 1
    assert n_masked == [[280, 1, 0, 0], [280, 1, 0, 0], [280, 1, 0, 0], [281, 0, 0, 0]]


@pytest.mark.parametrize("n_allowed", [1, 3, 40, 64, 100])
def test_fewer_tokens_than_top_k_are_sampled_as_on_the_host(n_allowed: int) -> None:
    """Of a few hundred blocks, only those with allowed tokens matter; ties at -inf do not."""
    torch.manual_seed(n_allowed)
    vocab_size = 128 * 90
    allowed = torch.randperm(vocab_size)[:n_allowed]
    logits = torch.full((4, vocab_size), -math.inf)
    logits[:, allowed] = torch.randn(4, n_allowed)
    settings: list[dict[str, Any]] = [{"top_k": 40}, {"temperature": 0.0}, {"top_k": 0}]
    settings.append({"top_k": 64, "min_p": 0.1})
    params = [tokenized(0, [1], max_new_tokens=9, **each).prompt.params for each in settings]
    rows = [{"position": 5, "step": 2, "params": each} for each in params]
    state, tokens, maxima = (
        state_of(rows, vocab_size=vocab_size),
        torch.zeros(4).int(),
        block_max(logits),
    )
    small, large = scratch_sizes(maxima.shape[1])
    scratch = torch.zeros(4, small).int(), torch.zeros(4, large).long()
    sample(logits, maxima, state, scratch, tokens, full_vocab=True, top_p=False)
    margins = state[:, MARGIN.value].contiguous().view(torch.float64).tolist()
    expected = sample_tokens(logits, params, [2] * 4)
    assert tokens.tolist() == [each.token for each in expected]
    assert margins == pytest.approx([each.decision_margin for each in expected], abs=1e-9)


def test_automata_of_bad_words_share_the_memory_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row follows the automaton that lies where another one was."""
    monkeypatch.setattr(device_automata, "MAX_STATES", 10)
    layout = AdjustmentLayout(rows=4, n_positions=40, vocab_size=VOCAB_SIZE, n_token_bytes=N_BYTES)
    automata = DeviceAutomata(layout, TOKEN_BYTES)
    assert automata.hold(("ab",))
    assert automata.hold(("ab",))
    assert automata.hold(("c", "ba"))
    assert [automata.first(words) for words in (("ab",), ("c", "ba"))] == [0, 3]
    # Three states are left.
    assert not automata.hold(("aaa",))
    assert automata.hold(("aa",))
    automata.release(("ab",))
    assert not automata.hold(("bb",))
    automata.release(("ab",))
    assert automata.hold(("bb",))
    assert automata.first(("bb",)) == 0
    assert len(automata.unwritten(("bb",))) == 3
    assert [place for place, _ in automata.unwritten(("aa",))] == [layout.first("automata", 7)]
    assert not automata.unwritten(("aa",))
