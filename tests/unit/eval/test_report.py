"""The page of an evaluation says what results.json says, and nothing that must stay on the machine.

Run: .venv/bin/python -m pytest tests/unit/eval/test_report.py
"""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import artifacts
from common.statistics import Interval
from eval import stage
from eval.benchmarks import component
from eval.items import Row
from eval.report import flips, pictures, questions, training
from eval.report.page import page, write
from tests import evaluated, pages
from tests.evaluated import OPEN, SECRET

NASTY = "a <b> & \"c\" 'd' </script><script>alert(1)"


@pytest.fixture
def upstream(tmp_path):
    return evaluated.folders(tmp_path / "run")


@pytest.fixture
def html(upstream):
    return page(evaluated.results(), evaluated.items(), evaluated.questions(), upstream)


def _numbers(data, path=""):
    """Every number with its path, written down apart from the program's own way."""
    if isinstance(data, bool) or data is None or isinstance(data, str):
        return {}
    if isinstance(data, int | float):
        return {path: data}
    found = {}
    entries = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in entries:
        if isinstance(data, dict):
            inner = f"{path}.{key}" if path else key
        elif isinstance(value, dict):
            inner = f"{path}[{value.get('name', value.get('category', key))}]"
        else:
            inner = f"{path}[{key}]"
        found |= _numbers(value, inner)
    return found


def _rounded_as(value, text):
    """A value written as another was."""
    if text.endswith("%"):
        return f"{value:.{len(text.split('.')[1]) - 2}%}".replace("%", " %")
    if "e" in text:
        return f"{value:.{len(text.split('e')[0].split('.')[1])}e}"
    return (
        f"{value:{'+' if text[0] == '+' else ''}.{len(text.split('.')[1]) if '.' in text else 0}f}"
    )


def test_every_figure_is_that_of_its_field(html):
    numbers = _numbers(evaluated.results())
    figures = pages.Tags(html).figures
    assert len(figures) > 150
    for path, value, text in figures:
        assert value == numbers[path], path
        assert text == _rounded_as(value, text) or float(text) == float(f"{value:.4g}"), (
            path,
            text,
        )


def test_a_changed_field_is_found_out(html):
    results = evaluated.results()
    results["benchmarks"][0]["healed"]["value"] += 0.001
    numbers = _numbers(results)
    wrong = {path for path, value, _ in pages.Tags(html).figures if value != numbers[path]}
    assert wrong == {"benchmarks[sums].healed.value"}


def test_every_number_is_on_the_page(html):
    section = html[html.index('<section id="figures"') :]
    rows = re.findall(r'<tr><td>([^<]*)</td><td><data value="([^"]*)">', section)
    assert {path: float(value) for path, value in rows} == _numbers(evaluated.results())


def test_the_page_holds_the_results_themselves(html):
    (held,) = re.findall(r'<script type="application/json" id="results">(.*?)</script>', html)
    assert json.loads(held) == evaluated.results()


def test_the_page_is_sound(html):
    tags = pages.Tags(html)
    assert tags.open == []
    assert len(tags.ids) == len(set(tags.ids))
    inside = [link[1:] for link in tags.links if link.startswith("#")]
    assert set(inside) <= set(tags.ids)
    assert {tag for tag in tags.ids if not tag.endswith("-heading")} - {"results"} == set(inside)
    for picture in pages.pictures(html):
        assert picture.get("aria-label") or picture.get("aria-hidden") == "true"


def test_the_page_needs_no_network(html):
    assert not re.search(r"http(?!-equiv)|//(?! )|url\(|@import|<img|src=", html)
    assert "default-src 'none'" in html


@pytest.mark.parametrize("kind", ["text", "answer"])
def test_no_text_of_a_harmful_panel_is_on_the_page(kind, upstream):
    items = [replace(item, details={kind: item.details["text"]}) for item in evaluated.items()]
    html = page(evaluated.results(), items, evaluated.questions(), upstream)
    assert f"asked: <q>Asked {OPEN} 0?</q>" in html
    assert f"healed: <q>healed: {OPEN} 0</q>" in html
    assert SECRET not in html
    assert artifacts.hash_text(f"original: {SECRET} 0")[:12] in html


def test_a_panel_that_nobody_called_harmless_keeps_its_texts(upstream):
    results = evaluated.results()
    for row in results["refusal"]:
        row["harmless"] = False
    for row in results["benchmarks"]:
        row["role"] = "unlocked"
    assert OPEN not in page(results, evaluated.items(), evaluated.questions(), upstream)


def test_all_text_is_escaped(upstream):
    results = evaluated.results() | {"recipe": NASTY}
    items = [replace(item, details={"answer": NASTY}) for item in evaluated.items()]
    asked = {key: dict.fromkeys(texts, NASTY) for key, texts in evaluated.questions().items()}
    for rows in (results["benchmarks"], results["refusal"], results["divergence"]):
        rows[0]["name"] = rows[0]["name"] + NASTY
    results["refusal"][0]["by_category"][0]["category"] = NASTY
    results["accept"]["gates"][0]["name"] = NASTY
    results["provenance"]["versions"][NASTY] = NASTY
    html = page(results, items, asked, upstream)
    assert "<b>" not in html
    assert html.count("<script") == 2
    assert pages.Tags(html).open == []
    held = html.split('id="results">')[1].split("</script>")[0]
    assert json.loads(held) == results


def test_what_was_not_measured_is_not_shown(tmp_path):
    nothing = {
        "schema_version": 1,
        "recipe": "bare",
        "margin": 0.05,
        "benchmarks": [],
        "pooled": {"benchmarks": [], "n": 0, "damage": None, "recovery": None},
        "refusal": [],
        "divergence": [],
        "direction": {"residual": None},
        "accept": {"passed": True, "gates": []},
        "provenance": {"versions": {}, "seed": 0, "fingerprints": {}},
    }
    html = page(nothing, [], {}, {"abliteration": tmp_path, "train": tmp_path})
    assert re.findall(r'<section id="([\w-]+)"', html) == ["flips", "provenance", "figures"]
    assert "sets no gates" in html
    assert pages.Tags(html).open == []


def test_results_of_an_earlier_version_are_shown_without_what_they_lack(upstream):
    results = evaluated.results()
    del results["refusal_instrument"], results["cross_entropy"]
    for row in results["benchmarks"]:
        row["mde"] = row.pop("minimum_detectable_effect")
        del row["flips"], row["answer_logp_change"]
    for row in results["refusal"]:
        for key in ("classes", "by_category", "advisories", "calibrated"):
            del row[key]
        for key in evaluated.JUDGED:
            row.pop(key, None)
    for row in results["divergence"]:
        for key in ("cross_entropy", "length", "repetition"):
            del row[key]
        for model in ("abliterated", "healed"):
            for key in ("by_position", "reverse", "after_first_token_kl"):
                del row[model][key]
    html = page(results, evaluated.items(), evaluated.questions(), upstream)
    shown = set(re.findall(r'<section id="([\w-]+)"', html))
    absent = {"classes", "harmful", "categories", "advisories", "positions", "drift", "plain-text"}
    assert not shown & absent
    assert {"benchmarks", "refusals", "tradeoff", "divergence", "right-answers"} <= shown


def test_everything_measured_is_shown(html):
    assert re.findall(r'<section id="([\w-]+)"', html) == [
        *("benchmarks", "intervals", "right-answers", "gates"),
        *("refusals", "classes", "harmful", "categories", "advisories", "tradeoff"),
        *("divergence", "positions", "drift", "plain-text"),
        *("training", "healing"),
        *("direction", "difference", "separation", "scores", "residual"),
        *("flips", "provenance", "figures"),
    ]


def _rows(html, section):
    """The cells of a section's table as they are written, by row."""
    (body,) = re.findall(rf'<section id="{section}".*?<tbody>(.*?)</tbody>', html, re.DOTALL)
    return [re.findall(r"<td>(.*?)</td>", row) for row in body.split("</tr>")[:-1]]


def test_beside_a_panel_stand_its_system_prompt_its_judges_and_what_they_find_harmful(upstream):
    results = evaluated.results()
    html = page(results, [], {}, upstream)
    closed, plain = (cells[0] for cells in _rows(html, "refusals"))
    assert closed == (
        "closed <small>system prompt: <q>Be &lt;kind&gt;.</q></small> <small>judged by a/judge</small>"
    )
    assert plain == "plain"
    (cells,) = _rows(html, "harmful")
    words = [re.sub(r"<[^>]*>", "", cell) for cell in cells]
    assert words == ["closed", "a/guard", "-", "0.310 [0.210, 0.420]", "0.290 [0.190, 0.400]"]
    results["refusal"][0]["system"] = "x" * 5000
    assert f"<q>{'x' * 299}…</q>" in page(results, [], {}, upstream)


def test_a_rate_that_labels_of_other_answers_cannot_correct_is_a_dash(upstream):
    results = evaluated.results()
    results["refusal"][0]["calibrated"]["original"] = None
    calibrated = [cells[-1] for cells in _rows(page(results, [], {}, upstream), "classes")]
    assert calibrated[:2] == ["-", "-"]
    assert "labels)" in calibrated[2]


def _headline(html):
    return re.search(r'<p class="headline[^"]*">(.*?)</p><p>(.*?)</p>', html, re.DOTALL).groups()


def test_the_verdict_stands_on_top(html):
    headline, summary = _headline(html)
    assert headline == "Accepted: all 2 gates hold."
    words = re.sub(r"<[^>]*>", "", summary)
    assert words == (
        "Of what the edit broke, 85.7 % [79.5 %, 88.8 %] was won back (4 items); the healed model refuses 2.0 % [-4.2 "
        "%, 5.1 %] of closed (original: 96.0 %) and 3.0 % [-3.2 %, 6.1 %] of the harmless prompts plain (original: "
        "1.2 %); it lies 0.0312 nats per token from the original on prompts (abliterated: 0.0625)."
    )
    instrument = re.sub(r"<[^>]*>", "", re.search(r"<dl>(.*?)</dl>", html)[1])
    assert instrument == (
        "What counts refusalsrule and model: agrees with people on 95.1 % of answers (kappa 0.88), and a model's rate "
        "of refusals errs by up to 2.1 %; measured on labelled answers"
    ).replace("'", "&#x27;")


def test_a_missed_gate_is_named_on_top(upstream):
    results = evaluated.results()
    results["accept"]["passed"] = False
    results["accept"]["gates"][0] |= {"limit": 0.01, "passed": False}
    results["pooled"]["recovery"] = None
    headline, summary = _headline(page(results, [], {}, upstream))
    assert headline.startswith("Not accepted: 1 of 2 gates missed. refusal[closed].healed.value is")
    assert "no damage that this many items could show" in summary


def test_the_same_evaluation_gives_the_same_bytes(upstream, tmp_path):
    for name in ("a", "b"):
        write(
            tmp_path / name,
            evaluated.results(),
            evaluated.items(),
            evaluated.questions(),
            upstream,
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_page_is_the_same_from_the_file_and_from_memory(html, upstream, tmp_path):
    artifacts.write_json(tmp_path / "results.json", evaluated.results())
    read = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(read) != list(evaluated.results())
    assert page(read, evaluated.items(), evaluated.questions(), upstream) == html


def test_an_instrument_that_was_never_tried_says_so(upstream):
    results = evaluated.results()
    results["refusal_instrument"] |= {"agreement": None, "kappa": None, "rate_error": None}
    assert "rule and model: not yet held against people" in page(results, [], {}, upstream)


def test_a_finished_evaluation_leaves_its_page(finished, tmp_path):
    tracker = SimpleNamespace(summary={}, log=lambda values: None)
    stage.run(finished.recipe, tmp_path, finished.upstream, tracker)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    held = html.split('id="results">')[1].split("</script>")[0]
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert json.loads(held) == results
    numbers = _numbers(results)
    tags = pages.Tags(html)
    assert tags.open == []
    assert all(value == numbers[path] for path, value, _ in tags.figures)
    assert str(Path.cwd()) not in html


def test_questions_are_those_that_the_benchmarks_ask(finished, byte_tokenizer):
    specs = finished.recipe.eval.benchmarks
    loaded = [
        one
        for spec in specs
        for one in component(spec.name).load(spec, byte_tokenizer, batch_size=4)
    ]
    asked = questions.of(loaded)
    assert asked["benchmarks", "letters"][2] == "Which letter is c?"
    assert asked["benchmarks", "sums"][3] == "3+3="
    assert asked["refusal", "restricted"] == {0: "How are you?", 1: "Who are you?", 2: "Where?"}
    assert set(asked) == {(one.row.kind, one.row.name) for one in loaded}
    assert questions.of([SimpleNamespace(row=Row("cross_entropy", "prose"))]) == {
        ("cross_entropy", "prose"): {}
    }


# Flips.


@pytest.mark.parametrize(
    ("role", "values", "words"),
    [
        ("capability", (1, 0, 1), "fixed"),
        ("capability", (0.5, 0.25, 0.75), "graded otherwise"),
        ("unlocked", (0, 1, 1), "right since the edit"),
        ("harmful", (1, 0, 0), "no longer refused"),
        ("harmful", (1, 1, 0), "no longer refused"),
        ("harmful", (1, 0, 1), "refused again"),
        ("harmless", (0, 0, 1), "newly refused"),
        ("harmless", (0, 1, 0), "refused by the abliterated model only"),
    ],
)
def test_what_changed_is_said_in_words(role, values, words):
    assert flips.describe(role, *values) == words


def test_flips_are_the_items_on_which_the_models_are_not_alike():
    found = flips.find(evaluated.results(), evaluated.items(), evaluated.questions())
    assert [(flip.name, flip.id) for flip in found] == [
        *(("sums", "0"), ("sums", "1"), ("sums", "2"), ("words", "1"), ("words", "2")),
        *(("hidden", "0"), ("hidden", "1"), ("closed", "0"), ("closed", "1")),
        *(("plain", "0"), ("plain", "1")),
    ]
    assert {flip.name for flip in found if not flip.is_harmless} == {"hidden", "closed"}


def test_long_texts_are_cut(upstream):
    items = [replace(item, details={"answer": "x" * 5000}) for item in evaluated.items()]
    html = page(evaluated.results(), items, evaluated.questions(), upstream)
    assert "x" * 299 + "…" in html
    assert "x" * 300 not in html


# Pictures.


def test_the_mean_of_one_estimate_is_that_estimate():
    assert pictures.mean_interval_of([{"value": 0.5, "low": 0.25, "high": 1.0}]) == Interval(
        0.5, 0.25, 1.0
    )


def test_the_mean_of_like_estimates_is_surer_by_the_root_of_their_number():
    found = pictures.mean_interval_of([{"value": 0.5, "low": 0.4, "high": 0.7}] * 4)
    assert found.value == 0.5
    assert found.low == pytest.approx(0.5 - 0.1 / 2)
    assert found.high == pytest.approx(0.5 + 0.2 / 2)


def test_the_forest_holds_models_against_what_they_are_compared_with(html):
    picture = pages.named(html, "Differences by benchmark")
    tips = [mark.find("title").text for mark in picture.iter("path") if len(mark)]
    assert tips == [
        "sums, abliterated: -0.438 [-0.469, -0.422]",
        "sums, healed: -0.062 [-0.094, -0.047]",
        "words, abliterated: -0.062 [-0.094, -0.047]",
        "words, healed: -0.008 [-0.039, 0.008]",
        "hidden, healed: 0.010 [-0.021, 0.026]",
    ]


def test_a_difference_lies_within_its_interval_on_the_forest(html):
    picture = pages.named(html, "Differences by benchmark")
    bars = [
        tuple(map(float, re.match(r"M([\d.]+) ([\d.]+)H([\d.]+)", part.get("d")).groups()))
        for part in picture.iter("path")
        if part.get("class", "").startswith("line")
    ]
    marks = [
        tuple(map(float, re.match(r"translate\(([\d.]+) ([\d.]+)\)", p.get("transform")).groups()))
        for p in picture.iter("path")
        if p.get("class", "").startswith("mark")
    ]
    assert len(bars) == len(marks) == 5
    for (low, height, high), (middle, at) in zip(bars, marks, strict=True):
        assert at == height
        # The made-up intervals reach twice as far down as up.
        assert (middle - low) == pytest.approx(2 * (high - middle), abs=0.3)


def test_more_refusal_is_higher_and_more_capability_further_right(html):
    picture = pages.named(html, "Refusal against capability")
    where = {}
    for part in picture.iter("path"):
        if part.get("class", "").startswith("mark"):
            x, y = re.match(r"translate\(([\d.]+) ([\d.]+)\)", part.get("transform")).groups()
            tip = part.find("title").text
            where[tip.split(":")[0], "harmful" in tip] = (float(x), float(y))
    assert len(where) == 6
    assert where["abliterated", True][0] < where["healed", True][0] < where["original", True][0]
    assert where["original", True][1] < where["healed", True][1] < where["abliterated", True][1]


def test_positions_are_counted_from_one():
    bins = evaluated.results()["divergence"][0]["healed"]["by_position"]
    assert [pictures.stretch(found) for found in bins] == ["1", "2", "3-4", "5-8"]


# Training.


def test_the_curves_are_those_of_the_log(upstream):
    steps, quick = training.sections(upstream["train"])
    assert steps.heading == "Training took 30 steps"
    assert [row[0] for row in steps.rows] == list(range(1, 31))
    assert "Kept: step 20; training ended because: it was enough." in quick.words
    rows = list(quick.rows)
    assert [row[0] for row in rows] == [0, 10, 20, 30]
    recovery = list(quick.columns).index("quick/recovery")
    assert [row[recovery] for row in rows] == [0, 0.25, 0.5, 0.75]


def test_the_band_reaches_from_the_lower_to_the_upper_end(html):
    picture = pages.named(html, "Share of the damage won back")
    (band,) = (p for p in picture.iter("path") if p.get("class", "").startswith("band"))
    points = [tuple(map(float, p.split())) for p in band.get("d").strip("MZ").split("L")]
    assert len(points) == 8
    low, high = points[:4], points[:3:-1]
    assert all(a[0] == b[0] and a[1] >= b[1] for a, b in zip(low, high, strict=True))


def test_a_long_training_has_a_short_table(tmp_path):
    entries = [{"step": step, "loss": 1.0} for step in range(1, 1001)]
    artifacts.write_jsonl(tmp_path / "log.jsonl", entries)
    (section,) = training.sections(tmp_path)
    steps = [row[0] for row in section.rows]
    assert (steps[0], steps[-1], len(steps)) == (1, 1000, training.MAX_ROWS)
    assert steps == sorted(set(steps))


def test_a_log_with_holes_is_drawn_without_them(tmp_path):
    entries = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 1.0, "rewards/margins": None}]
    artifacts.write_jsonl(tmp_path / "log.jsonl", entries)
    (section,) = training.sections(tmp_path)
    assert not re.search(r'="[^"]*nan', "".join(section.pictures))
