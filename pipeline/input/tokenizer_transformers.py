"""Loads a tokenizer with transformers, for the files that `tokenizer_loading` does not read itself.

The import of transformers takes about 4 s.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gptbatch.pipeline.errors import ModelError
from gptbatch.pipeline.input.tokenizer import LoadedTokenizer
from gptbatch.pipeline.input.tokenizer_errors import (
    reason_and_advice,
    reject_empty,
    reject_placeholder,
    reject_random,
)
from gptbatch.pipeline.system.rust_panics import panics_as_errors

# texts on which a tokenizer of transformers must equal its backend
_PROBES = (
    "",
    "The quick brown fox.",
    "  two  spaces\n\tand a tab ",
    "It 's 1,234 : \u00e9 \u4e2d\u6587 ISN'T",
)


def load_with_transformers(folder: Path, tokenizer_class: Any) -> LoadedTokenizer:
    """Load a tokenizer with AutoTokenizer.

    Raises:
        ModelError: transformers cannot build it, or it needs Python code to encode.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    # its warnings about padding, lengths and ids do not apply
    transformers_logging.set_verbosity_error()
    try:
        with panics_as_errors():
            made = AutoTokenizer.from_pretrained(
                str(folder.resolve()), trust_remote_code=False, local_files_only=True
            )
            backend = _checked_backend(folder, made)
    except ModelError:
        raise
    except Exception as error:
        reason, advice = reason_and_advice(folder, tokenizer_class, error)
        raise ModelError(
            f"{folder}: transformers cannot make the tokenizer ({reason}); {advice}"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    # transformers 5 does not clean up the spaces of a BPE unless this key is set
    for_bpe = getattr(
        made, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", True
    )
    cleans_up = bool(made.clean_up_tokenization_spaces) and (
        for_bpe or type(backend.model).__name__ != "BPE"
    )
    return LoadedTokenizer(
        backend=backend,
        decode=lambda ids: (
            str(made.decode(ids)) if cleans_up else backend.decode(ids, skip_special_tokens=False)
        ),
        cleans_up=cleans_up,
        loaded_by="transformers",
        bos_token=made.bos_token_id,
        eos_token=made.eos_token_id,
        digest=hashlib.sha256(f"{backend.to_str()}\0{cleans_up}".encode()).hexdigest(),
    )


def _checked_backend(folder: Path, made: Any) -> Tokenizer:
    """Return the backend of a tokenizer of transformers. Raises ModelError."""
    backend = getattr(made, "_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(
            f"{folder}: its tokenizer is {type(made).__name__}, which is written in Python; only "
            "those of the tokenizers library are supported; convert it to a tokenizer.json"
        )
    reject_placeholder(folder, made, backend)
    reject_empty(folder, backend)
    reject_random(folder, backend)
    backend.no_padding()
    backend.no_truncation()
    _compare_with_backend(folder, made, backend)
    return backend


def _compare_with_backend(folder: Path, made: Any, backend: Tokenizer) -> None:
    """Raise ModelError if the class of transformers changes texts before its backend encodes."""
    for text in _PROBES:
        try:
            expected = made(text)["input_ids"]
        # a tokenizer without an unknown token; rows that need one become error rows
        except Exception:  # noqa: BLE001
            continue
        if backend.encode(text).ids != expected:
            raise ModelError(
                f"{folder}: its tokenizer {type(made).__name__} changes texts in Python before it "
                "encodes them, which is not supported; convert it to a tokenizer.json"
            )
