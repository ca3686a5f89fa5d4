"""From raw rows to prompts: which fields a row has, their exact types, and the check of a whole input before a run.

Knows: the fields of contract "input rows". Does not know: files, tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipeline.data.bundled import locate
from pipeline.data.hub_dataset import HubDataset
from pipeline.data.jsonl import MAX_NESTING, JsonlFile, NumberText, check_utf8, json_type, shorten, to_json
from pipeline.data.rows import RawRow, RowSource
from pipeline.errors import InputRowsError
from pipeline.records import MAX_SEED, MAX_TEMPERATURE, Prompt, SamplingParams

MAX_NAMED_ROWS = 20
INT32_MAX = 2**31 - 1
_CHANGED = "the input has changed since it was checked"
_INTEGER = re.compile(r"-?[0-9]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that is no prompt, and why."""

    where: str
    line: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodRow:
    """A row that is a prompt. own: its own seed, temperature, top_k and max_new_tokens, None where it takes the run's."""

    where: str
    line: int
    prompt: Prompt
    own: tuple[int | None, float | None, int | None, int | None]

    def canonical(self) -> bytes:
        """What the digest of an input is made of: what the row says, not what the run adds."""
        values = [self.prompt.prompt_id, self.prompt.text, *self.own, self.prompt.metadata]
        return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowDefaults:
    """What a row takes where it says nothing itself. `seed` is the run seed, from which row seeds are derived."""

    prompt_field: str
    seed: int
    temperature: float
    top_k: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSummary:
    """What a check of all rows found: how many there are, and the SHA-256 of all that a run takes from them."""

    rows: int
    digest: str


def derive_seed(run_seed: int, prompt_id: str) -> int:
    """The row seed of a row without one: 63 bits of SHA-256 over the run seed and the prompt id."""
    message = b"gptbatch row seed\0" + run_seed.to_bytes(8, "little") + prompt_id.encode("utf-8")
    return int.from_bytes(hashlib.sha256(message).digest()[:8], "little") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReader:
    """The prompts of a source. limit: read only that many rows, None reads all."""

    source: RowSource
    defaults: RowDefaults
    limit: int | None = None

    def rows(self) -> Iterator[GoodRow | BadRow]:
        """Every row in input order, good or bad. That ids are unique is `check`'s to say."""
        for index, raw in enumerate(islice(self.source.rows(), self.limit)):
            try:
                yield self._parse(index, raw)
            except RecursionError:
                yield BadRow(where=raw.where, line=raw.line, reason=f"nested deeper than {MAX_NESTING} levels")
            except ValueError as error:
                yield BadRow(where=raw.where, line=raw.line, reason=str(error))

    def prompts(self, checked: InputSummary) -> Iterator[Prompt]:
        """The prompts of an input that `check` has passed. Raises InputRowsError, at the end at the latest, if it has changed."""
        digest = hashlib.sha256()
        rows = 0
        for row in self.rows():
            if isinstance(row, BadRow):
                raise InputRowsError(f"{row.where}: {row.reason}; {_CHANGED}")
            if rows == checked.rows:
                raise InputRowsError(f"{self.source.name}: has more than the {checked.rows} rows that were checked; {_CHANGED}")
            rows += 1
            digest.update(row.canonical())
            yield row.prompt
        if InputSummary(rows=rows, digest=digest.hexdigest()) != checked:
            raise InputRowsError(f"{self.source.name}: differs from what was checked; {_CHANGED}")

    def check(self) -> InputSummary:
        """Read everything once, keeping at most 16 bytes a row.

        Raises InputRowsError that names the first 20 bad rows; a repeated id names both its lines.
        """
        bad: list[BadRow] = []
        bad_count = 0
        rows = 0
        id_hashes = array("Q")
        digest = hashlib.sha256()
        for row in self.rows():
            rows += 1
            if isinstance(row, BadRow):
                bad_count += 1
                if len(bad) < MAX_NAMED_ROWS:
                    bad.append(row)
            else:
                id_hashes.append(_id_hash(row.prompt.prompt_id))
                digest.update(row.canonical())
        repeated = self._repeated_ids(_hashes_met_twice(id_hashes))
        bad_count += len(repeated)
        bad = sorted([*bad, *repeated], key=lambda row: row.line)[:MAX_NAMED_ROWS]
        if bad:
            lines = "\n".join(f"{row.where}: {row.reason}" for row in bad)
            more = f"\n... and {bad_count - len(bad)} more" if bad_count > len(bad) else ""
            raise InputRowsError(f"{bad_count} bad of {rows} rows; nothing was generated\n{lines}{more}")
        return InputSummary(rows=rows, digest=digest.hexdigest())

    def _repeated_ids(self, suspects: set[int]) -> list[BadRow]:
        """Read again to tell repeated ids from equal hashes, and on which lines they are."""
        if not suspects:
            return []
        first_line: dict[str, int] = {}
        repeated = []
        for row in self.rows():
            if isinstance(row, BadRow) or _id_hash(row.prompt.prompt_id) not in suspects:
                continue
            prompt_id = row.prompt.prompt_id
            if prompt_id in first_line:
                unit = "line" if isinstance(self.source, JsonlFile) else "row"
                reason = f"id {shorten(prompt_id)} was already used on {unit} {first_line[prompt_id]}; ids must be unique"
                repeated.append(BadRow(where=row.where, line=row.line, reason=reason))
            else:
                first_line[prompt_id] = row.line
        return repeated

    def _parse(self, index: int, raw: RawRow) -> GoodRow:
        """Raises ValueError that names the field and, prompts aside, the value."""
        if raw.fields is None:
            raise ValueError(raw.error)
        fields = dict(raw.fields)
        defaults = self.defaults
        if defaults.prompt_field not in fields:
            raise ValueError(f"there is no field {shorten(defaults.prompt_field)} (--prompt-field names the one to use)")
        text = fields.pop(defaults.prompt_field)
        if not isinstance(text, str) or isinstance(text, NumberText):
            raise ValueError(f"{defaults.prompt_field} must be a string, not {json_type(text)}")
        check_utf8(text)
        prompt_id = _parse_id(fields.pop("id", None), index)
        seed = _parse_integer(fields.pop("seed", None), "seed", 0, MAX_SEED)
        temperature = _parse_temperature(fields.pop("temperature", None))
        top_k = _parse_integer(fields.pop("top_k", None), "top_k", 0, INT32_MAX)
        max_new_tokens = _parse_integer(fields.pop("max_new_tokens", None), "max_new_tokens", 1, INT32_MAX)
        params = SamplingParams(
            seed=derive_seed(defaults.seed, prompt_id) if seed is None else seed,
            temperature=defaults.temperature if temperature is None else temperature,
            top_k=defaults.top_k if top_k is None else top_k,
            max_new_tokens=defaults.max_new_tokens if max_new_tokens is None else max_new_tokens,
        )
        metadata = to_json(_plain(fields)) if fields else None
        prompt = Prompt(index=index, prompt_id=prompt_id, text=text, params=params, metadata=metadata)
        return GoodRow(where=raw.where, line=raw.line, prompt=prompt, own=(seed, temperature, top_k, max_new_tokens))


def open_source(
    *, path: str | None, dataset: str | None, dataset_config: str | None, split: str, dataset_revision: str | None
) -> RowSource:
    """The source that a config names: a JSONL file (`path`) or a split of a dataset."""
    if dataset is not None:
        return HubDataset(dataset=dataset, config=dataset_config, split=split, revision=dataset_revision)
    assert path is not None
    return JsonlFile(path if path == "-" else locate(path))


# -- fields ----------------------------------------------------------------------------------------------------------


def _parse_id(value: Any, index: int) -> str:
    if value is None:
        return str(index)
    if isinstance(value, str) and not isinstance(value, NumberText):
        if not value:
            raise ValueError("id must not be empty; leave it out to use the row index")
        check_utf8(value)
        return value
    if isinstance(value, (NumberText, int, float)) and not isinstance(value, bool):
        integer = _whole(value)
        if integer is not None:
            return str(integer)
    raise ValueError(f"id must be a string or a whole number, not {_seen(value)}")


def _parse_integer(value: Any, name: str, low: int, high: int) -> int | None:
    if value is None:
        return None
    integer = _whole(value) if isinstance(value, (NumberText, int, float)) and not isinstance(value, bool) else None
    if integer is None:
        raise ValueError(f"{name} must be a whole number, not {_seen(value)}")
    if not low <= integer <= high:
        raise ValueError(f"{name} must be {low} to {high}, not {shorten(integer)}")
    return integer


def _parse_temperature(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (NumberText, int, float)):
        raise ValueError(f"temperature must be a number, not {_seen(value)}")
    temperature = float(value)
    if not 0 <= temperature <= MAX_TEMPERATURE:
        raise ValueError(f"temperature must be 0 to {MAX_TEMPERATURE}, not {shorten(value)}")
    return temperature


def _whole(value: NumberText | int | float) -> int | None:
    """5 is whole and "5.0" in a JSONL line is not; a float of a dataset may be, since CSV with gaps has no integers."""
    if isinstance(value, NumberText):
        return int(value) if _INTEGER.fullmatch(value) and len(value) <= 100 else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value


def _seen(value: Any) -> str:
    """A value as a message may show it: numbers and short strings whole, all else by its type."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return json_type(value)
    return f"the string {shorten(value)}" if type(value) is str else shorten(value)


def _plain(value: Any) -> Any:
    """Values of a dataset that JSON has no form for: NaN, a gap, is null; dates and the like are their text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float)):
        return value
    return str(value)


# -- whole inputs ----------------------------------------------------------------------------------------------------


def _id_hash(prompt_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(prompt_id.encode("utf-8"), digest_size=8).digest(), "little")


def _hashes_met_twice(hashes: array[int]) -> set[int]:
    import numpy as np

    ordered = np.sort(np.frombuffer(hashes, dtype=np.uint64)) if hashes else np.empty(0, dtype=np.uint64)
    return {int(value) for value in ordered[1:][ordered[1:] == ordered[:-1]]}
