"""Decides whether tokenizer files can be loaded without transformers.

`reason_for_transformers` has a list of keys without effect beside a tokenizer.json. Every other key
is left to transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

from gptbatch.pipeline.input.lost_text import component
from gptbatch.pipeline.input.tokenizer_errors import ADDED_TOKENS, GPT2_FILES, PLAIN_CLASSES

GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
END_OF_TEXT = "<|endoftext|>"
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# fmt: off
_KEYS_WITHOUT_EFFECT = frozenset((
    # checked by reason_for_transformers
    "add_prefix_space", "added_tokens_decoder", "additional_special_tokens",
    "clean_up_tokenization_spaces", "extra_special_tokens", "tokenizer_class",
    # length, padding or batching; a prompt is neither truncated nor padded
    "max_length", "max_len", "model_max_length", "model_input_names", "pad_to_multiple_of",
    "pad_token_type_id", "padding_side", "return_token_type_ids", "stride", "truncation_side",
    "truncation_strategy",
    # transformers ignores them beside a tokenizer.json
    "add_bos_token", "add_eos_token", "backend", "errors", "is_local", "local_files_only",
    "name_or_path", "processor_class", "special_tokens_map_file", "tokenizer_file",
    "transformers_version", "use_fast", "verbose",
    # chats only
    "chat_control_tokens", "chat_template", "response_schema", "response_template",
    # parse_special decides instead
    "split_special_tokens",
))
# fmt: on


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The JSON files beside a tokenizer.json, {} for a missing one.

    Attributes:
        model: config.json.
        config: tokenizer_config.json.
        special_map: special_tokens_map.json.
        added: added_tokens.json.
    """

    model: dict[str, Any]
    config: dict[str, Any]
    special_map: dict[str, Any]
    added: dict[str, Any]

    @property
    def tokenizer_class(self) -> Any:
        """The class that transformers would use."""
        return (
            self.config.get("tokenizer_class")
            or self.model.get("tokenizer_class")
            or "GPT2Tokenizer"
        )

    def named_tokens(self) -> dict[str, Any]:
        """Return named special tokens, such as bos_token, with the precedence of transformers."""
        is_gpt2 = self.tokenizer_class in GPT2_CLASSES
        named = (
            dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT) if is_gpt2 else {}
        )
        settings = (
            named
            | self.config
            | ({} if "added_tokens_decoder" in self.config else self.special_map)
        )
        return {key: settings[key] for key in _NAMED_TOKENS if settings.get(key) is not None}


def reason_for_transformers(
    backend: Tokenizer, files: TokenizerFiles, names: tuple[str, ...]
) -> str:
    """Return the key that may make transformers build another tokenizer, "" without one.

    Args:
        backend: The tokenizer from the files of `names` alone.
        files: The other files.
        names: tokenizer.json, or vocab.json and merges.txt.
    """
    config = files.config
    # the tokenizer digest covers only these two files, so no other file may have an effect
    if names == GPT2_FILES:
        for key in ("add_prefix_space", "add_bos_token", "add_eos_token"):
            if config.get(key):
                return key
        if files.added or {token_text(token) for token in files.named_tokens().values()} != {
            END_OF_TEXT
        }:
            return "special tokens"
    added = backend.get_added_tokens_decoder()
    contents = {token.content for token in added.values()}
    if files.model.get("model_type") != "gpt2" or files.tokenizer_class not in (
        *PLAIN_CLASSES,
        *GPT2_CLASSES,
    ):
        return "tokenizer_class"
    for key, value in (*config.items(), *files.special_map.items()):
        if key in ("additional_special_tokens", "extra_special_tokens"):
            tokens = value
        elif key.endswith("_token") and key not in _KEYS_WITHOUT_EFFECT:
            tokens = [] if value is None else [value]
        elif key in _KEYS_WITHOUT_EFFECT:
            continue
        else:
            return key
        if not isinstance(tokens, list) or not {token_text(token) for token in tokens} <= contents:
            return key
    if any(
        (token := added.get(index)) is None or token.content != content
        for content, index in files.added.items()
    ):
        return ADDED_TOKENS
    if backend.padding is not None and backend.padding["pad_token"] not in contents:
        return "padding"
    is_bpe = type(backend.model).__name__ == "BPE"
    if config.get("clean_up_tokenization_spaces") and not is_bpe:
        return "clean_up_tokenization_spaces"
    if files.tokenizer_class in GPT2_CLASSES:
        return _reason_against_gpt2(backend, files)
    if not _is_subset(config.get("added_tokens_decoder", {}), added):
        return "added_tokens_decoder"
    return ""


def _reason_against_gpt2(backend: Tokenizer, files: TokenizerFiles) -> str:
    """Return the key in which GPT2Tokenizer would differ from the backend, "" without one.

    The class takes vocabulary, merges, added tokens and template from tokenizer.json. It builds the
    normalizer, the pre-tokenizer and the decoder itself.
    """
    model, config = backend.model, files.config
    plain = type(model).__name__ == "BPE" and not (
        model.unk_token
        or model.continuing_subword_prefix
        or model.end_of_word_suffix
        or model.fuse_unk
        or model.byte_fallback
        or model.ignore_merges
    )
    before = component(backend.pre_tokenizer)
    if not plain or backend.normalizer is not None:
        return "tokenizer_class"
    if (
        before.get("type") != "ByteLevel"
        or not before["use_regex"]
        or before["add_prefix_space"] != bool(config.get("add_prefix_space"))
    ):
        return "add_prefix_space"
    if component(backend.decoder).get("type") != "ByteLevel":
        return "tokenizer_class"
    added = backend.get_added_tokens_decoder()
    if "added_tokens_decoder" in config and not (
        _is_subset(config["added_tokens_decoder"], added)
        and len(config["added_tokens_decoder"]) == len(added)
    ):
        return "added_tokens_decoder"
    if not {token_text(token) for token in files.named_tokens().values()} <= {
        token.content for token in added.values() if token.special
    }:
        return "special tokens"
    size = backend.get_vocab_size(with_added_tokens=False)
    beyond = sorted(index for index in added if model.id_to_token(index) != added[index].content)
    return "" if beyond == list(range(size, size + len(beyond))) else "added_tokens"


def _is_subset(entries: Any, added: dict[int, Any]) -> bool:
    """Return whether `added` holds each of the entries {id: {content, lstrip, ...}}."""
    try:
        return all(
            repr(AddedToken(**entry)) == repr(added.get(int(index)))
            for index, entry in entries.items()
        )
    except (TypeError, ValueError, AttributeError):
        return False


def token_text(token: Any) -> Any:
    """Return the text of a special token, which is declared as text or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
