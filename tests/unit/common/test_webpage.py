"""Pages of sections: sound, escaped, and taken apart again.

Run: .venv/bin/python -m pytest tests/unit/common/test_webpage.py
"""

import re
from dataclasses import replace

import pytest

from common import webpage
from common.webpage import Markup, Section
from tests.pages import Tags

NASTY = "a <b> & \"c\" 'd' </section><script>"
PLAIN = Section("one", "A heading", "Words.", ["<svg></svg>"], ["A", "B"], [("x", 0.12345)])


def test_sections_are_taken_off_a_page_as_they_were_put_on_it():
    parts = [PLAIN, replace(PLAIN, key="two", heading=NASTY, rows=[(NASTY, None)], folded=False)]
    sections = [webpage.html(part) for part in parts]
    header = f"<header>{webpage.contents(sections)}</header>"
    page = webpage.page("title", header, sections, style=".x{color:red}", end="<p>end</p>")
    assert webpage.sections_of(page) == sections
    tags = Tags(page)
    assert tags.open == []
    assert tags.links == ["#one", "#two"]
    assert ".x{color:red}</style>" in page


@pytest.mark.parametrize("field", ["heading", "words"])
def test_text_is_escaped_and_markup_is_not(field):
    assert "<b>" not in webpage.html(replace(PLAIN, **{field: NASTY}))
    assert "<b>x</b>" in webpage.html(replace(PLAIN, **{field: Markup("<b>x</b>")}))


def test_cells_are_text_numbers_nothing_or_markup():
    rows = [(NASTY, 0.12345), (None, 7), (Markup("<i>x</i>"), float("nan"))]
    html = webpage.html(replace(PLAIN, columns=[NASTY, "B"], rows=rows))
    assert "<b>" not in html
    cells = re.findall(r"<td>(.*?)</td>", html)
    assert cells[1:] == ["0.123", "-", "7", "<i>x</i>", "-"]


def test_a_table_is_folded_unless_it_says_what_no_picture_says():
    assert "<details>" in webpage.html(PLAIN)
    assert "<details>" not in webpage.html(replace(PLAIN, folded=False))
    assert "<table>" not in webpage.html(replace(PLAIN, columns=[]))


def test_facts_are_escaped():
    html = webpage.facts({NASTY: NASTY, "b": Markup("<i>x</i>")})
    assert "<b>" not in html
    assert "<dd><i>x</i></dd>" in html
