"""`gptbatch train-demo`: trains the small GPT-2 of the demo on a text file.

It trains GPT2LMHeadModel of transformers, so that the demo checkpoint does not depend on the model
code of gptbatch.
"""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gptbatch.jobs.options import Command
from gptbatch.pipeline.errors import InputRowsError

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import GPT2LMHeadModel

END_OF_TEXT = "<|endoftext|>"


@click.command("train-demo", cls=Command)
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--steps", default=3600, show_default=True, type=click.IntRange(1), help="Optimizer steps."
)
@click.option(
    "--batch-size",
    default=16,
    show_default=True,
    type=click.IntRange(1),
    help="Sequences per step.",
)
@click.option(
    "--vocab-size",
    default=1024,
    show_default=True,
    type=click.IntRange(257, 2048),
    help="Vocabulary size of the BPE tokenizer.",
)
@click.option(
    "--n-positions",
    default=256,
    show_default=True,
    type=click.IntRange(1),
    help="Context length in tokens.",
)
@click.option(
    "--n-layer",
    default=5,
    show_default=True,
    type=click.IntRange(1),
    help="Number of transformer blocks.",
)
@click.option(
    "--n-head",
    default=6,
    show_default=True,
    type=click.IntRange(1),
    help="Attention heads per block.",
)
@click.option(
    "--n-embd",
    default=192,
    show_default=True,
    type=click.IntRange(1),
    help="Width of the hidden state, a multiple of --n-head.",
)
@click.option(
    "--dropout",
    default=0.1,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="Dropout of embeddings and residuals.",
)
@click.option(
    "--learning-rate",
    default=2e-3,
    show_default=True,
    help="Peak learning rate, after the warm-up.",
)
@click.option(
    "--weight-decay", default=0.1, show_default=True, help="Weight decay of AdamW, for matrices."
)
@click.option(
    "--validation-share",
    default=0.1,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the text, at its end, that is used for validation.",
)
@click.option(
    "--seed", default=0, show_default=True, help="Seed of initial weights, batches and dropout."
)
@click.option("--threads", default=2, show_default=True, help="CPU threads.")
def train_demo(
    text: Path,
    output: Path,
    steps: int,
    batch_size: int,
    vocab_size: int,
    n_positions: int,
    n_layer: int,
    n_head: int,
    n_embd: int,
    dropout: float,
    learning_rate: float,
    weight_decay: float,
    validation_share: float,
    seed: int,
    threads: int,
) -> None:
    """Train a small GPT-2 on the file TEXT and write it to the folder OUTPUT.

    Prints the validation loss in nats per character. The last line is a JSON object.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    if n_embd % n_head:
        raise click.UsageError(f"--n-embd {n_embd} is not a multiple of --n-head {n_head}")
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputRowsError(f"{text}: not UTF-8 at byte {error.start + 1}") from error
    cut = int(len(content) * (1 - validation_share))
    training_documents = split_documents(content[:cut], random.Random(seed))
    validation_documents = split_documents(content[cut:], random.Random(seed + 1))
    tokenizer = train_tokenizer(training_documents, vocab_size)
    training_tokens = encode_documents(tokenizer, training_documents)
    validation_tokens = encode_documents(tokenizer, validation_documents)
    if len(training_tokens) <= n_positions or len(content) == cut:
        raise InputRowsError(
            f"{text}: too short: {len(training_tokens)} training tokens; more than n_positions "
            f"({n_positions}) are required"
        )
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=n_positions,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        # dropout in attention takes a third of the speed on a CPU and hardly lowers the loss
        attn_pdrop=0.0,
        # the formula of gelu_new in one kernel
        activation_function="gelu_pytorch_tanh",
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    model = GPT2LMHeadModel(config)
    parameters = sum(p.numel() for p in model.parameters())
    click.echo(
        f"{parameters:,} parameters, {len(training_tokens):,} training tokens, "
        f"{len(content[cut:]):,} validation characters"
    )

    decayed = [p for p in model.parameters() if p.dim() >= 2]
    other = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": other, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    warmup = min(200, steps // 10)

    def schedule(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    offsets = torch.arange(n_positions)
    began = time.perf_counter()
    for step in range(steps):
        model.train()
        starts = torch.randint(0, len(training_tokens) - n_positions, (batch_size, 1))
        idx = training_tokens[starts + offsets]  # (batch_size, n_positions)
        targets = training_tokens[starts + offsets + 1]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(idx, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            nats = validation_nats(model, validation_tokens) / len(content[cut:])
            click.echo(
                f"step {step + 1}: training loss {loss.item():.3f} per token, "
                f"validation {nats:.4f} nats per character, {time.perf_counter() - began:.0f} s"
            )
    nats = validation_nats(model, validation_tokens) / len(content[cut:])
    save(model, tokenizer, output)
    summary = {
        "validation_nats_per_character": round(nats, 4),
        "parameters": parameters,
        "steps": steps,
        "seconds": round(time.perf_counter() - began),
        "output": str(output),
    }
    click.echo(json.dumps(summary))


def split_documents(content: str, rng: random.Random) -> list[str]:
    """Group 4 to 16 paragraphs (speeches) per document, so that the model learns the EOS token."""
    paragraphs = content.split("\n\n")
    documents = []
    while paragraphs:
        count = rng.randint(4, 16)
        documents.append("\n\n".join(paragraphs[:count]) + "\n")
        paragraphs = paragraphs[count:]
    return documents


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """Join all documents to one tensor of tokens (N,), with the EOS token around each."""
    import torch

    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    tokens = [end_of_text]
    for encoding in tokenizer.encode_batch(documents):
        tokens += [*encoding.ids, end_of_text]
    return torch.tensor(tokens)


def validation_nats(model: GPT2LMHeadModel, tokens: torch.Tensor) -> float:
    """Return the sum of -log p over all tokens but the first, in independent blocks."""
    import torch

    model.eval()
    total = 0.0
    n_positions = model.config.n_positions
    with torch.inference_mode():
        for start in range(0, len(tokens) - 1, n_positions):
            block = tokens[start : start + n_positions + 1]
            logits = model(block[None, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, block[1:], reduction="sum").item()
    return total


def save(model: GPT2LMHeadModel, tokenizer: Tokenizer, output: Path) -> None:
    """Save model and tokenizer in the Hugging Face format."""
    from transformers import PreTrainedTokenizerFast

    # the name in GPT-2 checkpoints
    model.config.activation_function = "gelu_new"
    model.save_pretrained(output)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=model.config.n_positions,
    ).save_pretrained(output)
