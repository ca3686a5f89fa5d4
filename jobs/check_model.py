"""`gptbatch check-model`: compares model and tokenizer of a checkpoint with transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from gptbatch.jobs.arguments import ModelArgument
from gptbatch.jobs.messages import echo
from gptbatch.jobs.options import Command

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

    from gptbatch.pipeline.model.checkpoint import Checkpoint
    from gptbatch.pipeline.model.gpt import GPT

# largest logit difference in float32, relative to the largest logit if that is above 1
TOLERANCE = 1e-4
MAX_TOKENS = 64

PROMPTS = (
    "",
    "The",
    "Once upon a time there was a king who",
    "def fibonacci(n):\n    if n < 2:\n",
    "In 1969, the first people landed on the Moon. They had travelled for four days, and what they "
    "found there was",
)


@click.command("check-model", cls=Command)
@click.argument("model", type=ModelArgument())
@click.option(
    "--revision", help="Branch, tag or commit of a model on the hub. Default: its main branch."
)
@click.option(
    "--allow-pickle",
    is_flag=True,
    help="Read pytorch_model.bin where the checkpoint has no safetensors.",
)
@click.option(
    "--new-tokens",
    default=16,
    show_default=True,
    type=click.IntRange(1),
    help="Greedy tokens to compare per prompt.",
)
def check_model(model: str, revision: str | None, allow_pickle: bool, new_tokens: int) -> None:
    """Compare the checkpoint MODEL (a folder or a hub name) in gptbatch and in transformers.

    Runs in float32 on the CPU. Compares parameter counts, logits and greedy tokens of a few
    prompts, the tokenizers on difficult texts, and the EOS tokens. Prints the generation settings
    of the checkpoint that gptbatch ignores. The last line is a JSON object.

    Exits with 0 if both agree, else with 78. EOS tokens agree if gptbatch stops at all EOS tokens
    of transformers.
    """
    import torch

    from gptbatch.jobs.tokenizer_check import compare_tokenizers
    from gptbatch.pipeline.errors import ModelError
    from gptbatch.pipeline.model.checkpoint import find_checkpoint
    from gptbatch.pipeline.model.loading import threads_to_use

    torch.set_num_threads(threads_to_use(None))
    checkpoint = find_checkpoint(model, revision=revision, allow_pickle=allow_pickle)
    gpt, prompts = _load(checkpoint)
    hf_model = _load_with_transformers(checkpoint)

    count = gpt.parameter_count()
    hf_count = sum(
        parameter.numel() for _, parameter in hf_model.named_parameters(remove_duplicate=False)
    )
    echo(f"parameters, including the LM head: gptbatch {count:,}, transformers {hf_count:,}")
    networks = _compare_networks(gpt, hf_model, prompts, new_tokens)
    echo(
        f"largest logit difference: {networks.difference:.3g} "
        f"(largest logit {networks.largest:.3g})"
    )
    echo(f"greedy tokens equal: {networks.equal_tokens} of {networks.tokens}")
    compared = compare_tokenizers(checkpoint.folder)
    echo(
        f"tokenizer ({compared.way}): {compared.encodings} encodings, "
        f"{compared.texts} decoded texts, {compared.special_tokens} special tokens: "
        + (f"differ in {compared.difference}" if compared.difference else "equal")
    )
    ends, unfollowed = checkpoint.special_tokens.eos_token_ids, checkpoint.settings_not_followed
    hf_ends = _eos_token_ids(hf_model)
    missing_ends = {token for token in hf_ends if 0 <= token < gpt.config.vocab_size} - set(ends)
    echo(f"EOS tokens: gptbatch {list(ends)}, transformers {hf_ends}")
    echo(f"ignored generation settings: {json.dumps(unfollowed) if unfollowed else 'none'}")

    agree = count == hf_count and networks.agree and compared.agree and not missing_ends
    summary = {
        "model": model,
        "parameters": count,
        "parameters_transformers": hf_count,
        "largest_logit_difference": networks.difference,
        "greedy_tokens_equal": networks.equal_tokens,
        "greedy_tokens_compared": networks.tokens,
        "tokenizer_difference": compared.difference,
        "eos_token_ids": ends,
        "eos_token_ids_transformers": hf_ends,
        "settings_not_followed": unfollowed,
        "agree": agree,
    }
    echo(json.dumps(summary))
    if not agree:
        differing = "tokenizer" if not compared.agree else "EOS tokens" if missing_ends else "model"
        raise ModelError(f"{model}: the {differing} of gptbatch and transformers do not agree")


def _load(checkpoint: Checkpoint) -> tuple[GPT, list[list[int]]]:
    """Load the model in float32 on the CPU, and encode PROMPTS."""
    import torch

    from gptbatch.pipeline.input.tokenizer import PromptTokenizer
    from gptbatch.pipeline.input.tokenizer_loading import load_tokenizer
    from gptbatch.pipeline.model.config import parse_config
    from gptbatch.pipeline.model.weights import load_gpt

    config = parse_config(checkpoint.config, str(checkpoint.config_path))
    gpt = load_gpt(
        config,
        list(checkpoint.weights),
        dtype=torch.float32,
        device=torch.device("cpu"),
        packed=False,
    )
    tokenizer = PromptTokenizer(
        load_tokenizer(checkpoint.folder), start_token=checkpoint.special_tokens.start
    )
    prompts = [
        [token for token in prompt.token_ids if token < config.vocab_size]
        for prompt in tokenizer.encode(list(PROMPTS))
    ]
    return gpt, prompts


@dataclass(slots=True)
class _Networks:
    """Largest logit difference, largest logit, and counts of equal greedy tokens."""

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
    gpt: GPT, hf_model: GPT2LMHeadModel, prompts: list[list[int]], new_tokens: int
) -> _Networks:
    """Compare the loaded model, and a GPT with the weights of transformers, with transformers."""
    import torch

    from gptbatch.pipeline.model.from_transformers import copy_model
    from gptbatch.pipeline.model.gpt import GPT

    copied = GPT(gpt.config).eval()
    copy_model(copied, hf_model)
    found = _Networks()
    n_positions = gpt.config.n_positions
    with torch.inference_mode():
        for prompt in prompts:
            idx = torch.tensor([prompt[:MAX_TOKENS] or [0]])[:, :n_positions]
            for _ in range(new_tokens):
                logits = hf_model(idx).logits
                found.largest = max(found.largest, logits.abs().max().item())
                for network in (gpt, copied):
                    found.difference = max(
                        found.difference, (network(idx) - logits).abs().max().item()
                    )
                token = logits[0, -1].argmax()
                found.tokens += 1
                found.equal_tokens += int(gpt(idx)[0, -1].argmax() == token)
                if idx.shape[1] == n_positions:
                    break
                idx = torch.cat([idx, token.view(1, 1)], dim=1)
    return found


def _load_with_transformers(checkpoint: Checkpoint) -> GPT2LMHeadModel:
    """Load the checkpoint with transformers.

    Raises:
        ModelError: Tensors are missing, which transformers would initialize at random.
    """
    import torch
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging as transformers_logging

    from gptbatch.pipeline.errors import ModelError

    transformers_logging.disable_progress_bar()
    # silence the report of unused tensors
    transformers_logging.set_verbosity_error()
    loaded: Any = GPT2LMHeadModel.from_pretrained(
        checkpoint.folder, dtype=torch.float32, output_loading_info=True
    )
    model: GPT2LMHeadModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise ModelError(
            f"{checkpoint.name}: transformers does not find {len(missing)} tensors, such as "
            f"{missing[0]}, and initializes them at random: there is nothing to compare with; if "
            "tensor names have the prefix of a training program, save the model without it"
        )
    model.eval()
    return model


def _eos_token_ids(hf_model: GPT2LMHeadModel) -> list[int]:
    """Return the EOS tokens of `generate` of transformers."""
    generation: Any = hf_model.generation_config
    ends = generation.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]
