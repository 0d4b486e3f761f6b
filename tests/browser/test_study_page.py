"""The page of a study in a real browser: it is drawn, asks for nothing, links to all reports, shuts nobody out.

Run: apt-get install chromium; npm install --prefix .venv axe-core
     .venv/bin/python -m pytest tests/browser/test_study_page.py
"""

import json

import pytest

from common.recipe import Limit, StudySection
from train import study_report
from train.study_choice import Record
from train.study_space import Space

pytestmark = pytest.mark.browser

OBJECTIVE, REFUSAL = "pooled.recovery.value", "refusal[restricted].healed.value"
PARAMETERS = {
    "abliteration.edit.strength": {"choices": [1.0, 2.0]},
    "train.trainer.beta": {"choices": [0.01, 0.1, 1.0]},
    "train.trainer.loss_type": {"choices": [["sigmoid"], ["sigmoid", "sft"]]},
}


@pytest.fixture(scope="module")
def found():
    """A made-up study."""
    section = StudySection.model_validate({"parameters": PARAMETERS})
    records = []
    for number, setting in enumerate(Space(section.parameters).grid()):
        refusal = 0.01 * (number % 4)
        records.append(
            Record(
                number,
                "complete",
                setting,
                values={OBJECTIVE: 0.9 - 0.1 * setting["train.trainer.beta"] - 0.01 * number},
                limited={REFUSAL: refusal},
                missed=(f"{REFUSAL} is {refusal}, limit at most 0.02",) if refusal > 0.02 else (),
                feasible=refusal <= 0.02,
                seconds=60.0,
                seeds=(0,) if number else (0, 1),
                stages={"train": ((f"fingerprint{number}", 50.0),)},
            )
        )
    records.append(Record(12, "failed", records[0].setting, reason="it broke <b>here</b>"))
    confirmed = {
        "number": 0,
        "values": {OBJECTIVE: 0.85},
        "limited": {REFUSAL: 0.0},
        "missed": [],
        "feasible": True,
        "seeds": [2, 3],
        "winners_curse": {OBJECTIVE: 0.049},
    }
    limits = {REFUSAL: Limit(max=0.02)}
    summary = study_report.summary("trying", section, limits, records, [confirmed], confirmed)
    return json.loads(json.dumps(summary | {"test": {"values": {OBJECTIVE: 0.84}}}))


@pytest.fixture(scope="module")
def page(found, tmp_path_factory):
    """Its page, beside reports of its trials."""
    folder = tmp_path_factory.mktemp("study")
    study_report.write(found, folder)
    for trial in found["trials"]:
        for seed in ("seed-0/", "seed-1/") if len(trial["seeds"]) > 1 else ("",):
            report = folder / f"trials/{trial['number']}/{seed}eval/report.html"
            report.parent.mkdir(parents=True)
            report.write_text("<p>report</p>")
    return folder / "study.html"


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_drawn_without_a_complaint_or_a_request(browser, page, scheme, width):
    browser.show(width=width, scheme=scheme)
    browser.open(page)
    heights = browser.evaluate(
        "[...document.querySelectorAll('figure > svg')].map(s => s.getBoundingClientRect().height)"
    )
    assert len(heights) == 3
    assert min(heights) > 40
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.complaints == []
    assert browser.requests == [page.as_uri()]


def test_every_link_leads_to_a_report_or_a_section(browser, page):
    browser.open(page)
    hrefs = browser.evaluate("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    reports = [href for href in hrefs if not href.startswith("#")]
    assert len(reports) == 12 + 1  # the first trial has two seeds
    assert all((page.parent / href).is_file() for href in reports)
    for href in set(hrefs) - set(reports):
        assert browser.evaluate(f"document.querySelector('{href}') !== null")


def test_every_trial_is_a_point_and_a_line_and_the_best_has_a_ring(browser, page, found):
    browser.open(page)

    def count(selector):
        return browser.evaluate(f"document.querySelectorAll('{selector}').length")

    done = [trial for trial in found["trials"] if trial["state"] == "complete"]
    assert count("#front .dot") == len(done)
    assert count("#front .chosen") == 1
    assert count("#settings figure > svg > .line") == len(done)
    tip = browser.evaluate("document.querySelector('#front .dot.strong title').textContent")
    assert tip.startswith("trial 0: strength=1")


def test_the_winners_curse_and_why_a_trial_failed_are_told_as_text(browser, page):
    browser.open(page)
    text = browser.evaluate("document.body.innerText")
    assert "winner's curse" in text
    assert "0.049" in text
    assert "it broke <b>here</b>" in text


def test_nothing_shuts_anybody_out(browser, page, axe):
    browser.show(width=1280, scheme="light")
    browser.open(page)
    browser.evaluate(axe + "; 0")
    found = browser.evaluate("axe.run().then(r => r.violations.map(v => v.id + ': ' + v.help))")
    assert found == []


def test_the_tables_for_tracking_hold_the_front_and_every_importance(found):
    tables = study_report.tables(found)
    columns, rows = tables["front"]
    assert columns == ["trial", *PARAMETERS, OBJECTIVE]
    assert [row[0] for row in rows] == found["front"]
    assert rows[0][3] == '["sigmoid"]'
    columns, rows = tables["importances"]
    assert {row[1] for row in rows} == set(PARAMETERS)
    assert all(low <= high for _, _, _, low, high in rows)
    assert sum(row[2] for row in rows) == pytest.approx(1)
    # Beta moves the made-up objective most.
    assert max(rows, key=lambda row: row[2])[1] == "train.trainer.beta"
