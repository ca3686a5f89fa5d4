"""The settings of a job, from a YAML file, the environment and options. Imports no torch."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from gptbatch.pipeline.errors import ConfigError
from gptbatch.pipeline.system.bundled import PREFIX, locate
from gptbatch.pipeline.system.paths import PathError, expand_path
from gptbatch.pipeline.system.redact import redact
from gptbatch.pipeline.system.yaml_reader import YamlError, read_yaml_mapping
from gptbatch.pipeline.types import SAMPLING_SETTINGS, SamplingParams

ENVIRONMENT_PREFIX = "GPTBATCH_"
MAX_PROBLEMS = 20
_PATH_KEYS = ("model", "input", "dataset", "output")
MAX_VALUE_CHARACTERS = 200
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

Name = Annotated[str, Field(min_length=1)]


def _path_setting(*, writes: bool) -> Any:
    """Return a validator for paths. pydantic's own validator rejects names that are not UTF-8."""

    def check(value: Any) -> str:
        if not isinstance(value, str):
            raise PydanticCustomError("string_type", "Input should be a valid string")
        if not value:
            raise PydanticCustomError("string_too_short", "String should have at least 1 character")
        return value if value == "-" and not writes else expand_path(value, writes=writes)

    return PlainValidator(check)


InputPath = Annotated[str, _path_setting(writes=False)]
OutputPath = Annotated[str, _path_setting(writes=True)]
# "5" or "2.5%"; a YAML file may say 5 without quotes
CountOrShare = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
    Field(pattern=r"^(\d+|\d{1,2}(\.\d+)?%|100%)$"),
]


# fields of a row that an input may keep as metadata; mypy cannot read a computed Literal
if TYPE_CHECKING:
    MetadataField = str
else:
    MetadataField = Literal[("id", *SAMPLING_SETTINGS)]


def _sampling_field(name: str) -> Any:
    """Return the field of a sampling setting, with its default, range and description."""
    setting = SAMPLING_SETTINGS[name]
    return Field(setting.default, ge=setting.minimum, le=setting.maximum, description=setting.help)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class EngineConfig(_Section):
    """Settings that depend on the machine: device, types, memory."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device to compute on. auto: cuda where PyTorch finds a GPU, else cpu."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Type of weights and activations. float16 needs cuda."
    )
    cache_dtype: Literal["auto", "int8"] = Field(
        "auto",
        description=(
            "Type of the cached keys and values. auto: the same as dtype. int8: faster with "
            "ragged attention and less precise."
        ),
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        le=65536,
        description=(
            "Maximum number of rows that run at the same time. Default: 32 per CPU thread, "
            "between 64 and 512, as far as memory allows."
        ),
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads. Default: the number that PyTorch finds, at most the CPU quota.",
    )
    attention: Literal["auto", "ragged", "padded"] = Field(
        "auto",
        description=(
            "Attention backend. ragged: the paged KV cache with C++ kernels for CPUs, built on "
            "first use. padded: PyTorch. auto: ragged where the kernels can be built, else padded."
        ),
    )
    memory_gib: float | None = Field(
        None, gt=0, le=2**20, description="GiB for the KV cache. Default: half of the free memory."
    )


class JobConfig(_Section):
    """All settings of one job.

    Paths are relative to the working directory. `bundled:demo/...` names a file of the package.
    """

    model: InputPath = Field(
        description="Folder of a checkpoint, or a model name on the Hugging Face hub."
    )
    revision: Name | None = Field(
        None, description="Branch, tag or commit of a model on the hub. Default: its main branch."
    )
    allow_pickle: bool = Field(
        False, description="Read pytorch_model.bin where the checkpoint has no safetensors."
    )
    input: InputPath | None = Field(
        None, description="JSON Lines file, compressed or not; - is standard input."
    )
    dataset: InputPath | None = Field(
        None,
        description=(
            "Dataset to read instead of input: a name on the hub, a folder, a file, or a "
            "save_to_disk folder."
        ),
    )
    dataset_config: Name | None = Field(
        None, description="Configuration name of the dataset. Default: the dataset's own default."
    )
    dataset_revision: Name | None = Field(
        None, description="Branch, tag or commit of a dataset on the hub. Default: its main branch."
    )
    split: Name = Field(
        "train", description="Split of the dataset. Slices such as train[:100] are allowed."
    )
    csv_delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = Field(
        None,
        description="Character between CSV cells. Default: a comma, or a tab for .tsv.",
    )
    prompt_field: Name = Field(
        "prompt",
        description=(
            "Field of a row that holds the prompt. Dots select nested values: prompt.text, turns.0."
        ),
    )
    id_field: Name = Field(
        "id", description="Field of a row that holds its id. Dots select nested values."
    )
    metadata_field: list[MetadataField] = Field(
        [],
        description=(
            "Field that is metadata in this input. It is kept in the column metadata and not read"
            " as the row's id or setting."
        ),
    )
    limit: int | None = Field(
        None,
        ge=0,
        le=2**63 - 1,
        description="Number of rows to read from the start of the input. Default: all.",
    )
    output: OutputPath = Field(description="Folder to write. It is created if it does not exist.")
    part_rows: int | None = Field(
        None,
        ge=1,
        le=2**31 - 1,
        description=(
            "Rows per Parquet file; a crash costs the rows of unfinished files. Default: 512, or"
            " the value of the run that is continued."
        ),
    )
    overwrite: bool = Field(
        False,
        description=(
            "Replace a finished run, or a run of another job, in the output folder. An unfinished"
            " run of this job is continued."
        ),
    )
    on_bad_row: Literal["fail", "record"] = Field(
        "fail",
        description=(
            "Action for a row that cannot be read or is invalid. fail: stop before the model is "
            "loaded. record: write an error row."
        ),
    )
    max_row_errors: CountOrShare | None = Field(
        None,
        description=(
            "Stop when more than N rows, or more than P% of all rows, are error rows. Default: "
            "never."
        ),
    )
    skip_row: list[Name] = Field(
        [], description="Skip the row with this id: write it as an error row without generating it."
    )
    allow_other_environment: bool = Field(
        False,
        description=(
            "Continue a run that was started in another environment: hardware, library versions or "
            "kernels. Tokens may then differ from those of an uninterrupted run."
        ),
    )
    seed: int = _sampling_field("seed")
    temperature: float = _sampling_field("temperature")
    top_k: int = _sampling_field("top_k")
    max_new_tokens: int = _sampling_field("max_new_tokens")
    ignore_eos: bool = Field(False, description="Continue after an EOS token.")
    parse_special: bool = Field(
        False,
        description=(
            "Read the text of a special token in a prompt, such as <|endoftext|>, as that token "
            "instead of plain text."
        ),
    )
    add_special_tokens: bool = Field(
        True,
        description="Add the tokens of the tokenizer's template, such as <s>, to every prompt.",
    )
    on_lost_text: Literal["error", "warn"] = Field(
        "error",
        description=(
            "Action for a prompt with characters that the tokenizer drops. error: write an error "
            "row. warn: generate without them, and log the number of such rows."
        ),
    )
    context_overflow: Literal["error", "truncate_left"] = Field(
        "error",
        description=(
            "Action for a prompt of more than n_positions tokens. error: write an error row. "
            "truncate_left: drop its first tokens."
        ),
    )
    window_full: Literal["stop", "slide"] = Field(
        "stop",
        description=(
            "Action when prompt and completion fill the context of n_positions tokens. stop: end "
            "the completion. slide: continue with the latest n_positions tokens, which is much "
            "slower."
        ),
    )
    batch_invariance: Literal["auto", "require", "off"] = Field(
        "auto",
        description=(
            "Test at start-up that the results of a row do not depend on the other rows of its "
            "batch. auto: log a warning if the test fails. require: stop if it fails. off: skip it."
        ),
    )
    record_logits_digest: bool = Field(
        False,
        description="Fill the column logits_digest with a SHA-256 of the logits of every step.",
    )
    engine: EngineConfig = Field(
        default_factory=lambda: EngineConfig(), description="How the job runs on this machine."
    )

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.input is None) == (self.dataset is None):
            raise ValueError("give either input or dataset" + (", not both" if self.input else ""))
        return self

    @property
    def sampling(self) -> SamplingParams:
        """The sampling settings of the run. Its seed is the run seed."""
        return SamplingParams(**{name: getattr(self, name) for name in SAMPLING_SETTINGS})

    def to_yaml(self) -> str:
        """Return the resolved config as YAML, without secrets."""
        text: str = yaml.safe_dump(
            _redacted(self.model_dump()), sort_keys=False, allow_unicode=True
        )
        return text


def load_config(
    file: str | None, *, environment: Mapping[str, str] = os.environ, options: Mapping[str, Any]
) -> JobConfig:
    """Merge options, environment and file, in this order of precedence, and validate the result.

    Args:
        file: A path, or the name of a bundled config: demo, gpt2-cpu, gpt2-cpu-fast, gpt2-cuda.
        environment: Variables; those that begin with GPTBATCH_ are settings.
        options: Settings by config key. Nested keys are flat: "engine.dtype".

    Raises:
        ConfigError: A setting is wrong. The message names its source and key. `keys` holds the
            wrong keys that come from options, and the required keys that are missing.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    if file is not None:
        path = find_config(file)
        layers.append((str(path), _flatten(_read_yaml(path), str(path))))
    layers.append(("environment", _read_environment(environment)))
    layers.append(("options", dict(options)))
    merged: dict[str, Any] = {}
    source: dict[str, str] = {}
    for name, values in layers:
        # an input or a dataset replaces both kinds of a lower layer
        if values.get("input") is not None or values.get("dataset") is not None:
            merged = {
                key: value for key, value in merged.items() if key not in ("input", "dataset")
            }
        for key, value in values.items():
            merged[key], source[key] = value, name
    try:
        return JobConfig.model_validate(_nest(merged))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        locations = [
            _setting(".".join(str(step) for step in problem["loc"])) for problem in problems
        ]
        keys = tuple(key for key in locations if source.get(key, "options") == "options")
        lines = [_explain(problem, source) for problem in problems[:MAX_PROBLEMS]]
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise ConfigError("\n".join(lines + more), keys=keys) from error


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


def config_fields() -> dict[str, FieldInfo]:
    """Return every config key by its full name: `seed`, `engine.dtype`."""
    fields = {name: info for name, info in JobConfig.model_fields.items() if name != "engine"}
    return fields | {f"engine.{name}": info for name, info in EngineConfig.model_fields.items()}


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


def _redacted(value: Any) -> Any:
    """Redact each setting by itself, so that a path with blanks stays whole."""
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value


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
        # a file of variables may have Windows line ends
        text = value.rstrip("\r\n")
        if not name.startswith(ENVIRONMENT_PREFIX) or text == "":
            continue
        if name not in names:
            if any(pattern.fullmatch(f"{name}={text}") for pattern in _SERVICE_VARIABLES):
                continue
            raise ConfigError(
                f"environment variable {name}: no such setting{_nearest(name, list(names))}"
            )
        key = names[name]
        if key in _PATH_KEYS and text != text.strip() and not os.path.lexists(text):
            raise ConfigError(
                f"environment variable {name}: {text!r} begins or ends with blanks; remove them"
            )
        # validated with the config
        if fields[key].annotation is str:
            values[key] = text
            continue
        adapter: TypeAdapter[Any] = TypeAdapter(fields[key].annotation or str)
        try:
            # a list is given as JSON
            values[key] = (
                adapter.validate_json(text)
                if get_origin(fields[key].annotation) is list
                else adapter.validate_strings(text)
            )
        except ValidationError as error:
            raise ConfigError(
                f"environment variable {name}: {_with_value(error.errors()[0])}"
            ) from error
    return values


def _explain(problem: ErrorDetails, source: Mapping[str, str]) -> str:
    key = ".".join(str(step) for step in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{source[key]}: there is no key {key!r}{_nearest(key, list(config_fields()))}"
    if problem["type"] == "missing":
        return (
            f"{key} is required: give it as an option, in the config file or as "
            f"{environment_name(key)}"
        )
    if not key:
        return problem["msg"].removeprefix("Value error, ")
    origin = source.get(_setting(key), "config")
    where = environment_name(_setting(key)) if origin == "environment" else f"{origin}: {key}"
    return f"{where}: {_with_value(problem)}"


def _setting(key: str) -> str:
    """Return the config key of a location: skip_row for its item skip_row.0."""
    return re.sub(r"(\.\d+)+$", "", key)


def _with_value(problem: ErrorDetails) -> str:
    """Return the problem and the value."""
    value = problem["input"]
    shown = (
        repr(value)
        if isinstance(value, str | bytes | int | float | None)
        else f"{type(value).__name__} {value!r}"
    )
    if len(shown) > MAX_VALUE_CHARACTERS:
        shown = f"{shown[:MAX_VALUE_CHARACTERS]}... ({len(shown)} characters)"
    if isinstance(problem.get("ctx", {}).get("error"), PathError):
        return f"{shown} {problem['ctx']['error']}"
    message = problem["msg"].removeprefix("Value error, ")
    quoted = ""
    if isinstance(value, bool) and problem["type"] in ("string_type", "literal_error"):
        words = ("on", "yes", "true") if value else ("off", "no", "false")
        fitting = [
            word for word in words if problem["type"] == "string_type" or f"'{word}'" in message
        ]
        if fitting:
            quoted = (
                f"; YAML reads {', '.join(words[:2])} and {words[2]} without quotes as a boolean; "
                f"quote the word: '{fitting[0]}'"
            )
    elif problem["type"] == "string_type" and isinstance(value, int | float):
        quoted = "; quote it to make it text"
    return f"{message[0].lower()}{message[1:]}, not {shown}{quoted}"


def _nearest(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else f"; known are {', '.join(known)}"
