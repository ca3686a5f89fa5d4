"""Models of the JSON that is read back from an output folder, to validate it before use.

    _manifest.json          Manifest          RUN/progress.json        ProgressContent
    part footers            Footer            RUN/crash_journal.json   CrashJournalContent
    .gptbatch/digests.json  DigestsContent    RUN/records.jsonl        PartRecord
    .gptbatch/lock          HolderContent     RUN/lock                 HolderContent

RUN is a folder in `.gptbatch/runs`.

Types are strict: "5", 5.0 and true are not integers. Unknown keys, which another version may write,
are kept.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)

MAX_VALUE_CHARACTERS = 60
MAX_TEXT_CHARACTERS = 1 << 16


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT_CHARACTERS:
        raise ValueError(f"a text of at most {MAX_TEXT_CHARACTERS} characters is needed")
    return value


Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
PartRows = Annotated[int, Field(ge=1, le=2**31 - 1)]
# The str of pydantic refuses file names that are not UTF-8.
Text = Annotated[str, PlainValidator(_text)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Kinds = dict[Annotated[str, Field(pattern=r"^[a-z_]{1,40}$")], Count]
Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
PartNumber = Annotated[str, Field(pattern=r"^\d{1,9}$")]
Stat = Annotated[
    list[Annotated[int, Field(ge=-(2**63), lt=2**64)]], Field(min_length=4, max_length=4)
]

PART_NAME_PATTERN = r"part-(\d{5,9})\.parquet"


class _StrictModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class Part(_StrictModel):
    """A written part, as its footer and the manifest describe it.

    Attributes:
        name: The file name.
        first_row: Index of its first row in the input, from 0.
        rows: Number of rows of the input.
        samples: Number of rows of its table: the n samples of each row.
        error_kinds: Number of rows of the input with an error, by the kind of the first one.
        prompt_tokens: Sum over the table.
        completion_tokens: Sum over the table.
        input_rows_digest: SHA-256 of these rows of the input.
        content_digest: SHA-256 of the deterministic columns (see `schema.content_digest`).
    """

    model_config = ConfigDict(extra="ignore")

    name: Annotated[str, Field(pattern=f"^{PART_NAME_PATTERN}$")]
    first_row: Count
    rows: Count
    samples: Count
    error_kinds: Kinds
    prompt_tokens: Count
    completion_tokens: Count
    input_rows_digest: Digest
    content_digest: Digest

    @model_validator(mode="before")
    @classmethod
    def _one_sample_per_row(cls, values: Any) -> Any:
        # Earlier versions wrote one.
        if isinstance(values, dict) and "samples" not in values and "rows" in values:
            return {**values, "samples": values["rows"]}
        return values

    @property
    def errors(self) -> int:
        """Number of rows of the input with an error."""
        return sum(self.error_kinds.values())

    @property
    def number(self) -> int:
        """The part number in the name."""
        return int(self.name.removeprefix("part-").removesuffix(".parquet"))


class PartRecord(Part):
    """A line of `records.jsonl`: a part that a run has written.

    Attributes:
        sha256: SHA-256 of the file.
    """

    sha256: Digest


class Identity(_StrictModel):
    """The identity of a job and its input. Further keys are the settings that decide tokens."""

    config_hash: Digest
    rows: Count | None = None
    part_rows: PartRows | None = None
    limit: Count | None = None
    input_digest: Digest | None = None
    model_digest: Digest | None = None
    tokenizer_digest: Digest | None = None


class RunFacts(_StrictModel):
    """The facts of a run in its manifest and in every footer."""

    format: Annotated[str, Field(pattern=r"^gptbatch-\d+(-[0-9a-f]{8})?$")]
    identity: Identity
    model: Text | None = None
    model_path: Text | None = None
    input: Text | None = None
    dtype: Text | None = None
    device: Text | None = None
    host: Text | None = None
    batch_invariance: Text | None = None
    environment: dict[Text, Text | int | float | bool | None] = {}
    versions: dict[Text, Text | None] = {}


class Manifest(RunFacts):
    """The content of `_manifest.json`."""

    complete: bool = False
    rows: Count = 0
    errors: Count = 0
    error_kinds: Kinds = {}
    parts: list[Part] = []


class Footer(RunFacts, Part):
    """The footer of a part: the facts of its run, and its rows."""


class ProgressContent(_StrictModel):
    """The content of `progress.json` (see ProgressFile)."""

    state: Text | None = None
    rows_total: Count
    rows_done: Count
    error_rows: Count
    tokens_per_s: Annotated[float, Field(ge=0)] | None = None
    remaining_s: Annotated[float, Field(ge=0)] | None = None
    threads: Count | None = None
    updated_at: Time | None = None


class CrashJournalContent(_StrictModel):
    """The content of `crash_journal.json` (see CrashJournal)."""

    parts_in_flight: list[Count]
    parts_reserved: list[Count] = []
    prompt_id: Text | None
    crashes_per_part: dict[PartNumber, Count]


class HolderContent(_StrictModel):
    """The content of a lock file: the process that holds the lock."""

    host: Text
    pid: Count
    since: Time
    job: Text | None = None
    # where `pid` is the number of the process (see run_folder.py)
    pid_space: Text | None = None
    # whether runs of other shards may be going on
    shared: bool = False


class IndexContent(_StrictModel):
    """The metadata of `input_index.parquet` (see index_file.py)."""

    rows: Count
    part_rows: PartRows
    digest: Digest
    bad_rows: Count
    max_n: Annotated[int, Field(ge=1)]
    duplicates: dict[Annotated[str, Field(pattern=r"^\d{1,19}$")], Text]


class PieceContent(_StrictModel):
    """The metadata of a piece of the index (see index_piece.py).

    Attributes:
        input_key: Hash of the settings and files of the input (see `file_hashes.input_key`).
        began_ns: When reading the input began, in nanoseconds since 1970.
        rows: Rows of the input.
        part_rows: Rows per part.
        bad_rows: Bad rows of the piece, without duplicates.
        max_n: The most samples of one row.
        found_ids: The ids of skip_row that its rows have.
    """

    input_key: Digest
    began_ns: Count
    rows: Count
    part_rows: PartRows
    bad_rows: Count
    max_n: Annotated[int, Field(ge=1)]
    found_ids: list[Text]


class FileDigest(_StrictModel):
    """The hash of a file.

    `stat` holds its size, times and inode; None where a later change may not show in these.
    """

    stat: Stat | None
    sha256: Digest


class InputDigest(_StrictModel):
    """The summary of an input, and its files when they were read."""

    settings_sha256: Digest
    files: dict[Text, Stat]
    summary: dict[Text, Any]


class DigestsContent(_StrictModel):
    """The content of `digests.json` (see FileHashes)."""

    files: dict[Text, FileDigest] = {}
    input: InputDigest | None = None
    parts: dict[Text, FileDigest] = {}


Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], content: Any) -> Model:
    """Validate JSON content.

    Raises:
        ValueError: A key is missing or has the wrong type. The message names the key and the value.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        path = ".".join(str(step) for step in problem["loc"])
        # repr escapes control characters.
        key = repr(path[: 2 * MAX_VALUE_CHARACTERS])[1:-1]
        seen = "" if problem["type"] == "missing" else f", not {_shown(problem['input'])}"
        message = problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"{key or 'content'}: {message[0].lower()}{message[1:]}{seen}") from error


def _shown(value: Any) -> str:
    text = (
        repr(value)
        if isinstance(value, (str, int, float, type(None))) and not _huge(value)
        else type(value).__name__
    )
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[:MAX_VALUE_CHARACTERS]}..."


def _huge(value: Any) -> bool:
    """Return whether a value is an integer too long to print: Python refuses 4,300 digits."""
    return isinstance(value, int) and value.bit_length() > 128
