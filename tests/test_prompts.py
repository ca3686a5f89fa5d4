"""Validation of rows: accepted values, rejected values and their messages."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from gptbatch.pipeline.errors import InputNotFoundError, InputRowsError
from gptbatch.pipeline.input import lines
from gptbatch.pipeline.input.file_kind import describe_binary
from gptbatch.pipeline.input.jsonl import JsonlFile
from gptbatch.pipeline.input.prompt_reader import InputSummary, PromptReader
from gptbatch.pipeline.input.rows import RowDefaults, derive_seed
from gptbatch.pipeline.input.strict_json import parse_object, to_json
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.params.settings import MAX_SEED
from gptbatch.pipeline.types import Prompt

SAMPLING = SamplingParams(seed=3, temperature=0.7, top_k=5, max_new_tokens=9)
DEFAULTS = RowDefaults(prompt_field="prompt", sampling=SAMPLING)
WriteRows = Callable[..., Path]


def reader(path: Path, *, limit: int | None = None, prompt_field: str = "prompt") -> PromptReader:
    defaults = RowDefaults(prompt_field=prompt_field, sampling=SAMPLING)
    return PromptReader(source=JsonlFile(path), defaults=defaults, limit=limit)


def read(path: Path, **settings: Any) -> list[Prompt]:
    source = reader(path, **settings)
    checked = source.check()
    prompts = [row for row in source.prompts(checked) if isinstance(row, Prompt)]
    assert checked.rows == len(prompts)
    return prompts


def problems(path: Path, **settings: Any) -> str:
    with pytest.raises(InputRowsError) as caught:
        reader(path, **settings).check()
    return str(caught.value)


def test_row_settings_override_the_defaults(write_rows: WriteRows) -> None:
    path = write_rows(
        [
            {"prompt": "plain"},
            {
                "prompt": "own",
                "id": "a",
                "seed": MAX_SEED,
                "temperature": 0,
                "top_k": 0,
                "max_new_tokens": 1,
            },
            {
                "prompt": "null is absent",
                "id": None,
                "seed": None,
                "temperature": None,
                "top_k": None,
                "max_new_tokens": None,
            },
            {"prompt": "", "id": 17, "temperature": 1.5, "seed": 0},
        ]
    )
    plain, own, null, last = read(path)
    assert (plain.index, plain.prompt_id, plain.text, plain.metadata) == (0, "0", "plain", None)
    assert plain.params.seed == derive_seed(3, "0")
    assert (plain.params.temperature, plain.params.top_k, plain.params.max_new_tokens) == (
        0.7,
        5,
        9,
    )
    assert (
        own.prompt_id,
        own.params.seed,
        own.params.temperature,
        own.params.top_k,
        own.params.max_new_tokens,
    ) == ("a", MAX_SEED, 0, 0, 1)
    assert (null.prompt_id, null.params.seed, null.params.temperature) == (
        "2",
        derive_seed(3, "2"),
        0.7,
    )
    assert (last.prompt_id, last.text, last.params.seed, last.params.temperature) == (
        "17",
        "",
        0,
        1.5,
    )


def test_other_fields_are_kept_verbatim(write_rows: WriteRows) -> None:
    path = write_rows(
        [
            (
                '{"a": 1.10, "prompt": "x", '
                '"b": [1e999, -0, 123456789012345678901234567890, null, true], '
                '"c": {"d": "é\\u00e9\\n"}}'
            ),
            '{"prompt": "x", "date": "2024-01-01"}',
            '{"prompt": "x"}',
        ]
    )
    metadata = [prompt.metadata for prompt in read(path)]
    assert metadata[0] == (
        '{"a": 1.10, "b": [1e999, -0, 123456789012345678901234567890, null, true], '
        '"c": {"d": "éé\\n"}}'
    )
    assert metadata[1:] == ['{"date": "2024-01-01"}', None]


def test_another_field_can_be_the_prompt(write_rows: WriteRows) -> None:
    path = write_rows([{"text": "yes", "prompt": "no"}])
    (prompt,) = read(path, prompt_field="text")
    assert (prompt.text, prompt.metadata) == ("yes", '{"prompt": "no"}')
    said = problems(path, prompt_field="question")
    assert (
        "there is no field 'question'; the row has 'text', 'prompt' "
        "(--prompt-field names the one to use)"
    ) in said


def test_limit_reads_the_first_rows(write_rows: WriteRows) -> None:
    path = write_rows([{"prompt": "a"}, {"prompt": "b"}, "broken"])
    assert [p.text for p in read(path, limit=2)] == ["a", "b"]
    assert read(path, limit=0) == []
    assert f"{path}:3: not valid JSON" in problems(path, limit=3)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n\n", "\r\n \t\r\n", ""])
def test_line_endings_and_blank_last_lines(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\r\n{"prompt": "b"}' + ending.encode())
    assert [p.text for p in read(path)] == ["a", "b"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compressed_files_and_a_byte_order_mark(tmp_path: Path, suffix: str) -> None:
    content = b"\xef\xbb\xbf" + b"".join(
        json.dumps({"prompt": f"row {i} \u2028 \x00"}).encode() + b"\n" for i in range(5000)
    )
    pack: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        ".gz": gzip.compress,
        ".zst": zstandard.ZstdCompressor().compress,
    }
    path = tmp_path / f"prompts.jsonl{suffix}"
    path.write_bytes(pack[suffix](content))
    prompts = read(path)
    assert len(prompts) == 5000
    assert prompts[4999].text == "row 4999 \u2028 \x00"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_compressed_files(tmp_path: Path, suffix: str) -> None:
    content = b"".join(
        json.dumps({"prompt": f"row {i * i * 7919}"}).encode() + b"\n" for i in range(5000)
    )
    whole = (
        gzip.compress(content) if suffix == ".gz" else zstandard.ZstdCompressor().compress(content)
    )
    path = tmp_path / f"prompts.jsonl{suffix}"
    path.write_bytes(whole[: len(whole) // 2])
    assert "damaged or cut off" in problems(path)
    path.write_bytes(b"")
    assert "is empty, which no compressed file is" in problems(path)
    path.write_bytes(whole[:3])
    assert "holds 3 bytes, which no compressed file is" in problems(path)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstandard.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.JSONL.GZ", "prompts.jsonl.zst"])
@pytest.mark.parametrize("kind", [*PACKERS, ""])
def test_compression_is_detected_by_content(tmp_path: Path, name: str, kind: str) -> None:
    content = b'{"prompt": "a"}\n{"prompt": "b"}\n'
    pack = PACKERS.get(kind, bytes)
    (tmp_path / name).write_bytes(
        pack(content) + (pack(content) if kind else b"")
    )  # files of two members, too
    assert [prompt.text for prompt in read(tmp_path / name)] == ["a", "b"] * (2 if kind else 1)


def zstd_frame(content: bytes, window_log: int) -> bytes:
    """Build a frame whose header declares a window of 2^window_log bytes, as of `zstd --long`."""
    return (
        b"\x28\xb5\x2f\xfd\x00"
        + bytes([(window_log - 10) << 3])
        + struct.pack("<I", len(content) << 3 | 1)[:3]
        + content
    )


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (zstd_frame(b'{"prompt": "a"}\n', 31), 1),
        (zstd_frame(b'{"prompt": "a"}\n', 27), 1),
        (zstd_frame(b'{"prompt": "a"}\n', 20) * 2, 2),
        (b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + zstd_frame(b'{"prompt": "a"}\n', 20), 1),
        (b"\x5f\x2a\x4d\x18\x00\x00\x00\x00" + zstd_frame(b'{"prompt": "a"}\n', 10), 1),
    ],
    ids=["long31", "ultra22", "two frames", "skippable frame", "empty skippable frame"],
)
def test_zstd_frames_of_every_kind(tmp_path: Path, content: bytes, prompts: int) -> None:
    path = tmp_path / "prompts.jsonl.zst"
    path.write_bytes(content)
    assert len(read(path)) == prompts
    path.write_bytes(content[:-3])
    assert "damaged or cut off" in problems(path)


BAD_LINES = [  # a line, and what is said of it
    ("", "the line is empty; only the last lines may be"),
    ("not json", "not valid JSON: Expecting value at column 1"),
    ('{"prompt": "cut', "not valid JSON: Unterminated string"),
    ('{"prompt": "a"} {"prompt": "b"}', "not valid JSON: Extra data at column 17"),
    ('{"prompt": NaN}', "not valid JSON: NaN is no JSON number"),
    ('{"prompt": "a", "x": -Infinity}', "not valid JSON: -Infinity is no JSON number"),
    ('{"prompt": "a\tb"}', "not valid JSON: Invalid control character"),
    ('["prompt"]', "a JSON object is needed, not an array"),
    ("17", "a JSON object is needed, not a number"),
    ("null", "a JSON object is needed, not null"),
    ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' stands twice in one object"),
    ('{"prompt": "a", "x": {"y": 1, "y": 2}}', "the key 'y' stands twice in one object"),
    ("{}", "there is no field 'prompt'"),
    ('{"prompt": null, "note": "x"}', "prompt must be a string, not null"),
    ('{"prompt": 5}', "prompt must be a string, not a number"),
    ('{"prompt": ["a"]}', "prompt must be a string, not an array"),
    ('{"prompt": "\\ud800"}', "a lone surrogate (U+D800) is not text"),
    ('{"prompt": "a", "x": "\\udfff"}', "a lone surrogate (U+DFFF) is not text"),
    ('{"prompt": "a", "id": true}', "id must be a string or a whole number, not true or false"),
    ('{"prompt": "a", "id": 1.5}', "id must be a string or a whole number, not 1.5"),
    ('{"prompt": "a", "id": ""}', "id must not be empty"),
    ('{"prompt": "a", "id": ["x"]}', "id must be a string or a whole number, not an array"),
    ('{"prompt": "a", "seed": -1}', f"seed must be 0 to {MAX_SEED}, not -1"),
    (
        '{"prompt": "a", "seed": 9223372036854775808}',
        f"seed must be 0 to {MAX_SEED}, not 9223372036854775808",
    ),
    ('{"prompt": "a", "seed": "5"}', "seed must be a whole number, not the string '5'"),
    ('{"prompt": "a", "seed": 5.0}', "seed must be a whole number, not 5.0"),
    ('{"prompt": "a", "seed": 5e0}', "seed must be a whole number, not 5e0"),
    ('{"prompt": "a", "seed": true}', "seed must be a whole number, not true or false"),
    ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "seed must be a whole number"),
    ('{"prompt": "a", "temperature": -0.1}', "temperature must be 0 to 1e+300, not -0.1"),
    ('{"prompt": "a", "temperature": 1e999}', "temperature must be 0 to 1e+300, not 1e999"),
    ('{"prompt": "a", "temperature": "hot"}', "temperature must be a number, not the string 'hot'"),
    ('{"prompt": "a", "temperature": false}', "temperature must be a number, not true or false"),
    ('{"prompt": "a", "top_k": -1}', "top_k must be 0 to 2147483647, not -1"),
    ('{"prompt": "a", "top_k": 2.5}', "top_k must be a whole number, not 2.5"),
    ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens must be 1 to 2147483647, not 0"),
    ('{"prompt": "a", "x": ' + "[" * 200 + "]" * 200 + "}", "nested deeper than 100 levels"),
    ('{"prompt": "a", "x": ' + "[" * 700 + "]" * 700 + "}", "nested deeper than 100 levels"),
    (
        '{"prompt": "a", "x": ' + "[" * 200_000 + "]" * 200_000 + "}",
        "nested deeper than 100 levels",
    ),
]


@pytest.mark.parametrize(
    ("line", "message"), BAD_LINES, ids=[line[:40] or "empty" for line, _ in BAD_LINES]
)
def test_bad_lines_are_named(write_rows: WriteRows, line: str, message: str) -> None:
    path = write_rows([{"prompt": "good"}, line, {"prompt": "good too"}])
    said = problems(path)
    assert said.startswith("1 of 3 rows is bad; nothing was generated\n")
    assert f"{path}:2: {message}" in said


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    assert f"{path}:2: not UTF-8 at byte 13 of the line" in problems(path)
    path.write_bytes('{"prompt": "a"}\n'.encode("utf-16"))
    assert f"{path}: is UTF-16 text: convert it" in problems(path)


def test_lines_over_the_limit_are_bad_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "prompts.jsonl"
    exact = b'{"prompt": "' + b"x" * 986 + b'"}\n'
    assert len(exact) == 1001
    path.write_bytes(exact + b'{"prompt": "' + b"x" * 5000 + b'"}\n{"prompt": "a"}\n')
    assert problems(path).splitlines() == [
        "1 of 3 rows is bad; nothing was generated",
        f"{path}:2: the line is longer than 1000 bytes",
    ]


def test_repeated_ids_name_both_lines(write_rows: WriteRows) -> None:
    path = write_rows(
        [
            {"prompt": "a"},
            {"prompt": "b", "id": "x"},
            {"prompt": "c", "id": 0},
            {"prompt": "d", "id": "x"},
        ]
    )
    said = problems(path)
    assert f"{path}:3: id '0' was already used on line 1; ids must be unique" in said
    assert f"{path}:4: id 'x' was already used on line 2; ids must be unique" in said
    assert said.startswith("2 of 4 rows are bad")


def test_equal_reasons_are_one_line(write_rows: WriteRows) -> None:
    path = write_rows(["broken" if i % 2 else {"prompt": "a", "id": "same"} for i in range(60)])
    head, broken, repeated, hint = problems(path).splitlines()
    assert head == "59 of 60 rows are bad; nothing was generated"
    assert broken.startswith(f"{path}:2: not valid JSON")
    assert broken.endswith("(also 4, 6, 8, 10, 12, 24 more)")
    assert repeated.startswith(f"{path}:3: id 'same' was already used on line 1")
    assert repeated.endswith("(also 5, 7, 9, 11, 13, 23 more)")
    assert "id_field" in hint


def test_the_first_20_reasons_are_named_in_order(write_rows: WriteRows) -> None:
    path = write_rows([{"prompt": "a", "seed": -1 - i} for i in range(60)])
    lines = problems(path).splitlines()
    assert [int(line.split(":")[1]) for line in lines[1:21]] == list(range(1, 21))
    assert lines[21:] == ["... and 40 more"]


def test_messages_do_not_quote_prompts(write_rows: WriteRows) -> None:
    path = write_rows(
        [
            '{"prompt": "my secret" x}',
            '{"prompt": "my secret", "seed": -1}',
            '{"prompt": ["my secret"]}',
        ]
    )
    assert "secret" not in problems(path)


def test_a_missing_input(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match=r"nothing\.jsonl: no such file"):
        JsonlFile(tmp_path / "nothing.jsonl")
    with pytest.raises(InputNotFoundError, match="is a folder; name a file, or use --dataset"):
        JsonlFile(tmp_path)


def test_a_pipe_is_read_once_and_kept(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    thread = threading.Thread(
        target=pipe.write_bytes, args=(b'{"prompt": "a"}\n{"prompt": "b"}\n',)
    )
    thread.start()
    source = PromptReader(source=JsonlFile(pipe), defaults=DEFAULTS)
    thread.join()
    assert source.source.files() is None
    assert [row.text for row in source.prompts(source.check()) if isinstance(row, Prompt)] == [
        "a",
        "b",
    ]
    assert PromptReader(source=JsonlFile("/dev/null"), defaults=DEFAULTS).check().rows == 0


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"")
    assert reader(path).check().rows == 0


def test_an_input_that_changes_between_check_and_run(write_rows: WriteRows) -> None:
    source = reader(write_rows([{"prompt": "a"}, {"prompt": "b"}]))
    checked = source.check()
    for changed in (
        ["broken"],
        [{"prompt": "a"}],
        [{"prompt": "a"}, {"prompt": "B"}],
        [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}],
    ):
        write_rows(changed)
        with pytest.raises(InputRowsError, match="the input has changed since it was checked"):
            list(source.prompts(checked))


def test_the_input_digest_covers_the_content_of_rows(write_rows: WriteRows) -> None:
    def digest(*rows: dict[str, Any] | str) -> InputSummary:
        return reader(write_rows(rows)).check()

    base = digest({"prompt": "a", "seed": 1})
    assert digest('{"seed": 1,   "prompt": "\\u0061"}') == base
    for other in (
        {"prompt": "b", "seed": 1},
        {"prompt": "a", "seed": 2},
        {"prompt": "a", "seed": 1, "id": "x"},
        {"prompt": "a", "seed": 1, "y": 0},
    ):
        assert digest(other) != base


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), children, max_size=4)
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), json_values))
@settings(deadline=None)
def test_any_json_object_round_trips(value: dict[str, Any]) -> None:
    text = to_json(parse_object(json.dumps(value).encode()))
    assert json.loads(text) == value
    assert to_json(parse_object(text.encode())) == text


@given(st.lists(st.binary(max_size=40) | st.just(b'{"prompt": "a"}'), max_size=8))
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_rows_or_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "prompts.jsonl"
    path.write_bytes(b"\n".join(lines))
    source = PromptReader(source=JsonlFile(path), defaults=DEFAULTS)
    begins_array = b"\n".join(lines).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    head = path.read_bytes()[:512]
    is_compressed = (
        head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"))
        or head[1:4] == b"\x2a\x4d\x18"
    )
    if (
        is_compressed
        or begins_array
        or describe_binary(path.read_bytes()[:512])
        or not any(is_object(line) for line in lines[:20])
    ):
        with suppress(InputRowsError):  # the message may say what the file is instead
            list(source.rows())
        return
    rows = list(source.rows())
    assert all(row.index < len(rows) for _, row in rows)
    lines_with_content = (
        b"\n".join(lines).removeprefix(b"\xef\xbb\xbf").rstrip(b" \t\r\n").count(b"\n") + 1
    )
    assert len(rows) == (
        lines_with_content
        if b"\n".join(lines).removeprefix(b"\xef\xbb\xbf").strip(b" \t\r\n")
        else 0
    )


def is_object(line: bytes) -> bool:
    try:
        return bool(parse_object(line)) or True
    except ValueError:
        return False
