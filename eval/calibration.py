"""Rates of refusal that the labels of people correct: prediction-powered inference for a mean.

A judge looks at every answer, people at a random few of them. The judge's rate plus the mean of what they disagree on
is unbiased however bad the judge is, and narrower than the labels alone where it is good. Source: Angelopoulos et al.
2023, Science 382:669, arXiv:2301.09633, section "mean estimation". Here the labelled answers are among the judged, so
that the interval is that of two-phase sampling (Särndal et al. 1992, Model Assisted Survey Sampling, section 9.7).

The evaluation writes labels.csv: a random sample of each panel's prompts, in random order, with what the models
answered and an empty column. Fill it in from the top, as far as you like, and name it as `eval.labels`.
"""

import csv
import hashlib
import io
import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common import artifacts, statistics
from common.errors import InputError
from common.schema import LABELS
from common.statistics import Floats, Interval
from eval.items import MODELS, Item, ModelName

NAME = "labels.csv"
COLUMNS = ("panel", "id", "answer", "label", "prompt", "text")
# Prompts of each panel in the template. Sixty labels bring most judges within two to four points.
SAMPLE = 60
# What a spreadsheet would run as a formula.
_FORMULA = ("=", "+", "-", "@", "\t")

logger = logging.getLogger(__name__)

# An answer: its panel, the number of its prompt, and the hash of its text.
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Labels:
    """What people said of some answers.

    Attributes:
        known: 1 for a refusal, full or partial, else 0; by answer.
        words: the labels as they were given.
        sample: by panel the prompts all of whose rows are labelled, in the order of the file.
    """

    known: Mapping[Key, float] = field(default_factory=dict)
    words: Mapping[Key, str] = field(default_factory=dict)
    sample: Mapping[str, Sequence[str]] = field(default_factory=dict)


def load_labels(path: str | None) -> Labels:
    """Load a file of labels; without one there are none.

    Raises:
        InputError: if there is no such file, it lacks a column, or a label is none of the known words.
    """
    if path is None:
        return Labels()
    words: dict[Key, str] = {}
    prompts: dict[tuple[str, str], bool] = {}
    for number, row in enumerate(_rows(Path(path)), start=2):
        word = (row["label"] or "").strip().lower()
        if word and word not in (*LABELS, "refusal"):
            raise InputError(
                f"{path}:{number} holds the label {word!r}; use refusal, or one of {', '.join(LABELS)}"
            )
        prompt = (row["panel"], row["id"])
        prompts[prompt] = prompts.get(prompt, True) and bool(word)
        if word:
            words[*prompt, row["answer"]] = word
    sample: dict[str, list[str]] = {}
    for (panel, number_of_prompt), is_complete in prompts.items():
        if is_complete:
            sample.setdefault(panel, []).append(number_of_prompt)
    known = {key: float("refusal" in word) for key, word in words.items()}
    return Labels(known, words, sample)


def fingerprint(path: str | None) -> str | None:
    """A hash of what a file of labels says."""
    if path is None:
        return None
    labels = load_labels(path)
    return artifacts.hash_data(
        [sorted([*key, word] for key, word in labels.words.items()), labels.sample]
    )


def check(path: str | None) -> list[str]:
    """What is wrong with a file of labels."""
    try:
        load_labels(path)
    except InputError as error:
        return [f"eval.labels: {error}"]
    return []


def corrected(
    panel: str, items: Mapping[ModelName, Sequence[Item]], labels: Labels
) -> dict[str, Any]:
    """The corrected rates of the models whose answers to the whole sample are labelled.

    A model that has changed since keeps some answers and not others, and what it keeps is no random sample: then its
    rate is None, and told. Where nothing is labelled there is none of any model.
    """
    sample = set(labels.sample.get(panel, ()))
    found: dict[str, Any] = {}
    for model in MODELS if sample else ():
        given = [
            labels.known.get(_key(item)) if str(item.id) in sample else None
            for item in items[model]
        ]
        num_labels = sum(label is not None for label in given)
        if num_labels < len(sample):
            logger.warning(
                "eval.labels: %d of %d labels of panel %s are of other answers than those of the %s model; "
                "its rate stays uncorrected until you fill in the new %s",
                len(sample) - num_labels,
                len(sample),
                panel,
                model,
                NAME,
            )
            found[model] = None
            continue
        interval = correct(
            np.array([item.value for item in items[model]], dtype=np.float64),
            np.array(given, dtype=np.float64),  # None becomes NaN
        )
        found[model] = asdict(interval) | {"num_labels": num_labels}
    return found


def correct(judged: Floats, labels: Floats) -> Interval:
    """The rate that people would find, from a judge of all answers and people's labels of some.

    The estimate is the judge's mean plus the mean of label minus judgement over the labelled answers. Its variance has
    two parts: that of the rate itself over all N answers (Wilson's interval stands for it), and that of having seen
    only n labels, (1 - n/N) times the variance of the mean disagreement (Tango's interval, which keeps its promise
    where few answers or none disagree). With every answer labelled it is Wilson's interval of the labels.

    Args:
        judged: 0 or 1 [answers].
        labels: 0 or 1, NaN where nobody looked [answers]; the labelled ones are a random sample.

    Raises:
        ValueError: without labels.
    """
    is_labelled = np.isfinite(labels)
    size, num_labels = len(judged), int(is_labelled.sum())
    if not num_labels:
        raise ValueError("no answer is labelled")
    seen, judgement = labels[is_labelled], judged[is_labelled]
    disagreement = statistics.tango(
        float((seen * (1 - judgement)).sum()), float(((1 - seen) * judgement).sum()), num_labels
    )
    rate = min(max(float(judged.mean()) + disagreement.value, 0.0), 1.0)
    whole = statistics.wilson(rate * size, size)
    unseen = 1 - num_labels / size
    below = math.hypot(
        rate - whole.low, math.sqrt(unseen) * (disagreement.value - disagreement.low)
    )
    above = math.hypot(
        whole.high - rate, math.sqrt(unseen) * (disagreement.high - disagreement.value)
    )
    return Interval(rate, max(0.0, rate - below), min(1.0, rate + above))


def write_template(
    path: Path,
    items: Sequence[Item],
    prompts: Mapping[tuple[str, str], Mapping[str | int, str]],
    labels: Labels,
    seed: int,
) -> None:
    """Write what is to be labelled, with the labels that are known.

    Each distinct answer to a prompt stands there once, and which model gave it does not: who labels should not know.

    Args:
        path: of the file.
        items: of all panels and models.
        prompts: wordings by the kind and name of a row, and by the number of an item.
        labels: from an earlier file, whose sample stands first.
        seed: of the sample.
    """
    answers: dict[str, dict[str, dict[str, Item]]] = {}
    for item in items:
        if item.kind == "refusal":
            by_id = answers.setdefault(item.name, {})
            by_id.setdefault(str(item.id), {})[_key(item)[2]] = item
    if not answers:
        return
    rows = []
    for panel, by_id in answers.items():
        draw = random.Random(f"{seed}:{panel}")
        known = [number for number in labels.sample.get(panel, ()) if number in by_id]
        others = sorted(set(by_id) - set(known))
        more = draw.sample(others, min(max(SAMPLE - len(known), 0), len(others)))
        for number in [*known, *more]:
            for answer, item in sorted(by_id[number].items()):
                word = labels.words.get((panel, number, answer), "")
                asked = prompts.get(("refusal", panel), {}).get(item.id, "")
                text = str(item.details["text"])
                rows.append((panel, number, answer, word, _harmless(asked), _harmless(text)))
    file = io.StringIO(newline="")
    csv.writer(file).writerows([COLUMNS, *rows])
    artifacts.write_text(path, file.getvalue())


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise InputError(f"{path} does not exist; correct the path, or delete the line")
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV in UTF-8 ({error}); save it so") from error
    needed = COLUMNS[:4]
    missing = [column for column in needed if not rows or column not in rows[0]]
    if missing:
        raise InputError(
            f"{path} has no column {missing[0]!r} or no rows; fill in the {NAME} that the evaluation wrote, and keep "
            f"{', '.join(needed)}"
        )
    return rows


def _key(item: Item) -> Key:
    text = str(item.details.get("text", ""))
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
    # A letter in front: a spreadsheet would round what looks like a number.
    return item.name, str(item.id), f"a{digest[:16]}"


def _harmless(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text
