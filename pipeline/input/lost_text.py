"""Finds the characters of a text that no token represents.

A normalizer or a pre-tokenizer may remove characters. A BPE without an unknown token drops
characters outside of its vocabulary. The library reports neither. Both are visible in the offsets
of tokens: no token covers a lost character.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from typing import Any, Literal

from tokenizers import Encoding, Regex, Tokenizer, models, pre_tokenizers

from gptbatch.pipeline.system.rust_panics import panics_as_errors

_KEEPING_NORMALIZERS = frozenset(
    {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "ByteLevel"}
)
_KEEPING_PRE_TOKENIZERS = frozenset(
    {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "FixedLength"}
)
_COMPATIBILITY = frozenset({"NFKC", "NFKD", "Precompiled"})


class LostText:
    """Counts the lost characters of texts for one tokenizer.

    Whitespace that a normalizer or a pre-tokenizer removes separates words and is not counted.

    Args:
        backend: The tokenizer. Its post-processor is replaced by one that keeps whitespace in the
            offsets of tokens.
    """

    def __init__(self, backend: Tokenizer) -> None:
        backend.post_processor = _untrimmed(backend.post_processor)
        self._backend = backend
        anything = models.WordLevel(vocab={"?": 0}, unk_token="?")
        self._characters = (
            None if _stages_keep_all(backend) else _character_tokenizer(backend, anything)
        )
        kinds = {part["type"] for part in _parts(backend.normalizer)}
        self._forms: tuple[Literal["NFC", "NFKC"], ...] = (
            ("NFC", "NFKC") if kinds & _COMPATIBILITY else ("NFC",)
        )

    @cached_property
    def _known_characters(self) -> Tokenizer | None:
        return _known_characters(self._backend)

    def count(self, text: str, encoding: Encoding) -> int:
        """Return the number of lost characters of a text. encoding: of the backend for the text."""
        lost = self._count(text, encoding)
        if lost:
            # A normalizer may compose a letter and its accent into one character. The text in its
            # composed form shows whether that is the only difference.
            for form in self._forms:
                composed = unicodedata.normalize(form, text)
                # the library may fail on any text
                with suppress(Exception), panics_as_errors():
                    lost = min(lost, self._count(composed, self._backend.encode(composed)))
        return lost

    def _count(self, text: str, encoding: Encoding) -> int:
        lost = _uncovered(text, encoding)
        if lost and self._known_characters is not None:
            lost = _uncovered(text, self._known_characters.encode(text))
        if self._characters is not None:
            removed = _uncovered(text, self._characters.encode(text))
            lost = (lost | removed) - {index for index in removed if text[index].isspace()}
        return len(lost)


def may_lose_text(backend: Tokenizer) -> bool:
    """Return whether any text can lose characters. A byte-level BPE with all bytes loses none."""
    return not (_stages_keep_all(backend) and _model_keeps_all(backend))


def component(part: Any) -> dict[str, Any]:
    """Return the JSON of a normalizer, pre-tokenizer, decoder or post-processor, {} for None."""
    content: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return content


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """Yield the parts of a normalizer or a pre-tokenizer, with sequences flattened."""
    stack = [component(part)]
    while stack:
        content = stack.pop()
        stack += content.get("normalizers", []) + content.get("pretokenizers", [])
        if content and content["type"] != "Sequence":
            yield content


def _stages_keep_all(backend: Tokenizer) -> bool:
    return all(
        part["type"] in _KEEPING_NORMALIZERS or (part["type"] == "Replace" and part["content"])
        for part in _parts(backend.normalizer)
    ) and all(
        part["type"] in _KEEPING_PRE_TOKENIZERS
        or (
            part["type"] in ("Split", "Punctuation")
            and part["behavior"] != "Removed"
            and not part.get("invert")
        )
        for part in _parts(backend.pre_tokenizer)
    )


def _model_keeps_all(backend: Tokenizer) -> bool:
    model = backend.model
    # other models encode an unknown word as the unknown token, or fail
    if not isinstance(model, models.BPE):
        return True
    if model.unk_token is not None and model.token_to_id(model.unk_token) is not None:
        return True
    if model.byte_fallback and all(
        model.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256)
    ):
        return True
    byte_level = any(
        part["type"] == "ByteLevel"
        for stage in (backend.normalizer, backend.pre_tokenizer)
        for part in _parts(stage)
    )
    return byte_level and all(
        model.token_to_id(character) is not None
        for character in pre_tokenizers.ByteLevel.alphabet()
    )


def _known_characters(backend: Tokenizer) -> Tokenizer | None:
    """Return a tokenizer with one token per character that a BPE has, None for other models.

    A BPE shifts the offsets of a word's tokens by each character that it drops. They show the
    number of dropped characters, and not their positions.
    """
    model = backend.model
    if (
        not isinstance(model, models.BPE)
        or model.ignore_merges
        or model.continuing_subword_prefix
        or model.end_of_word_suffix
    ):
        return None
    vocab = backend.get_vocab(with_added_tokens=False)
    return _character_tokenizer(
        backend,
        models.BPE(
            vocab=vocab, merges=[], unk_token=model.unk_token, byte_fallback=model.byte_fallback
        ),
    )


def _character_tokenizer(backend: Tokenizer, model: Any) -> Tokenizer:
    """Return a tokenizer with one word per character after normalizer and pre-tokenizer."""
    characters = Tokenizer(model)
    each = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    before = backend.pre_tokenizer
    if backend.normalizer is not None:
        characters.normalizer = backend.normalizer
    characters.pre_tokenizer = each if before is None else pre_tokenizers.Sequence([before, each])
    characters.add_tokens(
        [token for _, token in sorted(backend.get_added_tokens_decoder().items())]
    )
    characters.encode_special_tokens = backend.encode_special_tokens
    return characters


def _untrimmed(post_processor: Any) -> Any:
    """Return a post-processor that keeps whitespace in the offsets of tokens."""
    content = json.dumps(component(post_processor))
    if '"trim_offsets": true' not in content:
        return post_processor
    untrimmed = content.replace('"trim_offsets": true', '"trim_offsets": false')
    empty = json.loads(Tokenizer(models.BPE()).to_str()) | {"post_processor": json.loads(untrimmed)}
    return Tokenizer.from_str(json.dumps(empty)).post_processor


def _uncovered(text: str, encoding: Encoding) -> set[int]:
    """Return the indices of the characters that no token covers."""
    end = 0
    gaps: set[int] = set()
    for start, stop in encoding.offsets:
        if start > end:
            gaps.update(range(end, start))
        end = max(end, stop)
    gaps.update(range(end, len(text)))
    return gaps
