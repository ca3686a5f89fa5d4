"""Prompts to token ids in batches, and new token ids to text, as transformers does both."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Encoding, Tokenizer, models

from gptbatch.pipeline.errors import ModelError
from gptbatch.pipeline.input.lost_text import LostText, component, may_lose_text
from gptbatch.pipeline.input.tokenizer_loading import LoadedTokenizer
from gptbatch.pipeline.system.rust_panics import PanicError, panics_as_errors
from gptbatch.pipeline.types import FinishReason

# Words in errors of the library, which may quote the prompt, and what they mean.
_CAUSES = {
    "unk": "it holds text that the tokenizer has no token for, and the tokenizer lacks a token for unknown text",
    "Regex search error": "a regular expression of the tokenizer runs out of steps on it",
}
# Parts of a tokenizer that panic on some texts.
_PANICKING = ("Regex", "Precompiled")


@dataclass(frozen=True, slots=True)
class EncodedText:
    """The tokens of a prompt.

    problem: why there are none although the prompt has text, "" for no reason. lost: how many characters left no token.
    has_unknown: whether a token stands for unknown text. has_special_text: whether the text of a special token was taken as text.
    """

    token_ids: list[int]
    problem: str = ""
    lost: int = 0
    has_unknown: bool = False
    has_special_text: bool = False


class PromptTokenizer:
    """Turns texts into token ids and back.

    Args:
        loaded: The tokenizer of the checkpoint.
        start_token: What an empty prompt starts from where the tokenizer adds nothing; None starts from nothing.
        parse_special: Whether a special token's text inside a prompt is that token; otherwise it is plain text.
        add_special_tokens: Whether to add what the tokenizer's template adds to a prompt, such as `<s>`.

    Attributes:
        template_tokens: What the template adds to every prompt.
        adds_after: Whether some of these stand after the prompt, such as `[SEP]`.
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
        self._special_prefix = _common_start(special)
        self._special_text = (
            None if parse_special or not special else re.compile("|".join(map(re.escape, special)))
        )
        # Bytes of a byte-level tokenizer's new tokens are the same after any prompt.
        self._concatenates = (
            component(backend.decoder).get("type") == "ByteLevel" and not loaded.cleans_up
        )

    def name(self, token_id: int) -> str | None:
        """The text of a token in the vocabulary, `[SEP]`."""
        return self._backend.id_to_token(token_id)

    def encode(self, texts: list[str]) -> list[EncodedText]:
        """The tokens of each text. An empty text is what the template adds, or else the start token."""
        try:
            encodings: list[Encoding | str] = list(self._encode(texts))
        except Exception:  # noqa: BLE001 - the library raises plain Exception, and does not say for which text
            encodings = [self._encode_one(text) for text in texts]
        return [
            self._encoded(text, encoding) for text, encoding in zip(texts, encodings, strict=True)
        ]

    def decode(self, token_ids: list[int]) -> str:
        """The text of tokens, special ones included; bytes that are no UTF-8 are U+FFFD, an id without a token has no text."""
        if not self._decoder_may_panic:
            return self._decode(token_ids)
        try:
            with panics_as_errors():
                return self._decode(token_ids)
        except PanicError as error:
            raise ModelError(
                "the tokenizer's decoder fails on new tokens; its regular expressions may run out of steps"
            ) from error

    def added_text(self, before: list[int], token_ids: list[int]) -> str:
        """The text that tokens add to the text of those before them."""
        if self._concatenates:
            return self.decode(token_ids)
        start, whole = self.decode(before), self.decode(before + token_ids)
        # a decoder may change the end of what stood before: " ." to "."
        return whole.removeprefix(
            start if whole.startswith(start) else _common_start([start, whole])
        )

    def completion_text(
        self, prompt: list[int], token_ids: list[int], finish_reason: FinishReason
    ) -> str:
        """The completion that new tokens add to a prompt's tokens: a closing end-of-text is no part of it."""
        return self.added_text(prompt, token_ids[:-1] if finish_reason == "stop" else token_ids)

    def _encode(self, texts: list[str]) -> list[Encoding]:
        # the fast way gives no offsets
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
        """The encoding of a text, or why there is none."""
        try:
            with panics_as_errors():
                return self._encode([text])[0]
        except Exception as error:  # noqa: BLE001 - as in encode
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
        return EncodedText(token_ids, problem, lost, unknown, special)


def _may_panic(part: Any) -> bool:
    return any(word in str(component(part)) for word in _PANICKING)


def _template_tokens(backend: Tokenizer) -> tuple[list[int], bool]:
    """What the template adds to every prompt, and whether some of it stands after the prompt."""
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


def _common_start(texts: list[str]) -> str:
    """The longest text that all of these begin with."""
    shortest, longest = min(texts, default=""), max(texts, default="")
    return next(
        (shortest[:i] for i, character in enumerate(shortest) if character != longest[i]), shortest
    )


def _unknown_token(backend: Tokenizer) -> int | None:
    """The id of the token that stands for unknown text."""
    model = backend.model
    if isinstance(model, models.Unigram):
        unk_id: int | None = component(model)["unk_id"]
        return unk_id
    return None if model.unk_token is None else backend.token_to_id(model.unk_token)
