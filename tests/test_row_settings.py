"""Bias, penalties, masks and ends: against the oracle, transformers, and naive searches."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gptbatch.pipeline.engine import reference
from gptbatch.pipeline.engine.bad_words import BadWords, count_states
from gptbatch.pipeline.engine.engine import Engine, SchedulingOptions
from gptbatch.pipeline.engine.logit_adjustments import adjusted_logits
from gptbatch.pipeline.engine.row_adjustments import RowAdjustments
from gptbatch.pipeline.engine.sampling import sample_tokens
from gptbatch.pipeline.engine.stopping import StopRule
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.kv_cache.spec import BackendName
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.types import Completion, TokenizedPrompt
from tests.conftest import our_model, random_model, tokenized

VOCAB_SIZE = 300
EOS = 0


def make_token_bytes() -> list[bytes]:
    """Return short texts, in which stop strings and bad words appear often."""
    rng = random.Random(0)
    pieces = ["a", "b", "ab", "é", " ", "c\n", ""]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 3))).encode() for _ in range(VOCAB_SIZE)]
    return [text[: rng.randint(0, len(text))] or text for text in texts]


TOKEN_BYTES = make_token_bytes()


def random_settings(rng: random.Random) -> dict[str, Any]:
    """Return settings of every kind, each with a chance of its own."""
    ids = range(VOCAB_SIZE)
    choices: dict[str, Any] = {
        "top_p": rng.choice([0.5, 0.9]),
        "min_p": 0.05,
        "repetition_penalty": rng.choice([0.8, 1.1, 1.7]),
        "presence_penalty": rng.choice([-1.5, 0.7]),
        "frequency_penalty": rng.choice([-0.3, 0.11]),
        "no_repeat_ngram_size": rng.choice([1, 2, 3]),
        "logit_bias": tuple(
            sorted((token, rng.uniform(-3, 5)) for token in rng.sample(ids, rng.randint(1, 6)))
        ),
        "allowed_token_ids": tuple(rng.sample(ids, 60)),
        "bad_words": tuple(rng.sample(["ab", "é", "ba", "aa b", "\n"], 2)),
        "min_new_tokens": rng.randint(1, 3),
        "stop": tuple(rng.sample(["aé", "bb", "c\n", "aba", " a"], 2)),
        "stop_token_ids": tuple(rng.sample(ids, 30)),
        "logprobs": rng.choice([0, 3]),
    }
    settings = {name: value for name, value in choices.items() if rng.random() < 0.3}
    return settings | {"temperature": rng.choice([0.0, 0.7, 1.3]), "top_k": rng.choice([0, 5, 40])}


def random_prompts(count: int) -> list[TokenizedPrompt]:
    rng = random.Random(count)
    shared = [rng.randrange(1, VOCAB_SIZE) for _ in range(20)]
    return [
        tokenized(
            i,
            shared[: rng.choice([0, 20])]
            + [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.choice([1, 2, 5, 17]))],
            max_new_tokens=rng.randint(3, 14),
            **random_settings(rng),
        )
        for i in range(count)
    ]


def run(
    model: GPT, prompts: list[TokenizedPrompt], *, batch_size: int, step_tokens: int = 4096
) -> list[Completion]:
    engine = Engine(
        model=model,
        batch_size=batch_size,
        eos_token_ids=(EOS,),
        scheduling=SchedulingOptions(step_tokens=step_tokens),
        token_bytes=TOKEN_BYTES,
    )
    ended = [completion for some in engine.generate(iter(prompts)) for completion in some]
    return sorted(ended, key=lambda completion: completion.prompt.index)


def outcome(completion: Completion) -> tuple[Any, ...]:
    """Return all that must not depend on the batch."""
    untimed = dataclasses.replace(completion, timing=None)
    return dataclasses.astuple(untimed)


@pytest.fixture(
    scope="module",
    params=[
        ("ragged", torch.float32, "auto"),
        ("ragged", torch.bfloat16, "int8"),
        ("padded", torch.float32, "auto"),
        ("padded", torch.bfloat16, "auto"),
    ],
    ids=lambda param: "-".join(map(str, param)),
)
def model(request: pytest.FixtureRequest) -> GPT:
    attention: BackendName
    cache_dtype: CacheDtype
    attention, dtype, cache_dtype = request.param
    return our_model(random_model(), attention=attention, dtype=dtype, cache_dtype=cache_dtype)


def test_all_settings_in_any_batch(model: GPT) -> None:
    """Equal to the oracle, at any batch size, order and chunking, with shared prefixes."""
    # padded attention is slow
    prompts = random_prompts(60 if model.backend.native else 20)
    expected = [outcome(completion) for completion in run(model, prompts, batch_size=1)]
    for batch_size, step_tokens in ((3, 4096), (16, 4096), (16, 20)):
        found = run(model, prompts, batch_size=batch_size, step_tokens=step_tokens)
        assert [outcome(completion) for completion in found] == expected
        random.Random(batch_size).shuffle(prompts)
    if model.cache_spec.cache_dtype == "int8":
        return  # the oracle has no cache
    reasons = set()
    for completion in run(model, prompts, batch_size=16):
        if completion.error is not None:
            assert completion.error.kind == "no_token_allowed"
            continue
        tokens, reason = reference.generate(
            model,
            completion.prompt_token_ids,
            completion.prompt.params,
            eos_token_ids=(EOS,),
            token_bytes=TOKEN_BYTES,
        )
        assert (completion.token_ids, completion.stop_reason) == (tokens, reason)
        reasons.add(reason)
    assert reasons >= {"stop_token", "stop_string", "max_new_tokens"}


def test_completions_follow_their_settings(model: GPT) -> None:
    """Look at the completions themselves, without the oracle."""
    # padded attention is slow
    count = 200 if model.backend.native else 40
    checked = 0
    for completion in run(model, random_prompts(count), batch_size=16):
        params, tokens = completion.prompt.params, completion.token_ids
        if completion.error is not None:
            continue
        text = b"".join(TOKEN_BYTES[token] for token in tokens)
        assert not any(word.encode() in text for word in params.bad_words)
        if params.allowed_token_ids is not None:
            assert set(tokens) <= set(params.allowed_token_ids)
        if params.no_repeat_ngram_size:
            size, whole = params.no_repeat_ngram_size, completion.prompt_token_ids + tokens
            grams = [tuple(whole[i : i + size]) for i in range(len(whole) - size + 1)]
            new = grams[max(0, len(completion.prompt_token_ids) - size + 1) :]
            assert all(grams.count(gram) == 1 for gram in new)
        ends = {EOS, *params.stop_token_ids}
        assert not ends & set(tokens[: params.min_new_tokens])
        if completion.stop_reason == "stop_string":
            assert completion.stop_string in params.stop
            assert text[completion.text_bytes :].startswith((completion.stop_string or "").encode())
        else:
            seen = text[: len(text) if len(tokens) > params.min_new_tokens else 0]
            assert completion.text_bytes is None
            if not params.min_new_tokens:
                assert not any(stop.encode() in seen for stop in params.stop)
        if params.logprobs is not None:
            assert completion.logprobs is not None
            assert len(completion.logprobs) == len(tokens)
            assert all(len(step.top_ids) == params.logprobs for step in completion.logprobs)
        checked += 1
    assert checked > 3 * count // 4


def steps_of(params: SamplingParams, prompt: list[int], new: list[int]) -> RowAdjustments:
    rule = StopRule(
        eos_token_ids=(EOS,), n_positions=99, window_full="stop", token_bytes=TOKEN_BYTES
    )
    row = RowAdjustments(params, prompt, rule, BadWords(TOKEN_BYTES))
    for token in new:
        row.add(token)
    return row


def adjusted(
    logits: torch.Tensor, settings: dict[str, Any], prompt: list[int], new: list[int]
) -> torch.Tensor:
    """Return the adjusted logits (V,) of a row."""
    params = SamplingParams(
        **{"seed": 0, "temperature": 1.0, "top_k": 0, "max_new_tokens": 50} | settings
    )
    step = steps_of(params, prompt, new).next_step()
    return logits.float() if step is None else adjusted_logits(logits[None], [step])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adjusted_logits_are_those_of_the_oracle(dtype: torch.dtype) -> None:
    rng = random.Random(5)
    for number in range(120):
        logits = (torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(number)) * 9).to(
            dtype
        )
        logits[rng.randrange(VOCAB_SIZE)] = 0.0
        settings = random_settings(rng)
        prompt = rng.choices(range(30), k=rng.randint(1, 20))
        new = rng.choices(range(30), k=rng.randint(0, 12))
        text = b"".join(TOKEN_BYTES[token] for token in new)
        words = settings.get("bad_words", ())
        settings["bad_words"] = tuple(word for word in words if word.encode() not in text)
        params = SamplingParams(**{"seed": 0, "max_new_tokens": 50} | settings)
        expected = reference.adjusted(
            logits.double().tolist(),
            params,
            prompt,
            new,
            end_token_ids=(EOS, *params.stop_token_ids),
            token_bytes=TOKEN_BYTES,
        )
        assert adjusted(logits, settings, prompt, new).tolist() == expected, settings


def test_penalties_are_those_of_transformers() -> None:
    from transformers import (
        MinNewTokensLengthLogitsProcessor,
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor,
    )

    rng = random.Random(1)
    for number in range(60):
        logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(number)) * 9 - 3
        prompt = rng.choices(range(1, 12), k=rng.randint(1, 15))
        new = rng.choices(range(1, 12), k=rng.randint(0, 9))
        ids: Any = torch.tensor([prompt + new])
        size, penalty = rng.randint(1, 4), rng.choice([0.7, 1.3])
        bias = {token: rng.uniform(-5, 5) for token in rng.sample(range(VOCAB_SIZE), 4)}
        at_least = rng.randint(1, 9)
        for settings, processor in (
            ({"repetition_penalty": penalty}, RepetitionPenaltyLogitsProcessor(penalty)),
            ({"no_repeat_ngram_size": size}, NoRepeatNGramLogitsProcessor(size)),
            (
                {"logit_bias": tuple(sorted(bias.items()))},
                SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
            ),
            (
                {"min_new_tokens": at_least},
                MinNewTokensLengthLogitsProcessor(len(prompt), at_least, EOS),
            ),
        ):
            theirs = processor(ids, logits[None].clone())[0]
            assert torch.equal(adjusted(logits, settings, prompt, new), theirs), settings


def test_openai_penalties_count_new_tokens_only() -> None:
    """The prompt does not count (TensorRT-LLM#5623); times are those before this step."""
    logits = torch.zeros(VOCAB_SIZE)
    found = adjusted(
        logits, {"presence_penalty": 0.5, "frequency_penalty": 0.25}, [7, 7], [8, 9, 9]
    )
    assert {token: value for token, value in enumerate(found.tolist()) if value} == {
        8: -0.75,
        9: -1.0,
    }


def test_a_small_penalty_does_not_vanish_in_bfloat16() -> None:
    """At -35 the steps of bfloat16 are 0.25; logits are widened first."""
    logits = torch.full((VOCAB_SIZE,), -35.0, dtype=torch.bfloat16)
    found = adjusted(logits, {"presence_penalty": 0.1}, [1], [2])
    assert found[2].item() == pytest.approx(-35.1, abs=1e-5)
    assert logits[2].item() == -35.0


@pytest.mark.parametrize("native", [False, True])
def test_the_distribution_after_all_adjustments(native: bool) -> None:
    """Chi-square against softmax in float64 of independently adjusted logits."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(12, generator=generator) * 1.5
    prompt, new = [1, 2, 3], [4, 5, 5, 2]
    settings: dict[str, Any] = {
        "repetition_penalty": 1.4,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.2,
        "logit_bias": ((6, 1.0), (7, -0.5)),
        "allowed_token_ids": tuple(range(11)),
        "no_repeat_ngram_size": 3,
    }
    rule = StopRule(eos_token_ids=(EOS,), n_positions=99, window_full="stop")
    params = SamplingParams(
        seed=0, temperature=0.8, top_k=9, top_p=0.97, min_p=0.001, max_new_tokens=9, **settings
    )
    row = RowAdjustments(params, prompt, rule, BadWords(()))
    for token in new:
        row.add(token)
    step = row.next_step()
    assert step is not None
    x = logits.double().numpy().copy()
    x[6] += 1.0
    x[7] -= 0.5
    for token in {*prompt, *new}:
        x[token] = x[token] * 1.4 if x[token] < 0 else x[token] / 1.4
    for token in set(new):
        x[token] -= 0.3 - 0.2 * new.count(token)
    x[11] = -np.inf
    order = np.argsort(-x)
    kept = order[:9]
    weights = np.exp((x[kept] - x.max()) / 0.8)
    mass = np.cumsum(weights) / weights.sum()
    kept = kept[: int(np.searchsorted(mass, 0.97)) + 1]
    kept = kept[np.exp((x[kept] - x.max()) / 0.8) >= 0.001]
    share = np.exp(x[kept] / 0.8) / np.exp(x[kept] / 0.8).sum()
    draws = 20_000
    rows = adjusted_logits(logits.expand(draws, -1), [step] * draws)
    every = [dataclasses.replace(params, seed=seed) for seed in range(draws)]
    sampled = sample_tokens(rows, every, [4] * draws, native=native)
    counts = np.bincount([token.token or 0 for token in sampled], minlength=12)
    assert counts[kept].sum() == draws
    assert stats.chisquare(counts[kept], share * draws).pvalue > 1e-6


def test_forbidding_every_token_is_an_error_of_that_row_alone(model: GPT) -> None:
    prompts = [
        tokenized(0, [5], allowed_token_ids=(7,), no_repeat_ngram_size=1, max_new_tokens=4),
        tokenized(1, [5], max_new_tokens=4),
    ]
    forbidden, other = run(model, prompts, batch_size=2)
    assert forbidden.error is not None
    assert forbidden.error.kind == "no_token_allowed"
    assert "new token 1" in forbidden.error.reason
    assert other.token_ids == run(model, [prompts[1]], batch_size=1)[0].token_ids


WORDS = st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=4)


@given(words=WORDS, before=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6))
def test_banned_tokens_are_those_that_would_complete_a_bad_word(
    words: list[str], before: list[int]
) -> None:
    automaton = BadWords(TOKEN_BYTES).automaton(tuple(words))
    assert count_states([word.encode() for word in words]) == len(automaton._table)
    text, state = b"", 0
    for token in before:
        # a completion never holds a bad word
        if any(word.encode() in text + TOKEN_BYTES[token] for word in words):
            continue
        text += TOKEN_BYTES[token]
        state = automaton.next_state(state, TOKEN_BYTES[token])
    expected = [
        token
        for token, data in enumerate(TOKEN_BYTES)
        if any(word.encode() in text + data for word in words)
    ]
    assert automaton.banned(state).tolist() == expected
