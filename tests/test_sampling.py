"""Noise and sampling: known answers, the distribution, ties, edge cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy import stats

from gptbatch.pipeline.engine import reference
from gptbatch.pipeline.engine.noise import gumbel, random_bits
from gptbatch.pipeline.engine.nucleus import find_nucleus, masses
from gptbatch.pipeline.engine.reference import sample_token
from gptbatch.pipeline.engine.sampling import (
    SampledToken,
    kept_range,
    kept_set,
    sample_tokens,
)
from gptbatch.pipeline.input.rows import derive_seed
from gptbatch.pipeline.model.philox import philox4x32
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.params.settings import MAX_SEED
from tests.conftest import has_kernels

DRAWS = 20_000
FALSE_ALARM = (
    1e-6  # of each chi-square test, were its seeds random; they are fixed, so a pass stays a pass
)


def params(
    seed: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    top_p: float = 1.0,
) -> SamplingParams:
    return SamplingParams(
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        max_new_tokens=1,
        min_p=min_p,
        top_p=top_p,
    )


def tokens_of(
    logits: torch.Tensor, rows: Sequence[SamplingParams], steps: Sequence[int]
) -> list[int | None]:
    return [choice.token for choice in sample_tokens(logits, rows, steps)]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the vectors published with Random123, file kat_vectors, philox4x32 10
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_philox_gives_the_published_answers(
    counter: list[int], key: list[int], expected: str, device: str
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word], device=device) for word in counter)
    k0, k1 = (torch.tensor([word], device=device) for word in key)
    words = philox4x32((c0, c1, c2, c3), (k0, k1))
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_noise_version_1_is_pinned() -> None:
    """Another layout gives other completions: change NOISE_VERSION with these."""
    seeds = torch.tensor([0, 1, MAX_SEED, 7])
    steps = torch.tensor([0, 3, 1000, 7])
    token_ids = torch.tensor([0, 5, 50256, 8])
    words = philox4x32(
        (torch.tensor([2]), torch.tensor([3]), torch.tensor([0]), torch.tensor([0])),
        (torch.tensor([1]), torch.tensor([0])),
    )
    bits = random_bits(seeds, steps, token_ids)
    assert bits[0] == (0x6627E8D5 << 20) | (0xE169C58D >> 12), (
        "token 0: words 0 and 1 of the block of counter 0"
    )
    assert bits[1] == (int(words[2]) << 20) | (int(words[3]) >> 12), (
        "an odd token takes words 2 and 3 of the block"
    )
    u = (int(bits[0]) + 0.5) / 2**52
    assert gumbel(seeds, steps, token_ids)[0].item() == pytest.approx(
        -math.log(-math.log(u)), rel=1e-14
    )


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (7, 3), (2**40 + 5, 1000), (MAX_SEED, 12)])
def test_the_oracle_has_the_same_noise(seed: int, step: int) -> None:
    """The integers are equal bit for bit; the logarithms may differ in their last bit."""
    token_ids = torch.arange(500)
    call = torch.tensor(seed), torch.tensor(step), token_ids
    assert random_bits(*call).tolist() == [reference.random_bits(seed, step, t) for t in range(500)]
    assert gumbel(*call).tolist() == pytest.approx(
        [reference.gumbel(seed, step, t) for t in range(500)], rel=1e-14
    )


def test_noise_is_finite_at_both_ends() -> None:
    for n, expected in ((0, -3.6), (2**52 - 1, 36.7)):
        u = torch.tensor((n + 0.5) * 2.0**-52, dtype=torch.float64)
        assert 0 < u < 1
        assert -torch.log(-torch.log(u)) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(
    ("top_k", "min_p", "top_p"),
    [
        *((k, 0, 1) for k in (0, 1, 5, 12, 40, 10**9)),
        *((0, m, 1) for m in (0.1, 1)),
        (5, 0.3, 1),
        (3, 0.01, 1),
        *((0, 0, p) for p in (0.9, 0.5, 1e-9, 1 - 1e-9)),
        (6, 0, 0.8),
        (8, 0.1, 0.9),
    ],
)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_follow_softmax(top_k: int, min_p: float, top_p: float, temperature: float) -> None:
    """Chi-square over seeds as users have them: derived from prompt ids."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.7, 0.0, -0.3, -0.5, -1.0, -1.1, -1.2, 0.4, 0.1, -2.0])
    probabilities = torch.softmax(logits.double() / temperature, 0)
    likely_enough = int((probabilities >= min_p * probabilities.max()).sum())
    kept = min(top_k, len(logits)) or len(logits)
    by_rank = probabilities.sort(descending=True).values[:kept]
    above = by_rank.cumsum(0) - by_rank
    kept = min(kept, likely_enough, int((above < top_p * by_rank.sum()).sum()))
    rows = [
        params(
            derive_seed(0, str(i)), temperature=temperature, top_k=top_k, min_p=min_p, top_p=top_p
        )
        for i in range(DRAWS)
    ]
    tokens = tokens_of(logits.expand(DRAWS, -1), rows, [0] * DRAWS)
    order = logits.argsort(descending=True)[:kept]
    expected = torch.softmax(logits[order].double() / temperature, 0) * DRAWS
    counts = torch.bincount(torch.tensor(tokens), minlength=len(logits))
    assert counts.sum() == counts[order].sum() == DRAWS, "only kept tokens are drawn"
    if kept > 1:
        likely = expected >= 5
        observed = torch.cat([counts[order][likely], counts[order][~likely].sum()[None]]).double()
        expected_counts = torch.cat([expected[likely], expected[~likely].sum()[None]])
        observed, expected_counts = (
            observed[expected_counts > 0],
            expected_counts[expected_counts > 0],
        )
        assert stats.chisquare(observed.numpy(), expected_counts.numpy()).pvalue > FALSE_ALARM


def test_draws_of_one_seed_over_steps_follow_softmax_too() -> None:
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0])
    tokens = tokens_of(logits.expand(DRAWS, -1), [params(42)] * DRAWS, list(range(DRAWS)))
    counts = torch.bincount(torch.tensor(tokens), minlength=5).double()
    assert (
        stats.chisquare(counts.numpy(), (torch.softmax(logits.double(), 0) * DRAWS).numpy()).pvalue
        > FALSE_ALARM
    )


def test_the_chi_square_test_has_teeth() -> None:
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0])
    tokens = tokens_of(
        logits.expand(DRAWS, -1), [params(s, temperature=1.1) for s in range(DRAWS)], [0] * DRAWS
    )
    counts = torch.bincount(torch.tensor(tokens), minlength=5).double()
    assert (
        stats.chisquare(counts.numpy(), (torch.softmax(logits.double(), 0) * DRAWS).numpy()).pvalue
        < FALSE_ALARM
    )


def test_neighbouring_seeds_steps_and_tokens_are_uncorrelated() -> None:
    """False alarm: 6 sigma, about 1e-9 each."""
    n = 100_000
    base = torch.arange(n)
    zero = torch.zeros_like(base)
    for a, b in (
        (gumbel(base, zero, zero), gumbel(base + 1, zero, zero)),
        (gumbel(zero, base, zero), gumbel(zero, base + 1, zero)),
        (gumbel(zero, zero, 2 * base), gumbel(zero, zero, 2 * base + 1)),
        (gumbel(base, zero, zero), gumbel(zero, base, zero)),
    ):
        assert abs(torch.corrcoef(torch.stack([a[1:], b[1:]]))[0, 1]) < 6 / n**0.5


def test_seeds_that_differ_in_their_high_half_alone_differ() -> None:
    token_ids = torch.arange(64)
    low, high = torch.tensor(5), torch.tensor(5 + 2**40)
    assert not torch.equal(
        random_bits(low, torch.tensor(0), token_ids), random_bits(high, torch.tensor(0), token_ids)
    )


def test_derived_seeds_never_meet() -> None:
    """200,000 ids of three run seeds; the chance that any two meet by accident is 2e-8."""
    seeds = {
        derive_seed(run_seed, str(index))
        for run_seed in (0, 1, MAX_SEED)
        for index in range(200_000)
    }
    assert len(seeds) == 600_000
    assert min(seeds) >= 0
    assert max(seeds) <= MAX_SEED
    assert derive_seed(0, "a") == derive_seed(0, "a") != derive_seed(1, "a")


def test_greedy_takes_the_largest_and_the_smallest_id_of_ties() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 3.0, 3.0, 5.0], [-1.0, -2.0, -3.0, -1.5]])
    for top_k in (0, 1, 3):
        assert tokens_of(
            logits, [params(s, temperature=0, top_k=top_k) for s in range(3)], [0, 1, 2]
        ) == [1, 0, 0]


def test_every_tie_at_the_kth_logit_is_kept() -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, 0.999, 1.0]).expand(2000, -1)
    tokens = tokens_of(logits, [params(s, top_k=2) for s in range(2000)], [0] * 2000)
    assert set(tokens) == {0, 1, 2, 4}


def test_min_p_keeps_ties_and_nothing_below() -> None:
    logits = torch.tensor([3.0, 3.0 + math.log(0.5), 3.0 + math.log(0.25), 3.0])
    rows = [params(s, min_p=0.5) for s in range(2000)]
    cutoff = logits.double().max() + math.log(0.5)
    kept = {t for t in range(4) if logits[t].double() >= cutoff}
    assert set(tokens_of(logits.expand(2000, -1), rows, [0] * 2000)) == kept
    rows = [params(s, min_p=1) for s in range(2000)]
    assert set(tokens_of(logits.expand(2000, -1), rows, [0] * 2000)) == {0, 3}


def test_top_p_keeps_ties_together() -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0])
    rows = [params(s, top_p=0.5) for s in range(2000)]
    share = torch.softmax(logits, 0)[1].item()
    assert share < 0.5, "one more token is needed, and three tie"
    assert set(tokens_of(logits.expand(2000, -1), rows, [0] * 2000)) == {0, 1, 2, 3}
    rows = [params(s, top_p=share - 1e-6) for s in range(2000)]
    assert set(tokens_of(logits.expand(2000, -1), rows, [0] * 2000)) == {1}


@pytest.mark.parametrize("temperature", [1e-3, 0.7, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cutoff_of_top_p_is_that_of_the_oracle_at_every_mass(
    temperature: float, dtype: torch.dtype
) -> None:
    """Try the exact share of some tokens, and the numbers beside it. bfloat16 has ties."""
    logits = (torch.randn(6, 50, generator=torch.Generator().manual_seed(3)) * 4).to(dtype)
    ones, minus = torch.ones(6, dtype=torch.float64), torch.full((6, 1), -math.inf)
    found = find_nucleus(logits, minus.double(), ones * temperature, ones * 0.5)
    checked = 0
    for row in range(6):
        for before in sorted(set(found.before[row].tolist()))[1:]:
            share = before / found.total[row].item()
            for p in (share, math.nextafter(share, 0), math.nextafter(share, 1)):
                if not 0 < p < 1:
                    continue
                row_params = params(0, temperature=temperature, top_p=p)
                nucleus = find_nucleus(
                    logits[[row]], minus[:1].double(), ones[:1] * temperature, ones[:1] * p
                )
                expected = reference.cutoff(logits[row].double().tolist(), row_params)
                assert nucleus.cutoff().item() == expected
                checked += 1
    assert checked > (5 if temperature == 1e-3 else 200)


def test_masses_are_those_of_the_oracle() -> None:
    x = torch.cat([-torch.rand(3000, dtype=torch.float64) * 36, torch.tensor([0.0, -33.0, -32.5])])
    found = masses(x, 46).tolist()
    assert found == [reference.mass(value, 46) for value in x.tolist()]
    assert found == pytest.approx([math.exp(value) * 2**46 for value in x.tolist()], abs=1)
    assert found[3000] == 2**46


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_kept_tokens_are_those_of_transformers(temperature: float) -> None:
    """Where no logit ties with the cutoff: transformers drops some ties, or keeps them."""
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(200, 60, generator=torch.Generator().manual_seed(1)) * 3
    ids: Any = torch.zeros(200, 1, dtype=torch.long)
    for top_k, min_p, top_p in (
        (0, 0.1, 1.0),
        (0, 0.7, 1.0),
        (10, 0.05, 1.0),
        (10, 0.3, 1.0),
        (10, 0.0, 1.0),
        (0, 0.0, 0.9),
        (0, 0.0, 0.3),
        (12, 0.0, 0.8),
        (12, 0.02, 0.95),
    ):
        theirs = TemperatureLogitsWarper(temperature)(ids, logits.double())
        theirs = TopKLogitsWarper(top_k)(ids, theirs) if top_k else theirs
        theirs = TopPLogitsWarper(top_p)(ids, theirs) if top_p < 1 else theirs
        theirs = MinPLogitsWarper(min_p)(ids, theirs) if min_p else theirs
        rows = [params(0, temperature=temperature, top_k=top_k, min_p=min_p, top_p=top_p)] * 200
        ours = kept_set(
            logits,
            torch.tensor([top_k or 60] * 200),
            torch.tensor([kept_range(p) for p in rows], dtype=torch.float64),
            torch.tensor([p.top_p for p in rows], dtype=torch.float64),
            torch.tensor([p.temperature for p in rows], dtype=torch.float64),
        )
        kept = torch.zeros(200, 60, dtype=torch.bool)
        kept[ours.tokens()] = True
        assert torch.equal(kept, theirs.isfinite())


def test_rows_keep_their_own_parameters() -> None:
    """A row's token is the one that it gets alone, whatever the parameters of other rows."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 97, generator=generator) * 3
    rows = [
        params(
            s,
            temperature=(0, 0.5, 1, 3)[s % 4],
            top_k=(0, 1, 7, 97, 500)[s % 5],
            min_p=(0, 0.05, 0.5)[s % 3],
            top_p=(1, 0.9, 0.5, 0.01)[s % 7 % 4],
        )
        for s in range(40)
    ]
    steps = [s % 3 for s in range(40)]
    together = tokens_of(logits, rows, steps)
    assert together == [
        tokens_of(logits[i : i + 1], rows[i : i + 1], steps[i : i + 1])[0] for i in range(40)
    ]
    assert together == [
        sample_token(logits[i].double().tolist(), p, steps[i]) for i, p in enumerate(rows)
    ]


@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_numbers_have_no_token(top_k: int, temperature: float) -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [[0.0, nan, 1.0], [0.0, inf, 1.0], [-inf, -inf, -inf], [-inf, 2.0, -inf], [0.0, 1.0, 2.0]]
    )
    tokens = tokens_of(
        logits, [params(s, temperature=temperature, top_k=top_k) for s in range(5)], [0] * 5
    )
    assert tokens[:4] == [None, None, None, 1]
    assert tokens[4] is not None


def test_a_vocabulary_of_one() -> None:
    assert (
        sample_tokens(torch.zeros(2, 1), [params(0), params(1, temperature=0)], [0, 5])
        == [SampledToken(0, None)] * 2
    )


def test_bfloat16_logits_are_widened_before_the_noise_is_added() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 0.5]] * 500)
    rows = [params(s) for s in range(500)]
    assert tokens_of(logits.bfloat16(), rows, [0] * 500) == tokens_of(logits, rows, [0] * 500)


def naive_margin(logits: torch.Tensor, p: SamplingParams, step: int) -> float | None:
    """Compute the decision margin of sampling.py for one row, from every token."""
    if len(logits) == 1:
        return None
    ids = torch.arange(len(logits))
    scores = logits.double() + p.temperature * gumbel(torch.tensor(p.seed), torch.tensor(step), ids)
    ordered = torch.sort(logits.double(), descending=True).values
    k = 1 if p.temperature == 0 else min(p.top_k, len(logits)) or len(logits)
    is_off = p.min_p == 0 or p.temperature == 0
    cutoff_m = -math.inf if is_off else ordered[0].item() - reference.min_p_range(p)
    cutoff = max(ordered[k - 1].item(), cutoff_m)
    kept = logits.double() >= cutoff
    winner = sample_token(logits.double().tolist(), p, step)
    distances = [(scores[winner] - scores[j]).item() for j in ids if kept[j] and j != winner]
    if k < len(logits):
        distances.append((logits[winner].double() - ordered[k]).item())
    if not is_off:
        others = torch.cat([logits[:winner], logits[winner + 1 :]]).double()
        distances.append(
            logits[winner].double().item() - (others.max().item() - reference.min_p_range(p))
        )
    distances += [
        max(cutoff - logits[j].double().item(), (scores[winner] - scores[j]).item())
        for j in ids
        if not kept[j]
    ]
    return min(distances)


@pytest.mark.parametrize("vocab_size", [2, 7, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_margins_are_as_defined(vocab_size: int, dtype: torch.dtype) -> None:
    """bfloat16 gives ties at the k-th logit; high temperatures let tokens outside often win."""
    logits = (
        torch.randn(300, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 3
    ).to(dtype)
    rows = [
        params(
            s,
            temperature=(0, 0.5, 1, 5)[s % 4],
            top_k=(0, 1, 2, 5, 100, 500)[s % 6],
            min_p=(0, 0, 0.03, 0.4, 1)[s % 5],
        )
        for s in range(300)
    ]
    expected = [naive_margin(logits[i], p, i % 3) for i, p in enumerate(rows)]
    choices = sample_tokens(logits, rows, [i % 3 for i in range(300)])
    assert [choice.decision_margin for choice in choices] == expected
    assert len({choice.decision_margin for choice in choices}) > (
        20 if dtype == torch.bfloat16 else 200
    )
    # a bound may hide larger margins only
    margin_bounds = [0.4] * 300
    bounded = [
        choice.decision_margin
        for choice in sample_tokens(logits, rows, [i % 3 for i in range(300)], margin_bounds)
    ]
    few = [
        (p.top_k not in (0, 500) and p.top_k < vocab_size) or p.temperature == 0 or p.min_p > 0
        for p in rows
    ]
    assert [m for m, f in zip(bounded, few, strict=True) if f] == [
        min(m or 0, 0.4) for m, f in zip(expected, few, strict=True) if f
    ]


def test_no_change_of_less_than_half_the_margin_changes_the_token() -> None:
    """Moving all logits by less than half the decision margin keeps the token.

    The margin is tight: moving them by three quarters of it changes the token of most rows, in the
    direction that is worst for the row.
    """
    generator = torch.Generator().manual_seed(0)
    n_rows, vocab_size = 300, 30
    logits = torch.randn(n_rows, vocab_size, generator=generator, dtype=torch.float64) * 2
    # some ties, also with the k-th logit
    logits[::5] = logits[::5].round()
    rows = [
        params(
            s,
            temperature=(0, 0.7, 2)[s % 3],
            top_k=(0, 1, 2, 4, 10)[s % 5],
            min_p=(0, 0, 0.02, 0.3, 1, 0.9)[s % 11 % 6],
            top_p=(1, 0.9, 0.6, 0.3)[s % 7 % 4],
        )
        for s in range(300)
    ]
    choices = sample_tokens(logits, rows, [0] * n_rows)
    tokens = [choice.token for choice in choices]
    margins = torch.tensor([choice.decision_margin or 0.0 for choice in choices])[:, None]
    winner = torch.nn.functional.one_hot(torch.tensor(tokens), vocab_size)
    directions = [1 - 2 * winner]
    directions += [-1 + 2 * torch.eye(vocab_size, dtype=torch.long)[[j]] for j in range(vocab_size)]
    directions += [
        torch.randint(0, 2, logits.shape, generator=generator) * 2 - 1 for _ in range(20)
    ]
    changed = [False] * n_rows
    for direction in directions:
        near, far = logits + 0.499 * margins * direction, logits + 0.75 * margins * direction
        moved = tokens_of(near, rows, [0] * n_rows)
        # At a tie with margin 0 nothing moves.
        assert moved == tokens
        found = tokens_of(far, rows, [0] * n_rows)
        changed = [c or a != b for c, a, b in zip(changed, found, tokens, strict=True)]
    untied = [margin > 0 for margin in margins[:, 0].tolist()]
    assert sum(untied) > 200
    n_changed = sum(c for c, u in zip(changed, untied, strict=True) if u)
    assert n_changed > 0.9 * sum(untied), n_changed


@pytest.mark.cuda
def test_cpu_and_cuda_agree_on_the_integers() -> None:
    seeds, steps, token_ids = (
        torch.arange(100)[:, None] * 2**50,
        torch.arange(100)[:, None],
        torch.arange(1000)[None],
    )
    cpu = random_bits(seeds, steps, token_ids)
    assert torch.equal(random_bits(seeds.cuda(), steps.cuda(), token_ids.cuda()).cpu(), cpu)


@pytest.mark.cuda
def test_cpu_and_cuda_choose_the_same_tokens_from_the_same_logits() -> None:
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)) * 3
    rows = [params(s, temperature=(0, 0.8, 2)[s % 3], top_k=(0, 40)[s % 2]) for s in range(64)]
    assert tokens_of(logits.cuda(), rows, [3] * 64) == tokens_of(logits, rows, [3] * 64)


@pytest.mark.parametrize("native", [False, True])
def test_a_bound_just_above_the_margin_gives_the_margin(native: bool) -> None:
    """`verify` looks for the recorded margin by such a bound. Gaps must not round across it."""
    if native and not has_kernels():
        pytest.skip("no C++ compiler")
    generator = torch.Generator().manual_seed(0)
    for top_k, top_p, min_p in (
        (0, 0.95, 0.0),
        (100, 0.95, 0.0),
        (100, 0.95, 0.001),
        (9, 1.0, 0.01),
    ):
        logits = torch.randn(150, 300, generator=generator) * 1.5
        logits[75:, 250:] = -math.inf
        rows = [params(s, top_k=top_k, top_p=top_p, min_p=min_p) for s in range(150)]
        found = sample_tokens(logits, rows, [0] * 150, native=native)
        bounds = [math.nextafter(one.decision_margin or 0.0, math.inf) for one in found]
        assert sample_tokens(logits, rows, [0] * 150, bounds, native=native) == found


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.9999999])
def test_top_p_reaches_tokens_far_below_the_largest_logit(top_p: float, temperature: float) -> None:
    """Most of the mass is in unlikely tokens, at several depths, and in the last partial group."""
    if not has_kernels():
        pytest.skip("no C++ compiler")
    generator = torch.Generator().manual_seed(5)
    depths = torch.tensor([3.0, 7.9, 8.1, 15.9, 16.1, 20.0, 34.0, math.inf]) * temperature
    logits = 0.3 * torch.randn(16, 603, generator=generator) - depths.repeat(2)[:, None]
    logits[:, 17] = 0.5
    rows = [params(s, temperature=temperature, top_p=top_p) for s in range(16)]
    for bounds in (None, [1e-3] * 16):
        expected = sample_tokens(logits, rows, [0] * 16, bounds)
        found = sample_tokens(logits, rows, [0] * 16, bounds, native=True)
        assert [one.token for one in found] == [one.token for one in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.decision_margin == pytest.approx(other.decision_margin, rel=1e-12)


@pytest.mark.parametrize("temperature", [5e-324, 1e-309, 1e-300])
@pytest.mark.parametrize("native", [False, True])
def test_the_smallest_temperatures_are_greedy(native: bool, temperature: float) -> None:
    if native and not has_kernels():
        pytest.skip("no C++ compiler")
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(4))
    rows = [params(s, temperature=temperature, top_p=0.9, top_k=(0, 7)[s % 2]) for s in range(6)]
    found = sample_tokens(logits, rows, [0] * 6, native=native)
    assert [one.token for one in found] == logits.argmax(1).tolist()


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_do_not_depend_on_the_batch(native: bool, dtype: torch.dtype) -> None:
    """vllm#50979: one kernel cut ties at the k-th logit below a batch of 8, another kept them."""
    if native and not has_kernels():
        pytest.skip("no C++ compiler")
    logits = (torch.randn(16, 500, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)
    logits = (logits * 2).round() / 2  # many ties
    rows = [params(s, top_k=1 + s % 9, top_p=(1.0, 0.7)[s % 2]) for s in range(16)]
    alone = [sample_tokens(logits[[row]], [rows[row]], [3], native=native)[0] for row in range(16)]
    for batch in (2, 7, 8, 9, 16):
        found = sample_tokens(logits[:batch], rows[:batch], [3] * batch, native=native)
        assert found == alone[:batch]


@pytest.mark.parametrize("native", [False, True])
def test_logits_in_a_wider_tensor_are_read_by_their_stride(native: bool) -> None:
    """vllm#42684: a kernel read the wrong row."""
    if native and not has_kernels():
        pytest.skip("no C++ compiler")
    wide = torch.randn(6, 700, generator=torch.Generator().manual_seed(1))
    part, rows = wide[:, 100:400], [params(s, top_k=(0, 5)[s % 2], top_p=0.9) for s in range(6)]
    found = sample_tokens(part, rows, [0] * 6, native=native)
    assert found == sample_tokens(part.contiguous(), rows, [0] * 6, native=native)
    assert found == sample_tokens(part.T.contiguous().T, rows, [0] * 6, native=native)
