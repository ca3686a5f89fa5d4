"""Finds the files of a checkpoint in a folder or on the Hugging Face hub. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gptbatch.pipeline.errors import ModelError, StorageError
from gptbatch.pipeline.model.generation_config import (
    SpecialTokens,
    generation_warnings,
    read_special_tokens,
    settings_not_followed,
)
from gptbatch.pipeline.model.other_formats import (
    ADAPTER_CONFIG,
    describe_adapter,
    describe_file,
    describe_folder,
    is_lfs_pointer,
    lfs_message,
)
from gptbatch.pipeline.storage.regular_file import file_sha256
from gptbatch.pipeline.system.bundled import locate
from gptbatch.pipeline.system.error_text import first_line

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
# of GPT2Config, for a config.json without vocab_size
DEFAULT_VOCAB_SIZE = 50257
# all files that tokenizers of transformers read, and the template of chats
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "tiktoken.model",
    "chat_template.jinja",
)

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Checkpoint:
    """The files of one checkpoint.

    Attributes:
        name: The folder or hub name that the user gave.
        folder: The folder that holds the files.
        weights: The files of the weights, in a fixed order.
        sha256: Returns the hexadecimal SHA-256 of a file. A run passes one that remembers.
    """

    name: str
    folder: Path
    weights: tuple[Path, ...]
    sha256: Callable[[Path], str] = field(default=file_sha256, compare=False)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_json(self.config_path)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """The content of generation_config.json; empty where there is none."""
        path = self.folder / GENERATION_CONFIG_FILE
        return read_json(path) if path.is_file() else {}

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """The start token and the EOS tokens that config.json and generation_config.json name."""
        return read_special_tokens(
            self.config, self.generation_config, vocab_size=self._vocab_size, where=str(self.folder)
        )

    @property
    def settings_not_followed(self) -> dict[str, Any]:
        """Generation settings of these files that gptbatch does not apply, by key."""
        return settings_not_followed(self.config, self.generation_config)

    @property
    def generation_warnings(self) -> list[str]:
        """Warnings about EOS tokens and about settings that are not applied, one line each."""
        return generation_warnings(
            self.special_tokens,
            self.settings_not_followed,
            vocab_size=self._vocab_size,
            where=self.name,
        )

    @property
    def _vocab_size(self) -> int:
        vocab_size = self.config.get("vocab_size", DEFAULT_VOCAB_SIZE)
        if type(vocab_size) is not int:
            raise ModelError(
                f"{self.config_path}: vocab_size is {vocab_size!r:.200}: a whole number is needed"
            )
        return vocab_size

    @property
    def config_path(self) -> Path:
        """The path of config.json."""
        return self.folder / CONFIG_FILE

    @cached_property
    def model_digest(self) -> str:
        """SHA-256 of config.json and the files of the weights, hexadecimal."""
        return self._digest([self.config_path, *self.weights])

    def _digest(self, paths: list[Path]) -> str:
        digest = hashlib.sha256()
        for path in paths:
            with reading(path):
                digest.update(f"{path.name}\0{self.sha256(path)}\0".encode())
        return digest.hexdigest()


def find_checkpoint(
    name: str,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    sha256: Callable[[Path], str] = file_sha256,
) -> Checkpoint:
    """Find a checkpoint.

    Args:
        name: A folder, a `bundled:` path or a name on the hub.
        revision: Branch, tag or commit on the hub. None takes the default branch.
        allow_pickle: Accept pickled weights where there are no safetensors.
        sha256: Returns the hexadecimal SHA-256 of a file.

    Raises:
        ModelError: There is none, it has another format, or its weights are missing or pickled.
        StorageError: A file cannot be read.
    """
    path = locate(name)
    if path.is_dir():
        folder = path
    elif path.exists():
        raise ModelError(describe_file(name, path))
    elif _HUB_NAME.fullmatch(name):
        folder = _download(name, revision, allow_pickle)
    else:
        raise ModelError(f"{name}: no such folder")
    if adapter := describe_adapter(name, folder):
        raise ModelError(adapter)
    if not (folder / CONFIG_FILE).is_file():
        raise ModelError(describe_folder(name, folder, lacking=f"the folder has no {CONFIG_FILE}"))
    _reject_lfs_pointers(
        folder / file for file in (CONFIG_FILE, GENERATION_CONFIG_FILE, *TOKENIZER_FILES)
    )
    weights = _find_weights(name, folder, allow_pickle)
    _reject_lfs_pointers(weights)
    return Checkpoint(name=name, folder=folder, weights=weights, sha256=sha256)


def _reject_lfs_pointers(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_file():
            with reading(path):
                if is_lfs_pointer(path):
                    raise ModelError(lfs_message(path))


def _find_weights(name: str, folder: Path, allow_pickle: bool) -> tuple[Path, ...]:
    for single, index, allowed in (
        (WEIGHTS_FILE, WEIGHTS_INDEX, True),
        (PICKLE_FILE, PICKLE_INDEX, allow_pickle),
    ):
        if not ((folder / single).is_file() or (folder / index).is_file()):
            continue
        if not allowed:
            _reject_lfs_pointers(
                [folder / single, folder / index, *sorted(folder.glob("pytorch_model-*.bin"))]
            )
            raise ModelError(
                f"{name}: the weights are pickled ({single}), which is refused; convert them to "
                "safetensors, or give --allow-pickle"
            )
        return (
            (folder / single,)
            if (folder / single).is_file()
            else _shards(folder / index, Path(single).suffix)
        )
    raise ModelError(
        describe_folder(
            name, folder, lacking=f"the folder has neither {WEIGHTS_FILE} nor {WEIGHTS_INDEX}"
        )
    )


def _shards(index: Path, suffix: str) -> tuple[Path, ...]:
    _reject_lfs_pointers([index])
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise ModelError(f"{index}: weight_map must map tensor names to file names")
    shards = tuple(index.parent / shard for shard in sorted(set(weight_map.values())))
    for shard in shards:
        if shard.parent != index.parent or shard.suffix != suffix:
            raise ModelError(
                f"{index}: the shard {shard.name!r} is not the plain name of a {suffix} file"
            )
        if not shard.is_file():
            raise ModelError(
                f"{index}: the shard {shard.name} is missing; fetch the checkpoint again"
            )
    return shards


def _download(name: str, revision: str | None, allow_pickle: bool) -> Path:
    """Return the snapshot in the local cache of the hub, downloaded if it is missing.

    Pickles are downloaded only if they are allowed and there are no safetensors.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [
        CONFIG_FILE,
        GENERATION_CONFIG_FILE,
        WEIGHTS_FILE,
        "model-*.safetensors",
        WEIGHTS_INDEX,
        ADAPTER_CONFIG,
        *TOKENIZER_FILES,
    ]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        has_safetensors = (folder / WEIGHTS_FILE).is_file() or (folder / WEIGHTS_INDEX).is_file()
        if allow_pickle and not has_safetensors:
            pickles = [PICKLE_FILE, "pytorch_model-*.bin", PICKLE_INDEX]
            folder = Path(
                snapshot_download(name, revision=revision, allow_patterns=[*patterns, *pickles])
            )
    except HFValidationError as error:
        raise ModelError(f"{name}: no such folder") from error
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{name}: no such folder, and the hub does not give a model of that name "
            f"({first_line(error)}); correct the name, or without a network name a local folder"
        ) from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint that holds an object.

    Raises:
        ModelError: It is not valid JSON, or not an object.
        StorageError: It cannot be read.
    """
    with reading(path):
        data = path.read_bytes()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        problem = (
            "HTML, not the file itself; fetch it again"
            if data.lstrip()[:1] == b"<"
            else f"not valid JSON ({error})"
        )
        raise ModelError(f"{path}: {problem}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: a JSON object is needed")
    return content


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert OSError inside to StorageError that names the file."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror or error})") from error
