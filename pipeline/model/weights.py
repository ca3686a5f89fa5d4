"""Load a checkpoint's weights from its files into a GPT, group by group."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gptbatch.pipeline.errors import ModelError
from gptbatch.pipeline.kernels.huge_pages import HugePages
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.kv_cache.spec import PADDED, Backend
from gptbatch.pipeline.model.config import GPTConfig
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.linear import Linear
from gptbatch.pipeline.model.packing import pack, padding_plans, use_padding_plan
from gptbatch.pipeline.model.tensor_files import TensorFile, open_tensor_file
from gptbatch.pipeline.model.tensor_names import (
    BLOCK_NAMES,
    EMBEDDING_NAME,
    HEAD_NAME,
    OUTER_NAMES,
    describe_heads,
    hint_for,
    is_constant,
    other_head,
    plain_name,
    unknown_prefix,
)

logger = logging.getLogger("gptbatch")

MAX_NAMES_SHOWN = 5


def load_gpt(
    config: GPTConfig,
    files: list[Path],
    *,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend = PADDED,
    cache_dtype: CacheDtype = "auto",
    packed: bool = True,
) -> GPT:
    """Load a checkpoint from its safetensors or pickle files into a GPT in eval mode.

    Each group of parameters (an embedding, a block, the head) is read, checked, cast, moved and
    packed before the next one. A second copy of the whole model is never resident.

    Heads beside the language model are left out, with one warning. A prefix that no known wrapper
    adds is removed from all names, with a warning. A head that differs from the embedding is used,
    with a warning, where config.json says that they are tied: transformers 5 does the same.

    Args:
        config: From the checkpoint's config.json.
        files: The weight files.
        dtype: Of weights and hidden states.
        device: Where to put the weights.
        backend: See `GPT`.
        cache_dtype: See `GPT`.
        packed: Lay the weights out for this machine; see `packing.pack`.

    Raises:
        ModelError: A tensor is missing, extra, misshapen or not finite; the message names it.
    """
    weights = _CheckpointWeights(files)
    weights.warn_about_names()
    if config.tied:
        weights.share(EMBEDDING_NAME, HEAD_NAME)
    with torch.device("meta"):
        gpt = GPT(config, backend=backend, cache_dtype=cache_dtype)
    gpt.eval().requires_grad_(False)
    weights.check({name: shape for group in _groups(gpt) for name, shape in group.shapes.items()})
    memory = HugePages()
    for group in _groups(gpt):
        if config.tied and HEAD_NAME in group.shapes:
            _load_tied_head(gpt, weights, group, dtype=dtype, device=device)
        else:
            group.fill(weights.read(list(group.shapes)), dtype, device)
        if packed and not backend.triton and group.module is not gpt.lm_head:
            for module in group.module.modules():
                if isinstance(module, Linear):
                    module.pack(memory, native=backend.native)
    if packed:
        # Packs the head, which may share the embedding, and what depends on all weights.
        pack(gpt, memory)
    else:
        use_padding_plan(gpt, padding_plans(gpt)[0])
    return gpt


def _load_tied_head(
    gpt: GPT,
    weights: _CheckpointWeights,
    group: _Group,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Share the embedding's weight with the head; if the stored head differs, use that instead."""
    if _equals_embedding(weights, gpt.wte.weight):
        gpt.lm_head.tie(gpt.wte)
        return
    logger.warning(
        "%s: %s differs from %s and is used, though config.json says tie_word_embeddings: true",
        weights.folder,
        HEAD_NAME,
        EMBEDDING_NAME,
    )
    gpt.config = dataclasses.replace(gpt.config, tied=False)
    group.fill(weights.read([HEAD_NAME]), dtype, device)


class _CheckpointWeights:
    """The tensors of all files of a checkpoint under their plain names.

    Attributes:
        folder: Of the files.
        heads: Plain names of tensors that belong to heads beside the language model.
        prefix: Prefix of all names that no known wrapper adds; "" for none.
    """

    def __init__(self, files: list[Path]) -> None:
        self.folder = files[0].parent
        self._where: dict[str, tuple[TensorFile, str, Path]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.heads: list[str] = []
        opened = [(path, open_tensor_file(path)) for path in files]
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

    def warn_about_names(self) -> None:
        """Log a removed prefix and heads that are left out."""
        if self.prefix:
            logger.warning(
                "%s: the names of its tensors are taken without their prefix %s.",
                self.folder,
                self.prefix,
            )
        if self.heads:
            logger.warning(
                "%s: heads beside the language model are left out: %s",
                self.folder,
                describe_heads(self.heads),
            )

    def share(self, one: str, other: str) -> None:
        """Use one of two tensors for both names if only one is stored."""
        for there, missing in ((one, other), (other, one)):
            if there in self._where and missing not in self._where:
                self._where[missing], self._shapes[missing] = (
                    self._where[there],
                    self._shapes[there],
                )

    def same(self, one: str, other: str) -> bool:
        """Return whether both names mean the same stored tensor."""
        return self._where[one] == self._where[other]

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise ModelError unless exactly the expected tensors are stored, in these shapes."""
        missing = [name for name in expected if name not in self._where]
        extra = [name for name in self._where if name not in expected]
        if missing:
            where = self.folder
            if missing == [HEAD_NAME]:
                raise ModelError(
                    f"{where}: the checkpoint lacks {HEAD_NAME}, and config.json says "
                    "tie_word_embeddings: false; set it to true if the head is the token embedding"
                )
            found = (
                f"; it has {_list(extra)}, which GPT-2 with this config.json has not"
                f"{hint_for(extra)}"
                if extra
                else ""
            )
            raise ModelError(f"{where}: the checkpoint lacks the tensors {_list(missing)}{found}")
        if extra:
            path = self._where[extra[0]][2]
            raise ModelError(
                f"{path}: GPT-2 with this config.json has no tensors {_list(extra)}"
                f"{hint_for(extra, complete=True)}"
            )
        for name, shape in self._shapes.items():
            if shape != expected[name]:
                raise ModelError(
                    f"{self._where[name][2]}: tensor {name} has shape {shape}; "
                    f"config.json needs {expected[name]}"
                )

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Read the named tensors as they are stored."""
        tensors: dict[str, Tensor] = {}
        for file in {id(self._where[name][0]): self._where[name][0] for name in names}.values():
            stored = {self._where[name][1]: name for name in names if self._where[name][0] is file}
            for stored_name, tensor in file.read(list(stored)).items():
                name = stored[stored_name]
                if not tensor.is_floating_point():
                    raise ModelError(
                        f"{self._where[name][2]}: tensor {name} holds {tensor.dtype}, "
                        "not floating-point numbers"
                    )
                tensors[name] = tensor
        return tensors


class _Group:
    """Parameters of a module that are loaded together, with their names in the checkpoint."""

    def __init__(self, module: nn.Module, names: dict[str, tuple[str, bool]]) -> None:
        self.module, self.names = module, names
        self.shapes: dict[str, tuple[int, ...]] = {}
        for own, (name, transposed) in names.items():
            shape = tuple(module.get_parameter(own).shape)
            self.shapes[name] = shape[::-1] if transposed else shape

    def fill(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        """Cast, check and move the tensors, and set them as the module's parameters."""
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


def _equals_embedding(weights: _CheckpointWeights, embedding: Tensor) -> bool:
    """Return whether the head has the values of the embedding. A file may hold both."""
    if weights.same(EMBEDDING_NAME, HEAD_NAME):
        return True
    head = weights.read([HEAD_NAME])[HEAD_NAME].to(device=embedding.device, dtype=embedding.dtype)
    return torch.equal(head, embedding)


def _list(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:MAX_NAMES_SHOWN])
    hidden = len(names) - MAX_NAMES_SHOWN
    return f"{shown} and {hidden} more" if hidden > 0 else shown
