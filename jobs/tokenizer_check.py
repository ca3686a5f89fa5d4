"""Compares a tokenizer with transformers, for check-model: token ids, special tokens, texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

HARD_TEXTS = (
    "",
    " ",
    "  two  spaces, a tab\tand an end ",
    "The king is dead. Isn't he? He 's, they 've; 1,234.50!",
    "line\nline\r\nline\r\n\r\n\x0b\x0c\x1c\x85\u2028end",
    "\x00\x01\x1f\x7f\u200b\ufeff\u00ad\ufffd",
    "caf\u00e9 cafe\u0301 \ufb01 \u212b \uff21\uff22 \u0130\u0131 "
    "\u00df \u1e9b\u0323 \ud55c \u1112\u1161\u11ab",
    "中文，日本語 ภาษา العربية हिन्दी עברית",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 "
    "\U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd",
    "\U0010ffff\ue000\u0378",
    "a" * 5000,
    "<s>[CLS]<|endoftext|></s><unk>[UNK]<pad>[MASK]\u2581##a</w>\u0120",
    "def f(x):\n    return {'k': [x ** 2 for _ in range(10)]}  # \\n",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerComparison:
    """Counts of compared encodings, decoded texts and special tokens.

    Attributes:
        way: How transformers loads the tokenizer.
        difference: The first difference; "" if there is none.
    """

    way: str
    encodings: int
    texts: int
    special_tokens: int
    difference: str

    @property
    def agree(self) -> bool:
        return not self.difference


def compare_tokenizers(folder: Path) -> TokenizerComparison:
    """Compare the tokenizer of a checkpoint's folder with `AutoTokenizer` on hard texts.

    Every text is encoded with and without parse_special, and with and without the template.

    Raises:
        ModelError: gptbatch does not support the tokenizer.
    """
    from transformers import AutoTokenizer

    from gptbatch.pipeline.input.tokenizer import PromptTokenizer
    from gptbatch.pipeline.input.tokenizer_loading import load_tokenizer

    hf_tokenizer = AutoTokenizer.from_pretrained(
        str(folder.resolve()), trust_remote_code=False, local_files_only=True
    )
    loaded = load_tokenizer(folder)
    special = {
        content: hf_tokenizer.convert_tokens_to_ids(content)
        for content in hf_tokenizer.all_special_tokens
    }
    texts = [*HARD_TEXTS, *(f"a{content} {content}b" for content in special)]
    encodings = decoded = 0
    differences = [
        f"the special token {content!r}"
        for content, index in special.items()
        if loaded.backend.token_to_id(content) != index
    ]
    for parse_special in (False, True):
        for add_special_tokens in (True, False):
            own_tokenizer = PromptTokenizer(
                loaded,
                start_token=None,
                parse_special=parse_special,
                add_special_tokens=add_special_tokens,
            )
            for text, encoded in zip(texts, own_tokenizer.encode(texts), strict=True):
                token_ids = _encode(
                    hf_tokenizer,
                    text,
                    add_special_tokens=add_special_tokens,
                    split_special_tokens=not parse_special,
                )
                encodings += 1
                if token_ids is None or encoded.token_ids != token_ids:
                    if token_ids is not None or not encoded.problem:
                        differences.append(f"the tokens of {text[:40]!r}")
                    continue
                decoded += 1
                if own_tokenizer.decode(token_ids) != hf_tokenizer.decode(token_ids):
                    differences.append(f"the text of the tokens of {text[:40]!r}")
    return TokenizerComparison(
        way=loaded.loaded_by,
        encodings=encodings,
        texts=decoded,
        special_tokens=len(special),
        difference=differences[0] if differences else "",
    )


def _encode(tokenizer: Any, text: str, **options: bool) -> list[int] | None:
    """Return the token ids; None if the tokenizer cannot encode the text."""
    from gptbatch.pipeline.system.rust_panics import panics_as_errors

    try:
        with panics_as_errors():
            token_ids: list[int] = tokenizer(text, **options)["input_ids"]
    except Exception:  # noqa: BLE001 - the library raises plain Exception
        return None
    return token_ids
