"""The whole page: verdict on top, then what was measured, how it came about, and what flipped.

It needs nothing but itself: a content policy in it forbids every request, and lets run the one script whose hash it
names.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from common import artifacts, webpage
from eval.items import Item
from eval.report import (
    benchmarks,
    direction,
    divergences,
    flips,
    provenance,
    refusals,
    training,
    verdict,
)
from eval.report.questions import Questions

NAME: Final = "report.html"
_HERE: Final = Path(__file__).parent
SCRIPT: Final = (_HERE / "page.js").read_text(encoding="utf-8")
STYLE: Final = (_HERE / "page.css").read_text(encoding="utf-8")


def write(
    path: Path,
    results: Mapping[str, Any],
    items: Sequence[Item],
    questions: Questions,
    upstream: Mapping[str, Path],
) -> None:
    """Write the page; the same results, items and folders give the same bytes.

    Args:
        path: of the page.
        results: what is in results.json.
        items: of all rows and models.
        questions: what the items ask, as far as that is known.
        upstream: folders of the finished stages `abliteration` and `train`; what they lack is left out.
    """
    artifacts.write_text(path, page(results, items, questions, upstream))


def page(
    results: Mapping[str, Any],
    items: Sequence[Item],
    questions: Questions,
    upstream: Mapping[str, Path],
) -> str:
    """The page as HTML; see `write`."""
    # As results.json is read back, so that the page is the same from the file and from memory.
    results = json.loads(json.dumps(results, sort_keys=True))
    found = flips.find(results, items, questions)
    num_items = sum(row["n"] for row in (*results["benchmarks"], *results["refusal"]))
    measured = [
        *benchmarks.sections(results),
        *refusals.sections(results),
        *divergences.sections(results),
        *training.sections(upstream["train"]),
        *direction.sections(results["direction"]),
    ]
    ends = [flips.section(found, num_items), *provenance.sections(results)]
    pictures = _pictures_of_the_edit(upstream["abliteration"])
    body = [*map(webpage.html, measured), *pictures, *map(webpage.html, ends)]
    title = f"{results['recipe']}: evaluation"
    return webpage.page(
        title,
        _header(title, results, (measured + ends)[0].key, webpage.contents(body)),
        body,
        head=_policy(),
        style=STYLE,
        end=f'\n<script type="application/json" id="results">{_embedded(results)}</script>\n'
        f"<script>{SCRIPT}</script>\n",
    )


def _header(title: str, results: Mapping[str, Any], first: str, contents: str) -> str:
    style = "headline" if results["accept"]["passed"] else "headline missed"
    instrument = verdict.instrument(results)
    facts = webpage.facts(instrument) if instrument else ""
    return (
        f'<a class="skip" href="#{first}">Skip to the results</a><header><h1>{escape(title)}</h1>'
        f'<p class="{style}">{escape(verdict.headline(results))}</p><p>{verdict.summary(results)}</p>'
        f"{facts}{contents}</header>"
    )


def _pictures_of_the_edit(folder: Path) -> Iterator[str]:
    """What stage one drew of the direction and of its choice, as it stands on that stage's page."""
    path = folder / NAME
    if path.is_file():
        yield from webpage.sections_of(path.read_text(encoding="utf-8"))


def _policy() -> str:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode("utf-8")).digest()).decode("ascii")
    rules = (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    # Without an icon of its own a browser would ask the server for one.
    return (
        f'<meta http-equiv="Content-Security-Policy" content="{rules}">'
        '<link rel="icon" href="data:,">'
    )


def _embedded(results: Mapping[str, Any]) -> str:
    """results.json as JSON that cannot end the element it stands in."""
    return json.dumps(results, sort_keys=True, ensure_ascii=True).replace("<", "\\u003c")
