"""Splits of datasets: folders and files of every format, save_to_disk folders, slices, nulls."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptbatch.pipeline.errors import InputNotFoundError, InputRowsError
from gptbatch.pipeline.input.csv_file import CsvFile
from gptbatch.pipeline.input.dataset import DatasetSplit
from gptbatch.pipeline.input.lines import LineReader
from gptbatch.pipeline.input.prompt_reader import PromptReader
from gptbatch.pipeline.input.rows import RowDefaults, derive_seed
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.types import Prompt

# the library does not close the file of a stream that was not read to its end
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SAMPLING = SamplingParams(seed=0, temperature=1.0, top_k=0, max_new_tokens=4)
DEFAULTS = RowDefaults(prompt_field="prompt", sampling=SAMPLING)
ROWS = [{"prompt": f"prompt {i}", "seed": i if i % 2 else None, "note": f"n{i}"} for i in range(6)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def read(dataset: Path | str, split: str = "train", limit: int | None = None) -> list[Prompt]:
    source = DatasetSplit(dataset=str(dataset), config=None, split=split, revision=None)
    reader = PromptReader(source=source, defaults=DEFAULTS, limit=limit)
    checked = reader.check()
    prompts = [row for row in reader.prompts(checked) if isinstance(row, Prompt)]
    assert checked.rows == len(prompts)
    return prompts


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt"])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, object]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)


def write_arrow(path: Path, rows: list[dict[str, object]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


WRITERS = {"jsonl": write_lines, "csv": write_csv, "parquet": write_parquet, "arrow": write_arrow}


@pytest.mark.parametrize(
    "split", ["train", "train[:50]", "train[:80%]", "train[0:]", "train[7:]", "train+train[:9]"]
)
@pytest.mark.parametrize("kinds", [["jsonl"], ["parquet"], ["csv"], ["arrow"], list(WRITERS)])
def test_parts_of_a_dataset_are_read_from_their_places(
    tmp_path: Path, kinds: list[str], split: str
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows: list[dict[str, object]] = [{"prompt": f"prompt {index}"} for index in range(60)]
    size = len(rows) // len(kinds)
    for index, kind in enumerate(kinds):
        WRITERS[kind](folder / f"{index}.{kind}", rows[index * size : (index + 1) * size])
    source = DatasetSplit(dataset=str(folder), config=None, split=split, revision=None)
    reader = PromptReader(source=source, defaults=DEFAULTS, record_bad=True)
    checked = reader.check(part_rows=7)
    every = [(row.index, row.prompt_id) for row in reader.prompts(checked)]
    for number in reversed(range(len(checked.part_digests))):
        part = [(row.index, row.prompt_id) for row in reader.prompts(checked, [number])]
        assert part == every[number * 7 : number * 7 + 7]


def test_a_part_of_a_dataset_is_sought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files before it are not opened, nor are rows before it read in plain JSON lines."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows: list[dict[str, object]] = [{"prompt": f"prompt {index}"} for index in range(60)]
    write_csv(folder / "0.csv", rows[:20])
    write_lines(folder / "1.jsonl", rows[20:])
    source = DatasetSplit(dataset=str(folder), config=None, split="train", revision=None)
    reader = PromptReader(source=source, defaults=DEFAULTS)
    checked = reader.check(part_rows=10)
    read: list[int] = []
    lines = LineReader.lines

    def counted(self: LineReader, **places: int) -> Iterator[tuple[int, bytes | None]]:
        for number, line in lines(self, **places):
            read.append(number)
            yield number, line

    monkeypatch.setattr(LineReader, "lines", counted)
    (folder / "0.csv").unlink()
    monkeypatch.setattr(CsvFile, "rows", None)
    assert [row.index for row in reader.prompts(checked, [4])] == [*range(40, 50)]
    assert read == [*range(21, 31)]


def write_folder(folder: Path, kind: str, split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{split}.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "seed", "note"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def expect_rows(
    prompts: list[Prompt], start: int = 0, stop: int = 6, first_place: int | None = None
) -> None:
    assert [p.text for p in prompts] == [f"prompt {i}" for i in range(start, stop)]
    assert [p.index for p in prompts] == list(range(stop - start))
    for i, prompt in zip(range(start, stop), prompts, strict=True):
        assert prompt.params.seed == (
            i
            if i % 2
            else derive_seed(0, str(i if first_place is None else i - start + first_place))
        )
        assert prompt.metadata == json.dumps({"note": f"n{i}"})


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "jsonl"])
def test_folders_and_files_of_each_format(tmp_path: Path, kind: str) -> None:
    path = write_folder(tmp_path / "data", kind)
    expect_rows(read(tmp_path / "data"))
    expect_rows(read(tmp_path / "data", split="train[1:4]"), 1, 4)
    expect_rows(read(tmp_path / "data", limit=2), 0, 2)
    expect_rows(read(path))


def test_folders_made_by_save_to_disk(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    expect_rows(read(tmp_path / "one"))
    expect_rows(read(tmp_path / "one", split="train[:50%]"), 0, 3)
    datasets.DatasetDict({"train": whole, "test": whole.select(range(2, 5))}).save_to_disk(
        tmp_path / "two"
    )
    expect_rows(read(tmp_path / "two", split="test"), 2, 5, first_place=0)
    assert len(read(tmp_path / "two", split="train+test")) == 9
    with pytest.raises(InputNotFoundError, match="validation"):
        read(tmp_path / "two", split="validation")


def test_a_folder_with_the_name_of_a_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(Path("csv"), "csv")
    Path("other.csv").write_text("prompt\nfrom outside\n")
    expect_rows(read("csv"))
    expect_rows(read("./csv", split="train[1:3]"), 1, 3)


def test_a_saved_format_hides_no_columns(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).with_format("numpy", columns=["prompt"]).save_to_disk(
        tmp_path / "one"
    )
    expect_rows(read(tmp_path / "one"))
    assert read(tmp_path / "one", split="train[10:20]") == []


@pytest.mark.parametrize("split", ["train", "train[:1]"])
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("train.parquet", b"PAR1 no", "is damaged, cut off"),
        ("train.arrow", b"ARROW1\0\0", "is damaged, cut off"),
        ("train.jsonl", b'{"prompt": ', "not valid JSON"),
        ("train.json", b"", "is empty, which no JSON is"),
        ("train.json", b'[{"prompt"', "not valid JSON"),
        ("train.csv", b"", "there is no header"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, reason: str, split: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(content)
    with pytest.raises(
        InputRowsError, match=re.escape(str(tmp_path / "data" / name)) + f".*{reason}"
    ):
        PromptReader(
            source=DatasetSplit(
                dataset=str(tmp_path / "data"), config=None, split=split, revision=None
            ),
            defaults=DEFAULTS,
        ).check()


def test_damaged_saved_folders(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    for content in ("{}", "[1]", "{"):
        (tmp_path / "one" / "state.json").write_text(content)
        with pytest.raises(InputNotFoundError, match="cannot be loaded"):
            read(tmp_path / "one")


def test_values_without_a_json_form(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": ["a", "b"],
            "when": pa.array([0, 1], pa.timestamp("s", tz="UTC")),
            "score": pa.array([float("nan"), 1.5]),
            "tags": [["x"], []],
            "seed": pa.array([3.0, None]),
        }
    )
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "train.parquet")
    first, second = read(tmp_path / "data")
    assert first.params.seed == 3, "a whole float is an integer here: CSV with gaps has no integers"
    assert json.loads(first.metadata or "") == {
        "when": "1970-01-01 00:00:00.000Z",
        "score": None,
        "tags": ["x"],
    }
    assert json.loads(second.metadata or "")["score"] == 1.5


def test_bad_rows_are_named_by_row(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(
        pa.table({"prompt": ["a", None, "c"], "seed": [1.0, 2.0, 2.5]}),
        tmp_path / "data" / "train.parquet",
    )
    source = DatasetSplit(dataset=str(tmp_path / "data"), config=None, split="train", revision=None)
    with pytest.raises(InputRowsError) as caught:
        PromptReader(source=source, defaults=DEFAULTS).check()
    assert f"{tmp_path / 'data' / 'train.parquet'} row 1: prompt must be a string, not null" in str(
        caught.value
    )
    assert "row 2: seed must be a whole number, not 2.5" in str(caught.value)


def test_missing_datasets_and_splits(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", "jsonl")
    for dataset, split in (
        (tmp_path / "data", "test"),
        (tmp_path / "data", "test[:3]"),
        (tmp_path / "nothing", "train"),
        ("./nothing", "train"),
    ):
        with pytest.raises(InputNotFoundError):
            read(dataset, split=split)
    (tmp_path / "rows.xml").write_text("x")
    with pytest.raises(InputNotFoundError, match=r"a file must end in \.jsonl"):
        read(tmp_path / "rows.xml")
    with pytest.raises(InputNotFoundError, match=r"cannot be loaded|no such file or folder"):
        read("nobody/no-such-dataset")
