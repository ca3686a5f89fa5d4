"""The schema of the table that a run writes, and the table of completions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from gptbatch.pipeline.params.sampling_params import to_column
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS
from gptbatch.pipeline.types import Completion, Sample, Timing, TokenLogprobs

Kind = Literal["deterministic", "observed"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        name: The name.
        type: The Arrow type.
        nullable: Whether values may be null.
        kind: "deterministic": equal in every run of the job. "observed": a timing or count of this
            run.
        unit: The unit; "" for none.
        meaning: A description, stored in the metadata of the field.
    """

    name: str
    type: pa.DataType
    nullable: bool
    kind: Kind
    unit: str
    meaning: str

    @property
    def field(self) -> pa.Field:
        """The Arrow field."""
        metadata = {"kind": self.kind, "unit": self.unit, "meaning": self.meaning}
        return pa.field(self.name, self.type, nullable=self.nullable, metadata=metadata)


def _fixed(
    name: str, type_: pa.DataType, meaning: str, *, nullable: bool = False, unit: str = ""
) -> Column:
    return Column(name, type_, nullable, "deterministic", unit, meaning)


def _observed(name: str, type_: pa.DataType, meaning: str, *, unit: str = "s") -> Column:
    return Column(name, type_, True, "observed", unit, meaning)


COLUMNS = (
    _fixed(
        "prompt_id", pa.string(), "the row's id; the row index as text where the input gave none"
    ),
    _fixed("prompt_index", pa.int64(), "index of the row in the input, from 0"),
    _fixed("sample_index", pa.int32(), "index of the sample among the n of its prompt, from 0"),
    _fixed("prompt", pa.string(), "the prompt", nullable=True),
    _fixed(
        "completion",
        pa.string(),
        "the generated text, without the prompt, a final EOS or stop token, and a stop string and "
        "what follows it; null for an error",
        nullable=True,
    ),
    _fixed(
        "completion_token_ids",
        pa.list_(pa.int32()),
        "the generated tokens, the one that ended the row included; empty for an error",
    ),
    _fixed(
        "finish_reason", pa.string(), "stop (EOS token, stop token or stop string), length or error"
    ),
    _fixed(
        "stop_reason",
        pa.string(),
        "end_of_text, stop_token, stop_string, max_new_tokens or window (the context was full); "
        "null for an error",
        nullable=True,
    ),
    _fixed("stop_string", pa.string(), "the stop string that ended the row", nullable=True),
    _fixed(
        "error", pa.string(), "why there is no completion; null when there is one", nullable=True
    ),
    _fixed(
        "prompt_tokens",
        pa.int32(),
        "tokens of the prompt, without dropped ones",
        unit="tokens",
    ),
    _fixed("completion_tokens", pa.int32(), "length of completion_token_ids", unit="tokens"),
    _fixed(
        "prompt_tokens_dropped",
        pa.int32(),
        "tokens cut off the prompt's front by truncate_left",
        unit="tokens",
    ),
    *(
        _fixed(name, pa.type_for_alias(setting.column_type), setting.meaning, unit=setting.unit)
        for name, setting in SAMPLING_SETTINGS.items()
        if setting.column_type is not None
    ),
    _fixed(
        "sampling_params",
        pa.string(),
        "the other sampling settings that differ from their defaults, as JSON; null for none",
        nullable=True,
    ),
    _fixed(
        "metadata",
        pa.string(),
        "the row's other fields as JSON text; null when there are none",
        nullable=True,
    ),
    _fixed(
        "min_decision_margin",
        pa.float64(),
        "smallest decision margin of all steps: no token changes if every logit changes by less "
        "than half of it; null without a step",
        nullable=True,
        unit="logits",
    ),
    _fixed(
        "cumulative_logprob",
        pa.float64(),
        "sum of token_logprobs; null without the setting logprobs",
        nullable=True,
        unit="nats",
    ),
    _fixed(
        "token_logprobs",
        pa.list_(pa.float32()),
        "log probability of each generated token, by softmax(logits); null without logprobs",
        nullable=True,
        unit="nats",
    ),
    _fixed(
        "top_logprob_ids",
        pa.list_(pa.int32()),
        "the logprobs most likely tokens of each step, one step after the other; null without it",
        nullable=True,
    ),
    _fixed(
        "top_logprobs",
        pa.list_(pa.float32()),
        "log probabilities of top_logprob_ids; null without logprobs",
        nullable=True,
        unit="nats",
    ),
    _fixed(
        "logits_digest",
        pa.string(),
        "SHA-256 of the bits of all logits of the row; null without record_logits_digest",
        nullable=True,
    ),
    _observed("queue_s", pa.float64(), "from reading the row to its first step"),
    _observed("prefill_s", pa.float64(), "from its first step to its first new token"),
    _observed("decode_s", pa.float64(), "from its first new token to its last"),
    _observed("total_s", pa.float64(), "queue_s + prefill_s + decode_s"),
    _observed("time_to_first_token_s", pa.float64(), "queue_s + prefill_s"),
    _observed(
        "tokens_per_s",
        pa.float64(),
        "(completion_tokens - 1) / decode_s; null below 2 tokens",
        unit="tokens/s",
    ),
    _observed(
        "mean_batch_size",
        pa.float64(),
        "mean number of rows per step while the row was running",
        unit="rows",
    ),
    _observed(
        "started_at",
        pa.timestamp("us", tz="UTC"),
        "time of the row's first step",
        unit="UTC",
    ),
    _observed(
        "cached_tokens",
        pa.int32(),
        "tokens of the prompt found in the prefix cache",
        unit="tokens",
    ),
)
SCHEMA = pa.schema([column.field for column in COLUMNS])
DETERMINISTIC_COLUMNS = [column.name for column in COLUMNS if column.kind == "deterministic"]
# Covers name, type, nullability and kind of every column: parts of different schemas never form one
# run.
SCHEMA_DIGEST = hashlib.sha256(
    "\n".join(
        f"{column.name} {column.type} {column.nullable} {column.kind}" for column in COLUMNS
    ).encode()
).hexdigest()[:8]

# The version of the folder's layout, and the digest of the schema of its parts.
FORMAT = f"gptbatch-5-{SCHEMA_DIGEST}"
LOGPROB_COLUMNS = ("cumulative_logprob", "token_logprobs", "top_logprob_ids", "top_logprobs")
_SETTING_COLUMNS = [name for name, setting in SAMPLING_SETTINGS.items() if setting.column_type]


def to_table(samples: Sequence[Sample]) -> pa.Table:
    """Return completions and their texts as a table, in the given order."""
    done = [sample.completion for sample in samples]
    prompts = [completion.prompt for completion in done]
    logprobs = [
        None if completion.logprobs is None else logprob_columns(completion.logprobs)
        for completion in done
    ]
    columns: dict[str, list[Any]] = {
        "prompt_id": [prompt.prompt_id for prompt in prompts],
        "prompt_index": [prompt.index for prompt in prompts],
        "sample_index": [prompt.sample_index for prompt in prompts],
        "prompt": [prompt.text for prompt in prompts],
        "completion": [sample.text for sample in samples],
        "completion_token_ids": [completion.token_ids for completion in done],
        "finish_reason": [completion.finish_reason for completion in done],
        "stop_reason": [completion.stop_reason for completion in done],
        "stop_string": [completion.stop_string for completion in done],
        "error": [completion.error and completion.error.reason for completion in done],
        "prompt_tokens": [completion.prompt_tokens for completion in done],
        "completion_tokens": [len(completion.token_ids) for completion in done],
        "prompt_tokens_dropped": [completion.prompt_tokens_dropped for completion in done],
        **{name: [getattr(prompt.params, name) for prompt in prompts] for name in _SETTING_COLUMNS},
        "sampling_params": [to_column(prompt.params) for prompt in prompts],
        "metadata": [prompt.metadata for prompt in prompts],
        "min_decision_margin": [completion.min_decision_margin for completion in done],
        **{name: [row and row[name] for row in logprobs] for name in LOGPROB_COLUMNS},
        "logits_digest": [completion.logits_digest for completion in done],
        **_timing_columns(done),
    }
    arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def logprob_columns(logprobs: list[TokenLogprobs]) -> dict[str, Any]:
    """Return the columns of the log probabilities of a row."""
    return {
        "cumulative_logprob": math.fsum(token.logprob for token in logprobs),
        "token_logprobs": [token.logprob for token in logprobs],
        "top_logprob_ids": [top for token in logprobs for top in token.top_ids],
        "top_logprobs": [top for token in logprobs for top in token.top_logprobs],
    }


def _timing_columns(completions: Sequence[Completion]) -> dict[str, list[Any]]:
    def column(value_of: Callable[[Timing], Any]) -> list[Any]:
        return [completion.timing and value_of(completion.timing) for completion in completions]

    return {
        "queue_s": column(lambda timing: timing.queue_s),
        "prefill_s": column(lambda timing: timing.prefill_s),
        "decode_s": column(lambda timing: timing.decode_s),
        "total_s": column(lambda timing: timing.total_s),
        "time_to_first_token_s": column(lambda timing: timing.time_to_first_token_s),
        "tokens_per_s": [_tokens_per_s(completion) for completion in completions],
        "mean_batch_size": column(lambda timing: timing.mean_batch_size),
        "started_at": column(lambda timing: round(timing.started_at_s * 1e6)),
        "cached_tokens": column(lambda timing: timing.cached_tokens),
    }


def _tokens_per_s(completion: Completion) -> float | None:
    timing, count = completion.timing, len(completion.token_ids)
    if timing is None or count < 2 or timing.decode_s <= 0:
        return None
    return (count - 1) / timing.decode_s


def content_digest(table: pa.Table) -> str:
    """Return the SHA-256 of the deterministic columns in canonical form.

    It is equal for equal rows, independent of machine, time and storage.

    For each of these columns, in the order of the schema, three SHA-256 are computed:

        nulls: one byte per row, 1 for null
        lengths: of texts and lists, int64 per row, 0 for null
        values: concatenated; texts as UTF-8, numbers little-endian, 0 for a null number

    The digest is the SHA-256 of the number of rows and all of these.
    """
    whole = hashlib.sha256(str(table.num_rows).encode())
    for name in DETERMINISTIC_COLUMNS:
        nulls, lengths, values = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        for chunk in table.column(name).chunks:
            nulls.update(_bytes(chunk.is_null().cast(pa.uint8())))
            if pa.types.is_string(chunk.type):
                chunk = chunk.fill_null("")
                lengths.update(_bytes(pc.binary_length(chunk).cast(pa.int64())))
                values.update(_text_bytes(chunk))
            elif pa.types.is_list(chunk.type):
                lengths.update(_bytes(pc.list_value_length(chunk).cast(pa.int64()).fill_null(0)))
                values.update(_bytes(chunk.flatten()))
            else:
                values.update(_bytes(chunk.fill_null(0)))
        for part in (nulls, lengths, values):
            whole.update(part.digest())
    return whole.hexdigest()


def _bytes(numbers: pa.Array) -> bytes:
    array = numbers.to_numpy(zero_copy_only=False)
    return bytes(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())


def _text_bytes(texts: pa.Array) -> bytes:
    """Return the concatenated bytes of all texts."""
    if not len(texts):
        return b""
    _, offsets, data = texts.buffers()
    ends = memoryview(offsets).cast("i")
    first, last = ends[texts.offset], ends[texts.offset + len(texts)]
    return b"" if data is None else memoryview(data)[first:last].tobytes()
