"""Charts as SVG text: lines, points, heat maps and bars, with colours that the page's style sheet gives.

Numbers that are not finite are left out of lines and drawn as empty cells in heat maps. All text is escaped.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH: Final = 720
LEFT, RIGHT, TOP, BOTTOM = 92, 16, 24, 44
# Below a picture with slanted names.
SLANTED: Final = 118
# Text of 12 units that fits in front of a row.
MAX_NAME: Final = 9
# Colours of series in turn, and shapes of marks: classes of the style sheet.
NUM_COLOURS: Final = 6
Point = tuple[float, float]
# Small drawings within a circle of radius 3, which tell reasons apart without colour.
GLYPHS: Final = (
    "M-3-3L3 3M-3 3L3-3",
    "M-3 0H3",
    "M0-3V3",
    "M-3 3L3-3",
    "M-3-3L3 3",
    "M-3 0H3M0-3V3",
)


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Attributes:
        label: with its unit.
        low: where it begins.
        high: where it ends, above `low`.
        logarithmic: whether it shows powers of ten; then `low` is above 0.
        names: words that stand at 0, 1, 2... in place of numbers.
    """

    label: str
    low: float
    high: float
    logarithmic: bool = False
    names: tuple[str, ...] = ()

    def place(self, value: float) -> float:
        """Where a value lies, from 0 to 1; values beyond the ends lie at the ends."""
        if self.logarithmic:
            value = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            value = (value - self.low) / (self.high - self.low)
        return min(max(value, 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Round values to label."""
        if self.names:
            return [float(index) for index in range(len(self.names))]
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            return [10.0**power for power in range(first, last + 1)]
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * step for step in (1, 2, 5, 10) if power * step >= rough)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) for index in range(first, last + 1)]

    def text(self, tick: float) -> str:
        """The label of a tick."""
        return self.names[int(tick)] if self.names else number(tick)


def axis_over(
    label: str, values: Iterable[float], *, zero: bool = False, logarithmic: bool = False
) -> Axis:
    """An axis that all finite values fit on.

    Args:
        label: with its unit.
        values: what is shown along it.
        zero: whether it begins at 0 where no value is below.
        logarithmic: powers of ten; values of 0 and below then lie at its lower end.
    """
    finite = [value for value in values if math.isfinite(value)]
    if logarithmic:
        positive = [value for value in finite if value > 0] or [1e-3, 1.0]
        low = 10.0 ** math.floor(math.log10(min(positive)))
        high = 10.0 ** math.ceil(math.log10(max(positive)))
        return Axis(label, low, max(high, low * 10), logarithmic=True)
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        low, high = (low, low + 1) if zero else (low - 0.5, high + 0.5)
    return Axis(label, low, high)


class Chart:
    """A picture with two axes that lines, points and texts are put on."""

    def __init__(self, title: str, x: Axis, y: Axis, height: int = 260) -> None:
        """Begin with the axes.

        Args:
            title: what it shows, for those who cannot see it.
            x: from left to right.
            y: from bottom to top.
            height: in units of which `WIDTH` are the picture's width.
        """
        self.title, self.x, self.y, self.height = title, x, y, height
        self._parts: list[str] = []
        self._axes()

    def right(self, value: float) -> float:
        """The x coordinate of a value."""
        return LEFT + self.x.place(value) * (WIDTH - LEFT - RIGHT)

    def up(self, value: float) -> float:
        """The y coordinate of a value."""
        return self.height - BOTTOM - self.y.place(value) * (self.height - TOP - BOTTOM)

    def add(self, *parts: str) -> None:
        """Put SVG on the picture."""
        self._parts.extend(parts)

    def line(self, points: Sequence[Point], style: str) -> None:
        """A line through points, broken where one of them is not finite."""
        path, pen = [], "M"
        for x, y in points:
            if math.isfinite(x) and math.isfinite(y):
                path.append(f"{pen}{self.right(x):.1f} {self.up(y):.1f}")
                pen = "L"
            else:
                pen = "M"
        self.add(f'<path class="line {style}" d="{"".join(path)}"/>')

    def band(self, low: Sequence[Point], high: Sequence[Point], style: str) -> None:
        """The area between two lines over the same values of x."""
        pairs = zip(low, high, strict=True)
        whole = [pair for pair in pairs if all(math.isfinite(v) for point in pair for v in point)]
        if whole:
            around = [point for point, _ in whole] + [point for _, point in reversed(whole)]
            path = "L".join(f"{self.right(x):.1f} {self.up(y):.1f}" for x, y in around)
            self.add(f'<path class="band {style}" d="M{path}Z"/>')

    def dot(self, x: float, y: float, style: str, tip: str, radius: float = 3) -> None:
        """A point with a tip that shows under the pointer."""
        if math.isfinite(x) and math.isfinite(y):
            self.add(
                f'<circle class="dot {style}" cx="{self.right(x):.1f}" cy="{self.up(y):.1f}" r="{radius:g}">'
                f"<title>{escape(tip)}</title></circle>"
            )

    def ring(self, x: float, y: float) -> None:
        """A ring around the point that was chosen."""
        if math.isfinite(x) and math.isfinite(y):
            self.add(
                f'<circle class="chosen" cx="{self.right(x):.1f}" cy="{self.up(y):.1f}" r="8"/>'
            )

    def upright(self, x: float, text: str) -> None:
        """A dashed line across the picture at a value of x, with its meaning."""
        place = self.right(x)
        anchor, shift = ("end", -4) if place > WIDTH / 2 else ("start", 4)
        self.add(
            f'<path class="limit" d="M{place:.1f} {TOP - 18}V{self.height - BOTTOM}"/>',
            text_at(place + shift, TOP - 8, text, anchor),
        )

    def level(self, y: float, text: str) -> None:
        """A dashed line across the picture at a value of y, with its meaning."""
        place = self.up(y)
        self.add(
            f'<path class="limit" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>',
            text_at(WIDTH - RIGHT, place - 4, text, "end"),
        )

    def svg(self) -> str:
        """The picture."""
        return svg(self.title, self.height, self._parts)

    def _axes(self) -> None:
        bottom = self.height - BOTTOM
        for value in self.x.ticks():
            place = self.right(value)
            self.add(
                f'<path class="tick" d="M{place:.1f} {bottom}v4"/>',
                text_at(place, bottom + 16, self.x.text(value), "middle"),
            )
        for value in self.y.ticks():
            place = self.up(value)
            self.add(
                f'<path class="grid" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>',
                text_at(LEFT - 6, place + 4, self.y.text(value), "end"),
            )
        self.add(*axis_labels(self.x.label, self.y.label, self.height))


def svg(title: str, height: float, parts: Iterable[str]) -> str:
    """A picture of `WIDTH` by height units that scales with the page."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def text_at(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    """A line of text; anchor is start, middle or end."""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def axis_labels(x: str, y: str, height: float) -> list[str]:
    """The names of both axes."""
    middle = (height - BOTTOM + TOP) / 2
    turned = f"translate(12 {middle:.1f}) rotate(-90)"
    return [
        text_at((LEFT + WIDTH - RIGHT) / 2, height - 8, x, "middle", "name"),
        f'<text class="name" text-anchor="middle" transform="{turned}">{escape(y)}</text>',
    ]


def colour(index: int) -> str:
    """The class of a series' colour."""
    return f"c{index % NUM_COLOURS}"


def legend(entries: Mapping[str, str]) -> str:
    """Names beside their colours, by class; as HTML, which wraps on narrow pages."""
    items = "".join(
        f'<li><svg viewBox="0 0 14 10" aria-hidden="true"><path class="line {style}" d="M0 5H14"/></svg>'
        f"{escape(name)}</li>"
        for name, style in entries.items()
    )
    return f'<ul class="legend">{items}</ul>'


def number(value: float | None) -> str:
    """A number for people: three digits, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3g}"


@dataclass(frozen=True)
class Shade:
    """A colour scale: one colour from 0 upwards, or two from the middle in both directions.

    Attributes:
        reach: the value at which a colour is full.
        two_sided: whether values below 0 have a colour of their own.
        unit: what is written at the full colours.
    """

    reach: float
    two_sided: bool = False
    unit: str = ""

    def style(self, value: float) -> tuple[str, float]:
        """The class and the opacity of a value's cell."""
        name = "minus" if self.two_sided and value < 0 else "plus"
        share = abs(value) if self.two_sided else max(value, 0.0)
        return name, round(min(share / self.reach, 1.0), 2)

    def key(self) -> str:
        """The scale itself, as HTML."""
        shares = (-1, -0.5, 0, 0.5, 1) if self.two_sided else (0, 0.25, 0.5, 0.75, 1)
        items = []
        for share in shares:
            name, opacity = self.style(share * self.reach)
            items.append(
                f'<li><svg viewBox="0 0 14 10" aria-hidden="true"><rect class="cell {name}" width="14" height="10" '
                f'fill-opacity="{opacity:g}"/></svg>{number(share * self.reach)}</li>'
            )
        return f'<ul class="legend">{"".join(items)}<li>{escape(self.unit)}</li></ul>'


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map.

    Attributes:
        column: from 0.
        row: from 0.
        value: not finite: drawn as empty.
        tip: shows under the pointer.
        glyph: which of `GLYPHS` is drawn on it, or None.
    """

    column: int
    row: int
    value: float
    tip: str
    glyph: int | None = None


def heat_map(
    title: str,
    cells: Sequence[Cell],
    shade: Shade,
    x: str,
    y: str,
    num_columns: int,
    rows: Sequence[str],
    chosen: Point | None = None,
) -> str:
    """A heat map with few rows and a tip on every cell.

    Args:
        title: what it shows.
        cells: in any order.
        shade: of the values.
        x: name of the columns.
        y: name of the rows.
        num_columns: how many.
        rows: their names, from the top.
        chosen: column (a fraction lies between two) and row that are framed.
    """
    width, step = (WIDTH - LEFT - RIGHT) / num_columns, 22.0
    height = TOP + step * len(rows) + BOTTOM
    parts = []
    for cell in cells:
        left, top = LEFT + cell.column * width, TOP + cell.row * step
        parts.append(_cell(cell, left, top, width, step, shade))
        if cell.glyph is not None:
            place = f"translate({left + width / 2:.1f} {top + step / 2:.1f})"
            parts.append(
                f'<path class="glyph" transform="{place}" d="{GLYPHS[cell.glyph % len(GLYPHS)]}"/>'
            )
    if chosen is not None:
        left, top = LEFT + chosen[0] * width, TOP + chosen[1] * step
        parts.append(
            f'<rect class="chosen" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{step:g}"/>'
        )
    for index, name in enumerate(rows):
        short = name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
        parts.append(text_at(LEFT - 6, TOP + (index + 0.5) * step + 4, short, "end"))
    for column in _labelled(num_columns):
        middle = LEFT + (column + 0.5) * width
        parts.append(text_at(middle, TOP + step * len(rows) + 16, str(column), "middle"))
    return svg(title, height, [*parts, *axis_labels(x, y, height)])


def square_map(title: str, grid: Sequence[Sequence[float]], shade: Shade, label: str) -> str:
    """A heat map of every pair of the same things; cells of one colour share a path, however many there are."""
    size, side = len(grid), 440.0
    width, left = side / size, (WIDTH - side) / 2
    paths: dict[tuple[str, float], list[str]] = {}
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            name, opacity = shade.style(value) if math.isfinite(value) else ("missing", 1.0)
            place = f"M{left + column * width:.1f} {TOP + row * width:.1f}"
            # Opacity in steps of a twentieth: few paths, and no step that an eye could tell.
            paths.setdefault((name, round(opacity * 20) / 20), []).append(place)
    drawn = f"h{width:.2f}v{width:.2f}h-{width:.2f}z"
    parts = [
        f'<path class="cell {name}" fill-opacity="{opacity:g}" d="{"".join(p + drawn for p in places)}"/>'
        for (name, opacity), places in paths.items()
    ]
    for index in _labelled(size):
        middle = (index + 0.5) * width
        parts.append(text_at(left - 6, TOP + middle + 4, str(index), "end"))
        parts.append(text_at(left + middle, TOP + side + 16, str(index), "middle"))
    parts.append(text_at(left + side / 2, TOP + side + 36, label, "middle", "name"))
    turned = f"translate({left - 40:.1f} {TOP + side / 2:.1f}) rotate(-90)"
    parts.append(
        f'<text class="name" text-anchor="middle" transform="{turned}">{escape(label)}</text>'
    )
    return svg(title, TOP + side + BOTTOM, parts)


def histogram(title: str, x: str, y: str, groups: Mapping[str, Sequence[float]]) -> str:
    """How often values of each group occur, in bins that the groups share."""
    finite = {name: [v for v in values if math.isfinite(v)] for name, values in groups.items()}
    across = axis_over(x, [value for values in finite.values() for value in values])
    num_bins = 30
    counts = {name: [0] * num_bins for name in finite}
    for name, values in finite.items():
        for value in values:
            counts[name][min(int(across.place(value) * num_bins), num_bins - 1)] += 1
    most = [count for group in counts.values() for count in group]
    chart = Chart(title, across, axis_over(y, [0, *most], zero=True))
    width = (WIDTH - LEFT - RIGHT) / num_bins
    for index, group in enumerate(counts.values()):
        for place, count in enumerate(group):
            if count:
                top = chart.up(count)
                chart.add(
                    f'<rect class="bar {colour(index)}" x="{LEFT + place * width:.1f}" y="{top:.1f}" '
                    f'width="{width:.1f}" height="{chart.up(0) - top:.1f}"/>'
                )
    return chart.svg()


def parallel(
    title: str,
    axes: Mapping[str, Sequence[float | str | None]],
    styles: Sequence[str],
) -> str:
    """One line per item through its value on each of several upright axes.

    Args:
        title: what it shows.
        axes: for each axis by its name one value per item: numbers, words, or None for no value.
        styles: class of each item's line; later items lie on top.
    """
    height = 380
    bottom, texts, places = height - SLANTED, [], []
    step = (WIDTH - LEFT - 2 * RIGHT - 20) / max(len(axes) - 1, 1)
    for index, (name, values) in enumerate(axes.items()):
        left = LEFT + index * step
        words = sorted({value for value in values if isinstance(value, str)})
        numbers = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
        axis = axis_over("", numbers) if numbers else Axis("", -0.5, max(len(words) - 0.5, 0.5))
        ticks = (
            {w: i for i, w in enumerate(words)} if words else {number(v): v for v in axis.ticks()}
        )
        texts.append(f'<path class="tick" d="M{left:.1f} {TOP}V{bottom}"/>')
        for text, value in ticks.items():
            up = bottom - axis.place(value) * (bottom - TOP)
            texts.append(text_at(left - 4, up + 4, text, "end", "over"))
        # Slanted, since there may be a dozen axes with long names.
        texts.append(
            f'<text class="over" text-anchor="end" transform="translate({left + 4:.1f} {bottom + 14:.1f}) '
            f'rotate(-35)">{escape(name)}</text>'
        )
        places.append([_height(value, ticks, axis, words, bottom) for value in values])
    lines = []
    for item, style in enumerate(styles):
        points = [
            (LEFT + index * step, column[item])
            for index, column in enumerate(places)
            if column[item] is not None
        ]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        lines.append(f'<path class="line {style}" d="M{path}"/>' if points else "")
    return svg(title, height, [*lines, *texts])


def _height(
    value: float | str | None,
    ticks: Mapping[str, float],
    axis: Axis,
    words: Sequence[str],
    bottom: float,
) -> float | None:
    if value is None or isinstance(value, str) != bool(words):
        return None
    place = ticks[value] if isinstance(value, str) else float(value)
    return bottom - axis.place(place) * (bottom - TOP) if math.isfinite(place) else None


def _cell(cell: Cell, left: float, top: float, width: float, height: float, shade: Shade) -> str:
    name, opacity = shade.style(cell.value) if math.isfinite(cell.value) else ("missing", 1.0)
    return (
        f'<rect class="cell {name}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:g}" '
        f'fill-opacity="{opacity:g}"><title>{escape(cell.tip)}</title></rect>'
    )


def _labelled(count: int) -> range:
    """Which of many columns have their number written: every one, every second, fifth, tenth..."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if count / step <= 20)
    return range(0, count, step)
