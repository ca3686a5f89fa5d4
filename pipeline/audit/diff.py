"""diff: compare the rows and settings of two recorded runs. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from gptbatch.pipeline.audit.row_pairs import Row, unequal_pairs
from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.output.environment import environment_differences
from gptbatch.pipeline.output.part_plan import without_explained_hash
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS
from gptbatch.pipeline.system.excerpt import excerpts, first_difference

DifferenceKind = Literal[
    "prompt", "error", "tokens", "finish", "text", "logits", "only_in_a", "only_in_b"
]

_COMPARED = (
    "prompt",
    "completion",
    "completion_token_ids",
    "finish_reason",
    "stop_reason",
    "stop_string",
    "error",
    "min_decision_margin",
    "logits_digest",
)
# these decide min_decision_margin besides the logits
_ROW_SETTINGS = tuple(
    name
    for name, setting in SAMPLING_SETTINGS.items()
    if setting.column_type and name != "max_new_tokens"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowDifference:
    """A sample of a row that differs between the runs.

    Attributes:
        prompt_id: The id of the row.
        sample_index: The index of the sample.
        kind: The first of these that holds:
            only_in_a, only_in_b: The other run has no such sample. All attributes below are None.
            prompt: The prompts differ.
            error: One has a completion, the other an error.
            tokens: The tokens differ.
            finish: The same tokens, with another finish_reason, stop_reason or stop_string.
            text: The same tokens, with another text.
            logits: All of these are equal, but the logits differ: another logits_digest where both
                have one, or another min_decision_margin with the same sampling settings.
        token_index: Index of the first token that differs; None where the tokens are equal.
        token_a: The token of run a there; None where its completion has ended.
        token_b: The same of run b.
        min_decision_margin_a: The column of run a, in logits; None for a row without a step.
        min_decision_margin_b: The same of run b.
        finish_reason_a: The column of run a.
        finish_reason_b: The column of run b.
        stop_reason_a: The column of run a.
        stop_reason_b: The column of run b.
        excerpt_a: At most 60 characters of the completion of run a (of its prompt where the prompts
            differ), from where the texts first differ. None where they are equal, or one is null.
        excerpt_b: The same of run b.
    """

    prompt_id: str
    sample_index: int
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
    excerpt_a: str | None = None
    excerpt_b: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingDifference:
    """A setting in which the runs differ.

    Attributes:
        name: A key of the identity, `device`, `dtype`, `batch_invariance` or `environment.NAME`.
        a: The value of run a; None where it is not recorded.
        b: The value of run b; None where it is not recorded.
    """

    name: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffSummary:
    """Counts of a diff.

    Attributes:
        rows_a: Rows of the input in run a.
        rows_b: Rows of the input in run b.
        samples_a: Rows of the table of run a: n per row of the input.
        samples_b: The same of run b. All counts below are of samples.
        equal: Samples in both runs that are equal.
        equal_from_other_logits: Samples among these whose logits differ.
        different: Samples in both runs that differ.
        kinds: Number of these by kind.
        missing_in_a: Samples that only run b has.
        missing_in_b: Samples that only run a has.
    """

    rows_a: int
    rows_b: int
    samples_a: int
    samples_b: int
    equal: int
    equal_from_other_logits: int
    different: int
    kinds: dict[str, int]
    missing_in_a: int
    missing_in_b: int

    @property
    def all_equal(self) -> bool:
        """Whether both runs hold the same samples. Two runs without rows are equal."""
        return not (self.different or self.missing_in_a or self.missing_in_b)

    @property
    def common(self) -> int:
        """Number of samples in both runs."""
        return self.equal + self.different

    @property
    def unit(self) -> str:
        """The word for what is counted: "samples" where a row has several, else "rows"."""
        one_each = (self.rows_a, self.rows_b) == (self.samples_a, self.samples_b)
        return "rows" if one_each else "samples"

    def counted(self, count: int) -> str:
        """Return a count in words, with its verb: `1 row is`, `2 samples are`."""
        return f"1 {self.unit.removesuffix('s')} is" if count == 1 else f"{count:,} {self.unit} are"


def diff_runs(a: RunReader, b: RunReader) -> Iterator[RowDifference]:
    """Yield the rows that differ, paired by prompt_id and sample_index, in the order of `a`.

    Rows that only `b` has come last. Timings and the texts of errors are not compared. For memory,
    and how often the runs are read, see `unequal_pairs`.

    Raises:
        StorageError: A part cannot be read, or a run holds an id twice.
    """
    settings = (*_ROW_SETTINGS, "sampling_params")
    for row_a, row_b in unequal_pairs(a, b, _COMPARED, settings):
        if row_a is None or row_b is None:
            yield _only_in(row_a, row_b)
        elif (difference := _compare(row_a, row_b)) is not None:
            yield difference


def summarize(a: RunReader, b: RunReader, differences: Iterable[RowDifference]) -> DiffSummary:
    """Count differences.

    Args:
        a: A run.
        b: Another run.
        differences: All that `diff_runs(a, b)` yields.
    """
    kinds = Counter(difference.kind for difference in differences)
    different = kinds.total() - kinds["only_in_a"] - kinds["only_in_b"] - kinds["logits"]
    return DiffSummary(
        rows_a=a.rows_done,
        rows_b=b.rows_done,
        samples_a=a.n_rows,
        samples_b=b.n_rows,
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
    """Return the identity keys, device, dtype and environment in which two runs differ, by name.

    Two portable environments are one. Device and environment are left out where a run has no part
    yet, which does not record them. The digests of inputs are compared only where both divide their
    rows alike, in one format. `config_hash` is left out where another setting explains it.
    """
    left, right = dict(a.manifest["identity"]), dict(b.manifest["identity"])
    if "config_hash" not in without_explained_hash(_differing(left, right)):
        del left["config_hash"], right["config_hash"]
    if (left.get("part_rows"), a.manifest["format"]) != (
        right.get("part_rows"),
        b.manifest["format"],
    ):
        left.pop("input_digest", None)
        right.pop("input_digest", None)
    if a.facts and b.facts:
        for name in ("dtype", "device"):
            left[name], right[name] = a.facts.get(name), b.facts.get(name)
        for key, (value_a, value_b) in environment_differences(a.facts, b.facts).items():
            name = key if key == "batch_invariance" else f"environment.{key}"
            left[name], right[name] = value_a, value_b
    return [
        SettingDifference(name=name, a=left.get(name), b=right.get(name))
        for name in _differing(left, right)
    ]


def _differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


def _only_in(row_a: Row | None, row_b: Row | None) -> RowDifference:
    row = row_a or row_b
    assert row is not None
    return RowDifference(
        prompt_id=row["prompt_id"],
        sample_index=row["sample_index"] or 0,
        kind="only_in_a" if row_a else "only_in_b",
    )


def _compare(a: dict[str, Any], b: dict[str, Any]) -> RowDifference | None:
    """Return how two rows of one id differ; None when only one has a logits_digest."""
    tokens_a, tokens_b = a["completion_token_ids"], b["completion_token_ids"]
    kind: DifferenceKind
    if a["prompt"] != b["prompt"]:
        kind = "prompt"
    elif (a["error"] is None) != (b["error"] is None):
        kind = "error"
    elif tokens_a != tokens_b:
        kind = "tokens"
    elif _differ_in(a, b, ("finish_reason", "stop_reason", "stop_string")):
        kind = "finish"
    elif a["completion"] != b["completion"]:
        kind = "text"
    elif _differ(a, b, "logits_digest") or (
        _differ(a, b, "min_decision_margin") and _sampled_alike(a, b)
    ):
        kind = "logits"
    else:
        return None
    index = first_difference(tokens_a, tokens_b) if tokens_a != tokens_b else None
    text_a, text_b = (row["prompt" if kind == "prompt" else "completion"] for row in (a, b))
    shown = (
        (None, None) if text_a == text_b or None in (text_a, text_b) else excerpts(text_a, text_b)
    )
    return RowDifference(
        prompt_id=a["prompt_id"],
        sample_index=a["sample_index"] or 0,
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
        excerpt_a=shown[0],
        excerpt_b=shown[1],
    )


def _differ_in(a: dict[str, Any], b: dict[str, Any], names: tuple[str, ...]) -> bool:
    return any(a[name] != b[name] for name in names)


def _differ(a: dict[str, Any], b: dict[str, Any], name: str) -> bool:
    """Return whether both rows have a value in a column, and the values differ."""
    return a[name] != b[name] and None not in (a[name], b[name])


def _sampled_alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return whether equal logits give both rows the same min_decision_margin.

    Greedy rows use neither noise nor filters.
    """
    return all(a[name] == b[name] for name in ("temperature", "sampling_params")) and (
        a["temperature"] == 0 or all(a[name] == b[name] for name in _ROW_SETTINGS)
    )
