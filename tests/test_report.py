"""The report of a run: its numbers, escaping, size and policy, runs without an end, two runs."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from gptbatch.jobs.cli import run_command
from gptbatch.pipeline.audit.diff import diff_runs, summarize
from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.output.lock import LOCK
from gptbatch.pipeline.report import series
from gptbatch.pipeline.report.build import build_report
from gptbatch.pipeline.report.distribution_sections import _draw_log
from gptbatch.pipeline.report.document import MARK, Document, Section, note, to_json
from gptbatch.pipeline.report.part_facts import describe_facts
from gptbatch.pipeline.report.row_sample import MAX_ERROR_ROWS, choose_rows
from gptbatch.pipeline.report.run_columns import read_columns, row_hash
from gptbatch.pipeline.report.run_view import RunView
from gptbatch.pipeline.system.file_lock import FileLock
from gptbatch.pipeline.types import Completion, TokenLogprobs
from tests.paths import REPOSITORY
from tests.test_diff import FACTS, TIMING, completion, failed, many, write_run

HOSTILE = {
    "script": "</script><img src=x onerror=alert(1)>",
    "comment": "<!-- <script> -->",
    "separators": "a\u2028b\u2029c",
    "bidi": "abc\u202egnp.exe\u2066",
    "nul": "nul \x00 and \x1b[31m escape \x85 next",
    "long": "ab <" * 25_000,
    "template": "{{ 7 * 7 }}{% raw %} ${x} `x`",
    "emoji": "\U0001f469\u200d\U0001f4bb \ufeff",
}
OLD_OUTPUTS = sorted(path.name for path in (REPOSITORY / "tests/data/outputs").glob("gptbatch-*"))
TEMPLATES = REPOSITORY / "pipeline/report/templates"


class Elements(HTMLParser):
    """The start tags of a document, and the contents of its scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, dict[str, str | None], str]] = []
        self._open: tuple[str, dict[str, str | None]] | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = (tag, dict(attrs)) if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.append((*self._open, data))

    def data(self, section: str) -> Any:
        """Return the JSON data of a section."""
        (text,) = [
            text
            for tag, attributes, text in self.texts
            if tag == "script" and attributes.get("id") == f"data-{section}"
        ]
        return json.loads(text)


def hostile_run(path: Path) -> Path:
    """Write a run whose ids, prompts and completions attack the document."""
    rows = [
        dataclasses.replace(
            completion(f"{name} {text[:20]}"),
            prompt=dataclasses.replace(completion(f"{name} {text[:20]}").prompt, text=text),
        )
        for name, text in HOSTILE.items()
    ]
    texts = {row.prompt.prompt_id: row.prompt.text or "" for row in rows}
    error = failed("error <b>", "<img src=x onerror=alert(2)> \u202e")
    return write_run(path, [*rows, error], texts=texts)


def timed(count: int) -> list[Completion]:
    """Return rows with times, of which one second of each ten is a pause of a minute."""
    generator = np.random.default_rng(0)
    rows = []
    for index, row in enumerate(many(count)):
        start = 1.7e9 + index * 0.5 + (3600 if index >= count // 2 else 0)
        timing = dataclasses.replace(
            TIMING,
            started_at_s=start,
            queue_s=float(generator.gamma(2.0)),
            prefill_s=float(generator.gamma(2.0, 0.1)),
            decode_s=float(generator.gamma(2.0, 0.5)),
            cached_tokens=index % 3,
        )
        margin = float(generator.lognormal(-4, 2))
        rows.append(dataclasses.replace(row, timing=timing, min_decision_margin=margin))
    return rows


# -- numbers ---------------------------------------------------------------------------------------


def test_numbers_are_those_of_pyarrow(tmp_path: Path) -> None:
    path = write_run(tmp_path / "out", [*timed(40), failed("x")], part_rows=7)
    table = pq.read_table(path)
    view = RunView(path)
    columns, totals = view.columns, view.totals
    for name, values in (
        ("queue_s", columns.queue_s),
        ("prefill_s", columns.prefill_s),
        ("decode_s", columns.decode_s),
        ("min_decision_margin", columns.margins),
    ):
        found = series.distribution(values)
        quantiles = pc.quantile(table[name], list(series.QUANTILES)).to_pylist()
        assert found.quantiles == pytest.approx(quantiles, rel=1e-6)
        assert found.count == len(table) - table[name].null_count
        extremes = (pc.min(table[name]).as_py(), pc.max(table[name]).as_py())
        assert (found.low, found.high) == pytest.approx(extremes, rel=1e-6)
    assert totals.new_tokens == pc.sum(table["completion_tokens"]).as_py()
    assert totals.prompt_tokens == pc.sum(table["prompt_tokens"]).as_py()
    assert totals.cached_tokens == pc.sum(table["cached_tokens"]).as_py()
    assert (totals.rows, totals.error_rows) == (41, 1)
    ends = [columns.end_names[code] for code in columns.ends]
    assert ends == pc.coalesce(table["stop_reason"], table["finish_reason"]).to_pylist()
    # 20 intervals of half a second and their last row, twice, without the hour between
    axis = view.axis
    assert axis is not None
    assert [round(gap.seconds) for gap in axis.gaps] == [3600 - 2 + 1]
    ended_s = pc.max(pc.add(table["prefill_s"], table["decode_s"])).as_py()
    assert 18 < axis.active_s < 20 + 2 * ended_s


def test_rates_over_time_keep_their_sums() -> None:
    generator = np.random.default_rng(1)
    starts = generator.uniform(0, 9, 500)
    ends = starts + np.where(generator.random(500) < 0.1, 0, generator.uniform(0, 1, 500))
    amounts = generator.uniform(0, 5, 500)
    edges = np.linspace(0, 10, 21)
    rates = series.Rates(edges)
    rates.add(starts, ends, amounts)
    found = rates.per_second()
    assert found.sum() * 0.5 == pytest.approx(amounts.sum())
    expected = np.zeros(20)
    for start, end, amount in zip(starts, ends, amounts, strict=True):
        for number in range(20):
            low, high = edges[number], edges[number + 1]
            if end > start:
                overlap = max(0.0, min(high, end) - max(low, start))
                expected[number] += amount * overlap / (end - start) / 0.5
            elif low < start <= high:
                expected[number] += amount / 0.5
    assert found == pytest.approx(expected)


def test_the_sample_is_the_same_in_every_run(tmp_path: Path) -> None:
    a = RunReader(write_run(tmp_path / "a", many(30)))
    b = RunReader(write_run(tmp_path / "b", list(reversed(many(30))), part_rows=5))

    def ids(run: RunReader) -> set[str]:
        groups = choose_rows(read_columns(run, sampled=8))
        chosen = [index for index, names in groups.items() if "sample" in names]
        return {row["prompt_id"] for row in run.row_reader().take(chosen)}

    assert ids(a) == ids(b)
    assert len(ids(a)) == 8
    assert ids(a) == set(sorted((f"id {i}" for i in range(30)), key=row_hash)[:8])


def test_errors_are_grouped_by_their_reason(tmp_path: Path) -> None:
    rows = [failed(f"long {i}", f"the prompt has {900 + i} tokens") for i in range(25)]
    rows += [failed(f"bad {i}", f"top_k is 'x{i}'") for i in range(3)]
    columns = read_columns(RunReader(write_run(tmp_path / "out", rows)))
    assert [(group.reason, group.count, len(group.rows)) for group in columns.errors] == [
        ("the prompt has # tokens", 25, 20),
        ("top_k is #", 3, 3),
    ]


# -- the document ----------------------------------------------------------------------------------


def test_rare_reasons_of_errors_are_shown(tmp_path: Path) -> None:
    reasons = [f"reason {'abcdefghijklmn'[i % 14]} happened" for i in range(14 * 20)]
    rows = [failed(f"often {i}", reason) for i, reason in enumerate(reasons)]
    columns = read_columns(
        RunReader(write_run(tmp_path / "out", [*rows, failed("once", "rare")], part_rows=100)),
        sampled=1,
    )
    groups = choose_rows(columns)
    assert sum("error" in names for names in groups.values()) == MAX_ERROR_ROWS
    assert "error" in groups[len(rows)]


def test_infinite_margins_have_no_part_in_the_median() -> None:
    values = np.array([1.0, 3.0, np.inf, np.inf, np.nan], np.float32)
    assert "Median 2 logits" in _draw_log(values, "c6", "logits", (340, 150))


def test_texts_of_rows_are_data_alone(tmp_path: Path) -> None:
    path = hostile_run(tmp_path / "out")
    html = build_report(path, path).html
    elements = Elements(html)
    assert html.startswith(MARK)
    assert not [tag for tag, _ in elements.tags if tag in ("img", "iframe", "link", "base", "form")]
    assert not [
        key for _, attributes in elements.tags for key in attributes if key.startswith("on")
    ]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", html)
    rows = elements.data("rows")["rows"]
    for row, text in zip(rows, HOSTILE.values(), strict=False):
        length = row.get("cut", {}).get("completion", len(text))
        assert (row["completion"], length) == (text[: len(row["completion"])], len(text))
        assert len(row["completion"]) == len(text) or len(row["completion"]) >= 256
    assert "49" not in rows[6]["prompt"]


def test_nothing_is_loaded_and_only_own_scripts_run(tmp_path: Path) -> None:
    elements = Elements(build_report(write_run(tmp_path / "out", many(3))).html)
    for _, attributes in elements.tags:
        assert "src" not in attributes
        assert "style" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    (policy,) = [
        attributes["content"] or ""
        for _, attributes in elements.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag, attributes, text in elements.texts:
        if attributes.get("type") != "application/json":
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            directive = next(part for part in policy.split("; ") if part.startswith(tag))
            assert f"'sha256-{digest}'" in directive


def test_templates_use_no_function_that_parses_text() -> None:
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\bFunction\(|\|\s*safe\b"
        r"|createContextualFragment|DOMParser|srcdoc|https?://(?!www\.w3\.org/2000/svg)"
    )
    for path in TEMPLATES.iterdir():
        assert not forbidden.search(path.read_text(encoding="utf-8")), path.name


def test_json_survives_a_script_element() -> None:
    value = {"a": [*HOSTILE.values(), "\ud800"], "b": float("nan"), "c": 2**63 - 1, "d": True}
    text = to_json(value)
    assert not re.search("[<>&\u2028\u202e\ud800]", text)
    assert json.loads(text) == {
        "a": [*HOSTILE.values(), "\ud800"],
        "b": None,
        "c": str(2**63 - 1),
        "d": True,
    }


def test_a_section_brings_data_script_and_style() -> None:
    section = Section(
        id="extra",
        title="More <b>",
        html=note("<i>"),
        data={"x": "</script>"},
        script="section.append(report.data('extra').x);",
        style="#extra { color: red }",
    )
    html = Document(title="t", subtitle="s", sections=[section]).render()
    elements = Elements(html)
    assert elements.data("extra") == {"x": "</script>"}
    assert "More &lt;b&gt;" in html
    assert "&lt;i&gt;" in html
    assert any("section.append" in text for tag, _, text in elements.texts if tag == "script")


@pytest.mark.parametrize("characters", [100_000, 3000])
def test_a_report_has_at_most_2_mb(tmp_path: Path, characters: int) -> None:
    rows = many(330 if characters == 3000 else 120)
    texts = {row.prompt.prompt_id: "<\x01" * (characters // 2) for row in rows}
    path = write_run(tmp_path / "out", rows, part_rows=100, texts=texts)
    built = build_report(path, path)
    assert len(built.html.encode()) < 2_000_000
    data = Elements(built.html).data("rows")
    shown = data["rows"][0]
    assert len(shown["completion"]) == data["cut"] < characters
    assert shown["cut"] == {"completion": characters}


def test_texts_can_be_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "out", many(3))
    other = write_run(tmp_path / "other", [completion("id 0", [9, 9, 9]), *many(3)[1:]])
    html = build_report(path, other, with_text=False).html
    assert "private" not in html
    assert "secret" not in html
    assert "private id 0" in build_report(path, other).html


# -- runs without an end, samples, columns ---------------------------------------------------------


def test_a_killed_run_and_one_without_parts(tmp_path: Path) -> None:
    killed = build_report(write_run(tmp_path / "killed", timed(9), part_rows=2, first_rows=5))
    assert killed.facts == {"state": "unfinished", "rows": 4, "errors": 0, "samples": 4}
    assert "5 of 9 rows are missing" in killed.html
    empty = build_report(write_run(tmp_path / "claimed", many(4), first_rows=0))
    assert empty.facts == {"state": "unfinished", "rows": 0, "errors": 0, "samples": 0}
    assert "No row has run yet." in empty.html
    done = build_report(write_run(tmp_path / "no rows", []))
    assert done.facts["state"] == "complete"


def test_a_run_that_is_going_on(tmp_path: Path) -> None:
    path = write_run(tmp_path / "out", timed(9), part_rows=2, first_rows=5)
    lock = FileLock(path / ".gptbatch" / LOCK)
    assert lock.acquire()
    try:
        built = build_report(path)
    finally:
        lock.release()
    assert built.facts["state"] == "running"
    assert "5 rows are not written yet" in built.html


@pytest.mark.parametrize("name", OLD_OUTPUTS)
def test_outputs_of_earlier_versions(name: str) -> None:
    built = build_report(REPOSITORY / "tests/data/outputs" / name)
    assert built.facts == {"state": "complete", "rows": 5, "errors": 1, "samples": 5}


def test_a_copy_without_its_config(tmp_path: Path) -> None:
    path = write_run(tmp_path / "out", many(3))
    (path / ".gptbatch/config.yaml").unlink()
    assert "All settings" not in build_report(path).html


def test_samples_log_probabilities_and_large_seeds(tmp_path: Path) -> None:
    logprobs = [TokenLogprobs(logprob=-0.5, top_ids=[1], top_logprobs=[-0.5])] * 4
    rows = []
    for index in range(3):
        row = completion("a", logprobs=logprobs)
        params = dataclasses.replace(row.prompt.params, seed=2**63 - 1 - index)
        prompt = dataclasses.replace(row.prompt, params=params, sample_index=index)
        rows.append(dataclasses.replace(row, prompt=prompt))
    html = build_report(write_run(tmp_path / "out", rows)).html
    shown = Elements(html).data("rows")["rows"]
    assert [row["sample_index"] for row in shown] == [0, 1, 2]
    assert [row["seed"] for row in shown] == [str(2**63 - 1 - index) for index in range(3)]
    assert shown[0]["token_logprobs"] == [-0.5] * 4
    assert "Perplexity" in html


def test_facts_that_differ_between_parts_name_their_parts(tmp_path: Path) -> None:
    other = {"environment": {**FACTS["environment"], "torch": "2.14.0"}, "host": "node-2"}
    path = write_run(
        tmp_path / "out",
        many(21),
        facts={"host": "node-1", "versions": {"numpy": "2.4", "pyarrow": None}},
        facts_of_parts={1: other, 2: other, 4: other, 6: other, 8: other, 9: {"host": "node-3"}},
    )
    facts = describe_facts(RunReader(path))
    assert facts["host"] == (
        "3 different: node-1 (parts 0, 3, 5 and 2 more); node-2 (parts 1 to 2, 4, 6 and 1 more); "
        "node-3 (part 9)"
    )
    assert facts["environment.torch"] == (
        "2 different: 2.13.0 (parts 0, 3, 5 and 3 more); 2.14.0 (parts 1 to 2, 4, 6 and 1 more)"
    )
    assert (facts["device"], facts["versions.numpy"]) == ("cpu", "2.4")
    assert "versions.pyarrow" not in facts
    html = build_report(path).html
    assert facts["host"] in html
    assert facts["environment.torch"] in html
    assert "The parts were computed in 2 environments." in html
    assert "Parts of B were computed in 2 environments." in build_report(path, path).html


def test_facts_of_many_values_and_of_no_part(tmp_path: Path) -> None:
    hosts = {number: {"host": f"node-{number}"} for number in range(1, 11)}
    run = RunReader(write_run(tmp_path / "many", many(22), facts_of_parts=hosts))
    text = describe_facts(run)["host"]
    assert text.startswith("11 different: not recorded (part 0); node-1 (part 1); ")
    assert text.endswith("; node-7 (part 7); and 3 more")
    assert len(run.environments) == 1
    none_yet = RunReader(write_run(tmp_path / "none", many(2), facts={"host": "a"}, first_rows=0))
    assert describe_facts(none_yet)["host"] == "a"


def with_samples(n: int) -> list[Completion]:
    """Return 4 rows of n samples, of which sample i has i + 1 tokens."""
    rows = []
    for index in range(4 * n):
        row = completion(f"id {index // n}", range(1 + index % n))
        prompt = dataclasses.replace(row.prompt, sample_index=index % n)
        rows.append(dataclasses.replace(row, prompt=prompt))
    return rows


def test_samples_are_called_so(tmp_path: Path) -> None:
    html = build_report(write_run(tmp_path / "out", with_samples(3))).html
    assert "All 12 samples." in html
    assert Elements(html).data("rows")["unit"] == "samples"
    assert '<th scope="col">ended by</th><th scope="col">samples</th>' in html


# -- two runs --------------------------------------------------------------------------------------


def figures(html: str) -> dict[str, list[list[str]]]:
    """Return the rows of each table of figures, by the first title of its header."""
    (part,) = re.findall("<h3>Figures</h3>(.*?)<h3>", html, re.DOTALL)
    tables = {}
    for table in part.split("<table>")[1:]:
        header, *rows = (
            re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]
        )
        tables[header[0]] = rows
    return tables


def test_changes_are_of_what_both_runs_have(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [*many(40), failed("bad")])
    b = write_run(tmp_path / "b", [completion("new"), *many(10)[5:], completion("id 3", [3, 4])])
    html = build_report(a, b).html
    found = figures(html)
    assert list(found) == ["whole runs", "rows in both"]
    assert found["whole runs"][:3] == [
        ["rows", "41", "7"],
        ["error rows", "1", "0"],
        ["new tokens", "120", "21"],
    ]
    assert found["rows in both"][:3] == [
        ["error rows", "0", "0", "equal"],
        ["new tokens", "18", "17", "-5.6%"],
        ["new tokens per row, mean", "3", "2.833", "-5.6%"],
    ]
    assert "Changes compare only what both runs have: 6 rows." in html
    assert "35 rows are only in A." in html
    assert "1 row is only in B." in html
    other = write_run(tmp_path / "other", [completion("else")])
    assert list(figures(build_report(a, other).html)) == ["whole runs"]
    (same,) = figures(build_report(a, a).html).values()
    assert same[0] == ["rows", "41", "41", "equal"]


def test_runs_of_another_n_are_compared_by_sample(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", with_samples(1))
    b = write_run(tmp_path / "b", with_samples(3))
    html = build_report(a, b).html
    found = figures(html)
    assert found["whole runs"][0] == ["samples", "4", "12"]
    assert found["samples in both"][1:3] == [
        ["new tokens", "4", "4", "equal"],
        ["new tokens per sample, mean", "1", "1", "equal"],
    ]
    assert "8 samples are only in B." in html


def test_two_runs(tmp_path: Path) -> None:
    rows = many(40)
    a = write_run(tmp_path / "a", rows, texts={"id 3": "the same start, then x"})
    changed = [completion("id 3", [3, 9, 5], min_decision_margin=1e-5), failed("id 5")]
    others = [row for row in rows if row.prompt.prompt_id not in ("id 3", "id 5", "id 7")]
    b = write_run(
        tmp_path / "b",
        [*others, *changed, completion("new")],
        identity={"seed": 1},
        texts={"id 3": "the same start, then y"},
    )
    html = build_report(a, b).html
    pairs = {pair["a"]["prompt_id"]: pair for pair in Elements(html).data("compare")["pairs"]}
    assert pairs.keys() == {"id 3", "id 5"}
    pair = pairs["id 3"]
    assert (pair["kind"], pair["token_index"], pair["token_a"], pair["token_b"]) == (
        "tokens", 1, 4, 9,
    )  # fmt: skip
    assert pair["margin"] == 1e-5
    assert pair["a"]["completion"][: pair["a"]["equal"]] == "the same start, then "
    assert pair["b"]["completion"][pair["b"]["equal"] :] == "y"
    assert "error" in pairs["id 5"]["b"]
    summary = summarize(RunReader(a), RunReader(b), diff_runs(RunReader(a), RunReader(b)))
    assert f"{summary.equal} equal, {summary.different} different" in html
    assert re.search(r"<th scope=\"row\">seed</th><td>0</td><td>1</td>", html)
    assert "1 row is only in A." in html
    assert "1 of the 1 rows with other tokens" in html


def test_the_equal_start_of_a_long_text_is_left_out(tmp_path: Path) -> None:
    start = "x" * 90_000
    a = write_run(tmp_path / "a", many(1), texts={"id 0": f"{start}a"})
    b = write_run(tmp_path / "b", [completion("id 0", [7])], texts={"id 0": f"{start}b"})
    (pair,) = Elements(build_report(a, b).html).data("compare")["pairs"]
    assert pair["a"]["skipped"] + pair["a"]["equal"] == 90_000
    assert pair["a"]["completion"].endswith("xa")
    assert "cut" not in pair["a"]


def differing(folder: Path, count: int, texts: tuple[dict[str, str], dict[str, str]]) -> list[Any]:
    """Return the data of the comparison of two runs whose rows all differ."""
    rows = [completion(name, [7]) for name in texts[0]] or many(count)
    others = [completion(row.prompt.prompt_id, [8]) for row in reversed(rows)]
    a = write_run(folder / "a", rows, part_rows=100, texts=texts[0])
    b = write_run(folder / "b", others, part_rows=100, texts=texts[1])
    built = build_report(a, b)
    assert len(built.html.encode()) < 2_000_000
    pairs: list[Any] = Elements(built.html).data("compare")["pairs"]
    return pairs


def test_long_ids_stay_whole(tmp_path: Path) -> None:
    names = [f"{'i' * 6000}{index}" for index in range(60)]
    pairs = differing(tmp_path, 60, (dict.fromkeys(names, "a" * 9000), {}))
    assert pairs
    assert {pair["a"]["prompt_id"] for pair in pairs} <= set(names)


def test_the_first_difference_is_shown_where_texts_are_cut(tmp_path: Path) -> None:
    names = [f"id {index}" for index in range(210)]
    start, rest = "\U0001f469" * 300, "<>" * 700
    a = dict.fromkeys(names, f"{start}a{rest}")
    pairs = differing(tmp_path, 210, (a, dict.fromkeys(names, f"{start}b{rest}")))
    kept = set(sorted(names, key=row_hash)[: len(pairs)])
    assert [pair["a"]["prompt_id"] for pair in pairs] == [name for name in names if name in kept]
    assert 10 < len(pairs) <= 200
    for pair in pairs:
        for run in "ab":
            units = pair[run]["completion"].encode("utf-16-le")[2 * pair[run]["equal"] :]
            assert units.decode("utf-16-le").startswith(f"{run}<>")
            assert pair[run]["cut"]["completion"] == 100 + 1 + len(rest)
        assert pair["same_prompt"]
        assert "prompt" not in pair["b"]


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command(in_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_run(in_folder / "out", many(3))
    for _ in range(2):
        assert run_command(["report", "out"]) == 0
        summary = json.loads(capfd.readouterr().out.splitlines()[-1])
        assert summary["html"] == "out-report.html"
        assert summary["bytes"] == (in_folder / "out-report.html").stat().st_size
        assert (summary["state"], summary["rows"]) == ("complete", 3)
    assert run_command(["report", "out", "out", "--html", "two.html"]) == 0
    assert {path.name for path in in_folder.iterdir()} == {"out", "out-report.html", "two.html"}
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert summary["equal"] == 3
    write_run(in_folder / "others", [completion("new"), completion("newer")])
    assert run_command(["report", "out", "others", "--html", "two.html"]) == 0
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (summary["equal"], summary["different"]) == (0, 0)
    assert (summary["missing_in_a"], summary["missing_in_b"]) == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing"], 66, "missing: no such folder; name the output folder of a run"),
        (["out", "missing"], 66, "missing: no such folder"),
        (["out", "--html", "notes.html"], 78, "notes.html: is another file, not a report"),
        (["out", "--html", "out"], 78, "out: is the output of a run; name a file outside of it"),
        (["out", "--html", "no/report.html"], 73, "there is no folder"),
        (["out", "--html", "pipe"], 78, "pipe: is no regular file"),
        (["out", "--html", "/dev/null"], 78, "/dev/null: is no regular file"),
        (["out", "--html", "out/part-000009.parquet"], 78, "the output of a run"),
        (["out", "--html", "out/.gptbatch/report.html"], 78, "the output of a run"),
        (["scores.parquet"], 66, "is a file of gptbatch score"),
    ],
)
def test_wrong_arguments(
    in_folder: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
    write_scores: Callable[[Path], None],
) -> None:
    write_run(in_folder / "out", many(3))
    (in_folder / "notes.html").write_text("<p>mine")
    write_scores(in_folder / "scores.parquet")
    os.mkfifo(in_folder / "pipe")
    assert run_command(["report", *arguments]) == code
    assert message in capfd.readouterr().err
    assert (in_folder / "notes.html").read_text() == "<p>mine"


@pytest.fixture
def write_scores() -> Callable[[Path], None]:
    """Return a function that writes an empty file of gptbatch score."""
    from gptbatch.pipeline.score.table import FACTS_KEY, FORMAT, SCHEMA

    def write(path: Path) -> None:
        schema = SCHEMA.with_metadata({FACTS_KEY: json.dumps({"format": FORMAT, "identity": {}})})
        pq.write_table(schema.empty_table(), path)

    return write
