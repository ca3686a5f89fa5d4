"""Models, prompts and comparisons for the tests of the engine of a device."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gptbatch.pipeline.engine.device_engine import DeviceEngine
from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.kv_cache.spec import TRITON, Backend
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.from_transformers import copy_model
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.packing import pack
from gptbatch.pipeline.types import Completion, TokenizedPrompt
from tests.conftest import random_model, tokenized
from tests.fake_device import TWINS, LateStream

EOS = (3, 17)
TOKEN_BYTES = [bytes([97 + token % 7, 97 + token % 5]) for token in range(300)]
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 150, "vocab_size": 300}


def device_model(**shape: Any) -> GPT:
    """Return a model with plain weights whose caches are those of the Triton kernels."""
    theirs = random_model(**{**SHAPE, **shape})
    model = GPT(parse_config(theirs.config.to_dict(), "config"), backend=TRITON)
    model.eval().requires_grad_(False)
    copy_model(model, theirs)
    return model


def random_prompts(rng: random.Random, count: int, longest: int = 20) -> list[TokenizedPrompt]:
    """Return prompts of ragged lengths, some with a shared prefix, and all kinds of settings."""
    shared = [rng.randrange(300) for _ in range(70)]
    choices: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_k": 0},
        {"top_k": 40},
        {"top_k": 5, "min_p": 0.05},
        {"min_p": 0.05},
        {"top_p": 0.9},
        {"top_k": 100, "top_p": 0.5},
        {"top_k": 150, "min_p": 0.01},
        {"top_k": 40, "stop": ("abca", "ba")},
        {"top_k": 40, "stop_token_ids": tuple(range(20, 60))},
        {"top_k": 40, "top_p": 0.9},
        {"top_k": 100, "repetition_penalty": 1.3, "min_new_tokens": 3},
        {"top_k": 40, "logprobs": 2},
        {"top_k": 40, "repetition_penalty": 1.2, "frequency_penalty": 0.1},
        {"top_k": 0, "presence_penalty": 0.4, "no_repeat_ngram_size": 2},
        {"top_k": 40, "allowed_token_ids": tuple(range(5, 35)), "logit_bias": ((5, 2.0),)},
        {"temperature": 0.0, "stop_token_ids": tuple(range(200)), "min_new_tokens": 3},
        {"top_k": 40, "bad_words": ("ab", "cac")},
    ]
    prompts = []
    for index in range(count):
        tokens = [rng.randrange(300) for _ in range(rng.randint(1, longest))]
        if rng.random() < 0.3:
            tokens = shared[: rng.choice([64, 70])] + tokens
        setting = rng.choice(choices[: rng.choice([8, len(choices)])])
        budget = rng.choice([1, 2, 5, 20, 200])
        budget = min(budget, 25) if len(tokens) < 100 else budget
        budget = max(budget, setting.get("min_new_tokens", 0))
        prompts.append(tokenized(index, tokens, max_new_tokens=budget, **setting))
    return prompts


def run(engine: Engine, prompts: Sequence[TokenizedPrompt | None]) -> list[Completion]:
    """Return all completions in order of the prompts; check that nothing is left in the engine."""
    ended = [done for completions in engine.generate(iter(prompts)) for done in completions]
    if isinstance(engine, DeviceEngine):
        check_nothing_is_left(engine)
    return sorted(ended, key=lambda completion: completion.prompt.index)


def check_nothing_is_left(engine: DeviceEngine) -> None:
    rows, cache = engine._rows, engine._cache
    assert not engine._scheduler.running
    assert not engine._scheduler.waiting
    assert not engine._in_flight
    assert rows.live() == []
    assert rows.n_free == len(rows.sequences)
    assert not any(rows.sequences)
    assert not rows.decodes.any()
    assert not engine._left_to_host
    adjustments = engine._batch._adjustments
    assert adjustments.n_free == len(rows.handle_at)
    assert not adjustments._automata._automata
    pool = cache.pool  # type: ignore[attr-defined]
    assert pool.n_in_use == pool._n_reserved == 0


def outcome(completion: Completion) -> tuple[Any, ...]:
    """Return what must be equal, but numbers that rounding changes."""
    untimed = dataclasses.replace(
        completion, timing=None, logprobs=None, min_decision_margin=None, logits_digest=None
    )
    return dataclasses.astuple(untimed)


def assert_equal(found: list[Completion], expected: list[Completion]) -> None:
    assert [outcome(each) for each in found] == [outcome(each) for each in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.min_decision_margin == pytest.approx(theirs.min_decision_margin, abs=2e-4)
        assert (ours.logprobs is None) == (theirs.logprobs is None)
        for a, b in zip(ours.logprobs or [], theirs.logprobs or [], strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert a.top_ids == b.top_ids
            assert a.top_logprobs == pytest.approx(b.top_logprobs, abs=1e-4)


def device_engine(model: GPT, **options: Any) -> DeviceEngine:
    settings = {"batch_size": 5, "stream": LateStream(), "kernels": TWINS, "eos_token_ids": EOS}
    return DeviceEngine(model=model, token_bytes=TOKEN_BYTES, **{**settings, **options})


def cpu_completions(model: GPT, prompts: Sequence[TokenizedPrompt]) -> list[Completion]:
    return run(
        Engine(model=model, batch_size=16, eos_token_ids=EOS, token_bytes=TOKEN_BYTES), prompts
    )


def packed_model(
    backend: Backend,
    *,
    int8: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    **shape: Any,
) -> GPT:
    theirs = random_model(**{**SHAPE, **shape})
    model = GPT(
        parse_config(theirs.config.to_dict(), "config"),
        backend=backend,
        cache_dtype="int8" if int8 else "auto",
    )
    model.eval().requires_grad_(False)
    copy_model(model, theirs)
    model = model.to(device=device, dtype=dtype)
    pack(model)
    return model
