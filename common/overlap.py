"""Whether two sets of texts share an item: training on what is measured would make the measurement worthless."""

import re
import unicodedata
from collections.abc import Iterable


def normalize(text: str) -> str:
    """A text without what does not make it another item: case, spacing, punctuation at its end."""
    text = unicodedata.normalize("NFKC", text).lower()
    return re.sub(r"\s+", " ", text).strip().rstrip("?.! ")


def shared(texts: Iterable[str], items: Iterable[str]) -> list[str]:
    """The texts that are also among the items, after normalization, in order and once each."""
    known = {normalize(item) for item in items}
    return list(dict.fromkeys(text for text in texts if normalize(text) in known))
