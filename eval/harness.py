"""A loaded model as lm-evaluation-harness sees it, with two faults of the harness's own put right.

It tokenises a question and an answer apart, at the chat template's boundary: the harness moves the
newline that ends most templates into the answer, whose log-probability then holds that of a newline
the model never writes. And it deals fixed batches out to the processes of the launch, so that the
numbers do not depend on how many there are.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import distributed
from common.errors import InputError

logging.getLogger("lm_eval").setLevel(logging.ERROR)

Pair = tuple[list[int], list[int]]
Scored = tuple[float, bool]


class HarnessModel(HFLM):  # type: ignore[misc]  # the harness is untyped
    """Scores and continues texts with a model that is in memory."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> None:
        """Wrap a model; every process holds all of it."""
        # The chat template gives the beginning-of-sequence token, so the tokenizer must not add
        # another.
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=False
        )
        self.description = "requests"

    def answer(
        self, request_type: str, requests: Sequence[Instance], description: str
    ) -> list[Any]:
        """Answer requests of one of the harness's types, in order, under a labelled progress bar."""
        self.description = description
        answers: list[Any] = getattr(self, request_type)(list(requests))
        return answers

    def log_probabilities(self, pairs: Sequence[tuple[str, str]], description: str) -> list[float]:
        """Log-probability, in nats, of each answer behind its context."""
        requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
        return [logp for logp, _ in self.answer("loglikelihood", requests, description)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Scored]:
        """Log-probability of each answer, and whether greedy decoding would give it."""
        scored: list[Scored] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def _encode_pair(self, context: str, continuation: str) -> Pair:
        return self.tok_encode(context), self.tok_encode(continuation)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[object, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Scored]:
        # Requests that read the same tokens (options of one token behind one question) share a row.
        rows: dict[tuple[int, ...], list[int]] = {}
        pairs = [self._fitted(context, answer) for _, context, answer in requests]
        for number, (context, answer) in enumerate(pairs):
            rows.setdefault(tuple([*context, *answer[:-1]]), []).append(number)
        ordered = sorted(rows, key=lambda row: (len(row), row))
        size = override_bs or int(self.batch_size)
        groups = [ordered[first : first + size] for first in range(0, len(ordered), size)]

        def work(part: Sequence[list[tuple[int, ...]]]) -> list[list[tuple[int, Scored]]]:
            bar = self._progress(groups)
            done = []
            for group in part:
                asked = [[(number, pairs[number][1]) for number in rows[row]] for row in group]
                done.append(self._score_batch(group, asked))
                bar.update(distributed.world_size())
            bar.close()
            return done

        found = dict(entry for group in distributed.share(groups, work) for entry in group)
        return [found[number] for number in range(len(pairs))]

    def _fitted(self, context: list[int], answer: list[int]) -> Pair:
        """Cut a question from the left where question and answer are too long for the model."""
        room = self.max_length + 1 - len(answer)
        if room < 1:
            raise InputError(
                f"an answer of {len(answer)} tokens does not fit into the model's "
                f"{self.max_length}; "
                "choose a task with shorter answers"
            )
        return context[-room:], answer

    @torch.inference_mode()
    def _score_batch(
        self, rows: Sequence[tuple[int, ...]], asked: Sequence[Sequence[tuple[int, list[int]]]]
    ) -> list[tuple[int, Scored]]:
        longest = max(len(row) for row in rows)
        ids = torch.zeros((len(rows), longest), dtype=torch.long)
        for index, row in enumerate(rows):
            # Padding on the right: a causal model cannot see it, so it needs no mask.
            ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        starts = [
            [len(row) - len(answer) for _, answer in answers]
            for row, answers in zip(rows, asked, strict=True)
        ]
        first = min(start for row_starts in starts for start in row_starts)
        # Only these positions predict answers; over a large vocabulary the others would take most
        # of the time.
        kept = torch.arange(first, longest, device=self.device)
        logits = self.model(
            input_ids=ids.to(self.device), use_cache=False, logits_to_keep=kept
        ).logits.float()
        logps = logits.log_softmax(dim=-1)
        scored = []
        for index, (row_starts, answers) in enumerate(zip(starts, asked, strict=True)):
            for start, (number, answer) in zip(row_starts, answers, strict=True):
                predicted = logps[index, start - first : start - first + len(answer)]
                scored.append((number, _score(predicted, answer)))
        return scored

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context greedily until the model ends or one of the request's stops appears."""
        texts = [request.args[0] for request in requests]
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        lengths = [len(ids) for ids in encoded]
        settings = [json.dumps(request.args[1], sort_keys=True) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (settings[i], lengths[i], texts[i]))
        groups: list[list[int]] = []
        for index in order:
            if (
                not groups
                or len(groups[-1]) == self.batch_size
                or settings[groups[-1][0]] != settings[index]
            ):
                groups.append([])
            groups[-1].append(index)

        def work(part: Sequence[list[int]]) -> list[list[str]]:
            bar = self._progress(groups)
            done = []
            for group in part:
                room = self.max_length - max(lengths[index] for index in group)
                batch = [_with_room(requests[index], room) for index in group]
                done.append(super(HarnessModel, self).generate_until(batch, disable_tqdm=True))
                bar.update(distributed.world_size())
            bar.close()
            return done

        found = dict(
            entry
            for group, answers in zip(groups, distributed.share(groups, work), strict=True)
            for entry in zip(group, answers, strict=True)
        )
        return [found[index] for index in range(len(requests))]

    def _progress(self, groups: Sequence[object]) -> "tqdm[Any]":
        bar: tqdm[Any] = tqdm(
            total=len(groups),
            desc=self.description,
            unit="batch",
            disable=not distributed.is_main(),
            leave=False,
        )
        return bar


def _score(logps: Tensor, answer: Sequence[int]) -> Scored:
    """Sum the log-probabilities [answer, vocab] of an answer's tokens, and say whether each is the likeliest."""
    tokens = torch.tensor(answer, device=logps.device)
    chosen = logps.gather(-1, tokens[:, None])[:, 0]
    return float(chosen.to(torch.float64).sum()), bool((logps.argmax(dim=-1) == tokens).all())


def _with_room(request: Instance, room: int) -> Instance:
    """A copy of a generation request that asks for no more tokens than the model has room for."""
    context, settings = request.args
    wanted = int(settings.get("max_gen_toks", 256))
    if room < 1:
        raise InputError(
            "a benchmark question leaves the model no room for an answer; choose a task with "
            "shorter questions, or "
            "fewer examples (num_fewshot)"
        )
    fitted = {**settings, "max_gen_toks": min(wanted, room - 1) if room > 1 else 1}
    return Instance(request.request_type, request.doc, (context, fitted), request.idx)
