"""Checkpoints of common kinds: end tokens, heads, prefixes, and files in other formats."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file
from transformers import GPT2LMHeadModel

from gptbatch.jobs.cli import run_command
from gptbatch.pipeline import JobConfig, run_job
from gptbatch.pipeline.config import EngineConfig
from gptbatch.pipeline.errors import ModelError, StorageError
from gptbatch.pipeline.model.checkpoint import find_checkpoint
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.generation_config import SpecialTokens
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.weights import load_gpt
from tests.tiny_checkpoints import (
    HI,
    OTHER_STOP,
    STOP,
    VOCAB_SIZE,
    Tensors,
    random_tensors,
    write_checkpoint,
)

DEFAULTS = 50256
IDX = torch.arange(1, 41).view(2, 20)


def load(folder: Path) -> GPT:
    checkpoint = find_checkpoint(str(folder))
    config = parse_config(checkpoint.config, str(checkpoint.config_path))
    return load_gpt(
        config,
        list(checkpoint.weights),
        dtype=torch.float32,
        device=torch.device("cpu"),
        packed=False,
    )


def expect_as_transformers(folder: Path) -> None:
    """Compare the logits with those of transformers' GPT2LMHeadModel."""
    with torch.inference_mode():
        theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
        assert (load(folder)(IDX) - theirs(IDX).logits).abs().max() <= 1e-5


def run(model: Path, folder: Path, prompts: list[str], **settings: Any) -> list[dict[str, Any]]:
    """Return the rows of a greedy run of eight tokens."""
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    engine = EngineConfig(attention="padded", threads=1)
    settings = {
        "temperature": 0.0,
        "max_new_tokens": 8,
        "batch_invariance": "off",
        "engine": engine,
        **settings,
    }
    run_job(JobConfig(model=str(model), input=str(source), output=str(folder / "out"), **settings))
    rows: list[dict[str, Any]] = pq.read_table(folder / "out" / "part-000000.parquet").to_pylist()
    return rows


# -- start and end tokens --

# eos_token_id of config.json (... leaves the key out), content of generation_config.json -> the end
# tokens, those left out
ENDS: dict[str, tuple[Any, dict[str, Any] | None, tuple[int, ...], tuple[int, ...]]] = {
    "one": (0, None, (0,), ()),
    "null": (None, None, (), ()),
    "no key": (..., None, (), ()),
    "a list": ([0, STOP], None, (0, STOP), ()),
    "an empty list": ([], None, (), ()),
    "repeats": ([STOP, 0, STOP], {"eos_token_id": [0, STOP]}, (STOP, 0), ()),
    "one more in generation_config.json": (0, {"eos_token_id": STOP}, (0, STOP), ()),
    "a list in generation_config.json": (
        0,
        {"eos_token_id": [0, STOP, OTHER_STOP]},
        (0, STOP, OTHER_STOP),
        (),
    ),
    "only in generation_config.json": (..., {"eos_token_id": STOP}, (STOP,), ()),
    "generation_config.json says null": (STOP, {"eos_token_id": None}, (STOP,), ()),
    "the defaults of GPT2Config": (DEFAULTS, {"eos_token_id": DEFAULTS}, (), (DEFAULTS,)),
    "one beyond": (VOCAB_SIZE, None, (), (VOCAB_SIZE,)),
    "minus one": (-1, {"eos_token_id": [STOP, -1]}, (STOP,), (-1,)),
    "some beyond": ([0, DEFAULTS, STOP], None, (0, STOP), (DEFAULTS,)),
}


@pytest.mark.parametrize("name", ENDS)
def test_end_tokens_of_both_files(tmp_path: Path, name: str) -> None:
    config_eos, generation, ends, left_out = ENDS[name]
    checkpoint = find_checkpoint(
        str(
            write_checkpoint(
                tmp_path / "model", config={"eos_token_id": config_eos}, generation=generation
            )
        )
    )
    assert (checkpoint.special_tokens.eos_token_ids, checkpoint.special_tokens.ends_left_out) == (
        ends,
        left_out,
    )
    warnings = checkpoint.generation_warnings
    assert len(warnings) == bool(left_out)
    for token in left_out:
        assert f"{token}" in warnings[0]
        assert "is not in the vocabulary (vocab_size 260) and is left out" in warnings[0]
    if left_out and not ends:
        assert "no token ends a row" in warnings[0]


@pytest.mark.parametrize(
    ("config_bos", "generation_bos", "start"),
    [
        (0, ..., 0),
        (0, 3, 3),
        (None, ..., None),
        (5, None, 5),
        (DEFAULTS, ..., None),
        (7, DEFAULTS, 7),
        (-1, ..., None),
        (..., ..., None),
    ],
)
def test_the_start_token(
    tmp_path: Path, config_bos: Any, generation_bos: Any, start: int | None
) -> None:
    generation = {} if generation_bos is ... else {"bos_token_id": generation_bos}
    folder = write_checkpoint(
        tmp_path / "model", config={"bos_token_id": config_bos}, generation=generation
    )
    assert find_checkpoint(str(folder)).special_tokens.start == start


@pytest.mark.parametrize(
    ("vocab_size", "tokens"), [(50257, (DEFAULTS, (DEFAULTS,))), (50256, (None, ()))]
)
def test_default_special_tokens_of_gpt2(tmp_path: Path, vocab_size: int, tokens: Any) -> None:
    config = {"vocab_size": vocab_size, "bos_token_id": ..., "eos_token_id": ...}
    special = find_checkpoint(
        str(write_checkpoint(tmp_path / "model", config=config))
    ).special_tokens
    assert (special.start, special.eos_token_ids) == tokens


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", "2"),
        ("eos_token_id", True),
        ("eos_token_id", [1, 2.0]),
        ("eos_token_id", {"a": 1}),
        ("bos_token_id", [0]),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_invalid_token_ids_are_named(tmp_path: Path, file: str, key: str, value: Any) -> None:
    changes: dict[str, Any] = {"config" if file == "config.json" else "generation": {key: value}}
    folder = write_checkpoint(tmp_path / "model", **changes)
    with pytest.raises(ModelError, match=rf"{file}: {key} is .*: a token id.* or null is needed"):
        _ = find_checkpoint(str(folder)).special_tokens


CHATS: dict[str, tuple[Any, dict[str, Any] | None]] = {
    "a list": (0, {"bos_token_id": 0, "eos_token_id": [0, STOP], "pad_token_id": 0}),
    "a single one": (0, {"bos_token_id": 0, "eos_token_id": STOP}),
    "a list in config.json": ([0, STOP], None),
}


@pytest.mark.parametrize("name", CHATS)
def test_completions_end_at_the_tokens_of_transformers(tmp_path: Path, name: str) -> None:
    eos, generation = CHATS[name]
    folder = write_checkpoint(
        tmp_path / "model",
        config={"eos_token_id": eos},
        generation=generation,
        script=[HI, HI, HI, STOP],
    )
    row, longer = run(folder, tmp_path, ["hihi", "hihihi"])
    assert (row["finish_reason"], row["stop_reason"], row["completion"]) == (
        "stop",
        "end_of_text",
        "hihi",
    )
    assert row["completion_token_ids"] == [HI, HI, STOP]
    assert longer["completion_token_ids"] == [HI, STOP]
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    idx = torch.tensor([[HI, HI]])
    out = theirs.generate(
        idx, attention_mask=torch.ones_like(idx), do_sample=False, max_new_tokens=8, pad_token_id=0
    )[0]
    assert out[2:].tolist() == row["completion_token_ids"]


def test_ignore_eos_continues_after_end_tokens(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "model", generation={"eos_token_id": [0, STOP]}, script=[HI, STOP]
    )
    (row,) = run(folder, tmp_path, ["hi"], ignore_eos=True)
    assert row["completion_token_ids"] == [HI, STOP] * 4
    assert row["stop_reason"] == "max_new_tokens"


@pytest.mark.parametrize(
    "ids",
    [
        {"eos_token_id": DEFAULTS, "bos_token_id": DEFAULTS},
        {"eos_token_id": VOCAB_SIZE},
        {"eos_token_id": -1},
    ],
)
def test_end_tokens_outside_of_the_vocabulary_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ids: dict[str, int]
) -> None:
    folder = write_checkpoint(tmp_path / "model", config=ids)
    with caplog.at_level(logging.WARNING):
        (row,) = run(folder, tmp_path, ["hi"])
    assert row["completion_tokens"] == 8
    (warning,) = [
        record.getMessage() for record in caplog.records if "eos_token_id" in record.getMessage()
    ]
    assert f"eos_token_id {ids['eos_token_id']} is not in the vocabulary" in warning


def test_another_end_token_is_another_job(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "model", generation={"eos_token_id": 0, "temperature": 0.5}, script=[HI, STOP]
    )
    run(folder, tmp_path, ["hi"])
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 0, "temperature": 0.7})
    )
    run(folder, tmp_path, ["hi"])  # a setting that is not followed changes nothing
    assert run_command(["verify", str(tmp_path / "out")]) == 0
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": STOP}))
    with pytest.raises(Exception, match=r"end_tokens: \[0\] there, \[0, 258\] here"):
        run(folder, tmp_path, ["hi"])
    assert run_command(["verify", str(tmp_path / "out")]) == 78


# -- generation settings that are not followed --

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = {
    "as the hub's gpt2": (
        {},
        {
            "_from_model_config": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "transformers_version": "4.26.0",
        },
        {},
    ),
    "defaults written out": (
        {"top_k": 50, "max_length": 20, "do_sample": False},
        {"temperature": 1.0, "suppress_tokens": []},
        {},
    ),
    "a chat model": (
        {},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "use_cache": True},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    ),
    "in config.json": (
        {"repetition_penalty": 1.2, "resid_pdrop": 0.1},
        None,
        {"repetition_penalty": 1.2},
    ),
    "generation_config.json wins": ({"top_p": 0.5}, {"top_p": 0.9}, {"top_p": 0.9}),
    "forced and suppressed": (
        {},
        {
            "forced_bos_token_id": 3,
            "suppress_tokens": [1, 2],
            "begin_suppress_tokens": [220],
            "max_length": 64,
        },
        {
            "forced_bos_token_id": 3,
            "suppress_tokens": [1, 2],
            "begin_suppress_tokens": [220],
            "max_length": 64,
        },
    ),
    "unknown": ({"my_key": 1}, {"a_later_setting": 2}, {"a_later_setting": 2}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_not_applied_are_one_line(tmp_path: Path, name: str) -> None:
    config, generation, expected = SETTINGS[name]
    checkpoint = find_checkpoint(
        str(write_checkpoint(tmp_path / "model", config=config, generation=generation))
    )
    assert checkpoint.settings_not_followed == expected
    warnings = checkpoint.generation_warnings
    assert len(warnings) == bool(expected)
    for key, value in expected.items():
        assert f"{key} {json.dumps(value)}" in warnings[0]


def test_a_long_setting_is_shortened(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", generation={"suppress_tokens": list(range(1000))})
    (warning,) = find_checkpoint(str(folder)).generation_warnings
    assert len(warning) < 300


# -- heads, prefixes, constants, types --

ONE = np.full((2, 32), 0.5, np.float32)

# tensors beside those of the network, architectures -> the heads that are named
HEADS: dict[str, tuple[Tensors, str, str]] = {
    "trl": (
        {"v_head.summary.weight": ONE, "v_head.summary.bias": ONE},
        "GPT2HeadWithValueModel",
        r"v_head \(2 tensors\)",
    ),
    "two heads": (
        {"multiple_choice_head.summary.weight": ONE},
        "GPT2DoubleHeadsModel",
        r"multiple_choice_head \(1 tensor\)",
    ),
    "classifier": ({"score.weight": ONE}, "GPT2ForSequenceClassification", r"score \(1 tensor\)"),
    "tokens": (
        {"classifier.weight": ONE, "classifier.bias": ONE},
        "GPT2ForTokenClassification",
        r"classifier \(2 tensors\)",
    ),
    "answers": ({"qa_outputs.weight": ONE}, "GPT2ForQuestionAnswering", r"qa_outputs \(1 tensor\)"),
    "ILQL": (
        {"ilql_heads.q_heads.0.0.weight": ONE, "ilql_heads.v_head.0.weight": ONE},
        "GPT2LMHeadModel",
        r"ilql_heads \(2 tensors\)",
    ),
    "Medusa": (
        {"medusa_head.0.0.linear.weight": ONE},
        "GPT2LMHeadModel",
        r"medusa_head \(1 tensor\)",
    ),
    "two at once": (
        {"v_head.weight": ONE, "score.weight": ONE},
        "GPT2LMHeadModel",
        r"score \(1 tensor\), v_head \(1 tensor\)",
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_beside_the_language_model_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    extra, architecture, message = HEADS[name]
    folder = write_checkpoint(
        tmp_path / "model",
        config={"architectures": [architecture]},
        tensors=random_tensors() | extra,
    )
    expect_as_transformers(folder)
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "gptbatch"]
    assert re.search(f"heads beside the language model are left out: {message}", warning)


PREFIXES = (
    "",
    "transformer.",
    "module.transformer.",
    "module.",
    "_orig_mod.transformer.",
    "model.transformer.",
    "_orig_mod.module.transformer.",
    "pretrained_model.transformer.",
    "base_model.model.transformer.",
    "_fsdp_wrapped_module.transformer._fsdp_wrapped_module.",
    "transformer._orig_mod.",
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prefix: str
) -> None:
    tensors = {
        prefix + name.removeprefix("transformer."): tensor
        for name, tensor in random_tensors().items()
    }
    with torch.inference_mode():
        ours = load(write_checkpoint(tmp_path / "model", tensors=tensors))(IDX)
        assert torch.equal(ours, load(write_checkpoint(tmp_path / "plain"))(IDX))
    assert not caplog.records


OTHER_PREFIXES = (
    "student.transformer.",
    "_forward_module.model.transformer.",
    "policy.",
    "net.",
    "backbone.",
    "decoder.",
    "lm.transformer.",
    "gpt2.",
    "module.agent.gpt.transformer.",
    "model._orig_mod.my_model.",
)


@pytest.mark.parametrize("prefix", OTHER_PREFIXES)
def test_an_unknown_common_prefix_is_removed_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prefix: str
) -> None:
    tensors = {
        prefix + name.removeprefix("transformer."): tensor
        for name, tensor in random_tensors().items()
    }
    first = prefix.split("transformer.")[0]
    tensors |= {
        f"{first}lm_head.weight": tensors[f"{prefix}wte.weight"].copy(),
        f"{first}v_head.weight": ONE,
    }
    with torch.inference_mode():
        ours = load(write_checkpoint(tmp_path / "model", tensors=tensors))(IDX)
        assert torch.equal(ours, load(write_checkpoint(tmp_path / "plain"))(IDX))
    taken, heads = [record.getMessage() for record in caplog.records if record.name == "gptbatch"]
    assert "the names of its tensors are taken without their prefix" in taken
    assert "v_head (1 tensor)" in heads


def test_two_models_in_one_file_are_rejected(tmp_path: Path) -> None:
    tensors = {
        name.replace("transformer.", f"{model}.transformer."): tensor
        for name, tensor in random_tensors().items()
        for model in ("student", "teacher")
    }
    with pytest.raises(
        ModelError,
        match=(
            r"they are 2 models, student\.transformer and teacher\.transformer: "
            "save one of them alone"
        ),
    ):
        load(write_checkpoint(tmp_path / "model", tensors=tensors))


def test_a_prefix_of_a_part_of_the_names_is_no_wrapper(tmp_path: Path) -> None:
    tensors = random_tensors(prefix="student.")
    tensors["ln_f.weight"] = tensors.pop("student.ln_f.weight")
    del tensors["student.h.1.ln_1.bias"]
    with pytest.raises(ModelError, match=r"lacks the tensors h\.1\.ln_1\.bias$"):
        load(write_checkpoint(tmp_path / "model", tensors=tensors))


def test_wrappers_inside_names(tmp_path: Path) -> None:
    tensors = {
        name.replace("h.1.", "h.1._checkpoint_wrapped_module."): tensor
        for name, tensor in random_tensors().items()
    }
    load(write_checkpoint(tmp_path / "model", tensors=tensors))


CONSTANTS: dict[str, Tensors] = {
    "masks": {
        "transformer.h.0.attn.bias": np.ones((1, 1, 64, 64), np.uint8),
        "transformer.h.1.attn.masked_bias": np.array(-1e4, np.float32),
    },
    "positions": {"transformer.position_ids": np.arange(64), "position_ids": np.arange(64)},
    "frequencies": {"transformer.h.0.attn.rotary_emb.inv_freq": np.ones(4, np.float32)},
    "no prefix": {"h.0.attn.bias": np.ones((1, 1, 64, 64), np.bool_)},
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_of_old_checkpoints_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    expect_as_transformers(
        write_checkpoint(tmp_path / "model", tensors=random_tensors() | CONSTANTS[name])
    )
    assert not [record for record in caplog.records if record.name == "gptbatch"]


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_float_types(tmp_path: Path, dtype: type[Any]) -> None:
    tensors = {name: tensor.astype(dtype) for name, tensor in random_tensors().items()}
    expect_as_transformers(
        write_checkpoint(
            tmp_path / "model",
            config={"torch_dtype": "float16", "dtype": "float64"},
            tensors=tensors,
        )
    )


def test_safetensors_without_metadata(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    save_file(random_tensors(), folder / "model.safetensors")
    expect_as_transformers(folder)


# the head that is stored, what config.json says of it -> whether a warning is said
STORED_HEADS: dict[str, tuple[str, bool, bool]] = {
    "the same": ("same", True, False),
    "another": ("other", True, True),
    "another, as config.json says": ("other", False, False),
    "instead of the embedding": ("alone", True, False),
}


@pytest.mark.parametrize("name", STORED_HEADS)
def test_a_stored_head(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    head, tied, warns = STORED_HEADS[name]
    tensors = random_tensors()
    embedding = tensors["transformer.wte.weight"]
    tensors["lm_head.weight"] = embedding[::-1].copy() if head == "other" else embedding.copy()
    if head == "alone":
        del tensors["transformer.wte.weight"]
    expect_as_transformers(
        write_checkpoint(tmp_path / "model", config={"tie_word_embeddings": tied}, tensors=tensors)
    )
    warnings = [record.getMessage() for record in caplog.records if record.name == "gptbatch"]
    assert len(warnings) == warns
    assert all(
        "lm_head.weight differs from wte.weight and is used" in warning for warning in warnings
    )


# tensors that are added or (with None) left out, config.json -> what is said
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no head": (
        {},
        {"tie_word_embeddings": False},
        "lacks lm_head.weight, and config.json says tie_word_embeddings: false",
    ),
    "neither head nor embedding": (
        {"transformer.wte.weight": None},
        {},
        "lacks the tensors lm_head.weight, wte.weight",
    ),
    "an adapter inside": (
        {"transformer.h.0.attn.c_attn.lora_A.weight": ONE},
        {},
        r"lora_A\.weight; a LoRA adapter .* merge_and_unload",
    ),
    "a wrapped base layer": (
        {
            "transformer.h.0.attn.c_attn.weight": None,
            "transformer.h.0.attn.c_attn.base_layer.weight": ONE,
        },
        {},
        "merge_and_unload",
    ),
    "GPTQ": (
        {"transformer.h.0.attn.c_attn.qweight": ONE},
        {},
        "quantized weights are not supported",
    ),
    "bitsandbytes": (
        {"transformer.h.0.attn.c_attn.weight.absmax": ONE},
        {},
        "quantized weights are not supported",
    ),
    "cross-attention": (
        {"transformer.h.0.crossattention.c_attn.weight": ONE},
        {},
        "cross-attention is not supported",
    ),
    "a head of one's own": (
        {"my_head.weight": ONE},
        {},
        r"has no tensors my_head\.weight; where .* without them \(heads that are known",
    ),
    "a bias of the head": (
        {"lm_head.bias": ONE[0]},
        {},
        r"has no tensors lm_head\.bias; where the language model does not need them",
    ),
    "another model": (
        {"reward.wte.weight": ONE, "reward.ln_f.bias": ONE},
        {},
        r"reward\.ln_f\.bias, reward\.wte\.weight; where the",
    ),
    "two of a name": ({"wte.weight": ONE}, {}, "wte.weight is also in"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unknown_tensors_are_rejected_by_name(tmp_path: Path, name: str) -> None:
    changes, config, message = REFUSED[name]
    tensors = {
        key: tensor for key, tensor in (random_tensors() | changes).items() if tensor is not None
    }
    with pytest.raises(ModelError, match=message):
        load(write_checkpoint(tmp_path / "model", config=config, tensors=tensors))


# -- config.json without a model_type --

ARCHITECTURES = [
    "GPT2LMHeadModel",
    "GPT2Model",
    "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification",
    "GPT2HeadWithValueModel",
]


@pytest.mark.parametrize("architectures", [*([name] for name in ARCHITECTURES), None, ..., []])
def test_no_model_type(tmp_path: Path, architectures: Any) -> None:
    expect_as_transformers(
        write_checkpoint(
            tmp_path / "model", config={"model_type": ..., "architectures": architectures}
        )
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_neo"}, "model_type is 'gpt_neo': only GPT-2"),
        (
            {"model_type": "llama", "architectures": ["GPT2LMHeadModel"]},
            "model_type is 'llama': only GPT-2",
        ),
        (
            {"model_type": ..., "architectures": ["LlamaForCausalLM"]},
            r"architectures is \['LlamaForCausalLM'\]: only GPT-2",
        ),
        (
            {"model_type": ..., "architectures": ["GPT2Tokenizer", 5]},
            "architectures is .*: only GPT-2",
        ),
        ({"model_type": ..., "architectures": ..., "n_embd": ...}, "model_type is missing"),
        ({"model_type": 5}, "model_type is 5: only GPT-2"),
    ],
)
def test_other_architectures_are_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load(write_checkpoint(tmp_path / "model", config=changes))


# -- folders and files of another kind --

# the files of a folder and their content ("" ends a folder's name in /) -> what is said
OTHERS: dict[str, tuple[dict[str, str], str]] = {
    "an empty folder": ({}, "the folder is empty"),
    "a LoRA adapter": (
        {
            "adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "gpt2"}',
            "adapter_model.safetensors": "x",
        },
        (
            r"a PEFT adapter \(LORA\) of gpt2: merge it first: "
            r"PeftModel\.from_pretrained\(.*'gpt2'.*merge_and_unload\(\)\.save_pretrained"
        ),
    ),
    "an adapter that says nothing": (
        {"adapter_config.json": "{}", "adapter_model.bin": "x"},
        "a PEFT adapter: merge it first",
    ),
    "an adapter with its base": (
        {"adapter_config.json": "[", "config.json": "{}", "model.safetensors": "x"},
        "a PEFT adapter: merge",
    ),
    "an adapter beside a merged model": (
        {
            "adapter_config.json": '{"peft_type": "LORA"}',
            "config.json": "{}",
            "model.safetensors": "x",
        },
        (
            r"a PEFT adapter \(LORA\): merge it first.*; "
            r"if the model beside it .*, merged already, remove adapter_config\.json$"
        ),
    ),
    "a soft prompt beside a model": (
        {
            "adapter_config.json": '{"peft_type": "P_TUNING"}',
            "config.json": "{}",
            "model-00001-of-00002.safetensors": "x",
        },
        r"cannot be merged .* remove adapter_config\.json$",
    ),
    "an adapter beside a config": (
        {"adapter_config.json": "{}", "config.json": "{}", "adapter_model.bin": ""},
        "the tokenizer there$",
    ),
    "a soft prompt": (
        {"adapter_config.json": '{"peft_type": "PROMPT_TUNING"}'},
        "of a kind that cannot be merged",
    ),
    "a training run": (
        {"checkpoint-500/": "", "checkpoint-1000/": ""},
        "a training run with 2 checkpoints; .*/checkpoint-1000$",
    ),
    "a training run of one": (
        {"checkpoint-500/": ""},
        "a training run with 1 checkpoint; name one of them: .*/checkpoint-500$",
    ),
    "a training run whose last is not whole": (
        {"checkpoint-500/config.json": "{}", "checkpoint-1000/": ""},
        "/checkpoint-500$",
    ),
    "a training run with config": (
        {"config.json": "{}", "checkpoint-7/config.json": "{}"},
        "neither model.* run .*/checkpoint-7$",
    ),
    "GGUF": ({"gpt2.Q4_K_M.gguf": "GGUF", "README.md": "x"}, r"a GGUF file \(gpt2\.Q4_K_M\.gguf\)"),
    "GGUF with a config": (
        {"config.json": "{}", "model.gguf": "GGUF"},
        r"neither model\.safetensors .* it holds a GGUF file",
    ),
    "ONNX": (
        {"config.json": "{}", "decoder_model.onnx": "x"},
        r"a model for ONNX \(decoder_model\.onnx\)",
    ),
    "ONNX in a folder": (
        {"config.json": "{}", "onnx/model.onnx": "x"},
        r"a model for ONNX \(onnx\)",
    ),
    "Flax in shards": (
        {"config.json": "{}", "flax_model-00001-of-00002.msgpack": "x"},
        "weights for Flax",
    ),
    "Flax": (
        {"config.json": "{}", "flax_model.msgpack": "x"},
        "weights for Flax .* from_flax=True, then save_pretrained",
    ),
    "TensorFlow": (
        {"config.json": "{}", "tf_model.h5": "x"},
        "weights for TensorFlow .* from_tf=True",
    ),
    "OpenAI's own": (
        {"model.ckpt.index": "x", "model.ckpt.data-00000-of-00001": "x", "hparams.json": "{}"},
        "a TensorFlow checkpoint",
    ),
    "CTranslate2": ({"config.json": "{}", "model.bin": "x"}, "a model for another program"),
    "DeepSpeed": (
        {"config.json": "{}", "zero_to_fp32.py": "", "global_step9/": ""},
        "shards of DeepSpeed .* zero_to_fp32.py",
    ),
    "FSDP": (
        {"config.json": "{}", "pytorch_model_fsdp_0/__0_0.distcp": ""},
        "shards of FSDP .* accelerate merge-weights",
    ),
    "nanoGPT": ({"ckpt.pt": "x"}, "a checkpoint of nanoGPT"),
    "Lightning": ({"epoch=3.ckpt": "x"}, r"a checkpoint of a training program \(epoch=3\.ckpt\)"),
    "GPTQ": (
        {"config.json": "{}", "quantize_config.json": "{}", "gptq_model-4bit.safetensors": "x"},
        "a quantized model",
    ),
    "sentence-transformers": (
        {"modules.json": "[]", "README.md": ""},
        "a sentence-transformers model .* embeddings and no text",
    ),
    "the hub's folder of a model": (
        {"snapshots/0ab1/config.json": "{}", "refs/main": "0ab1"},
        "name its snapshot: .*/snapshots/0ab1$",
    ),
    "the hub's cache": (
        {"models--openai-community--gpt2/": ""},
        "the hub's cache; name a model of it: openai-community/gpt2",
    ),
    "a folder around it": (
        {"model/config.json": "{}", "model/pytorch_model.bin": "x"},
        "the folder inside has one; name it: .*/model$",
    ),
    "shards alone": (
        {"config.json": "{}", "model-00001-of-00002.safetensors": "x"},
        r"without their index .*\.index\.json",
    ),
    "a variant": (
        {"config.json": "{}", "model.fp16.safetensors": "x"},
        r"name the file model\.safetensors",
    ),
    "weights alone": (
        {"model.safetensors": "x"},
        r"no config\.json; it holds weights alone .* fetch config\.json, too",
    ),
    "a tokenizer": (
        {"tokenizer.json": "{}", "tokenizer_config.json": "{}"},
        "a tokenizer and no model",
    ),
    "what is left of training": (
        {"config.json": "{}", "optimizer.pt": "x", "training_args.bin": "x"},
        "a checkpoint in the Hugging",
    ),
    "something else": (
        {"notes.txt": "x"},
        r"the folder has no config\.json; a checkpoint in the Hugging Face format is needed",
    ),
}


def write_files(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(exist_ok=True) if name.endswith("/") else path.write_text(content)
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_folders_in_other_formats(tmp_path: Path, name: str) -> None:
    files, message = OTHERS[name]
    with pytest.raises(ModelError, match=message) as caught:
        find_checkpoint(str(write_files(tmp_path / "model", files)))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "model") in str(caught.value)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.gguf", "model.gguf: a GGUF file"),
        ("model.safetensors", r"a file; name the folder that holds it: .*/model$"),
        ("config.json", r"a file; name the folder that holds it: .*/model$"),
        ("model.zip", "an archive; unpack it"),
        ("notes.txt", "a file; name the folder that holds it"),
    ],
)
def test_a_file_in_place_of_a_folder(tmp_path: Path, file: str, message: str) -> None:
    write_files(tmp_path / "model", {"config.json": "{}", file: "x"})
    if file == "model.gguf":
        (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ModelError, match=message):
        find_checkpoint(str(tmp_path / "model" / file))


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 548105171\n"


@pytest.mark.parametrize(
    "file",
    [
        "adapter_config.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "model.safetensors",
        "model.safetensors.index.json",
        "shard",
        "pytorch_model.bin",
    ],
)
def test_git_lfs_pointers_are_named(tmp_path: Path, file: str) -> None:
    folder = write_checkpoint(tmp_path / "model", generation={})
    if file == "shard":
        file = "model-00002-of-00002.safetensors"
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        weight_map = {"a": "model-00001-of-00002.safetensors", "b": file}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    elif file.endswith((".index.json", ".bin")):
        (folder / "model.safetensors").unlink()
    (folder / file).write_text(POINTER)
    with pytest.raises(
        ModelError, match=f"{file}: a Git LFS pointer, not the file itself: run git lfs pull"
    ):
        find_checkpoint(str(folder), allow_pickle=True)


@pytest.mark.parametrize(
    "file",
    ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"],
)
def test_a_pickle_that_is_an_lfs_pointer(tmp_path: Path, file: str) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / file).write_text(POINTER)
    with pytest.raises(ModelError, match=f"{file}: a Git LFS pointer"):
        find_checkpoint(str(folder))


def test_an_lfs_pointer_that_is_not_read(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    write_files(folder, {"pytorch_model.bin": POINTER, "flax_model.msgpack": POINTER})
    load(folder)


def test_an_lfs_pointer_in_place_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a Git LFS pointer"):
        find_checkpoint(
            str(write_files(tmp_path, {"model.safetensors": POINTER}) / "model.safetensors")
        )


# -- disks that fail --


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"]
)
def test_a_failing_disk_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    folder = write_checkpoint(tmp_path / "model", generation={})
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
    opened = Path.open

    class Failing(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def readinto(self, buffer: Any, /) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(
        Path,
        "open",
        lambda path, *args, **kw: (
            Failing(path) if path == folder / file else opened(path, *args, **kw)
        ),
    )
    arguments = [
        "--model",
        folder,
        "--input",
        tmp_path / "prompts.jsonl",
        "--output",
        tmp_path / "out",
    ]
    assert run_command(["generate", *map(str, arguments)]) == 74
    assert f"{folder / file}: cannot be read (Input/output error)" in capsys.readouterr().err


# -- check-model --


@pytest.mark.parametrize("name", CHATS)
def test_check_model_compares_end_tokens_and_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    eos, generation = CHATS[name]
    settings = {"do_sample": True, "top_p": 0.9}
    folder = write_checkpoint(
        tmp_path / "model",
        config={"eos_token_id": eos},
        generation=generation and generation | settings,
    )
    assert run_command(["check-model", str(folder), "--new-tokens", "2"]) == 0
    stdout = capsys.readouterr().out
    summary = json.loads(stdout.splitlines()[-1])
    assert summary["agree"]
    assert summary["eos_token_ids"] == [0, STOP]
    assert summary["eos_token_ids_transformers"] == (
        [STOP] if name == "a single one" else [0, STOP]
    )
    assert summary["settings_not_followed"] == (settings if generation else {})
    assert "EOS tokens: gptbatch [0, 258], transformers [" in stdout


def test_check_model_finds_a_missing_end_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "model", generation={"eos_token_id": STOP})
    monkeypatch.setattr(
        "gptbatch.pipeline.model.checkpoint.read_special_tokens",
        lambda *args, **kw: SpecialTokens(start=0, eos_token_ids=(0,)),
    )
    assert run_command(["check-model", str(folder), "--new-tokens", "1"]) == 78
    assert "the EOS tokens of gptbatch and transformers do not agree" in capsys.readouterr().err


def test_check_model_where_transformers_finds_no_tensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(
        tmp_path / "model", tensors=random_tensors(prefix="module.transformer.")
    )
    assert run_command(["check-model", str(folder)]) == 78
    assert re.search(r"transformers does not find \d+ tensors, such as ", capsys.readouterr().err)


# -- files that are not what their names say --


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<!DOCTYPE html><html>", "HTML, not the file itself"),
        ("", r"not valid JSON"),
        ("Entry not found", "not valid JSON"),
        ("[1]", "a JSON object is needed"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_damaged_settings_are_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    folder = write_checkpoint(tmp_path / "model", generation={})
    (folder / file).write_text(content)
    with pytest.raises(ModelError, match=f"{file}: {message}"):
        _ = find_checkpoint(str(folder)).special_tokens


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        SafetensorError("I/O error: Input/output error (os error 5)"),
    ],
)
def test_a_failing_disk_while_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    folder = write_checkpoint(tmp_path / "model")

    def fail(*args: Any, **kw: Any) -> None:
        raise error

    monkeypatch.setattr("gptbatch.pipeline.model.tensor_files.safe_open", fail)
    with pytest.raises(
        StorageError, match=r"model\.safetensors: cannot be read \(.*Input/output error"
    ):
        load(folder)


def test_every_file_is_downloaded_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "model", generation={"eos_token_id": STOP})
    asked: list[str] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_checkpoint("someone/model").special_tokens.eos_token_ids == (0, STOP)
    assert {
        "config.json",
        "generation_config.json",
        "adapter_config.json",
        "tokenizer.json",
        "model.safetensors",
    } <= set(asked)
