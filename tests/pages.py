"""Pages read back, for the tests of whatever writes one."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

VOID = {"meta", "link", "input"}


class Tags(HTMLParser):
    """Holds tags to be closed in order, and remembers ids, links, text and the figures of `data` elements.

    Attributes:
        open: tags not closed yet.
        ids: all of them.
        links: where they lead.
        figures: path, value and text of every figure that says which field it is.
    """

    def __init__(self, html: str) -> None:
        """Read a page."""
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.figures: list[tuple[str, float, str]] = []
        self._figure: tuple[str, float] | None = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        if tag == "data" and "data-path" in attributes:
            self._figure = (attributes["data-path"], float(attributes["value"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self._figure is not None:
            self.figures.append((*self._figure, data))
            self._figure = None


def pictures(html):
    """The pictures of a page, which are sound XML."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def named(html, start):
    """The picture whose label begins so."""
    return next(p for p in pictures(html) if p.get("aria-label", "").startswith(start))
