"""Sources of settings and their precedence, and tables of all keys."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from gptbatch.jobs.generate import generate
from gptbatch.jobs.options import option_name
from gptbatch.jobs.replay import replay
from gptbatch.pipeline.config import (
    EngineConfig,
    JobConfig,
    config_fields,
    environment_name,
    find_config,
    load_config,
)
from gptbatch.pipeline.errors import ConfigError
from gptbatch.pipeline.input import config_hash
from gptbatch.pipeline.input.fields import take_settings
from gptbatch.pipeline.output.schema import COLUMNS, SCHEMA
from gptbatch.pipeline.params.sampling_params import (
    SamplingParams,
    from_row,
    to_attribute,
    to_column,
)
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS
from tests.paths import REPOSITORY

NEEDED = {"model": "m", "input": "i", "output": "o"}


def test_options_override_the_environment_which_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "{model: m, input: i, output: o, seed: 1, top_k: 1, max_new_tokens: 1, "
        "engine: {threads: 1, batch_size: 1}}"
    )
    environment = {
        "GPTBATCH_SEED": "2",
        "GPTBATCH_TOP_K": "2",
        "GPTBATCH_ENGINE_THREADS": "2",
        "HOME": "/",
    }
    config = load_config(str(path), environment=environment, options={"seed": 3})
    assert (config.seed, config.top_k, config.max_new_tokens, config.temperature) == (3, 2, 1, 1.0)
    assert (config.engine.threads, config.engine.batch_size) == (2, 1)


def test_an_input_replaces_a_dataset_of_a_lower_layer_and_vice_versa(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("{model: m, input: i, output: o}")
    config = load_config(str(path), environment={}, options={"dataset": "d"})
    assert (config.input, config.dataset) == (None, "d")
    path.write_text("{model: m, dataset: d, output: o}")
    config = load_config(str(path), environment={}, options={"input": "i"})
    assert (config.input, config.dataset) == (["i"], None)
    with pytest.raises(ConfigError, match="give either input or dataset, not both"):
        load_config(None, environment={}, options={**NEEDED, "dataset": "d"})


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("1", True)])
def test_environment_variables_are_parsed_from_text(text: str, value: bool) -> None:
    config = load_config(
        None,
        environment={"GPTBATCH_IGNORE_EOS": text, "GPTBATCH_TEMPERATURE": "0.25"},
        options=NEEDED,
    )
    assert config.ignore_eos is value
    assert config.temperature == 0.25


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "GPTBATCH_SEED",
            "five",
            "environment variable GPTBATCH_SEED: input should be a valid integer",
        ),
        (
            "GPTBATCH_SEED",
            "-5",
            "GPTBATCH_SEED: input should be greater than or equal to 0, not -5",
        ),
        (
            "GPTBATCH_SEDE",
            "5",
            "environment variable GPTBATCH_SEDE: no such setting; did you mean GPTBATCH_SEED?",
        ),
        (
            "GPTBATCH_DTYPE",
            "bfloat16",
            "GPTBATCH_DTYPE: no such setting; did you mean GPTBATCH_ENGINE_DTYPE?",
        ),
        ("GPTBATCH_ENGINE_DEVICE", "tpu", "environment variable GPTBATCH_ENGINE_DEVICE"),
        ("GPTBATCH_STOP_TOKEN_IDS", "13,x", "GPTBATCH_STOP_TOKEN_IDS: input should be a valid int"),
    ],
)
def test_invalid_environment_variables(name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        load_config(None, environment={name: text}, options=NEEDED)


def test_the_library_validates_values_strictly() -> None:
    assert (
        JobConfig(model="m", input="i", output="o", engine=EngineConfig(threads=2)).engine.threads
        == 2
    )
    assert JobConfig.model_validate({**NEEDED, "engine": {"threads": 2}}).engine.threads == 2
    wrongs: list[dict[str, Any]] = [{"seed": "5"}, {"seed": True}, {"sede": 5}]
    for wrong in [*wrongs, {"engine": {"threads": 0}}]:
        with pytest.raises(ValidationError):
            JobConfig.model_validate({**NEEDED, **wrong})
        with pytest.raises(ConfigError, match=f"JobConfig: .*{next(iter(wrong))}"):
            JobConfig(**{**NEEDED, **wrong})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 5}, "JobConfig: there is no key 'max_tokens'; use max_new_tokens"),
        ({"dtype": "float32"}, "JobConfig: there is no key 'dtype'; did you mean engine.dtype?"),
        ({"temperature": -1}, "JobConfig: temperature: input should be greater than or equal to 0"),
        ({"output": None}, "JobConfig: output: input should be a valid string, not None"),
        ({"dataset": "d"}, "give either input or dataset, not both"),
    ],
)
def test_python_gets_the_messages_of_config_files(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        JobConfig(**{**NEEDED, **settings})
    assert str(caught.value).startswith(message)
    with pytest.raises(ConfigError, match="JobConfig: output is required"):
        JobConfig(model="m", input="i")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="EngineConfig: there is no key 'dtypes'"):
        EngineConfig(dtypes="float32")  # type: ignore[call-arg]


def test_paths_of_pathlib_are_paths() -> None:
    values: dict[str, Any] = {"model": Path("m"), "input": [Path("i"), "j"], "output": Path("o")}
    config = JobConfig(**values)
    assert (config.model, config.inputs, config.output) == ("m", ["i", "j"], "o")


def test_the_resolved_config_loads_to_the_same_config(tmp_path: Path) -> None:
    config = load_config("demo", environment={}, options={"limit": 3, "engine.threads": 1})
    path = tmp_path / "resolved.yaml"
    path.write_text(config.to_yaml())
    assert load_config(str(path), environment={}, options={}) == config


@pytest.mark.parametrize(
    "name", ["demo", "gpt2-cpu", "gpt2-cpu-fast", "gpt2-cuda", "gpt2-cuda-fast"]
)
def test_bundled_configs_load_and_comment_every_key(name: str) -> None:
    config = load_config(name, environment={}, options={"input": "i", "output": "o"})
    for line in find_config(name).read_text().splitlines():
        if ":" in line and not line.startswith("#") and not line.rstrip().endswith(":"):
            assert " # " in line, f"a key without a comment: {line}"
    assert config.output == "o"


def test_gpt2_cpu_yaml_shows_every_key_and_its_default() -> None:
    text = find_config("gpt2-cpu").read_text()
    body = text[text.index("\nmodel:") :]
    uncommented = "\n".join(
        line.replace("# ", "", 1) if line.lstrip().startswith("# ") else line
        for line in body.splitlines()
    )
    shown = yaml.safe_load(uncommented)
    engine = shown.pop("engine")
    assert shown.keys() | {f"engine.{key}" for key in engine} == config_fields().keys()
    chosen = yaml.safe_load(text)
    for key, field in config_fields().items():
        value = engine[key.removeprefix("engine.")] if key.startswith("engine.") else shown[key]
        is_chosen = (
            key.removeprefix("engine.") in chosen["engine"]
            if key.startswith("engine.")
            else key in chosen
        )
        if not is_chosen and not field.is_required():
            assert value == field.default, key


def test_every_key_has_an_option_a_variable_and_a_description() -> None:
    options = {name for parameter in generate.params for name in parameter.opts}
    keys = config_fields()
    others = {"--config", "--greedy", "--dry-run", "--on", "--workers", "--ray-address"}
    others |= {"--worker-cpus", "--worker-gpus"}
    assert {option_name(key) for key in keys} | others == options
    assert len({environment_name(key) for key in keys}) == len(keys)
    assert all(field.description for field in keys.values())


# a value of a row's field, and the attribute that it becomes
EXAMPLES: dict[str, tuple[Any, Any]] = {
    "int": (1, 1),
    "float": (1, 1),
    "bool": (True, True),
    "texts": (["a b", "\n"], ("a b", "\n")),
    "token_ids": ([7, 0], (7, 0)),
    "token_values": ({"3": -1.5, "12": 100}, ((3, -1.5), (12, 100.0))),
}
BAD_EXAMPLES: dict[str, Any] = {
    "int": 1.5,
    "float": "x",
    "bool": 1,
    "texts": ["a", ""],
    "token_ids": [-1],
    "token_values": {"x": 1},
}


@pytest.mark.parametrize("name", SAMPLING_SETTINGS)
def test_every_sampling_setting_has_an_option_a_field_a_column_and_docs(name: str) -> None:
    setting, option = SAMPLING_SETTINGS[name], option_name(name)
    # a replay generates one sample
    for command in (generate, replay) if name != "n" else (generate,):
        assert [parameter for parameter in command.params if option in parameter.opts]
    key = config_fields()[name]
    assert key.description == setting.help
    assert to_attribute(key.default, setting) == setting.default
    assert JobConfig.model_validate({**NEEDED, "row_settings": [name]}).row_settings == [name]
    field, value = EXAMPLES[setting.kind]
    if setting.kind in ("int", "float"):
        field = value = setting.maximum
        with pytest.raises(ValueError, match=rf"{name} must be (above )?{setting.minimum} to"):
            take_settings({name: setting.minimum - 1})
    assert take_settings({name: field}) == {name: value}
    assert setting.accepts(value)
    with pytest.raises(ValueError, match=f"{name} must "):
        take_settings({name: BAD_EXAMPLES[setting.kind]})
    params = SamplingParams(seed=1, temperature=1.0, top_k=1, max_new_tokens=5)
    changed = dataclasses.replace(params, **{name: value})
    row = {"sampling_params": to_column(changed)} | {
        name: getattr(changed, name) for name in SCHEMA.names if name in SAMPLING_SETTINGS
    }
    assert from_row(row) == changed
    if setting.column_type is None:
        assert json.loads(to_column(changed) or "") == {name: field}
    else:
        (column,) = [column for column in COLUMNS if column.name == name]
        assert (str(column.field.metadata[b"meaning"], "utf-8"), column.nullable, column.kind) == (
            setting.meaning,
            False,
            "deterministic",
        )
    assert name in config_hash._TOKEN_KEYS
    texts = [
        path.read_text()
        for path in (REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/*.md")))
    ]
    lines = "\n".join(texts).splitlines()
    assert [line for line in lines if line.startswith("|") and f"`{option}` | `{name}`" in line]
    if setting.column_type is not None:
        assert [
            line for line in lines if line.startswith(f"| `{name}` | `{SCHEMA.field(name).type}`")
        ]


def test_the_attributes_of_sampling_params_are_the_settings() -> None:
    fields = {field.name: field for field in dataclasses.fields(SamplingParams)}
    assert fields.keys() == SAMPLING_SETTINGS.keys()
    for name, field in fields.items():
        if field.default is not dataclasses.MISSING:
            assert field.default == SAMPLING_SETTINGS[name].default, name
    config = JobConfig(model="m", input="i", output="o", seed=5, top_k=7, stop=["a"])
    assert config.sampling.as_dict() == {
        name: to_attribute(getattr(config, name), setting)
        for name, setting in SAMPLING_SETTINGS.items()
    }
