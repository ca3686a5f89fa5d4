"""The types of all JSON that is read back from an output folder; each file is validated before anything uses it.

    _manifest.json   Manifest      .gptbatch/progress.json   Progress
    part footers     Footer        .gptbatch/crash_journal.json   CrashJournalContent
                                   .gptbatch/digests.json    Digests
                                   .gptbatch/holder.json     Holder

Types are strict: "5", 5.0 and true are no integers. Keys that another version added are kept.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

MAX_VALUE_SHOWN = 60  # characters
MAX_TEXT = 1 << 16  # characters


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ValueError(f"a text of at most {MAX_TEXT} characters is needed")
    return value


Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
PartRows = Annotated[int, Field(ge=1, le=2**31 - 1)]
# pydantic's own text refuses names that are not UTF-8
Text = Annotated[str, PlainValidator(_text)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Kinds = dict[Annotated[str, Field(pattern=r"^[a-z_]{1,40}$")], Count]
Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
PartNumber = Annotated[str, Field(pattern=r"^\d{1,9}$")]
Stat = Annotated[
    list[Annotated[int, Field(ge=-(2**63), lt=2**64)]], Field(min_length=4, max_length=4)
]

PART_NAME_PATTERN = r"part-(\d{5,9})\.parquet"


class _Recorded(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class Part(_Recorded):
    """A written part: the rows that it holds and how they ended. Its footer says so, and so does the manifest.

    error_kinds: number of error rows by kind. input_rows_digest: SHA-256 of these rows of the input. content_digest: SHA-256 of
    the deterministic columns. prompt_tokens and completion_tokens: sums over the rows.
    """

    model_config = ConfigDict(extra="ignore")

    name: Annotated[str, Field(pattern=f"^{PART_NAME_PATTERN}$")]
    first_row: Count
    rows: Count
    error_kinds: Kinds
    prompt_tokens: Count
    completion_tokens: Count
    input_rows_digest: Digest
    content_digest: Digest

    @property
    def errors(self) -> int:
        return sum(self.error_kinds.values())

    @property
    def number(self) -> int:
        return int(self.name.removeprefix("part-").removesuffix(".parquet"))


class Identity(_Recorded):
    """What makes two runs the same job, and the input that they read. Other keys are settings that change tokens."""

    config_hash: Digest
    rows: Count | None = None
    part_rows: PartRows | None = None
    limit: Count | None = None
    input_digest: Digest | None = None
    model_digest: Digest | None = None
    tokenizer_digest: Digest | None = None


class RunFacts(_Recorded):
    """What the manifest and each footer say of the run."""

    format: Annotated[str, Field(pattern=r"^gptbatch-\d+(-[0-9a-f]{8})?$")]
    identity: Identity
    model: Text | None = None
    model_path: Text | None = None
    input: Text | None = None
    dtype: Text | None = None
    device: Text | None = None
    batch_invariance: Text | None = None
    environment: dict[Text, Text | int | float | bool | None] = {}
    versions: dict[Text, Text | None] = {}


class Manifest(RunFacts):
    complete: bool = False
    rows: Count = 0
    errors: Count = 0
    error_kinds: Kinds = {}
    parts: list[Part] = []


class Footer(RunFacts, Part):
    """Of the part that has it."""


class Progress(_Recorded):
    state: Text | None = None
    rows_total: Count
    rows_done: Count
    error_rows: Count
    tokens_per_s: Annotated[float, Field(ge=0)] | None = None
    remaining_s: Annotated[float, Field(ge=0)] | None = None
    updated_at: Time | None = None


class CrashJournalContent(_Recorded):
    parts_in_flight: list[Count]
    prompt_id: Text | None
    crashes_per_part: dict[PartNumber, Count]


class Holder(_Recorded):
    host: Text
    pid: Count
    since: Time


class FileDigest(_Recorded):
    stat: Stat | None
    sha256: Digest


class InputMemory(_Recorded):
    settings: Digest
    files: dict[Text, Stat]
    found: dict[Text, Any]


class Digests(_Recorded):
    files: dict[Text, FileDigest] = {}
    input: InputMemory | None = None
    parts: dict[Text, FileDigest] = {}


Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], content: Any) -> Model:
    """The content as the model has it. Raises ValueError that names the key, and the value seen, at fault."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        key = repr(".".join(str(step) for step in problem["loc"])[: 2 * MAX_VALUE_SHOWN])[
            1:-1
        ]  # it may hold control characters
        seen = "" if problem["type"] == "missing" else f", not {_shown(problem['input'])}"
        message = problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"{key or 'content'}: {message[0].lower()}{message[1:]}{seen}") from error


def _shown(value: Any) -> str:
    text = (
        repr(value)
        if isinstance(value, (str, int, float, type(None))) and not _huge(value)
        else type(value).__name__
    )
    return text if len(text) <= MAX_VALUE_SHOWN else f"{text[:MAX_VALUE_SHOWN]}..."


def _huge(value: Any) -> bool:
    """Python refuses to print whole numbers of more than 4,300 digits."""
    return isinstance(value, int) and value.bit_length() > 128
