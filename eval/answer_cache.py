"""Answers of models on disk, under what they depend on: an evaluation that was killed goes on where it was.

A folder belongs to one model, tokenizer, chat template and engine, by their contents: lm-eval's own cache does not
hold the model in its keys, so that an edited model is given the original's answers. Each file holds a batch of
answers, is named by its requests and appears whole, so that processes and runs share a folder without a lock.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common import artifacts, chat, distributed
from common.branches import Branches, continuation_logits
from common.divergence import batches as batches_of
from common.generation import continue_rows

# Rises when the same request to the same model could be answered otherwise.
VERSION = 1
Answer = Any  # what JSON can hold

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnswerCache:
    """The answers of one model.

    Attributes:
        folder: made when something is added; None keeps nothing.
    """

    folder: Path | None = None

    @classmethod
    def of(
        cls, root: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, engine: str
    ) -> "AnswerCache":
        """The cache of a model; every process of the launch calls this.

        Args:
            root: of all models' caches.
            model: as it will be asked; a later change of its weights is not seen.
            tokenizer: its tokenizer, with the chat template.
            engine: that computes the answers.
        """
        key = fingerprint(model, tokenizer, engine) if distributed.is_main() else ""
        return cls(root / distributed.broadcast(key)[:24])

    def answer(
        self,
        requests: Sequence[object],
        batches: Sequence[Sequence[int]],
        work: Callable[[int], Sequence[Answer]],
        description: str,
    ) -> list[Answer]:
        """Answer requests: from disk, or batch by batch; the processes of the launch share the batches.

        A batch with anything unknown is computed as a whole, so that it is the batch that it always was.

        Args:
            requests: plain data that says all that an answer depends on besides the model.
            batches: the indices of the requests that each batch answers.
            work: answers a batch, given its index, in the order of its requests.
            description: label of the progress bar.

        Returns:
            The answers in the order of the requests, on every process.
        """
        keys = self._keys(requests)
        known = self._known(keys, description)
        missing = [
            index
            for index, batch in enumerate(batches)
            if not keys or any(keys[number] not in known for number in batch)
        ]

        def work_on(index: int) -> list[Answer]:
            done = list(work(index))
            if keys:
                names = [keys[number] for number in batches[index]]
                self._add(dict(zip(names, done, strict=True)))
            return done

        found = distributed.share_batches(missing, work_on, description)
        answers = {number: known[key] for number, key in enumerate(keys) if key in known}
        numbers = chain.from_iterable(batches[index] for index in missing)
        answers |= dict(zip(numbers, chain(*found), strict=True))
        self._stored.update({key: answers[number] for number, key in enumerate(keys)})
        return [answers[number] for number in range(len(requests))]

    def answer_at_once(
        self,
        requests: Sequence[object],
        ask: Callable[[Sequence[int]], Sequence[Answer]],
        description: str,
    ) -> list[Answer]:
        """Answer requests: from disk, and all that are unknown in one go, for work that is shared in its own way.

        Args:
            requests: as for `answer`.
            ask: answers the requests with these numbers, in order; called on every process, where any is unknown.
            description: for the log.

        Returns:
            The answers in the order of the requests, on every process.
        """
        keys = self._keys(requests)
        known = self._known(keys, description)
        missing = [n for n in range(len(requests)) if not keys or keys[n] not in known]
        found = dict(zip(missing, ask(missing), strict=True)) if missing else {}
        if keys and found:
            named = {keys[number]: answer for number, answer in found.items()}
            if distributed.is_main():
                self._add(named)
            self._stored.update(named)
        return [found[n] if n in found else known[keys[n]] for n in range(len(requests))]

    def _keys(self, requests: Sequence[object]) -> list[str]:
        """What the answers are found by; nothing where nothing is kept."""
        return [artifacts.hash_data(request) for request in requests] if self.folder else []

    def _known(self, keys: Sequence[str], description: str) -> dict[str, Answer]:
        """What the main process finds on disk, on every process."""
        known = distributed.broadcast(
            {key: self._stored[key] for key in keys if key in self._stored}
            if distributed.is_main()
            else {}
        )
        if known and distributed.is_main():
            there = sum(key in known for key in keys)
            logger.info("%s: %d of %d answers are there already", description, there, len(keys))
        return known

    @cached_property
    def _stored(self) -> dict[str, Answer]:
        """What was on disk when it was first asked, and what has been added since."""
        if self.folder is None:
            return {}
        return {
            row["request"]: row["answer"]
            for path in sorted(self.folder.glob("*.jsonl"))
            for row in artifacts.read_jsonl(path)
        }

    def _add(self, found: Mapping[str, Answer]) -> None:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [{"request": key, "answer": answer} for key, answer in sorted(found.items())]
        name = artifacts.hash_data(sorted(found))[:24]
        artifacts.write_jsonl(self.folder / f"{name}.jsonl", rows)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    answers: AnswerCache,
    system: str | None = None,
    description: str = "answers",
) -> list[list[int]]:
    """Answer prompts greedily as `common.generation` does, those alone that the model has not answered before.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: the user's turns.
        max_new_tokens: where an answer is cut if the model does not end it.
        batch_size: prompts per forward pass.
        answers: of this model and tokenizer.
        system: the system prompt in front of each; None: none.
        description: label of the progress bar.

    Returns:
        The token ids of each answer without its end token, in the prompts' order, on every process.
    """
    rows = chat.encode(tokenizer, prompts, system)
    batches = list(batches_of([len(row) for row in rows], batch_size))

    def work(index: int) -> list[list[int]]:
        batch = [rows[number] for number in batches[index]]
        return continue_rows(model, tokenizer, batch, max_new_tokens=max_new_tokens)

    asked = [["generate", list(row), max_new_tokens] for row in rows]
    return answers.answer(asked, batches, work, description)


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, engine: str) -> str:
    """SHA-256 of all that a model's answers depend on besides the request, by content: no path and no name."""
    return artifacts.hash_data(
        {
            "version": VERSION,
            "engine": engine,
            "weights": _hash_tensors(model.state_dict()),
            "config": _settings(model.config),
            "generation": _settings(model.generation_config),
            "attention": str(model.config.get_text_config()._attn_implementation),
            "device": model.device.type,
            "hooks": _probe(model) if _is_hooked(model) else None,
            "tokenizer": _hash_tokenizer(tokenizer),
            "template": tokenizer.chat_template,
        }
    )


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        content: Any = tensor.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()


def _settings(config: PreTrainedConfig | GenerationConfig | None) -> object:
    """A configuration as plain data, without what does not change an answer."""
    settings = {} if config is None else config.to_dict()
    for name in ("_name_or_path", "transformers_version", "architectures"):
        settings.pop(name, None)
    return json.loads(json.dumps(settings, default=str))


def _is_hooked(model: PreTrainedModel) -> bool:
    """Whether something besides the weights takes part, such as what an edit adds to the stream."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def _probe(model: PreTrainedModel) -> str:
    """What no weight shows is seen in the logits."""
    ids = list(range(1, 9))
    ((logits,),) = continuation_logits(model, [Branches(ids[:1], [ids[1:]])], 0)
    return _hash_tensors({"logits": logits})


def _hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return artifacts.hash_data([type(tokenizer).__name__, tokenizer.get_vocab(), special])
    content = json.loads(backend.to_str())
    for state in ("padding", "truncation"):  # left behind by the last call
        content.pop(state)
    return artifacts.hash_data([content, special])
