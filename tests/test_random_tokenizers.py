"""Random tokenizer files: ids and texts match transformers, or the tokenizer is rejected.

To run all 200: `pytest tests/test_random_tokenizers.py -m slow`.
To count outcomes: `python -m tests.test_random_tokenizers 1000`.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from gptbatch.pipeline.errors import ModelError
from gptbatch.pipeline.input.tokenizer import PromptTokenizer
from gptbatch.pipeline.input.tokenizer_loading import load_tokenizer
from gptbatch.pipeline.system.rust_panics import panics_as_errors
from tests.random_tokenizers import TEXTS, write_random_tokenizer

FEW, ALL = 40, 200
# in messages about tokenizers that transformers makes
REFUSALS = (
    "auto_map",
    "written in Python",
    "in Python before",
    "a made-up vocabulary",
    "no tokens but special ones",
)


def compare(folder: Path, seed: int) -> str:
    """Return how the tokenizer was loaded, or its error. Fails if transformers differs."""
    write_random_tokenizer(folder, seed)
    theirs: Any = None
    failure = ""
    try:
        with panics_as_errors():
            theirs = auto_tokenizer(folder)
    except Exception as error:  # noqa: BLE001 - whatever the files make of it
        failure = f"{type(error).__name__}: {error}"
    try:
        loaded = load_tokenizer(folder)
    except ModelError as error:
        message = str(error).replace(str(folder), "FOLDER")
        if theirs is None:
            return "refused: transformers fails, too"
        return f"refused: {next(key for key in REFUSALS if key in message)}"
    assert theirs is not None, (
        f"seed {seed}: loaded by {loaded.loaded_by}, but transformers fails: {failure}"
    )
    for parse_special in (False, True):
        for add_special_tokens in (True, False):
            ours = PromptTokenizer(
                loaded,
                start_token=None,
                parse_special=parse_special,
                add_special_tokens=add_special_tokens,
            )
            for text, encoded in zip(TEXTS, ours.encode(list(TEXTS)), strict=True):
                expected = encode(
                    theirs,
                    text,
                    add_special_tokens=add_special_tokens,
                    split_special_tokens=not parse_special,
                )
                where = (
                    f"seed {seed}, {loaded.loaded_by}, {text!r}, {parse_special=}, "
                    f"{add_special_tokens=}"
                )
                if expected is None:
                    assert encoded.problem, where
                    continue
                assert encoded.token_ids == expected, where
                assert ours.decode(expected) == theirs.decode(expected), where
    rng = Random(seed)
    beyond = loaded.backend.get_vocab_size() + 5
    for prompt in filter(None, (encoded.token_ids for encoded in ours.encode(list(TEXTS)))):
        new = [rng.randrange(beyond) for _ in range(20)]
        before, whole = theirs.decode(prompt), theirs.decode(prompt + new)
        assert ours.decode(prompt + new) == whole, f"seed {seed}, {prompt + new}"
        if whole.startswith(before):
            assert before + ours.added_text(prompt, new) == whole, f"seed {seed}, {prompt}, {new}"
        # A byte-level tokenizer joins the bytes of its tokens.
        text = ours.completion_text(prompt, new, "max_new_tokens", None)
        assert text == ours.added_text(prompt, new), f"seed {seed}, {prompt}, {new}"
    return loaded.loaded_by


def auto_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


def encode(tokenizer: Any, text: str, **options: bool) -> list[int] | None:
    try:
        with panics_as_errors():
            token_ids: list[int] = tokenizer(text, **options)["input_ids"]
    except Exception:  # noqa: BLE001 - the library raises plain Exception
        return None
    return token_ids


@pytest.mark.parametrize(
    "seed",
    [pytest.param(seed, marks=[] if seed < FEW else pytest.mark.slow) for seed in range(ALL)],
)
def test_random_tokenizers_match_transformers(tmp_path: Path, seed: int) -> None:
    compare(tmp_path, seed)


def main(count: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(count):
        with tempfile.TemporaryDirectory() as folder:
            try:
                counts[compare(Path(folder), seed)] += 1
            except AssertionError as error:
                counts["DIFFERS"] += 1
                sys.stdout.write(f"{error}\n")
    sys.stdout.write("".join(f"{number:6} {way}\n" for way, number in counts.most_common()))


if __name__ == "__main__":
    main(int(sys.argv[1]))
