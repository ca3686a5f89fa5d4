"""Results of OpenAI's batch API: chat completions where prompts are messages, else completions."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

# the columns that `OpenaiResults` reads
OPENAI_COLUMNS = (
    "prompt_id",
    "prompt_index",
    "sample_index",
    "prompt",
    "completion",
    "completion_token_ids",
    "finish_reason",
    "stop_reason",
    "error",
    "prompt_tokens",
    "completion_tokens",
    "token_logprobs",
    "top_logprob_ids",
    "top_logprobs",
    "started_at",
)


class OpenaiResults:
    """The results of a run.

    Args:
        model: The name of the model.
        is_chat: Prompts are messages, so that the results are chat completions.
        find_token_bytes: Returns the bytes of each token's text by token id, or nothing, which
            leaves log probabilities null. Called where a row has log probabilities.
    """

    def __init__(
        self, *, model: str, is_chat: bool, find_token_bytes: Callable[[], Sequence[bytes]]
    ) -> None:
        self._model, self._is_chat = model, is_chat
        self._find_token_bytes = find_token_bytes

    @cached_property
    def _token_bytes(self) -> Sequence[bytes]:
        return self._find_token_bytes()

    def lines(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield a result per prompt, with a choice per sample.

        A prompt of which a sample has an error has that error. Without any completion, its response
        is null.

        Args:
            rows: The columns OPENAI_COLUMNS, samples of a prompt together.
        """
        for index, group in groupby(rows, key=lambda row: row["prompt_index"]):
            samples = list(group)
            done = [sample for sample in samples if sample["error"] is None]
            failed = next((sample for sample in samples if sample["error"] is not None), None)
            yield {
                "id": f"batch_req_{index}",
                "custom_id": samples[0]["prompt_id"],
                "response": {
                    "status_code": 200,
                    "request_id": f"req_{index}",
                    "body": self._body(done, index),
                }
                if done
                else None,
                "error": failed and {"code": "row_error", "message": failed["error"]},
            }

    def _body(self, samples: list[Mapping[str, Any]], index: int) -> dict[str, Any]:
        started_at = samples[0]["started_at"]
        prompt_tokens = samples[0]["prompt_tokens"]
        completion_tokens = sum(sample["completion_tokens"] for sample in samples)
        return {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{index}",
            "object": "chat.completion" if self._is_chat else "text_completion",
            "created": 0 if started_at is None else int(started_at.timestamp()),
            "model": self._model,
            "choices": [self._choice(sample) for sample in samples],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }

    def _choice(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        text = sample["completion"]
        message = {"message": {"role": "assistant", "content": text}}
        return {
            "index": sample["sample_index"] or 0,
            **(message if self._is_chat else {"text": text}),
            "logprobs": self._logprobs(sample),
            "finish_reason": sample["finish_reason"],
        }

    def _logprobs(self, sample: Mapping[str, Any]) -> dict[str, Any] | None:
        if sample["token_logprobs"] is None or not self._token_bytes:
            return None
        token_ids = sample["completion_token_ids"]
        n_top = len(sample["top_logprob_ids"]) // max(1, len(token_ids))
        likely = list(zip(sample["top_logprob_ids"], sample["top_logprobs"], strict=True))
        tops = [likely[n_top * step : n_top * (step + 1)] for step in range(len(token_ids))]
        offsets = self._offsets(sample)
        tokens = list(zip(token_ids, sample["token_logprobs"], tops, strict=True))[: len(offsets)]
        if self._is_chat:
            content = [
                self._chat_token(token, logprob)
                | {"top_logprobs": [self._chat_token(*item) for item in top]}
                for token, logprob, top in tokens
            ]
            return {"content": content, "refusal": None}
        first = len(sample["prompt"])
        return {
            "tokens": [self._text(token) for token, _, _ in tokens],
            "token_logprobs": [logprob for _, logprob, _ in tokens],
            # the token itself is always among them, as in OpenAI's API
            "top_logprobs": [
                {self._text(other): value for other, value in [*top, (token, logprob)]}
                for token, logprob, top in tokens
            ]
            if n_top
            else None,
            "text_offset": [first + offset for offset in offsets],
        }

    def _offsets(self, sample: Mapping[str, Any]) -> list[int]:
        """Return how many characters of the completion lie before each token of its text.

        A final EOS or stop token, and tokens after a stop string, are not part of the text.
        """
        token_ids = sample["completion_token_ids"]
        if sample["stop_reason"] in ("end_of_text", "stop_token"):
            token_ids = token_ids[:-1]
        completion = sample["completion"]
        before_stop = 0 if sample["stop_reason"] == "stop_string" and not completion else None
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        offsets: list[int] = []
        text = ""
        for token in token_ids:
            offsets.append(len(text))
            text += decoder.decode(self._bytes(token))
            if sample["stop_reason"] == "stop_string":
                # The completion has U+FFFD for a character without its last bytes.
                cut = decoder.getstate()[0].decode("utf-8", "replace")
                if len(text) + len(cut) == len(completion) and text + cut == completion:
                    before_stop = len(offsets)
                if len(text) > len(completion):
                    break
        return offsets[:before_stop]

    def _chat_token(self, token: int, logprob: float) -> dict[str, Any]:
        content = self._bytes(token)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            text = _escaped(content)
        return {"token": text, "bytes": list(content), "logprob": logprob}

    def _text(self, token: int) -> str:
        content = self._bytes(token)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return f"bytes:{_escaped(content)}"

    def _bytes(self, token: int) -> bytes:
        # a model may have more tokens than its tokenizer
        return self._token_bytes[token] if token < len(self._token_bytes) else b""


def _escaped(content: bytes) -> str:
    r"""Return bytes that are not a text as OpenAI writes them: `\xe2\x80`."""
    return "".join(f"\\x{byte:02x}" for byte in content)
