"""The explorer of the report in Chromium: the winner, keyboard, policy, accessibility, widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptbatch.pipeline.audit.loaded_run import LoadedRun
from gptbatch.pipeline.report.build import build_report
from gptbatch.pipeline.report.explain import explain_section, find_rows
from tests.test_explain import finished, grid, loaded, seen_logits, winners  # noqa: F401
from tests.test_report_browser import WIDTHS, browser, expect, show  # noqa: F401

pytestmark = [pytest.mark.browser, pytest.mark.slow]
NAMES = ["plain", "top_p", "adjusted"]
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def report_of_rows(finished: Path, loaded: LoadedRun) -> str:  # noqa: F811
    """Return a report that explains three rows."""
    section = explain_section(loaded, find_rows(loaded.run, [*NAMES, HOSTILE]))
    return build_report(finished, more=[section]).html


def test_the_winner_is_that_of_the_sampler(
    show: Any,  # noqa: F811
    report_of_rows: str,
    loaded: LoadedRun,  # noqa: F811
    tmp_path: Path,
) -> None:
    opened = show(report_of_rows)
    settings = grid(80)
    for number, name in enumerate(NAMES):
        found = opened.view.evaluate(
            """([number, settings]) => {
                const { readStep, sample } = report.sampling;
                const row = report.data("explorer").rows[number];
                return row.steps.map((_, index) => {
                    const step = readStep(row, index);
                    return [...settings, row.settings].map((one) => sample(step, one).id);
                });
            }""",
            [number, settings],
        )
        recorded = loaded.run.require(name)["completion_token_ids"]
        assert [step.pop() for step in found] == recorded
        logits, params = seen_logits(loaded, name)
        assert found == winners(logits, params, settings)
    assert opened.problems == []
    assert opened.requests == [(tmp_path / "report.html").as_uri()]


def test_tokens_by_keyboard(show: Any, expect: Any, report_of_rows: str) -> None:  # noqa: F811
    view = show(report_of_rows, viewport={"width": 390, "height": 800}).view
    chips = view.locator("#explorer .chips button")
    heading = view.locator("#explorer h3")
    view.locator("#explorer .chips button[tabindex='0']").focus()
    expect(heading).to_contain_text("Step 0:")
    for key, step in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 13)):
        view.keyboard.press(key)
        expect(heading).to_contain_text(f"Step {step}:")
        expect(chips.nth(step)).to_have_attribute("aria-pressed", "true")
    view.keyboard.press("ArrowRight")
    expect(heading).to_contain_text("Step 13:")
    # one stop of the tab key for all tokens
    assert view.locator("#explorer .chips button[tabindex='0']").count() == 1
    view.keyboard.press("Home")
    view.keyboard.press("ArrowDown")
    expect(heading).not_to_contain_text("Step 0:")
    assert view.locator("#explorer .chip.smallest").count() == 2  # one of them in the key


def test_sliders_sample_the_step_again(
    show: Any,  # noqa: F811
    expect: Any,  # noqa: F811
    report_of_rows: str,
    loaded: LoadedRun,  # noqa: F811
) -> None:
    opened = show(report_of_rows)
    view = opened.view
    explorer = view.locator("#explorer")
    explorer.locator(".controls select").first.select_option("top_p")
    expect(explorer.locator(".verdict")).to_contain_text("as in the run")
    temperature = explorer.get_by_role("slider", name="temperature")
    expect(temperature).to_have_attribute("aria-valuetext", "1.4")
    temperature.focus()
    view.keyboard.press("Home")
    expect(temperature).to_have_attribute("aria-valuetext", "0")
    logits, _ = seen_logits(loaded, "top_p")
    greedy = logits.argmax(dim=1).tolist()
    recorded = loaded.run.require("top_p")["completion_token_ids"]
    differ = [index for index, token in enumerate(greedy) if token != recorded[index]]
    assert differ
    expect(explorer).to_contain_text(f"another token wins at {len(differ)} of 14 steps")
    marked = explorer.locator(".chips .chip").evaluate_all(
        "all => all.flatMap((chip, index) => chip.classList.contains('differs') ? [index] : [])"
    )
    assert marked == differ
    explorer.locator(".chips button").nth(differ[0]).focus()
    expect(explorer.locator(".verdict")).to_contain_text("In the run")
    expect(explorer.locator("tr.winner .place")).to_have_text("1")
    view.keyboard.press("Tab")
    explorer.get_by_role("button", name="As recorded").click()
    expect(explorer.locator(".verdict")).to_contain_text("as in the run")
    explorer.get_by_role("slider", name="top_k").focus()
    view.keyboard.press("Home")
    expect(explorer.get_by_role("slider", name="top_k")).to_have_attribute("aria-valuetext", "1")
    expect(explorer.locator("tr.left-out")).not_to_have_count(0)
    explorer.get_by_label("Colour").select_option("margin")
    assert opened.problems == []


def test_texts_of_a_row_are_no_html(show: Any, expect: Any, report_of_rows: str) -> None:  # noqa: F811
    opened = show(report_of_rows)
    explorer = opened.view.locator("#explorer")
    explorer.locator(".controls select").first.select_option(HOSTILE)
    expect(explorer.locator(".chips .prompt")).to_contain_text("</script><b>")
    assert opened.view.locator("img, #explorer .chips b").count() == 0
    assert opened.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_widths_and_accessibility(
    show: Any,  # noqa: F811
    report_of_rows: str,
    scheme: str,
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    for width in WIDTHS:
        opened = show(
            report_of_rows,
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            bypass_csp=True,
        )
        view = opened.view
        assert view.evaluate("document.documentElement.scrollWidth") <= width
        colour = "rank" if width == WIDTHS[0] else "probability"
        view.locator("#explorer").get_by_label("Colour").select_option(colour)
        view.locator("#explorer .chips button").nth(3).focus()
        found = axe.Axe().run(view, "#explorer").response["violations"]
        serious = [
            (one["id"], [node["html"][:150] for node in one["nodes"]][:5])
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
        assert serious == []
        assert opened.problems == []
