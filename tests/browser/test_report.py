"""The page of an evaluation in a real browser: it is drawn, sorts, filters, prints, asks for nothing, shuts nobody out.

Run: apt-get install chromium; npm install --prefix .venv axe-core
     .venv/bin/python -m pytest tests/browser
"""

import json

import pytest

pytestmark = pytest.mark.browser

SCHEMES = ("light", "dark")
WIDTHS = (1280, 360)
FLIPS = "document.querySelector('#flips table')"


def column(number, table=FLIPS):
    """The texts of a column, as far as its rows are shown."""
    return (
        f"[...{table}.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[{number}].innerText)"
    )


def button(number, table=FLIPS):
    """The button in the head of a column."""
    return f"{table}.tHead.rows[0].cells[{number}].querySelector('button')"


@pytest.fixture
def opened(browser, report):
    browser.show(width=1280, scheme="light")
    browser.open(report)
    return browser


@pytest.fixture(params=["evaluation", "abliteration"])
def either(request, report, folders):
    """The pages of both stages: the second's holds pictures of the first's."""
    return report if request.param == "evaluation" else folders["abliteration"] / "report.html"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_page_is_drawn_without_a_complaint_or_a_request(browser, either, scheme, width):
    browser.show(width=width, scheme=scheme)
    browser.open(either)
    heights = browser.evaluate(
        "[...document.querySelectorAll('figure > svg')].map(s => s.getBoundingClientRect().height)"
    )
    assert heights
    assert min(heights) > 40
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.complaints == []
    assert browser.requests == [either.as_uri()]


def test_pictures_stay_legible_on_a_narrow_screen(browser, report):
    browser.show(width=360, scheme="light")
    browser.open(report)
    widths = browser.evaluate(
        "[...document.querySelectorAll('figure > svg')].map(s => s.getBoundingClientRect().width)"
    )
    assert min(widths) >= 540
    # What is wider than the screen can be scrolled with the keyboard.
    figures = (
        "[...document.querySelectorAll('figure')].filter(f => f.querySelector(':scope > svg'))"
    )
    assert browser.evaluate(f"{figures}.every(f => f.tabIndex === 0)")
    browser.show(width=1280, scheme="light")
    browser.evaluate("new Promise(requestAnimationFrame)")
    assert browser.evaluate(f"{figures}.every(f => f.tabIndex === -1)")


def test_a_request_and_a_complaint_would_be_noticed(browser, report, tmp_path):
    spoilt = tmp_path / "spoilt.html"
    text = report.read_text(encoding="utf-8")
    spoilt.write_text(text.replace("<main>", '<main><img alt="" src="other.png">'))
    browser.open(spoilt)
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)
    spoilt.write_text(text.replace('"use strict";', "null.nothing;"))
    browser.open(spoilt)
    assert browser.complaints


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_nobody_is_shut_out(browser, either, axe, scheme, width):
    browser.show(width=width, scheme=scheme)
    browser.open(either)
    browser.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    browser.evaluate(axe + "; null")
    found = browser.evaluate("axe.run().then(r => r.violations)")
    serious = [rule for rule in found if rule["impact"] in ("serious", "critical")]
    assert serious == [], json.dumps(serious, indent=1)[:4000]


def test_the_checker_finds_what_shuts_people_out(browser, report, axe, tmp_path):
    spoilt = tmp_path / "spoilt.html"
    text = report.read_text(encoding="utf-8")
    spoilt.write_text(
        text.replace("<html lang", "<html data").replace("--soft:#5b636d", "--soft:#eee")
    )
    browser.show(width=1280, scheme="light")
    browser.open(spoilt)
    browser.evaluate(axe + "; null")
    found = browser.evaluate("axe.run().then(r => r.violations.map(v => v.id))")
    assert {"html-has-lang", "color-contrast"} <= set(found)


def test_both_colour_schemes_are_followed(browser, report):
    colours = {}
    for scheme in SCHEMES:
        browser.show(width=1280, scheme=scheme)
        browser.open(report)
        colours[scheme] = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colours == {"light": "rgb(251, 251, 250)", "dark": "rgb(20, 23, 26)"}


def test_a_click_on_a_head_sorts_and_a_second_turns_the_order(opened):
    table = "document.querySelector('#benchmarks table')"
    original = column(2, table)
    opened.evaluate(f"{button(2, table)}.click()")
    assert [text.split()[0] for text in opened.evaluate(original)] == ["0.030", "0.750", "0.938"]
    opened.evaluate(f"{button(2, table)}.click()")
    assert [text.split()[0] for text in opened.evaluate(original)] == ["0.938", "0.750", "0.030"]
    heads = f"[...{table}.tHead.rows[0].cells].map(c => c.getAttribute('aria-sort'))"
    assert opened.evaluate(heads) == [None, None, "descending", *[None] * 6]


def test_what_was_not_measured_is_sorted_last_both_ways(opened):
    table = "document.querySelector('#benchmarks table')"
    for _ in range(2):
        opened.evaluate(f"{button(7, table)}.click()")
        assert [text.split()[0] for text in opened.evaluate(column(7, table))][1:] == ["-", "-"]


def test_words_are_sorted_as_words_and_numbers_as_numbers(opened):
    opened.evaluate(f"{button(0)}.click()")
    names = opened.evaluate(column(0))
    assert names == sorted(names)
    table = "document.querySelector('#training table')"
    opened.evaluate("document.querySelector('#training details').open = true")
    opened.evaluate(f"{button(0, table)}.click()")
    opened.evaluate(f"{button(0, table)}.click()")
    assert opened.evaluate(column(0, table)) == [str(step) for step in range(30, 0, -1)]


def test_flips_are_filtered_by_benchmark_by_change_and_by_words(opened):
    def choose(number, value):
        opened.evaluate(
            f"(s => {{ s.value = {json.dumps(value)}; s.dispatchEvent(new Event('input', {{bubbles: true}})) }})"
            f"(document.querySelectorAll('#flips select, #flips input')[{number}])"
        )

    status = "document.querySelector('#flips output').textContent"
    assert opened.evaluate(status) == "11 of 11 shown"
    choose(0, "sums")
    assert opened.evaluate(column(0)) == ["sums"] * 3
    choose(1, "fixed")
    assert opened.evaluate(column(5)) == ["fixed"]
    assert opened.evaluate(status) == "1 of 11 shown"
    choose(0, "")
    choose(1, "")
    choose(2, "  HEALED: the open wording 1 ")
    assert set(opened.evaluate(column(1))) == {"1"}
    assert set(opened.evaluate(column(0))) == {"sums", "words", "plain"}
    choose(2, "nowhere")
    assert opened.evaluate(column(0)) == []
    opened.evaluate("document.querySelector('#flips button[type=reset]').click()")
    opened.evaluate("new Promise(done => setTimeout(done, 20))")
    assert opened.evaluate(status) == "11 of 11 shown"


def test_sorting_keeps_the_filter(opened):
    opened.evaluate(
        "(s => { s.value = 'sums'; s.dispatchEvent(new Event('input', {bubbles: true})) })"
        "(document.querySelector('#flips select'))"
    )
    opened.evaluate(f"{button(4)}.click()")
    assert opened.evaluate(column(0)) == ["sums"] * 3
    assert opened.evaluate(column(4)) == ["0", "0", "1"]


def test_the_keyboard_reaches_everything(opened):
    opened.press("Tab", 9)
    assert opened.evaluate("document.activeElement.className") == "skip"
    place = opened.evaluate("document.activeElement.getBoundingClientRect().left")
    assert place > 0
    opened.press("Enter", 13, "\r")
    assert opened.evaluate("location.hash") == "#benchmarks"
    # Behind the skip link come the table's region and then its heads.
    opened.press("Tab", 9)
    opened.press("Tab", 9)
    table = "document.querySelector('#benchmarks table')"
    assert opened.evaluate(f"document.activeElement === {button(0, table)}")
    outline = opened.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    opened.press("Enter", 13, "\r")
    assert (
        opened.evaluate("document.activeElement.closest('th').getAttribute('aria-sort')")
        == "ascending"
    )


def test_paper_shows_what_the_screen_folds_away(opened):
    opened.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    opened.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.evaluate("document.querySelectorAll('details[open]').length") == 0
    assert opened.print().startswith(b"%PDF")


def test_without_the_script_the_page_says_the_same(browser, report, tmp_path):
    plain = tmp_path / "plain.html"
    text = report.read_text(encoding="utf-8")
    plain.write_text(text[: text.rindex("<script>")] + "</body></html>")
    browser.show(width=1280, scheme="light")
    browser.open(plain)
    assert browser.complaints == []
    rows = "document.querySelectorAll('#flips tbody tr').length"
    assert browser.evaluate(rows) == 11
    assert (
        browser.evaluate("document.querySelector('form.filter').getBoundingClientRect().height")
        == 0
    )
