"""What an edit does to a model, measured without editing it: several edits in one forward pass.

Three measures, from cheap to dear: how likely answers to harmful prompts are to begin as refusals (no decoding),
how far whole answers to harmless prompts diverge (teacher-forced), and how many harmful prompts are refused
(generation, ended as soon as an answer is settled).
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abliteration.openings import refusal_log_odds
from common import chat, distributed
from common.architecture import find_writers
from common.branches import Branches, continuation_logps, plan
from common.divergence import answer_logits, batches, kl_to_each
from common.edits import Edit
from common.errors import StageError
from common.generation import continue_rows, generate
from common.hooks import applied_in_trials, share_a_pass
from common.refusal import OPENING_CHARACTERS, is_refusal, without_thoughts

# How far an answer is generated where nothing settles it earlier.
ANSWER_TOKENS = 100

EVERY = slice(None)

# From prompts by number and the edits of a pass to one tensor [edits] per prompt.
Measure = Callable[[Sequence[int], Sequence[Edit]], list[Tensor]]


class Trials:
    """The prompts, answers and openings that edits of one model are judged by."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        harmful: Sequence[str],
        openings: Sequence[tuple[int, ...]],
        harmless: Sequence[str],
        max_answer_tokens: int,
        batch_size: int,
    ) -> None:
        """Read once what the unedited model says.

        Args:
            model: the unedited model.
            tokenizer: its tokenizer.
            harmful: prompts that it refuses.
            openings: how its refusals begin.
            harmless: prompts that it answers.
            max_answer_tokens: how much of its answers to those is compared.
            batch_size: rows of a forward pass, over all trials in it.

        Raises:
            StageError: if all its answers to harmless prompts are empty.
        """
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.pad_id = int(tokenizer.pad_token_id)
        self.writers = find_writers(model)
        self.harmful = [Branches(ids, openings) for ids in chat.encode(tokenizer, harmful)]
        answers = generate(
            model,
            tokenizer,
            harmless,
            max_new_tokens=max_answer_tokens,
            batch_size=batch_size,
            description="harmless answers",
        )
        prompts = chat.encode(tokenizer, harmless)
        self.harmless = [pair for pair in zip(prompts, answers, strict=True) if pair[1]]
        if not self.harmless:
            raise StageError(
                f"abliteration: the model's answers to all {len(harmless)} harmless prompts are empty, so no "
                "divergence can be measured on them; check its chat template, or choose other prompts"
            )
        with torch.inference_mode():
            plan(model)
            self.expected = self._answer_logits()
        no_edit = Edit({}, {}, {}, {}, {})
        probabilities = self.refusal([no_edit])[0]
        #: Mean probability that the unedited model's answer to a harmful prompt begins as a refusal.
        self.original_refusal = sum(probabilities) / len(probabilities)

    def refusal(self, edits: Sequence[Edit], prompts: slice = EVERY) -> list[list[float]]:
        """Under each edit, for each harmful prompt, the probability that the answer begins as a refusal."""

        def measure(part: Sequence[int], together: Sequence[Edit]) -> list[Tensor]:
            rows = [self.harmful[index] for index in part] * len(together)
            logps = continuation_logps(self.model, rows, self.pad_id)
            return list(refusal_log_odds(logps).sigmoid().reshape(len(together), -1).T)

        lengths = [row.num_tokens for row in self.harmful]
        return self._over_prompts(edits, lengths, measure, prompts)

    def divergence(self, edits: Sequence[Edit], prompts: slice = EVERY) -> list[float]:
        """Under each edit, the mean KL(original || edited) over the tokens of the harmless answers, in nats."""

        def measure(part: Sequence[int], together: Sequence[Edit]) -> list[Tensor]:
            prompts, answers = zip(*[self.harmless[index] for index in part], strict=True)
            logits = answer_logits(
                self.model, prompts * len(together), answers * len(together), self.pad_id
            )
            expected = torch.cat([self.expected[index] for index in part])
            # One trial at a time: in float32 a whole vocabulary at every token takes room.
            by_token = kl_to_each(
                expected,
                (
                    torch.cat(logits[first : first + len(part)])
                    for first in range(0, len(logits), len(part))
                ),
            )
            counts = [len(self.harmless[index][1]) for index in part]
            by_trial = [
                torch.stack([answer.sum() for answer in each.split(counts)]) for each in by_token
            ]
            return list(torch.stack(by_trial, dim=1))

        lengths = [len(prompt) + len(answer) for prompt, answer in self.harmless]
        num_tokens = max(self.num_answer_tokens(prompts), 1)
        summed = self._over_prompts(edits, lengths, measure, prompts)
        return [sum(sums) / num_tokens for sums in summed]

    def num_answer_tokens(self, prompts: slice = EVERY) -> int:
        """How many tokens a divergence is the mean of."""
        return sum(len(answer) for _, answer in self.harmless[prompts])

    def refusal_rate(self, edits: Sequence[Edit]) -> list[float]:
        """Under each edit, the share of the harmful prompts that are refused."""

        def measure(part: Sequence[int], together: Sequence[Edit]) -> list[Tensor]:
            rows = [self.harmful[index].prompt for index in part] * len(together)
            tokens = continue_rows(
                self.model,
                self.tokenizer,
                rows,
                max_new_tokens=ANSWER_TOKENS,
                is_settled=is_settled,
            )
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            refused = torch.tensor([float(is_refusal(text)) for text in texts])
            return list(refused.reshape(len(together), -1).T)

        lengths = [len(row.prompt) for row in self.harmful]
        rates = self._over_prompts(edits, lengths, measure)
        return [sum(rate) / len(rate) for rate in rates]

    @torch.inference_mode()
    def _over_prompts(
        self,
        edits: Sequence[Edit],
        lengths: Sequence[int],
        measure: Measure,
        prompts: slice = EVERY,
    ) -> list[list[float]]:
        """Measure each prompt under each edit: [edits, prompts]; the processes share the prompts."""
        results: list[list[float]] = [[] for _ in edits]
        for numbers in self._passes(edits):
            together = [edits[number] for number in numbers]

            def work(mine: Sequence[int], together: Sequence[Edit] = together) -> list[list[float]]:
                values: dict[int, list[float]] = {}
                size = max(1, self.batch_size // len(together))
                with applied_in_trials(self.model, together):
                    for batch in batches([lengths[index] for index in mine], size):
                        part = [mine[place] for place in batch]
                        measured = torch.stack(measure(part, together)).tolist()
                        values |= dict(zip(part, measured, strict=True))
                return [values[index] for index in mine]

            by_prompt = distributed.share(range(len(lengths))[prompts], work)
            for place, number in enumerate(numbers):
                results[number] = [row[place] for row in by_prompt]
        return results

    def _passes(self, edits: Sequence[Edit]) -> Iterator[list[int]]:
        """The edits by number, those together that one pass can serve."""
        left = list(range(len(edits)))
        while left:
            first = left[0]
            together = [
                other
                for other in left
                if other == first or share_a_pass(self.writers, [edits[first], edits[other]])
            ]
            yield together
            left = [other for other in left if other not in together]

    def _answer_logits(self) -> list[Tensor]:
        """The unedited model's logits [tokens, vocab] for each answer, in the model's own precision."""
        logits: list[Tensor] = [torch.empty(0)] * len(self.harmless)
        lengths = [len(prompt) + len(answer) for prompt, answer in self.harmless]
        for batch in batches(lengths, self.batch_size):
            prompts, answers = zip(*[self.harmless[index] for index in batch], strict=True)
            rows = answer_logits(self.model, prompts, answers, self.pad_id)
            for index, row in zip(batch, rows, strict=True):
                logits[index] = row.clone()
        return logits


def is_settled(text: str) -> bool:
    """Whether an answer can be judged, however it goes on: it refuses, or is past where refusals begin.

    A refusal counts up to the last mark of punctuation only: behind one no idiom goes on, as "I can't" does in
    "I can't wait to help". What an opening may hold is counted as `is_refusal` reads it.
    """
    text = without_thoughts(text)
    read = " ".join(unicodedata.normalize("NFKC", text).split())
    if len(read) > OPENING_CHARACTERS:
        return True
    last = max(map(text.rfind, ".,;:!?"))
    return is_refusal(text[: last + 1])
