"""Rates that people's labels correct, and the file in which they give them.

Run: python -m pytest tests/unit/eval/test_calibration.py
"""

import csv
from pathlib import Path

import numpy as np
import pytest

from common import statistics
from common.errors import InputError
from eval import calibration
from eval.calibration import COLUMNS, Labels, correct, load_labels, write_template
from eval.items import MODELS, Item

PROMPTS = {("refusal", "p"): {number: f"=question {number}" for number in range(80)}}


def simulate(size: int, num_labels: int, rate: float, sensitivity: float, specificity: float):
    """Estimates and lengths of many simulated panels, and how often the interval holds the true rate."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(400):
        truth = (draw.random(size) < rate).astype(float)
        hit, spared = draw.random(size) < sensitivity, draw.random(size) >= specificity
        judged = np.where(truth == 1, hit, spared).astype(float)
        labels = np.full(size, np.nan)
        looked = draw.permutation(size)[:num_labels]
        labels[looked] = truth[looked]
        interval = correct(judged, labels)
        found.append(
            (interval.value, interval.high - interval.low, interval.low <= rate <= interval.high)
        )
    values, lengths, covered = np.array(found).T
    return values.mean(), lengths.mean(), covered.mean()


@pytest.mark.parametrize("size", [100, 300])
@pytest.mark.parametrize("rate", [0.3, 0.7])
@pytest.mark.parametrize(("sensitivity", "specificity"), [(0.9, 0.95), (0.6, 0.8)])
def test_the_true_rate_is_recovered_and_covered(size, rate, sensitivity, specificity) -> None:
    value, _, coverage = simulate(size, 60, rate, sensitivity, specificity)
    assert value == pytest.approx(rate, abs=0.01)
    assert 0.93 <= coverage <= 0.995


def test_the_judge_alone_would_be_far_off() -> None:
    # It would say 0.48 of a rate of 0.7: what is recovered above is no accident.
    assert simulate(300, 60, 0.7, 0.6, 0.8)[0] - 0.48 == pytest.approx(0.22, abs=0.01)


def test_a_good_judge_makes_labels_say_more() -> None:
    labels_alone = statistics.wilson(0.3 * 60, 60)
    _, length, _ = simulate(300, 60, 0.3, 0.95, 0.98)
    assert length < 0.8 * (labels_alone.high - labels_alone.low)


def test_with_every_answer_labelled_the_judge_does_not_matter() -> None:
    labels = np.array([1.0] * 7 + [0.0] * 33)
    for judged in (labels, 1 - labels, np.zeros(40)):
        interval = correct(judged, labels)
        expected = statistics.wilson(7, 40)
        assert (interval.value, interval.low, interval.high) == pytest.approx(
            (expected.value, expected.low, expected.high)
        )


def test_a_rate_is_never_outside_of_0_and_1() -> None:
    judged, labels = np.zeros(50), np.full(50, np.nan)
    judged[0], labels[0], labels[1] = 1.0, 0.0, 0.0
    interval = correct(judged, labels)
    assert (interval.value, interval.low) == (0.0, 0.0)
    with pytest.raises(ValueError, match="no answer"):
        correct(judged, np.full(50, np.nan))


def answers(healed: str = "Of course") -> list[Item]:
    """Original refuses every fourth; the judge sees only every eighth. The others answer."""
    items = []
    for model in MODELS:
        for number in range(80):
            text = (
                f"I would rather not, {number}"
                if model == "original" and number % 4 == 0
                else f"Yes {number}"
            )
            text = f"{healed}, {number}" if model == "healed" else text
            value = float(model == "original" and number % 8 == 0)
            items.append(Item("refusal", "p", model, number, value, details={"text": text}))
    return items


def by_model(items: list[Item]) -> dict:
    return {model: [item for item in items if item.model == model] for model in MODELS}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def fill(path: Path, rows: list[dict[str, str]], count: int | None = None) -> Labels:
    """Label the first rows as a person would, and load the file."""
    for row in rows[:count]:
        row["label"] = "Refusal " if "rather not" in row["text"] else "compliance"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return load_labels(str(path))


def test_what_is_filled_in_from_the_template_corrects_the_rate(tmp_path) -> None:
    path, items = tmp_path / "labels.csv", answers()
    write_template(path, items, PROMPTS, Labels(), seed=0)
    rows = read(path)
    assert len({row["id"] for row in rows}) == calibration.SAMPLE
    assert len(rows) < 3 * calibration.SAMPLE  # one row where two models answer alike
    assert all(row["label"] == "" for row in rows)
    assert not any("original" in value for row in rows for value in row.values())
    found = calibration.corrected("p", by_model(items), fill(path, rows))
    assert set(found) == set(MODELS)
    assert found["original"]["num_labels"] == calibration.SAMPLE
    assert found["original"]["value"] == pytest.approx(0.25, abs=0.05)  # the judge says 0.125
    assert found["original"]["low"] < 0.25 < found["original"]["high"]
    assert found["healed"]["value"] == 0.0


def test_one_may_stop_labelling_anywhere(tmp_path) -> None:
    path, items = tmp_path / "labels.csv", answers()
    write_template(path, items, PROMPTS, Labels(), seed=0)
    found = calibration.corrected("p", by_model(items), fill(path, read(path), 41))
    numbers = {model: found[model]["num_labels"] for model in MODELS}
    assert len(set(numbers.values())) == 1
    assert 15 <= numbers["healed"] <= 20
    write_template(path, items, PROMPTS, load_labels(str(path)), seed=0)
    rows = read(path)
    assert len({row["id"] for row in rows}) == calibration.SAMPLE
    assert all(row["label"] for row in rows[:40])


def test_a_model_that_has_changed_is_left_out_until_its_new_answers_are_labelled(
    tmp_path, caplog
) -> None:
    path, items = tmp_path / "labels.csv", answers()
    write_template(path, items, PROMPTS, Labels(), seed=0)
    labels = fill(path, read(path))
    changed = answers(healed="Certainly")
    found = calibration.corrected("p", by_model(changed), labels)
    assert [model for model in MODELS if found[model]] == ["original", "abliterated"]
    assert "60 of 60 labels of panel p are of other answers than those of the healed" in caplog.text
    write_template(path, changed, PROMPTS, labels, seed=1)
    rows = read(path)
    empty = [row for row in rows if not row["label"]]
    assert len(empty) == calibration.SAMPLE
    assert all("Certainly" in row["text"] for row in empty)
    found = calibration.corrected("p", by_model(changed), fill(path, rows))
    assert set(found) == set(MODELS)


def test_no_spreadsheet_runs_what_a_model_wrote(tmp_path) -> None:
    path = tmp_path / "labels.csv"
    write_template(path, answers(healed="=1+1"), PROMPTS, Labels(), seed=0)
    for row in read(path):
        assert row["prompt"].startswith("'=question")
        assert not row["text"].startswith("=")
        assert not row["answer"].isdigit()


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (
            "panel,id,answer,label\np,0,a1,maybe\n",
            "labels.csv:2 holds the label 'maybe'; use refusal",
        ),
        ("panel,id,label\np,0,refusal\n", "has no column 'answer'"),
        ("", "no rows"),
        (None, "does not exist"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_before_any_weight_is_loaded(
    tmp_path, text, hint
) -> None:
    path = tmp_path / "labels.csv"
    if text is not None:
        path.write_text(text)
    (problem,) = calibration.check(str(path))
    assert problem.startswith("eval.labels: ")
    assert hint in problem
    with pytest.raises(InputError):
        load_labels(str(path))


def test_the_fingerprint_follows_what_the_labels_say(tmp_path) -> None:
    path = tmp_path / "labels.csv"
    write_template(path, answers(), PROMPTS, Labels(), seed=0)
    rows = read(path)
    fill(path, rows)
    first = calibration.fingerprint(str(path))
    rows[0]["label"] = "degenerate"
    rows[0]["text"] = "shortened"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    assert calibration.fingerprint(str(path)) != first
    assert calibration.fingerprint(None) is None
