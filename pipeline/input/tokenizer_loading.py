"""Loads the tokenizer of a checkpoint, with the result of `transformers.AutoTokenizer`.

    direct         tokenizer.json, or vocab.json and merges.txt of GPT-2, read with the tokenizers
                   library (0.1 s), if the other files of the checkpoint have no effect
    transformers   all other files, keys and classes (4 s for the import)

Code of a checkpoint is never executed.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gptbatch.pipeline.errors import ModelError
from gptbatch.pipeline.input.lost_text import component
from gptbatch.pipeline.input.tokenizer import LoadedTokenizer
from gptbatch.pipeline.input.tokenizer_errors import (
    ADDED_TOKENS,
    GPT2_FILES,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    VOCABULARY_FILES,
    describe_misnamed,
    reject_byte_order_marks,
    reject_empty,
    reject_random,
)
from gptbatch.pipeline.input.tokenizer_files import (
    END_OF_TEXT,
    GPT2_CLASSES,
    TokenizerFiles,
    reason_for_transformers,
    token_text,
)
from gptbatch.pipeline.input.tokenizer_transformers import load_with_transformers
from gptbatch.pipeline.model.checkpoint import CONFIG_FILE, read_json, reading
from gptbatch.pipeline.storage.regular_file import file_sha256
from gptbatch.pipeline.system.error_text import first_line
from gptbatch.pipeline.system.rust_panics import panics_as_errors

logger = logging.getLogger("gptbatch")


def load_tokenizer(folder: Path) -> LoadedTokenizer:
    """Load the tokenizer of a checkpoint.

    Args:
        folder: The folder of the checkpoint.

    Raises:
        ModelError: There is none, it cannot be read, its vocabulary is empty, it is random, or it
            needs code of the checkpoint.
    """
    config, special_map, added = (
        _read_if_present(folder / name)
        for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS)
    )
    auto_map = config.get("auto_map")
    if isinstance(auto_map, list) or (isinstance(auto_map, dict) and "AutoTokenizer" in auto_map):
        raise ModelError(
            f"{folder / TOKENIZER_CONFIG}: auto_map names a tokenizer in code of the checkpoint, "
            "which is never executed; where its tokenizer.json does the same, remove auto_map"
        )
    files = TokenizerFiles(read_json(folder / CONFIG_FILE), config, special_map, added)
    names: tuple[str, ...] = (TOKENIZER_JSON,)
    reject_byte_order_marks(folder)
    if (folder / TOKENIZER_JSON).is_file():
        backend = _read_tokenizer_json(folder / TOKENIZER_JSON)
        reject_random(folder / TOKENIZER_JSON, backend)
    elif (
        all((folder / name).is_file() for name in GPT2_FILES)
        and files.tokenizer_class in GPT2_CLASSES
    ):
        backend, names = _read_gpt2_files(folder), GPT2_FILES
    elif any((folder / name).is_file() for name in VOCABULARY_FILES):
        return load_with_transformers(folder, files.tokenizer_class)
    else:
        lacking = f"neither {TOKENIZER_JSON} nor any of {', '.join(VOCABULARY_FILES)}"
        raise ModelError(f"{folder}: no tokenizer: {lacking}{describe_misnamed(folder)}")
    reject_empty(folder / names[0], backend)
    if reason_for_transformers(backend, files, names):
        made = load_with_transformers(folder, files.tokenizer_class)
        if names == (TOKENIZER_JSON,):
            _warn_of_replaced_parts(folder, backend, made.backend)
        return made
    named = files.named_tokens()
    bos, eos = (token_text(named.get(key)) for key in ("bos_token", "eos_token"))
    return LoadedTokenizer(
        backend=backend,
        decode=lambda ids: backend.decode(ids, skip_special_tokens=False),
        cleans_up=False,
        loaded_by="direct",
        bos_token=None if bos is None else backend.token_to_id(bos),
        eos_token=None if eos is None else backend.token_to_id(eos),
        digest=file_digest(folder, names),
    )


def file_digest(folder: Path, names: tuple[str, ...]) -> str:
    """Return the SHA-256 of the names and contents of the files that exist."""
    digest = hashlib.sha256()
    for name in names:
        if (folder / name).is_file():
            with reading(folder / name):
                digest.update(f"{name}\0{file_sha256(folder / name)}\0".encode())
    return digest.hexdigest()


def _read_tokenizer_json(path: Path) -> Tokenizer:
    with reading(path):
        content = path.read_bytes()
    try:
        with panics_as_errors():
            return Tokenizer.from_buffer(content)
    # the library raises plain Exception
    except Exception as error:
        raise ModelError(
            f"{path}: cannot be read as a tokenizer ({first_line(error)}); fetch it again"
        ) from error


def _read_gpt2_files(folder: Path) -> Tokenizer:
    """Build the byte-level BPE of GPT-2 from vocab.json and merges.txt."""
    vocab, merges = (folder / name for name in GPT2_FILES)
    for path in (vocab, merges):
        with reading(path), path.open("rb") as file:
            file.read(1)
    try:
        with panics_as_errors():
            backend = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    # the library raises plain Exception
    except Exception as error:
        names = " and ".join(GPT2_FILES)
        raise ModelError(
            f"{folder}: {names} cannot be read as a tokenizer ({first_line(error)}); "
            "fetch them again"
        ) from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(END_OF_TEXT) is not None:
        backend.add_tokens([AddedToken(END_OF_TEXT, special=True)])
    return backend


def _warn_of_replaced_parts(folder: Path, file: Tokenizer, made: Tokenizer) -> None:
    """Warn where transformers replaced parts of a tokenizer.json by those of its class."""
    parts = {
        "normalizer": (file.normalizer, made.normalizer),
        "pre-tokenizer": (file.pre_tokenizer, made.pre_tokenizer),
        "decoder": (file.decoder, made.decoder),
    }
    differ = [name for name, pair in parts.items() if len({_types(part) for part in pair}) > 1]
    if type(file.model) is not type(made.model):
        differ.append("model")
    if differ:
        logger.warning(
            "%s: transformers replaces the %s by the rules of its tokenizer class, and so does "
            "gptbatch; "
            '"tokenizer_class": "PreTrainedTokenizerFast" in %s keeps them',
            folder / TOKENIZER_JSON,
            " and ".join(differ),
            TOKENIZER_CONFIG,
        )


def _types(part: Any) -> tuple[str, ...]:
    """Return the types of a normalizer, pre-tokenizer or decoder and of its parts."""
    content = component(part)
    inner = (
        entry
        for value in content.values()
        if isinstance(value, list)
        for entry in value
        if isinstance(entry, dict)
    )
    return (content.get("type", ""), *(entry["type"] for entry in inner))


def _read_if_present(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
