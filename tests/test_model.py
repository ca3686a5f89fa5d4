"""The model against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.from_transformers import copy_block, copy_model, copy_parameter
from gptbatch.pipeline.model.gpt import GPT, Block
from gptbatch.pipeline.model.packing import pack, use_padding_plan
from gptbatch.pipeline.model.padding import PADDING_PLANS, PaddingPlan
from tests.conftest import our_model, random_model

SWITCHES: dict[str, dict[str, Any]] = {  # each changes the numbers
    "erf-gelu": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "tanh": {"activation_function": "tanh"},
    "unscaled-attention": {"scale_attn_weights": False},
    "scaled-by-layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast-attention": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    "large-epsilon": {"layer_norm_epsilon": 0.1},
}
SHAPES: dict[str, dict[str, Any]] = SWITCHES | {
    "plain": {},
    "one-layer-one-head": {"n_layer": 1, "n_head": 1, "n_embd": 8},
    "odd-sizes": {"n_layer": 3, "n_head": 3, "n_embd": 39, "n_inner": 77, "vocab_size": 131},
    "deep": {"n_layer": 9, "n_head": 2, "n_embd": 24},
    "untied": {"tie_word_embeddings": False},
    "pytorch-tanh-gelu": {"activation_function": "gelu_pytorch_tanh"},
}
TOLERANCE = 1e-4


def largest_difference(theirs: GPT2LMHeadModel, gpt: GPT, idx: torch.Tensor) -> float:
    with torch.inference_mode():
        return float((theirs(idx).logits - gpt(idx)).abs().max())


@pytest.mark.parametrize("packed", [False, True], ids=["plain-linears", "packed-linears"])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_agree_with_transformers(name: str, packed: bool) -> None:
    theirs = random_model(**SHAPES[name])
    idx = torch.randint(
        0, theirs.config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(1)
    )
    assert largest_difference(theirs, our_model(theirs, packed=packed), idx) <= TOLERANCE


@pytest.mark.parametrize("name", SWITCHES)
def test_the_comparison_notices_a_switch_that_is_ignored(name: str) -> None:
    """A negative control: the same weights without the switch give other logits."""
    theirs, plain = random_model(**SWITCHES[name]), random_model()
    idx = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(1))
    assert largest_difference(theirs, our_model(plain), idx) > 5 * TOLERANCE


@pytest.mark.slow
def test_logits_agree_on_the_full_gpt2_shape() -> None:
    theirs = random_model(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, n_positions=1024)
    gpt = our_model(theirs, packed=False)
    assert gpt.parameter_count() == 163_037_184
    pack(gpt)
    idx = torch.randint(0, 50257, (2, 96), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, logits = theirs(idx).logits, gpt(idx)
    assert expected.std() > 0.5, "logits that hardly vary would agree by themselves"
    assert (expected - logits).abs().max() <= TOLERANCE


def test_parameter_count_is_that_of_transformers() -> None:
    for shape in ({}, {"tie_word_embeddings": False}):
        theirs = random_model(**shape)
        expected = sum(p.numel() for _, p in theirs.named_parameters(remove_duplicate=False))
        assert our_model(theirs, packed=False).parameter_count() == expected


@pytest.mark.parametrize("length", [0, 65, 1000])
def test_sequences_that_do_not_fit_are_refused(length: int) -> None:
    gpt = our_model(random_model())
    with pytest.raises(
        ValueError,
        match=f"a sequence of {length} tokens does not fit: 1 to n_positions \\(64\\) do",
    ):
        gpt(torch.zeros(1, length, dtype=torch.long))
    assert gpt(torch.zeros(1, 64, dtype=torch.long)).shape == (1, 64, 300)


def test_every_parameter_matters_to_the_logits() -> None:
    """Each parameter that is not copied shows: the parity tests would fail without it."""
    theirs = random_model(n_layer=1)
    idx = torch.randint(1, 300, (2, 30), generator=torch.Generator().manual_seed(1))
    for name, parameter in theirs.named_parameters():
        gpt = our_model(theirs)
        with torch.no_grad():
            kept = parameter.clone()
            parameter.mul_(1.5).add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
            )
        if not name.endswith("c_attn.bias"):  # of which the keys' third cancels in softmax
            assert largest_difference(theirs, gpt, idx) > TOLERANCE, name
        with torch.no_grad():
            parameter.copy_(kept)


def test_copying_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\) into one of shape \(3, 3\)"):
        copy_parameter(torch.zeros(3, 3), torch.ones(2, 3))
    target = torch.zeros(3, 2)
    copy_parameter(target, torch.arange(6.0).view(2, 3), transpose=True)
    assert target.tolist() == [[0, 3], [1, 4], [2, 5]]
    small, large = random_model(), random_model(n_layer=3)
    with pytest.raises(ValueError, match="3 blocks into one of 2"):
        copy_model(our_model(small, packed=False), large)


def test_copy_block_copies_one_block() -> None:
    theirs = random_model(n_layer=1)
    gpt = GPT(parse_config(theirs.config.to_dict(), "config"))
    block = gpt.blocks[0]
    assert isinstance(block, Block)
    source = theirs.get_submodule("transformer.h.0")
    copy_block(block, source)
    assert torch.equal(block.mlp_in.weight, source.get_parameter("mlp.c_fc.weight").t())
    assert torch.equal(block.ln_2.get_parameter("bias"), source.get_parameter("ln_2.bias"))


def test_row_counts_are_few_and_waste_little() -> None:
    rounded, more, constant = (
        [plan.padded(rows) for rows in range(1, 4097)] for plan in PADDING_PLANS
    )
    assert all(
        rows <= up <= max(rows + 7, rows * 9 / 8) for rows, up in enumerate(rounded, start=1)
    )
    assert len(set(rounded)) < 60
    assert more[40:] == rounded[40:]
    assert min(more) == 32
    assert all(up % 64 == 0 and rows <= up < rows + 64 for rows, up in enumerate(constant, start=1))


@pytest.mark.parametrize("plan", PADDING_PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("packed", [True, False])
def test_rows_that_fill_up_a_batch_change_no_number(plan: PaddingPlan, packed: bool) -> None:
    theirs = random_model()
    idx = torch.randint(0, 300, (11, 9), generator=torch.Generator().manual_seed(3))
    gpt = our_model(theirs, packed=packed)
    use_padding_plan(gpt, plan)
    with torch.inference_mode():
        assert (theirs(idx).logits - gpt(idx)).abs().max() <= TOLERANCE
        assert gpt(idx[:1, :1]).shape == (1, 1, 300)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["plain", "odd-sizes", "scaled-by-layer", "untied"])
def test_logits_on_cuda_agree_with_transformers_on_cpu(name: str) -> None:
    theirs = random_model(**SHAPES[name])
    gpt = our_model(theirs, packed=False).to("cuda")
    idx = torch.randint(
        0, theirs.config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(1)
    )
    with torch.inference_mode():
        assert (theirs(idx).logits - gpt(idx.cuda()).cpu()).abs().max() <= TOLERANCE
