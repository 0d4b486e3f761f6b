"""The arithmetic of the charts.

Run: .venv/bin/python -m pytest tests/unit/common/test_charts.py
"""

import itertools
import math
import re
from xml.etree import ElementTree

import pytest

from common import charts
from common.charts import Axis, Cell, Chart, Shade, axis_over


@pytest.mark.parametrize(
    ("axis", "value", "expected"),
    [
        (Axis("", 0, 10), 2.5, 0.25),
        (Axis("", 0, 10), 12, 1.0),
        (Axis("", -1, 1), 0, 0.5),
        (Axis("", 0.01, 100, logarithmic=True), 1, 0.5),
        (Axis("", 0.01, 100, logarithmic=True), 0, 0.0),
    ],
)
def test_values_lie_in_proportion_on_an_axis(axis, value, expected):
    assert axis.place(value) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 31), (-7.3, 2.1), (1e-6, 3e-6), (12345, 98765), (0, 0.02)]
)
def test_ticks_are_few_round_and_inside(low, high):
    ticks = Axis("", low, high).ticks()
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    steps = {round((b - a) / (high - low), 6) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1


def test_an_axis_holds_all_finite_values():
    values = [3.0, math.nan, -2.0, math.inf]
    axis = axis_over("", values)
    assert (axis.low, axis.high) == (-2.0, 3.0)
    assert axis_over("", [5.0], zero=True).low == 0
    logarithmic = axis_over("", [0.003, 20.0, 0.0], logarithmic=True)
    assert (logarithmic.low, logarithmic.high) == (0.001, 100)


def test_a_line_breaks_where_there_is_no_number():
    chart = Chart("", Axis("", 0, 3), Axis("", 0, 1))
    chart.line([(0, 0), (1, math.nan), (2, 1), (3, 1)], "strong")
    (line,) = (
        part
        for part in ElementTree.fromstring(chart.svg()).iter("path")
        if "line" in part.get("class")
    )
    assert re.sub(r"[\d. ]", "", line.get("d")) == "MML"


def test_up_is_more():
    chart = Chart("", Axis("", 0, 1), Axis("", 0, 1))
    assert chart.up(1) < chart.up(0)
    assert chart.right(1) > chart.right(0)


def test_a_shade_is_stronger_for_more_and_tells_signs_apart():
    two_sided = Shade(2.0, two_sided=True)
    assert two_sided.style(1.0) == ("plus", 0.5)
    assert two_sided.style(-1.0) == ("minus", 0.5)
    assert Shade(2.0).style(9.0) == ("plus", 1.0)
    assert Shade(2.0).style(-1.0) == ("plus", 0.0)


def test_bars_are_as_high_as_their_counts():
    picture = ElementTree.fromstring(
        charts.histogram("", "x", "y", {"a": [0.0] * 6 + [1.0] * 3, "b": [0.5, math.nan]})
    )
    heights = [float(bar.get("height")) for bar in picture.iter("rect")]
    assert heights[0] == pytest.approx(2 * heights[1], rel=0.01)
    assert heights[0] == pytest.approx(6 * heights[2], rel=0.01)


def test_every_cell_of_a_square_map_is_drawn_once():
    size = 5
    grid = [[(a - b) / size for a in range(size)] for b in range(size)]
    picture = ElementTree.fromstring(charts.square_map("", grid, Shade(1, two_sided=True), "x"))
    drawn = "".join(part.get("d") for part in picture.iter("path"))
    assert drawn.count("M") == size * size
    assert len(set(re.findall(r"M([\d.]+ [\d.]+)", drawn))) == size * size


def test_a_heat_map_puts_cells_in_their_column_and_row():
    cells = [Cell(0, 0, 1.0, "a"), Cell(1, 0, 1.0, "b"), Cell(0, 1, 1.0, "c")]
    picture = ElementTree.fromstring(
        charts.heat_map("", cells, Shade(1), "x", "y", 2, ["one", "two"])
    )
    a, b, c = (part for part in picture.iter("rect"))
    assert float(b.get("x")) == pytest.approx(float(a.get("x")) + float(a.get("width")), abs=0.2)
    assert a.get("y") == b.get("y")
    assert float(c.get("y")) == pytest.approx(float(a.get("y")) + float(a.get("height")))


def test_an_axis_of_words_has_one_tick_for_each():
    axis = Axis("", -0.5, 2.5, names=("one", "two", "three"))
    assert [axis.text(tick) for tick in axis.ticks()] == ["one", "two", "three"]
    assert axis.place(1) == pytest.approx(0.5)
    assert Axis("", 0, 1).text(0.25) == "0.25"


def test_a_band_goes_along_one_line_and_back_along_the_other():
    chart = Chart("", Axis("", 0, 2), Axis("", 0, 1))
    low, high = [(0, 0), (1, math.nan), (2, 0)], [(0, 1), (1, 1), (2, 1)]
    chart.band(low, high, "c0")
    (band,) = re.findall(r'class="band c0" d="M([^"]*)Z"', chart.svg())
    points = [tuple(map(float, point.split())) for point in band.split("L")]
    corners = [(0, 0), (2, 0), (2, 1), (0, 1)]
    assert points == [(round(chart.right(x), 1), round(chart.up(y), 1)) for x, y in corners]
    chart.band([(0, math.nan)], [(0, 1)], "c1")
    assert "band c1" not in chart.svg()
