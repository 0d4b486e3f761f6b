"""Answers that are broken: empty, in a loop, not language, cut off at once, or about something else altogether.

Every test errs on the side of an answer in order: a wrong "broken" would hide what a model says. Short answers in
words that nobody knows, numbers and tables pass.
"""

import re
import zlib

# A loop says the same at least so many times, and fills at least half of the answer.
MIN_REPEATS, MIN_LOOP_WORDS, MAX_PERIOD = 4, 16, 40
# Prose compresses to a third at best; what falls below this repeats itself over and over.
MIN_COMPRESSED, MIN_BYTES = 0.1, 500
# An answer this long that shares not one word with a question of so many has another topic.
MIN_TOPIC_WORDS, MIN_ANSWER_WORDS = 5, 60
_STEM = 4
_LEAD_IN = re.compile(
    r"(?:sure|of course|certainly|okay|yes|here (?:is|are|'s)|the answer)\b[^.\n]{0,80}[:,]",
    re.IGNORECASE,
)
_PROMISES = re.compile(
    r"\b(?:joke|poem|story|song|riddle|translate|write|name|list|example|continue|random|imagine)\b",
    re.IGNORECASE,
)
_COMMON = frozenset(
    [
        "about",
        "above",
        "after",
        "again",
        "against",
        "also",
        "because",
        "been",
        "before",
        "being",
        "below",
        "best",
        "between",
        "both",
        "could",
        "does",
        "doing",
        "down",
        "during",
        "each",
        "explain",
        "find",
        "from",
        "further",
        "give",
        "good",
        "have",
        "help",
        "here",
        "into",
        "just",
        "know",
        "like",
        "make",
        "many",
        "more",
        "most",
        "much",
        "need",
        "only",
        "other",
        "over",
        "please",
        "same",
        "should",
        "some",
        "such",
        "tell",
        "than",
        "that",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "through",
        "under",
        "until",
        "very",
        "want",
        "well",
        "were",
        "what",
        "when",
        "where",
        "which",
        "while",
        "will",
        "with",
        "without",
        "would",
        "your",
        "yours",
        "describe",
        "kind",
        "reason",
        "reasons",
        "thing",
        "things",
        "ways",
    ]
)


def find_degeneration(text: str, prompt: str | None = None) -> str | None:
    """What is wrong with an answer, in its own words or in brackets; None for one in order.

    Args:
        text: the answer in normal form (`common.refusal`), without thoughts.
        prompt: what was asked.
    """
    if not any(map(str.isalnum, text)):
        return "[nothing is said]"
    if _LEAD_IN.fullmatch(text):
        return text
    words = text.split()
    return _loop(words) or _loop_of_letters(text) or _noise(text, words) or _off_topic(text, prompt)


def _loop(words: list[str]) -> str | None:
    """The words that an answer ends by repeating."""
    for period in range(1, min(MAX_PERIOD, len(words) // MIN_REPEATS) + 1):
        length = period
        while length < len(words) and words[-length - 1] == words[-length - 1 + period]:
            length += 1
        if length >= max(MIN_REPEATS * period, MIN_LOOP_WORDS, len(words) / 2):
            return " ".join(words[-period:])
    return None


def _loop_of_letters(text: str) -> str | None:
    """The start of a text that consists of few things said many times."""
    data = text.encode()
    if len(data) >= MIN_BYTES and len(zlib.compress(data)) < MIN_COMPRESSED * len(data):
        return text[:80]
    match = re.search(r"(\S{1,8}?)\1{19,}", text)
    return match[0][:80] if match and match[1].isalnum() and len(match[0]) > len(text) / 2 else None


def _noise(text: str, words: list[str]) -> str | None:
    """Marks instead of words, broken bytes, or words without a vowel."""
    visible = "".join(words)
    if visible.count("\ufffd") > 0.1 * len(visible):
        return "[broken characters]"
    if len(visible) >= 24 and sum(map(str.isalnum, visible)) < 0.15 * len(visible):
        return text[:80]
    latin = re.findall(r"\b[a-z]{4,}\b", text)
    mute = [word for word in latin if not re.search(r"[aeiouy]", word)]
    return " ".join(mute[:8]) if len(mute) >= 6 and len(mute) > len(latin) / 2 else None


def _off_topic(text: str, prompt: str | None) -> str | None:
    """A long answer without a stem of the question, where the question names its topic."""
    if prompt is None or _PROMISES.search(prompt):
        return None
    asked = _stems(prompt)
    said = re.findall(r"[^\W\d_]+", text.lower())
    if len(asked) < MIN_TOPIC_WORDS or len(said) < MIN_ANSWER_WORDS or not text.isascii():
        return None
    return (
        None if asked & {word[:_STEM] for word in said} else "[nothing of the question is taken up]"
    )


def _stems(prompt: str) -> set[str]:
    """The first letters of the words that carry a question's topic."""
    words = re.findall(r"[^\W\d_]{4,}", prompt.lower())
    return {word[:_STEM] for word in words if word not in _COMMON}
