"""From raw rows to prompts: which fields a row has, their exact types, and the check of a whole input before a run."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.errors import ConfigError, InputRowsError
from gptbatch.pipeline.input.dataset import DatasetSplit
from gptbatch.pipeline.input.fields import (
    MISSING,
    SETTINGS,
    fields_on_the_way,
    name_fields,
    parse_id,
    parse_integer,
    parse_temperature,
    take_field,
    take_prompt,
    to_json_values,
)
from gptbatch.pipeline.input.jsonl import MAX_NESTING, JsonlFile, shorten, to_json
from gptbatch.pipeline.input.row_warnings import RowWarnings
from gptbatch.pipeline.input.source import RawRow, RowSource
from gptbatch.pipeline.system.bundled import locate
from gptbatch.pipeline.types import DEFAULT_PART_ROWS, MAX_SEED, Prompt, SamplingParams

MAX_NAMED_ROWS = 20
MAX_NAMED_PER_REASON = 6
INT32_MAX = 2**31 - 1
_PLACE = re.compile(r"(.*(?::| row ))(\d+)", re.DOTALL)
_CANONICAL = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_CHANGED = "the input has changed since it was checked"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that is no prompt, and why."""

    index: int
    where: str
    line: int
    reason: str

    @property
    def prompt_id(self) -> str:
        """What an error row is called whose own id, if any, is not to be had."""
        return f"line:{self.line}"

    def canonical(self) -> bytes:
        return _CANONICAL.encode([self.prompt_id, self.reason]).encode("utf-8") + b"\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodRow:
    """A row that is a prompt. own: its own seed, temperature, top_k and max_new_tokens, None where it takes the run's."""

    index: int
    where: str
    line: int
    prompt: Prompt
    own: tuple[int | float | None, ...]

    @property
    def prompt_id(self) -> str:
        return self.prompt.prompt_id

    def canonical(self) -> bytes:
        """What the digest of an input is made of: what the row says, not what the run adds."""
        values = [self.prompt.prompt_id, self.prompt.text, *self.own, self.prompt.metadata]
        return _CANONICAL.encode(values).encode("utf-8") + b"\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowDefaults:
    """Where a row's prompt and id stand, and what it takes where it has no setting of its own.

    prompt_field, id_field: keys or dotted paths. metadata_fields: names of `id` and of settings that are metadata in this input.
    seed: the run seed, from which row seeds are derived.
    """

    prompt_field: str
    seed: int
    temperature: float
    top_k: int
    max_new_tokens: int
    id_field: str = "id"
    metadata_fields: frozenset[str] = frozenset()

    def params(
        self,
        prompt_id: str,
        *,
        seed: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        max_new_tokens: int | None = None,
    ) -> SamplingParams:
        """The parameters of a row; None where it has none of its own."""
        return SamplingParams(
            seed=derive_seed(self.seed, prompt_id) if seed is None else seed,
            temperature=self.temperature if temperature is None else temperature,
            top_k=self.top_k if top_k is None else top_k,
            max_new_tokens=self.max_new_tokens if max_new_tokens is None else max_new_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSummary:
    """What a check of all rows found.

    digest: SHA-256 of all that a run takes from the rows. part_digests: the same of each part of `part_rows` rows. digest_at: the
    same of the first so many rows, for the counts that were asked for and for all. bad_rows: how many are to be recorded as errors.
    clashes: by index, those of them whose id another row has, and the line of that one.
    """

    rows: int
    digest: str
    part_rows: int
    part_digests: list[str]
    digest_at: dict[int, str]
    bad_rows: int
    clashes: dict[int, int]


def derive_seed(run_seed: int, prompt_id: str) -> int:
    """The row seed of a row without one: 63 bits of SHA-256 over the run seed and the prompt id."""
    message = b"gptbatch row seed\0" + run_seed.to_bytes(8, "little") + prompt_id.encode("utf-8")
    return int.from_bytes(hashlib.sha256(message).digest()[:8], "little") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReader:
    """The prompts of a source. limit: read only that many rows, None reads all.

    record_bad: bad rows are rows of the table, each an error with its reason; else they are refused.
    """

    source: RowSource
    defaults: RowDefaults
    limit: int | None = None
    record_bad: bool = False

    def rows(self) -> Iterator[GoodRow | BadRow]:
        """Every row in input order, good or bad. That ids are unique is `check`'s to say."""
        yield from self._rows(RowWarnings())

    def _rows(self, notices: RowWarnings) -> Iterator[GoodRow | BadRow]:
        for index, raw in enumerate(islice(self.source.rows(), self.limit)):
            yield self._read(index, raw, notices)

    def check(
        self,
        *,
        part_rows: int = DEFAULT_PART_ROWS,
        counts: Iterable[int] = (),
        must_hold: Iterable[str] = (),
    ) -> InputSummary:
        """Read everything once, keeping at most 16 bytes a row, and 100 for each row whose id another one has.

        counts: for InputSummary.digest_at. must_hold: ids that some row must have.
        Raises InputRowsError that names the first 20 bad rows; a repeated id names both its lines.
        """
        bad = _BadRows()
        rows = 0
        notices = RowWarnings()
        id_hashes = array("Q")
        digest, part_digest = hashlib.sha256(), hashlib.sha256()
        part_digests: list[str] = []
        counts, missing, digest_at = set(counts), set(must_hold), {0: digest.hexdigest()}
        for row in self._rows(notices):
            rows += 1
            if isinstance(row, BadRow):
                bad.add(row)
            if missing:
                missing.discard(row.prompt_id)
            if isinstance(row, GoodRow) or self.record_bad:
                id_hashes.append(_id_hash(row.prompt_id))
            canonical = row.canonical()
            digest.update(canonical)
            part_digest.update(canonical)
            if rows % part_rows == 0:
                part_digests.append(part_digest.hexdigest())
                part_digest = hashlib.sha256()
            if rows in counts:
                digest_at[rows] = digest.hexdigest()
        if rows % part_rows or rows == 0:
            part_digests.append(part_digest.hexdigest())
        digest_at[rows] = digest.hexdigest()
        clashes = self._clashes(_hashes_met_twice(id_hashes))
        notices.tell(self.source.name, rows)
        if (bad.count or clashes) and not self.record_bad:
            raise self._refusal(bad, clashes, rows)
        if missing:
            raise ConfigError(
                f"{self.source.name}: no row has the id {shorten(min(missing))} that skip_row names",
                keys=("skip_row",),
            )
        return InputSummary(
            rows=rows,
            digest=digest.hexdigest(),
            part_rows=part_rows,
            part_digests=part_digests,
            digest_at=digest_at,
            bad_rows=bad.count + len(clashes),
            clashes=clashes,
        )

    def prompts(
        self, checked: InputSummary, parts: Collection[int] | None = None
    ) -> Iterator[Prompt | BadRow]:
        """The rows of an input that `check` has passed, of these parts (by number; None takes all), in order.

        Raises InputRowsError, at the end of the part at the latest, if the input has changed.
        """
        part_digest = hashlib.sha256()
        notices = RowWarnings()
        index = -1
        for index, raw in enumerate(_unchanged(islice(self.source.rows(), self.limit))):
            if index == checked.rows:
                raise InputRowsError(
                    f"{self.source.name}: has more than the {checked.rows} rows that were checked; {_CHANGED}"
                )
            number = index // checked.part_rows
            if parts is not None and number not in parts:
                continue
            row = self._read(index, raw, notices)
            if isinstance(row, BadRow) and not self.record_bad:
                raise InputRowsError(f"{row.where}: {row.reason}; {_CHANGED}")
            part_digest.update(row.canonical())
            if (index + 1) % checked.part_rows == 0 or index + 1 == checked.rows:
                if part_digest.hexdigest() != checked.part_digests[number]:
                    first = number * checked.part_rows
                    raise InputRowsError(
                        f"{self.source.name}: differs from what was checked, in rows {first} to {index}; {_CHANGED}"
                    )
                part_digest = hashlib.sha256()
            if index in checked.clashes:
                row = _clash(row, checked.clashes[index], self._unit)
            yield row if isinstance(row, BadRow) else row.prompt
        if index + 1 != checked.rows:
            raise InputRowsError(
                f"{self.source.name}: has {index + 1} rows, not the {checked.rows} that were checked; {_CHANGED}"
            )

    def _read(self, index: int, raw: RawRow, notices: RowWarnings) -> GoodRow | BadRow:
        try:
            return self._parse(index, raw, notices)
        except RecursionError:
            return BadRow(
                index=index,
                where=raw.where,
                line=raw.line,
                reason=f"nested deeper than {MAX_NESTING} levels",
            )
        except ValueError as error:
            return BadRow(index=index, where=raw.where, line=raw.line, reason=str(error))

    @property
    def _unit(self) -> str:
        return "line" if isinstance(self.source, JsonlFile) else "row"

    def _clashes(self, suspect_parts: set[int]) -> dict[int, int]:
        """Index of each good row that cannot have its id, since an earlier row or an error row has it -> the line of that row.

        suspect_parts: hashes that more than one id has. Reads the rows again to tell repeated ids from equal hashes, and once more whenever
        rows became error rows by this: these are called `line:N` from now on, which may be the id of a good row.
        """
        if not suspect_parts:
            return {}
        clashes: dict[int, int] = {}
        first: dict[str, GoodRow] = {}
        names: dict[str, int] = {}  # of error rows, and their lines
        new: list[int] = []  # lines of rows that have just become error rows
        for row in self.rows():
            if _id_hash(row.prompt_id) not in suspect_parts:
                continue
            if isinstance(row, BadRow):
                names[row.prompt_id] = row.line
            elif row.prompt_id in first:
                clashes[row.index] = first[row.prompt_id].line
                new.append(row.line)
            else:
                first[row.prompt_id] = row
        if not self.record_bad:
            return clashes
        for prompt_id in first.keys() & names.keys():
            clashes[first[prompt_id].index] = names[prompt_id]
            new.append(first[prompt_id].line)
        while new:
            names, new = {f"line:{line}": line for line in new}, []
            for row in self.rows():
                if isinstance(row, GoodRow) and row.index not in clashes and row.prompt_id in names:
                    clashes[row.index] = names[row.prompt_id]
                    new.append(row.line)
        return clashes

    def _refusal(self, bad: _BadRows, clashes: dict[int, int], rows: int) -> InputRowsError:
        if clashes:
            for row in self.rows():
                if row.index in clashes:
                    bad.add(_clash(row, clashes[row.index], self._unit))
        hint = (
            "\n--id-field takes the ids from another field, --metadata-field id the places of the rows"
            if clashes
            else ""
        )
        return InputRowsError(
            f"{bad.count} bad of {rows} rows; nothing was generated\n{bad.describe()}{hint}"
        )

    def _parse(self, index: int, raw: RawRow, notices: RowWarnings) -> GoodRow:
        """Raises ValueError that names the field and, prompts aside, the value."""
        fields = raw.fields()
        defaults = self.defaults
        way = (
            list(fields_on_the_way(fields, defaults.prompt_field))
            if "." in defaults.prompt_field
            else []
        )
        kept = {name: fields.pop(name) for name in defaults.metadata_fields if name in fields}
        text = take_prompt(fields, defaults.prompt_field)
        prompt_id = parse_id(self._take_id(fields), raw.place)
        own: dict[str, Any] = {
            "seed": parse_integer(fields.pop("seed", None), "seed", 0, MAX_SEED),
            "temperature": parse_temperature(fields.pop("temperature", None)),
            "top_k": parse_integer(fields.pop("top_k", None), "top_k", 0, INT32_MAX),
            "max_new_tokens": parse_integer(
                fields.pop("max_new_tokens", None), "max_new_tokens", 1, INT32_MAX
            ),
        }
        notices.fields(fields)
        for prefix, inside in way:
            notices.fields(inside, prefix)
        params = defaults.params(prompt_id, **own)
        fields |= kept
        metadata = to_json(to_json_values(fields, notices.left_out)) if fields else None
        prompt = Prompt(
            index=index, prompt_id=prompt_id, text=text, params=params, metadata=metadata
        )
        return GoodRow(
            index=index,
            where=raw.where,
            line=raw.line,
            prompt=prompt,
            own=tuple(own[name] for name in SETTINGS),
        )

    def _take_id(self, fields: dict[str, Any]) -> Any:
        id_field = self.defaults.id_field
        value = take_field(fields, id_field)
        if value is MISSING and id_field != "id":
            raise ValueError(
                f"there is no field {shorten(id_field)}, which id_field names; the row has {name_fields(fields) or 'no other'}"
            )
        return None if value is MISSING else value


class _BadRows:
    """Counts bad rows by their reason, and remembers the first rows of each."""

    def __init__(self) -> None:
        self.count = 0
        self._rows: dict[str, list[BadRow]] = {}
        self._counts: Counter[str] = Counter()

    def add(self, row: BadRow) -> None:
        self.count += 1
        if row.reason in self._rows or len(self._rows) < MAX_NAMED_ROWS:
            self._counts[row.reason] += 1
            rows = self._rows.setdefault(row.reason, [])
            if len(rows) < MAX_NAMED_PER_REASON:
                rows.append(row)

    def describe(self) -> str:
        """A line per reason, in the order of the rows: the first row, and which others there are."""
        lines = []
        for reason, rows in sorted(self._rows.items(), key=lambda item: item[1][0].index):
            first, *others = rows
            more = self._counts[reason] - len(rows)
            also = [_number(row.where, first.where) for row in others] + (
                [f"{more} more"] if more else []
            )
            lines.append(
                f"{first.where}: {reason}" + (f" (also {', '.join(also)})" if also else "")
            )
        more = self.count - self._counts.total()
        return "\n".join(lines) + (f"\n... and {more} more" if more else "")


def _number(where: str, other: str) -> str:
    """`5` for a row of the same file as another, `b.csv:5` else."""
    match = _PLACE.fullmatch(where)
    return match[2] if match and other.startswith(match[1]) else where


def _clash(row: GoodRow | BadRow, line: int, unit: str) -> BadRow:
    reason = f"id {shorten(row.prompt_id)} was already used on {unit} {line}; ids must be unique"
    return BadRow(index=row.index, where=row.where, line=row.line, reason=reason)


def open_input(config: JobConfig) -> PromptReader:
    """Open the input that a config names: a JSONL file or a split of a dataset.

    Raises:
        InputNotFoundError: There is no such file.
    """
    return PromptReader(
        source=_open_source(config),
        limit=config.limit,
        record_bad=config.on_bad_row == "record",
        defaults=RowDefaults(
            prompt_field=config.prompt_field,
            id_field=config.id_field,
            metadata_fields=frozenset(config.metadata_field),
            seed=config.seed,
            temperature=config.temperature,
            top_k=config.top_k,
            max_new_tokens=config.max_new_tokens,
        ),
    )


def _open_source(config: JobConfig) -> RowSource:
    if config.dataset is not None:
        return DatasetSplit(
            dataset=config.dataset,
            config=config.dataset_config,
            split=config.split,
            revision=config.dataset_revision,
            delimiter=config.csv_delimiter,
        )
    assert config.input is not None
    return JsonlFile(config.input if config.input == "-" else locate(config.input))


def _unchanged(rows: Iterator[RawRow]) -> Iterator[RawRow]:
    """Rows of an input that was read without an error before."""
    try:
        yield from rows
    except InputRowsError as error:
        raise InputRowsError(f"{error}; {_CHANGED}") from error


# -- whole inputs ----------------------------------------------------------------------------------------------------


def _id_hash(prompt_id: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(prompt_id.encode("utf-8"), digest_size=8).digest(), "little"
    )


def _hashes_met_twice(hashes: array[int]) -> set[int]:
    import numpy as np

    ordered = (
        np.sort(np.frombuffer(hashes, dtype=np.uint64)) if hashes else np.empty(0, dtype=np.uint64)
    )
    return {int(value) for value in ordered[1:][ordered[1:] == ordered[:-1]]}
