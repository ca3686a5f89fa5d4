"""Loads weights into the network: from checkpoint files, or from a model of transformers in memory.

transformers keeps the linears of a block as (in, out), ours are (out, in).
"""

from __future__ import annotations

import dataclasses
import logging
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
from torch import Tensor, nn

from gptbatch.pipeline.errors import ModelError, StorageError
from gptbatch.pipeline.kv_cache.interface import Backend
from gptbatch.pipeline.model.blocks import Block
from gptbatch.pipeline.model.config import GPTConfig
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.linear import Linear
from gptbatch.pipeline.model.tensor_names import (
    describe_heads,
    hint_for,
    is_constant,
    other_head,
    plain_name,
    unknown_prefix,
)

# a parameter of our block -> its name inside h.N of a checkpoint, and whether it is transposed there
BLOCK_NAMES = {
    "ln_1.weight": ("ln_1.weight", False),
    "ln_1.bias": ("ln_1.bias", False),
    "attn_qkv.weight": ("attn.c_attn.weight", True),
    "attn_qkv.bias": ("attn.c_attn.bias", False),
    "attn_out.weight": ("attn.c_proj.weight", True),
    "attn_out.bias": ("attn.c_proj.bias", False),
    "ln_2.weight": ("ln_2.weight", False),
    "ln_2.bias": ("ln_2.bias", False),
    "mlp_in.weight": ("mlp.c_fc.weight", True),
    "mlp_in.bias": ("mlp.c_fc.bias", False),
    "mlp_out.weight": ("mlp.c_proj.weight", True),
    "mlp_out.bias": ("mlp.c_proj.bias", False),
}
OUTER_NAMES = ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")
EMBEDDING_NAME, HEAD_NAME = "wte.weight", "lm_head.weight"

logger = logging.getLogger("gptbatch")


# -- from a model in memory ------------------------------------------------------------------------------------------


def copy_parameter(target: Tensor, source: Tensor, *, transpose: bool = False) -> None:
    """Copy the values of one tensor into another of the same shape; raises ValueError when the shapes differ."""
    source = source.detach().t() if transpose else source.detach()
    if target.shape != source.shape:
        raise ValueError(
            f"cannot copy a tensor of shape {tuple(source.shape)} into one of shape {tuple(target.shape)}"
        )
    with torch.no_grad():
        target.copy_(source)


def copy_block(block: Block, source: nn.Module) -> None:
    """Copy a transformers `GPT2Block` into a block of ours."""
    for name, (source_name, transpose) in BLOCK_NAMES.items():
        copy_parameter(
            block.get_parameter(name), source.get_parameter(source_name), transpose=transpose
        )


def copy_model(gpt: GPT, source: nn.Module) -> None:
    """Copy a transformers `GPT2LMHeadModel` into a GPT of ours that has not been packed."""
    blocks = source.get_submodule("transformer.h")
    sources = list(blocks.children())
    if len(sources) != len(gpt.blocks):
        raise ValueError(
            f"cannot copy a model of {len(sources)} blocks into one of {len(gpt.blocks)}"
        )
    for block, source_block in zip(gpt.blocks, sources, strict=True):
        assert isinstance(block, Block)
        copy_block(block, source_block)
    for name in OUTER_NAMES:
        copy_parameter(gpt.get_parameter(name), source.get_parameter(f"transformer.{name}"))
    head = source.get_parameter(HEAD_NAME)
    if gpt.config.tied and not torch.equal(head, source.get_parameter("transformer.wte.weight")):
        raise ValueError(
            "the model's head differs from its token embedding, but the config says that they are tied"
        )
    copy_parameter(gpt.lm_head.weight, head)


# -- from files ------------------------------------------------------------------------------------------------------


class TensorFile(Protocol):
    """An open file of named tensors."""

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, names: list[str]) -> dict[str, Tensor]: ...


class SafetensorsFile:
    """Opened anew for each group of tensors, so that no more of the file than one group is mapped at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        with self._open() as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (not a dict, and no iterator)

    def read(self, names: list[str]) -> dict[str, Tensor]:
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
                f"{self.path}: not a whole safetensors file of types that torch has ({error}); fetch it again"
            ) from error


class PickleFile:
    """A pytorch_model.bin, read by torch's restricted unpickler, never run as code; mapped, unless of the oldest format."""

    def __init__(self, path: Path) -> None:
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
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, names: list[str]) -> dict[str, Tensor]:
        return {name: self._tensors[name] for name in names}


def _reason(error: Exception) -> str:
    """What torch says of a pickle, in one line, without its advice to run the code inside."""
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
    """What stands there instead, and how to save the weights alone where a training program put them beside other things."""
    if not isinstance(content, Mapping):
        return f" ({type(content).__name__})"
    inside = [key for key, value in content.items() if _is_state_dict(value) and value]
    if not inside:
        other = next(
            (key, value)
            for key, value in content.items()
            if not (isinstance(key, str) and isinstance(value, Tensor))
        )
        return f" ({other[0]!r:.100} is of type {type(other[1]).__name__})"
    key, file = inside[0], os.fspath(path)
    return f", which stand under {key!r}: torch.save(torch.load({file!r}, weights_only=True)[{key!r}], {file!r}) saves them alone"


@contextmanager
def _utf8_name(path: Path) -> Iterator[str]:
    """A name of the file in UTF-8, which is all that safetensors and torch take."""
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
    """Raises StorageError where the system refused to read; the library in Rust only says so in its text."""
    if (isinstance(error, OSError) and error.errno) or "(os error " in str(error):
        raise StorageError(f"{path}: cannot be read ({error})") from error


def load_gpt(
    config: GPTConfig,
    files: list[Path],
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: Backend = "padded",
    pack: bool = True,
) -> GPT:
    """Load a checkpoint straight from its safetensors (or pickle) files into a network in eval mode.

    Group by group (embeddings, each block, head): read, check, cast, move, pack; at no time is a second copy of the whole
    resident. Heads beside the language model are left out, with one warning. A prefix that no known wrapper adds
    is removed from all names, with a warning. A head that differs from the embedding is used,
    with a warning, where config.json says that they are tied: so does transformers from version 5 on.

    Raises:
        ModelError: a tensor is missing, extra, misshapen or not finite; the message names it.
    """
    weights = _CheckpointWeights(files)
    if weights.prefix:
        logger.warning(
            "%s: the names of its tensors are taken without their prefix %s.",
            files[0].parent,
            weights.prefix,
        )
    if weights.heads:
        logger.warning(
            "%s: heads beside the language model are left out: %s",
            files[0].parent,
            describe_heads(weights.heads),
        )
    if config.tied:
        weights.share(EMBEDDING_NAME, HEAD_NAME)
    with torch.device("meta"):
        gpt = GPT(config, attention=attention)
    gpt.eval().requires_grad_(False)
    expected = {name: shape for group in _groups(gpt) for name, shape in group.shapes.items()}
    weights.check(expected)
    for group in _groups(gpt):
        if config.tied and HEAD_NAME in group.shapes and _is_tied(weights, gpt.wte.weight):
            gpt.lm_head.tie(gpt.wte)
        else:
            if config.tied and HEAD_NAME in group.shapes:
                logger.warning(
                    "%s: %s differs from %s and is used, though config.json says tie_word_embeddings: true",
                    files[0].parent, HEAD_NAME, EMBEDDING_NAME,
                )  # fmt: skip
                gpt.config = dataclasses.replace(config, tied=False)
            group.fill(weights.read(list(group.shapes)), dtype, device)
        if pack and group.module is not gpt.lm_head:
            for module in group.module.modules():
                if isinstance(module, Linear):
                    module.pack(native=gpt.native)
    if pack:
        gpt.pack()  # the head, which may be the embedding, and what follows from that
    else:
        gpt.use_padding_plan(gpt.padding_plans[0])
    return gpt


class _CheckpointWeights:
    """The tensors of all files of a checkpoint under their plain names.

    heads: plain names of tensors that belong to other heads than the language model's. prefix: what stands in front of all names of
    the language model and is no known wrapper's; "" for none.
    """

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._where: dict[str, tuple[TensorFile, str, Path]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.heads: list[str] = []
        opened: list[tuple[Path, TensorFile]] = [
            (path, SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path))
            for path in files
        ]
        stored = [(path, file, file.shapes()) for path, file in opened]
        self.prefix = unknown_prefix(name for _, _, shapes in stored for name in shapes)
        for path, file, shapes in stored:
            for stored_name, shape in shapes.items():
                name = plain_name(stored_name, self.prefix)
                if is_constant(name):
                    continue
                if other_head(name):
                    self.heads.append(name)
                    continue
                if name in self._where:
                    raise ModelError(f"{path}: tensor {name} is also in {self._where[name][2]}")
                self._where[name], self._shapes[name] = (file, stored_name, path), shape

    def share(self, one: str, other: str) -> None:
        """Where only one of two tensors is stored, it stands for both."""
        for there, missing in ((one, other), (other, one)):
            if there in self._where and missing not in self._where:
                self._where[missing], self._shapes[missing] = (
                    self._where[there],
                    self._shapes[there],
                )

    def same(self, one: str, other: str) -> bool:
        """Whether both names stand for the same stored tensor."""
        return self._where[one] == self._where[other]

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Every expected tensor is there in its shape, and no other."""
        missing = [name for name in expected if name not in self._where]
        extra = [name for name in self._where if name not in expected]
        if missing:
            where = self._files[0].parent
            if missing == [HEAD_NAME]:
                raise ModelError(
                    f"{where}: the checkpoint lacks {HEAD_NAME}, and config.json says tie_word_embeddings: false; set it to true if the "
                    "head is the token embedding"
                )
            found = (
                f"; it has {_some(extra)}, which GPT-2 with this config.json has not{hint_for(extra)}"
                if extra
                else ""
            )
            raise ModelError(f"{where}: the checkpoint lacks the tensors {_some(missing)}{found}")
        if extra:
            path = self._where[extra[0]][2]
            raise ModelError(
                f"{path}: GPT-2 with this config.json has no tensors {_some(extra)}{hint_for(extra, complete=True)}"
            )
        for name, shape in self._shapes.items():
            if shape != expected[name]:
                raise ModelError(
                    f"{self._where[name][2]}: tensor {name} has shape {shape}; config.json asks for {expected[name]}"
                )

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The named tensors as they are stored."""
        tensors: dict[str, Tensor] = {}
        for file in {id(self._where[name][0]): self._where[name][0] for name in names}.values():
            stored = {self._where[name][1]: name for name in names if self._where[name][0] is file}
            for stored_name, tensor in file.read(list(stored)).items():
                name = stored[stored_name]
                if not tensor.is_floating_point():
                    raise ModelError(
                        f"{self._where[name][2]}: tensor {name} holds {tensor.dtype}, not floating-point numbers"
                    )
                tensors[name] = tensor
        return tensors


class _Group:
    """Parameters that are loaded together: a module of ours, and for each parameter its name in the checkpoint."""

    def __init__(self, module: nn.Module, names: dict[str, tuple[str, bool]]) -> None:
        self.module, self.names = module, names
        self.shapes: dict[str, tuple[int, ...]] = {}
        for own, (name, transposed) in names.items():
            shape = tuple(module.get_parameter(own).shape)
            self.shapes[name] = shape[::-1] if transposed else shape

    def fill(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        for own, (name, transposed) in self.names.items():
            tensor = tensors[name].to(device=device, dtype=dtype, copy=True)
            low, high = torch.aminmax(tensor)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise ModelError(
                    f"tensor {name} holds NaN or infinity as {str(dtype).removeprefix('torch.')}"
                )
            if transposed:
                tensor = tensor.t().contiguous()
            *path, attribute = own.split(".")
            setattr(
                self.module.get_submodule(".".join(path)),
                attribute,
                nn.Parameter(tensor, requires_grad=False),
            )


def _groups(gpt: GPT) -> Iterator[_Group]:
    for name in OUTER_NAMES:
        owner, attribute = name.split(".")
        yield _Group(gpt.get_submodule(owner), {attribute: (name, False)})
    for layer, block in enumerate(gpt.blocks):
        yield _Group(
            block,
            {
                own: (f"h.{layer}.{name}", transposed)
                for own, (name, transposed) in BLOCK_NAMES.items()
            },
        )
    yield _Group(gpt.lm_head, {"weight": (HEAD_NAME, False)})


def _is_tied(weights: _CheckpointWeights, embedding: Tensor) -> bool:
    """Whether the head has the values of the embedding. A file may hold both."""
    if weights.same(EMBEDDING_NAME, HEAD_NAME):
        return True
    head = weights.read([HEAD_NAME])[HEAD_NAME].to(device=embedding.device, dtype=embedding.dtype)
    return torch.equal(head, embedding)


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
