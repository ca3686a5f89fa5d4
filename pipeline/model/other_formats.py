"""Detects the format of a file or folder that is not a checkpoint, with advice."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ADAPTER_CONFIG = "adapter_config.json"
LFS_HEADER = b"version https://git-lfs.github.com/spec/"
# the limit of git lfs
MAX_LFS_POINTER_BYTES = 1024

_SOURCE = "take the checkpoint that it was made from"
_SAVE_AGAIN = "load it with the program that wrote it and save it with save_pretrained()"
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
_TRAINING_STEP = re.compile(r"checkpoint-(\d+)")
# files of a training program beside its checkpoint
_TRAINING_STATE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state.*|random_states.*)\.\w+"
)
# pattern of a file or folder name, format, advice; the first that matches is used
_FORMATS: tuple[tuple[str, str, str], ...] = (
    (r".+\.gguf", "a GGUF file ({}), which llama.cpp reads", _SOURCE),
    (r"(quantize|quant)_config\.json|gptq_model.*", "a quantized model ({})", _SOURCE),
    (
        r"modules\.json|config_sentence_transformers\.json",
        "a sentence-transformers model ({}), which gives embeddings and no text",
        "",
    ),
    (r"model_index\.json", "a diffusers pipeline ({}), which makes images and no text", ""),
    (
        r"zero_to_fp32\.py|global_step\d+|.*_optim_states\.pt",
        "shards of DeepSpeed ({})",
        "join them with zero_to_fp32.py",
    ),
    (
        r"pytorch_model_fsdp_\d+|.*\.distcp",
        "shards of FSDP ({})",
        "join them: accelerate merge-weights",
    ),
    (
        r"flax_model.*\.msgpack.*",
        "weights for Flax ({})",
        "load them with transformers 4 and from_flax=True, then save_pretrained()",
    ),
    (
        r"tf_model.*\.h5",
        "weights for TensorFlow ({})",
        "load them with transformers 4 and from_tf=True, then save_pretrained()",
    ),
    (
        r"model\.ckpt.*\.(index|meta)",
        "a TensorFlow checkpoint ({})",
        "convert it with transformers 4",
    ),
    (r".+\.onnx|onnx", "a model for ONNX ({})", _SOURCE),
    (
        r"openvino_.+\.xml|.+\.mlpackage|rust_model\.ot|.+\.tflite|model\.bin",
        "a model for another program ({})",
        _SOURCE,
    ),
    (
        r"ckpt.*\.pt",
        "a checkpoint of nanoGPT ({})",
        "copy its weights into a GPT2LMHeadModel and call save_pretrained()",
    ),
    (r".+\.ckpt|.+\.pth|.+\.pt", "a checkpoint of a training program ({})", _SAVE_AGAIN),
    (
        r"(model|pytorch_model)-\d+-of-\d+\.\w+",
        "shards of weights without their index ({})",
        "fetch the .index.json file, too",
    ),
    (
        r"model\..+\.safetensors",
        "weights of a variant ({})",
        "name the file model.safetensors to use it",
    ),
    (r"model\.safetensors|pytorch_model\.bin", "weights alone ({})", "fetch config.json, too"),
    (
        r".+\.safetensors|.+\.bin|.+\.npz",
        "weights of another name ({})",
        "a checkpoint holds them as model.safetensors",
    ),
)


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is a Git LFS pointer, whose content has not been fetched."""
    if path.stat().st_size > MAX_LFS_POINTER_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(LFS_HEADER)) == LFS_HEADER


def lfs_message(path: Path) -> str:
    """Return the message for a Git LFS pointer."""
    return (
        f"{path}: a Git LFS pointer, not the file itself: run git lfs pull in its repository, or "
        "fetch the checkpoint again"
    )


def describe_file(name: str, path: Path) -> str:
    """Return the message for a file where a folder is needed."""
    if path.is_file() and is_lfs_pointer(path):
        return lfs_message(path)
    if path.suffix in (".zip", ".tar", ".gz", ".tgz", ".zst", ".xz"):
        return f"{name}: an archive; unpack it and name the folder that holds config.json"
    if (path.parent / "config.json").is_file():
        return f"{name}: a file; name the folder that holds it: {path.parent}"
    found = _format((path.name,))
    return (
        f"{name}: {found}"
        if found
        else f"{name}: a file; name the folder that holds config.json and the weights"
    )


def describe_adapter(name: str, folder: Path) -> str | None:
    """Return the message for a folder with a PEFT adapter, None for other folders.

    transformers would load the adapter on top of its base model.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    if is_lfs_pointer(path):
        return lfs_message(path)
    content = _read(path)
    base, kind = content.get("base_model_name_or_path"), content.get("peft_type")
    what = (
        f"{name}: a PEFT adapter"
        + (f" ({kind})" if isinstance(kind, str) else "")
        + (f" of {base}" if isinstance(base, str) else "")
    )
    is_merged = (
        ""
        if not _has_model(folder)
        else f"; if the model beside it is to run as it is, merged already, remove {ADAPTER_CONFIG}"
    )
    if kind in ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"):
        return (
            f"{what}, of a kind that cannot be merged into its base model; gptbatch cannot run it"
            f"{is_merged}"
        )
    base = base if isinstance(base, str) else "BASE"
    return (
        f"{what}: merge it first: PeftModel.from_pretrained("
        f"AutoModelForCausalLM.from_pretrained({base!r}), {name!r})"
        f".merge_and_unload().save_pretrained('merged'), and save the tokenizer there{is_merged}"
    )


def _has_model(folder: Path) -> bool:
    """Return whether a folder has a config.json and weights of a model."""
    return (folder / "config.json").is_file() and any(
        _WEIGHTS.fullmatch(path.name) for path in folder.iterdir()
    )


def describe_folder(name: str, folder: Path, *, lacking: str) -> str:
    """Return the message for a folder that is not a checkpoint.

    Args:
        name: The folder in messages.
        folder: The folder.
        lacking: The sentence that names the missing file.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        return f"{name}: the folder cannot be read ({error.strerror})"
    if not entries:
        return f"{name}: the folder is empty"
    names = [entry.name for entry in entries if not _TRAINING_STATE.fullmatch(entry.name)]
    return f"{name}: {lacking}; " + (
        _training_run(name, entries)
        or _hub_cache(name, entries)
        or _format(names, before="it holds ")
        or _subfolder(name, entries)
        or _only_tokenizer(names)
        or "a checkpoint in the Hugging Face format is needed"
    )


def _training_run(name: str, entries: Iterable[Path]) -> str | None:
    """Name the newest checkpoint of a run of transformers' Trainer that has a config.json."""
    steps = [
        (int(match[1]), entry)
        for entry in entries
        if (match := _TRAINING_STEP.fullmatch(entry.name)) and entry.is_dir()
    ]
    if not steps:
        return None
    _, newest = max(steps, key=lambda step: ((step[1] / "config.json").is_file(), step[0]))
    return (
        f"it is a training run with {len(steps)} checkpoint{'s' if len(steps) > 1 else ''}; "
        f"name one of them: {Path(name) / newest.name}"
    )


def _hub_cache(name: str, entries: list[Path]) -> str | None:
    """Name the newest snapshot of a model in the cache of the hub, or a model of the cache."""
    snapshots = [
        entry
        for path in entries
        if path.name == "snapshots" and path.is_dir()
        for entry in path.iterdir()
        if entry.is_dir()
    ]
    if snapshots:
        newest = max(snapshots, key=lambda snapshot: snapshot.stat().st_mtime_ns)
        return (
            "it is a model in the hub's cache; name its snapshot: "
            f"{Path(name) / 'snapshots' / newest.name}"
        )
    models = [
        entry.name.removeprefix("models--").replace("--", "/")
        for entry in entries
        if entry.name.startswith("models--")
    ]
    return f"it is the hub's cache; name a model of it: {models[0]}" if models else None


def _format(names: Iterable[str], before: str = "") -> str | None:
    names = list(names)
    for pattern, what, advice in _FORMATS:
        found = next((name for name in names if re.fullmatch(pattern, name)), None)
        if found is not None:
            return before + what.format(found) + (f"; {advice}" if advice else "")
    return None


def _subfolder(name: str, entries: Iterable[Path]) -> str | None:
    found = next((entry for entry in entries if (entry / "config.json").is_file()), None)
    return (
        None if found is None else f"the folder inside has one; name it: {Path(name) / found.name}"
    )


def _only_tokenizer(names: Iterable[str]) -> str | None:
    return (
        "it holds a tokenizer and no model"
        if {"tokenizer.json", "vocab.json", "vocab.txt", "tokenizer_config.json"} & set(names)
        else None
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
