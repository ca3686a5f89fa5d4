"""Shared fixtures: tiny models with every parameter randomised, a tiny tokenizer, and the command run for real."""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from gptbatch.jobs.train_demo import END_OF_TEXT, train_tokenizer
from gptbatch.pipeline.kernels.build import KernelError, load_kernels
from gptbatch.pipeline.kv_cache.interface import Backend
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.weights import copy_model
from gptbatch.pipeline.types import Prompt, SamplingParams, TokenizedPrompt
from tests.launcher import Launcher
from tests.paths import PYTHONPATH

SENTENCES = [
    "The king is dead.",
    "Long live the king, and the queen.",
    "To be, or not to be: that is the question.",
]


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def random_model(seed: int = 0, **shape: Any) -> GPT2LMHeadModel:
    """A transformers GPT-2 whose every parameter is random: in a freshly made one most biases and norms are 0 or 1.

    Token 0 is end-of-text.
    """
    settings = {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "vocab_size": 300,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    generator = torch.Generator().manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**{**settings, **shape}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.85 * model.config.n_embd**-0.5 if parameter.dim() > 1 else 0.3
            centre = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    model.eval()
    return model


def our_model(
    theirs: GPT2LMHeadModel,
    *,
    pack: bool = True,
    attention: Backend = "padded",
    dtype: torch.dtype = torch.float32,
) -> GPT:
    """The same weights in our network, ready to run."""
    if attention == "ragged" and not has_kernels():
        pytest.skip("no C++ compiler")
    gpt = (
        GPT(parse_config(theirs.config.to_dict(), "config"), attention=attention)
        .eval()
        .requires_grad_(False)
    )
    copy_model(gpt, theirs)
    gpt = gpt.to(dtype)
    if pack:
        gpt.pack()
    return gpt


@functools.cache
def has_kernels() -> bool:
    try:
        load_kernels()
    except KernelError:
        return False
    return True


def tokenized(
    index: int,
    token_ids: list[int],
    *,
    seed: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int = 16,
) -> TokenizedPrompt:
    """A prompt as the engine takes it; the seed is the index unless one is given."""
    params = SamplingParams(
        seed=index if seed is None else seed,
        temperature=temperature,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
    )
    prompt = Prompt(index=index, prompt_id=str(index), text="", params=params, metadata=None)
    return TokenizedPrompt(prompt=prompt, token_ids=token_ids, tokens_dropped=0, read_s=0.0)


def save_tokenizer(folder: Path, vocab_size: int = 300) -> None:
    """A byte-level BPE with end-of-text as token 0, in the Hugging Face format."""
    tokenizer = train_tokenizer(SENTENCES * 20, vocab_size)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    ).save_pretrained(folder)


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """A command that runs in this process sets levels, which are restored."""
    loggers = [
        logging.getLogger(name) for name in ("gptbatch", "gptbatch.kernels", "gptbatch.loading")
    ]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random checkpoint with its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    random_model().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Starts the command in child processes, quickly."""
    with Launcher() as started:
        yield started


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (objects, or lines as text) as a JSONL file."""

    def write(rows: Iterable[dict[str, Any] | str], name: str = "prompts.jsonl") -> Path:
        path = tmp_path / name
        lines = (
            row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows
        )
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


@dataclass
class Ran:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of the last line on standard output."""
        summary: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return summary


def run_gptbatch(
    *arguments: str | Path,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    stdin: bytes | None = None,
) -> Ran:
    """`gptbatch ARGUMENTS...` in a child process, offline."""
    done = subprocess.run(
        [sys.executable, "-m", "gptbatch", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": PYTHONPATH, **(env or {})},
        input=stdin,
        capture_output=True,
        timeout=240,
    )
    return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())
