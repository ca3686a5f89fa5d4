"""The work that is measured: prompts of token ids, each with the number of tokens to generate; end-of-text is ignored.

    uniform        64 prompts of 32 tokens, 128 new tokens each
    ragged         256 prompts, lengths log-normal (median 64, 4 to 640), new tokens log-normal (median 64, 8 to 256)
    shared_prefix  128 prompts that begin with the same 384 tokens, then 16 to 48 of their own; 48 new tokens each

Every repeat is the same work with other token ids, so that none finds a prefix that an earlier one left in a cache.
Imports no torch.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gptbatch.pipeline.types import Prompt, SamplingParams, TokenizedPrompt

TEMPERATURE, TOP_K = 0.8, 40


@dataclass(frozen=True, slots=True)
class Row:
    token_ids: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    rows: tuple[Row, ...]

    @property
    def new_tokens(self) -> int:
        return sum(row.new_tokens for row in self.rows)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)

    def prompts(
        self,
        repeat: int,
        *,
        vocab_size: int,
        most_new_tokens: int | None = None,
        top_k: int = TOP_K,
        read_s: float = 0.0,
    ) -> Iterator[TokenizedPrompt]:
        """The rows as the engine takes them; each repeat has its own token ids."""
        for index, row in enumerate(self.rows):
            new_tokens = min(row.new_tokens, most_new_tokens or row.new_tokens)
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
        """As JSON lines, for the runners of other programs."""
        lines = (
            json.dumps({"prompt_token_ids": row.token_ids, "max_new_tokens": row.new_tokens}) + "\n"
            for row in self.rows
        )
        path.write_text("".join(lines), encoding="utf-8")


def renumbered(token_ids: tuple[int, ...], repeat: int, vocab_size: int) -> list[int]:
    """Other token ids for each repeat, equal ones for equal ones."""
    return [(token + 1009 * repeat) % vocab_size for token in token_ids]


def _uniform(rng: random.Random) -> list[tuple[int, int]]:
    return [(32, 128)] * 64


def _ragged(rng: random.Random) -> list[tuple[int, int]]:
    def length(sigma: float, least: int, most: int) -> int:
        return max(least, min(most, round(64 * rng.lognormvariate(0, sigma))))

    return [(length(0.9, 4, 640), length(0.8, 8, 256)) for _ in range(256)]


def _shared_prefix(rng: random.Random) -> list[tuple[int, int]]:
    return [(384 + rng.randint(16, 48), 48) for _ in range(128)]


_LENGTHS: dict[str, Callable[[random.Random], list[tuple[int, int]]]] = {
    "uniform": _uniform,
    "ragged": _ragged,
    "shared_prefix": _shared_prefix,
}
WORKLOADS = tuple(_LENGTHS)


def make_workload(name: str, *, vocab_size: int, n_positions: int, seed: int = 0) -> Workload:
    """One of WORKLOADS for a network of that vocabulary and context, to which long rows are cut."""
    rng = random.Random(f"{name}-{seed}")
    return _make(
        name,
        rng,
        _LENGTHS[name](rng),
        384 if name == "shared_prefix" else 0,
        vocab_size=vocab_size,
        n_positions=n_positions,
    )


def uniform_workload(
    rows: int, prompt_tokens: int, new_tokens: int, *, vocab_size: int
) -> Workload:
    """As `uniform`, of other sizes."""
    lengths = [(prompt_tokens, new_tokens)] * rows
    return _make(
        "uniform",
        random.Random(0),
        lengths,
        0,
        vocab_size=vocab_size,
        n_positions=prompt_tokens + new_tokens,
    )


def _make(
    name: str,
    rng: random.Random,
    lengths: list[tuple[int, int]],
    shared: int,
    *,
    vocab_size: int,
    n_positions: int,
) -> Workload:
    """Rows of these numbers of prompt and new tokens, of which the first `shared` tokens are the same."""
    prefix = [rng.randrange(vocab_size) for _ in range(shared)]
    rows = []
    for prompt_tokens, new_tokens in lengths:
        token_ids = prefix + [rng.randrange(vocab_size) for _ in range(prompt_tokens - len(prefix))]
        kept = token_ids[: max(1, n_positions - new_tokens)]
        rows.append(Row(tuple(kept), min(new_tokens, n_positions - 1)))
    return Workload(name, tuple(rows))
