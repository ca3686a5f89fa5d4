"""The two-pass head changes no token and no decision margin, bit for bit."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.engine.sampling import SampledToken, sample_tokens
from gptbatch.pipeline.engine.sampling_step import SampleRequest
from gptbatch.pipeline.engine.two_pass_sampling import sample_from_hidden
from gptbatch.pipeline.kv_cache.spec import RAGGED
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.lm_head import MIN_ROWS_MEASURED, TwoPassHead
from gptbatch.pipeline.model.self_test import select_batch_invariant_kernels
from gptbatch.pipeline.model.weights import load_gpt
from gptbatch.pipeline.params.sampling_params import SamplingParams
from tests.conftest import (
    SENTENCES,
    has_kernels,
    our_model,
    random_model,
    run_gptbatch,
    save_tokenizer,
    tokenized,
)

VOCAB_SIZE = 12007
WIDTH = 48


@pytest.fixture(scope="module")
def only_model() -> GPT:
    made = our_model(random_model(vocab_size=VOCAB_SIZE, n_embd=WIDTH), attention="ragged")
    if made.two_pass_head is None:
        pytest.skip("no instructions for bfloat16")
    return made


@pytest.fixture
def model(only_model: GPT) -> Iterator[GPT]:
    """Yield the model with fresh counters; restore its two-pass head afterwards."""
    two_pass_head = head_of(only_model)
    two_pass_head.n_rows = two_pass_head.n_fallbacks = 0
    yield only_model
    only_model.two_pass_head = two_pass_head


def head_of(model: GPT) -> TwoPassHead:
    assert model.two_pass_head is not None
    return model.two_pass_head


def hidden_states(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def from_all(
    model: GPT,
    hidden: torch.Tensor,
    params: list[SamplingParams],
    steps: list[int],
    margin_bounds: list[float],
) -> list[SampledToken]:
    return sample_tokens(model.logits(hidden), params, steps, margin_bounds, native=True)


def from_two_passes(
    model: GPT,
    hidden: torch.Tensor,
    params: list[SamplingParams],
    steps: list[int],
    margin_bounds: list[float],
) -> list[SampledToken]:
    requests = [
        SampleRequest(params=row, step=step, margin_bound=bound)
        for row, step, bound in zip(params, steps, margin_bounds, strict=True)
    ]
    return sample_from_hidden(model, hidden, requests)


@given(
    seed=st.integers(0, 2**32),
    kept=st.integers(1, 60),
    exact_range=st.floats(0, 0.5),
    scale=st.sampled_from([1e-37, 1e-30, 1e-20, 1e-3, 1.0, 30.0, 1e4]),
    outlier=st.booleans(),
)
@settings(max_examples=60, deadline=None)
@torch.inference_mode()
def test_logits_of_at_least_the_threshold_are_exact(
    only_model: GPT, seed: int, kept: int, exact_range: float, scale: float, outlier: bool
) -> None:
    model = only_model
    two_pass_head, hidden = head_of(model), hidden_states(3, seed) * scale
    if outlier:
        hidden[:, seed % WIDTH] *= 50
    exact, logits = model.logits(hidden), two_pass_head.approximate_logits(hidden)
    thresholds = two_pass_head.rescore(
        logits,
        hidden,
        torch.full((3,), kept),
        torch.full((3,), exact_range * scale, dtype=torch.float64),
    )
    if kept <= 5 and exact_range < 0.1 and scale > 1e-25 and not outlier:
        assert bool(thresholds.isfinite().all())
    for row, threshold in enumerate(thresholds.tolist()):
        if math.isnan(threshold):
            continue
        above = exact[row] >= threshold
        assert torch.equal(logits[row][above], exact[row][above])
        assert bool((logits[row][~above] < threshold).all())
        assert float(exact[row].topk(kept).values[-1]) >= threshold + exact_range * scale * (
            1 - 1e-12
        )


@torch.inference_mode()
def test_few_logits_are_computed_exactly(model: GPT) -> None:
    two_pass_head, hidden = head_of(model), hidden_states(64)
    exact, approximate_logits = (
        model.logits(hidden),
        two_pass_head.approximate_logits(hidden).clone(),
    )
    logits = approximate_logits.clone()
    thresholds = two_pass_head.rescore(
        logits, hidden, torch.full((64,), 5), torch.full((64,), 0.05, dtype=torch.float64)
    )
    assert bool(thresholds.isfinite().all())
    assert 5 * 64 <= int((logits != approximate_logits).sum()) < VOCAB_SIZE * 64 // 20
    assert not torch.equal(approximate_logits, exact)


@pytest.mark.parametrize("bound", [math.inf, 0.3, 0.01])
@torch.inference_mode()
def test_choices_and_margins_are_those_of_all_logits(model: GPT, bound: float) -> None:
    rng = random.Random(0)
    rows = 300  # several pieces
    hidden = hidden_states(rows)
    params = [
        SamplingParams(
            seed=i,
            temperature=rng.choice([0.0, 0.3, 0.8, 2.0]),
            top_k=rng.choice([1, 2, 5, 12]),
            max_new_tokens=1,
            min_p=rng.choice([0, 0.05, 0.5]),
            top_p=rng.choice([1, 0.9, 0.3]),
        )
        for i in range(rows)
    ]
    steps, margin_bounds = [i % 7 for i in range(rows)], [bound] * rows
    assert from_two_passes(model, hidden, params, steps, margin_bounds) == from_all(
        model, hidden, params, steps, margin_bounds
    )
    assert head_of(model).n_rows >= rows
    # Rows without a bound may have large margins, which reach further than the candidates.
    assert head_of(model).n_fallbacks < rows // (2 if math.isinf(bound) else 4)


@torch.inference_mode()
def test_rows_that_keep_much_of_the_vocabulary_need_all_logits(model: GPT) -> None:
    hidden = hidden_states(8)
    for top_k in (0, 500, VOCAB_SIZE):
        for keeping_much in ({3}, set(range(8))):
            params = [
                SamplingParams(
                    seed=i,
                    temperature=1.0,
                    top_k=top_k if i in keeping_much else 5,
                    max_new_tokens=1,
                )
                for i in range(8)
            ]
            head_of(model).n_rows = 0
            assert from_two_passes(model, hidden, params, [0] * 8, [0.1] * 8) == from_all(
                model, hidden, params, [0] * 8, [0.1] * 8
            )
            assert head_of(model).n_rows == 8 - len(keeping_much)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@torch.inference_mode()
def test_a_row_that_is_not_finite_harms_no_other(model: GPT, value: float) -> None:
    hidden = hidden_states(8)
    params = [SamplingParams(seed=i, temperature=1.0, top_k=5, max_new_tokens=1) for i in range(8)]
    healthy = from_two_passes(model, hidden, params, [0] * 8, [1.0] * 8)
    hidden[2, 7] = value
    choices = from_two_passes(model, hidden, params, [0] * 8, [1.0] * 8)
    assert choices == from_all(model, hidden, params, [0] * 8, [1.0] * 8)
    assert [choice for row, choice in enumerate(choices) if row != 2] == [
        choice for row, choice in enumerate(healthy) if row != 2
    ]


@torch.inference_mode()
def test_where_too_many_logits_are_close_a_screen_gives_up() -> None:
    """Tokens that hardly differ: none can be left out, whichever are kept."""
    theirs = random_model(vocab_size=VOCAB_SIZE, n_embd=WIDTH)
    with torch.no_grad():
        theirs.transformer.wte.weight[:] = theirs.transformer.wte.weight[:1] + 1e-6 * torch.randn(
            VOCAB_SIZE, WIDTH, generator=torch.Generator().manual_seed(0)
        )
    model = our_model(theirs, attention="ragged")
    if model.two_pass_head is None:
        pytest.skip("no instructions for bfloat16")
    rows = 2 * MIN_ROWS_MEASURED
    hidden = hidden_states(rows)
    params = [
        SamplingParams(seed=i, temperature=1.0, top_k=5, max_new_tokens=1) for i in range(rows)
    ]
    assert from_two_passes(model, hidden, params, [0] * rows, [1.0] * rows) == from_all(
        model, hidden, params, [0] * rows, [1.0] * rows
    )
    two_pass_head = model.two_pass_head
    assert two_pass_head.n_fallbacks == two_pass_head.n_rows < rows
    assert not two_pass_head.is_worthwhile


def test_a_run_is_the_same_with_and_without(model: GPT) -> None:
    prompts = [
        tokenized(
            i,
            [(7 * i + j) % VOCAB_SIZE for j in range(3 + i % 5)],
            temperature=i % 3 / 2,
            top_k=1 + i % 20,
            max_new_tokens=12,
        )
        for i in range(40)
    ]

    def run() -> list[tuple[str, list[int], float | None]]:
        engine = Engine(model=model, batch_size=7, eos_token_ids=())
        ended = (completion for some in engine.generate(iter(prompts)) for completion in some)
        return sorted((c.prompt.prompt_id, c.token_ids, c.min_decision_margin) for c in ended)

    two_pass = run()
    assert head_of(model).n_rows >= 40 * 12
    model.two_pass_head = None
    assert two_pass == run()


def test_threads_do_not_disturb_each_other(model: GPT) -> None:
    hidden = [hidden_states(40, seed) for seed in range(12)]
    params = [SamplingParams(seed=i, temperature=0.8, top_k=5, max_new_tokens=1) for i in range(40)]

    @torch.inference_mode()
    def choose(states: torch.Tensor) -> list[SampledToken]:
        return from_two_passes(model, states, params, [0] * 40, [0.1] * 40)

    alone = [choose(states) for states in hidden]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(choose, hidden)) == alone


def test_a_loaded_checkpoint_has_one_and_verifies(
    tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    """Run the command on a checkpoint with and without recorded logits, and verify both."""
    if not has_kernels() or not torch.ops.gptbatch.has_bfloat16():
        pytest.skip("no instructions for bfloat16")
    folder = tmp_path / "model"
    random_model(vocab_size=VOCAB_SIZE, n_embd=WIDTH).save_pretrained(folder)
    save_tokenizer(folder)
    loaded = load_gpt(
        parse_config(json.loads((folder / "config.json").read_text()), "config"),
        [folder / "model.safetensors"],
        dtype=torch.float32,
        device=torch.device("cpu"),
        backend=RAGGED,
    )
    assert loaded.two_pass_head is not None
    prompts = write_rows(
        [{"prompt": sentence, "max_new_tokens": 9 + i} for i, sentence in enumerate(SENTENCES * 5)]
    )
    for options in ((), ("--record-logits-digest",)):
        output = tmp_path / f"out{len(options)}"
        done = run_gptbatch(
            "generate",
            "--model",
            folder,
            "--input",
            prompts,
            "--output",
            output,
            "--top-k",
            "12",
            *options,
        )
        assert done.code == 0, done.stderr
        checked = run_gptbatch("verify", output, "--all")
        assert checked.code == 0, checked.stdout
        assert checked.summary["rows_checked"] == 15
        assert checked.summary["mismatches"] == 0
    same = run_gptbatch("diff", tmp_path / "out0", tmp_path / "out1")
    assert "record_logits_digest" in same.stdout
    tables = [
        pq.read_table(tmp_path / name, columns=["completion_token_ids", "min_decision_margin"])
        for name in ("out0", "out1")
    ]
    assert tables[0].equals(tables[1])


def test_the_self_test_drops_a_head_whose_logits_differ(model: GPT) -> None:
    assert select_batch_invariant_kernels(model).passed
    two_pass_head = head_of(model)
    right = two_pass_head.weight
    two_pass_head.weight = right + 1e-5
    try:
        assert select_batch_invariant_kernels(model).passed
        assert model.two_pass_head is None
    finally:
        two_pass_head.weight = right


def test_models_that_have_none() -> None:
    if not has_kernels():
        pytest.skip("no C++ compiler")
    large = {"vocab_size": VOCAB_SIZE, "n_embd": WIDTH}
    assert (
        our_model(random_model(**large), attention="ragged", dtype=torch.bfloat16).two_pass_head
        is None
    )
    assert (
        our_model(
            random_model(**large, tie_word_embeddings=False), attention="ragged"
        ).two_pass_head
        is None
    )
    assert our_model(random_model(**large)).two_pass_head is None  # padded
    assert our_model(random_model(), attention="ragged").two_pass_head is None  # small
