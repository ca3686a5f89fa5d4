"""Reads special tokens and generation settings from config.json and generation_config.json.

transformers stores both in generation_config.json, and in config.json in older checkpoints. Only
the start token and the EOS tokens are applied. The job sets the sampling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptbatch.pipeline.errors import ModelError

# bos_token_id and eos_token_id of GPT2Config, where neither file has the key
DEFAULT_TOKEN = 50256

# Values without effect, such as the defaults of transformers. None and empty lists have no effect
# for every key.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "begin_suppress_tokens": (),
    "bad_words_ids": (),
    "constraints": (),
    "diversity_penalty": (0,),
    "do_sample": (False,),
    "dola_layers": (),
    "early_stopping": (False,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_decoder_ids": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "length_penalty": (1,),
    "max_length": (20,),
    "max_new_tokens": (),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_p": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "repetition_penalty": (1,),
    "sequence_bias": (),
    "stop_strings": (),
    "suppress_tokens": (),
    "temperature": (1,),
    "token_healing": (False,),
    "top_h": (),
    "top_k": (0, 50),
    "top_p": (1,),
    "typical_p": (1,),
    "watermarking_config": (),
}
# keys of generation_config.json that do not change the tokens of a decoder-only model
# fmt: off
_HARMLESS = frozenset({
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight",
    "assistant_lookbehind", "bos_token_id", "cache_config", "cache_implementation",
    "compile_config", "continuous_batching_config", "decoder_start_token_id", "disable_compile",
    "eos_token_id", "is_assistant", "low_memory", "max_cache_len", "max_matching_ngram_size",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "output_attentions",
    "output_hidden_states", "output_logits", "output_scores", "pad_token_id", "prefill_chunk_size",
    "prompt_lookup_num_tokens", "remove_invalid_values", "renormalize_logits",
    "return_dict_in_generate", "speculation_type", "target_lookbehind", "transformers_version",
    "use_cache", "use_mtp",
})
# fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """The start token and the EOS tokens of a checkpoint.

    Attributes:
        start: Begins an empty prompt. None where neither file names one.
        eos_token_ids: Each ends a completion. In the order of the files, without repeats.
        ends_left_out: EOS tokens outside of the vocabulary.
    """

    start: int | None
    eos_token_ids: tuple[int, ...]
    ends_left_out: tuple[int, ...] = ()


def read_special_tokens(
    config: Mapping[str, Any], generation: Mapping[str, Any], *, vocab_size: int, where: str
) -> SpecialTokens:
    """Combine the special tokens of both files.

    The EOS tokens are those of both files. (transformers takes only those of generation_config.json
    where it exists.) The start token is that of generation_config.json, or else of config.json.

    Args:
        config: The content of config.json.
        generation: The content of generation_config.json, empty where there is none.
        vocab_size: Token ids from 0 to vocab_size - 1 are in the vocabulary.
        where: The folder in messages.

    Raises:
        ModelError: A value is neither a token id nor, for eos_token_id, a list of them.
    """
    named = [
        *_token_ids("eos_token_id", config, f"{where}/config.json"),
        *_token_ids("eos_token_id", generation, f"{where}/generation_config.json"),
    ]
    if (
        "eos_token_id" not in config
        and "eos_token_id" not in generation
        and vocab_size > DEFAULT_TOKEN
    ):
        named = [DEFAULT_TOKEN]
    starts = [
        *_token_ids("bos_token_id", generation, f"{where}/generation_config.json"),
        *_token_ids("bos_token_id", config, f"{where}/config.json"),
    ]
    if "bos_token_id" not in config and "bos_token_id" not in generation:
        starts = [DEFAULT_TOKEN]
    named = list(dict.fromkeys(named))
    return SpecialTokens(
        start=next((token for token in starts if 0 <= token < vocab_size), None),
        eos_token_ids=tuple(token for token in named if 0 <= token < vocab_size),
        ends_left_out=tuple(token for token in named if not 0 <= token < vocab_size),
    )


def _token_ids(key: str, content: Mapping[str, Any], path: str) -> list[int]:
    value = content.get(key)
    token_ids = (
        []
        if value is None
        else value
        if isinstance(value, list) and key == "eos_token_id"
        else [value]
    )
    if not all(type(token) is int for token in token_ids):
        needed = (
            "a token id, a list of them or null" if key == "eos_token_id" else "a token id or null"
        )
        raise ModelError(f"{path}: {key} is {value!r:.200}: {needed} is needed")
    return token_ids


def settings_not_followed(
    config: Mapping[str, Any], generation: Mapping[str, Any]
) -> dict[str, Any]:
    """Return settings that gptbatch does not apply and that differ from transformers' defaults.

    Unknown keys of generation_config.json are included: a later transformers may have added them.
    """
    found = {key: value for key, value in config.items() if key in _NEUTRAL}
    found |= {
        key: value
        for key, value in generation.items()
        if key not in _HARMLESS and not key.startswith("_")
    }
    return {
        key: value
        for key, value in found.items()
        if value not in (None, [], {}) and value not in _NEUTRAL.get(key, ())
    }


def generation_warnings(
    special_tokens: SpecialTokens, unfollowed: Mapping[str, Any], *, vocab_size: int, where: str
) -> list[str]:
    """Return a line each about EOS tokens that are left out and settings that are not applied.

    Args:
        special_tokens: The special tokens of the checkpoint.
        unfollowed: Result of `settings_not_followed`.
        vocab_size: Size of the vocabulary.
        where: The checkpoint in messages.
    """
    warnings = []
    if left_out := special_tokens.ends_left_out:
        ends = ", ".join(map(str, special_tokens.eos_token_ids))
        warnings.append(
            f"{where}: eos_token_id {', '.join(map(str, left_out))} is not in the vocabulary "
            f"(vocab_size {vocab_size}) and is left out; "
            + (f"rows end at {ends}" if ends else "no token ends a row")
        )
    if unfollowed:
        shown = ", ".join(f"{key} {_short(value)}" for key, value in sorted(unfollowed.items()))
        warnings.append(
            f"{where}: generation settings of the checkpoint are not followed, the job's decide: "
            f"{shown}"
        )
    return warnings


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
