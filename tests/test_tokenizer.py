"""Tokenizers of common kinds: ids and texts match transformers, and lost text is reported."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from gptbatch.jobs.cli import run_command
from gptbatch.pipeline import JobConfig, inspect_job, run_job
from gptbatch.pipeline.audit.loaded_run import LoadedRun, Overrides
from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.audit.verify import verify_rows
from gptbatch.pipeline.config import EngineConfig
from gptbatch.pipeline.errors import ModelError, OutputConflictError
from gptbatch.pipeline.input.open_input import open_input
from gptbatch.pipeline.input.tokenize import TokenizedInput
from gptbatch.pipeline.input.tokenizer import PromptTokenizer
from gptbatch.pipeline.input.tokenizer_loading import load_tokenizer
from gptbatch.pipeline.model.checkpoint import find_checkpoint
from tests.test_random_tokenizers import auto_tokenizer
from tests.tiny_checkpoints import (
    END_OF_TEXT,
    HI,
    VOCAB_SIZE,
    byte_tokenizer,
    random_tensors,
    write_checkpoint,
)

LETTERS = "ABCDEFGH"


def checkpoint(
    folder: Path,
    tokenizer: Tokenizer | None = None,
    *,
    script: list[int] | None = None,
    **files: Any,
) -> Path:
    """Write a tiny checkpoint with this tokenizer.json (None without), and JSON files by stem."""
    size = VOCAB_SIZE if tokenizer is None else max(VOCAB_SIZE, tokenizer.get_vocab_size())
    config = {"vocab_size": size} | files.pop("config", {})
    write_checkpoint(
        folder,
        config=config,
        tensors=random_tensors(vocab_size=config["vocab_size"], script=script or []),
    )
    (folder / "tokenizer.json").unlink()
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


def settings(model: Path, prompts: list[str], **changes: Any) -> JobConfig:
    source = model.parent / f"{model.name}.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    values: dict[str, Any] = {
        "model": str(model),
        "input": str(source),
        "output": str(model.parent / f"{model.name}-out"),
        "temperature": 0.0,
        "max_new_tokens": 4,
        "batch_invariance": "off",
        "engine": EngineConfig(attention="padded", threads=1),
    }
    return JobConfig.model_validate(values | changes)


def run(model: Path, prompts: list[str], **changes: Any) -> list[dict[str, Any]]:
    """Return the rows of a greedy run of four tokens."""
    config = settings(model, prompts, **changes)
    run_job(config)
    rows: list[dict[str, Any]] = pq.read_table(
        Path(config.output) / "part-000000.parquet"
    ).to_pylist()
    return rows


def encoded(model: Path, prompts: list[str], **changes: Any) -> list[list[int]]:
    """Return the tokens of prompts in a run of this checkpoint."""
    config = settings(model, prompts, **changes)
    checkpoint = find_checkpoint(config.model)
    tokenizer = load_tokenizer(checkpoint.folder)
    tokenized = TokenizedInput(config, checkpoint, tokenizer, open_input(config))
    return [text.token_ids for text in tokenized.tokenizer.encode(prompts)]


def expect_as_transformers(model: Path, prompts: list[str], **changes: Any) -> None:
    """Compare the tokens of prompts, and the text that recorded tokens add to them."""
    theirs = auto_tokenizer(model)
    expected = [
        theirs(prompt, split_special_tokens=not changes.get("parse_special", False))["input_ids"]
        for prompt in prompts
    ]
    assert encoded(model, prompts, **changes) == expected
    for row, token_ids in zip(run(model, prompts, **changes), expected, strict=True):
        assert row["prompt_tokens"] == len(token_ids)
        assert theirs.decode(token_ids) + row["completion"] == theirs.decode(
            token_ids + row["completion_token_ids"]
        )


def verify(model: Path) -> set[str]:
    """Return the findings of verify in the rows of a run."""
    run = RunReader(model.parent / f"{model.name}-out")
    return {verdict.outcome for verdict in verify_rows(LoadedRun(run, Overrides()), run.rows())}


def gpt2_files(folder: Path, *, size: int = VOCAB_SIZE, **files: Any) -> Path:
    """Write a checkpoint with vocab.json and merges.txt, as GPT-2 was first published."""
    checkpoint(folder, config={"vocab_size": size}, **files)
    vocab = json.loads(byte_tokenizer().to_str())["model"]["vocab"]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nh i\n")
    return folder


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
BERT = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefghijklmnopqrstuvwxyz",
    *(f"##{letter}" for letter in "ing"),
    "king",
    "中",
]

# -- which files decide --

USER, BOT = VOCAB_SIZE, VOCAB_SIZE + 1
ADDED = {"<|user|>": USER, "<|bot|>": BOT}
DECODER = {
    str(index): {"content": token, "special": token == "<|bot|>"} for token, index in ADDED.items()
}


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": ADDED},
        {
            "added_tokens": ADDED,
            "special_tokens_map": {
                "additional_special_tokens": list(ADDED),
                "bos_token": END_OF_TEXT,
            },
        },
        {"tokenizer_config": {"added_tokens_decoder": DECODER}},
        {
            "tokenizer_config": {
                "added_tokens_decoder": DECODER,
                "tokenizer_class": "GPT2Tokenizer",
                "pad_token": "<|user|>",
            }
        },
        {"tokenizer_config": {"extra_special_tokens": ["<|user|>"]}},
    ],
    ids=["added", "added-and-map", "decoder", "decoder-and-pad", "extra"],
)
@pytest.mark.parametrize("parse_special", [False, True])
def test_added_tokens(tmp_path: Path, files: dict[str, Any], parse_special: bool) -> None:
    model = gpt2_files(tmp_path / "model", size=VOCAB_SIZE + 2, script=[HI, USER], **files)
    expect_as_transformers(
        model,
        ["<|user|>hi<|bot|>", "<|user|> hi hi", f"hi{END_OF_TEXT}"],
        parse_special=parse_special,
    )
    assert encoded(model, ["<|user|>"], parse_special=True) == [[USER]]
    assert verify(model) == {"equal"}


def test_added_tokens_beside_a_tokenizer_json(tmp_path: Path) -> None:
    model = checkpoint(
        tmp_path / "model",
        byte_tokenizer(),
        config={"vocab_size": VOCAB_SIZE + 2},
        tokenizer_config={"added_tokens_decoder": DECODER},
    )
    expect_as_transformers(model, ["<|user|>hi<|bot|>"], parse_special=True)


@pytest.mark.parametrize("name", ["files", "class", "tokenizer.json", "own tokenizer.json"])
def test_prefix_space(tmp_path: Path, name: str) -> None:
    config: dict[str, Any] = {"add_prefix_space": True}
    if name == "files":
        model = gpt2_files(tmp_path / "model", tokenizer_config=config)
    elif name == "class":
        model = gpt2_files(
            tmp_path / "model", tokenizer_config=config | {"tokenizer_class": "GPT2TokenizerFast"}
        )
    else:
        tokenizer = byte_tokenizer()
        if name == "own tokenizer.json":  # its own setting counts, as transformers has it
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
            config = {"add_prefix_space": False, "tokenizer_class": "PreTrainedTokenizerFast"}
        model = checkpoint(tmp_path / "model", tokenizer, tokenizer_config=config)
    expect_as_transformers(model, ["hi", "hi hi", " hi"])
    assert len(encoded(model, ["hi"])[0]) == 2


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_max_length": 2},
        {"chat_template": "x", "padding_side": "left", "pad_token": END_OF_TEXT},
    ],
)
def test_keys_without_effect_need_no_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    model = checkpoint(
        tmp_path / "model",
        byte_tokenizer(),
        tokenizer_config=config,
        special_tokens_map={"eos_token": END_OF_TEXT},
    )
    assert load_tokenizer(model).loaded_by == "direct"


@pytest.mark.parametrize(
    "config",
    [
        {"add_prefix_space": True},
        {"pad_token": "[PAD]"},
        {"added_tokens_decoder": DECODER},
        {"some_new_key": 1},
        {"unk_token": "<unk>"},
    ],
    ids=lambda config: next(iter(config)),
)
def test_other_keys_need_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    model = checkpoint(
        tmp_path / "model", byte_tokenizer(), tokenizer_config=config, config={"vocab_size": 300}
    )
    assert load_tokenizer(model).loaded_by == "transformers"
    expect_as_transformers(model, ["hi", "[PAD]hi"])


@pytest.mark.parametrize("name", ["as published", "older tokenizer.json", "vocab and merges"])
def test_gpt2_needs_no_transformers(tmp_path: Path, name: str) -> None:
    if name == "vocab and merges":
        model = gpt2_files(tmp_path / "model", tokenizer_config={"model_max_length": 64})
    else:
        model = checkpoint(
            tmp_path / "model", byte_tokenizer(), tokenizer_config={"model_max_length": 64}
        )
        if name == "older tokenizer.json":
            content = json.loads((model / "tokenizer.json").read_text())
            del (
                content["model"]["type"],
                content["model"]["ignore_merges"],
                content["pre_tokenizer"]["use_regex"],
            )
            content["model"] |= {
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "merges": ["h i"],
            }
            content["added_tokens"] = [
                entry | {"normalized": True} for entry in content["added_tokens"]
            ]
            (model / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(model).loaded_by == "direct"
    expect_as_transformers(
        model,
        ["hi", " hi hi", f"hi{END_OF_TEXT}hi", "é 中 \U0001f469\u200d\U0001f467\r\n"],
        parse_special=True,
    )


@pytest.mark.parametrize("part", ["pre-tokenizer", "normalizer", "decoder"])
def test_a_tokenizer_json_that_transformers_rebuilds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    """Without a tokenizer_config.json, transformers 5 makes a GPT2Tokenizer of it."""
    tokenizer = byte_tokenizer()
    if part == "pre-tokenizer":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]
        )
    elif part == "normalizer":
        tokenizer.normalizer = normalizers.Lowercase()
    else:
        tokenizer.decoder = decoders.Fuse()
    model = checkpoint(tmp_path / "model", tokenizer)
    expect_as_transformers(model, ["Hi 12"])
    assert any(
        f"transformers replaces the {part} by the rules of its tokenizer class" in message
        for message in caplog.messages
    )
    caplog.clear()
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    expect_as_transformers(model, ["Hi 12"], overwrite=True)
    assert not [message for message in caplog.messages if "transformers replaces" in message]


@pytest.mark.parametrize("change", ["vocab", "added_tokens", "tokenizer_config"])
def test_a_changed_tokenizer_file_is_another_job(tmp_path: Path, change: str) -> None:
    model = gpt2_files(tmp_path / "model", size=300)
    run(model, ["hi"])
    if change == "vocab":
        (model / "merges.txt").write_text("#version: 0.2\n")
    elif change == "added_tokens":
        (model / "added_tokens.json").write_text(json.dumps({"<|user|>": VOCAB_SIZE}))
    else:
        (model / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": True}))
    with pytest.raises(OutputConflictError, match="tokenizer_digest"):
        run(model, ["hi"])


def test_a_key_without_effect_is_the_same_job(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", byte_tokenizer())
    run(model, ["hi"])
    (model / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 5, "chat_template": "x"})
    )
    (model / "merges.txt").write_text("beside a tokenizer.json, nobody reads it")
    assert run_job(settings(model, ["hi"])).rows_kept == 1
    assert verify(model) == {"equal"}


def test_a_run_of_an_earlier_version_is_verified(tmp_path: Path) -> None:
    """That version recorded a digest of three files and had no templates."""
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    model = checkpoint(
        tmp_path / "model",
        tokenizer,
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"},
    )
    run(model, ["hi", ""], add_special_tokens=False)
    config = model.parent / "model-out" / ".gptbatch" / "config.yaml"
    lines = config.read_text().splitlines(keepends=True)
    config.write_text(
        "".join(
            line for line in lines if not line.startswith(("add_special_tokens", "on_lost_text"))
        )
    )
    assert verify(model) == {"equal"}


# -- templates and where an empty prompt starts --


def with_template(template: str, *, post_processor: Any = None) -> Tokenizer:
    tokenizer = byte_tokenizer()
    special = [("<|stop|>", 258), ("<|other|>", 259)]
    tokenizer.post_processor = post_processor or processors.TemplateProcessing(
        single=template, special_tokens=special
    )
    return tokenizer


@pytest.mark.parametrize(
    "template", ["<|stop|> $A", "<|stop|> $A <|other|>", "$A <|other|>", "bert", "bytes"]
)
def test_templates(tmp_path: Path, template: str) -> None:
    special = {
        "bert": processors.BertProcessing(("<|other|>", 259), ("<|stop|>", 258)),
        "bytes": processors.ByteLevel(),
    }
    tokenizer = with_template(template, post_processor=special.get(template))
    model = checkpoint(
        tmp_path / "model",
        tokenizer,
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"},
    )
    expect_as_transformers(model, ["hi", "<|stop|>hi", "a b"])
    assert encoded(model, ["hi"], add_special_tokens=False) == [[HI]]
    assert encoded(model, [""]) == [auto_tokenizer(model)("")["input_ids"] or [0]]


def test_add_bos_token_of_the_config(tmp_path: Path) -> None:
    model = gpt2_files(
        tmp_path / "model", tokenizer_config={"add_bos_token": True, "bos_token": "<|stop|>"}
    )
    expect_as_transformers(model, ["hi", ""])
    assert encoded(model, ["hi"]) == [[258, HI]]


def test_the_template_is_part_of_the_job(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", with_template("<|stop|> $A"))
    run(model, ["hi"])
    with pytest.raises(OutputConflictError, match="add_special_tokens"):
        run(model, ["hi"], add_special_tokens=False)


@pytest.mark.parametrize(
    ("config", "bos_token", "start"),
    [
        ({"bos_token_id": 5, "eos_token_id": 7}, "<|stop|>", 5),
        ({"bos_token_id": None, "eos_token_id": 7}, "<|stop|>", 258),
        ({"bos_token_id": None, "eos_token_id": 7}, None, 7),
    ],
)
def test_an_empty_prompt_without_a_template_starts_from_bos(
    tmp_path: Path, config: Any, bos_token: str | None, start: int
) -> None:
    model = checkpoint(
        tmp_path / "model",
        byte_tokenizer(),
        config=config,
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos_token},
    )
    assert encoded(model, [""]) == [[start]]


def test_a_template_that_ends_prompts_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = checkpoint(tmp_path / "model", with_template("<|stop|> $A <|other|>"))
    run(model, ["hi", "a"])
    assert [
        message
        for message in caplog.messages
        if "add_special_tokens" in message and ": 2;" in message
    ]


# -- completions --

WORDS = [
    "<s>",
    "</s>",
    "<unk>",
    "▁",
    *"abcdehlorw.",
    "▁hello",
    "▁world",
    "##hello",
    "hello",
    "world",
    "hello</w>",
    "world</w>",
    "n't",
    ".",
]


def word_level(pre_tokenizer: Any, decoder: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordLevel(
            {word: i for i, word in enumerate(dict.fromkeys(WORDS))}, unk_token="<unk>"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token in ("<s>", "</s>", "<unk>")]
    )
    return tokenizer


LLAMA = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)


@pytest.mark.parametrize(
    ("pre_tokenizer", "decoder", "new", "completion"),
    [
        (
            pre_tokenizers.Metaspace(),
            decoders.Metaspace(),
            ["▁world", "▁hello"],
            " world hello world hello",
        ),
        (pre_tokenizers.Metaspace(), LLAMA, ["▁world", "▁hello"], " world hello world hello"),
        (
            pre_tokenizers.Whitespace(),
            decoders.WordPiece(cleanup=True),
            ["##hello", "world", "."],
            "hello world.hello",
        ),
        (pre_tokenizers.Whitespace(), None, ["world", "hello"], " world hello world hello"),
        (
            pre_tokenizers.Whitespace(),
            decoders.BPEDecoder(),
            ["world</w>", "hello</w>"],
            "world hello world hello",
        ),
    ],
    ids=["metaspace", "llama", "wordpiece", "none", "bpe"],
)
def test_a_completion_is_the_text_that_its_tokens_add(
    tmp_path: Path,
    pre_tokenizer: Any,
    decoder: Any,
    new: list[str],
    completion: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = word_level(pre_tokenizer, decoder)
    ids = [tokenizer.get_vocab()[token] for token in new]
    model = checkpoint(
        tmp_path / "model",
        tokenizer,
        script=ids,
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"},
    )
    prompts = ["hello", "hello world hello"]
    expect_as_transformers(model, prompts)
    (row,) = run(model, ["hello"], overwrite=True)
    assert row["completion"] == completion
    assert verify(model) == {"equal"}
    assert (
        run_command(
            ["replay", str(model.parent / "model-out"), "--prompt-id", "0", "--trace", "--json"]
        )
        == 0
    )
    steps = [json.loads(line) for line in capsys.readouterr().out.splitlines()[:-1]]
    assert "".join(step["text"] for step in steps) == completion


def test_tokens_without_text_add_nothing(tmp_path: Path) -> None:
    """An embedding padded to a multiple of 64."""
    model = checkpoint(
        tmp_path / "model", byte_tokenizer(), script=[HI, 310], config={"vocab_size": 320}
    )
    (row,) = run(model, ["hi"])
    assert row["completion"] == "hihi"
    assert row["completion_token_ids"] == [HI, 310, HI, 310]


@pytest.mark.parametrize("clean_up", [True, False])
def test_clean_up_of_spaces(tmp_path: Path, clean_up: bool) -> None:
    tokenizer = word_level(pre_tokenizers.Whitespace())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": clean_up,
    }
    ids = [tokenizer.get_vocab()[token] for token in (".", "hello")]
    model = checkpoint(tmp_path / "model", tokenizer, script=ids, tokenizer_config=config)
    expect_as_transformers(model, ["hello", "hello world"])


# -- files that are not there, or not as they are called --


def vocabulary_files(folder: Path, tokenizer_class: str | None, **names: str) -> Path:
    """Write a checkpoint with tokenizer files of these names and an optional class."""
    model = gpt2_files(folder)
    contents = {name: (model / name).read_text() for name in ("vocab.json", "merges.txt")} | {
        "vocab.txt": "\n".join(BERT)
    }
    for name in ("vocab.json", "merges.txt"):
        (model / name).unlink()
    for key, name in names.items():
        path = model / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(contents.get(key.replace("_", "."), "x"))
    if tokenizer_class is not None:
        (model / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": tokenizer_class})
        )
    return model


TXT, JSON, MERGES, SPIECE = (
    {name.replace(".", "_"): name}
    for name in ("vocab.txt", "vocab.json", "merges.txt", "spiece.model")
)
# class of the tokenizer, its files -> what is said
MADE_UP: dict[str, tuple[str | None, dict[str, str], str]] = {
    "GPT2-Chinese": (
        None,
        TXT,
        (
            r"GPT2Tokenizer reads vocab\.json and merges\.txt, not vocab\.txt, .* "
            r'GPT2-Chinese has, \{"tokenizer_class": "BertTokenizer"\}$'
        ),
    ),
    "GPT-2 by name": (
        "GPT2Tokenizer",
        TXT,
        r"GPT2Tokenizer reads vocab\.json and merges\.txt, not vocab\.txt",
    ),
    "BERT of JSON": (
        "BertTokenizer",
        JSON | MERGES,
        r'BertTokenizer reads vocab\.txt, not vocab\.json, .* "GPT2Tokenizer"\}$',
    ),
    "T5 of words": (
        "T5Tokenizer",
        TXT,
        r"T5Tokenizer reads spiece\.model, not vocab\.txt, .* a made-up vocabulary of size 104",
    ),
    "Llama of bytes": (
        "LlamaTokenizer",
        JSON | MERGES,
        r"LlamaTokenizer reads tokenizer\.model, not vocab\.json",
    ),
    "no class for SentencePiece": (
        None,
        SPIECE,
        r'GPT2Tokenizer reads .*, not spiece\.model, .* "T5Tokenizer"\}$',
    ),
    "Roberta of words": (
        "RobertaTokenizer",
        TXT,
        r"RobertaTokenizer reads vocab\.json and merges\.txt, not vocab\.txt",
    ),
    "any class of words": (
        "PreTrainedTokenizerFast",
        TXT,
        r'name the class that reads vocab\.txt .* "BertTokenizer"\}$',
    ),
    "no merges": (None, JSON, r"\(vocab\.json without merges\.txt\); fetch merges\.txt, too$"),
    "no vocabulary": (
        None,
        TXT | MERGES,
        r"\(merges\.txt without vocab\.json\); fetch vocab\.json, too$",
    ),
    "merges of another name": (
        None,
        JSON | {"merges_txt": "my-merges.txt"},
        r"too; my-merges\.txt must be called merges\.txt$",
    ),
    "as save_model names them": (
        None,
        {"vocab_json": "my-vocab.json", "merges_txt": "my-merges.txt"},
        r"my-merges\.txt and my-vocab\.json must be called merges\.txt and vocab\.json$",
    ),
    "words of another name": (
        "BertTokenizer",
        {"vocab_txt": "bert.vocab.txt"},
        r"bert\.vocab\.txt must be called vocab\.txt$",
    ),
    "words in a folder": (
        None,
        {"vocab_txt": "vocab/vocab.txt"},
        r"vocab/vocab\.txt must stand in the folder itself$",
    ),
}


@pytest.mark.parametrize("name", MADE_UP)
def test_a_vocabulary_of_another_class_is_rejected(tmp_path: Path, name: str) -> None:
    tokenizer_class, files, message = MADE_UP[name]
    with pytest.raises(ModelError, match=message):
        load_tokenizer(vocabulary_files(tmp_path / "model", tokenizer_class, **files))


@pytest.mark.parametrize("special", [[], [END_OF_TEXT], ["<s>", "</s>"]])
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_an_empty_vocabulary_is_rejected(tmp_path: Path, special: list[str], kind: str) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens(special)
    model = checkpoint(tmp_path / "model", tokenizer, tokenizer_config={"tokenizer_class": kind})
    with pytest.raises(
        ModelError,
        match=(
            rf"tokenizer\.json: its vocabulary holds no tokens but special ones \({len(special)}\)"
        ),
    ):
        load_tokenizer(model)


def test_a_vocabulary_of_added_tokens_alone(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_tokens(["a", "b"])
    expect_as_transformers(
        checkpoint(
            tmp_path / "model",
            tokenizer,
            tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"},
        ),
        ["ab"],
    )


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b"\xff\xfe"], ids=["UTF-8", "UTF-16"])
@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"])
def test_a_byte_order_mark_is_named(tmp_path: Path, file: str, mark: bytes) -> None:
    model = (
        checkpoint(tmp_path / "model", byte_tokenizer())
        if file == "tokenizer.json"
        else gpt2_files(tmp_path / "model")
    )
    if file == "vocab.txt":
        model = vocabulary_files(tmp_path / "words", "BertTokenizer", **TXT)
    (model / file).write_bytes(mark + (model / file).read_bytes())
    with pytest.raises(
        ModelError,
        match=rf"{file}: begins with a byte order mark \(BOM\); save it as UTF-8 without one",
    ):
        load_tokenizer(model)


@pytest.mark.parametrize("file", ["config", "tokenizer_config"])
def test_a_byte_order_mark_that_only_transformers_rejects(tmp_path: Path, file: str) -> None:
    model = checkpoint(
        tmp_path / "model", byte_tokenizer(), tokenizer_config={"model_max_length": 5}
    )
    path = model / f"{file}.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_tokenizer(model).loaded_by == "direct"
    (model / "special_tokens_map.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    with pytest.raises(ModelError, match=rf"{file}\.json begins with a byte order mark"):
        load_tokenizer(model)


@pytest.mark.parametrize("kind", ["T5Tokenizer", "XLNetTokenizer", "AlbertTokenizer"])
def test_a_class_that_cannot_read_the_tokenizer_json(tmp_path: Path, kind: str) -> None:
    model = checkpoint(
        tmp_path / "model", byte_tokenizer(), tokenizer_config={"tokenizer_class": kind}
    )
    with pytest.raises(
        ModelError,
        match=(
            f"none of {kind}: .*; "
            r'"tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config\.json takes'
        ),
    ):
        load_tokenizer(model)
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    load_tokenizer(model)


# -- text that cannot be encoded --


def letters(model: Any = None, *, pre_tokenizer: Any = None, normalizer: Any = None) -> Tokenizer:
    """Return a BPE with a token per letter and no unknown token."""
    tokenizer = Tokenizer(
        model
        or models.BPE(
            vocab={token: i for i, token in enumerate([END_OF_TEXT, *LETTERS])}, merges=[]
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.Split(Regex("."), "isolated")
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


WORD_LEVEL = models.WordLevel(
    {token: i for i, token in enumerate([END_OF_TEXT, *LETTERS])}, unk_token="[UNK]"
)
UNIGRAM = models.Unigram([(token, -1.0) for token in [END_OF_TEXT, *LETTERS]], None, False)
DROPS_DIGITS = normalizers.Replace(Regex("[0-9]"), "")
# tokenizer, prompts that lose characters or cannot be encoded, prompts that can
LOSSY: dict[str, tuple[Callable[[], Tokenizer], list[str], list[str]]] = {
    "bpe": (letters, ["ABX", "abc", "A\nB", "é", "AXB", "中A", " "], ["ABC", ""]),
    "word-level": (
        lambda: letters(WORD_LEVEL, pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
        ["A X", "AB", "x"],
        ["A B", " A\tB\n"],
    ),
    "unigram": (lambda: letters(UNIGRAM), ["AX", "x"], ["AB"]),
    "normalizer": (lambda: letters(normalizer=DROPS_DIGITS), ["A1B", "1A", "A1", "12"], ["AB"]),
    "control-characters": (
        lambda: letters(normalizer=normalizers.BertNormalizer(lowercase=False)),
        ["A\x00B", "A\u200bB"],
        ["AB"],
    ),
    "pre-tokenizer": (
        lambda: letters(pre_tokenizer=pre_tokenizers.CharDelimiterSplit(",")),
        ["A,B", ",", "A B"],
        ["AB"],
    ),
    "half-an-alphabet": (lambda: letters(pre_tokenizer=BYTE_LEVEL), ["Aé", "A B"], ["AB"]),
}


@pytest.mark.parametrize("name", LOSSY)
def test_lost_text_is_an_error_row(tmp_path: Path, name: str) -> None:
    make, bad, good = LOSSY[name]
    model = checkpoint(
        tmp_path / "model", make(), tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"}
    )
    rows = run(model, [*bad, *good])
    for row in rows[: len(bad)]:
        assert row["finish_reason"] == "error"
        assert re.search(
            "cannot be encoded|the tokenizer drops [0-9]+ of the prompt's [0-9]+ characters",
            row["error"],
        ), row
    assert all(row["error"] is None for row in rows[len(bad) :])
    report = inspect_job(settings(model, [*bad, *good]))
    assert report.error_kinds == {"unencodable": len(bad)}
    assert verify(model) == {"equal", "skipped"}


@pytest.mark.parametrize(
    ("name", "prompts", "tokens"),
    [
        ("bpe", ["ABX", "xAy"], [[1, 2], [1]]),
        ("normalizer", ["A1B"], [[1, 2]]),
        ("pre-tokenizer", ["A,B"], [[1, 2]]),
    ],
)
def test_lost_text_as_a_warning(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    prompts: list[str],
    tokens: list[list[int]],
) -> None:
    model = checkpoint(
        tmp_path / "model",
        LOSSY[name][0](),
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"},
    )
    expect_as_transformers(model, prompts, on_lost_text="warn")
    assert encoded(model, prompts) == tokens
    expected = (
        f"prompts with characters that the tokenizer drops: {len(prompts)}; "
        "they run without these (on_lost_text: warn)"
    )
    assert caplog.messages.count(expected) == 1


def test_a_prompt_of_lost_characters_only_is_an_error(tmp_path: Path) -> None:
    tokenizer = letters()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    model = checkpoint(
        tmp_path / "model",
        tokenizer,
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"},
    )
    rows = run(model, ["xyz", "", "A"], on_lost_text="warn")
    assert [row["error"] is None for row in rows] == [False, True, True]


@pytest.mark.parametrize(
    "tokenizer",
    [
        letters(models.BPE(vocab={"?": 0, "A": 1}, merges=[], unk_token="?")),
        letters(
            models.WordPiece({"[UNK]": 0, "A": 1}, unk_token="[UNK]"),
            pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        ),
        letters(
            models.Unigram([("<unk>", 0.0), ("A", -1.0)], 0, False),
            pre_tokenizer=pre_tokenizers.Metaspace(),
        ),
    ],
    ids=["bpe", "wordpiece", "unigram"],
)
def test_unknown_text_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tokenizer: Tokenizer
) -> None:
    model = checkpoint(
        tmp_path / "model",
        tokenizer,
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"},
    )
    expect_as_transformers(model, ["A", "x", "A y"])
    assert [
        message
        for message in caplog.messages
        if message.startswith("prompts with text that the tokenizer has no token for")
    ]


PRECISE = letters(
    models.BPE(
        vocab={token: i for i, token in enumerate([*"helo", "ll", "llo"])},
        merges=[("l", "l"), ("ll", "o")],
    )
)
BYTES = letters(
    models.BPE(vocab={token: i for i, token in enumerate("helo")}, merges=[]),
    pre_tokenizer=BYTE_LEVEL,
)
WORDS_WITHOUT_DIGITS = letters(
    models.BPE(vocab={token: i for i, token in enumerate("helo")}, merges=[]),
    pre_tokenizer=pre_tokenizers.WhitespaceSplit(),
    normalizer=DROPS_DIGITS,
)


@pytest.mark.parametrize(
    "tokenizer", [PRECISE, BYTES, WORDS_WITHOUT_DIGITS], ids=["words", "bytes", "digits"]
)
@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("H\u00e9llo", 2),
        ("\u4e2d\u6587hello", 2),
        ("hXel\U0001f600lo", 2),
        ("hello!", 1),
        ("\u00e9hello\u00e9", 2),
        ("lol", 0),
    ],
)
def test_lost_characters_are_counted(tokenizer: Tokenizer, text: str, lost: int) -> None:
    if tokenizer is PRECISE:
        tokenizer = Tokenizer.from_str(tokenizer.to_str())
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert [prompt.lost for prompt in load(tokenizer).encode([text])] == [lost]


COMPOSED = [
    "café",
    "cafe\u0301",
    "e\u0301\u0301",
    "\u1112\u1161\u11ab",
    "ﬁ",
    "a  b",
    " a\t\n",
    "\U0001f469\u200d\U0001f467",
    "x" * 3000,
]


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.NFC(),
        normalizers.NFKC(),
        normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()]),
        normalizers.Strip(),
    ],
    ids=["NFC", "NFKC", "NFD", "Strip"],
)
@pytest.mark.parametrize(
    "pre_tokenizer",
    [pre_tokenizers.ByteLevel(), pre_tokenizers.Metaspace(), pre_tokenizers.WhitespaceSplit()],
)
def test_composed_letters_and_separators_are_not_lost(normalizer: Any, pre_tokenizer: Any) -> None:
    """Nor are they with byte fallback, an unknown token or a template that trims offsets."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    for model in (
        models.BPE(
            vocab={token: i for i, token in enumerate(alphabet)}, merges=[], unk_token=alphabet[0]
        ),
        models.BPE(
            vocab={f"<0x{byte:02X}>": byte for byte in range(256)}, merges=[], byte_fallback=True
        ),
        models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"),
    ):
        tokenizer = letters(model, pre_tokenizer=pre_tokenizer, normalizer=normalizer)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        loaded = load(tokenizer)
        assert [(prompt.lost, prompt.problem) for prompt in loaded.encode(COMPOSED)] == [
            (0, "")
        ] * len(COMPOSED)


def load(tokenizer: Tokenizer) -> PromptTokenizer:
    from gptbatch.pipeline.input.tokenizer import LoadedTokenizer

    decode = tokenizer.decode
    return PromptTokenizer(
        LoadedTokenizer(
            backend=tokenizer,
            decode=decode,
            cleans_up=False,
            loaded_by="direct",
            bos_token=None,
            digest="",
        ),
        start_token=None,
    )


# -- special tokens as text --


@pytest.mark.parametrize("token", [END_OF_TEXT, "<|stop|>", "<|other|>"])
def test_special_tokens_in_prompts_are_text_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, token: str
) -> None:
    model = checkpoint(tmp_path / "model", byte_tokenizer())
    prompts = [f"How are you?{token}", f"Hi!{token}Hello.{token}", "Hi", "<|", "<|x|>"]
    expect_as_transformers(model, prompts)
    expected = (
        "prompts with the text of a special token: 2; "
        "it is plain text there, parse_special takes it as the token"
    )
    assert caplog.messages.count(expected) == 1
    caplog.clear()
    inspect_job(settings(model, prompts))
    assert caplog.messages.count(expected) == 1
    caplog.clear()
    expect_as_transformers(model, prompts, parse_special=True, overwrite=True)
    assert not [message for message in caplog.messages if "special token" in message]


# -- tokens that the model lacks --


def test_a_tokenizer_may_be_larger_than_the_model(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", byte_tokenizer(), config={"vocab_size": 257})
    rows = run(model, ["hi", "a", "zz"])
    assert [row["finish_reason"] == "error" for row in rows] == [True, False, False]
    assert f"token {HI}" in rows[0]["error"]
    assert inspect_job(settings(model, ["hi", "a", "zz"])).error_kinds == {"unknown_token": 1}


@pytest.mark.parametrize(
    "kind", ["BartTokenizer", "RobertaTokenizerFast", "BertTokenizer", "template"]
)
def test_a_template_with_tokens_outside_of_the_model(tmp_path: Path, kind: str) -> None:
    tokenizer = byte_tokenizer()
    if kind == "template":
        tokenizer.add_special_tokens(["<end>"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <end>", special_tokens=[("<end>", VOCAB_SIZE)]
        )
    name = "PreTrainedTokenizerFast" if kind == "template" else kind
    model = checkpoint(
        tmp_path / "model",
        tokenizer,
        config={"vocab_size": VOCAB_SIZE},
        tokenizer_config={"tokenizer_class": name},
    )
    for start in (run_job, inspect_job):
        with pytest.raises(
            ModelError,
            match=(
                r"template adds '.+' \(token 26\d\) to every prompt, .*; "
                "add_special_tokens: false leaves"
            ),
        ):
            start(settings(model, ["hi"]))
    assert not (tmp_path / "model-out").exists()
    if kind != "BertTokenizer":
        assert [row["error"] for row in run(model, ["hi"], add_special_tokens=False)] == [None]


# -- other tokenizers than GPT-2's --


@pytest.mark.parametrize("where", ["config", "tokenizer_config"])
@pytest.mark.parametrize("model_type", ["gpt2", ...])
def test_a_vocabulary_of_words(tmp_path: Path, where: str, model_type: Any) -> None:
    model = checkpoint(tmp_path / "model", config={"model_type": model_type})
    (model / "vocab.txt").write_text("\n".join(BERT) + "\n")
    content = json.loads((model / f"{where}.json").read_text()) if where == "config" else {}
    (model / f"{where}.json").write_text(json.dumps(content | {"tokenizer_class": "BertTokenizer"}))
    expect_as_transformers(model, ["king", "KING 中", "kings and kings"])
    assert encoded(model, ["king"]) == [[2, BERT.index("king"), 3]]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config": {"auto_map": {"AutoTokenizer": ["own.Own", None]}}},
            "auto_map names a tokenizer in code",
        ),
        (
            {"tokenizer_config": {"auto_map": ["own.Own", None]}},
            "auto_map names a tokenizer in code",
        ),
        (
            {"tokenizer_config": {"tokenizer_class": "ByT5Tokenizer"}},
            "ByT5Tokenizer, which is written in Python",
        ),
        ({"tokenizer_config": {"tokenizer_class": 5}}, "transformers cannot make the tokenizer"),
        ({"tokenizer_config": []}, "tokenizer_config.json: a JSON object is needed"),
        ({"added_tokens": "x"}, "added_tokens.json: a JSON object is needed"),
    ],
)
def test_rejected_tokenizers(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    model = gpt2_files(tmp_path / "model", **files)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(model)


def test_code_of_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    model = checkpoint(
        tmp_path / "model",
        byte_tokenizer(),
        tokenizer_config={"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}},
    )
    (model / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    with pytest.raises(ModelError, match="remove auto_map"):
        load_tokenizer(model)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.model"])
def test_a_sentencepiece_model_needs_packages(tmp_path: Path, name: str) -> None:
    model = checkpoint(tmp_path / "model", tokenizer_config={"tokenizer_class": "T5Tokenizer"})
    (model / name).write_bytes(b"abc")
    needs = "" if find_spec("sentencepiece") else "sentencepiece and protobuf must be installed"
    with pytest.raises(
        ModelError, match=f"transformers cannot make the tokenizer .*{needs}.*; where it loads"
    ):
        load_tokenizer(model)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"no tokenizer: neither tokenizer.json nor any of vocab.json"
    ):
        load_tokenizer(checkpoint(tmp_path / "model"))


# -- randomness and panics --


def changed(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], object]) -> str:
    content = json.loads(tokenizer.to_str())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize("dropout", [0.5, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_dropout_is_rejected(tmp_path: Path, dropout: float, kind: str) -> None:
    model = checkpoint(
        tmp_path / "model", byte_tokenizer(), tokenizer_config={"tokenizer_class": kind}
    )
    (model / "tokenizer.json").write_text(
        changed(byte_tokenizer(), lambda content: content["model"].update(dropout=dropout))
    )
    with pytest.raises(ModelError, match=f"tokenizer.json: dropout is {dropout}"):
        load_tokenizer(model)


def charsmap(data: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


@pytest.mark.parametrize(
    "content",
    [
        changed(byte_tokenizer(), lambda content: content.update(normalizer=charsmap(b"\0\0\0"))),
        changed(
            byte_tokenizer(),
            lambda content: content.update(normalizer=charsmap(b"\xff\xff\xff\x7f" + b"\0" * 30)),
        ),
        changed(
            byte_tokenizer(),
            lambda content: content.update(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}}
            ),
        ),
        "{}",
        "",
        '{"model": ' + "[" * 100_000,
    ],
    ids=["charsmap", "charsmap-size", "regex", "empty", "nothing", "deep"],
)
def test_a_damaged_tokenizer_is_rejected(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str
) -> None:
    model = checkpoint(tmp_path / "model", byte_tokenizer())
    (model / "tokenizer.json").write_text(content)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
    arguments = [
        "--model",
        model,
        "--input",
        tmp_path / "prompts.jsonl",
        "--output",
        tmp_path / "out",
    ]
    assert run_command(["generate", *map(str, arguments)]) == 78
    said = capfd.readouterr().err
    assert f"{model / 'tokenizer.json'}: cannot be read as a tokenizer" in said
    assert "panicked" not in said
    assert len(said.splitlines()) == 1


RUNS_OUT = Regex(r"((a|a)+)+$|[\s\S]")
PANICS: dict[str, tuple[Callable[[], Tokenizer], str, str]] = {
    "split": (
        lambda: letters(pre_tokenizer=pre_tokenizers.Split(RUNS_OUT, "isolated")),
        "a" * 60 + "!",
        "runs out of steps",
    ),
    "replace": (
        lambda: letters(normalizer=normalizers.Replace(RUNS_OUT, "A")),
        "a" * 60 + "!",
        "runs out of steps",
    ),
    "sequence": (
        lambda: letters(
            pre_tokenizer=pre_tokenizers.Sequence(
                [pre_tokenizers.Split(RUNS_OUT, "isolated"), BYTE_LEVEL]
            )
        ),
        "a" * 60 + "!",
        "runs out of steps",
    ),
    "charsmap": (
        lambda: Tokenizer.from_str(
            changed(
                letters(),
                lambda content: content.update(normalizer=charsmap(b"\x08\0\0\0" + b"\xff" * 8)),
            )
        ),
        "\u00e9",
        "fails on it",
    ),
}


@pytest.mark.parametrize("name", PANICS)
def test_a_prompt_on_which_the_library_panics_is_an_error_row(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    make, prompt, reason = PANICS[name]
    model = checkpoint(
        tmp_path / "model", make(), tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"}
    )
    good = [] if name == "charsmap" else ["A", "AB"]
    rows = run(model, [prompt, *good])
    assert reason in rows[0]["error"]
    assert [row["error"] for row in rows[1:]] == [None] * len(good)
    assert "panicked" not in capfd.readouterr().err


def test_a_decoder_that_panics_is_an_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = letters(models.WordLevel({"A": 0, "a" * 60 + "!": 1}, unk_token="A"))
    tokenizer.decoder = decoders.Replace(RUNS_OUT, "")
    model = checkpoint(
        tmp_path / "model",
        tokenizer,
        script=[1],
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"},
    )
    with pytest.raises(ModelError, match="the tokenizer's decoder fails on new tokens"):
        run(model, ["A"])
    assert "panicked" not in capfd.readouterr().err


# -- check-model --


@pytest.mark.parametrize("name", ["bytes", "words", "added"])
def test_check_model_compares_tokenizers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    if name == "added":
        model = gpt2_files(tmp_path / "model", size=VOCAB_SIZE + 2, added_tokens=ADDED)
    else:
        model = checkpoint(
            tmp_path / "model",
            byte_tokenizer() if name == "bytes" else word_level(pre_tokenizers.Metaspace(), LLAMA),
        )
    assert run_command(["check-model", str(model), "--new-tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert "special tokens: equal" in out
    assert json.loads(out.splitlines()[-1])["tokenizer_difference"] == ""


def test_check_model_finds_another_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gptbatch.pipeline.input import tokenizer_loading

    model = checkpoint(
        tmp_path / "model", byte_tokenizer(), tokenizer_config={"add_prefix_space": True}
    )
    monkeypatch.setattr(
        tokenizer_loading, "reason_for_transformers", lambda backend, files, names: ""
    )
    assert run_command(["check-model", str(model), "--new-tokens", "1"]) == 78
    captured = capsys.readouterr()
    assert "the tokenizer of gptbatch and transformers do not agree" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["agree"] is False


def test_every_file_is_fetched_from_the_hub() -> None:
    from gptbatch.pipeline.input.tokenizer_errors import (
        ADDED_TOKENS,
        SPECIAL_TOKENS_MAP,
        TOKENIZER_CONFIG,
        TOKENIZER_JSON,
        VOCABULARY_FILES,
    )
    from gptbatch.pipeline.model.checkpoint import TOKENIZER_FILES

    assert {
        TOKENIZER_JSON,
        TOKENIZER_CONFIG,
        SPECIAL_TOKENS_MAP,
        ADDED_TOKENS,
        "merges.txt",
        *VOCABULARY_FILES,
    } <= set(TOKENIZER_FILES)
