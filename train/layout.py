"""How a policy that is shared out can read pairs: found out by the same model while it is whole, and kept.

On its way into shards the policy lies on the CPU, where trying the packed rows on a large model would take hours; in
shards it computes behind its trainer's wrapper alone.
"""

import json

from transformers import PreTrainedModel

from common import artifacts, distributed
from common.branches import decide, plan
from train.shelf import Piece, Shelf


class Layout:
    """The abliterated model's own answer (`common.branches.plan`), as a file on the shelf."""

    def __init__(self, shelf: Shelf) -> None:
        """Take the shelf of the abliterated model."""
        path = shelf.path("layout", "abliterated", {}, ".json")
        self.piece = Piece(path, "abliterated", self._make)

    def give(self, policy: PreTrainedModel) -> None:
        """Tell the policy, once the piece is there."""
        decide(policy, json.loads(self.piece.path.read_text(encoding="utf-8"))["layout"])

    def _make(self, model: PreTrainedModel) -> None:
        found = plan(model)
        if distributed.is_main():
            self.piece.path.parent.mkdir(parents=True, exist_ok=True)
            artifacts.write_json(self.piece.path, {"layout": found})
