"""Encodes the messages of a chat as DialoGPT joins them."""

from __future__ import annotations

from gptbatch.pipeline.input.prompt_text import parse_messages
from gptbatch.pipeline.input.tokenizer import EncodedText, LoadedTokenizer, PromptTokenizer


class MessageTokenizer(PromptTokenizer):
    """Converts the messages of chats to token ids, and token ids back to text.

    Each message is encoded alone, without the tokenizer's template, and the end token follows it
    (Zhang et al. 2020, DialoGPT). The text of a special token in a message is plain text, so no
    message can hold the end of another one.

    Args:
        loaded: The tokenizer of the checkpoint.
        end_token: The token after each message.
    """

    def __init__(self, loaded: LoadedTokenizer, *, end_token: int) -> None:
        super().__init__(loaded, start_token=None, add_special_tokens=False)
        self._end_token = end_token

    def encode(self, texts: list[str]) -> list[EncodedText]:
        """Encode chats. Each text is the JSON array of the messages; "" is no message."""
        chats = [_contents(text) for text in texts]
        encoded = iter(super().encode([content for chat in chats for content in chat or ()]))
        return [
            EncodedText([], problem="it is not the JSON of messages")
            if chat is None
            else self._joined([next(encoded) for _ in chat])
            for chat in chats
        ]

    def _joined(self, messages: list[EncodedText]) -> EncodedText:
        problem = next((message.problem for message in messages if message.problem), "")
        token_ids = [
            token for message in messages for token in (*message.token_ids, self._end_token)
        ]
        return EncodedText(
            [] if problem else token_ids,
            problem,
            sum(message.lost for message in messages),
            any(message.has_unknown for message in messages),
            any(message.has_special_text for message in messages),
            sum(message.characters for message in messages),
        )


def _contents(text: str) -> list[str] | None:
    """Return the text of each message, None where `text` is not the JSON of messages."""
    if not text:
        return []
    try:
        return parse_messages(text)
    except ValueError:
        return None
