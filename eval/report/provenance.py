"""What the numbers depend on, and all of them, on the page."""

from collections.abc import Iterator, Mapping
from typing import Any

from common.webpage import Markup, Section
from eval.report.figures import every_number


def sections(results: Mapping[str, Any]) -> Iterator[Section]:
    """Recipe, seed, fingerprints and versions; then every number of results.json."""
    about = results["provenance"]
    rows = [("recipe", results["recipe"]), ("seed", str(about["seed"]))]
    rows += [(f"fingerprint of {name}", text) for name, text in about["fingerprints"].items()]
    rows += [(name, version) for name, version in about["versions"].items()]
    words = "What the numbers depend on. Stages with the same fingerprints give the same results."
    yield Section("provenance", "Provenance", words, [], ["What", "Which"], rows, folded=False)
    yield Section(
        "figures",
        "Every figure",
        "Every number of results.json under the path that gates, studies and documents name it by. The file itself is "
        "a part of this page's source: the element with the id results.",
        [],
        ["Field", "Value"],
        [
            (path, Markup(f'<data value="{value!r}">{value!r}</data>'))
            for path, value in every_number(results)
        ],
    )
