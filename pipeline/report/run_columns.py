"""RunColumns: the numbers of all rows of a run as arrays, read part by part.

An array holds a value per row of the table, in the order of the table: 37 bytes per row in all.
Times and margins are kept in float32, so their seventh digit is rounded. Texts are not kept.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gptbatch.pipeline.audit.run_reader import RunReader

SAMPLED_ROWS = 300
MAX_REASONS_OF_ERRORS = 50
MAX_ROWS_PER_REASON = 20
OTHER_REASONS = "other reasons"
_FLOATS = ("queue_s", "prefill_s", "decode_s", "min_decision_margin")
_INTEGERS = ("prompt_tokens", "completion_tokens", "cached_tokens")
_COLUMNS = (
    "prompt_id",
    "sample_index",
    "finish_reason",
    "stop_reason",
    "error",
    "started_at",
    "cumulative_logprob",
    *_FLOATS,
    *_INTEGERS,
)
# What differs between the messages of one kind of error: numbers, and quoted values.
_VALUES = re.compile(r"'(?:[^'\\]|\\.){0,200}'|\"(?:[^\"\\]|\\.){0,200}\"|\d[\d_,.]*")
_MAX_REASON_CHARACTERS = 160

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Integers = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorGroup:
    """Error rows whose reasons differ in numbers and quoted values alone.

    Attributes:
        reason: The common reason, with `#` for these values.
        count: Number of rows.
        rows: Indices of the first MAX_ROWS_PER_REASON of them.
    """

    reason: str
    count: int
    rows: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunColumns:
    """The numbers of all rows.

    Attributes:
        started_s: Time of the first step, in seconds since 1970; NaN for a row that never ran.
        queue_s: The column; NaN for null, as in all columns of floats here.
        prefill_s: The column.
        decode_s: The column.
        margins: The column min_decision_margin.
        logprobs: The column cumulative_logprob; None where all rows have null.
        prompt_tokens: The column.
        completion_tokens: The column.
        cached_tokens: The column; 0 for null.
        ends: Index in `end_names` of each row's stop_reason, or of `error`.
        end_names: The stop reasons that occur.
        sample: Indices of the rows with the smallest hashes of prompt_id and sample_index, which
            are the same in every run of an input.
        errors: Error rows by reason, the most frequent first.
    """

    started_s: Floats
    queue_s: Floats
    prefill_s: Floats
    decode_s: Floats
    margins: Floats
    logprobs: Floats | None
    prompt_tokens: Integers
    completion_tokens: Integers
    cached_tokens: Integers
    ends: np.ndarray[Any, np.dtype[np.uint8]]
    end_names: list[str]
    sample: list[int]
    errors: list[ErrorGroup]

    def __len__(self) -> int:
        return len(self.started_s)

    @property
    def ended_s(self) -> Floats:
        """Time of the last new token, in seconds since 1970."""
        return self.started_s + self.prefill_s + self.decode_s


@dataclass
class _Reasons:
    """Collects the reasons of error rows."""

    counts: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    rows: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def add(self, index: int, reason: str) -> None:
        name = _VALUES.sub("#", reason[: 4 * _MAX_REASON_CHARACTERS])[:_MAX_REASON_CHARACTERS]
        if name not in self.counts and len(self.counts) >= MAX_REASONS_OF_ERRORS:
            name = OTHER_REASONS
        self.counts[name] += 1
        if len(self.rows[name]) < MAX_ROWS_PER_REASON:
            self.rows[name].append(index)

    def groups(self) -> list[ErrorGroup]:
        ordered = sorted(self.counts, key=lambda name: (-self.counts[name], name))
        return [
            ErrorGroup(reason=name, count=self.counts[name], rows=self.rows[name])
            for name in ordered
        ]


class _Sample:
    """Collects the rows with the smallest hashes.

    Args:
        count: Number of rows.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._hashes, self._rows = np.zeros(0, np.uint64), np.zeros(0, np.int64)

    def add(self, first: int, hashes: np.ndarray[Any, np.dtype[np.uint64]]) -> None:
        self._hashes = np.concatenate([self._hashes, hashes])
        self._rows = np.concatenate([self._rows, np.arange(first, first + len(hashes))])
        if len(self._hashes) > self._count:
            kept = np.argpartition(self._hashes, self._count)[: self._count]
            self._hashes, self._rows = self._hashes[kept], self._rows[kept]

    def rows(self) -> list[int]:
        rows: list[int] = np.sort(self._rows).tolist()
        return rows


def read_columns(run: RunReader, sampled: int = SAMPLED_ROWS) -> RunColumns:
    """Read the columns of numbers of all rows.

    Args:
        run: The run.
        sampled: Rows of the sample by hash.

    Raises:
        StorageError: A part cannot be read.
    """
    n = run.n_rows
    floats = {name: np.full(n, np.nan, np.float32) for name in _FLOATS}
    started_s = np.full(n, np.nan)
    logprobs: Floats | None = None
    integers = {name: np.zeros(n, np.int32) for name in _INTEGERS}
    ends = np.zeros(n, np.uint8)
    sample = _Sample(sampled)
    end_names: list[str] = []
    reasons = _Reasons()
    first = 0
    for batch in run.batches(_COLUMNS):
        rows = slice(first, first + len(batch))
        started_s[rows] = _numbers(batch["started_at"], np.int64, np.nan) / 1e6
        for name in _FLOATS:
            floats[name][rows] = _numbers(batch[name], np.float64, np.nan)
        for name in _INTEGERS:
            integers[name][rows] = _numbers(batch[name], np.int32, 0)
        if batch["cumulative_logprob"].null_count < len(batch):
            logprobs = np.full(n, np.nan, np.float32) if logprobs is None else logprobs
            logprobs[rows] = _numbers(batch["cumulative_logprob"], np.float64, np.nan)
        ends[rows] = _codes(pc.coalesce(batch["stop_reason"], batch["finish_reason"]), end_names)
        sample.add(first, _hashes(batch["prompt_id"], batch["sample_index"]))
        for offset in pc.indices_nonzero(batch["error"].is_valid()).to_pylist():
            reasons.add(first + offset, batch["error"][offset].as_py())
        first += len(batch)
    return RunColumns(
        started_s=started_s,
        queue_s=floats["queue_s"],
        prefill_s=floats["prefill_s"],
        decode_s=floats["decode_s"],
        margins=floats["min_decision_margin"],
        logprobs=logprobs,
        prompt_tokens=integers["prompt_tokens"],
        completion_tokens=integers["completion_tokens"],
        cached_tokens=integers["cached_tokens"],
        ends=ends,
        end_names=end_names,
        sample=sample.rows(),
        errors=reasons.groups(),
    )


def row_hash(prompt_id: str, sample_index: int = 0) -> int:
    """Return the hash of a sample, in 64 bits."""
    data = f"{prompt_id}\0{sample_index}" if sample_index else prompt_id
    return int.from_bytes(hashlib.blake2b(data.encode(), digest_size=8).digest(), "little")


def row_hashes(run: RunReader) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return row_hash of all rows of a run, in the order of the table.

    Raises:
        StorageError: A part cannot be read.
    """
    batches = run.batches(["prompt_id", "sample_index"])
    hashes = [_hashes(batch["prompt_id"], batch["sample_index"]) for batch in batches]
    return np.concatenate([np.zeros(0, np.uint64), *hashes])


def _hashes(ids: pa.Array, samples: pa.Array) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return row_hash of a batch."""
    blake2b = hashlib.blake2b
    texts = ids.cast(pa.binary()).to_pylist()
    indices = _numbers(samples, np.int32, 0)
    for row in np.flatnonzero(indices):
        texts[row] += f"\0{indices[row]}".encode()
    digests = b"".join([blake2b(text, digest_size=8).digest() for text in texts])
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def _numbers(values: pa.Array, dtype: type[np.generic], missing: float) -> Any:
    """Return numbers as an array, with `missing` for null. Arrow's to_numpy would import pandas."""
    validity, data = values.buffers()
    rows = slice(values.offset, values.offset + len(values))
    numbers = np.frombuffer(data, dtype)[rows]
    if not values.null_count:
        return numbers
    valid = np.unpackbits(np.frombuffer(validity, np.uint8), bitorder="little")[rows]
    return np.where(valid, numbers, missing)


def _codes(values: pa.Array, names: list[str]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the index of each value in `names`, which gets the new values."""
    encoded = values.dictionary_encode()
    codes = []
    for name in encoded.dictionary.to_pylist():
        if name not in names:
            names.append(name)
        codes.append(names.index(name))
    numbers: np.ndarray[Any, np.dtype[np.uint8]]
    numbers = np.array(codes, np.uint8)[_numbers(encoded.indices, np.int32, 0)]
    return numbers
