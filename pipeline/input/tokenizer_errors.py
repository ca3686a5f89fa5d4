"""Checks the files of a tokenizer, and describes errors with advice."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gptbatch.pipeline.errors import ModelError
from gptbatch.pipeline.model.checkpoint import CONFIG_FILE, reading
from gptbatch.pipeline.system.error_text import first_line

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
GPT2_FILES = ("vocab.json", "merges.txt")
# each of these is enough for a tokenizer class of transformers
SENTENCEPIECE_FILES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
VOCABULARY_FILES = ("vocab.json", "vocab.txt", *SENTENCEPIECE_FILES, "tiktoken.model")
# transformers reads these with every class
_FILES_OF_ANY_CLASS = (TOKENIZER_JSON, "tokenizer.model", "tiktoken.model")
# a class that reads the file, for messages
_CLASS_OF_FILE = {
    "vocab.txt": "BertTokenizer",
    "vocab.json": "GPT2Tokenizer",
    "spiece.model": "T5Tokenizer",
    "sentencepiece.bpe.model": "XLMRobertaTokenizer",
}
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_MAKE_TOKENIZER_JSON = (
    "where it loads elsewhere, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) "
    "writes a tokenizer.json"
)


def reject_byte_order_marks(folder: Path) -> None:
    """Raise ModelError if a file begins with a byte order mark.

    Several readers fail on one. In vocab.txt it would become part of the first token.
    """
    names = (TOKENIZER_JSON,) if (folder / TOKENIZER_JSON).is_file() else (*GPT2_FILES, "vocab.txt")
    if marked := _with_byte_order_mark(folder, names):
        raise ModelError(
            f"{folder / marked}: begins with a byte order mark (BOM); save it as UTF-8 without one"
        )


def _with_byte_order_mark(folder: Path, names: Iterable[str]) -> str | None:
    """Return the first of these files that begins with a byte order mark."""
    for name in names:
        if (folder / name).is_file():
            with reading(folder / name), (folder / name).open("rb") as file:
                if file.read(3).startswith(_BYTE_ORDER_MARKS):
                    return name
    return None


def describe_misnamed(folder: Path) -> str:
    """Name tokenizer files with a wrong name or folder, for a message; "" without any."""
    known = (TOKENIZER_JSON, *GPT2_FILES, "vocab.txt")
    found = {
        path.name: name
        for path in sorted(folder.iterdir())
        for name in known
        if re.fullmatch(rf".+[-_.]{re.escape(name)}", path.name)
    }
    if found:
        return f"; {' and '.join(found)} must be called {' and '.join(found.values())}"
    inside = [
        path for name in (*known, *VOCABULARY_FILES) for path in sorted(folder.glob(f"*/{name}"))
    ]
    return f"; {inside[0].relative_to(folder)} must stand in the folder itself" if inside else ""


def reject_empty(where: Path, backend: Tokenizer) -> None:
    """Raise ModelError if the vocabulary has no tokens other than special ones."""
    special = sum(token.special for token in backend.get_added_tokens_decoder().values())
    if backend.get_vocab_size() <= special:
        raise ModelError(
            f"{where}: its vocabulary holds no tokens but special ones ({special}); fetch it again"
        )


def reject_random(where: Path, backend: Tokenizer) -> None:
    """Raise ModelError if the tokenizer encodes at random, as for BPE dropout in training."""
    model = backend.model
    for key in ("dropout", "alpha"):
        if value := getattr(model, key, None):
            raise ModelError(
                f"{where}: {key} is {value}, which makes the tokens of a prompt random; "
                "set it to null, as it is only for training"
            )


def reason_and_advice(folder: Path, tokenizer_class: Any, error: Exception) -> tuple[str, str]:
    """Return the reason why transformers cannot build a tokenizer, and advice."""
    there = {
        name
        for name in (TOKENIZER_JSON, "merges.txt", *VOCABULARY_FILES)
        if (folder / name).is_file()
    }
    if marked := _with_byte_order_mark(
        folder, (CONFIG_FILE, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS)
    ):
        return f"{marked} begins with a byte order mark (BOM)", "save it as UTF-8 without one"
    if (
        there.intersection(SENTENCEPIECE_FILES)
        and TOKENIZER_JSON not in there
        and find_spec("sentencepiece") is None
    ):
        reason = (
            "its vocabulary is a SentencePiece model, for which sentencepiece and protobuf must be "
            "installed"
        )
        return reason, _MAKE_TOKENIZER_JSON
    if TOKENIZER_JSON in there and tokenizer_class not in PLAIN_CLASSES:
        what = f"{TOKENIZER_JSON} may be none of {tokenizer_class}: {first_line(error)}"
        return (
            what,
            f'"tokenizer_class": "PreTrainedTokenizerFast" in {TOKENIZER_CONFIG} takes it as it is',
        )
    lone = [name for name in GPT2_FILES if name in there]
    if len(lone) == 1 and TOKENIZER_JSON not in there:
        (other,) = set(GPT2_FILES) - set(lone)
        return f"{lone[0]} without {other}", f"fetch {other}, too{describe_misnamed(folder)}"
    if "vocab.txt" in there and not lone:
        return first_line(error), _class_advice("vocab.txt")
    return first_line(error), _MAKE_TOKENIZER_JSON


def reject_placeholder(folder: Path, made: Any, backend: Tokenizer) -> None:
    """Raise ModelError if transformers found no vocabulary for the class.

    It then builds a tokenizer of a few placeholder tokens without an error.
    """
    names = [name for name in type(made).vocab_files_names.values() if name != TOKENIZER_JSON]
    if any((folder / name).is_file() for name in (*names, *_FILES_OF_ANY_CLASS)):
        return
    there = next(name for name in VOCABULARY_FILES if (folder / name).is_file())
    raise ModelError(
        f"{folder}: its tokenizer {type(made).__name__} reads {' and '.join(names)}, not {there}, "
        f"and would have a made-up vocabulary of size {backend.get_vocab_size()}; "
        f"{_class_advice(there)}"
    )


def _class_advice(file: str) -> str:
    """Return advice: how to name the class that reads a file."""
    example = json.dumps({"tokenizer_class": _CLASS_OF_FILE[file]})
    such = "for a vocabulary of BERT, as GPT2-Chinese has," if file == "vocab.txt" else "such as"
    return f"name the class that reads {file} in {TOKENIZER_CONFIG}, {such} {example}"
