"""What stage one found and did, as one HTML page that needs nothing else: no network, no script, no font.

Every picture is drawn from plain numbers, has a heading that says what is in it, and its numbers as a table.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from common import artifacts, webpage
from common.charts import (
    GLYPHS,
    Axis,
    Cell,
    Chart,
    Shade,
    axis_over,
    colour,
    heat_map,
    histogram,
    legend,
    number,
    parallel,
    square_map,
)
from common.webpage import Section

Grid = Sequence[Sequence[float]]
# Residuals of 0 are drawn here, and the scale begins here at the latest.
SMALLEST_RESIDUAL = 1e-9
# Divergences below it are rounding, even in float64.
SMALLEST_KL = 1e-12


@dataclass(frozen=True)
class Scored:
    """A candidate with its scores; see `abliteration.selection` for their meaning.

    Attributes:
        layer: the block whose input it was measured at.
        position: from the end of the prompt, -1 the last token.
        bypass: mean refusal score (log-odds) on harmful prompts while it is removed; None: not scored.
        induce: the same on harmless prompts while it is added.
        kl: divergence on harmless prompts, nats.
        dropped: why it could not be chosen, or None.
    """

    layer: int
    position: int
    bypass: float | None = None
    induce: float | None = None
    kl: float | None = None
    dropped: str | None = None


@dataclass(frozen=True)
class Trial:
    """One setting that a search tried; see `abliteration.search.Trial`.

    Attributes:
        number: from 0, in the order they were tried.
        refusal: mean probability that an answer to a harmful prompt begins as a refusal.
        kl: divergence on harmless answers, nats per token; None: not measured, it still refused.
        rate: share of the harmful prompts that are refused in full answers; None: not measured, off the front.
        settings: the setting itself, numbers and words by name.
        complete: whether it was measured on all prompts.
    """

    number: int
    refusal: float
    kl: float | None
    rate: float | None = None
    settings: Mapping[str, float | str] = field(default_factory=dict)
    complete: bool = True

    @property
    def divergence(self) -> float:
        """`kl`, or nan."""
        return math.nan if self.kl is None else self.kl


@dataclass(frozen=True)
class Search:
    """A search with its result.

    Attributes:
        trials: all of them.
        chosen: number of the trial that was taken.
        max_refusal: the refusal rate that it was to stay below.
    """

    trials: Sequence[Trial]
    chosen: int
    max_refusal: float


@dataclass(frozen=True)
class Residual:
    """What one writer still writes along the removed direction.

    Attributes:
        writer: its name.
        component: embedding, attention or mlp.
        block: its number; None for the embedding.
        share: of what it wrote before.
    """

    writer: str
    component: str
    block: int | None
    share: float


@dataclass(frozen=True)
class Report:
    """What the page shows. Parts that are empty or None are left out.

    Attributes:
        name: of the run.
        model: name of the model.
        layer: the chosen layer; a fraction lies between two.
        position: the chosen position, from the end of the prompt.
        norms: length of each candidate direction [layers, positions]; the last position is -1.
        tokens: text of the template's token at each position, or nothing.
        relative: the same difference relative to the length of the means [layers, positions].
        cosines: between the layers' directions at the chosen position [layers, layers].
        separation: d' of the prompt sets along each layer's direction at that position [layers].
        projections: of harmful and of harmless prompts at the chosen place, by the name of the set.
        scores: every candidate, if they were scored.
        max_kl: divergence above which a candidate was dropped.
        search: if there was one.
        strengths: strength of the edit by component, by block.
        residuals: of every edited writer.
        left_alone: writers that were not edited, with the reason.
        noise_floor: divergence of the model from itself in other batches, nats.
        facts: further lines for the head of the page, by their names.
    """

    name: str
    model: str
    layer: float
    position: int
    norms: Grid
    tokens: Sequence[str] = ()
    relative: Grid = ()
    cosines: Grid = ()
    separation: Sequence[float] = ()
    projections: Mapping[str, Sequence[float]] = field(default_factory=dict)
    scores: Sequence[Scored] = ()
    max_kl: float | None = None
    search: Search | None = None
    strengths: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    residuals: Sequence[Residual] = ()
    left_alone: Mapping[str, str] = field(default_factory=dict)
    noise_floor: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def positions(self) -> list[int]:
        """Positions of the columns of `norms`."""
        count = len(self.norms[0])
        return list(range(-count, 0))

    def place(self, position: int) -> str:
        """A position with its token."""
        index = position + len(self.positions)
        return f"{position} {self.tokens[index]!r}" if self.tokens else str(position)


def write(path: Path, report: Report) -> None:
    """Write the page; the same report gives the same bytes."""
    artifacts.write_text(path, page(report))


def page(report: Report) -> str:
    """The page as HTML."""
    sections = [*_differences(report), *_scores(report), *_search(report), *_edit(report)]
    body = [webpage.html(part) for part in sections]
    title = f"{report.name}: abliteration"
    header = (
        f"<header><h1>{escape(title)}</h1><p>{escape(report.model)}</p>{_facts(report)}"
        f"{webpage.contents(body)}</header>"
    )
    return webpage.page(title, header, body)


def _facts(report: Report) -> str:
    facts = {
        "Chosen": f"layer {report.layer:g}, position {report.place(report.position)}",
        **{name: text for name, text in _outcome(report).items()},
        **report.facts,
    }
    return webpage.facts(facts)


def _outcome(report: Report) -> dict[str, str]:
    facts = {}
    if report.search is not None:
        trial = _chosen_trial(report.search)
        facts["Refusals left"] = f"{_percent(trial.rate)} of the validation prompts"
        facts["Divergence"] = f"{number(trial.kl)} nats per token"
    if report.noise_floor is not None:
        facts["Noise floor"] = f"{number(report.noise_floor)} nats: the same model in other batches"
    if report.residuals:
        facts["Largest residual"] = number(max(residual.share for residual in report.residuals))
        facts["Writers edited"] = str(len(report.residuals))
    return facts


def _differences(report: Report) -> Iterable[Section]:
    yield _norms(report)
    if report.separation:
        yield _separation(report)
    if report.cosines:
        yield _cosines(report)


def _norms(report: Report) -> Section:
    relative = bool(report.relative)
    shown, unit = (
        (report.relative, "share of the means' length")
        if relative
        else (report.norms, "residual stream")
    )
    layers = Axis("Layer (input of the block)", 0, max(len(shown) - 1, 1))
    values = [value for row in shown for value in row]
    chart = Chart(
        "Length of the difference between the prompt sets, by layer and position",
        layers,
        axis_over(f"Difference ({unit})", values, zero=True),
    )
    names = {}
    for index, position in enumerate(report.positions):
        style = "faint" if position != report.position else "strong"
        names[f"position {report.place(position)}"] = style
        points = [(float(layer), row[index]) for layer, row in enumerate(shown)]
        if len(points) == 1:
            chart.dot(*points[0], style, number(points[0][1]))
        if position != report.position:
            chart.line(points, style)
    chosen = [(float(layer), row[report.position]) for layer, row in enumerate(shown)]
    chart.line(chosen, "strong")
    chart.upright(report.layer, f"layer {report.layer:g}")
    others = {"other positions": "faint"} if len(report.positions) > 1 else {}
    rows = (
        (layer, report.place(position), report.norms[layer][index], *extra)
        for layer in range(len(report.norms))
        for index, position in enumerate(report.positions)
        for extra in [(report.relative[layer][index],) if relative else ()]
    )
    return Section(
        "difference",
        _peak_in_words(chosen, report.position),
        "One line per position behind the user's words. A direction can be read where the line has risen "
        "well above its beginning.",
        [
            chart.svg()
            + legend({f"position {report.place(report.position)} (chosen)": "strong", **others})
        ],
        ["Layer", "Position", "Length", *(["Relative"] if relative else [])],
        rows,
    )


def _separation(report: Report) -> Section:
    points = [(float(layer), value) for layer, value in enumerate(report.separation)]
    chart = Chart(
        "Separation of the prompt sets along each layer's direction",
        Axis("Layer (input of the block)", 0, max(len(points) - 1, 1)),
        axis_over("d' (standard deviations)", report.separation, zero=True),
    )
    chart.line(points, "strong")
    for x, y in points:
        chart.dot(x, y, "strong", f"layer {x:g}: d' {number(y)}")
    chart.upright(report.layer, f"layer {report.layer:g}")
    pictures = [chart.svg()]
    if report.projections:
        pictures.append(
            histogram(
                f"Projections of both prompt sets on the direction of layer {report.layer:g}",
                "Component along the direction (residual stream)",
                "Prompts",
                report.projections,
            )
            + legend({name: colour(index) for index, name in enumerate(report.projections)})
        )
    return Section(
        "separation",
        f"The prompt sets lie {number(_at(report.separation, report.layer))} standard deviations apart "
        "where the direction was taken",
        "How well each layer's direction tells the two sets apart. Below about 2 they overlap, and the direction "
        "holds little but noise; two hills that hardly touch are what one hopes for.",
        pictures,
        ["Layer", "d'"],
        enumerate(report.separation),
    )


def _cosines(report: Report) -> Section:
    shade = Shade(1.0, two_sided=True, unit="cosine")
    picture = square_map(
        f"Cosine between the directions of every two layers at position {report.position}",
        report.cosines,
        shade,
        "Layer (input of the block)",
    )
    return Section(
        "cosine",
        f"How alike the layers' directions are at position {report.position}",
        "A bright block along the diagonal is a stretch of layers that share one direction: one vector removes "
        "refusal in all of them. Cells without colour are at right angles.",
        [picture + shade.key()],
        ["Layer", *(str(layer) for layer in range(len(report.cosines)))],
        ((layer, *row) for layer, row in enumerate(report.cosines)),
    )


def _scores(report: Report) -> Iterable[Section]:
    if not any(score.bypass is not None for score in report.scores):
        return
    reasons = list(dict.fromkeys(s.dropped for s in report.scores if s.dropped))
    pictures = [
        _score_map(report, reasons, "bypass", "refusal left while it is removed (log-odds)"),
        _score_map(report, reasons, "induce", "refusal caused by adding it (log-odds)"),
        _score_map(report, reasons, "kl", "divergence on harmless prompts (nats)"),
    ]
    left = sum(score.dropped is None for score in report.scores)
    yield Section(
        "scores",
        f"{left} of {len(report.scores)} candidates passed the filters; the framed one was chosen",
        "Wanted: little refusal left, much refusal caused, little divergence. Marks say why a candidate was "
        "dropped.",
        [*pictures, _reasons(report, reasons)],
        ["Layer", "Position", "Bypass", "Induce", "KL", "Dropped"],
        (
            (s.layer, report.place(s.position), s.bypass, s.induce, s.kl, s.dropped)
            for s in report.scores
        ),
    )


def _score_map(report: Report, reasons: Sequence[str], name: str, meaning: str) -> str:
    values = [
        getattr(s, name)
        for s in report.scores
        if getattr(s, name) is not None and math.isfinite(getattr(s, name))
    ]
    reach = max((abs(value) for value in values), default=1.0) or 1.0
    if name == "kl" and report.max_kl is not None:
        reach = min(reach, 4 * report.max_kl)  # one outlier would leave the rest without colour
    shade = Shade(reach, two_sided=name != "kl", unit=meaning)
    cells = []
    for score in report.scores:
        value = getattr(score, name)
        row = -1 - score.position
        tip = f"layer {score.layer}, position {score.position}: {name} {number(value)}"
        tip += f", dropped: {score.dropped}" if score.dropped else ""
        glyph = reasons.index(score.dropped) if score.dropped else None
        cells.append(Cell(score.layer, row, math.nan if value is None else value, tip, glyph))
    picture = heat_map(
        f"{name}: {meaning}",
        cells,
        shade,
        "Layer (input of the block)",
        "Position",
        len(report.norms),
        [report.place(position) for position in reversed(report.positions)],
        (report.layer, -1 - report.position),
    )
    return f"<h3>{escape(name)}: {escape(meaning)}</h3>{picture}{shade.key()}"


def _reasons(report: Report, reasons: Sequence[str]) -> str:
    items = []
    for index, reason in enumerate(reasons):
        count = sum(score.dropped == reason for score in report.scores)
        glyph = GLYPHS[index % len(GLYPHS)]
        items.append(
            f'<li><svg viewBox="-7 -5 14 10" aria-hidden="true"><path class="glyph" d="{glyph}"/></svg>'
            f"{escape(reason)} ({count})</li>"
        )
    return f'<ul class="legend" aria-label="Why candidates were dropped">{"".join(items)}</ul>'


def _search(report: Report) -> Iterable[Section]:
    if report.search is None:
        return
    search, best = report.search, _chosen_trial(report.search)
    front = {trial.number for trial in _front(search.trials)}
    out = sum(trial.kl is None for trial in search.trials)
    beaten = len(search.trials) - out - sum(trial.complete for trial in search.trials)
    names = list(dict.fromkeys(name for trial in search.trials for name in trial.settings))
    pictures = [_front_picture(report, search, front), _history(search, front)]
    if len(names) > 1:
        pictures.append(_settings_picture(search, names, front))
    yield Section(
        "search",
        f"{len(search.trials)} settings were tried; the chosen one leaves {_percent(best.rate)} refusals at "
        f"{number(best.kl)} nats",
        f"Of the settings on the front, which none is better than in both measures, the one that diverges least was "
        f"to be taken among those that refuse at most {search.max_refusal:.1%} of the harmful prompts. "
        f"{out} setting(s) still refused so often that nothing else was measured of them; {beaten} were beaten by "
        "far on the first few prompts, and measured on those alone.",
        pictures,
        ["Trial", "Begins as refusal", "KL", "Refusal rate", "On the front", *names],
        (
            (
                trial.number,
                trial.refusal,
                trial.kl,
                trial.rate,
                "yes" if trial.number in front else "no",
                *(trial.settings.get(name) for name in names),
            )
            for trial in search.trials
        ),
    )


def _front_picture(report: Report, search: Search, front: set[int]) -> str:
    floor = [value for value in [report.noise_floor] if value and math.isfinite(value)]
    chart = Chart(
        "Refusal against divergence of every trial",
        axis_over(
            "Divergence on harmless answers (nats per token)",
            [*(trial.divergence for trial in search.trials), *floor],
            logarithmic=True,
        ),
        axis_over(
            "Answers begin as refusals (probability)",
            [trial.refusal for trial in search.trials if trial.kl is not None],
            zero=True,
        ),
        height=320,
    )
    if floor:
        chart.upright(floor[0], "noise floor")
    chart.line([(trial.divergence, trial.refusal) for trial in _front(search.trials)], "strong")
    for trial in search.trials:
        style = "c0" if trial.number in front else "c1"
        chart.dot(trial.divergence, trial.refusal, style, _tip(trial))
    chosen = _chosen_trial(search)
    chart.ring(chosen.divergence, chosen.refusal)
    keys = legend({"on the front": "c0", "other trials": "c1", "front": "strong"})
    return (
        f"<h3>Low and to the left is better; the ring is the chosen setting</h3>{chart.svg()}"
        f'<div class="dots">{keys}</div>'
    )


def _history(search: Search, front: set[int]) -> str:
    chosen = _chosen_trial(search)
    chart = Chart(
        "Divergence of every trial in the order they were tried",
        Axis("Trial", 0, max((trial.number for trial in search.trials), default=1) or 1),
        axis_over(
            "Divergence (nats per token)",
            [trial.divergence for trial in search.trials],
            logarithmic=True,
        ),
        height=220,
    )
    best, line = math.inf, []
    for trial in sorted(search.trials, key=lambda trial: trial.number):
        if trial.refusal <= chosen.refusal and trial.divergence < best:
            best = trial.divergence
        line.append((float(trial.number), best))
        style = "c0" if trial.number in front else "c1"
        chart.dot(trial.number, trial.divergence, style, _tip(trial))
    chart.line(line, "strong")
    chart.ring(chosen.number, chosen.divergence)
    best_name = "least so far, at no more refusal than the chosen"
    keys = legend({"on the front": "c0", "other trials": "c1", best_name: "strong"})
    return (
        f"<h3>The search is done where the line has long been flat</h3>{chart.svg()}"
        f'<div class="dots">{keys}</div>'
    )


def _settings_picture(search: Search, names: Sequence[str], front: set[int]) -> str:
    order = sorted(
        search.trials, key=lambda trial: (trial.number == search.chosen, trial.number in front)
    )
    axes: dict[str, Sequence[float | str | None]] = {
        name: [trial.settings.get(name) for trial in order] for name in names
    }
    axes |= {
        "refusal": [trial.refusal for trial in order],
        "log10 KL": [_log10(trial.kl) for trial in order],
    }
    styles = [
        "strong" if t.number == search.chosen else "c1" if t.number in front else "faint"
        for t in order
    ]
    picture = parallel("Settings of every trial, one line each", axes, styles)
    keys = legend({"chosen": "strong", "on the front": "c1", "other trials": "faint"})
    return f"<h3>Where the lines of the front meet, a setting matters</h3>{picture}{keys}"


def _edit(report: Report) -> Iterable[Section]:
    if report.strengths:
        yield _strengths(report)
    if report.residuals:
        yield _residuals(report)


def _strengths(report: Report) -> Section:
    blocks = sorted({block for by_block in report.strengths.values() for block in by_block})
    values = [value for by_block in report.strengths.values() for value in by_block.values()]
    chart = Chart(
        "Strength of the edit by block and component",
        Axis("Block", 0, max(len(report.norms) - 1, 1)),
        axis_over("Strength (1 removes all)", values, zero=True),
        height=220,
    )
    for index, (component, by_block) in enumerate(report.strengths.items()):
        chart.line([(float(b), by_block.get(b, math.nan)) for b in blocks], colour(index))
        for block, value in by_block.items():
            tip = f"{component} of block {block}: {number(value)}"
            chart.dot(block, value, colour(index), tip, radius=2)
    components = list(report.strengths)
    return Section(
        "strength",
        "How strongly each block was edited",
        "A strength of 1 removes all of the direction from what the block writes, 0 leaves it as it was.",
        [chart.svg() + legend({name: colour(index) for index, name in enumerate(components)})],
        ["Block", *components],
        ((block, *(report.strengths[c].get(block) for c in components)) for block in blocks),
    )


def _residuals(report: Report) -> Section:
    shares = [max(residual.share, SMALLEST_RESIDUAL) for residual in report.residuals]
    chart = Chart(
        "What each writer still writes along the removed direction",
        Axis("Block (the embedding stands at 0)", 0, max(len(report.norms) - 1, 1)),
        axis_over("Residual (share of before)", [*shares, 1.0], logarithmic=True),
        height=220,
    )
    components = list(dict.fromkeys(residual.component for residual in report.residuals))
    for residual in report.residuals:
        chart.dot(
            residual.block or 0,
            max(residual.share, SMALLEST_RESIDUAL) if math.isfinite(residual.share) else math.nan,
            colour(components.index(residual.component)),
            f"{residual.writer}: {number(residual.share)}",
        )
    keys = legend({name: colour(index) for index, name in enumerate(components)})
    alone = "".join(
        f"<li><code>{escape(name)}</code>: {escape(reason)}</li>"
        for name, reason in report.left_alone.items()
    )
    pictures = [f'{chart.svg()}<div class="dots">{keys}</div>']
    if alone:
        pictures.append(f"<h3>Left alone</h3><ul>{alone}</ul>")
    largest = max(report.residuals, key=lambda residual: residual.share)
    return Section(
        "residual",
        f"The largest residual is {number(largest.share)}, in {largest.writer}",
        "What is left of each writer's output along the direction. At strength 1 only rounding is left (about "
        "0.0004 in bfloat16), unless row norms are kept: rescaling rows turns what is written.",
        pictures,
        ["Writer", "Component", "Block", "Residual"],
        ((r.writer, r.component, r.block, r.share) for r in report.residuals),
    )


def _front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials on the search's front, which answered prompts, by growing divergence."""
    answered = [trial for trial in trials if trial.rate is not None]
    return sorted(answered, key=lambda trial: (trial.divergence, trial.refusal))


def _chosen_trial(search: Search) -> Trial:
    return next(trial for trial in search.trials if trial.number == search.chosen)


def _tip(trial: Trial) -> str:
    settings = ", ".join(
        f"{name} {number(value) if isinstance(value, float) else value}"
        for name, value in trial.settings.items()
    )
    return (
        f"trial {trial.number}: refusal {number(trial.refusal)}, KL {number(trial.kl)}; {settings}"
    )


def _log10(value: float | None) -> float | None:
    return None if value is None else math.log10(max(value, SMALLEST_KL))


def _percent(share: float | None) -> str:
    return "an unknown share" if share is None or not math.isfinite(share) else f"{share:.1%}"


def _peak_in_words(points: Sequence[tuple[float, float]], position: int) -> str:
    finite = [point for point in points if math.isfinite(point[1])]
    if not finite:
        return f"No difference between the prompt sets can be read at position {position}"
    layer = max(finite, key=lambda point: point[1])[0]
    return f"The prompt sets differ most at layer {layer:g}, seen at position {position}"


def _at(values: Sequence[float], layer: float) -> float:
    lower = int(layer)
    share = layer - lower
    return values[lower] if share == 0 else (1 - share) * values[lower] + share * values[lower + 1]
