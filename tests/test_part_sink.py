"""Parts are written in a thread: their order, their errors, and what the journal says meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptbatch.pipeline.errors import StorageError
from gptbatch.pipeline.output.crash_journal import CrashJournal, read_crash_journal
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.part_plan import PartPlan
from gptbatch.pipeline.output.part_sink import MAX_UNWRITTEN_PARTS, PartSink
from gptbatch.pipeline.storage.atomic_write import FileWriter
from gptbatch.pipeline.types import Completion, Sample
from tests.processes import LIMIT_S, wait_for
from tests.test_diff import completion
from tests.test_hostile_folders import parts_row

N_PARTS, PART_ROWS = 8, 2


class Disk:
    """Takes the place of PartWriter: writes when the test lets it, or fails.

    Attributes:
        may_write: Set by the test.
        fails: Numbers of the parts that cannot be written.
        written: Each part with the texts of its rows, in order.
    """

    def __init__(self) -> None:
        self.may_write = threading.Event()
        self.fails: set[int] = set()
        self.written: list[tuple[int, list[str | None]]] = []

    def write(self, number: int, rows: Sequence[Sequence[Sample]]) -> Part:
        assert self.may_write.wait(LIMIT_S)
        if number in self.fails:
            raise StorageError(f"part {number}: No space left on device")
        self.written.append((number, [sample.text for samples in rows for sample in samples]))
        return Part(
            name=f"part-{number:06d}.parquet",
            first_row=number * PART_ROWS,
            rows=len(rows),
            samples=len(rows),
            error_kinds={},
            prompt_tokens=0,
            completion_tokens=0,
            input_rows_digest="0" * 64,
            content_digest="1" * 64,
        )

    def sha256_of(self, part: Part) -> str:
        return "2" * 64


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def recorded() -> list[int]:
    return []


@pytest.fixture(params=["in a thread", "without threads"])
def make_sink(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    disk: Disk,
    recorded: list[int],
) -> Callable[[], PartSink]:
    """Return a function that makes a sink. Where no thread can be started, it writes at once."""

    def make() -> PartSink:
        plan = PartPlan(
            identity={"rows": N_PARTS * PART_ROWS, "part_rows": PART_ROWS},
            input_digests=["0" * 64] * N_PARTS,
        )
        if request.param == "without threads":
            disk.may_write.set()
            refuse = RuntimeError("can't start new thread")

            def start(thread: threading.Thread) -> None:
                raise refuse

            monkeypatch.setattr(threading.Thread, "start", start)
        run: Any = SimpleNamespace(record=lambda part, sha256: recorded.append(part.number))
        writer: Any = disk
        return PartSink(
            run,
            writer,
            CrashJournal(tmp_path, FileWriter(tmp_path)),
            {},
            plan=plan,
            text_of=lambda done: f"text of {done.prompt.prompt_id}",
            rows_total=N_PARTS * PART_ROWS,
        )

    return make


def row(index: int) -> list[Completion]:
    made: Completion = parts_row(completion(str(index)), index)
    return [made]


def add_part(sink: PartSink, number: int) -> None:
    """Add the rows of a part, the last one first."""
    sink.begin_part(number)
    for index in (2 * number + 1, 2 * number):
        sink.add(row(index))


def in_flight(folder: Path) -> list[int]:
    return read_crash_journal(folder).parts_in_flight


def test_parts_are_committed_in_the_order_of_their_last_rows(
    make_sink: Callable[[], PartSink], disk: Disk, recorded: list[int]
) -> None:
    sink = make_sink()
    sink.begin_part(0)
    sink.add(row(1))
    add_part(sink, 2)
    add_part(sink, 1)
    sink.add(row(0))
    disk.may_write.set()
    assert [part.number for part in sink.written(wait=True)] == [2, 1, 0]
    assert disk.written == [
        (number, [f"text of {2 * number}", f"text of {2 * number + 1}"]) for number in (2, 1, 0)
    ]
    assert recorded == [2, 1, 0]
    assert sink.parts.keys() == {0, 1, 2}
    sink.close()


@pytest.mark.parametrize("make_sink", ["in a thread"], indirect=True)
def test_a_part_is_in_flight_until_it_is_written(
    make_sink: Callable[[], PartSink], disk: Disk, tmp_path: Path
) -> None:
    sink = make_sink()
    add_part(sink, 0)
    sink.begin_part(1)
    assert list(sink.written()) == []
    assert (sink.n_in_flight, in_flight(tmp_path)) == (2, [0, 1])
    disk.may_write.set()
    wait_for(lambda: disk.written, "the part")
    assert in_flight(tmp_path) == [0, 1], "the caller has not heard of it"
    assert [part.number for part in sink.written(wait=True)] == [0]
    assert (sink.n_in_flight, in_flight(tmp_path)) == (1, [1])
    sink.close()


def test_an_error_of_the_thread_is_raised_to_the_caller(
    make_sink: Callable[[], PartSink], disk: Disk, recorded: list[int], tmp_path: Path
) -> None:
    """The part stays in flight. Parts after it are written, and are taken later."""
    sink = make_sink()
    disk.fails = {0}
    add_part(sink, 0)
    add_part(sink, 1)
    disk.may_write.set()
    with pytest.raises(StorageError, match="part 0: No space left on device"):
        list(sink.written(wait=True))
    assert in_flight(tmp_path) == [0, 1]
    assert [part.number for part in sink.written(wait=True)] == [1]
    assert (recorded, in_flight(tmp_path)) == ([1], [0])
    sink.close()
    sink.close_journal()
    assert in_flight(tmp_path) == []


@pytest.mark.parametrize("make_sink", ["in a thread"], indirect=True)
def test_the_caller_waits_for_a_disk_that_falls_behind(
    make_sink: Callable[[], PartSink], disk: Disk
) -> None:
    sink = make_sink()
    for number in range(MAX_UNWRITTEN_PARTS):
        add_part(sink, number)
    assert list(sink.written()) == [], "it does not wait yet"
    for number in range(MAX_UNWRITTEN_PARTS, N_PARTS):
        add_part(sink, number)
    threading.Timer(0.1, disk.may_write.set).start()
    found = list(sink.written())
    assert len(found) >= N_PARTS - MAX_UNWRITTEN_PARTS
    found += sink.written(wait=True)
    assert [part.number for part in found] == list(range(N_PARTS))
    sink.close()


@pytest.mark.parametrize("make_sink", ["in a thread"], indirect=True)
def test_a_run_that_ends_is_no_crash_even_if_the_disk_is_slow(
    make_sink: Callable[[], PartSink], disk: Disk, tmp_path: Path
) -> None:
    """A second signal, or the end of its time, may end the process while a part is written."""
    sink = make_sink()
    add_part(sink, 0)
    add_part(sink, 1)
    sink.close_journal()
    assert in_flight(tmp_path) == []
    disk.may_write.set()
    for _ in sink.written(wait=True):
        assert in_flight(tmp_path) == []
    assert sink.parts.keys() == {0, 1}
    sink.close()
