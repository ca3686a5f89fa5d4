"""Reads an input twice: first to check every row before the run, then to yield its prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from gptbatch.pipeline.errors import ConfigError, InputRowsError
from gptbatch.pipeline.input.bad_rows import BadRows
from gptbatch.pipeline.input.duplicate_ids import IdHashes, find_duplicates
from gptbatch.pipeline.input.input_digest import InputDigests, PartDigest, input_digest
from gptbatch.pipeline.input.row_warnings import FieldCounts, RowWarnings
from gptbatch.pipeline.input.rows import BadRow, RowDefaults, RowParser
from gptbatch.pipeline.input.source import START, Place, RawRow, RowSource
from gptbatch.pipeline.input.strict_json import parse_object, shorten, to_json
from gptbatch.pipeline.params.sampling_params import to_json_value
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS
from gptbatch.pipeline.types import Prompt

_CHANGED = "the input has changed since it was checked"
_ID_HINT = (
    "\nid_field reads ids from another field; an empty id_field uses the row index instead, so ids "
    "and seeds change when rows are reordered"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSummary:
    """The result of checking all rows.

    Attributes:
        rows: Number of rows.
        digest: SHA-256 of the content of all rows that decides the output.
        part_rows: Rows per part.
        part_digests: The same digest of each part.
        places: Place of the first row of each part; empty without rows.
        prefix_digests: Row count -> the same digest of that many first rows. Holds 0, all rows and
            the counts that were requested.
        bad_rows: Number of rows that become error rows, duplicates included.
        max_n: The most samples of one row; 1 without rows.
        duplicates: Index of each row whose id is taken -> the row that has the id, as `line 3`.
    """

    rows: int
    digest: str
    part_rows: int
    part_digests: list[str]
    places: list[Place]
    prefix_digests: dict[int, str]
    bad_rows: int
    max_n: int
    duplicates: dict[int, str]


Purpose = Literal["generated", "indexed", "predicted", "scored"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReader:
    """The prompts of an input.

    Attributes:
        source: The rows of a file or dataset.
        defaults: Field names, and the settings of rows without their own.
        limit: Number of rows to read from the front. None reads all.
        record_bad: Bad rows become error rows of the output. Otherwise `check` rejects them.
        finds_duplicates: Rows whose id another row has are bad. Otherwise all ids are taken to be
            unique.
        purpose: What is done with the rows, in the message that they are bad.
    """

    source: RowSource
    defaults: RowDefaults
    limit: int | None = None
    record_bad: bool = False
    finds_duplicates: bool = True
    purpose: Purpose = "generated"

    def rows(self) -> Iterator[tuple[RawRow, Prompt | BadRow]]:
        """Yield every row in input order. Duplicate ids are not detected here."""
        for raw, row, _ in self._parsed(RowWarnings()):
            yield raw, row

    def check(
        self,
        *,
        part_rows: int | None = None,
        prefix_rows: Iterable[int] = (),
        required_ids: Iterable[str] = (),
        field_counts: FieldCounts | None = None,
    ) -> InputSummary:
        """Read and validate all rows. Keeps 8 bytes in memory per row with an id of its own.

        Args:
            part_rows: Rows per part. None follows `default_part_rows`.
            prefix_rows: Row counts for InputSummary.prefix_digests.
            required_ids: Ids of skip_row, which must exist.
            field_counts: Counts the fields of all rows; None counts none.

        Raises:
            InputRowsError: Rows are bad and `record_bad` is off. Lists the first 20 reasons.
            ConfigError: No row has one of `required_ids`.
        """
        bad, id_hashes, warnings = BadRows(), IdHashes(), RowWarnings()
        digests, missing = InputDigests(part_rows, prefix_rows), set(required_ids)
        max_n = self.defaults.sampling.n
        for raw, row, digest_input in self._parsed(warnings, field_counts):
            if isinstance(row, BadRow):
                bad.add(row)
            else:
                max_n = max(max_n, row.params.n)
            if missing:
                missing.discard(row.prompt_id)
            if self.finds_duplicates and (self.record_bad or isinstance(row, Prompt)):
                id_hashes.add(row.prompt_id, raw.position)
            digests.add(digest_input, raw)
        digest = digests.finish()
        duplicates, new_bad = find_duplicates(
            lambda _: self.rows(), id_hashes.repeated(), record_bad=self.record_bad
        )
        warnings.log(self.source.name, digests.rows, limit=self.limit, given=self.defaults.given)
        if (bad.count or duplicates) and not self.record_bad:
            raise self.rejection(bad, duplicates, digests.rows, self.rows())
        self.check_required(missing)
        return InputSummary(
            rows=digests.rows,
            digest=digest,
            part_rows=digests.part_rows,
            part_digests=digests.parts,
            places=digests.places,
            prefix_digests=digests.prefixes,
            bad_rows=bad.count + new_bad,
            max_n=max_n,
            duplicates=duplicates,
        )

    def prefix_digest(self, checked: InputSummary, rows: int) -> str:
        """Return the digest of the first rows of a checked input. Reads those of one part.

        Args:
            checked: The result of `check`.
            rows: Number of rows.

        Raises:
            InputRowsError: The input has changed.
        """
        number, left = divmod(rows, checked.part_rows)
        digests = checked.part_digests[:number]
        if left or not rows:
            parser, digest = RowParser(self.defaults, RowWarnings()), PartDigest()
            for index, raw in zip(
                range(number * checked.part_rows, rows),
                self._raw_rows(checked.places[number] if left else START),
                strict=False,
            ):
                digest.add(parser.parse(index, raw)[1])
            digests = [*digests, digest.hexdigest()]
        return input_digest(digests)

    def check_required(self, missing: Set[str]) -> None:
        """Raise ConfigError if an id of skip_row is missing."""
        if missing:
            raise ConfigError(
                f"{self.source.name}: no row has the id {shorten(min(missing))} "
                "that skip_row names",
                keys=("skip_row",),
            )

    def rows_of_parts(
        self, numbers: Iterable[int], places: list[Place], part_rows: int
    ) -> Iterator[tuple[RawRow, Prompt | BadRow]]:
        """Yield the rows of some parts, as `rows` does.

        Args:
            numbers: The parts, in ascending order.
            places: The place of each part.
            part_rows: Rows per part.
        """
        parser = RowParser(self.defaults, RowWarnings())
        rows: Iterator[RawRow] = iter(())
        next_number = -1
        for number in numbers:
            if number != next_number:
                rows = self._raw_rows(places[number])
            for index, raw in enumerate(islice(rows, part_rows), number * part_rows):
                yield raw, parser.parse(index, raw)[0]
            next_number = number + 1

    def prompts(
        self, checked: InputSummary, parts: Iterable[int] | None = None
    ) -> Iterator[Prompt | BadRow]:
        """Yield the rows of a checked input, part by part.

        Args:
            checked: The result of `check`.
            parts: Numbers of the parts to read. The next one is taken when the rows of the last one
                are read. None reads all parts.

        Raises:
            InputRowsError: The input has changed. Raised at the end of the changed part at the
                latest.
        """
        parser = RowParser(self.defaults, RowWarnings())
        rows: Iterator[RawRow] = iter(())
        n_read, end = -1, 0
        for number in range(len(checked.part_digests)) if parts is None else parts:
            first = number * checked.part_rows
            end = min(first + checked.part_rows, checked.rows)
            if n_read != first:
                rows = self._raw_rows(checked.places[number] if checked.rows else START)
                n_read = first
            digest = PartDigest()
            while n_read < end and (raw := next(rows, None)) is not None:
                index, n_read = n_read, n_read + 1
                row, digest_input = parser.parse(index, raw)
                if isinstance(row, BadRow) and not self.record_bad:
                    raise InputRowsError(f"{row.where}: {row.reason}; {_CHANGED}")
                digest.add(digest_input)
                if n_read == end and digest.hexdigest() != checked.part_digests[number]:
                    raise InputRowsError(
                        f"{self.source.name}: differs from what was checked, in rows {first} to "
                        f"{index}; {_CHANGED}"
                    )
                if index in checked.duplicates:
                    row = self._duplicate(raw, row, checked.duplicates[index])
                yield row
            if n_read < end:
                raise InputRowsError(
                    f"{self.source.name}: has {n_read} rows, not the {checked.rows} that were "
                    f"checked; {_CHANGED}"
                )
        if end == checked.rows and next(rows, None) is not None:
            raise InputRowsError(
                f"{self.source.name}: has more than the {checked.rows} rows that were checked; "
                f"{_CHANGED}"
            )

    def _raw_rows(self, start: Place) -> Iterator[RawRow]:
        rows = self.source.rows(start)
        left = None if self.limit is None else self.limit - start.position
        return _unchanged(islice(rows, left))

    def _parsed(
        self, warnings: RowWarnings, field_counts: FieldCounts | None = None
    ) -> Iterator[tuple[RawRow, Prompt | BadRow, bytes]]:
        """Yield every row with the bytes that it adds to the input digest."""
        parser = RowParser(self.defaults, warnings, field_counts)
        for index, raw in enumerate(islice(self.source.rows(), self.limit)):
            yield raw, *parser.parse(index, raw)

    def rejection(
        self,
        bad: BadRows,
        duplicates: dict[int, str],
        rows: int,
        again: Iterator[tuple[RawRow, Prompt | BadRow]],
    ) -> InputRowsError:
        """Return the error that lists bad rows and duplicates.

        Args:
            bad: The bad rows.
            duplicates: As `InputSummary.duplicates`.
            rows: Number of rows.
            again: Yields rows of the input again, the duplicates among them.
        """
        if duplicates:
            for raw, row in again:
                if row.index in duplicates:
                    bad.add(self._duplicate(raw, row, duplicates[row.index]))
        return InputRowsError(
            f"{bad.summary(rows)}; nothing was {self.purpose}\n{bad.describe()}"
            f"{_ID_HINT if duplicates else ''}"
        )

    def _duplicate(self, raw: RawRow, row: Prompt | BadRow, taken_by: str) -> BadRow:
        """Return the error row of a row whose id is that of another row."""
        used = f"id {shorten(row.prompt_id)} was already used on {taken_by}; ids must be unique"
        if isinstance(row, BadRow):
            return replace(row, own_id=None, reason=f"{row.reason}; {used}")
        # its own settings, which its line of errors.jsonl keeps
        others = self.defaults.params(row.prompt_id, {}).as_dict()
        own = {
            name: to_json_value(value, SAMPLING_SETTINGS[name])
            for name, value in row.params.as_dict().items()
            if value != others[name]
        }
        fields = {} if row.metadata is None else parse_object(row.metadata)
        return BadRow(
            index=row.index,
            where=raw.where,
            label=raw.label,
            reason=used,
            text=row.text,
            metadata=to_json(fields | own) if fields or own else None,
        )


def _unchanged(rows: Iterator[RawRow]) -> Iterator[RawRow]:
    """Yield rows that an earlier pass has read without an error."""
    try:
        yield from rows
    except InputRowsError as error:
        raise InputRowsError(f"{error}; {_CHANGED}") from error
