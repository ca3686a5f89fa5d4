"""Checks some parts of an input, and joins the results for all parts.

The shards of `gptbatch plan --index` check a block of parts each. The joined result is the one of
`PromptReader.check`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from itertools import islice

from gptbatch.pipeline.errors import InputRowsError
from gptbatch.pipeline.input.bad_rows import BadRows
from gptbatch.pipeline.input.duplicate_ids import IdHashes, find_duplicates, position_of_hash
from gptbatch.pipeline.input.input_digest import InputDigests, input_digest
from gptbatch.pipeline.input.prompt_reader import InputSummary, PromptReader
from gptbatch.pipeline.input.row_count import RowCount
from gptbatch.pipeline.input.row_warnings import RowWarnings
from gptbatch.pipeline.input.rows import BadRow, RowParser
from gptbatch.pipeline.input.source import START, Place, RawRow
from gptbatch.pipeline.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedParts:
    """Consecutive parts of an input, after every row was checked.

    Attributes:
        digests: Digest of each part.
        places: Place of the first row of each part.
        ids: The ids of each part, as `IdHashes.take` returns them.
        bad_rows: Number of rows that become error rows, without duplicates.
        max_n: The most samples of one row.
        found_ids: The ids of skip_row that rows have.
    """

    digests: list[str]
    places: list[Place]
    ids: list[tuple[bytes, bytes]]
    bad_rows: int
    max_n: int
    found_ids: frozenset[str]


# Yields the checked parts of an input in order. It may be called again.
ReadParts = Callable[[], Iterator[CheckedParts]]


def check_parts(
    reader: PromptReader,
    count: RowCount,
    part_rows: int,
    numbers: range,
    required_ids: Iterable[str] = (),
) -> CheckedParts:
    """Read and validate the rows of a block of parts. Keeps up to 8 bytes per row in memory.

    Args:
        reader: The input.
        count: Its rows.
        part_rows: Rows per part.
        numbers: The parts.
        required_ids: Ids of skip_row.

    Raises:
        InputRowsError: Rows are bad and `reader.record_bad` is off, or the input has not the rows
            that were counted.
    """
    if not numbers:
        return CheckedParts(
            digests=[], places=[], ids=[], bad_rows=0, max_n=1, found_ids=frozenset()
        )
    first, end = numbers.start * part_rows, min(numbers.stop * part_rows, count.rows)
    # The hashes of each part are taken from memory.
    bad, hashes, warnings = BadRows(), IdHashes(max_in_memory=sys.maxsize), RowWarnings()
    parser, digests = RowParser(reader.defaults, warnings), InputDigests(part_rows)
    digests.begin_at(count.place_of(first))
    required, found = frozenset(required_ids), set()
    ids, max_n = [], reader.defaults.sampling.n
    begin = count.mark_before(first)
    rows = islice(reader.source.rows(begin), first - begin.position, None)
    index = first
    for raw in islice(rows, end - first):
        row, content = parser.parse(index, raw)
        if isinstance(row, BadRow):
            bad.add(row)
        else:
            max_n = max(max_n, row.params.n)
        if row.prompt_id in required:
            found.add(row.prompt_id)
        if reader.finds_duplicates and (reader.record_bad or isinstance(row, Prompt)):
            hashes.add(row.prompt_id, raw.position)
        digests.add(content, raw)
        index += 1
        if index % part_rows == 0 or index == end:
            ids.append(hashes.take())
    has_more = end == count.rows != reader.limit and next(rows, None) is not None
    if index < end or has_more:
        raise InputRowsError(
            f"{reader.source.name}: has {'more' if has_more else 'fewer'} than the {count.rows} "
            "rows that were counted; the input has changed, run all shards again"
        )
    warnings.log(reader.source.name, count.rows, limit=reader.limit)
    if bad.count and not reader.record_bad:
        raise InputRowsError(
            f"{bad.summary(end - first)} (rows {first} to {end - 1} of {count.rows} were checked); "
            f"nothing was {reader.purpose}\n{bad.describe()}"
        )
    digests.finish()
    return CheckedParts(
        digests=digests.parts,
        places=digests.places or [START],
        ids=ids or [(b"", b"")],
        bad_rows=bad.count,
        max_n=max_n,
        found_ids=frozenset(found),
    )


def join_parts(
    reader: PromptReader,
    read_parts: ReadParts,
    rows: int,
    part_rows: int,
    required_ids: Iterable[str] = (),
) -> InputSummary:
    """Return what `reader.check` returns, from checked parts. Reads rows only for repeated ids.

    Args:
        reader: The input.
        read_parts: Yields all parts.
        rows: Rows of the input.
        part_rows: Rows per part.
        required_ids: Ids of skip_row, which must exist.

    Raises:
        InputRowsError: Ids are repeated and `reader.record_bad` is off.
        ConfigError: No row has one of `required_ids`.
    """
    digests: list[str] = []
    places: list[Place] = []
    hashes, missing, bad_rows, max_n = IdHashes(), set(required_ids), 0, 1
    for parts in read_parts():
        digests += parts.digests
        places += parts.places
        bad_rows += parts.bad_rows
        max_n = max(max_n, parts.max_n)
        missing -= parts.found_ids
        for part_ids in parts.ids:
            hashes.merge(*part_ids)

    def read_rows(some: Set[int]) -> Iterator[tuple[RawRow, Prompt | BadRow]]:
        numbers = _parts_with(read_parts, some, rows, part_rows)
        return reader.rows_of_parts(numbers, places, part_rows)

    duplicates, new_bad = find_duplicates(
        read_rows, hashes.repeated(), record_bad=reader.record_bad
    )
    if duplicates and not reader.record_bad:
        numbers = sorted({index // part_rows for index in duplicates})
        again = reader.rows_of_parts(numbers, places, part_rows)
        raise reader.rejection(BadRows(), duplicates, rows, again)
    reader.check_required(missing)
    digest = input_digest(digests)
    return InputSummary(
        rows=rows,
        digest=digest,
        part_rows=part_rows,
        part_digests=digests,
        places=places,
        prefix_digests={rows: digest},
        bad_rows=bad_rows + new_bad,
        max_n=max_n,
        duplicates=duplicates,
    )


def _parts_with(read_parts: ReadParts, hashes: Set[int], rows: int, part_rows: int) -> list[int]:
    """Return the numbers of the parts with an id of these hashes, in order."""
    import numpy as np

    searched = np.sort(np.fromiter(hashes, dtype=np.uint64, count=len(hashes)))
    positions = (position_of_hash(value) for value in hashes)
    found = {position // part_rows for position in positions if position < rows}
    number = 0
    for parts in read_parts():
        for own, _ in parts.ids:
            values = np.frombuffer(own, dtype=np.uint64)
            places = np.minimum(np.searchsorted(searched, values), len(searched) - 1)
            if (searched[places] == values).any():
                found.add(number)
            number += 1
    return sorted(found)
