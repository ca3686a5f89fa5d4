"""Encodes prompts in batches and decodes new tokens, with the results of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any, Literal

from tokenizers import Encoding, Tokenizer, models

from gptbatch.pipeline.errors import ModelError
from gptbatch.pipeline.input.lost_text import LostText, component, may_lose_text
from gptbatch.pipeline.input.token_bytes import token_bytes
from gptbatch.pipeline.system.rust_panics import PanicError, panics_as_errors
from gptbatch.pipeline.types import Completion, StopReason

# words in errors of the library -> their cause; the errors themselves may quote the prompt
_CAUSES = {
    "unk": "it holds text that the tokenizer has no token for, and the tokenizer lacks a token for "
    "unknown text",
    "Regex search error": "a regular expression of the tokenizer runs out of steps on it",
}
# parts of a tokenizer that may panic
_PANICKING = ("Regex", "Precompiled")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTokenizer:
    """The tokenizer of a checkpoint, as transformers would use it.

    Attributes:
        backend: The tokenizer of the tokenizers library.
        decode: Converts token ids to text, special tokens included.
        cleans_up: Whether decoding moves spaces between tokens.
        loaded_by: The library that read the files.
        bos_token: The id of its beginning-of-sequence token, None without one.
        eos_token: The id of its end-of-sequence token, None without one.
        digest: SHA-256 of everything that decides token ids and texts.
    """

    backend: Tokenizer
    decode: Callable[[list[int]], str]
    cleans_up: bool
    loaded_by: Literal["direct", "transformers"]
    bos_token: int | None
    digest: str
    eos_token: int | None = None


@dataclass(frozen=True, slots=True)
class EncodedText:
    """The tokens of a text.

    Attributes:
        token_ids: Empty where the text cannot be encoded.
        problem: The reason why a text cannot be encoded, "" where it can.
        lost: Number of characters that no token represents.
        has_unknown: Whether a token represents unknown text.
        has_special_text: Whether the text of a special token was encoded as plain text.
        characters: Number of characters that were encoded.
    """

    token_ids: list[int]
    problem: str = ""
    lost: int = 0
    has_unknown: bool = False
    has_special_text: bool = False
    characters: int = 0


class PromptTokenizer:
    """Converts texts to token ids and back.

    Args:
        loaded: The tokenizer of the checkpoint.
        start_token: The token of an empty text to which the template adds nothing. None encodes it
            as no tokens.
        parse_special: Encode the text of a special token as that token, not as plain text.
        add_special_tokens: Add the tokens of the tokenizer's template, such as `<s>`.

    Attributes:
        template_tokens: The tokens that the template adds to every text.
        adds_after: Whether the template adds tokens after the text, such as `[SEP]`.
    """

    def __init__(
        self,
        loaded: LoadedTokenizer,
        *,
        start_token: int | None,
        parse_special: bool = False,
        add_special_tokens: bool = True,
    ) -> None:
        self._backend = backend = loaded.backend
        self._decode = loaded.decode
        self._start_token = start_token
        self._add_special_tokens = add_special_tokens
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = not parse_special
        self._lost_text = LostText(backend) if may_lose_text(backend) else None
        self._may_panic = _may_panic(backend.normalizer) or _may_panic(backend.pre_tokenizer)
        self._decoder_may_panic = _may_panic(backend.decoder)
        self._unknown_token = _unknown_token(backend)
        self.template_tokens, self.adds_after = (
            _template_tokens(backend) if add_special_tokens else ([], False)
        )
        special = [
            token.content
            for token in backend.get_added_tokens_decoder().values()
            if token.special and token.content
        ]
        # of characters, not of path components
        self._special_prefix = commonprefix(special)  # noqa: RUF071
        self._special_text = (
            None if parse_special or not special else re.compile("|".join(map(re.escape, special)))
        )
        # a byte-level tokenizer decodes new tokens to the same bytes after any prompt
        self._concatenates = (
            component(backend.decoder).get("type") == "ByteLevel" and not loaded.cleans_up
        )

    def name(self, token_id: int) -> str | None:
        """Return the text of a token in the vocabulary, such as `[SEP]`."""
        return self._backend.id_to_token(token_id)

    def encode(self, texts: list[str]) -> list[EncodedText]:
        """Encode texts. An empty text becomes the tokens of the template, or the start token."""
        try:
            encodings: list[Encoding | str] = list(self._encode(texts))
        except Exception:  # noqa: BLE001 - the library raises it, and does not name the text
            encodings = [self._encode_one(text) for text in texts]
        return [
            self._encoded(text, encoding) for text, encoding in zip(texts, encodings, strict=True)
        ]

    def decode(self, token_ids: list[int]) -> str:
        """Decode tokens, special ones included.

        Bytes that are not UTF-8 become U+FFFD. An id without a token has no text.
        """
        if not self._decoder_may_panic:
            return self._decode(token_ids)
        try:
            with panics_as_errors():
                return self._decode(token_ids)
        except PanicError as error:
            raise ModelError(
                "the tokenizer's decoder fails on new tokens; "
                "its regular expressions may run out of steps"
            ) from error

    def added_text(self, before: list[int], token_ids: list[int]) -> str:
        """Return the text that tokens add to the text of the tokens before them."""
        if self._concatenates:
            return self.decode(token_ids)
        start, whole = self.decode(before), self.decode(before + token_ids)
        # a decoder may change the end of the earlier text: " ." to "."
        # the prefix is one of characters, not of path components
        common = start if whole.startswith(start) else commonprefix([start, whole])  # noqa: RUF071
        return whole.removeprefix(common)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token's text, by token id; empty unless tokens are bytes of text."""
        return token_bytes(self._backend) if self._concatenates else []

    def text_of(self, completion: Completion) -> str | None:
        """Return the text of a completion, None for an error."""
        if completion.error is not None:
            return None
        return self.completion_text(
            completion.prompt_token_ids,
            completion.token_ids,
            completion.stop_reason,
            completion.text_bytes,
        )

    def completion_text(
        self,
        prompt: list[int],
        token_ids: list[int],
        stop_reason: StopReason | None,
        text_bytes: int | None,
    ) -> str:
        """Return the text of a completion.

        Args:
            prompt: The tokens before it.
            token_ids: Its tokens.
            stop_reason: A final EOS token or stop token has no text.
            text_bytes: Where a stop string cuts the text; None for nowhere.
        """
        if stop_reason in ("end_of_text", "stop_token"):
            token_ids = token_ids[:-1]
        if not (known := self.token_bytes):
            return self.added_text(prompt, token_ids)
        try:
            text = b"".join([known[token] for token in token_ids])
        except IndexError:
            # A model may have more tokens than its tokenizer.
            text = b"".join([known[token] for token in token_ids if token < len(known)])
        return text[:text_bytes].decode("utf-8", errors="replace")

    def _encode(self, texts: list[str]) -> list[Encoding]:
        # encode_batch_fast returns no offsets
        encode = (
            self._backend.encode_batch_fast
            if self._lost_text is None
            else self._backend.encode_batch
        )
        if not self._may_panic:
            return encode(texts, add_special_tokens=self._add_special_tokens)
        with panics_as_errors():
            return encode(texts, add_special_tokens=self._add_special_tokens)

    def _encode_one(self, text: str) -> Encoding | str:
        """Return the encoding of a text, or the reason why it cannot be encoded."""
        try:
            with panics_as_errors():
                return self._encode([text])[0]
        except Exception as error:  # noqa: BLE001 - the library raises plain Exception
            causes = (
                cause for words, cause in _CAUSES.items() if words.lower() in str(error).lower()
            )
            return next(causes, f"the tokenizer fails on it ({type(error).__name__})")

    def _encoded(self, text: str, encoding: Encoding | str) -> EncodedText:
        if isinstance(encoding, str):
            return EncodedText([], problem=encoding)
        token_ids = encoding.ids
        special = (
            self._special_text is not None
            and self._special_prefix in text
            and self._special_text.search(text) is not None
        )
        if not text:
            return EncodedText(
                token_ids or ([] if self._start_token is None else [self._start_token])
            )
        if self._lost_text is None:
            lost, problem = 0, ""
        elif any(stop > start for start, stop in encoding.offsets):
            lost, problem = self._lost_text.count(text, encoding), ""
        else:
            lost, problem = len(text), "no character of it has a token"
        unknown = self._unknown_token is not None and self._unknown_token in token_ids
        return EncodedText(token_ids, problem, lost, unknown, special, len(text))


def _may_panic(part: Any) -> bool:
    return any(word in str(component(part)) for word in _PANICKING)


def _template_tokens(backend: Tokenizer) -> tuple[list[int], bool]:
    """Return the tokens that the template adds, and whether it adds any after the text."""
    template = backend.post_processor
    if template is None or template.num_special_tokens_to_add(False) == 0:
        return [], False
    plain = Tokenizer(models.WordLevel(vocab={"a": 0}, unk_token="a")).encode("a")
    whole = template.process(plain, None, True)
    added = [
        token_id
        for token_id, sequence in zip(whole.ids, whole.sequence_ids, strict=True)
        if sequence is None
    ]
    return added, whole.sequence_ids[-1] is None


def _unknown_token(backend: Tokenizer) -> int | None:
    """Return the id of the token for unknown text, None without one."""
    model = backend.model
    if isinstance(model, models.Unigram):
        unk_id: int | None = component(model)["unk_id"]
        return unk_id
    return None if model.unk_token is None else backend.token_to_id(model.unk_token)
