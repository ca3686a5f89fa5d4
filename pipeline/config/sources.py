"""Load the settings of a job from a YAML file, the environment and options.

An option comes before the environment, and the environment before the file. Errors name the source
of the value.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from gptbatch.pipeline.config.engine_settings import EngineConfig
from gptbatch.pipeline.config.field_types import has_comma_items, is_list, is_object
from gptbatch.pipeline.config.problems import (
    MAX_VALUE_CHARACTERS,
    describe_problem,
    join_problems,
    key_of,
    nearest_keys,
    setting_of_key,
    with_value,
)
from gptbatch.pipeline.config.settings import JobConfig, config_fields
from gptbatch.pipeline.errors import ConfigError
from gptbatch.pipeline.params.other_names import advice_for
from gptbatch.pipeline.system.bundled import PREFIX, locate
from gptbatch.pipeline.system.paths import PathError, expand_path
from gptbatch.pipeline.system.yaml_reader import YamlError, read_yaml_mapping

ENVIRONMENT_PREFIX = "GPTBATCH_"
# no setting: the count of an Indexed Job, for `shard: auto`
SHARDS_VARIABLE = "GPTBATCH_SHARDS"
_PATH_KEYS = ("model", "input", "dataset", "output")
_TEXT_KEYS = ("prompt_template", "stop", "bad_words")
# A key of a group replaces all keys of the group in lower layers.
_ALTERNATIVES = (
    frozenset(("input", "dataset")),
    frozenset(("prompt_field", "prompt_template", "messages_field")),
)
# Kubernetes and Docker set these for a service or container called gptbatch or gptbatch-NAME. Two
# of them are told from a misspelt setting, such as GPTBATCH_MODEL_NAME=gpt2, by their value.
_SERVICE_VARIABLES = (
    re.compile(
        r"GPTBATCH_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)=.*",
        re.ASCII | re.DOTALL,
    ),
    re.compile(r"GPTBATCH_(\w+_)?PORT=\w+://.*", re.ASCII | re.DOTALL),
    re.compile(r"GPTBATCH_(NAME=|(\w+_)?NAME=/|(\w+_)?ENV_\w+=).*", re.ASCII | re.DOTALL),
)


def load_config(
    file: str | None,
    *,
    environment: Mapping[str, str] = os.environ,
    options: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> JobConfig:
    """Merge options, environment and file, in this order of precedence, and validate the result.

    Args:
        file: A path, or the name of a bundled config: demo, gpt2-cpu, gpt2-cpu-fast, gpt2-cuda,
            gpt2-cuda-fast.
        environment: Variables; those that begin with GPTBATCH_ are settings.
        options: Settings by config key. Nested keys are flat: "engine.dtype".
        defaults: Settings that all others override.

    Raises:
        ConfigError: A setting is wrong. The message names its source and key. `keys` holds the
            keys that options give wrongly, and the required keys that nothing gives.
    """
    layers: list[tuple[str, dict[str, Any]]] = [("defaults", dict(defaults or {}))]
    if file is not None:
        path = find_config(file)
        layers.append((str(path), _flatten(_read_yaml(path), str(path))))
    layers.append(("environment", _read_environment(environment)))
    layers.append(("options", dict(options)))
    merged: dict[str, Any] = {}
    source: dict[str, str] = {}
    for name, values in layers:
        for group in _ALTERNATIVES:
            if any(values.get(key) is not None for key in group):
                merged = {key: value for key, value in merged.items() if key not in group}
        for key, value in values.items():
            merged[key], source[key] = value, name
    try:
        return JobConfig.model_validate(_nest(merged))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        keys = tuple(key for problem in problems for key in _wrong_options(problem, source))
        lines = [_explain(problem, source) for problem in problems]
        raise ConfigError(join_problems(lines), keys=keys) from error


def _wrong_options(problem: ErrorDetails, source: Mapping[str, str]) -> list[str]:
    """Return the keys of a problem, if options give one of them or nothing gives any.

    A problem of several keys together names them in its message.
    """
    key = setting_of_key(key_of(problem))
    words = re.findall(r"[a-z_]+(?:\.[a-z_]+)?", problem["msg"])
    keys = [key] if key else [word for word in words if word in config_fields()]
    sources = {source[key] for key in keys if key in source}
    return keys if "options" in sources or not sources else []


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentCheck:
    """The settings that environment variables give.

    Attributes:
        names: The variables that a run reads, in order. Not those of a service or container.
        problems: What is wrong with variables. Each makes every run fail.
        engine: The settings of the engine; the defaults where they are wrong.
    """

    names: tuple[str, ...]
    problems: tuple[str, ...]
    engine: EngineConfig


def check_environment(environment: Mapping[str, str] = os.environ) -> EnvironmentCheck:
    """Check all variables that begin with GPTBATCH_, as a run would."""
    names: list[str] = []
    problems: list[str] = []
    readable: dict[str, str] = {}
    for name in sorted(filter(lambda name: name.startswith(ENVIRONMENT_PREFIX), environment)):
        try:
            is_setting = bool(_read_environment({name: environment[name]}))
        except ConfigError as error:
            problems.append(str(error))
            names.append(name)
            continue
        if is_setting:
            readable[name] = environment[name]
            names.append(name)
    # Stand-ins for what a run gets by options. They replace no variable.
    needed = {"model": f"{PREFIX}demo/model", "input": "-", "output": "out"}
    if environment_name("dataset") in readable:
        del needed["input"]
    options = {key: value for key, value in needed.items() if environment_name(key) not in readable}
    try:
        engine = load_config(None, environment=readable, options=options).engine
    except ConfigError as error:
        problems += str(error).splitlines()
        engine = _engine_of(readable)
    return EnvironmentCheck(names=tuple(names), problems=tuple(problems), engine=engine)


def _engine_of(environment: Mapping[str, str]) -> EngineConfig:
    """Return the settings of the engine, whatever the others are."""
    flat = {
        key: value
        for key, value in _read_environment(environment).items()
        if key.startswith("engine.")
    }
    try:
        return EngineConfig.model_validate(_nest(flat)["engine"])
    except ValidationError:
        return EngineConfig()


def find_config(name: str) -> Path:
    """Return the path of a config file, or of the bundled config of this name.

    Raises:
        ConfigError: There is no such file and no such bundled config.
    """
    try:
        path = Path(expand_path(name))
    except PathError as error:
        raise ConfigError(f"--config {name[:MAX_VALUE_CHARACTERS]}: {error}") from error
    try:
        is_folder = path.is_dir()
        # exists(), since a pipe such as <(envsubst < job.yaml) is no regular file
        if path.exists() and not is_folder:
            return path
    except OSError as error:
        raise ConfigError(f"{name[:80]}: cannot be a config file ({error.strerror})") from error
    bundled = locate(PREFIX).joinpath(f"{name}.yaml")
    if "/" not in name and bundled.is_file():
        return bundled
    if is_folder:
        raise ConfigError(f"{name}: is a folder; name the YAML file in it")
    known = ", ".join(sorted(entry.stem for entry in locate(PREFIX).glob("*.yaml")))
    raise ConfigError(f"{name}: no such config file, nor a bundled config ({known})")


def environment_name(key: str) -> str:
    """Return GPTBATCH_SEED for seed, GPTBATCH_ENGINE_DTYPE for engine.dtype."""
    return ENVIRONMENT_PREFIX + key.replace(".", "_").upper()


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return read_yaml_mapping(path)
    except YamlError as error:
        raise ConfigError(f"{path}: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error


def _flatten(content: dict[str, Any], where: str) -> dict[str, Any]:
    flat = {str(key): value for key, value in content.items() if key != "engine"}
    engine = {} if content.get("engine") is None else content["engine"]
    if not isinstance(engine, dict):
        raise ConfigError(f"{where}: engine must be a mapping of keys to values")
    return flat | {f"engine.{key}": value for key, value in engine.items()}


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {
        key: value for key, value in flat.items() if not key.startswith("engine.")
    }
    engine = {
        key.removeprefix("engine."): value
        for key, value in flat.items()
        if key.startswith("engine.")
    }
    return nested | {"engine": engine}


def _read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    fields = config_fields()
    names = {environment_name(key): key for key in fields}
    values: dict[str, Any] = {}
    for name, value in environment.items():
        # A file of variables may have Windows line ends. A text may end in a line feed.
        text = value.rstrip("\r" if names.get(name) in _TEXT_KEYS else "\r\n")
        if not name.startswith(ENVIRONMENT_PREFIX) or name == SHARDS_VARIABLE or text == "":
            continue
        if name not in names:
            if any(pattern.fullmatch(f"{name}={text}") for pattern in _SERVICE_VARIABLES):
                continue
            raise ConfigError(f"environment variable {name}: no such setting{_hint(name, fields)}")
        key = names[name]
        if key in _PATH_KEYS and text != text.strip() and not os.path.lexists(text):
            raise ConfigError(
                f"environment variable {name}: {text!r} begins or ends with blanks; remove them"
            )
        # validated with the config
        if fields[key].annotation is str or is_object(fields[key]):
            values[key] = text
            continue
        adapter: TypeAdapter[Any] = TypeAdapter(fields[key].annotation or str)
        try:
            values[key] = (
                adapter.validate_python(_items(text, key, fields[key]))
                if is_list(fields[key])
                else adapter.validate_strings(text)
            )
        except ValidationError as error:
            raise ConfigError(
                f"environment variable {name}: {with_value(error.errors()[0])}"
            ) from error
    return values


def _hint(name: str, keys: Collection[str]) -> str:
    """Return advice for a variable that is no setting: the nearest one, by the name of its key."""
    word = name.removeprefix(ENVIRONMENT_PREFIX)
    if advice := advice_for(word):
        return f"; {advice}"
    if nearest := nearest_keys(word.lower(), keys):
        return f"; did you mean {' or '.join(map(environment_name, nearest))}?"
    return f"; known are {', '.join(map(environment_name, keys))}"


def _items(text: str, key: str, field: FieldInfo) -> Any:
    """Return the values of a list: several are given as JSON, or numbers and names with commas."""
    if not text.lstrip().startswith("["):
        return [item.strip() for item in text.split(",")] if has_comma_items(field) else [text]
    try:
        return json.loads(text)
    except ValueError:
        # A text may begin with a bracket: [INST]
        if key in _TEXT_KEYS:
            return [text]
        raise ConfigError(f"environment variable {environment_name(key)}: is not JSON") from None


def _explain(problem: ErrorDetails, source: Mapping[str, str]) -> str:
    key = key_of(problem)
    if problem["type"] == "missing":
        return (
            f"{key} is required: give it as an option, in the config file or as "
            f"{environment_name(key)}"
        )
    origin = source.get(setting_of_key(key), "config")
    text = describe_problem(problem, list(config_fields()))
    if origin == "environment":
        return f"{environment_name(setting_of_key(key))}: {with_value(problem)}"
    return f"{origin}: {text}" if key else text
