"""The settings of a job: names, ranges, defaults and help texts. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, model_validator
from pydantic.fields import FieldInfo

from gptbatch.pipeline.config.engine_settings import EngineConfig, Section, unportable_setting
from gptbatch.pipeline.config.values import (
    BatchInvarianceSetting,
    CountOrShare,
    InputPath,
    InputPaths,
    Name,
    OutputPath,
    PromptTemplate,
    RowSettings,
    Texts,
    TokenIds,
    TokenValues,
    checked_shard,
)
from gptbatch.pipeline.params.sampling_params import (
    SamplingParams,
    to_attribute,
    to_json_value,
)
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS
from gptbatch.pipeline.system.redact import redact


def _sampling_field(name: str) -> Any:
    """Return the field of a sampling setting, with its default, range and description."""
    setting = SAMPLING_SETTINGS[name]
    limits: dict[str, Any] = {}
    if setting.kind in ("int", "float"):
        lower = "gt" if setting.above_minimum else "ge"
        limits = {lower: setting.minimum, "le": setting.maximum}
    elif setting.kind != "bool":
        limits = {"max_length": setting.max_items}
    default = to_json_value(setting.default, setting)
    return Field(default, **limits, description=setting.help)


class JobConfig(Section):
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
    input: InputPaths | None = Field(
        None,
        description=(
            "File of JSON Lines, compressed or not, or Parquet; a folder or a pattern of such "
            "files; - is standard input."
        ),
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
    prompt_template: PromptTemplate | None = Field(
        None,
        description=(
            "Text of every prompt, with names of fields in braces, as in 'Q: {question}', instead "
            "of prompt_field. Dots select nested values. {{ and }} are braces."
        ),
    )
    messages_field: Name | None = Field(
        None,
        description=(
            "Field of a row that holds the messages of a chat, instead of prompt_field. Each "
            "message is followed by the EOS token, as for DialoGPT."
        ),
    )
    id_field: str = Field(
        "id",
        description=(
            "Field of a row that holds its id. Dots select nested values. Empty: the id is the "
            "row index, so ids and seeds change when rows are reordered."
        ),
    )
    row_settings: RowSettings | None = Field(
        None,
        description=(
            "Sampling setting that a row may have as a field of the same name. Fields with the "
            "names of other settings are metadata. none: all are metadata. Default: every setting."
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
            "Rows of the input per Parquet file; a crash costs those of unfinished files. Default: "
            "that of the run that is continued; else 512, and more above 5.12 million rows; with n "
            "above 1, 512 / n."
        ),
    )
    shard: Annotated[Name, AfterValidator(checked_shard)] | None = Field(
        None,
        description=(
            "Shard I of N, I from 0 to N - 1: generate its range of parts, then missing parts of "
            "other shards. All shards write into one folder. `plan` predicts the shard, and `plan "
            "--index` checks its rows. auto: from the variables of Slurm, Kubernetes, SkyPilot, "
            "torchrun or MPI. Default: all parts."
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
    ids: Literal["checked", "trusted"] = Field(
        "checked",
        description=(
            "Search for ids that several rows have. checked: such rows are bad. trusted: they are "
            "not searched for, which saves memory and time if the ids are known to be unique."
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
    top_p: float = _sampling_field("top_p")
    min_p: float = _sampling_field("min_p")
    repetition_penalty: float = _sampling_field("repetition_penalty")
    presence_penalty: float = _sampling_field("presence_penalty")
    frequency_penalty: float = _sampling_field("frequency_penalty")
    no_repeat_ngram_size: int = _sampling_field("no_repeat_ngram_size")
    logit_bias: TokenValues = _sampling_field("logit_bias")
    allowed_token_ids: TokenIds | None = _sampling_field("allowed_token_ids")
    bad_words: Texts = _sampling_field("bad_words")
    max_new_tokens: int = _sampling_field("max_new_tokens")
    min_new_tokens: int = _sampling_field("min_new_tokens")
    stop: Texts = _sampling_field("stop")
    include_stop_str_in_output: bool = _sampling_field("include_stop_str_in_output")
    stop_token_ids: TokenIds = _sampling_field("stop_token_ids")
    n: int = _sampling_field("n")
    logprobs: int | None = _sampling_field("logprobs")
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
            "Action for a prompt with characters that the tokenizer drops (byte-level ones, such "
            "as GPT-2's, drop none). error: write an error row. warn: generate without them, and "
            "log the number of such rows."
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
    batch_invariance: BatchInvarianceSetting = Field(
        "auto",
        description=(
            "Test at start-up that the results of a row do not depend on the other rows of its "
            "batch. auto: log a warning if the test fails. require: stop if it fails. portable: "
            "also stop if they depend on the machine. off: skip the test."
        ),
    )
    record_logits_digest: bool = Field(
        False,
        description="Fill the column logits_digest with a SHA-256 of the logits of every step.",
    )
    engine: EngineConfig = Field(
        default_factory=lambda: EngineConfig(), description="How the job runs on this machine."
    )

    @classmethod
    def _known_keys(cls) -> list[str]:
        return list(config_fields())

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.input is None) == (self.dataset is None):
            both = ", not both" if self.input else ""
            raise ValueError(f"give either input or dataset{both}")
        return self

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        given = {
            "prompt_field": self.prompt_field != "prompt",
            "prompt_template": self.prompt_template is not None,
            "messages_field": self.messages_field is not None,
        }
        names = [name for name, is_given in given.items() if is_given]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)}: each says where prompts come from; give one")
        if self.messages_field is not None and self.parse_special:
            raise ValueError(
                "messages_field and parse_special: the text of a special token in a message is "
                "always plain text; leave parse_special out"
            )
        return self

    @model_validator(mode="after")
    def _no_shard_overwrites(self) -> Self:
        if self.shard is not None and self.overwrite:
            raise ValueError(
                "shard and overwrite: a shard would delete the parts of the others; delete the "
                "output folder before the shards start"
            )
        return self

    @model_validator(mode="after")
    def _portable_engine(self) -> Self:
        if self.batch_invariance == "portable" and (problem := unportable_setting(self.engine)):
            raise ValueError(f"batch_invariance is portable, which needs {problem}")
        return self

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if problem := self.sampling.problem():
            raise ValueError(problem)
        return self

    @property
    def inputs(self) -> list[str]:
        """The paths in `input`; empty for a dataset."""
        return [self.input] if isinstance(self.input, str) else self.input or []

    @property
    def sampling(self) -> SamplingParams:
        """The sampling settings of the run. Its seed is the run seed."""
        return SamplingParams(
            **{
                name: to_attribute(getattr(self, name), setting)
                for name, setting in SAMPLING_SETTINGS.items()
            }
        )

    def to_yaml(self) -> str:
        """Return the resolved config as YAML, without secrets."""
        # These texts decide the rows, and are read again.
        texts = ("prompt_template", "stop", "bad_words")
        settings = _redacted(self.model_dump()) | {name: getattr(self, name) for name in texts}
        text: str = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        return text


def config_fields() -> dict[str, FieldInfo]:
    """Return every config key by its full name: `seed`, `engine.dtype`."""
    fields = {name: info for name, info in JobConfig.model_fields.items() if name != "engine"}
    return fields | {f"engine.{name}": info for name, info in EngineConfig.model_fields.items()}


def _redacted(value: Any) -> Any:
    """Redact each setting by itself, so that a path with blanks stays whole."""
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value
