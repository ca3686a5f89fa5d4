"""The oracle: the loop of the tutorial, one prompt at a time, no cache, the whole context computed again for each token.

It is never made fast. Everything fast is tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptbatch.pipeline.engine.engine import WindowFull
from gptbatch.pipeline.engine.noise import gumbel
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.types import SamplingParams, StopReason


def sample_token(
    logits: Tensor, *, temperature: float, sample: bool, top_k: int, seed: int, step: int
) -> int:
    """The formula of sampling.py for one row of logits (V,), said plainly. `sample` false is greedy."""
    scores = logits.double()
    if sample:
        token_ids = torch.arange(len(logits), device=logits.device)
        scores = scores + temperature * gumbel(
            torch.tensor(seed), torch.tensor(step), token_ids.cpu()
        ).to(logits.device)
    if top_k > 0:
        kth = torch.sort(logits, descending=True).values[min(top_k, len(logits)) - 1]
        scores = torch.where(logits >= kth, scores, float("-inf"))
    return int((scores == scores.max()).nonzero()[0])


@torch.inference_mode()
def generate_token(
    gpt: GPT,
    idx: Tensor,
    *,
    temperature: float = 1.0,
    sample: bool = True,
    top_k: int = 0,
    seed: int = 0,
    step: int = 0,
) -> int:
    """The next token after idx (1, T): the last n_positions tokens through the whole network, then one choice."""
    logits = gpt(idx[:, -gpt.config.n_positions :])[0, -1]
    return sample_token(
        logits, temperature=temperature, sample=sample, top_k=top_k, seed=seed, step=step
    )


def generate(
    gpt: GPT,
    prompt_token_ids: list[int],
    params: SamplingParams,
    *,
    end_tokens: tuple[int, ...],
    window_full: WindowFull = "stop",
) -> tuple[list[int], StopReason]:
    """The new tokens of one prompt (1 to n_positions token ids) and why they end."""
    tokens = list(prompt_token_ids)
    for step in range(params.max_new_tokens):
        if step > 0 and window_full == "stop" and len(tokens) > gpt.config.n_positions:
            return tokens[len(prompt_token_ids) :], "window"
        token = generate_token(
            gpt,
            torch.tensor([tokens], device=gpt.device),
            temperature=params.temperature,
            sample=params.temperature > 0,
            top_k=params.top_k,
            seed=params.seed,
            step=step,
        )
        tokens.append(token)
        if token in end_tokens:
            return tokens[len(prompt_token_ids) :], "end_of_text"
    return tokens[len(prompt_token_ids) :], "max_new_tokens"
