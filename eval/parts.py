"""Parts of the items that share none: one to search on, one to confirm on, one to test on.

Where an item belongs is decided by the hash of the fact that it rests on (its cluster), or else of its wording: the
same on every machine, in every order, and for a prompt that stands in two panels. So nothing that a choice was made
by is among what it is judged by.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from common.errors import StageError
from common.overlap import normalize

Part = Literal["search", "confirmation", "test"]

# Of every hundred items, on average, from the first hash to the last.
SHARES: Mapping[Part, int] = {"search": 50, "confirmation": 25, "test": 25}


def part_of(text: str) -> Part:
    """The part that an item belongs to.

    Args:
        text: its cluster or wording; letter case and spacing do not count.
    """
    digest = hashlib.sha256(normalize(text).encode("utf-8")).digest()
    place = int.from_bytes(digest[:8], "big") % 100
    for part, share in SHARES.items():
        if place < share:
            return part
        place -= share
    raise AssertionError("the shares are less than a hundred")


def restrict(loaded: Any, part: Part) -> Any:  # noqa: ANN401  # benchmarks have classes of their own
    """A benchmark with the items of one part alone.

    Args:
        loaded: a task of the harness, with its `task`; a panel, with `prompts`; or plain text, with `documents` as
            token ids.
        part: which.

    Raises:
        StageError: if no item belongs to it.
    """
    if hasattr(loaded, "task"):
        return _restrict_task(loaded, part)
    if hasattr(loaded, "prompts"):
        kept = [prompt for prompt in loaded.prompts if part_of(prompt) == part]
        _require(kept, loaded, part)
        return replace(loaded, prompts=kept)
    if hasattr(loaded, "documents"):
        texts = [str(loaded.tokenizer.decode(ids)) for ids in loaded.documents]
        pairs = zip(texts, loaded.documents, strict=True)
        documents = [ids for text, ids in pairs if part_of(text) == part]
        _require(documents, loaded, part)
        return replace(loaded, documents=documents)
    raise StageError(
        f"eval.part: {loaded.row.kind}[{loaded.row.name}] cannot be measured in parts; delete it from the study"
    )


def has_items(texts: Sequence[str], part: Part) -> bool:
    """Whether some of the wordings belong to a part."""
    return any(part_of(text) == part for text in texts)


def _restrict_task(loaded: Any, part: Part) -> Any:  # noqa: ANN401  # the harness's own is untyped
    kept = {
        number: document
        for number, document in loaded.documents.items()
        if part_of(_fact(loaded.task, document)) == part
    }
    _require(kept, loaded, part)
    # The harness has no way to leave out items that are spread over the data.
    loaded.task._instances = [
        instance for instance in loaded.task.instances if instance.doc_id in kept
    ]
    return replace(loaded, documents=kept)


def _fact(task: Any, document: Mapping[str, Any]) -> str:  # noqa: ANN401  # the harness's own is untyped
    """What an item rests on: its cluster, its question, or all of it."""
    if document.get("cluster") is not None:
        return str(document["cluster"])
    question = task.doc_to_text(document)
    return question if isinstance(question, str) else json.dumps(document, default=str)


def _require(kept: object, loaded: Any, part: Part) -> None:  # noqa: ANN401  # see above
    if not kept:
        raise StageError(
            f"eval.part: none of the items of {loaded.row.kind}[{loaded.row.name}] is in the part for {part}; a study "
            "needs a few dozen"
        )
