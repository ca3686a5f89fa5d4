"""Reading and comparing runs: equal rows, differences, and the output of the command."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import gptbatch.pipeline.audit.diff
import gptbatch.pipeline.audit.run_reader
from gptbatch.jobs.cli import run_command
from gptbatch.pipeline.audit.diff import RowDifference, diff_runs, settings_that_differ, summarize
from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.errors import InputNotFoundError, StorageError
from gptbatch.pipeline.input.input_digest import input_digest
from gptbatch.pipeline.input.rows import RowDefaults
from gptbatch.pipeline.output.claim import claim
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.finish import finish, mark_complete
from gptbatch.pipeline.output.folder import OutputFolder
from gptbatch.pipeline.output.part_plan import PartPlan, count_parts
from gptbatch.pipeline.output.part_writer import PartWriter
from gptbatch.pipeline.output.schema import COLUMNS, FORMAT
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.storage.atomic_write import FileWriter
from gptbatch.pipeline.types import Completion, Prompt, RowError, Sample, Timing
from tests.processes import LIMIT_S, child_environment

IDENTITY = {"config_hash": "f" * 64, "dtype": "float32", "seed": 0}
FACTS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "batch_invariance": "unverified",
    "environment": {"attention": "padded", "torch": "2.13.0"},
}
TIMING = Timing(queue_s=0.1, prefill_s=0.2, decode_s=0.3, mean_batch_size=2.0, started_at_s=1.7e9)


def completion(
    prompt_id: str, token_ids: Sequence[int] = (5, 6, 7, 8), **changes: Any
) -> Completion:
    """Return a row that ran to its limit; `write_run` sets its index."""
    params = SamplingParams(seed=1, temperature=1.0, top_k=0, max_new_tokens=max(1, len(token_ids)))
    made = Completion(
        prompt=Prompt(
            index=0, prompt_id=prompt_id, text=f"secret {prompt_id}", params=params, metadata=None
        ),
        prompt_tokens=3,
        prompt_tokens_dropped=0,
        token_ids=list(token_ids),
        finish_reason="length",
        stop_reason="max_new_tokens",
        error=None,
        timing=TIMING,
        min_decision_margin=0.25,
    )
    return dataclasses.replace(made, **changes)


def failed(
    prompt_id: str, reason: str = "the prompt has 99 tokens, more than n_positions (64)"
) -> Completion:
    error = RowError(kind="too_long", reason=reason)
    return completion(
        prompt_id,
        (),
        finish_reason="error",
        stop_reason=None,
        error=error,
        timing=None,
        min_decision_margin=None,
    )


def many(count: int) -> list[Completion]:
    return [completion(f"id {i}", [i, i + 1, i + 2]) for i in range(count)]


def write_run(
    path: Path,
    completions: Sequence[Completion],
    *,
    part_rows: int = 2,
    identity: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    first_rows: int | None = None,
    texts: Mapping[str, str] | None = None,
    facts_of_parts: Mapping[int, dict[str, Any]] | None = None,
) -> Path:
    """Write a run as generate does.

    Args:
        path: The output folder.
        completions: Its rows; those with a sample_index above 0 are samples of the row before.
        part_rows: Rows per part.
        identity: Keys of the identity that differ.
        facts: Facts that differ.
        first_rows: Stop after these rows, like a killed run.
        texts: Texts of completions by id; others have one that names the id.
        facts_of_parts: Facts of parts that another run has written, by number.
    """
    texts = texts or {}
    rows: list[list[Sample]] = []
    for one in completions:
        if not one.prompt.sample_index:
            rows.append([])
        placed = dataclasses.replace(
            one, prompt=dataclasses.replace(one.prompt, index=len(rows) - 1)
        )
        text = texts.get(one.prompt.prompt_id, f"private {one.prompt.prompt_id}")
        rows[-1].append(Sample(placed, None if one.error else text))
    folder = OutputFolder(path)
    folder.create()
    digests = ["0" * 64] * count_parts(part_rows, len(rows))
    identity = {
        **IDENTITY,
        "rows": len(rows),
        "part_rows": part_rows,
        "input_digest": input_digest(digests),
        **(identity or {}),
    }
    facts = {"format": FORMAT, "identity": identity, **FACTS, **(facts or {})}
    files = FileWriter(path / ".gptbatch")
    claim(folder, files, "seed: 0\nengine:\n  dtype: float32\n", facts)
    plan = PartPlan(identity=identity, input_digests=digests)
    writer = PartWriter(path, files, FileHashes(), plan=plan, facts=facts)
    parts = []
    for number in range(plan.n_parts):
        writer.facts = {**facts, **(facts_of_parts or {}).get(number, {})}
        if (found := part_of(rows[:first_rows], plan, number)) is not None:
            parts.append(writer.write(number, found))
    if first_rows is None:
        known = {part.number: part for part in parts}
        done = finish(folder, files, identity, FileHashes(), known, row_defaults())
        mark_complete(folder, files, done)
    return path


def part_of(rows: list[list[Sample]], plan: PartPlan, number: int) -> list[list[Sample]] | None:
    """Return the rows of a part, None where there are not all of them."""
    first = number * plan.part_rows
    found = rows[first : first + plan.part_rows]
    return found if len(found) == plan.rows_of(number) else None


def row_defaults() -> RowDefaults:
    params = SamplingParams(seed=0, temperature=1.0, top_k=0, max_new_tokens=4)
    return RowDefaults(prompt_field="prompt", sampling=params)


def differences(a: Path, b: Path) -> list[RowDifference]:
    return list(diff_runs(RunReader(a), RunReader(b)))


# -- reading a run ---------------------------------------------------------------------------------


def test_a_run_is_read_back_in_order(tmp_path: Path) -> None:
    run = RunReader(write_run(tmp_path / "out", [*many(6), failed("x")], part_rows=3))
    assert [path.name for path in run.parts] == [
        "part-000000.parquet",
        "part-000001.parquet",
        "part-000002.parquet",
    ]
    assert (run.n_rows, run.complete) == (7, True)
    assert run.manifest["identity"]["config_hash"] == "f" * 64
    assert run.facts == FACTS
    assert run.config == {"seed": 0, "engine": {"dtype": "float32"}}
    rows = list(run.rows())
    assert [row["prompt_index"] for row in rows] == list(range(7))
    assert list(rows[0]) == [column.name for column in COLUMNS]
    assert rows[4]["completion_token_ids"] == [4, 5, 6]
    assert rows[4]["started_at"].tzinfo is not None
    assert list(run.rows(["finish_reason", "prompt_id"]))[6] == {
        "finish_reason": "error",
        "prompt_id": "x",
    }
    with pytest.raises(ValueError, match="the table has no 'promt'"):
        list(run.rows(["promt"]))


def test_parts_are_ordered_by_number(tmp_path: Path) -> None:
    """Names of earlier formats had five digits: part-100000 came before part-99999."""
    identity = {"rows": 200_004, "input_digest": "1" * 64}
    out = write_run(tmp_path / "out", many(4), first_rows=0, identity=identity)
    plan = PartPlan(
        identity={**IDENTITY, **identity, "part_rows": 2},
        input_digests=["0" * 64] * 100_002,
    )
    facts = {"format": FORMAT, "identity": plan.identity, **FACTS}
    files = FileWriter(out / ".gptbatch")
    writer = PartWriter(out, files, FileHashes(), plan=plan, facts=facts)
    for number in (100_000, 0, 99_999):
        rows = []
        for index in (2 * number, 2 * number + 1):
            row = completion(f"id {index}")
            placed = dataclasses.replace(row, prompt=dataclasses.replace(row.prompt, index=index))
            rows.append([Sample(placed, "")])
        writer.write(number, rows)
    (out / "part-099999.parquet").rename(out / "part-99999.parquet")
    assert [row["prompt_id"] for row in RunReader(out).rows(["prompt_id"])][1:4] == [
        "id 1",
        "id 199998",
        "id 199999",
    ]


def test_find_returns_the_row_of_an_id(tmp_path: Path) -> None:
    run = RunReader(write_run(tmp_path / "out", many(7), part_rows=3))
    assert [run.find(f"id {i}") for i in range(7)] == list(run.rows())
    assert run.find("id 7") is None
    assert RunReader(write_run(tmp_path / "empty", [])).find("id 0") is None


@pytest.mark.parametrize("batch_rows", [1, 3, 100])
def test_rows_are_read_by_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_rows: int
) -> None:
    monkeypatch.setattr(gptbatch.pipeline.audit.run_reader, "BATCH_ROWS", batch_rows)
    run = RunReader(write_run(tmp_path / "out", many(23), part_rows=5))
    reader = run.row_reader(["prompt_id"])
    for places in (
        [0],
        [1, 2],
        [4, 5, 22],
        [],
        [3],
        [3],
        [21],
        [20, 22],
        [0, 6, 12, 18],
        list(range(23)),
        [10],
    ):
        assert [row["prompt_id"] for row in reader.take(places)] == [f"id {i}" for i in places]


def test_an_unfinished_run_is_read(tmp_path: Path) -> None:
    run = RunReader(write_run(tmp_path / "out", many(7), first_rows=5))
    assert (run.n_rows, run.complete, run.facts, run.manifest["complete"]) == (
        4,
        False,
        FACTS,
        False,
    )
    none_yet = RunReader(write_run(tmp_path / "none yet", many(7), first_rows=0))
    assert (
        none_yet.n_rows,
        none_yet.complete,
        none_yet.facts,
        none_yet.parts,
        list(none_yet.rows()),
    ) == (0, False, FACTS, [], [])


def test_a_run_that_lost_a_part_is_not_complete(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out", many(6))
    (out / "part-000001.parquet").unlink()
    run = RunReader(out)
    assert (run.n_rows, run.complete, run.facts) == (4, False, FACTS)


def test_a_column_that_an_older_version_lacks_is_none(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out", many(2))
    part = out / "part-000000.parquet"
    table = pq.read_table(part)
    pq.write_table(table.drop_columns(["min_decision_margin", "logits_digest"]), part)
    assert list(RunReader(out).rows(["min_decision_margin", "prompt_id"])) == [
        {"min_decision_margin": None, "prompt_id": f"id {i}"} for i in range(2)
    ]
    assert differences(out, write_run(tmp_path / "new", many(2))) == []


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "_manifest.json").write_text("{")
    (tmp_path / "file").write_text("mine")
    for name, message in {
        "missing": "no such folder",
        "file": "is not a folder",
        "empty": r"holds no run of gptbatch \(it is empty\)",
        "notes": r"holds no run of gptbatch \(no _manifest\.json\)",
        "damaged": r"_manifest\.json is damaged, or not written by gptbatch",
    }.items():
        with pytest.raises(InputNotFoundError, match=message) as caught:
            RunReader(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_damaged_part_is_an_error_and_a_foreign_file_is_not(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out", many(4))
    (out / "part-000099.parquet").write_bytes(b"mine")
    assert RunReader(out).n_rows == 4
    part = out / "part-000001.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:-20])
    with pytest.raises(StorageError, match=r"part-000001\.parquet: cannot be read"):
        RunReader(out)
    chunk = pq.read_metadata(out / "part-000000.parquet").row_group(0).column(0)
    flipped = bytearray(whole)
    flipped[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    part.write_bytes(flipped)
    with pytest.raises(StorageError, match=r"part-000001\.parquet: cannot be read"):
        list(RunReader(out).rows())


def test_a_missing_config_is_reported_on_access(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out", many(2))
    (out / ".gptbatch" / "config.yaml").unlink()
    run = RunReader(out)
    assert run.n_rows == 2
    with pytest.raises(
        StorageError, match=r"config\.yaml: missing: .* is a copy without \.gptbatch"
    ):
        _ = run.config


def test_reading_and_comparing_import_no_torch() -> None:
    program = (
        "import sys; import gptbatch.pipeline.audit.diff; "
        "assert not {'torch', 'transformers', 'datasets', 'click'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", program], env=child_environment(), check=True, timeout=LIMIT_S
    )


# -- what is equal ---------------------------------------------------------------------------------


def test_equal_runs_have_no_differences(tmp_path: Path) -> None:
    rows = [*many(5), failed("x")]
    a, b = write_run(tmp_path / "a", rows), write_run(tmp_path / "b", rows)
    assert differences(a, b) == differences(a, a) == []
    assert settings_that_differ(RunReader(a), RunReader(b)) == []


def test_timings_and_error_texts_are_not_compared(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [completion("x"), failed("y")])
    b = write_run(
        tmp_path / "b",
        [completion("x", timing=None, logits_digest="0" * 64), failed("y", "other words")],
    )
    assert differences(a, b) == []


def test_equal_rows_from_other_logits_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_run(
        tmp_path / "a", [completion("x", logits_digest="0" * 64), completion("y"), completion("z")]
    )
    b = write_run(
        tmp_path / "b",
        [
            completion("x", logits_digest="1" * 64),
            completion("y", min_decision_margin=0.5),
            completion("z"),
        ],
    )
    assert [(found.prompt_id, found.kind) for found in differences(a, b)] == [
        ("x", "logits"),
        ("y", "logits"),
    ]
    assert run_command(["diff", str(a), str(b)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 rows have equal tokens, but other logits" in lines
    summary = json.loads(lines[-1])
    assert (summary["equal"], summary["equal_from_other_logits"], summary["different"]) == (3, 2, 0)


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"temperature": 0.5}, []),
        ({"top_k": 3}, []),
        ({"seed": 2}, []),
        ({"max_new_tokens": 9}, ["logits"]),
        ({}, ["logits"]),
    ],
)
def test_margins_are_compared_only_with_equal_settings(
    tmp_path: Path, settings: dict[str, Any], kinds: list[str]
) -> None:
    """min_decision_margin also depends on how a row is sampled."""
    one = completion("x")
    params = dataclasses.replace(one.prompt.params, **settings)
    other = completion(
        "x", min_decision_margin=0.5, prompt=dataclasses.replace(one.prompt, params=params)
    )
    assert [
        found.kind
        for found in differences(
            write_run(tmp_path / "a", [one]), write_run(tmp_path / "b", [other])
        )
    ] == kinds


def test_greedy_rows_have_the_same_margin_under_every_seed(tmp_path: Path) -> None:
    def greedy(seed: int, margin: float) -> Completion:
        one = completion("x", min_decision_margin=margin)
        params = dataclasses.replace(one.prompt.params, temperature=0.0, seed=seed, top_k=seed)
        return dataclasses.replace(one, prompt=dataclasses.replace(one.prompt, params=params))

    (found,) = differences(
        write_run(tmp_path / "a", [greedy(1, 0.25)]), write_run(tmp_path / "b", [greedy(2, 0.5)])
    )
    assert found.kind == "logits"


@pytest.mark.parametrize("batch_rows", [1, 4, 2048])
def test_part_sizes_and_row_order_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_rows: int
) -> None:
    monkeypatch.setattr(gptbatch.pipeline.audit.run_reader, "BATCH_ROWS", batch_rows)
    rows = many(31)
    shuffled = [rows[i * 12 % 31] for i in range(31)]
    assert shuffled != rows
    a, b = (
        write_run(tmp_path / "a", rows, part_rows=4),
        write_run(tmp_path / "b", shuffled, part_rows=7),
    )
    assert differences(a, b) == differences(b, a) == []
    assert [setting.name for setting in settings_that_differ(RunReader(a), RunReader(b))] == [
        "part_rows"
    ]


def test_runs_without_rows_are_equal(tmp_path: Path) -> None:
    a, b = RunReader(write_run(tmp_path / "a", [])), RunReader(write_run(tmp_path / "b", []))
    assert summarize(a, b, diff_runs(a, b)).all_equal
    assert (a.n_rows, len(a.parts)) == (0, 1)


# -- what is not -----------------------------------------------------------------------------------


def test_a_changed_token_is_found_at_its_index(tmp_path: Path) -> None:
    a = write_run(
        tmp_path / "a",
        [
            completion("x"),
            completion("y", [5, 6, 7, 8], min_decision_margin=0.001),
            completion("z"),
        ],
    )
    b = write_run(
        tmp_path / "b",
        [
            completion("x"),
            completion("y", [5, 6, 9, 9], min_decision_margin=0.002),
            completion("z"),
        ],
    )
    (found,) = differences(a, b)
    assert (found.prompt_id, found.kind, found.token_index, found.token_a, found.token_b) == (
        "y",
        "tokens",
        2,
        7,
        9,
    )
    assert (found.min_decision_margin_a, found.min_decision_margin_b) == (0.001, 0.002)


@pytest.mark.parametrize("batch_rows", [1, 4, 2048])
def test_changed_rows_are_found_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_rows: int
) -> None:
    monkeypatch.setattr(gptbatch.pipeline.audit.run_reader, "BATCH_ROWS", batch_rows)
    rows = [completion(f"id {i}", [i, i, 100 + i] if i % 3 else [i, i, i]) for i in range(31)]
    shuffled = [completion(f"id {i}", [i, i, i]) for i in (j * 12 % 31 for j in range(31))]
    a, b = (
        write_run(tmp_path / "a", rows, part_rows=4),
        write_run(tmp_path / "b", shuffled, part_rows=7),
    )
    found = [
        (one.prompt_id, one.token_index, one.token_a, one.token_b) for one in differences(a, b)
    ]
    assert found == [(f"id {i}", 2, 100 + i, i) for i in range(31) if i % 3]


@pytest.mark.parametrize("seed", range(10))
def test_random_changes_are_those_that_a_naive_comparison_finds(tmp_path: Path, seed: int) -> None:
    """Of parts that line up, and of parts whose rows are shuffled, missing or new."""
    rng = random.Random(seed)
    rows = [
        failed(f"id {i}")
        if rng.random() < 0.1
        else completion(f"id {i}", range(rng.randrange(1, 6)))
        for i in range(60)
    ]
    changed = [
        rng.choice([failed(row.prompt.prompt_id), completion(row.prompt.prompt_id, (9, i))])
        if rng.random() < 0.1
        else row
        for i, row in enumerate(rows)
    ]
    first = rng.randrange(50)
    changed[first : first + 10] = rng.sample(changed[first : first + 10], 10)
    if rng.random() < 0.5:
        del changed[rng.randrange(60)]
        changed.append(completion("new"))
    a = write_run(tmp_path / "a", rows, part_rows=7)
    b = write_run(tmp_path / "b", changed, part_rows=7)

    def content(row: Completion) -> tuple[list[int], str]:
        return list(row.token_ids), row.finish_reason

    left, right = ({row.prompt.prompt_id: content(row) for row in made} for made in (rows, changed))
    expected = [key for key in left if left[key] != right.get(key)]
    expected += [key for key in right if key not in left]
    assert [one.prompt_id for one in differences(a, b)] == expected


def test_a_shorter_completion_differs_where_it_ends(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [completion("x", [5, 6, 7, 8])])
    b = write_run(tmp_path / "b", [completion("x", [5, 6])])
    (found,) = differences(a, b)
    assert (found.kind, found.token_index, found.token_a, found.token_b) == ("tokens", 2, 7, None)
    (found,) = differences(b, a)
    assert (found.kind, found.token_index, found.token_a, found.token_b) == ("tokens", 2, None, 7)


@pytest.mark.parametrize(
    "finish", [{"finish_reason": "stop", "stop_reason": "end_of_text"}, {"stop_reason": "window"}]
)
def test_equal_tokens_with_another_finish(tmp_path: Path, finish: dict[str, Any]) -> None:
    a, b = (
        write_run(tmp_path / "a", [completion("x")]),
        write_run(tmp_path / "b", [completion("x", **finish)]),
    )
    (found,) = differences(a, b)
    assert (found.kind, found.token_index) == ("finish", None)
    assert (found.stop_reason_a, found.stop_reason_b) == ("max_new_tokens", finish["stop_reason"])


def test_an_error_in_one_run_only(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", [completion("x")]), write_run(tmp_path / "b", [failed("x")])
    (found,) = differences(a, b)
    assert (found.kind, found.finish_reason_a, found.finish_reason_b) == (
        "error",
        "length",
        "error",
    )
    assert (found.token_index, found.token_a, found.token_b, found.min_decision_margin_b) == (
        0,
        5,
        None,
        None,
    )


def test_another_prompt_under_the_same_id(tmp_path: Path) -> None:
    one = completion("x")
    a = write_run(tmp_path / "a", [one])
    b = write_run(
        tmp_path / "b",
        [dataclasses.replace(one, prompt=dataclasses.replace(one.prompt, text="another"))],
    )
    (found,) = differences(a, b)
    assert (found.kind, found.token_index) == ("prompt", None)


def test_rows_that_only_one_run_has(tmp_path: Path) -> None:
    rows = many(9)
    a, b = (
        write_run(tmp_path / "a", rows[:3] + rows[4:8]),
        write_run(tmp_path / "b", rows[:5] + rows[6:]),
    )
    found = [(difference.prompt_id, difference.kind) for difference in differences(a, b)]
    assert found == [("id 5", "only_in_a"), ("id 3", "only_in_b"), ("id 8", "only_in_b")]
    run_a, run_b = RunReader(a), RunReader(b)
    summary = summarize(run_a, run_b, diff_runs(run_a, run_b))
    assert dataclasses.asdict(summary) == {
        "rows_a": 7,
        "rows_b": 8,
        "samples_a": 7,
        "samples_b": 8,
        "equal": 6,
        "equal_from_other_logits": 0,
        "different": 0,
        "kinds": {},
        "missing_in_a": 2,
        "missing_in_b": 1,
    }
    assert not summary.all_equal


def test_an_unfinished_run_is_compared(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", many(7)), write_run(tmp_path / "b", many(7), first_rows=5)
    assert [(found.prompt_id, found.kind) for found in differences(a, b)] == [
        (f"id {i}", "only_in_a") for i in (4, 5, 6)
    ]
    assert [(found.prompt_id, found.kind) for found in differences(b, a)] == [
        (f"id {i}", "only_in_b") for i in (4, 5, 6)
    ]
    assert settings_that_differ(RunReader(a), RunReader(b)) == []
    none_yet = write_run(tmp_path / "none yet", many(7), first_rows=0)
    assert len(differences(a, none_yet)) == 7
    assert settings_that_differ(RunReader(a), RunReader(none_yet)) == [], (
        "a run without parts does not say its device"
    )


def test_a_duplicate_id_is_an_error(tmp_path: Path) -> None:
    fine, double = (
        write_run(tmp_path / "fine", many(4)),
        write_run(tmp_path / "double", [*many(4), completion("id 1")]),
    )
    for a, b in ((fine, double), (double, fine)):
        with pytest.raises(StorageError, match="double: holds the id 'id 1' twice"):
            differences(a, b)
    twice = write_run(tmp_path / "twice", [completion("new"), *many(4), completion("new")])
    with pytest.raises(StorageError, match="twice: holds the id 'new' twice"):
        differences(twice, fine)


def test_settings_that_differ_are_named_with_both_values(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", many(2), identity={"temperature": 1.0})
    b = write_run(
        tmp_path / "b",
        many(2),
        identity={"config_hash": "e" * 64, "dtype": "bfloat16", "seed": 3},
        facts={
            "dtype": "bfloat16",
            "device": "cuda",
            "environment": {"attention": "padded", "torch": "2.9.1"},
            "batch_invariance": "other",
        },
    )
    found = {
        setting.name: (setting.a, setting.b)
        for setting in settings_that_differ(RunReader(a), RunReader(b))
    }
    assert found == {
        "batch_invariance": ("unverified", "other"),
        "device": ("cpu", "cuda"),
        "dtype": ("float32", "bfloat16"),
        "environment.torch": ("2.13.0", "2.9.1"),
        "seed": (0, 3),
        "temperature": (1.0, None),
    }


def test_a_config_hash_that_no_setting_explains_is_named(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", many(2))
    b = write_run(
        tmp_path / "b", many(2), identity={"config_hash": "e" * 64}, facts={"device": "cuda"}
    )
    names = [setting.name for setting in settings_that_differ(RunReader(a), RunReader(b))]
    assert names == ["config_hash", "device"]


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def gptbatch_diff(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str], str]]:
    """Run `gptbatch diff ARGUMENTS...`; return exit code, lines of output, and errors."""

    def run(*arguments: str | Path) -> tuple[int, list[str], str]:
        code = run_command(["diff", *map(str, arguments)])
        captured = capfd.readouterr()
        return code, captured.out.splitlines(), captured.err

    return run


Diff = Callable[..., tuple[int, list[str], str]]


def test_the_command_on_equal_runs(tmp_path: Path, gptbatch_diff: Diff) -> None:
    a, b = write_run(tmp_path / "a", many(5)), write_run(tmp_path / "b", many(5))
    code, lines, stderr = gptbatch_diff(a, b)
    assert (code, lines[:-1], stderr) == (0, ["5 rows are in both runs: all are equal"], "")
    assert json.loads(lines[-1]) == {
        "rows_a": 5,
        "rows_b": 5,
        "samples_a": 5,
        "samples_b": 5,
        "equal": 5,
        "equal_from_other_logits": 0,
        "different": 0,
        "kinds": {},
        "missing_in_a": 0,
        "missing_in_b": 0,
        "settings_that_differ": {},
    }


def test_settings_alone_do_not_make_runs_differ(tmp_path: Path, gptbatch_diff: Diff) -> None:
    a, b = (
        write_run(tmp_path / "a", many(5)),
        write_run(tmp_path / "b", many(5), facts={"device": "cuda"}),
    )
    code, lines, _ = gptbatch_diff(a, b)
    assert code == 0
    assert lines[1] == 'setting device differs: "cpu" / "cuda"'
    assert json.loads(lines[2])["settings_that_differ"] == {"device": ["cpu", "cuda"]}


def test_the_command_prints_a_line_per_difference(tmp_path: Path, gptbatch_diff: Diff) -> None:
    other = completion("prompt")
    a = write_run(
        tmp_path / "a",
        [
            completion("same"),
            completion("token", [1, 2, 123], min_decision_margin=0.0012),
            completion("shorter", [1, 2]),
            completion("fails"),
            completion("ends"),
            other,
            completion("line\nbreak"),
        ],
    )
    b = write_run(
        tmp_path / "b",
        [
            completion("same"),
            completion("token", [1, 2, 456], min_decision_margin=0.0013),
            completion("shorter", [1, 2, 3], min_decision_margin=None),
            failed("fails"),
            completion("ends", stop_reason="window"),
            dataclasses.replace(
                other, prompt=dataclasses.replace(other.prompt, text="secret, another")
            ),
            completion("only b"),
        ],
    )
    code, lines, _ = gptbatch_diff(a, b)
    assert code == 1
    assert lines[:-1] == [
        "6 rows are in both runs: 5 differ (1 by error, 1 by finish, 1 by prompt, 2 by tokens)",
        "1 row is only in A",
        "1 row is only in B",
        "row 'token': token 2 differs: 123 / 456 (min_decision_margin 0.0012 / 0.0013)",
        "row 'shorter': token 2 differs: end / 3 (min_decision_margin 0.25 / none)",
        "row 'fails': a completion in A, an error in B",
        "row 'ends': the same tokens, but other finish reasons: max_new_tokens / window",
        "row 'prompt': the prompts differ",
        '  A "secret prompt"',
        '  B "secret, another"',
        "row 'line\\nbreak': only in A",
        "row 'only b': only in B",
    ]
    summary = json.loads(lines[-1])
    assert (
        summary["equal"],
        summary["different"],
        summary["missing_in_a"],
        summary["missing_in_b"],
    ) == (1, 5, 1, 1)
    _, without_texts, _ = gptbatch_diff(a, b, "--no-text")
    assert without_texts == [line for line in lines if not line.startswith("  ")]


def test_the_command_shows_where_texts_part(tmp_path: Path, gptbatch_diff: Diff) -> None:
    rows, other = [completion("long", [1]), completion("end", [1])], [2]
    common = "Long live the king of this land, and " * 3
    a = write_run(
        tmp_path / "a", rows, texts={"long": f"{common}his\nqueen" + "." * 80, "end": "x"}
    )
    b = write_run(
        tmp_path / "b",
        [completion(one.prompt.prompt_id, other) for one in rows],
        texts={"long": f"{common}her\x1b[31m son", "end": "x"},
    )
    code, lines, _ = gptbatch_diff(a, b)
    assert code == 1
    row, text_a, text_b, row_without_texts = lines[1:-1]
    assert row.startswith("row 'long': token 0 differs")
    assert text_a.startswith('  A "...his land, and his\\nqueen.....')
    assert text_a.endswith('....."')
    assert text_b == '  B "...his land, and her\\u001b[31m son"'
    assert row_without_texts.startswith("row 'end': token 0 differs"), "the texts are equal"


@pytest.mark.parametrize("side", ["a", "b"])
def test_one_missing_row_is_enough_for_exit_code_1(
    tmp_path: Path, gptbatch_diff: Diff, side: str
) -> None:
    a = write_run(tmp_path / "a", many(5)[: 4 if side == "a" else 5])
    b = write_run(tmp_path / "b", many(5)[: 4 if side == "b" else 5])
    code, lines, _ = gptbatch_diff(a, b)
    assert code == 1
    assert json.loads(lines[-1])[f"missing_in_{side}"] == 1


@pytest.mark.parametrize(
    ("arguments", "shown", "more"),
    [
        ((), 10, 15),
        (("--limit", "3"), 3, 22),
        (("--limit", "25"), 25, 0),
        (("--limit", "0"), 25, 0),
    ],
)
def test_the_command_limits_its_lines(
    tmp_path: Path, gptbatch_diff: Diff, arguments: tuple[str, ...], shown: int, more: int
) -> None:
    a, b = (
        write_run(tmp_path / "a", many(25)),
        write_run(tmp_path / "b", [completion(f"id {i}", [77]) for i in range(25)]),
    )
    code, lines, _ = gptbatch_diff(a, b, *arguments)
    assert code == 1
    assert sum(line.startswith("row ") for line in lines) == shown
    assert [line for line in lines if line.startswith("...")] == (
        [f"... and {more} more"] if more else []
    )
    assert json.loads(lines[-1])["different"] == 25


def test_rows_of_only_one_run_come_last_and_can_be_left_out(
    tmp_path: Path, gptbatch_diff: Diff
) -> None:
    a = write_run(tmp_path / "a", many(40))
    b = write_run(
        tmp_path / "b",
        [completion("id 39", [1]), *many(39)[38:], *[completion(f"b {i}") for i in range(30)]],
    )
    code, lines, _ = gptbatch_diff(a, b, "--limit", "3")
    assert code == 1
    assert lines.pop(3).startswith("setting input_digest differs: ")
    assert lines[:7] == [
        "2 rows are in both runs: 1 differ (1 by tokens)",
        "38 rows are only in A",
        "30 rows are only in B",
        "setting rows differs: 40 / 32",
        "row 'id 39': token 0 differs: 39 / 1 (min_decision_margin 0.25 / 0.25)",
        "row 'id 0': only in A",
        "row 'id 1': only in A",
    ]
    assert lines[7] == "... and 66 more"
    code, lines, _ = gptbatch_diff(a, b, "--common")
    assert code == 1
    assert [line for line in lines if line.startswith(("row", "..."))] == [
        "row 'id 39': token 0 differs: 39 / 1 (min_decision_margin 0.25 / 0.25)"
    ]
    assert lines[1] == "38 rows are only in A, and not compared"
    assert gptbatch_diff(a, write_run(tmp_path / "fewer", many(3)), "--common")[0] == 0


def test_runs_without_a_common_id_are_not_equal(tmp_path: Path, gptbatch_diff: Diff) -> None:
    a, b = write_run(tmp_path / "a", many(2)), write_run(tmp_path / "b", [completion("x")])
    code, lines, stderr = gptbatch_diff(a, b, "--common")
    assert (code, lines, "no id is in both" in stderr) == (66, [], True)


def test_the_command_reports_an_incomplete_run(tmp_path: Path, gptbatch_diff: Diff) -> None:
    a, b = write_run(tmp_path / "a", many(7)), write_run(tmp_path / "b", many(7), first_rows=5)
    code, lines, stderr = gptbatch_diff(a, b)
    assert code == 1
    assert stderr == f"gptbatch: B ({b}) is not complete; comparing the 4 rows that it holds\n"
    assert json.loads(lines[-1])["missing_in_b"] == 3


def test_exit_codes_of_runs_that_cannot_be_compared(tmp_path: Path, gptbatch_diff: Diff) -> None:
    run = write_run(tmp_path / "run", many(4))
    (tmp_path / "empty").mkdir()
    for pair in ((run, tmp_path / "missing"), (tmp_path / "empty", run)):
        code, lines, stderr = gptbatch_diff(*pair)
        assert (code, lines) == (66, [])
        assert stderr.startswith(f"gptbatch: {tmp_path}")
    (run / "part-000001.parquet").write_bytes(b"")
    code, lines, stderr = gptbatch_diff(run, run)
    assert (code, lines) == (74, [])
    assert "part-000001.parquet: cannot be read" in stderr
    assert gptbatch_diff(run)[0] == gptbatch_diff(run, run, "--limit", "-1")[0] == 2
