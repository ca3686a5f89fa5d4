"""Checkpoints as they are found: every form that loads, and every damage that must be named."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2LMHeadModel, GPT2Model

from gptbatch.pipeline.errors import ModelError
from gptbatch.pipeline.model.checkpoint import find_checkpoint
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.weights import load_gpt
from tests.conftest import random_model
from tests.paths import REPOSITORY

IDX = torch.arange(1, 41).view(2, 20)


def load(folder: Path, *, dtype: torch.dtype = torch.float32, allow_pickle: bool = False) -> GPT:
    checkpoint = find_checkpoint(str(folder), allow_pickle=allow_pickle)
    config = parse_config(checkpoint.config, str(checkpoint.config_path))
    return load_gpt(config, list(checkpoint.weights), dtype=dtype, device=torch.device("cpu"))


def expect_logits(
    folder: Path, theirs: GPT2LMHeadModel, *, tolerance: float = 1e-5, **settings: Any
) -> None:
    with torch.inference_mode():
        assert (load(folder, **settings)(IDX).float() - theirs(IDX).logits).abs().max() <= tolerance


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Save the tensors of a checkpoint again, changed."""
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def theirs() -> GPT2LMHeadModel:
    return random_model()


@pytest.fixture
def folder(tmp_path: Path, theirs: GPT2LMHeadModel) -> Path:
    theirs.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# Forms that load


def test_as_transformers_saves_it(folder: Path, theirs: GPT2LMHeadModel) -> None:
    assert any(name.startswith("transformer.") for name in load_file(folder / "model.safetensors"))
    expect_logits(folder, theirs)


def test_without_the_prefix_and_with_mask_buffers_as_the_first_gpt2_files_are(
    folder: Path, theirs: GPT2LMHeadModel
) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        bare = {
            name.removeprefix("transformer."): tensor
            for name, tensor in tensors.items()
            if name != "lm_head.weight"
        }
        for layer in range(2):
            bare[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
            bare[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return bare

    rewrite(folder, change)
    expect_logits(folder, theirs)


def test_mask_buffers_under_the_prefix_and_as_bytes(folder: Path, theirs: GPT2LMHeadModel) -> None:
    rewrite(
        folder,
        lambda tensors: (
            tensors | {"transformer.h.1.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8)}
        ),
    )
    expect_logits(folder, theirs)


def test_a_model_saved_without_its_head(tmp_path: Path, theirs: GPT2LMHeadModel) -> None:
    assert isinstance(theirs.transformer, GPT2Model)
    theirs.transformer.save_pretrained(tmp_path)
    expect_logits(tmp_path, theirs)


def test_an_untied_head(tmp_path: Path) -> None:
    untied = random_model(tie_word_embeddings=False)
    untied.save_pretrained(tmp_path)
    expect_logits(tmp_path, untied)


def test_sharded_files(tmp_path: Path, theirs: GPT2LMHeadModel) -> None:
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    expect_logits(tmp_path, theirs)


@pytest.mark.parametrize(("stored", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)])
def test_half_precision_files_are_cast(
    folder: Path, theirs: GPT2LMHeadModel, stored: torch.dtype, tolerance: float
) -> None:
    rewrite(folder, lambda tensors: {name: tensor.to(stored) for name, tensor in tensors.items()})
    loaded = load(folder)
    assert loaded.dtype == torch.float32
    rounded = random_model()
    for parameter in rounded.parameters():
        parameter.data = parameter.to(stored).float()
    expect_logits(folder, rounded)
    assert load(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    expect_logits(folder, theirs, dtype=torch.bfloat16, tolerance=0.2)


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_only_where_they_are_allowed(
    folder: Path, theirs: GPT2LMHeadModel, sharded: bool
) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if sharded:
        names = list(tensors)
        weight_map = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
        for shard in set(weight_map.values()):
            torch.save(
                {name: tensors[name] for name in names if weight_map[name] == shard}, folder / shard
            )
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"the weights are pickled \(pytorch_model\.bin\), which is refused"
    ):
        load(folder)
    expect_logits(folder, theirs, allow_pickle=True)


def test_pickles_that_would_run_code_are_refused_all_the_same(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "ran"

    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    torch.save({"wte.weight": Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: not a readable file of weights"):
        load(folder, allow_pickle=True)
    assert not marker.exists()


class Own:
    """An object of code of one's own."""


PICKLES: dict[str, tuple[Any, str]] = {
    "a whole model": (
        torch.nn.Linear(2, 2),
        (
            r"it needs torch\.nn\.modules\.linear\.Linear, .* "
            r"torch\.save\(model\.state_dict\(\), FILE\)"
        ),
    ),
    "arguments beside": (
        {"model": {"a": torch.ones(2)}, "args": Own()},
        r"it needs tests\.test_weights\.Own, and code .* is never run",
    ),
    "a trainer's": (
        {"model": {"a": torch.ones(2)}, "epoch": 3},
        r"'model': torch\.save\(torch\.load\(.*weights_only=True\)\['model'\]",
    ),
    "Lightning's": (
        {"epoch": 3, "state_dict": {"a": torch.ones(2)}},
        "which stand under 'state_dict'",
    ),
    "a text file": (
        b"Entry not found",
        r"not a readable file of weights \(Unsupported operand 69\)$",
    ),
    "a number": ({"a": torch.ones(2), "step": 5}, r"named tensors \('step' is of type int\)$"),
    "a list": ([torch.ones(2)], r"named tensors \(list\)$"),
}


@pytest.mark.parametrize("oldest", [False, True])
@pytest.mark.parametrize("name", PICKLES)
def test_pickles_of_other_things_say_how_to_save_the_weights(
    folder: Path, name: str, oldest: bool
) -> None:
    content, message = PICKLES[name]
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(
        content, path, _use_new_zipfile_serialization=not oldest
    )
    with pytest.raises(ModelError, match=message) as caught:
        load(folder, allow_pickle=True)
    assert str(caught.value).isprintable()


# Damage that is named


def drop(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def spoil(name: str, value: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name].view(-1)[-1] = value
        return tensors

    return change


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (drop("transformer.h.1.mlp.c_fc.bias"), r"lacks the tensors h\.1\.mlp\.c_fc\.bias"),
    "extra": (
        lambda t: t | {"transformer.h.2.ln_1.bias": torch.zeros(32)},
        r"has no tensors h\.2\.ln_1\.bias",
    ),
    "nearly a mask buffer": (
        lambda t: t | {"transformer.h.1.attn.bias_": torch.zeros(1)},
        r"has no tensors h\.1\.attn\.bias_",
    ),
    "misshapen": (
        lambda t: t | {"transformer.wpe.weight": torch.zeros(63, 32)},
        r"tensor wpe\.weight has shape \(63, 32\); config\.json needs \(64, 32\)",
    ),
    "transposed": (
        lambda t: t | {"transformer.h.0.mlp.c_fc.weight": t["transformer.h.0.mlp.c_fc.weight"].t()},
        r"tensor h\.0\.mlp\.c_fc\.weight has shape \(128, 32\); config\.json needs \(32, 128\)",
    ),
    "nan": (
        spoil("transformer.h.1.attn.c_proj.weight", float("nan")),
        r"tensor h\.1\.attn\.c_proj\.weight holds NaN or infinity",
    ),
    "infinity": (
        spoil("transformer.ln_f.bias", float("inf")),
        r"tensor ln_f\.bias holds NaN or infinity",
    ),
    "integers": (
        lambda t: t | {"transformer.ln_f.bias": torch.zeros(32, dtype=torch.int32)},
        r"tensor ln_f\.bias holds torch\.int32",
    ),
    "twice": (lambda t: t | {"ln_f.bias": torch.zeros(32)}, r"tensor ln_f\.bias is also in"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_tensors_are_named(folder: Path, name: str) -> None:
    change, message = DAMAGES[name]
    rewrite(folder, change)
    with pytest.raises(ModelError, match=message):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_cut_off_files(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a whole safetensors file"):
        load(folder)


def test_a_header_that_lies(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes((2**40).to_bytes(8, "little") + content[8:])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load(folder)
    path.write_bytes(content.replace(b'"shape":[64,32]', b'"shape":[64,99]'))
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load(folder)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "llama"}, "model_type is 'llama': only GPT-2"),
    "code": ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map is .* refused"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config is .* not supported"),
    "cross-attention": (
        {"add_cross_attention": True},
        "add_cross_attention is True: cross-attention is not supported",
    ),
    "activation": (
        {"activation_function": "mish"},
        "activation_function is 'mish': known are gelu",
    ),
    "heads": ({"n_head": 5}, "n_embd 32 is not a multiple of n_head 5"),
    "text for a number": ({"n_layer": "2"}, "n_layer is '2': a whole number"),
    "null for a switch": (
        {"scale_attn_weights": None},
        "scale_attn_weights is None: true or false",
    ),
    "epsilon": ({"layer_norm_epsilon": -1}, "layer_norm_epsilon is -1"),
    "no text": ({"activation_function": ["gelu"]}, r"activation_function is \['gelu'\]"),
    "a size beyond sense": ({"n_layer": 10**30}, "n_layer is 10+: a whole number from 1 to 4096"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_are_refused(folder: Path, name: str) -> None:
    changes, message = CONFIGS[name]
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert str(folder / "config.json") in str(caught.value)


def test_other_names_for_the_shape(folder: Path, theirs: GPT2LMHeadModel) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(
        json.dumps({**{k: v for k, v in content.items() if k != "n_embd"}, "hidden_size": 32})
    )
    expect_logits(folder, theirs)


def test_folders_that_are_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    for name, message in (
        (tmp_path / "no" / "where", "no such folder"),
        (folder / "config.json", "a file; name the folder"),
    ):
        with pytest.raises(ModelError, match=message):
            find_checkpoint(str(name))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor"):
        find_checkpoint(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=re.escape(str(folder))):
        find_checkpoint(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        find_checkpoint(str(folder))


def test_shards_that_are_missing_or_elsewhere(tmp_path: Path, theirs: GPT2LMHeadModel) -> None:
    theirs.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    first = min((tmp_path / "model").glob("model-*.safetensors"))
    index = tmp_path / "model" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shutil.copy(first, tmp_path / "outside.safetensors")
    outside = {**content["weight_map"], "wpe.weight": "../outside.safetensors"}
    index.write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(ModelError, match=r"is not the plain name of a \.safetensors file"):
        load(tmp_path / "model")
    index.write_text(json.dumps(content))
    first.unlink()
    with pytest.raises(ModelError, match=f"the shard {first.name} is missing"):
        load(tmp_path / "model")


def test_an_index_brings_no_pickle_in(tmp_path: Path, theirs: GPT2LMHeadModel) -> None:
    theirs.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "weights.bin")
    names = list(load_file(tmp_path / "model.safetensors"))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "weights.bin")})
    )
    with pytest.raises(
        ModelError, match=r"'weights\.bin' is not the plain name of a \.safetensors file"
    ):
        load(tmp_path)


def test_pickles_of_the_oldest_format(folder: Path, theirs: GPT2LMHeadModel) -> None:
    torch.save(
        load_file(folder / "model.safetensors"),
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    (folder / "model.safetensors").unlink()
    expect_logits(folder, theirs, allow_pickle=True)
    for content in ({1: torch.zeros(1)}, [torch.zeros(1)]):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(ModelError, match="not a plain dictionary of named tensors"):
            load(folder, allow_pickle=True)


def test_digests_follow_the_files(folder: Path) -> None:
    before = find_checkpoint(str(folder)).model_digest
    assert find_checkpoint(str(folder)).model_digest == before
    rewrite(folder, spoil("transformer.ln_f.bias", 0.123))
    assert find_checkpoint(str(folder)).model_digest != before


@pytest.mark.parametrize("stored", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_loading_holds_no_second_copy(tmp_path: Path, stored: str) -> None:
    """Peak memory while loading 130 MB is at most 1.3 times what stays resident."""
    model = random_model(n_layer=12, n_embd=384, n_head=6, vocab_size=20_000)
    model.to(getattr(torch, stored)).save_pretrained(tmp_path)
    program = f"""
import json, torch
from pathlib import Path
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.weights import load_gpt
def memory(key):  # of this process alone: ru_maxrss would count what its parent had
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
torch.ones(100, 100) @ torch.ones(100, 100)
before = memory("VmRSS")
folder = Path({str(tmp_path)!r})
config = parse_config(json.loads((folder / "config.json").read_text()), "config")
model = load_gpt(config, [folder / "model.safetensors"],
                 dtype=torch.float32, device=torch.device("cpu"))
print(json.dumps([before, memory("VmRSS"), memory("VmHWM")]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    before, after, peak = json.loads(done.stdout)
    assert after - before > 100e6, "the model is resident"
    assert peak - before <= 1.3 * (after - before)


# The hub


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache of hub downloads; the hub cannot be reached."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def cache_model(cache: Path, name: str, folder: Path) -> None:
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123456789abcdef")
    shutil.copytree(folder, repository / "snapshots" / "0123456789abcdef")


@pytest.mark.parametrize("name", ["gpt2", "someone/a-model"])
def test_a_hub_name_that_has_been_fetched(
    hub_cache: Path, folder: Path, theirs: GPT2LMHeadModel, name: str
) -> None:
    cache_model(hub_cache, name, folder)
    checkpoint = find_checkpoint(name)
    assert checkpoint.name == name
    config = parse_config(checkpoint.config, "config")
    gpt = load_gpt(
        config, list(checkpoint.weights), dtype=torch.float32, device=torch.device("cpu")
    )
    with torch.inference_mode():
        assert (gpt(IDX) - theirs(IDX).logits).abs().max() <= 1e-5


def test_a_hub_model_with_pickled_weights_only(hub_cache: Path, folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    cache_model(hub_cache, "someone/pickled", folder)
    with pytest.raises(ModelError, match="which is refused"):
        find_checkpoint("someone/pickled")
    assert (
        find_checkpoint("someone/pickled", allow_pickle=True).weights[0].name == "pytorch_model.bin"
    )


def test_a_hub_name_that_cannot_be_fetched(hub_cache: Path, folder: Path) -> None:
    with pytest.raises(
        ModelError,
        match="someone/nothing: no such folder, and the hub does not give a model of that name",
    ):
        find_checkpoint("someone/nothing")
    cache_model(hub_cache, "someone/a-model", folder)
    with pytest.raises(ModelError, match="the hub does not give a model"):
        find_checkpoint("someone/a-model", revision="v2")
