"""The page of stage one shows the numbers it is given, to everybody, and needs nothing else.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_report.py
"""

import math
import re
from dataclasses import replace
from html import unescape

import pytest

from abliteration.report import Report, Residual, Scored, Search, Trial, page, write
from tests import pages

NUM_LAYERS, NUM_POSITIONS = 6, 3
NASTY = "a <b> & \"c\" 'd' </svg><script>"


def _scores():
    for layer in range(NUM_LAYERS):
        for position in range(-NUM_POSITIONS, 0):
            if layer == 0:
                yield Scored(layer, position, dropped="no difference between the prompt sets")
            else:
                kl = 0.01 * layer
                dropped = "kl above max_kl" if layer > 4 else None
                yield Scored(layer, position, -3.0 + layer, 2.5, kl, dropped)


TRIALS = (
    Trial(0, 0.5, 0.001, 0.7, {"layer": 2.0, "edit": "orthogonalize"}),
    Trial(1, 0.0, 0.2, None, {"layer": 3.5, "edit": "projected"}),
    Trial(2, 0.0, 0.034567, 0.0123, {"layer": 2.5, "edit": "projected"}),
    Trial(3, 0.6, 0.5, None, {"layer": 1.0, "edit": "orthogonalize"}),
    Trial(4, 0.9, None, None, {"layer": 1.5, "edit": "projected"}),
)
FULL = Report(
    name="run",
    model="some/model",
    layer=2.5,
    position=-1,
    norms=[
        [float(10 * layer + position) for position in range(NUM_POSITIONS)]
        for layer in range(NUM_LAYERS)
    ],
    tokens=["<|end|>", "<|assistant|>", "\n"],
    relative=[[0.01 * layer] * NUM_POSITIONS for layer in range(NUM_LAYERS)],
    cosines=[[1 - abs(a - b) / 5 for a in range(NUM_LAYERS)] for b in range(NUM_LAYERS)],
    separation=[math.nan, 1.0, 3.0, 4.0, 2.0, 1.0],
    projections={"harmful": [4.0, 5.0, 4.5], "harmless": [0.0, -1.0, 0.5]},
    scores=tuple(_scores()),
    max_kl=0.1,
    search=Search(TRIALS, chosen=2, max_refusal=0.02),
    strengths={"attention": {0: 0.0, 1: 0.7654}, "mlp": {0: 1.0, 1: 0.5}},
    residuals=(
        Residual("model.embed_tokens", "embedding", None, 0.0),
        Residual("model.layers.1.mlp.down_proj", "mlp", 1, 0.000432),
    ),
    left_alone={"model.other": "tied to the unembedding"},
    noise_floor=3.21e-05,
    facts={"Edit": "column_norm"},
)
FIXED = Report(name="run", model="some/model", layer=1, position=-1, norms=[[0.0], [2.0]])
SMALLEST = Report(name="run", model="some/model", layer=0, position=-1, norms=[[math.nan]])
REPORTS = {
    "everything": FULL,
    "fixed selection": FIXED,
    "one layer and one position, not a number": SMALLEST,
    "nothing finite": replace(
        FULL,
        relative=(),
        norms=[[math.nan] * NUM_POSITIONS] * NUM_LAYERS,
        separation=[math.nan] * NUM_LAYERS,
        cosines=[[math.nan] * NUM_LAYERS] * NUM_LAYERS,
        projections={"harmful": [math.nan], "harmless": [math.inf]},
        scores=[Scored(1, -1, math.nan, math.nan, math.inf, "a score is not finite")],
        search=Search([Trial(0, math.nan, math.nan, math.nan, {"layer": math.nan})], 0, 0.0),
        residuals=[Residual("w", "mlp", 0, math.nan)],
        noise_floor=math.nan,
    ),
    "no trial measured whole": replace(FULL, search=Search([Trial(0, 0.9, None)], 0, 0.0)),
    "one trial, all of it 0": replace(
        FULL, search=Search([Trial(0, 0.0, 0.0, 0.0, {"a": 0.0, "b": 0})], 0, 0.0), noise_floor=0.0
    ),
}


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_every_picture_is_sound_xml_within_a_sound_page(report):
    html = page(report)
    assert pages.pictures(html)
    tags = pages.Tags(html)
    assert tags.open == []
    assert len(tags.ids) == len(set(tags.ids))
    assert all(link[1:] in tags.ids for link in tags.links)


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_no_number_in_a_picture_is_nan_or_infinite(report):
    for picture in pages.pictures(page(report)):
        for part in picture.iter():
            for name in ("d", "x", "y", "cx", "cy", "width", "height", "transform"):
                assert not re.search(r"nan|inf", part.get(name, "")), (name, part.attrib)


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_the_page_needs_no_network_and_no_script(report):
    html = page(report)
    assert not re.search(r"http|//|url\(|@import|<script|<link|<img|src=", html)


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_who_cannot_see_the_pictures_has_names_and_tables(report):
    html = page(report)
    for picture in pages.pictures(html):
        assert picture.get("aria-label") or picture.get("aria-hidden") == "true"
    assert html.count("<section") == html.count("<details>") == html.count("<table>")
    assert html.count("<h1>") == 1
    assert 'lang="en"' in html


def test_all_text_is_escaped():
    html = page(
        replace(
            FULL,
            name=NASTY,
            model=NASTY,
            tokens=[NASTY] * NUM_POSITIONS,
            scores=[Scored(1, -1, 1.0, 1.0, 1.0, NASTY)],
            search=Search([Trial(0, 0.0, 0.1, 0.0, {NASTY: NASTY, "b": 1.0})], 0, 0.1),
            strengths={NASTY: {0: 1.0}},
            residuals=[Residual(NASTY, NASTY, 0, 0.1)],
            left_alone={NASTY: NASTY},
            projections={NASTY: [1.0, 2.0]},
            facts={NASTY: NASTY},
        )
    )
    assert "<b>" not in html
    assert "<script" not in html
    assert unescape(html).count(NASTY) > 12
    assert pages.pictures(html)


def test_both_colour_schemes_have_the_same_colours():
    html = page(FIXED)
    light, dark = re.findall(r":root\{(.*?)\}", html, re.DOTALL)
    names = [set(re.findall(r"--[\w]+(?=:)", text)) for text in (light, dark)]
    assert names[0] == names[1]
    assert set(re.findall(r"var\((--[\w]+)\)", html)) <= names[0]


@pytest.mark.parametrize(
    "shown",
    [
        "layer 2.5, position -1 &#x27;\\n&#x27;",
        "3.21e-05 nats",
        "0.0346 nats per token",
        "<td>0.765</td>",
        "<td>0.000432</td>",
        "<td>kl above max_kl</td>",
        "kl above max_kl (3)",
        "no difference between the prompt sets (3)",
        "12 of 18 candidates passed",
        "<code>model.other</code>: tied to the unembedding",
        "column_norm",
        "lie 3.5 standard deviations apart",
        "The prompt sets differ most at layer 5",
        "The largest residual is 0.000432, in model.layers.1.mlp.down_proj",
        "attention of block 1: 0.765",
        "trial 2: refusal 0, KL 0.0346; layer 2.5, edit projected",
        "leaves 1.2% refusals at 0.0346 nats",
        "1 setting(s) still refused",
    ],
)
def test_the_numbers_are_on_the_page(shown):
    assert shown in page(FULL)


def test_what_was_not_done_is_not_shown():
    html = page(FIXED)
    assert re.findall(r'<section id="(\w+)"', html) == ["difference"]
    assert "Noise floor" not in html


def test_the_chosen_cell_is_framed_between_its_layers():
    picture = pages.named(page(FULL), "bypass")
    (frame,) = (part for part in picture.iter("rect") if part.get("class") == "chosen")
    cells = [part for part in picture.iter("rect") if "cell" in part.get("class")]
    tops = {part.get("y") for part in cells if "position -1:" in part.find("title").text}
    assert tops == {frame.get("y")}
    left = {
        int(re.search(r"layer (\d)", part.find("title").text)[1]): float(part.get("x"))
        for part in cells
    }
    assert float(frame.get("x")) == pytest.approx((left[2] + left[3]) / 2, abs=0.1)


def test_dropped_cells_carry_the_mark_of_their_reason():
    picture = pages.named(page(FULL), "bypass")
    marks = [part.get("d") for part in picture.iter("path") if part.get("class") == "glyph"]
    assert len(marks) == 6
    assert len(set(marks)) == 2


def test_cells_without_a_score_are_told_from_cells_with_one():
    picture = pages.named(page(FULL), "kl")
    empty = [part for part in picture.iter("rect") if part.get("class") == "cell missing"]
    assert [re.match(r"layer 0", part.find("title").text) is not None for part in empty] == [
        True,
        True,
        True,
    ]


def test_the_front_is_what_no_trial_beats_in_both():
    rows = re.findall(r"<tr><td>(\d)</td>(?:<td>[^<]*</td>){3}<td>(yes|no)</td>", page(FULL))
    assert rows == [("0", "yes"), ("1", "no"), ("2", "yes"), ("3", "no"), ("4", "no")]


def test_the_ring_is_around_the_chosen_trial():
    picture = pages.named(page(FULL), "Refusal against divergence")
    (ring,) = (part for part in picture.iter("circle") if part.get("class") == "chosen")
    dots = [p for p in picture.iter("circle") if (p.find("title") is not None)]
    (dot,) = (part for part in dots if part.find("title").text.startswith("trial 2:"))
    assert (ring.get("cx"), ring.get("cy")) == (dot.get("cx"), dot.get("cy"))
    # Trial 4 has no divergence, so it has no place.
    assert len(dots) == 4


def test_a_large_model_gives_a_page_of_moderate_size():
    layers = 80
    html = page(
        replace(
            FIXED,
            norms=[[1.0] * 10] * layers,
            cosines=[[math.cos(a - b) for a in range(layers)] for b in range(layers)],
            scores=[Scored(a, -b, 1.0, 1.0, 0.1) for a in range(layers) for b in range(1, 11)],
        )
    )
    assert len(html) < 1_500_000


def test_the_same_report_gives_the_same_file(tmp_path):
    write(tmp_path / "a.html", FULL)
    write(tmp_path / "b.html", FULL)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == page(FULL)
