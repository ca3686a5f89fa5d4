"""Benchmark workloads: prompts of token ids, each with a number of new tokens.

    uniform        64 prompts of 32 tokens, 128 new tokens each
    ragged         256 prompts, lengths log-normal (median 64, 4 to 640),
                   new tokens log-normal (median 64, 8 to 256)
    shared_prefix  128 prompts that begin with the same 384 tokens, then 16 to 48 of their own;
                   48 new tokens each

EOS tokens are ignored. Repeats use other token ids, so none finds the prefixes of another one in
the cache.

Imports no torch.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.types import Prompt, TokenizedPrompt

TEMPERATURE, TOP_K = 0.8, 40
SHARED_PREFIX_TOKENS = 384
# Distance of the token ids of two repeats.
TOKEN_IDS_PER_REPEAT = 1009


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt and how many tokens to generate."""

    token_ids: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Rows to generate."""

    name: str
    rows: tuple[Row, ...]

    @property
    def new_tokens(self) -> int:
        """New tokens of all rows."""
        return sum(row.new_tokens for row in self.rows)

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all rows."""
        return sum(len(row.token_ids) for row in self.rows)

    def first(self, count: int) -> Workload:
        """Return the first `count` rows as a workload of the same name."""
        return Workload(self.name, self.rows[:count])

    def prompts(
        self,
        repeat: int,
        *,
        vocab_size: int,
        max_new_tokens: int | None = None,
        top_k: int = TOP_K,
        read_s: float = 0.0,
    ) -> Iterator[TokenizedPrompt]:
        """Yield the rows for the engine.

        Args:
            repeat: Selects the token ids.
            vocab_size: Of the model.
            max_new_tokens: Upper limit per row; None is none.
            top_k: Sampling parameter of all rows; 0 keeps the full vocabulary.
            read_s: Monotonic clock when the rows were read.
        """
        for index, row in enumerate(self.rows):
            new_tokens = min(row.new_tokens, max_new_tokens or row.new_tokens)
            yield TokenizedPrompt(
                prompt=Prompt(
                    index=index,
                    prompt_id=str(index),
                    text="",
                    params=SamplingParams(
                        seed=index, temperature=TEMPERATURE, top_k=top_k, max_new_tokens=new_tokens
                    ),
                    metadata=None,
                ),
                token_ids=renumbered(row.token_ids, repeat, vocab_size),
                tokens_dropped=0,
                read_s=read_s,
            )

    def write(self, path: Path) -> None:
        """Write the rows as JSON lines, for the runners of other programs."""
        lines = (
            json.dumps({"prompt_token_ids": row.token_ids, "max_new_tokens": row.new_tokens}) + "\n"
            for row in self.rows
        )
        path.write_text("".join(lines), encoding="utf-8")


def renumbered(token_ids: tuple[int, ...], repeat: int, vocab_size: int) -> list[int]:
    """Map token ids to those of a repeat; equal ids stay equal."""
    return [(token + TOKEN_IDS_PER_REPEAT * repeat) % vocab_size for token in token_ids]


def make_workload(name: str, *, vocab_size: int, n_positions: int, seed: int = 0) -> Workload:
    """Return one of WORKLOADS; prompts are cut to fit the context with their new tokens."""
    rng = random.Random(f"{name}-{seed}")
    lengths = _LENGTHS[name](rng)
    n_shared = SHARED_PREFIX_TOKENS if name == "shared_prefix" else 0
    prefix = [rng.randrange(vocab_size) for _ in range(n_shared)]
    rows = []
    for prompt_tokens, new_tokens in lengths:
        own = [rng.randrange(vocab_size) for _ in range(prompt_tokens - n_shared)]
        kept = (prefix + own)[: max(1, n_positions - new_tokens)]
        rows.append(Row(tuple(kept), min(new_tokens, n_positions - 1)))
    return Workload(name, tuple(rows))


def uniform_workload(
    rows: int, prompt_tokens: int, new_tokens: int, *, vocab_size: int
) -> Workload:
    """Return a workload of equal lengths."""
    rng = random.Random(0)
    return Workload(
        "uniform",
        tuple(
            Row(tuple(rng.randrange(vocab_size) for _ in range(prompt_tokens)), new_tokens)
            for _ in range(rows)
        ),
    )


def _uniform(rng: random.Random) -> list[tuple[int, int]]:
    return [(32, 128)] * 64


def _ragged(rng: random.Random) -> list[tuple[int, int]]:
    def length(sigma: float, low: int, high: int) -> int:
        return max(low, min(high, round(64 * rng.lognormvariate(0, sigma))))

    return [(length(0.9, 4, 640), length(0.8, 8, 256)) for _ in range(256)]


def _shared_prefix(rng: random.Random) -> list[tuple[int, int]]:
    return [(SHARED_PREFIX_TOKENS + rng.randint(16, 48), 48) for _ in range(128)]


# (prompt tokens, new tokens) of each row
_LENGTHS: dict[str, Callable[[random.Random], list[tuple[int, int]]]] = {
    "uniform": _uniform,
    "ragged": _ragged,
    "shared_prefix": _shared_prefix,
}
WORKLOADS = tuple(_LENGTHS)
