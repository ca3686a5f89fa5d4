"""Shared fixtures: tiny models with random parameters, a tiny tokenizer, and the command."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
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
from gptbatch.pipeline.kernels.build import load_kernels
from gptbatch.pipeline.kernels.compiler import KernelError
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.kv_cache.spec import BACKENDS, BackendName
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.from_transformers import copy_model
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.packing import pack
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.types import Prompt, TokenizedPrompt
from tests.launcher import Launcher
from tests.processes import LIMIT_S, child_environment

SENTENCES = [
    "The king is dead.",
    "Long live the king, and the queen.",
    "To be, or not to be: that is the question.",
]


# Cases that only `make test-all` runs. Another case, which is faster, shows the same promise.
SLOW_CASES = (
    # odd shapes cover padded attention in bfloat16
    "test_invariance.py::.*padded-bfloat16",
    # the engine's tests cover padded windows that slide
    r"test_windows_that_slide\[padded-float32",
    # a padded cache that grows covers its full windows
    r"test_windows_that_fill\[padded",
    # three layers of another shape cover the tokens, test_model.py covers the logits
    "test_greedy_tokens_are_those_of_transformers_on_the_gpt2_shape",
    r"test_gpt2_batch_sizes_orders_and_fillers\[padded",
    r"test_a_needle_among_fillers\[padded-float32-(60|200)",
    # its windows that slide do the same, and more
    r"test_a_padded_cache_may_grow_while_rows_run\[stop",
    # examples of other pages than the first two that a user reads
    r"test_the_examples_run\[(?!README|docs/getting-started)",
    # the curves of bench scaling run the command, too
    "test_bench_prints_what_belongs_together",
    "test_loading_holds_no_second_copy",
    # one fault and two kills stand for the others
    r"test_a_job_is_complete_in_spite_of_faults\[(?!lose reply)",
    r"test_a_fault_does_not_keep_an_object_from_being_written\[.*-3",
    r"test_a_kill_between_two_steps_loses_nothing\[(?!after a part is stored|before the last)",
    "test_the_demo_has_the_same_digests_in_a_bucket",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Skip tests marked cuda on machines without a CUDA device; mark the dearest as slow."""
    for item in items:
        if any(re.search(case, item.nodeid) for case in SLOW_CASES):
            item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda") is not None:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def random_model(seed: int = 0, **shape: Any) -> GPT2LMHeadModel:
    """Return a transformers GPT-2 with random values in every parameter.

    transformers initialises biases and norms with 0 and 1, which hide errors. Token 0 is
    end-of-text.

    Args:
        seed: Of the random values.
        shape: Settings of GPT2Config that replace those of the tiny model.
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
    packed: bool = True,
    attention: BackendName = "padded",
    dtype: torch.dtype = torch.float32,
    cache_dtype: CacheDtype = "auto",
) -> GPT:
    """Return a packed GPT with these weights; skip the test without the C++ kernels."""
    if attention == "ragged" and not has_kernels():
        pytest.skip("no C++ compiler")
    config = parse_config(theirs.config.to_dict(), "config")
    gpt = GPT(config, backend=BACKENDS[attention], cache_dtype=cache_dtype)
    gpt.eval().requires_grad_(False)
    copy_model(gpt, theirs)
    gpt = gpt.to(dtype)
    if packed:
        pack(gpt)
    return gpt


@functools.cache
def has_kernels() -> bool:
    """Return whether the C++ kernels can be built and loaded here."""
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
    **settings: Any,
) -> TokenizedPrompt:
    """Return a prompt for the engine. The seed defaults to the index."""
    params = SamplingParams(
        seed=index if seed is None else seed,
        temperature=temperature,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        **settings,
    )
    prompt = Prompt(index=index, prompt_id=str(index), text="", params=params, metadata=None)
    return TokenizedPrompt(prompt=prompt, token_ids=token_ids, tokens_dropped=0, read_s=0.0)


def save_tokenizer(folder: Path, vocab_size: int = 300) -> None:
    """Write a byte-level BPE in the Hugging Face format; token 0 is end-of-text."""
    tokenizer = train_tokenizer(SENTENCES * 20, vocab_size)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    ).save_pretrained(folder)


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """Restore what a command in this process sets: the levels of loggers and torch's threads.

    Tests start with one thread, because several test processes share the cores.
    """
    loggers = [
        logging.getLogger(name) for name in ("gptbatch", "gptbatch.kernels", "gptbatch.loading")
    ]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random checkpoint with its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    random_model().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


_open = contextlib.ExitStack()


@functools.cache
def shared_launcher() -> Launcher:
    """Return the launcher of this test process, started on first use."""
    return _open.enter_context(Launcher())


def pytest_sessionfinish() -> None:
    """Stop the launcher."""
    _open.close()


@pytest.fixture(scope="session")
def launcher() -> Launcher:
    """Return the launcher, which starts the command in child processes."""
    return shared_launcher()


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes rows (objects, or lines as text) to a JSONL file."""

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
    """The exit code and the output of a command that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object on the last line of standard output."""
        summary: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return summary


def run_gptbatch(
    *arguments: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None
) -> Ran:
    """Run `gptbatch ARGUMENTS...` in a child of the fork server.

    `env` has no effect on libraries that read the environment on import.
    """
    code, child = shared_launcher().run(*arguments, cwd=cwd, env=env)
    return Ran(code, child.stdout, child.stderr)


def run_fresh(
    *arguments: str | Path,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    stdin: bytes | None = None,
) -> Ran:
    """Run `python -m gptbatch ARGUMENTS...` in a fresh interpreter, which starts slowly."""
    done = subprocess.run(
        [sys.executable, "-m", "gptbatch", *map(str, arguments)],
        cwd=cwd,
        env=child_environment(**(env or {})),
        input=stdin,
        capture_output=True,
        timeout=LIMIT_S,
    )
    return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())
