"""The checkpoint's fast tokenizer: prompts to token ids in batches, new token ids to text.

Knows: text and token ids. Does not know: the network.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pipeline.data.generation_config import SpecialTokens
from pipeline.errors import ModelError
from pipeline.records import FinishReason

END_OF_TEXT = "<|endoftext|>"


class PromptTokenizer:
    """Turns text into token ids and back.

    parse_special: whether `<|endoftext|>` inside a prompt is the special token; otherwise it is plain text.
    Nothing is added to a prompt, except that an empty one becomes the single start token.
    """

    def __init__(self, folder: Path, *, special_tokens: SpecialTokens, parse_special: bool, vocab_size: int) -> None:
        self._tokenizer = _load(folder)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = not parse_special
        ends = special_tokens.ends
        self._start = special_tokens.start if special_tokens.start is not None or not ends else ends[0]
        # tokens that were added later (a padding token, say) may lie beyond; a prompt that holds one is an error row
        largest = max(self._tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
        if largest >= vocab_size:
            raise ModelError(
                f"{folder}: the tokenizer has token id {largest}, but the model's vocab_size is {vocab_size}; they do not belong together"
            )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text. An empty text is the start token, else the first end token, else []."""
        empty = [] if self._start is None else [self._start]
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception; its text may quote the prompt
            raise ModelError("the tokenizer cannot encode a prompt; a byte-level one, as GPT-2's, encodes any text") from error
        return [encoding.ids or list(empty) for encoding in encodings]

    def decode(self, token_ids: list[int]) -> str:
        """The text of new tokens, special ones included and spaces left as they are; bytes that are no UTF-8 are U+FFFD."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def completion_text(self, token_ids: list[int], finish_reason: FinishReason) -> str:
        """The completion that new tokens stand for: a closing end-of-text is no part of it."""
        return self.decode(token_ids[:-1] if finish_reason == "stop" else token_ids)


def _load(folder: Path) -> Tokenizer:
    """tokenizer.json where there is one, else GPT-2's byte-level BPE from vocab.json and merges.txt."""
    try:
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            if tokenizer.token_to_id(END_OF_TEXT) is not None:
                tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
            return tokenizer
    except Exception as error:  # the library raises plain Exception for a file that it cannot read
        raise ModelError(f"{folder}: the tokenizer cannot be read ({error})") from error
    raise ModelError(f"{folder}: no tokenizer.json, nor vocab.json with merges.txt")
