"""Which rows each part of a job holds, and to which job a part belongs.

Part k holds the input rows [k R, (k+1) R) in input order, R being `part_rows`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gptbatch.pipeline.errors import ConfigError, OutputConflictError
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.part_file import PartFile
from gptbatch.pipeline.output.schema import FORMAT
from gptbatch.pipeline.system.excerpt import value_excerpts

# Names of parts have six digits.
MAX_PARTS = 1_000_000
# A larger limit changes these keys of the identity, and continues the same job.
_INPUT_KEYS = ("input_digest", "rows", "limit")
# The config hash follows from all other keys but these.
_UNHASHED_KEYS = {*_INPUT_KEYS, "part_rows", "record_logits_digest", "config_hash"}
MAX_NAMED = 8


def rows_of_part(number: int, part_rows: int, total_rows: int) -> int:
    """Return the number of input rows in part `number`."""
    return max(0, min(part_rows, total_rows - number * part_rows))


def count_parts(part_rows: int, total_rows: int) -> int:
    """Return the number of parts; an input without rows makes one part without rows."""
    return max(1, -(-total_rows // part_rows))


def check_part_count(part_rows: int, total_rows: int) -> None:
    """Check that the names of the parts sort as their numbers do.

    Raises:
        ConfigError: There are more than MAX_PARTS parts.
    """
    if (n_parts := count_parts(part_rows, total_rows)) > MAX_PARTS:
        raise ConfigError(
            f"part_rows: {total_rows} rows in parts of {part_rows} are {n_parts} files, and at "
            f"most {MAX_PARTS} are possible; use --part-rows {-(-total_rows // MAX_PARTS)} or more",
            keys=("part_rows",),
        )


def differing_keys(identity: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the keys in which two identities (see `job_identity`) differ; empty for the same job.

    The input is compared only between identities with the same number of rows: a larger limit
    continues the same job. An identity without an input is compared with any input. `config_hash`
    is left out where another key explains it.
    """
    keys = [
        key for key, value in identity.items() if key not in _INPUT_KEYS and other.get(key) != value
    ]
    if (
        "input_digest" in identity
        and identity.get("rows") == other.get("rows")
        and identity["input_digest"] != other.get("input_digest")
    ):
        keys.append("input_digest")
    return without_explained_hash(keys)


def without_explained_hash(keys: list[str]) -> list[str]:
    """Return differing keys without `config_hash`, where another of them changes it."""
    is_explained = not _UNHASHED_KEYS.issuperset(keys)
    return [key for key in keys if key != "config_hash" or not is_explained]


def describe_differences(keys: list[str], there: dict[str, Any], here: dict[str, Any]) -> str:
    """Return the values of two identities: `top_p: 0.9 there, 0.95 here; seed: 0 there, 1 here`."""
    described = []
    for key in keys[:MAX_NAMED]:
        recorded, current = value_excerpts(there.get(key), here.get(key))
        described.append(f"{key}: {recorded} there, {current} here")
    if len(keys) > MAX_NAMED:
        described.append(f"{len(keys) - MAX_NAMED} more differ")
    return "; ".join(described)


def refuse_foreign(file: PartFile) -> None:
    """Refuse a file that has a part's name and was written by another program.

    Raises:
        OutputConflictError: Another program wrote it.
    """
    if file.state == "foreign":
        raise OutputConflictError(
            f"{file.path}: is not a part that gptbatch wrote ({file.problem}); move it away, or "
            "name another output"
        )


def group_by_job(footers: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the footers of each job, in the given order."""
    jobs: list[list[dict[str, Any]]] = []
    for footer in footers:
        for job in jobs:
            if job[0]["format"] == footer["format"] and not differing_keys(
                job[0]["identity"], footer["identity"]
            ):
                job.append(footer)
                break
        else:
            jobs.append([footer])
    return jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class PartPlan:
    """The parts of a job.

    Attributes:
        identity: The identity of the job, with `rows`, `part_rows` and `input_digest` of its input.
        input_digests: Digest of the input rows of each part, by part number.
    """

    identity: dict[str, Any]
    input_digests: list[str]

    @property
    def part_rows(self) -> int:
        """Rows per part; the last part may hold fewer."""
        return int(self.identity["part_rows"])

    @property
    def total_rows(self) -> int:
        """Rows of the input."""
        return int(self.identity["rows"])

    @property
    def n_parts(self) -> int:
        """Number of parts, at least 1."""
        return count_parts(self.part_rows, self.total_rows)

    def rows_of(self, number: int) -> int:
        """Return the number of rows in part `number`."""
        return rows_of_part(number, self.part_rows, self.total_rows)

    def is_whole(self, part: Part) -> bool:
        """Return whether a part of this job holds all rows of its number, from the same input."""
        number = part.number
        return number < self.n_parts and (part.first_row, part.rows, part.input_rows_digest) == (
            number * self.part_rows,
            self.rows_of(number),
            self.input_digests[number],
        )

    def check_part(self, file: PartFile) -> None:
        """Check that a file with a part's name is a part of this job, or damaged.

        Raises:
            OutputConflictError: Another job, or another program, wrote it.
        """
        refuse_foreign(file)
        if file.footer is None:
            return
        if file.footer["format"] != FORMAT:
            raise OutputConflictError(
                f"{file.path}: has format {file.footer['format']}, and this version writes "
                f"{FORMAT}; name another output"
            )
        # The number of rows in the identity says nothing about one part: input_rows_digest is
        # compared below.
        recorded = file.footer["identity"]
        if keys := differing_keys({**self.identity, "rows": None}, recorded):
            raise OutputConflictError(
                f"{file.path}: is a part of another job "
                f"({describe_differences(keys, recorded, self.identity)}); name another output"
            )
        if file.part is not None and self._has_other_input(file.part):
            raise OutputConflictError(
                f"{file.path}: is a part of another input (input_rows_digest differs); name "
                "another output"
            )

    def _has_other_input(self, part: Part) -> bool:
        """Return whether a part holds all rows of some number, from other input rows."""
        number, offset = divmod(part.first_row, self.part_rows)
        whole = offset == 0 and part.rows == self.rows_of(number) and number < self.n_parts
        return whole and part.input_rows_digest != self.input_digests[number]
