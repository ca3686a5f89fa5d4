"""Computes the config hash, a digest of everything besides the row that decides its tokens."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.input.tokenizer import LoadedTokenizer
from gptbatch.pipeline.model.checkpoint import Checkpoint
from gptbatch.pipeline.model.generation_config import SpecialTokens
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS
from gptbatch.pipeline.types import NOISE_VERSION

# config keys that change tokens, besides the checkpoint and the input
_TOKEN_KEYS = (
    *SAMPLING_SETTINGS,
    "ignore_eos",
    "prompt_field",
    "id_field",
    "parse_special",
    "add_special_tokens",
    "on_lost_text",
    "context_overflow",
    "window_full",
)
_OPTIONAL_KEYS = ("prompt_template", "messages_field", "row_settings")
# keys of the identity that the config hash covers where they are not null
_HASHED_IF_SET = (*_OPTIONAL_KEYS, "message_end_token")


def job_identity(
    config: JobConfig, checkpoint: Checkpoint, tokenizer: LoadedTokenizer
) -> dict[str, Any]:
    """Return the values that identify a job, except its input.

    Two runs with equal values produce equal rows for equal input. `config_hash` is the SHA-256 of
    the values that change the tokens of a given row.
    """
    tokens = {
        "model_digest": checkpoint.model_digest,
        "tokenizer_digest": tokenizer.digest,
        **special_token_identity(config, checkpoint, tokenizer),
        "dtype": config.engine.dtype,
        "cache_dtype": config.engine.cache_dtype,
        "noise_version": NOISE_VERSION,
    } | {key: getattr(config, key) for key in (*_TOKEN_KEYS, *_OPTIONAL_KEYS)}
    hashed = {
        key: value
        for key, value in tokens.items()
        if value is not None or key not in _HASHED_IF_SET
    }
    config_hash = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    return {
        "config_hash": config_hash,
        **tokens,
        "record_logits_digest": config.record_logits_digest,
    }


def special_token_identity(
    config: JobConfig, checkpoint: Checkpoint, tokenizer: LoadedTokenizer
) -> dict[str, Any]:
    """Return the special tokens of prompts and completions, by key in the identity of a job."""
    special = checkpoint.special_tokens
    has_messages = config.messages_field is not None
    return {
        "start_token": start_token(special, tokenizer),
        "end_tokens": list(special.eos_token_ids),
        "message_end_token": message_end_token(special, tokenizer) if has_messages else None,
    }


def start_token(special_tokens: SpecialTokens, tokenizer: LoadedTokenizer) -> int | None:
    """Return the first token of an empty prompt, None without any.

    It is the BOS token of the model's files, or else of the tokenizer's, or else the first
    EOS token.
    """
    candidates = (special_tokens.start, tokenizer.bos_token, *special_tokens.eos_token_ids)
    return next((token for token in candidates if token is not None), None)


def message_end_token(special_tokens: SpecialTokens, tokenizer: LoadedTokenizer) -> int | None:
    """Return the token after each message of a chat, None without any.

    It is the EOS token of the tokenizer, which must be one of the model, or else the model's first
    one.
    """
    ends = special_tokens.eos_token_ids
    if tokenizer.eos_token is None:
        return ends[0] if ends else None
    return tokenizer.eos_token if tokenizer.eos_token in ends else None
