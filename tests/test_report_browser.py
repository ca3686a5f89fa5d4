"""The report in Chromium: no request, no script of a row, keyboard, accessibility, widths.

They need `pip install -e .[browser]` and a Chromium (on Debian `apt-get install chromium`), and are
skipped without them.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from gptbatch.pipeline.report.build import build_report
from tests.test_diff import completion, failed, many, write_run
from tests.test_report import HOSTILE, hostile_run, timed

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTHS = (390, 820, 1440)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Return a Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def expect() -> Any:
    """Return the assertions of Playwright, which wait."""
    return pytest.importorskip("playwright.sync_api").expect


@dataclass
class Opened:
    """A document that is open, and what happened in it.

    Attributes:
        view: The tab of the browser.
        requests: URLs of its requests.
        problems: Messages of the console, violations of the policy, and uncaught errors.
    """

    view: Page
    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Any]:
    """Return a function that opens HTML in a new tab, with options of the tab."""
    contexts = []

    def opened(html: str, **options: Any) -> Opened:
        path = tmp_path / "report.html"
        path.write_text(html, encoding="utf-8")
        context = browser.new_context(**options)
        contexts.append(context)
        found = Opened(context.new_page())
        found.view.on("request", lambda request: found.requests.append(request.url))
        found.view.on("console", lambda message: found.problems.append(message.text))
        found.view.on("pageerror", lambda error: found.problems.append(str(error)))
        found.view.on("dialog", lambda dialog: found.problems.append(dialog.message))
        found.view.goto(path.as_uri())
        return found

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def report_of_two(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a report with every section filled."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [*timed(160), failed("too long")]
    a = write_run(folder / "a", rows, part_rows=50)
    changed = [completion(f"id {i}", [i, 500, 1], min_decision_margin=1e-6) for i in range(60)]
    b = write_run(folder / "b", [*changed, *rows[60:]], part_rows=50, identity={"seed": 1})
    return build_report(a, b).html


def row_names(opened: Opened, section: str = "rows") -> list[str]:
    found: list[str] = opened.view.locator(f"#{section} button.open").all_inner_texts()
    return found


def test_hostile_rows_are_shown_as_text(show: Any, tmp_path: Path) -> None:
    path = hostile_run(tmp_path / "out")
    opened = show(build_report(path).html)
    view = opened.view
    assert len(row_names(opened)) == len(HOSTILE) + 1
    for button in view.locator("#rows button.open").all():
        button.click()
    assert view.locator("img, iframe").count() == 0
    blocks = view.locator("#rows .details").all()
    texts = [
        block.locator("pre.text").evaluate_all(
            "all => all.map(pre => [...pre.childNodes].map(node =>"
            " node.title ? String.fromCodePoint(parseInt(node.title.slice(2), 16))"
            " : node.textContent).join(''))"
        )
        for block in blocks
    ]
    for shown, text in zip(texts, HOSTILE.values(), strict=False):
        # prompt and completion; the longest is cut
        assert text.startswith(shown[1])
        assert len(shown[1]) == min(len(text), len(shown[1])) > 4
    assert "U+202E" in blocks[3].inner_text()
    assert "\u2400" in blocks[4].inner_text()
    assert "first 4,096 of 100,000 characters" in blocks[5].inner_text()
    assert opened.requests == [(tmp_path / "report.html").as_uri()]
    assert opened.problems == []


def test_the_policy_stops_a_script_that_is_not_ours(show: Any, report_of_two: str) -> None:
    opened = show(report_of_two.replace("</main>", "<script>window.mine = 1</script></main>"))
    assert opened.view.evaluate("window.mine === undefined")
    assert any("Content Security Policy" in problem for problem in opened.problems)


def test_search_filter_sort_and_places_by_keyboard(
    show: Any, expect: Any, report_of_two: str
) -> None:
    opened = show(report_of_two)
    view = opened.view
    browser = view.locator("#rows .browser")
    count = browser.locator(".count")
    expect(count).to_have_text("1 to 50 of 161 rows")
    browser.get_by_label("Search").focus()
    view.keyboard.type("id 15")
    # id 15, and id 150 to 159
    expect(count).to_have_text("1 to 11 of 11 rows")
    assert row_names(opened)[:2] == ["id 15", "id 150"]
    view.keyboard.press("Control+a")
    view.keyboard.press("Delete")
    expect(count).to_have_text("1 to 50 of 161 rows")
    view.keyboard.press("Tab")
    view.keyboard.type("smallest")
    expect(count).to_have_text("1 to 10 of 10 rows")
    view.keyboard.press("Tab")
    view.keyboard.type("error")
    expect(count).to_have_text("no rows")
    view.keyboard.press("Shift+Tab")
    view.keyboard.type("error")
    expect(count).to_have_text("1 to 1 of 1 rows")
    assert row_names(opened) == ["too long"]
    for label in ("Rows", "Ended by"):
        browser.get_by_label(label).focus()
        view.keyboard.press("Home")
    expect(count).to_have_text("1 to 50 of 161 rows")
    browser.get_by_role("button", name="Next").focus()
    view.keyboard.press("Enter")
    expect(count).to_have_text("51 to 100 of 161 rows")
    browser.get_by_role("button", name="margin").focus()
    view.keyboard.press("Enter")
    view.keyboard.press("Enter")
    expect(browser.locator("th", has_text="margin")).to_have_attribute("aria-sort", "ascending")
    margins = browser.locator("tbody tr td:nth-child(6)").all_inner_texts()
    numbers = [float(text) for text in margins]
    assert numbers == sorted(numbers)
    assert len(numbers) == 50
    assert opened.problems == []


def test_rows_open_and_close_by_keyboard(show: Any, expect: Any, report_of_two: str) -> None:
    view = show(report_of_two).view
    buttons = view.locator("#rows button.open")
    buttons.first.focus()
    view.keyboard.press("ArrowDown")
    view.keyboard.press("Enter")
    expect(buttons.nth(1)).to_have_attribute("aria-expanded", "true")
    details = view.locator("#rows tr.details")
    expect(details).to_contain_text("Completion")
    expect(details).to_contain_text("private id 1")
    view.keyboard.press("Enter")
    expect(details).to_have_count(0)


def test_slash_moves_to_the_search(show: Any, report_of_two: str) -> None:
    view = show(report_of_two).view
    view.keyboard.press("/")
    assert view.evaluate("document.activeElement.type") == "search"
    assert view.evaluate("document.activeElement.value") == ""


def test_slash_moves_to_the_search_in_view(show: Any, report_of_two: str) -> None:
    view = show(report_of_two).view
    focused = "document.activeElement.closest('section').id"
    for section in ("rows", "compare"):
        view.evaluate("document.activeElement.blur()")
        found = f"document.querySelector('#{section} .browser')"
        view.evaluate(f"{found}.scrollIntoView({{ behavior: 'instant' }})")
        view.keyboard.press("/")
        assert view.evaluate(focused) == section


def test_prompts_that_are_cut_have_a_note(show: Any, expect: Any, tmp_path: Path) -> None:
    paths = []
    for name in "ab":
        row = completion("id", [ord(name)])
        prompt = dataclasses.replace(row.prompt, text="x" * 5000 + name)
        paths.append(write_run(tmp_path / name, [dataclasses.replace(row, prompt=prompt)]))
    compared = show(build_report(*paths).html).view.locator("#compare")
    compared.locator("button.open").first.click()
    details = compared.locator("tr.details")
    expect(details).to_contain_text("Prompt of A")
    expect(details).to_contain_text("Prompt of B")
    note = details.get_by_text("The first 4,096 of 5,001 characters.")
    expect(note).to_have_count(2)


def test_two_texts_stand_side_by_side(show: Any, expect: Any, report_of_two: str) -> None:
    opened = show(report_of_two)
    compared = opened.view.locator("#compare")
    names = row_names(opened, "compare")
    assert names[0] == "id 0"
    compared.locator("button.open").first.click()
    text = compared.locator("tr.details").inner_text()
    assert "margin 1.00e-6" in text
    compared.get_by_label("Search").fill("id 59")
    expect(compared.locator(".count")).to_have_text("1 to 1 of 1 rows")


def test_charts_show_the_numbers_of_a_place(show: Any, tmp_path: Path) -> None:
    path = write_run(tmp_path / "out", timed(60))
    opened = show(build_report(path).html)
    chart = opened.view.locator("#time svg[data-series=new_tokens]:visible")
    chart.focus()
    opened.view.keyboard.press("End")
    readout = opened.view.locator("#time figure[data-name=new_tokens] .readout").inner_text()
    assert readout.endswith("new tokens/s")
    tokens = sum(len(ids) for ids in pq.read_table(path)["completion_token_ids"].to_pylist())
    data = opened.view.evaluate("report.data('time')")
    (_, values), *_ = data["charts"]["new_tokens"]
    # the values are rounded to four digits
    assert np.sum(values) * data["bin_s"] == pytest.approx(tokens, rel=1e-3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_widths_and_accessibility(show: Any, report_of_two: str, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    for width in WIDTHS:
        # the checker is injected into the document, which the policy would refuse
        opened = show(
            report_of_two,
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            bypass_csp=True,
        )
        view = opened.view
        assert view.evaluate("document.documentElement.scrollWidth") <= width
        visible = view.locator("#time svg.chart:visible")
        assert visible.count() == 3
        view.locator("#rows button.open").first.click()
        view.locator("#compare button.open").first.click()
        found = axe.Axe().run(view).response["violations"]
        serious = [
            (one["id"], [node["html"][:120] for node in one["nodes"]][:5])
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
        assert serious == []
        assert opened.problems == []


def test_a_run_without_rows_opens(show: Any, tmp_path: Path) -> None:
    path = write_run(tmp_path / "out", many(3), first_rows=0)
    opened = show(build_report(path, path).html)
    assert opened.problems == []
    assert opened.view.locator("#rows .count").inner_text() == "no rows"


def test_it_prints_tables_that_are_closed(show: Any, report_of_two: str) -> None:
    opened = show(report_of_two)
    opened.view.emulate_media(media="print")
    opened.view.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.view.locator("details:not([open])").count() == 0
    opened.view.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.view.locator("details[open]").count() == 0
