"""Pages of pictures and numbers: one HTML file each that needs nothing else, neither network nor font.

Every picture has a heading that says what is in it, and its numbers as a table. All text is escaped, except what is
`Markup` already.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from common.charts import number

_HEADING: Final = re.compile(r'<h2 id="([\w-]+)-heading">(.*?)</h2>', re.DOTALL)
_SECTION: Final = re.compile(r'<section id="[\w-]+".*?</section>', re.DOTALL)


class Markup(str):
    """Text that is HTML already and is put on the page as it is."""

    __slots__ = ()


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading that says what one sees, words, pictures, and the numbers in a table.

    Attributes:
        key: its id on the page.
        heading: one sentence.
        words: what to look for.
        pictures: SVG with legends, as HTML.
        columns: heads of the table.
        rows: its cells: text, numbers, None, or `Markup`.
        folded: whether the table opens on demand, because the pictures say the same.
    """

    key: str
    heading: str
    words: str
    pictures: Sequence[str]
    columns: Sequence[str]
    rows: Iterable[Sequence[object]]
    folded: bool = True


def page(
    title: str,
    header: str,
    sections: Iterable[str],
    *,
    head: str = "",
    style: str = "",
    end: str = "",
) -> str:
    """The whole page.

    Args:
        title: of the browser's tab.
        header: what stands above the sections, as HTML.
        sections: as HTML, see `html`.
        head: further elements of the head, as HTML.
        style: rules that go beyond `STYLE`.
        end: what stands below the sections, as HTML.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>{head}<style>{STYLE}{style}</style></head>\n<body>\n{header}\n<main>\n"
        + "\n".join(sections)
        + f"\n</main>{end}</body></html>\n"
    )


def contents(sections: Iterable[str]) -> str:
    """Links to sections, which are HTML already."""
    links = "".join(
        f'<li><a href="#{key}">{heading}</a></li>'
        for part in sections
        for key, heading in _HEADING.findall(part)
    )
    return f'<nav aria-label="Pictures"><ol>{links}</ol></nav>'


def html(part: Section) -> str:
    """A section as HTML."""
    pictures = "".join(f"<figure>{picture}</figure>" for picture in part.pictures)
    return (
        f'<section id="{part.key}" aria-labelledby="{part.key}-heading">'
        f'<h2 id="{part.key}-heading">{_text(part.heading)}</h2><p>{_text(part.words)}</p>{pictures}'
        f"{_table(part)}</section>"
    )


def sections_of(text: str) -> list[str]:
    """The sections of a finished page, each as HTML, to be put on another one."""
    return _SECTION.findall(text)


def facts(lines: Mapping[str, str]) -> str:
    """Names with what they are, side by side."""
    parts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{_text(text)}</dd></div>" for name, text in lines.items()
    )
    return f"<dl>{parts}</dl>"


def _table(part: Section) -> str:
    if not part.columns:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in part.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in part.rows
    )
    label = escape(f"Numbers: {part.heading}")
    table = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    if not part.folded:
        return table
    return f"<details><summary>The numbers as a table</summary>{table}</details>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return escape(number(value))
    return "-" if value is None else _text(str(value) if not isinstance(value, str) else value)


def _text(text: str) -> str:
    return text if isinstance(text, Markup) else escape(text)


STYLE = """
:root{color-scheme:light dark;--page:#fbfbfa;--ink:#1d2126;--soft:#5b636d;--rule:#d9dcdf;--panel:#fff;
--strong:#0b5cad;--faint:#a9b4c0;--c0:#0b5cad;--c1:#c2571a;--c2:#2f7d4f;--c3:#8a3fa0;--c4:#8a6d00;--c5:#b3264a;
--plus:#b3400e;--minus:#0b5cad;--frame:#1d2126}
@media (prefers-color-scheme:dark){:root{--page:#14171a;--ink:#e6e8ea;--soft:#a0a8b1;--rule:#343a41;--panel:#1b1f23;
--strong:#6fb3f2;--faint:#56616d;--c0:#6fb3f2;--c1:#f0955a;--c2:#6cc592;--c3:#cf8fe3;--c4:#d9b84a;--c5:#f07f9c;
--plus:#f0955a;--minus:#6fb3f2;--frame:#fff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:56rem;padding:2rem 1.25rem 4rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:0}
h2{font-size:1.2rem;line-height:1.3;margin:0 0 .25rem}
h3{font-size:.95rem;margin:1.25rem 0 .25rem}
h1,h2,h3{overflow-wrap:anywhere}
p{margin:0 0 .75rem;max-width:46rem;color:var(--soft)}
a{color:var(--strong)}
:focus-visible{outline:3px solid var(--strong);outline-offset:2px}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:.5rem 1.5rem;margin:1rem 0}
dt{font-size:.8rem;color:var(--soft)}
dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
nav ol{padding-left:1.25rem;margin:0 0 1rem}
section{background:var(--panel);border:1px solid var(--rule);border-radius:8px;padding:1.25rem;margin:1.25rem 0}
figure{margin:0 0 .5rem}
figure>svg,figure h3+svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font:12px system-ui,sans-serif;font-variant-numeric:tabular-nums}
svg .name{fill:var(--ink)}
svg .over{fill:var(--ink);font-size:11px;paint-order:stroke;stroke:var(--panel);stroke-width:4px}
.grid{stroke:var(--rule);stroke-width:1;fill:none}
.tick{stroke:var(--soft);stroke-width:1;fill:none}
.line{fill:none;stroke:currentColor;stroke-width:1.75;stroke-linejoin:round}
.line.strong{stroke-width:2.5}
.line.faint{stroke-width:1}
.dot,.bar{fill:currentColor}
.dot{stroke:var(--panel);stroke-width:.75}
.bar{fill-opacity:.55}
.strong{color:var(--strong)}.faint{color:var(--faint)}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}
.cell{stroke:none}
.plus{fill:var(--plus)}.minus{fill:var(--minus)}.missing{fill:var(--rule)}
.glyph{fill:none;stroke:var(--ink);stroke-width:1.25;opacity:.75}
.chosen{fill:none;stroke:var(--frame);stroke-width:2.5}
.limit{stroke:var(--soft);stroke-width:1;stroke-dasharray:4 3;fill:none}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1rem;margin:.25rem 0 .75rem;padding:0;font-size:.85rem;
color:var(--ink)}
.legend li{display:flex;align-items:center;gap:.4rem}
.legend svg{width:1.4rem;height:1rem;flex:none}
.dots .legend .line{stroke-width:7;stroke-linecap:round;stroke-dasharray:0 14;stroke-dashoffset:-7}
.dots .legend .line.strong{stroke-width:2.5;stroke-dasharray:none}
summary{cursor:pointer;font-size:.9rem;color:var(--strong)}
.scroll{overflow:auto;max-height:24rem;margin-top:.5rem}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .6rem;border-bottom:1px solid var(--rule);text-align:left;white-space:nowrap}
th{position:sticky;top:0;background:var(--panel)}
code{overflow-wrap:anywhere}
@media print{section{break-inside:avoid}}
"""
