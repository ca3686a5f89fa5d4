"""Hostile and broken inputs of the command: exit codes, and messages with the location."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.launcher import Child, Launcher

GOOD = b'{"prompt": "The king"}\n'


@pytest.fixture(scope="module")
def generate(launcher: Launcher, checkpoint: Path) -> Callable[..., tuple[int, Child]]:
    def run(folder: Path, *more: str | Path) -> tuple[int, Child]:
        base = [
            "generate",
            "--model",
            str(checkpoint),
            "--max-new-tokens",
            "2",
            "--threads",
            "1",
            "--batch-invariance",
            "off",
            "--attention",
            "padded",
        ]
        return launcher.run(*base, "--output", folder / "out", *more, cwd=folder)

    return run


Generate = Callable[..., tuple[int, Child]]

# content of prompts.jsonl (or of the file named) -> exit code, and the message after the file's
# name
LINES: dict[str, tuple[bytes, int, str]] = {
    "no JSON": (GOOD + b"hello\n", 65, ":2: not valid JSON"),
    "cut off": (GOOD + b'{"prompt": "a"', 65, ":2: not valid JSON"),
    "two objects": (b'{"prompt": "a"} {"prompt": "b"}\n', 65, ":1: not valid JSON"),
    "a comma after": (b'{"prompt": "a"},\n', 65, ":1: not valid JSON"),
    "an array": (
        b'[{"prompt": "a"}]\n',
        65,
        ": is a JSON array, not JSON lines: read it with --dataset",
    ),
    "a string": (b'"prompt"\n', 65, ":1: a JSON object is needed, not a string"),
    "null": (b"null\n", 65, ":1: a JSON object is needed, not null"),
    "a number": (b"17\n", 65, ":1: a JSON object is needed, not a number"),
    "an empty line": (GOOD + b"\n" + GOOD, 65, ":2: the line is empty; only the last lines may be"),
    "a blank line": (
        GOOD + b" \t \n" + GOOD,
        65,
        ":2: the line is empty; only the last lines may be",
    ),
    "no field": (b'{"text": "a"}\n', 65, ":1: there is no field 'prompt'"),
    "prompt null": (b'{"prompt": null}\n', 65, ":1: prompt must be a string, not null"),
    "prompt a number": (b'{"prompt": 5}\n', 65, ":1: prompt must be a string, not a number"),
    "prompt a list": (b'{"prompt": ["a"]}\n', 65, ":1: prompt must be a string, not an array"),
    "prompt true": (b'{"prompt": true}\n', 65, ":1: prompt must be a string, not true or false"),
    "NaN": (
        b'{"prompt": "a", "temperature": NaN}\n',
        65,
        ":1: not valid JSON: NaN is no JSON number",
    ),
    "Infinity": (
        b'{"prompt": "a", "x": Infinity}\n',
        65,
        ":1: not valid JSON: Infinity is no JSON number",
    ),
    "1e999": (
        b'{"prompt": "a", "temperature": 1e999}\n',
        65,
        ":1: temperature must be 0 to 1e+300, not 1e999",
    ),
    "temperature below 0": (
        b'{"prompt": "a", "temperature": -0.1}\n',
        65,
        ":1: temperature must be 0 to 1e+300, not -0.1",
    ),
    "temperature a string": (
        b'{"prompt": "a", "temperature": "1"}\n',
        65,
        ":1: temperature must be a number, not the string '1'",
    ),
    "temperature true": (
        b'{"prompt": "a", "temperature": true}\n',
        65,
        ":1: temperature must be a number, not true or false",
    ),
    "top_k 1.0": (
        b'{"prompt": "a", "top_k": 1.0}\n',
        65,
        ":1: top_k must be a whole number, not 1.0",
    ),
    "top_k below 0": (
        b'{"prompt": "a", "top_k": -1}\n',
        65,
        ":1: top_k must be 0 to 2147483647, not -1",
    ),
    "top_k 2^31": (
        b'{"prompt": "a", "top_k": 2147483648}\n',
        65,
        ":1: top_k must be 0 to 2147483647, not 2147483648",
    ),
    "top_k true": (
        b'{"prompt": "a", "top_k": true}\n',
        65,
        ":1: top_k must be a whole number, not true or false",
    ),
    "seed below 0": (
        b'{"prompt": "a", "seed": -1}\n',
        65,
        ":1: seed must be 0 to 9223372036854775807, not -1",
    ),
    "seed 2^63": (
        b'{"prompt": "a", "seed": 9223372036854775808}\n',
        65,
        ":1: seed must be 0 to 9223372036854775807",
    ),
    "seed a string": (
        b'{"prompt": "a", "seed": "5"}\n',
        65,
        ":1: seed must be a whole number, not the string '5'",
    ),
    "5,000 digits": (
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}\n",
        65,
        ":1: seed must be a whole number, not 9999",
    ),
    "max_new_tokens 0": (
        b'{"prompt": "a", "max_new_tokens": 0}\n',
        65,
        ":1: max_new_tokens must be 1 to 2147483647, not 0",
    ),
    "max_new_tokens 1.5": (
        b'{"prompt": "a", "max_new_tokens": 1.5}\n',
        65,
        ":1: max_new_tokens must be a whole number, not 1.5",
    ),
    "id empty": (b'{"prompt": "a", "id": ""}\n', 65, ":1: id must not be empty"),
    "id 1.5": (
        b'{"prompt": "a", "id": 1.5}\n',
        65,
        ":1: id must be a string or a whole number, not 1.5",
    ),
    "id true": (
        b'{"prompt": "a", "id": true}\n',
        65,
        ":1: id must be a string or a whole number, not true or false",
    ),
    "id an object": (
        b'{"prompt": "a", "id": {}}\n',
        65,
        ":1: id must be a string or a whole number, not an object",
    ),
    "id twice": (
        b'{"prompt": "a", "id": "x"}\n' * 2,
        65,
        ":2: id 'x' was already used on line 1; ids must be unique",
    ),
    "id as an index": (
        GOOD + GOOD + b'{"prompt": "a", "id": 0}\n',
        65,
        ":3: id '0' was already used on line 1; ids must be unique",
    ),
    "a key twice": (
        b'{"prompt": "a", "prompt": "b"}\n',
        65,
        ":1: the key 'prompt' stands twice in one object",
    ),
    "a key twice below": (
        b'{"prompt": "a", "x": {"y": 1, "y": 2}}\n',
        65,
        ":1: the key 'y' stands twice in one object",
    ),
    "a lone surrogate": (
        b'{"prompt": "\\ud800"}\n',
        65,
        ":1: a lone surrogate (U+D800) is not text",
    ),
    "a lone surrogate as an id": (
        b'{"prompt": "a", "id": "\\udfff"}\n',
        65,
        ":1: a lone surrogate (U+DFFF) is not text",
    ),
    "a lone surrogate elsewhere": (
        b'{"prompt": "a", "x": "\\ud800"}\n',
        65,
        ":1: a lone surrogate (U+D800) is not text",
    ),
    "no UTF-8": (GOOD + b'{"prompt": "\xff"}\n', 65, ":2: not UTF-8 at byte 13 of the line"),
    "Latin-1": (b'{"prompt": "caf\xe9"}\n', 65, ":1: not UTF-8 at byte 16 of the line"),
    "UTF-8 of a surrogate": (
        b'{"prompt": "\xed\xa0\x80"}\n',
        65,
        ":1: not UTF-8 at byte 13 of the line",
    ),
    "an overlong form": (b'{"prompt": "\xc0\xaf"}\n', 65, ":1: not UTF-8 at byte 13 of the line"),
    "UTF-16 LE": ('{"prompt": "a"}\n'.encode("utf-16"), 65, ": is UTF-16 text: convert it"),
    "UTF-16 BE": (
        b"\xfe\xff" + '{"prompt": "a"}\n'.encode("utf-16-be"),
        65,
        ": is UTF-16 text: convert it",
    ),
    "a BOM in the middle": (GOOD + b"\xef\xbb\xbf" + GOOD, 65, ":2: not valid JSON"),
    "a control character": (
        b'{"prompt": "a\x01b"}\n',
        65,
        ":1: not valid JSON: Invalid control character",
    ),
    "a raw NUL": (b'{"prompt": "a\x00b"}\n', 65, ":1: not valid JSON: Invalid control character"),
    "nothing but NUL": (b"\x00" * 100 + b"\n", 65, ":1: not valid JSON"),
    "nested 200,000 deep": (
        b'{"prompt": "a", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n",
        65,
        ":1: nested deeper than 100 levels",
    ),
    "nested 101 deep": (
        b'{"prompt": "a", "x": ' + b"[" * 101 + b"]" * 101 + b"}\n",
        65,
        ":1: nested deeper than 100 levels",
    ),
    "a line over the cap": (
        b'{"prompt": "' + b"a" * (17 * 2**20) + b'"}\n' + GOOD,
        65,
        ":1: the line is longer than 16777216 bytes",
    ),
    "old Mac line ends": (
        b'{"prompt": "a"}\r{"prompt": "b"}\r',
        65,
        ": is JSON lines that end in CR alone",
    ),
    "single quotes": (b"{'prompt': 'a'}\n", 65, ":1: not valid JSON"),
    "a comment": (b'// prompts\n{"prompt": "a"}\n', 65, ":1: not valid JSON"),
    "a leading zero": (b'{"prompt": "a", "seed": 01}\n', 65, ":1: not valid JSON"),
    "a Parquet file": (
        b"PAR1" + b"\x15\x04\x15" * 20 + b"PAR1",
        65,
        ": the file is damaged, cut off, or of a kind that pyarrow does not read",
    ),
}
OTHER_FILES: dict[str, tuple[str, bytes, int, str]] = {
    "gzip cut off": (
        "p.jsonl.gz",
        gzip.compress(GOOD * 500)[:-12],
        65,
        ": the compressed file is damaged or cut off",
    ),
    "gzip with a flipped bit": (
        "p.jsonl.gz",
        gzip.compress(GOOD)[:-6] + b"\x00" * 6,
        65,
        ": the compressed file is damaged or cut off",
    ),
    "gzip of no bytes": ("p.jsonl.gz", b"", 65, ": is empty, which no compressed file is"),
    "gzip bomb in one line": (
        "p.jsonl.gz",
        gzip.compress(bytes(200 * 2**20), compresslevel=1),
        65,
        ":1: the line is longer than 16777216 bytes",
    ),
    "gzip bomb of empty lines": (
        "p.jsonl.gz",
        gzip.compress(b"\n" * 300_000 + GOOD),
        65,
        ":1: the line is empty",
    ),
    "zstd cut off": (
        "p.jsonl.zst",
        zstandard.compress(GOOD * 5000)[:-5],
        65,
        ": the compressed file is damaged or cut off",
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_malformed_lines(generate: Generate, tmp_path: Path, name: str) -> None:
    content, code, message = LINES[name]
    (tmp_path / "prompts.jsonl").write_bytes(content)
    expect(generate(tmp_path, "--input", "prompts.jsonl"), code, f"prompts.jsonl{message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", OTHER_FILES)
def test_damaged_input_files(generate: Generate, tmp_path: Path, name: str) -> None:
    file, content, code, message = OTHER_FILES[name]
    (tmp_path / file).write_bytes(content)
    ended, child = generate(tmp_path, "--input", file)
    assert ended == code, child.stderr
    place, _, said = message.partition(": ")
    assert f"{file}{place}" in child.stderr
    assert said in child.stderr
    assert "Traceback" not in child.stderr


def expect(ran: tuple[int, Child], code: int, message: str) -> None:
    ended, child = ran
    assert ended == code, child.stderr
    assert message in child.stderr
    assert "Traceback" not in child.stderr
    assert child.stdout == ""


def test_unusual_valid_input(generate: Generate, tmp_path: Path) -> None:
    """Accept a BOM, CRLF, blank last lines, NUL and line separators in strings, paths as ids."""
    rows = [
        b'\xef\xbb\xbf{"prompt": "a\\u0000b", "id": "../../etc/passwd"}\r\n',
        '{"prompt": "a\u2028b\u0085c", "id": "/"}\r\n'.encode(),
        b'{"prompt": "\\ud83d\\ude00", "id": "part-000000.parquet", "big": 1e400, "long": '
        + b"9" * 5000
        + b"}\n",
        b"\n\r\n  \n",
    ]
    (tmp_path / "prompts.jsonl").write_bytes(b"".join(rows))
    code, child = generate(tmp_path, "--input", "prompts.jsonl")
    assert code == 0, child.stderr
    table = pq.read_table(tmp_path / "out" / "part-000000.parquet").to_pylist()
    assert [row["prompt"] for row in table] == ["a\0b", "a\u2028b\u0085c", "\U0001f600"]
    assert [row["prompt_id"] for row in table] == ["../../etc/passwd", "/", "part-000000.parquet"]
    assert table[2]["metadata"] == '{"big": 1e400, "long": ' + "9" * 5000 + "}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "prompts.jsonl"]


# -- bad rows as error rows --


def test_bad_rows_are_recorded(generate: Generate, tmp_path: Path) -> None:
    lines = [
        '{"prompt": "The king", "id": "a", "note": 1.50}',
        "broken",
        '{"prompt": "The queen", "id": "a"}',
        '{"prompt": "To be", "id": "line:2"}',
        '{"prompt": "' + "king " * 100 + '", "id": "long", "note": "n", "error": "old"}',
        '{"prompt": "or not", "top_k": -1}',
        '{"prompt": "fine", "id": "line:4"}',
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    code, child = generate(
        tmp_path,
        "--input",
        "prompts.jsonl",
        "--on-bad-row",
        "record",
        "--part-rows",
        "3",
        "--max-row-errors",
        "6",
    )
    assert code == 0, child.stderr
    assert (child.summary["rows"], child.summary["ok"], child.summary["errors"]) == (7, 1, 6)
    rows = [
        row
        for path in sorted((tmp_path / "out").glob("part-*"))
        for row in pq.read_table(path).to_pylist()
    ]
    assert [row["prompt_index"] for row in rows] == list(range(7))
    assert [row["prompt_id"] for row in rows] == [
        "a",
        "line:2",
        "line:3",
        "line:4",
        "long",
        "5",
        "line:7",
    ]
    reasons = [row["error"] for row in rows]
    assert reasons[0] is None
    assert reasons[1].startswith("not valid JSON")
    assert reasons[2] == "id 'a' was already used on line 1; ids must be unique"
    assert reasons[3] == "id 'line:2' was already used on line 2; ids must be unique"
    assert reasons[4].endswith("more than n_positions (64)")
    assert reasons[5] == "top_k must be 0 to 2147483647, not -1"
    assert reasons[6] == "id 'line:4' was already used on line 4; ids must be unique", (
        "a row in error has that name now"
    )
    # what could be read is kept
    assert [row["prompt"] for row in rows][1:4] == ["", "The queen", "To be"]
    assert (tmp_path / "out" / "_SUCCESS").exists()
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["error_kinds"] == {"bad_row": 5, "too_long": 1}

    # the file of errors is an input
    errors = tmp_path / "out" / ".gptbatch" / "errors.jsonl"
    found = [json.loads(line) for line in errors.read_text().splitlines()]
    assert [row["id"] for row in found] == [
        "line:2",
        "line:3",
        "line:4",
        "long",
        "5",
        "line:7",
    ]
    assert (found[3]["note"], found[3]["error"]) == ("n", "old")
    assert found[3]["gptbatch_error"] == reasons[4]
    # a line that was not parsed has no prompt; it and the bad setting are refused
    assert [row["prompt"] for row in found] == [
        None,
        "The queen",
        "To be",
        "king " * 100,
        "or not",
        "fine",
    ]
    (tmp_path / "again").mkdir()
    options = ("--input", str(errors), "--context-overflow", "truncate_left")
    expect(generate(tmp_path / "again", *options), 65, "2 of 6 rows are bad")
    mended = tmp_path / "mended.jsonl"
    mended.write_text(
        "".join(
            json.dumps({**row, "prompt": row["prompt"] or "a", "top_k": 5}) + "\n" for row in found
        )
    )
    code, child = generate(
        tmp_path / "again", "--input", mended, "--context-overflow", "truncate_left"
    )
    assert (code, child.summary["ok"]) == (0, 6), child.stderr
    again = pq.read_table(tmp_path / "again" / "out" / "part-000000.parquet").to_pylist()
    assert (again[3]["prompt_id"], again[3]["seed"], again[3]["prompt"]) == (
        "long",
        rows[4]["seed"],
        "king " * 100,
    )
    assert json.loads(again[3]["metadata"]) == {"note": "n", "error": "old"}

    # the same command finds nothing to do; another way to treat bad rows is another matter
    repeated = generate(tmp_path, "--input", "prompts.jsonl", "--on-bad-row", "record")[1]
    assert repeated.summary["rows_kept"] == 7
    expect(generate(tmp_path, "--input", "prompts.jsonl"), 65, "3 of 7 rows are bad")


IDS_OF_BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"id": "own", "prompt": None}, "own"),
    ({"prompt": "negative", "top_k": -1}, "1"),
    ({"id": "", "prompt": "no id can be empty"}, "{}"),
    ({"id": "good", "prompt": "negative", "top_k": -1}, "{}"),
    ({"id": "good", "prompt": "The king"}, "good"),
    ({"id": "good", "prompt": "The queen"}, "{}"),
    ({"id": "twice", "prompt": None}, "twice"),
    ({"id": "twice", "prompt": None}, "{}"),
]


def write_as(kind: str, rows: list[dict[str, Any]], folder: Path) -> tuple[str, str]:
    """Write rows as files of a kind; returns the option and its value."""
    if kind == "two files":
        (folder / "in").mkdir()
        for name, part in (("a", rows[:3]), ("b", rows[3:])):
            text = "".join(json.dumps(row) + "\n" for row in part)
            (folder / "in" / f"{name}.jsonl").write_text(text)
        return "--input", "in"
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([{"top_k": None, **row} for row in rows]), path)
    elif kind == "csv":
        cells = [[row.get(name) for name in ("id", "prompt", "top_k")] for row in rows]
        quoted = [["" if cell is None else f'"{cell}"' for cell in line] for line in cells]
        path.write_text("\n".join(map(",".join, [["id", "prompt", "top_k"], *quoted])))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "--dataset" if kind in ("csv", "json") else "--input", path.name


@pytest.mark.parametrize(
    ("kind", "numbered"),
    [
        ("jsonl", ["line:3", "line:4", "line:6", "line:8"]),
        ("two files", ["line:3", "line:4", "line:6", "line:8"]),
        ("parquet", ["row:2", "row:3", "row:5", "row:7"]),
        ("csv", ["row:2", "row:3", "row:5", "row:7"]),
        ("json", ["row:2", "row:3", "row:5", "row:7"]),
    ],
)
def test_a_bad_row_keeps_its_id_or_gets_one_in_the_words_of_its_format(
    generate: Generate, tmp_path: Path, kind: str, numbered: list[str]
) -> None:
    option, value = write_as(kind, [row for row, _ in IDS_OF_BAD_ROWS], tmp_path)
    code, child = generate(tmp_path, option, value, "--on-bad-row", "record")
    assert (code, child.summary.get("ok")) == (0, 1), child.stderr
    table = pq.read_table(tmp_path / "out" / "part-000000.parquet")
    names = iter(numbered)
    expected = [name.format(next(names)) if name == "{}" else name for _, name in IDS_OF_BAD_ROWS]
    assert table["prompt_id"].to_pylist() == expected
    word = numbered[0].partition(":")[0]
    taken = f"id 'good' was already used on {word} {5 if word == 'line' else 4}"
    assert table["error"].to_pylist()[5] == f"{taken}; ids must be unique"


@pytest.mark.parametrize(
    ("most", "code"), [("0", 65), ("1", 65), ("2", 0), ("49%", 65), ("50%", 0), ("100%", 0)]
)
def test_too_many_errors_stop_the_run(
    generate: Generate, tmp_path: Path, most: str, code: int
) -> None:
    rows = [{"prompt": "king " * (100 if i in (1, 2) else 1)} for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended, child = generate(
        tmp_path, "--input", "prompts.jsonl", "--max-row-errors", most, "--part-rows", "1"
    )
    assert ended == code, child.stderr
    assert (f"more than max_row_errors ({most}) allows" in child.stderr) == (code == 65)
    assert (tmp_path / "out" / "_SUCCESS").exists() == (code == 0)
    assert generate(tmp_path, "--input", "prompts.jsonl", "--part-rows", "1")[0] == 0
    expect(
        generate(tmp_path, "--input", "prompts.jsonl", "--max-row-errors", "some"),
        2,
        "--max-row-errors: string should match pattern",
    )


json_lines = st.dictionaries(
    st.sampled_from(["prompt", "id", "seed", "temperature", "top_k", "max_new_tokens", "x"]),
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(), max_size=2),
).map(lambda row: json.dumps(row).encode())


any_bytes = given(
    st.lists(st.binary(max_size=30) | json_lines | st.just(GOOD.strip()), max_size=6),
    st.sampled_from(["fail", "record"]),
)
few_runs = settings(
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@any_bytes
@few_runs
def test_any_bytes_give_a_documented_exit_code(
    generate: Generate,
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    on_bad_row: str,
) -> None:
    check_any_bytes(generate, tmp_path_factory.mktemp("bytes"), lines, on_bad_row)


@pytest.mark.slow
@any_bytes
@settings(few_runs, max_examples=80)
def test_any_bytes_in_more_examples(
    generate: Generate,
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    on_bad_row: str,
) -> None:
    check_any_bytes(generate, tmp_path_factory.mktemp("bytes"), lines, on_bad_row)


def check_any_bytes(generate: Generate, folder: Path, lines: list[bytes], on_bad_row: str) -> None:
    """No traceback. The output has a row per line, or there is no output."""
    content = b"\n".join(lines)
    (folder / "prompts.jsonl").write_bytes(content)
    code, child = generate(folder, "--input", "prompts.jsonl", "--on-bad-row", on_bad_row)
    assert code in (0, 65), child.stderr
    assert "Traceback" not in child.stderr
    text = content.removeprefix(b"\xef\xbb\xbf")
    count = text.rstrip(b" \t\r\n").count(b"\n") + 1 if text.strip(b" \t\r\n") else 0
    if code == 0:
        assert (child.summary["rows"], child.summary["ok"] + child.summary["errors"]) == (
            count,
            count,
        )
        tables = [
            pq.read_table(path, columns=["prompt_id", "prompt_index"])
            for path in sorted((folder / "out").glob("part-*"))
        ]
        assert [index for table in tables for index in table["prompt_index"].to_pylist()] == list(
            range(count)
        )
        assert (
            len({prompt_id for table in tables for prompt_id in table["prompt_id"].to_pylist()})
            == count
        )
    else:
        assert (
            on_bad_row == "fail"
            or "prompts.jsonl: is " in child.stderr
            or "the compressed file is damaged" in child.stderr
        ), "a file of another kind is refused as a whole"
        assert not (folder / "out").exists()
    shutil.rmtree(folder)


# -- outputs, weights, secrets --


@pytest.mark.parametrize(
    "link",
    ["out", "out/.gptbatch", "out/_manifest.json", "out/_SUCCESS", "out/part-000000.parquet"],
)
def test_symbolic_links_are_not_written_through(
    generate: Generate, tmp_path: Path, link: str
) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(GOOD)
    if link != "out":
        assert generate(tmp_path, "--input", "prompts.jsonl")[0] == 0
    elsewhere = tmp_path / "elsewhere"
    path = tmp_path / link
    if path.exists():
        path.rename(elsewhere)
    else:
        elsewhere.mkdir()
    path.symlink_to(elsewhere)
    before = (
        sorted(found.name for found in elsewhere.iterdir())
        if elsewhere.is_dir()
        else elsewhere.read_bytes()
    )
    code, child = generate(tmp_path, "--input", "prompts.jsonl", "--seed", "0")
    assert code == 78, child.stderr
    assert link in child.stderr
    assert before == (
        sorted(found.name for found in elsewhere.iterdir())
        if elsewhere.is_dir()
        else elsewhere.read_bytes()
    )


def test_a_linked_output_is_read(launcher: Launcher, generate: Generate, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(GOOD)
    assert generate(tmp_path, "--input", "prompts.jsonl")[0] == 0
    (tmp_path / "latest").symlink_to(tmp_path / "out")
    for command in (["status"], ["verify"], ["replay", "--prompt-id", "0"]):
        code, child = launcher.run(*command, tmp_path / "latest")
        assert code == 0, child.stderr


def test_foreign_files_with_names_of_parts(generate: Generate, tmp_path: Path) -> None:
    """Files that no run wrote are neither replaced nor deleted."""
    (tmp_path / "prompts.jsonl").write_bytes(GOOD * 3)
    assert generate(tmp_path, "--input", "prompts.jsonl", "--part-rows", "1")[0] == 0
    mine = tmp_path / "out" / "part-000001.parquet"
    kept = mine.read_bytes()
    mine.unlink()
    pq.write_table(
        pq.read_table(tmp_path / "out" / "part-000000.parquet").replace_schema_metadata(None), mine
    )
    stranger = mine.read_bytes()
    for more in ((), ("--overwrite", "--seed", "1")):
        expect(
            generate(tmp_path, "--input", "prompts.jsonl", *more),
            78,
            "part-000001.parquet: is not a part that gptbatch wrote",
        )
        assert mine.read_bytes() == stranger
    mine.write_bytes(kept)
    beyond = tmp_path / "out" / "part-000007.parquet"
    beyond.write_bytes(b"not a part")
    for options in ([], ["--dry-run"], ["--dry-run", "--overwrite", "--seed", "1"]):
        expect(
            generate(tmp_path, "--input", "prompts.jsonl", *options),
            78,
            "part-000007.parquet: this run has 3 parts, and no such one",
        )
    assert beyond.read_bytes() == b"not a part"


def test_weights_with_false_metadata(launcher: Launcher, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(GOOD)
    whole = (checkpoint / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")

    def with_header(changed: dict[str, Any]) -> bytes:
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + length :]

    beyond = {**header, name: {**header[name], "data_offsets": [0, 10**12]}}
    misshapen = {**header, name: {**header[name], "shape": [1, 2, 3]}}
    cases = {
        "empty": b"",
        "cut off": whole[: len(whole) // 2],
        "a length of 2^60": struct.pack("<Q", 2**60) + whole[8:],
        "no JSON": struct.pack("<Q", 20) + b"x" * 20,
        "offsets beyond the end": with_header(beyond),
        "another shape": with_header(misshapen),
    }
    for case, content in cases.items():
        model = tmp_path / case
        shutil.copytree(checkpoint, model)
        (model / "model.safetensors").write_bytes(content)
        ran = launcher.run(
            "generate",
            "--model",
            model,
            "--input",
            tmp_path / "prompts.jsonl",
            "--output",
            tmp_path / "out",
        )
        expect(ran, 78, "model.safetensors: not a whole safetensors file")
    model = tmp_path / "pickled"
    shutil.copytree(checkpoint, model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    ran = launcher.run(
        "generate",
        "--model",
        model,
        "--input",
        tmp_path / "prompts.jsonl",
        "--output",
        tmp_path / "out",
    )
    expect(ran, 78, "the weights are pickled (pytorch_model.bin), which is refused")


def test_secrets_are_not_written(launcher: Launcher, checkpoint: Path, tmp_path: Path) -> None:
    """In the name of an input, in the environment, and in errors of libraries."""
    token = "hf_" + "abcDEF123" * 4
    secrets = ("hunter2hunter2", token, "environment-token")
    folder = tmp_path / "ftp:" / "user:hunter2hunter2@host"
    folder.mkdir(parents=True)
    (folder / "prompts.jsonl").write_bytes(GOOD)
    base = [
        "generate",
        "--model",
        str(checkpoint),
        "--max-new-tokens",
        "2",
        "--output",
        str(tmp_path / "out"),
    ]
    environment = {"HF_TOKEN": "environment-token"}
    code, child = launcher.run(
        *base,
        "--input",
        "ftp://user:hunter2hunter2@host/prompts.jsonl",
        cwd=tmp_path,
        env=environment,
    )
    assert code == 0, child.stderr
    written = b"".join(
        path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    assert b"ftp://***@host/prompts.jsonl" in written
    for bad, wanted in (
        ("ftp://user:hunter2hunter2@host/nothing.jsonl", 2),
        (token, 66),
        ("environment-token", 66),
    ):
        code, child = launcher.run("-v", *base, "--input", bad, cwd=tmp_path, env=environment)
        assert (code, "***" in child.stderr) == (wanted, True)
        for secret in secrets:
            assert secret not in child.stderr + child.stdout
    for secret in secrets:
        assert secret.encode() not in written
