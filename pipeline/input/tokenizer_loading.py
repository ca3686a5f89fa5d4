"""Loads the tokenizer of a checkpoint as `transformers.AutoTokenizer` does.

There are two ways, with the same result:

    direct         tokenizer.json, or GPT-2's vocab.json and merges.txt, through `tokenizers` (0.1 s), where other files add nothing
    transformers   AutoTokenizer makes the backend tokenizer (4 s to import): other files, other keys, other classes

`_reason_against_direct` decides. It knows the keys that cannot matter beside a tokenizer.json, and leaves everything else to
transformers. No code of a checkpoint is ever executed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gptbatch.pipeline.errors import ModelError
from gptbatch.pipeline.input.lost_text import component
from gptbatch.pipeline.input.tokenizer_errors import (
    ADDED_TOKENS,
    GPT2_FILES,
    PLAIN_CLASSES,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    VOCABULARY_FILES,
    describe_misnamed,
    first_line,
    reason_and_advice,
    refuse_byte_order_marks,
    refuse_empty,
    refuse_made_up,
    refuse_random,
)  # fmt: skip
from gptbatch.pipeline.model.checkpoint import CONFIG_FILE, read_json, reading
from gptbatch.pipeline.system.regular_file import file_sha256
from gptbatch.pipeline.system.rust_panics import panics_as_errors

logger = logging.getLogger("gptbatch")

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_HARMLESS_KEYS = frozenset(
    {
        # handled in _reason_against_direct
        *(
            "add_prefix_space",
            "added_tokens_decoder",
            "additional_special_tokens",
            "clean_up_tokenization_spaces",
        ),
        *("extra_special_tokens", "tokenizer_class"),
        # said of a length, a padding or a batch; a prompt is neither cut nor padded
        *(
            "max_length",
            "max_len",
            "model_max_length",
            "model_input_names",
            "pad_to_multiple_of",
            "pad_token_type_id",
            "padding_side",
        ),
        *("return_token_type_ids", "stride", "truncation_side", "truncation_strategy"),
        # transformers ignores them beside a tokenizer.json
        *(
            "add_bos_token",
            "add_eos_token",
            "backend",
            "errors",
            "is_local",
            "local_files_only",
            "name_or_path",
            "processor_class",
        ),
        *(
            "special_tokens_map_file",
            "tokenizer_file",
            "transformers_version",
            "use_fast",
            "verbose",
        ),
        # only for chats
        *("chat_control_tokens", "chat_template", "response_schema", "response_template"),
        # parse_special decides instead
        "split_special_tokens",
    }
)
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
_END_OF_TEXT = "<|endoftext|>"
# Texts on which a tokenizer that transformers made must equal its backend.
_PROBES = (
    "",
    "The quick brown fox.",
    "  two  spaces\n\tand a tab ",
    "It 's 1,234 : \u00e9 \u4e2d\u6587 ISN'T",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTokenizer:
    """A tokenizer as transformers would use it.

    decode: token ids to text, special tokens included. cleans_up: whether it moves spaces between tokens. way: how it was loaded.
    bos_token: the id of the tokenizer's own BOS. digest: SHA-256 of all that decides token ids and texts.
    """

    backend: Tokenizer
    decode: Callable[[list[int]], str]
    cleans_up: bool
    way: Literal["direct", "transformers"]
    bos_token: int | None
    digest: str


def load_tokenizer(folder: Path) -> LoadedTokenizer:
    """Load the tokenizer of a checkpoint's folder.

    Raises:
        ModelError: there is none, it cannot be read, it is empty or random, or only code of the checkpoint could run it.
    """
    config, special_map, added = (
        _read_if_there(folder / name)
        for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS)
    )
    auto_map = config.get("auto_map")
    if isinstance(auto_map, list) or (isinstance(auto_map, dict) and "AutoTokenizer" in auto_map):
        raise ModelError(
            f"{folder / TOKENIZER_CONFIG}: auto_map names a tokenizer in code of the checkpoint, which is never executed; "
            "where its tokenizer.json does the same, remove auto_map"
        )
    files = _Files(read_json(folder / CONFIG_FILE), config, special_map, added)
    names: tuple[str, ...] = (TOKENIZER_JSON,)
    refuse_byte_order_marks(folder)
    if (folder / TOKENIZER_JSON).is_file():
        backend = _read_tokenizer_json(folder / TOKENIZER_JSON)
        refuse_random(folder / TOKENIZER_JSON, backend)
    elif (
        all((folder / name).is_file() for name in GPT2_FILES)
        and files.tokenizer_class in _GPT2_CLASSES
    ):
        backend, names = _read_gpt2_files(folder), GPT2_FILES
    elif any((folder / name).is_file() for name in VOCABULARY_FILES):
        return _made_by_transformers(folder, files.tokenizer_class)
    else:
        lacking = f"neither {TOKENIZER_JSON} nor any of {', '.join(VOCABULARY_FILES)}"
        raise ModelError(f"{folder}: no tokenizer: {lacking}{describe_misnamed(folder)}")
    refuse_empty(folder / names[0], backend)
    if _reason_against_direct(backend, files, names):
        made = _made_by_transformers(folder, files.tokenizer_class)
        if names == (TOKENIZER_JSON,):
            _warn_of_other_parts(folder, backend, made.backend)
        return made
    bos = _content(files.named_tokens().get("bos_token"))
    return LoadedTokenizer(
        backend=backend,
        decode=lambda ids: backend.decode(ids, skip_special_tokens=False),
        cleans_up=False,
        way="direct",
        bos_token=None if bos is None else backend.token_to_id(bos),
        digest=file_digest(folder, names),
    )


def file_digest(folder: Path, names: tuple[str, ...]) -> str:
    """SHA-256 over the names and contents of those files that are there."""
    digest = hashlib.sha256()
    for name in names:
        if (folder / name).is_file():
            with reading(folder / name):
                digest.update(f"{name}\0{file_sha256(folder / name)}\0".encode())
    return digest.hexdigest()


# -- the direct way --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Files:
    """The contents of the JSON files around a tokenizer.json; a missing file is {}."""

    model: dict[str, Any]
    config: dict[str, Any]
    special_map: dict[str, Any]
    added: dict[str, Any]

    @property
    def tokenizer_class(self) -> Any:
        return (
            self.config.get("tokenizer_class")
            or self.model.get("tokenizer_class")
            or "GPT2Tokenizer"
        )

    def named_tokens(self) -> dict[str, Any]:
        """bos_token and the like, as transformers takes them from these files."""
        is_gpt2 = self.tokenizer_class in _GPT2_CLASSES
        named = (
            dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END_OF_TEXT) if is_gpt2 else {}
        )
        settings = (
            named
            | self.config
            | ({} if "added_tokens_decoder" in self.config else self.special_map)
        )
        return {key: settings[key] for key in _NAMED_TOKENS if settings.get(key) is not None}


def _reason_against_direct(backend: Tokenizer, files: _Files, names: tuple[str, ...]) -> str:
    """Why the files of these names alone may differ from what transformers makes; "" when they cannot."""
    config = files.config
    if names == GPT2_FILES:  # the digest is of these two, so that nothing else may decide
        if key := next(
            (
                key
                for key in ("add_prefix_space", "add_bos_token", "add_eos_token")
                if config.get(key)
            ),
            "",
        ):
            return key
        if files.added or {_content(token) for token in files.named_tokens().values()} != {
            _END_OF_TEXT
        }:
            return "special tokens"
    added = backend.get_added_tokens_decoder()
    contents = {token.content for token in added.values()}
    if files.model.get("model_type") != "gpt2" or files.tokenizer_class not in (
        *PLAIN_CLASSES,
        *_GPT2_CLASSES,
    ):
        return "tokenizer_class"
    for key, value in (*config.items(), *files.special_map.items()):
        if key in ("additional_special_tokens", "extra_special_tokens"):
            tokens = value
        elif key.endswith("_token") and key not in _HARMLESS_KEYS:
            tokens = [] if value is None else [value]
        elif key in _HARMLESS_KEYS:
            continue
        else:
            return key
        if not isinstance(tokens, list) or not {_content(token) for token in tokens} <= contents:
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
    if files.tokenizer_class in _GPT2_CLASSES:
        return _reason_against_gpt2(backend, files)
    if not _is_subset(config.get("added_tokens_decoder", {}), added):
        return "added_tokens_decoder"
    return ""


def _reason_against_gpt2(backend: Tokenizer, files: _Files) -> str:
    """GPT2Tokenizer takes vocabulary, merges, added tokens and the template from tokenizer.json, and makes the rest itself."""
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
    if not {_content(token) for token in files.named_tokens().values()} <= {
        token.content for token in added.values() if token.special
    }:
        return "special tokens"
    size = backend.get_vocab_size(with_added_tokens=False)
    beyond = sorted(index for index in added if model.id_to_token(index) != added[index].content)
    return "" if beyond == list(range(size, size + len(beyond))) else "added_tokens"


def _is_subset(entries: Any, added: dict[int, Any]) -> bool:
    """Whether tokenizer.json has each of the added tokens {id: {content, lstrip, ...}}, with the same flags."""
    try:
        return all(
            repr(AddedToken(**entry)) == repr(added.get(int(index)))
            for index, entry in entries.items()
        )
    except (TypeError, ValueError, AttributeError):
        return False


def _content(token: Any) -> Any:
    """The text of a special token, which stands as text or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read_tokenizer_json(path: Path) -> Tokenizer:
    with reading(path):
        content = path.read_bytes()
    try:
        with panics_as_errors():
            return Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception
        raise ModelError(
            f"{path}: cannot be read as a tokenizer ({first_line(error)}); fetch it again"
        ) from error


def _read_gpt2_files(folder: Path) -> Tokenizer:
    """GPT-2's byte-level BPE from vocab.json and merges.txt."""
    vocab, merges = (folder / name for name in GPT2_FILES)
    for path in (vocab, merges):
        with reading(path), path.open("rb") as file:
            file.read(1)
    try:
        with panics_as_errors():
            backend = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises plain Exception
        names = " and ".join(GPT2_FILES)
        raise ModelError(
            f"{folder}: {names} cannot be read as a tokenizer ({first_line(error)}); fetch them again"
        ) from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(_END_OF_TEXT) is not None:
        backend.add_tokens([AddedToken(_END_OF_TEXT, special=True)])
    return backend


def _warn_of_other_parts(folder: Path, file: Tokenizer, made: Tokenizer) -> None:
    """transformers may rebuild a tokenizer.json by the rules of a class, without a word."""
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
            "%s: transformers replaces the %s by the rules of its tokenizer class, and so does gptbatch; "
            '"tokenizer_class": "PreTrainedTokenizerFast" in %s keeps them',
            folder / TOKENIZER_JSON,
            " and ".join(differ),
            TOKENIZER_CONFIG,
        )


def _types(part: Any) -> tuple[str, ...]:
    """The types of a normalizer, pre-tokenizer or decoder and of its parts."""
    content = component(part)
    inner = (
        entry
        for value in content.values()
        if isinstance(value, list)
        for entry in value
        if isinstance(entry, dict)
    )
    return (content.get("type", ""), *(entry["type"] for entry in inner))


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


# -- the way through transformers ------------------------------------------------------------------------------------


def _made_by_transformers(folder: Path, tokenizer_class: Any) -> LoadedTokenizer:
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns of padding, of lengths, of ids that gptbatch checks itself
    try:
        with panics_as_errors():
            made = AutoTokenizer.from_pretrained(
                str(folder.resolve()), trust_remote_code=False, local_files_only=True
            )
            backend = getattr(made, "_tokenizer", None)
            if not isinstance(backend, Tokenizer):
                raise ModelError(
                    f"{folder}: its tokenizer is {type(made).__name__}, which is written in Python; only those of the tokenizers "
                    "library are supported; convert it to a tokenizer.json"
                )
            refuse_made_up(folder, made, backend)
            refuse_empty(folder, backend)
            refuse_random(folder, backend)
            backend.no_padding()
            backend.no_truncation()
            _check_backend(folder, made, backend)
    except ModelError:
        raise
    except Exception as error:  # whatever the files of a checkpoint make of it
        reason, advice = reason_and_advice(folder, tokenizer_class, error)
        raise ModelError(
            f"{folder}: transformers cannot make the tokenizer ({reason}); {advice}"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    # transformers 5 leaves a BPE's spaces alone unless this long key is set
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
        way="transformers",
        bos_token=made.bos_token_id,
        digest=hashlib.sha256(f"{backend.to_str()}\0{cleans_up}".encode()).hexdigest(),
    )


def _check_backend(folder: Path, made: Any, backend: Tokenizer) -> None:
    """Raises ModelError where the class of transformers does more than its backend."""
    for text in _PROBES:
        try:
            expected = made(text)["input_ids"]
        except Exception:  # noqa: BLE001 - a tokenizer without a token for the unknown; its rows become error rows
            continue
        if backend.encode(text).ids != expected:
            raise ModelError(
                f"{folder}: its tokenizer {type(made).__name__} changes texts in Python before it encodes them, which is not "
                "supported; convert it to a tokenizer.json"
            )
