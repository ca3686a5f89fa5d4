"""Open checkpoint files: safetensors, and pickles through torch's restricted unpickler."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptbatch.pipeline.errors import ModelError, StorageError


class TensorFile(Protocol):
    """An open file of named tensors."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name."""

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Read the named tensors."""


class SafetensorsFile:
    """A safetensors file. It is opened for each read, so that only these tensors are mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name."""
        with self._open() as file:
            # safe_open is neither a dict nor an iterator.
            names = file.keys()
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Read the named tensors."""
        with self._open() as file:
            return {name: file.get_tensor(name) for name in names}

    @contextmanager
    def _open(self) -> Iterator[safe_open]:
        try:
            with (
                _utf8_name(self.path) as name,
                safe_open(name, framework="pt", device="cpu") as file,
            ):
                yield file
        except (SafetensorError, OSError) as error:
            _raise_if_disk(self.path, error)
            raise ModelError(
                f"{self.path}: not a whole safetensors file of types that torch has ({error}); "
                "fetch it again"
            ) from error


class PickleFile:
    """A pytorch_model.bin. No code in it is run. All but the oldest format are memory-mapped."""

    def __init__(self, path: Path) -> None:
        """Load the file.

        Raises:
            ModelError: It is damaged, needs code, or is not a dictionary of named tensors.
        """
        try:
            with _utf8_name(path) as name:
                content: Any = torch.load(
                    name, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True
                )
        except (
            RuntimeError,
            OSError,
            ValueError,
            LookupError,
            TypeError,
            EOFError,
            pickle.UnpicklingError,
        ) as error:
            _raise_if_disk(path, error)
            raise ModelError(
                f"{path}: not a readable file of weights ({_reason(error)})"
            ) from error
        if not _is_state_dict(content):
            raise ModelError(
                f"{path}: not a plain dictionary of named tensors{_way_to_weights(path, content)}"
            )
        self._tensors: Mapping[str, Tensor] = content

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Return the named tensors."""
        return {name: self._tensors[name] for name in names}


def open_tensor_file(path: Path) -> TensorFile:
    """Open a checkpoint file by its suffix: safetensors, or a pickle."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)


def _reason(error: Exception) -> str:
    """Return torch's message about a pickle in one line, without its advice to run the code."""
    text = str(error).strip()
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"it needs {found[1]}, and code of a checkpoint is never run; where it was saved, "
            "torch.save(model.state_dict(), FILE) saves the weights alone"
        )
    text = text.rsplit("WeightsUnpickler error: ", 1)[-1].strip()
    return (text.splitlines() or [type(error).__name__])[0][:200]


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, Mapping) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    )


def _way_to_weights(path: Path, content: Any) -> str:
    """Describe the content, and how to save the weights alone if it holds them under a key."""
    if not isinstance(content, Mapping):
        return f" ({type(content).__name__})"
    keys = [key for key, value in content.items() if _is_state_dict(value) and value]
    if not keys:
        other = next(
            (key, value)
            for key, value in content.items()
            if not (isinstance(key, str) and isinstance(value, Tensor))
        )
        return f" ({other[0]!r:.100} is of type {type(other[1]).__name__})"
    key, file = keys[0], os.fspath(path)
    return (
        f", which stand under {key!r}: "
        f"torch.save(torch.load({file!r}, weights_only=True)[{key!r}], {file!r}) saves them alone"
    )


@contextmanager
def _utf8_name(path: Path) -> Iterator[str]:
    """Yield a UTF-8 name of the file, because safetensors and torch take no other."""
    name = os.fspath(path)
    if name.isascii() or name.encode("utf-8", "replace").decode("utf-8") == name:
        yield name
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _raise_if_disk(path: Path, error: Exception) -> None:
    """Raise StorageError if the system refused to read; safetensors shows that in text only."""
    if (isinstance(error, OSError) and error.errno) or "(os error " in str(error):
        raise StorageError(f"{path}: cannot be read ({error})") from error
