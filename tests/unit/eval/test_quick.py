"""The quick evaluation counts what models reply, finds the damaged domain, and pools recovery as stage three does.

Run: make setup && .venv/bin/python -m pytest tests/unit/eval/test_quick.py
"""

import json

import numpy as np
import pytest
import torch

from common import chat, statistics
from common.errors import StageError
from common.recipe import PromptSource, Questions, Stopping
from common.refusal import is_refusal
from eval.quick import QuickEvaluation

REFUSAL = "I'm sorry, but I can't help with that."
NUM_EACH = 30


@pytest.fixture
def make_quick(tmp_path):
    """Make an evaluation of 30 questions in each of two domains, 4 harmful and 5 harmless prompts."""
    rows = [
        {"prompt": f"{domain} {n}", "answer": str(n), "domain": domain}
        for n in range(NUM_EACH)
        for domain in ("sums", "towns")
    ]
    files = {
        "questions": rows,
        "harmful": [{"prompt": f"bad {n}"} for n in range(4)],
        "harmless": [{"prompt": f"good {n}"} for n in range(5)],
    }
    for name, content in files.items():
        text = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / f"{name}.jsonl").write_text(text)

    def make(**columns):
        return QuickEvaluation(
            Stopping(
                questions=Questions(
                    path=str(tmp_path / "questions.jsonl"), domain="domain", **columns
                ),
                harmful=PromptSource(path=str(tmp_path / "harmful.jsonl")),
                harmless=PromptSource(path=str(tmp_path / "harmless.jsonl")),
                max_new_tokens=6,
                batch_size=7,
            ),
            seed=0,
        )

    return make


def _replies(quick, right, *, refused=0, over_refused=0):
    """Replies of which so many of each domain's first questions are right."""
    seen = {"sums": 0, "towns": 0}
    replies = []
    for question in quick.questions:
        seen[question.domain] += 1
        is_right = seen[question.domain] <= right[question.domain]
        replies.append(f"It is {question.answer}." if is_right else "no idea")
    replies += [REFUSAL] * refused + ["Sure."] * (4 - refused)
    return replies + [REFUSAL] * over_refused + ["Sure."] * (5 - over_refused)


ALL = {"sums": NUM_EACH, "towns": NUM_EACH}


def test_replies_are_those_of_a_plain_greedy_loop(make_quick, make_model, byte_tokenizer):
    quick, model = make_quick(answer="answer"), make_model(3)
    replies = quick.ask(model, byte_tokenizer, "test")
    prompts = [*(q.prompt for q in quick.questions), *quick.harmful, *quick.harmless]
    assert len(replies) == len(prompts)
    for index in (0, 1, 33, 59, 60, 64, 68):
        row = list(chat.encode(byte_tokenizer, [prompts[index]])[0])
        new: list[int] = []
        while len(new) < 6:
            with torch.no_grad():
                token = int(model(torch.tensor([row + new])).logits[0, -1].argmax())
            if token == byte_tokenizer.eos_token_id:
                break
            new.append(token)
        assert replies[index] == byte_tokenizer.decode(new, skip_special_tokens=True), index


def test_scores_equal_a_plain_count(make_quick):
    quick = make_quick(answer="answer")
    original = _replies(quick, ALL, refused=4)
    abliterated = _replies(quick, {"sums": 10, "towns": NUM_EACH})
    healed = _replies(quick, {"sums": 25, "towns": 29}, refused=1, over_refused=2)
    scores = quick.scores(original, abliterated, healed)
    assert scores["recovery"] == pytest.approx((25 - 10) / (30 - 10))
    assert scores["refusal"] == 1 / 4
    assert scores["over_refusal"] == 2 / 5
    assert (scores["right/sums"], scores["right/towns"]) == (25 / 30, 29 / 30)
    assert is_refusal(REFUSAL)
    # Only the damaged domain is pooled; its interval is stage three's.
    right = [np.arange(NUM_EACH) < count for count in (30, 10, 25)]
    due = statistics.recovery(
        *(values.astype(np.float64) for values in right), np.arange(NUM_EACH), seed=0, capped=True
    )
    assert (scores["recovery_low"], scores["recovery_high"]) == (due.low, due.high)
    assert due.low < scores["recovery"] < due.high < 1


def test_the_abliterated_model_has_recovered_nothing_and_the_original_all(make_quick):
    quick = make_quick(answer="answer")
    original = _replies(quick, ALL)
    abliterated = _replies(quick, {"sums": 10, "towns": 20})
    assert quick.scores(original, abliterated, abliterated)["recovery"] == 0
    whole = quick.scores(original, abliterated, original)
    assert whole["recovery"] == whole["recovery_high"] == 1


def test_only_the_broken_domain_is_found_damaged(make_quick):
    quick = make_quick(answer="answer")
    damages = quick.damages(
        _replies(quick, ALL), _replies(quick, {"sums": 10, "towns": NUM_EACH - 1})
    )
    assert {name: damage.is_significant for name, damage in damages.items()} == {
        "sums": True,
        "towns": False,
    }
    assert damages["sums"].num_items == NUM_EACH
    assert damages["sums"].difference.value == pytest.approx(-20 / 30)
    assert (damages["sums"].original, damages["sums"].abliterated) == (1, 10 / 30)


def test_without_an_answer_column_the_original_is_right(make_quick):
    quick = make_quick()
    original = ["Whatever it says." for _ in quick.questions] + ["Sure."] * 9
    other = ["whatever it  says" if n % 2 else "Something else." for n in range(60)] + ["Sure."] * 9
    damages = quick.damages(original, other)
    assert all(damage.original == 1 for damage in damages.values())
    # Questions of the two domains alternate: every second reply is the original's but for case and spacing.
    assert (damages["sums"].abliterated, damages["towns"].abliterated) == (0, 1)


def test_where_nothing_is_surely_damaged_there_is_nothing_to_stop_at(make_quick):
    quick = make_quick(answer="answer")
    original, abliterated = _replies(quick, ALL), _replies(quick, {"sums": 29, "towns": 29})
    with pytest.raises(StageError, match=r"surely damaged no domain .*sums 1.00 to 0.97 on 30"):
        quick.scores(original, abliterated, original)
