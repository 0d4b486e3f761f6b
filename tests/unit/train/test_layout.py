"""What a whole model finds out about packed rows is kept, and taken over by one that could not try it.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_layout.py
"""

import pytest

from common import branches
from train.layout import Layout
from train.shelf import Shelf


@pytest.mark.parametrize("due", ["packed", "plain"])
def test_a_policy_takes_over_what_the_whole_model_found(
    due, build_model, tokenizer, tmp_path, monkeypatch
):
    whole, policy = build_model("llama"), build_model("llama")
    layout = Layout(Shelf(tmp_path, {"abliterated": "one"}, tokenizer))
    if due == "plain":
        monkeypatch.setattr(branches, "_known_obstacle", lambda _model: "it says so")
    layout.piece.make(whole)

    def refuse(*_arguments):
        raise AssertionError("a policy that is to be shared out computes nothing")

    monkeypatch.setattr(branches, "_known_obstacle", refuse)
    monkeypatch.setattr(branches, "_measured_obstacle", refuse)
    with pytest.raises(AssertionError):
        branches.plan(policy)
    layout.give(policy)
    assert branches.plan(policy) == due
    # Of another model it is not known.
    assert (
        Layout(Shelf(tmp_path, {"abliterated": "two"}, tokenizer)).piece.path != layout.piece.path
    )
