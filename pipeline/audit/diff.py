"""Two recorded runs, row by row: which rows have other tokens, where they part, and which settings differ. Imports no torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from gptbatch.pipeline.audit.run_reader import BATCH_ROWS, RunReader
from gptbatch.pipeline.errors import StorageError
from gptbatch.pipeline.types import SAMPLING_SETTINGS

DifferenceKind = Literal[
    "prompt", "error", "tokens", "finish", "text", "logits", "only_in_a", "only_in_b"
]

_COLUMNS = (
    "prompt_id",
    "prompt",
    "completion",
    "completion_token_ids",
    "finish_reason",
    "stop_reason",
    "error",
    "min_decision_margin",
    "logits_digest",
)
# these decide min_decision_margin besides the logits
_ROW_SETTINGS = tuple(name for name in SAMPLING_SETTINGS if name != "max_new_tokens")
_FACTS = ("dtype", "device", "environment")
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RowDifference:
    """One id whose rows are not equal. A row is named by the first of these that holds:

        only_in_a, only_in_b   the other run has no such id; all fields below are None
        prompt                 the prompts differ
        error                  one has a completion, the other an error
        tokens                 the tokens differ
        ending                 the same tokens, but another finish_reason or stop_reason
        text                   the same tokens as another text
        bits                   the same in all this, but from other logits: another logits_digest where both have one, or another
                               min_decision_margin where seed, temperature and top_k are the same

    token_index: the first place, from 0, where the tokens differ; None where they do not. token_a, token_b: the token there, None
    for a completion that had ended. min_decision_margin_a, min_decision_margin_b: how far each row was from other tokens under other rounding, in
    logits; None for a row without a step.
    """

    prompt_id: str
    kind: DifferenceKind
    token_index: int | None = None
    token_a: int | None = None
    token_b: int | None = None
    min_decision_margin_a: float | None = None
    min_decision_margin_b: float | None = None
    finish_reason_a: str | None = None
    finish_reason_b: str | None = None
    stop_reason_a: str | None = None
    stop_reason_b: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingDifference:
    """A setting that the runs do not share: a key of their identity, `device`, or `environment.NAME`. None: a run does not say."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffSummary:
    """Rows of a diff. different: ids in both runs whose rows are not equal, by kind in `kinds`. missing_in_a: ids that only b has.

    equal_from_other_logits: those of the equal rows that differ in `bits` alone.
    """

    rows_a: int
    rows_b: int
    equal: int
    equal_from_other_logits: int
    different: int
    kinds: dict[str, int]
    missing_in_a: int
    missing_in_b: int

    @property
    def all_equal(self) -> bool:
        """Whether both runs hold the same ids and every row is equal; so do two runs without rows."""
        return not (self.different or self.missing_in_a or self.missing_in_b)

    @property
    def common(self) -> int:
        """Ids that both runs have."""
        return self.equal + self.different


def diff_runs(a: RunReader, b: RunReader) -> Iterator[RowDifference]:
    """The rows that are not equal, joined by prompt_id: in the order of `a`, then those that only `b` has, in its order.

    Clocks and an error's words do not count. In memory are an id and a digest for each row of `b`, and a batch of rows of each run.
    It is one pass over each, and for rows that are not equal another over `b`, or, where they also stand in another order, several.
    Raises StorageError when a part cannot be read, or where a run holds an id twice.
    """
    places: dict[str, int] = {}
    digests = bytearray()
    for place, row in enumerate(b.rows(_COLUMNS)):
        if places.setdefault(row["prompt_id"], place) != place:
            raise _twice(b, row["prompt_id"])
        digests += _digest(row)
    seen = bytearray(len(places))
    reader = b.reader(_COLUMNS + _ROW_SETTINGS)
    rows = a.rows(_COLUMNS + _ROW_SETTINGS)
    while block := list(islice(rows, BATCH_ROWS)):
        unequal: dict[str, int] = {}
        for row in block:
            place_b = places.get(row["prompt_id"])
            if place_b is None:
                continue
            if seen[place_b]:
                raise _twice(a, row["prompt_id"])
            seen[place_b] = True
            if digests[place_b * _DIGEST_BYTES : (place_b + 1) * _DIGEST_BYTES] != _digest(row):
                unequal[row["prompt_id"]] = place_b
        partners = {row["prompt_id"]: row for row in reader.take(sorted(unequal.values()))}
        for row in block:
            if row["prompt_id"] in partners:
                if (difference := _compare(row, partners[row["prompt_id"]])) is not None:
                    yield difference
            elif row["prompt_id"] not in places:
                yield RowDifference(prompt_id=row["prompt_id"], kind="only_in_a")
    for prompt_id, place in places.items():
        if not seen[place]:
            yield RowDifference(prompt_id=prompt_id, kind="only_in_b")


def summarize(a: RunReader, b: RunReader, differences: Iterable[RowDifference]) -> DiffSummary:
    """Count the differences that `diff_runs(a, b)` gives, all of them."""
    kinds = Counter(difference.kind for difference in differences)
    different = kinds.total() - kinds["only_in_a"] - kinds["only_in_b"] - kinds["logits"]
    return DiffSummary(
        rows_a=a.n_rows,
        rows_b=b.n_rows,
        equal=a.n_rows - kinds["only_in_a"] - different,
        equal_from_other_logits=kinds["logits"],
        different=different,
        kinds={
            kind: count
            for kind, count in sorted(kinds.items())
            if kind not in ("only_in_a", "only_in_b", "logits")
        },
        missing_in_a=kinds["only_in_b"],
        missing_in_b=kinds["only_in_a"],
    )


def settings_that_differ(a: RunReader, b: RunReader) -> list[SettingDifference]:
    """Why rows may differ: the keys of the identities, the device and the environment that are not the same, by name.

    A run that has written no part yet says nothing of its device and environment, and these are then left out.
    """
    left, right = dict(a.manifest["identity"]), dict(b.manifest["identity"])
    if a.facts and b.facts:
        left.update(_machine(a.facts))
        right.update(_machine(b.facts))
    names = sorted(left.keys() | right.keys())
    return [
        SettingDifference(name=name, a=left.get(name), b=right.get(name))
        for name in names
        if left.get(name) != right.get(name)
    ]


def _machine(facts: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name in _FACTS:
        value = facts.get(name)
        flat.update(
            {f"{name}.{key}": item for key, item in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return flat


def _digest(row: dict[str, Any]) -> bytes:
    """16 bytes, the same for rows that are the same and, but for an accident of 2^-128, for no others."""
    compared = [row[name] is None if name == "error" else row[name] for name in _COLUMNS]
    return hashlib.blake2b(repr(compared).encode(), digest_size=_DIGEST_BYTES).digest()


def _compare(a: dict[str, Any], b: dict[str, Any]) -> RowDifference | None:
    """How two rows of one id differ; None when they do not, but that one has a logits_digest and the other has none."""
    tokens_a, tokens_b = a["completion_token_ids"], b["completion_token_ids"]
    kind: DifferenceKind
    if a["prompt"] != b["prompt"]:
        kind = "prompt"
    elif (a["error"] is None) != (b["error"] is None):
        kind = "error"
    elif tokens_a != tokens_b:
        kind = "tokens"
    elif (a["finish_reason"], a["stop_reason"]) != (b["finish_reason"], b["stop_reason"]):
        kind = "finish"
    elif a["completion"] != b["completion"]:
        kind = "text"
    elif _differ(a, b, "logits_digest") or (
        _differ(a, b, "min_decision_margin") and _sampled_alike(a, b)
    ):
        kind = "logits"
    else:
        return None
    index = _first_difference(tokens_a, tokens_b)
    return RowDifference(
        prompt_id=a["prompt_id"],
        kind=kind,
        token_index=index,
        token_a=tokens_a[index] if index is not None and index < len(tokens_a) else None,
        token_b=tokens_b[index] if index is not None and index < len(tokens_b) else None,
        min_decision_margin_a=a["min_decision_margin"],
        min_decision_margin_b=b["min_decision_margin"],
        finish_reason_a=a["finish_reason"],
        finish_reason_b=b["finish_reason"],
        stop_reason_a=a["stop_reason"],
        stop_reason_b=b["stop_reason"],
    )


def _differ(a: dict[str, Any], b: dict[str, Any], name: str) -> bool:
    """Whether both say something, and not the same."""
    return a[name] != b[name] and None not in (a[name], b[name])


def _sampled_alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether equal logits give both rows the same min_decision_margin. Greedy rows have neither noise nor top_k."""
    return a["temperature"] == b["temperature"] and (
        a["temperature"] == 0 or all(a[name] == b[name] for name in _ROW_SETTINGS)
    )


def _first_difference(a: list[int], b: list[int]) -> int | None:
    if a == b:
        return None
    shorter = min(len(a), len(b))
    return next((index for index in range(shorter) if a[index] != b[index]), shorter)


def _twice(run: RunReader, prompt_id: str) -> StorageError:
    return StorageError(
        f"{run.path}: holds the id {prompt_id!r} twice, so that rows cannot be paired; does it hold parts of two runs?"
    )
