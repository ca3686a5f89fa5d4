"""What the benchmarks share: the network of gpt2's shape with random weights, and rows of random prompts."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.gpt.attention import Backend
from pipeline.gpt.config import parse_config
from pipeline.gpt.model import GPT
from pipeline.gpt.weights import copy_model
from pipeline.records import Prompt, SamplingParams, TokenizedPrompt

TEMPERATURE, TOP_K = 0.8, 40


def random_gpt2() -> GPT2LMHeadModel:
    """The model of transformers, float32 on CPU; the same weights in every process."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval()


def our_network(theirs: GPT2LMHeadModel, *, attention: Backend, dtype: torch.dtype, device: str = "cpu") -> GPT:
    """The same weights in our network, ready to run."""
    gpt = GPT(parse_config(theirs.config.to_dict(), "config"), attention=attention).eval().requires_grad_(False)
    copy_model(gpt, theirs)
    gpt = gpt.to(device=device, dtype=dtype)
    gpt.pack()
    return gpt


def random_prompts(rows: int, prompt_tokens: int, *, repeat: int) -> torch.Tensor:
    """(rows, prompt_tokens) token ids, others for each repeat."""
    return torch.randint(0, 50257, (rows, prompt_tokens), generator=torch.Generator().manual_seed(repeat))


def as_rows(prompts: torch.Tensor, *, new_tokens: int) -> list[TokenizedPrompt]:
    """The prompts as the engine takes them."""
    return [
        TokenizedPrompt(
            prompt=Prompt(
                index=i,
                prompt_id=str(i),
                text="",
                params=SamplingParams(seed=i, temperature=TEMPERATURE, top_k=TOP_K, max_new_tokens=new_tokens),
                metadata=None,
            ),
            token_ids=token_ids,
            tokens_dropped=0,
            read_s=0.0,
        )
        for i, token_ids in enumerate(prompts.tolist())
    ]
