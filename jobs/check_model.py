"""`gptbatch check-model`: the tutorial's sanity check, for any checkpoint: do network and tokenizer agree with transformers?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from gptbatch.jobs.messages import echo
from gptbatch.jobs.options import Command, ModelArgument

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

    from gptbatch.pipeline.model.checkpoint import Checkpoint
    from gptbatch.pipeline.model.gpt import GPT

TOLERANCE = (
    1e-4  # largest logit difference in float32, relative to the largest logit where that is above 1
)
MAX_TOKENS = 64

PROMPTS = (
    "",
    "The",
    "Once upon a time there was a king who",
    "def fibonacci(n):\n    if n < 2:\n",
    "In 1969, the first people landed on the Moon. They had travelled for four days, and what they found there was",
)


@click.command("check-model", cls=Command)
@click.argument("model", type=ModelArgument())
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option(
    "--allow-pickle", is_flag=True, help="Accept pytorch_model.bin where there are no safetensors."
)
@click.option(
    "--new-tokens",
    default=16,
    show_default=True,
    type=click.IntRange(1),
    help="Greedy tokens to compare per prompt.",
)
def check_model(model: str, revision: str | None, allow_pickle: bool, new_tokens: int) -> None:
    """Compare our network and tokenizer with transformers on the checkpoint MODEL (a folder or a hub name), in float32 on CPU.

    Prints the parameter counts of both, the largest logit difference, whether both choose the same greedy tokens over a few
    prompts, whether tokens, special tokens and decoded texts are the same over hard texts, which end tokens both stop at, and which
    generation settings of the checkpoint gptbatch does not follow; its last line is a JSON object. Exits with 0 when they
    agree, else with 78. End tokens agree when gptbatch stops at all those of transformers.
    """
    import torch

    from gptbatch.jobs.tokenizer_check import compare_tokenizers
    from gptbatch.pipeline.errors import ModelError
    from gptbatch.pipeline.input.tokenizer import PromptTokenizer
    from gptbatch.pipeline.input.tokenizer_loading import load_tokenizer
    from gptbatch.pipeline.model.checkpoint import find_checkpoint
    from gptbatch.pipeline.model.config import parse_config
    from gptbatch.pipeline.model.loading import threads_to_use
    from gptbatch.pipeline.model.weights import load_gpt

    torch.set_num_threads(threads_to_use(None))
    checkpoint = find_checkpoint(model, revision=revision, allow_pickle=allow_pickle)
    config = parse_config(checkpoint.config, str(checkpoint.config_path))
    ours = load_gpt(
        config,
        list(checkpoint.weights),
        dtype=torch.float32,
        device=torch.device("cpu"),
        packed=False,
    )
    theirs = _load_with_transformers(checkpoint)
    tokenizer = PromptTokenizer(
        load_tokenizer(checkpoint.folder), start_token=checkpoint.special_tokens.start
    )
    prompts = [
        [token for token in prompt.token_ids if token < config.vocab_size]
        for prompt in tokenizer.encode(list(PROMPTS))
    ]

    our_count = ours.parameter_count()
    their_count = sum(
        parameter.numel() for _, parameter in theirs.named_parameters(remove_duplicate=False)
    )
    echo(
        f"parameters, the head counted as its own: ours {our_count:,}, transformers {their_count:,}"
    )
    networks = _compare_networks(ours, theirs, prompts, new_tokens)
    echo(
        f"largest logit difference: {networks.difference:.3g} (largest logit {networks.largest:.3g})"
    )
    echo(f"greedy tokens equal: {networks.equal_tokens} of {networks.tokens}")
    compared = compare_tokenizers(checkpoint.folder)
    echo(
        f"tokenizer ({compared.way}): {compared.encodings} encodings, {compared.texts} decoded texts, "
        f"{compared.special_tokens} special tokens: "
        + (f"differ in {compared.difference}" if compared.difference else "equal")
    )
    ends, unfollowed = checkpoint.special_tokens.ends, checkpoint.settings_not_followed
    their_ends = _end_tokens(theirs)
    missed_ends = {token for token in their_ends if 0 <= token < config.vocab_size} - set(ends)
    echo(f"end tokens: ours {list(ends)}, transformers {their_ends}")
    echo(
        f"generation settings that are not followed: {json.dumps(unfollowed) if unfollowed else 'none'}"
    )

    agree = our_count == their_count and networks.agree and compared.agree and not missed_ends
    summary = {
        "model": model,
        "parameters": our_count,
        "parameters_transformers": their_count,
        "largest_logit_difference": networks.difference,
        "greedy_tokens_equal": networks.equal_tokens,
        "greedy_tokens_compared": networks.tokens,
        "tokenizer_difference": compared.difference,
        "end_tokens": ends,
        "end_tokens_transformers": their_ends,
        "settings_not_followed": unfollowed,
        "agree": agree,
    }
    echo(json.dumps(summary))
    if not agree:
        differing = (
            "tokenizer" if not compared.agree else "end tokens" if missed_ends else "network"
        )
        raise ModelError(f"{model}: our {differing} and transformers do not agree")


@dataclass(slots=True)
class _Networks:
    """Two networks compared: the largest difference of a logit, the largest logit, and greedy tokens."""

    difference: float = 0.0
    largest: float = 0.0
    equal_tokens: int = 0
    tokens: int = 0

    @property
    def agree(self) -> bool:
        return (
            self.difference <= TOLERANCE * max(1.0, self.largest)
            and self.equal_tokens == self.tokens
        )


def _compare_networks(
    ours: GPT, theirs: GPT2LMHeadModel, prompts: list[list[int]], new_tokens: int
) -> _Networks:
    """Compare logits and greedy tokens, step by step, of our network and of a copy of theirs in ours."""
    import torch

    from gptbatch.pipeline.model.from_transformers import copy_model
    from gptbatch.pipeline.model.gpt import GPT

    copied = GPT(ours.config).eval()
    copy_model(copied, theirs)
    found = _Networks()
    n_positions = ours.config.n_positions
    with torch.inference_mode():
        for prompt in prompts:
            idx = torch.tensor([prompt[:MAX_TOKENS] or [0]])[:, :n_positions]
            for _ in range(new_tokens):
                logits = theirs(idx).logits
                found.largest = max(found.largest, logits.abs().max().item())
                for network in (ours, copied):
                    found.difference = max(
                        found.difference, (network(idx) - logits).abs().max().item()
                    )
                token = logits[0, -1].argmax()
                found.tokens += 1
                found.equal_tokens += int(ours(idx)[0, -1].argmax() == token)
                if idx.shape[1] == n_positions:
                    break
                idx = torch.cat([idx, token.view(1, 1)], dim=1)
    return found


def _load_with_transformers(checkpoint: Checkpoint) -> GPT2LMHeadModel:
    """Raises ModelError where transformers would make up tensors that it does not find."""
    import torch
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging as transformers_logging

    from gptbatch.pipeline.errors import ModelError

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # its report of tensors that it leaves out
    loaded: Any = GPT2LMHeadModel.from_pretrained(
        checkpoint.folder, dtype=torch.float32, output_loading_info=True
    )
    model: GPT2LMHeadModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise ModelError(
            f"{checkpoint.name}: transformers does not find {len(missing)} tensors here, such as {missing[0]}, and makes them up: there is "
            "nothing to compare with; if names have the prefix of a training program, save the model without it"
        )
    model.eval()
    return model


def _end_tokens(theirs: GPT2LMHeadModel) -> list[int]:
    """The ends of `generate`."""
    generation: Any = theirs.generation_config
    ends = generation.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]
