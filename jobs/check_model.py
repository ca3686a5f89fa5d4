"""`gptbatch check-model`: the tutorial's sanity check, for any checkpoint: do network and tokenizer agree with transformers?"""

from __future__ import annotations

import json

import click

from jobs.messages import echo
from jobs.options import Command, ModelArgument

TOLERANCE = 1e-4  # largest logit difference in float32, relative to the largest logit where that is above 1
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
@click.option("--allow-pickle", is_flag=True, help="Accept pytorch_model.bin where there are no safetensors.")
@click.option("--new-tokens", default=16, show_default=True, type=click.IntRange(1), help="Greedy tokens to compare per prompt.")
def check_model(model: str, revision: str | None, allow_pickle: bool, new_tokens: int) -> None:
    """Compare our network and tokenizer with transformers on the checkpoint MODEL (a folder or a hub name), in float32 on CPU.

    Prints the parameter counts of both, the largest logit difference, whether both choose the same greedy tokens over a few
    prompts, and whether tokens, special tokens and decoded texts are the same over hard texts; its last line is a JSON object.
    Exits with 0 when they agree, else with 78.
    """
    import torch
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging as transformers_logging

    from jobs.tokenizer_check import compare_tokenizers
    from pipeline.data.checkpoint import find_checkpoint
    from pipeline.data.tokenizer import PromptTokenizer
    from pipeline.data.tokenizer_files import load_tokenizer
    from pipeline.errors import ModelError
    from pipeline.gpt.config import parse_config
    from pipeline.gpt.model import GPT
    from pipeline.gpt.weights import copy_model, load_gpt
    from pipeline.network import threads_to_use

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads_to_use(None))
    checkpoint = find_checkpoint(model, revision=revision, allow_pickle=allow_pickle)
    config = parse_config(checkpoint.config, str(checkpoint.config_path))
    ours = load_gpt(config, list(checkpoint.weights), dtype=torch.float32, device=torch.device("cpu"), pack=False)
    theirs = GPT2LMHeadModel.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    copied = GPT(ours.config).eval()
    copy_model(copied, theirs)
    tokenizer = PromptTokenizer(load_tokenizer(checkpoint.folder), start_token=checkpoint.special_tokens.start)

    our_count = ours.parameter_count()
    their_count = sum(parameter.numel() for _, parameter in theirs.named_parameters(remove_duplicate=False))
    echo(f"parameters, the head counted as its own: ours {our_count:,}, transformers {their_count:,}")

    difference = largest = 0.0
    equal_tokens = compared_tokens = 0
    with torch.inference_mode():
        for prompt in tokenizer.encode(list(PROMPTS)):
            idx = torch.tensor([[token for token in prompt.token_ids if token < config.vocab_size][:MAX_TOKENS] or [0]])
            idx = idx[:, : config.n_positions]
            for _ in range(new_tokens):
                logits = theirs(idx).logits
                largest = max(largest, logits.abs().max().item())
                for network in (ours, copied):
                    difference = max(difference, (network(idx) - logits).abs().max().item())
                token = logits[0, -1].argmax()
                compared_tokens += 1
                equal_tokens += int(ours(idx)[0, -1].argmax() == token)
                if idx.shape[1] == config.n_positions:
                    break
                idx = torch.cat([idx, token.view(1, 1)], dim=1)
    echo(f"largest logit difference: {difference:.3g} (largest logit {largest:.3g})")
    echo(f"greedy tokens equal: {equal_tokens} of {compared_tokens}")
    compared = compare_tokenizers(checkpoint.folder)
    echo(
        f"tokenizer ({compared.way}): {compared.encodings} encodings, {compared.texts} decoded texts, "
        f"{compared.special_tokens} special tokens: " + (f"differ in {compared.difference}" if compared.difference else "equal")
    )

    agree = our_count == their_count and difference <= TOLERANCE * max(1.0, largest) and equal_tokens == compared_tokens and compared.agree
    summary = {
        "model": model,
        "parameters": our_count,
        "parameters_transformers": their_count,
        "largest_logit_difference": difference,
        "greedy_tokens_equal": equal_tokens,
        "greedy_tokens_compared": compared_tokens,
        "tokenizer_difference": compared.difference,
        "agree": agree,
    }
    echo(json.dumps(summary))
    if not agree:
        raise ModelError(f"{model}: our {'network' if compared.agree else 'tokenizer'} and transformers do not agree")
