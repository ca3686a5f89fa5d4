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
    "metadata_field",
    "parse_special",
    "add_special_tokens",
    "on_lost_text",
    "context_overflow",
    "window_full",
)


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
        **special_token_identity(checkpoint, tokenizer),
        "dtype": config.engine.dtype,
        "cache_dtype": config.engine.cache_dtype,
        "noise_version": NOISE_VERSION,
    } | {key: getattr(config, key) for key in _TOKEN_KEYS}
    config_hash = hashlib.sha256(json.dumps(tokens, sort_keys=True).encode()).hexdigest()
    return {
        "config_hash": config_hash,
        **tokens,
        "record_logits_digest": config.record_logits_digest,
    }


def special_token_identity(checkpoint: Checkpoint, tokenizer: LoadedTokenizer) -> dict[str, Any]:
    """Return the start token and the EOS tokens under their keys in the identity of a job."""
    special = checkpoint.special_tokens
    return {
        "start_token": start_token(special, tokenizer),
        "end_tokens": list(special.eos_token_ids),
    }


def start_token(special_tokens: SpecialTokens, tokenizer: LoadedTokenizer) -> int | None:
    """Return the first token of an empty prompt, None without any.

    It is the BOS token of the model's files, or else of the tokenizer's, or else the first
    EOS token.
    """
    candidates = (special_tokens.start, tokenizer.bos_token, *special_tokens.eos_token_ids)
    return next((token for token in candidates if token is not None), None)
