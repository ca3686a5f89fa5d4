"""Copy the weights of a transformers model in memory into a GPT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gptbatch.pipeline.model.gpt import GPT, Block
from gptbatch.pipeline.model.tensor_names import BLOCK_NAMES, HEAD_NAME, OUTER_NAMES


def copy_parameter(target: Tensor, source: Tensor, *, transpose: bool = False) -> None:
    """Copy one tensor into another of the same shape.

    Raises:
        ValueError: The shapes differ.
    """
    source = source.detach().t() if transpose else source.detach()
    if target.shape != source.shape:
        raise ValueError(
            f"cannot copy a tensor of shape {tuple(source.shape)} "
            f"into one of shape {tuple(target.shape)}"
        )
    with torch.no_grad():
        target.copy_(source)


def copy_block(block: Block, source: nn.Module) -> None:
    """Copy a transformers `GPT2Block` into a Block."""
    for name, (source_name, transpose) in BLOCK_NAMES.items():
        copy_parameter(
            block.get_parameter(name), source.get_parameter(source_name), transpose=transpose
        )


def copy_model(gpt: GPT, source: nn.Module) -> None:
    """Copy a transformers `GPT2LMHeadModel` into a GPT that is not packed yet.

    Raises:
        ValueError: The shapes differ, or a tied model's head differs from its embedding.
    """
    sources = list(source.get_submodule("transformer.h").children())
    if len(sources) != len(gpt.blocks):
        raise ValueError(
            f"cannot copy a model of {len(sources)} blocks into one of {len(gpt.blocks)}"
        )
    for block, source_block in zip(gpt.blocks, sources, strict=True):
        assert isinstance(block, Block)
        copy_block(block, source_block)
    for name in OUTER_NAMES:
        copy_parameter(gpt.get_parameter(name), source.get_parameter(f"transformer.{name}"))
    head = source.get_parameter(HEAD_NAME)
    if gpt.config.tied and not torch.equal(head, source.get_parameter("transformer.wte.weight")):
        raise ValueError(
            "the model's head differs from its token embedding, "
            "but the config says that they are tied"
        )
    copy_parameter(gpt.lm_head.weight, head)
