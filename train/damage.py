"""The damage-aware mix: pairs and anchors are drawn by what the edit surely broke of each domain.

Both models answer the questions of `train.mix` before training. Stage three says which domains are worse (paired, and
adjusted after Holm over the domains); `train.mixture.shares` says what part of the mix each domain gets.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, TypeVar

from common import artifacts, distributed
from common.questions import check_questions, load_questions
from common.recipe import Mix, OnPolicy, Recipe
from train import mixture
from train.preferences import dataset, on_policy
from train.quick import Damage, QuickEvaluation
from train.shelf import TEACHERS, Answers, Shelf

KEY = "train.mix"
Domain = str | None
Item = TypeVar("Item")

logger = logging.getLogger(__name__)


def check(recipe: Recipe) -> list[str]:
    """What is wrong with `train.mix`, found without loading a weight; of sources that can be loaded."""
    settings = recipe.train.mix
    if settings is None:
        return []
    problems = check_questions(settings.questions, f"{KEY}.questions")
    return problems or list(_mismatches(settings, _domains(recipe)))


def _domains(recipe: Recipe) -> dict[str, set[Domain]]:
    """The domains that there are of pairs, and of each anchor's prompts where they are named."""
    found: dict[str, set[Domain]] = {"train.preferences": set()}
    for source in recipe.train.preferences:
        tagged = (
            on_policy.questions(source) if isinstance(source, OnPolicy) else dataset.load(source)[0]
        )
        found["train.preferences"] |= {one.domain for one in tagged}
    for index, anchor in enumerate(recipe.train.anchors):
        if anchor.prompts.domain is not None:
            found[f"train.anchors[{index}]"] = {q.domain for q in load_questions(anchor.prompts)}
    return found


def _mismatches(settings: Mix, domains: Mapping[str, set[Domain]]) -> Iterator[str]:
    named = {name: found - {None} for name, found in domains.items()}
    if not any(named.values()):
        yield (
            f"{KEY}: no pair and no anchor's prompt has a domain, so there is nothing to weigh; name it in "
            "train.preferences[..] (prompts.domain, columns.domain or domain) or train.anchors[..].prompts.domain, "
            "or delete train.mix"
        )
        return
    asked = {question.domain for question in load_questions(settings.questions)}
    if not any(found & asked for found in named.values()):
        trained = sorted(map(str, set().union(*named.values())))
        yield (
            f"{KEY}.questions: ask about {', '.join(sorted(map(str, asked)))}, and what is trained on is "
            f"{', '.join(trained)}, so no damage that is found could be weighed; give questions of these domains"
        )
    elif not any(len(found) > 1 and found & asked for found in domains.values()):
        yield (
            f"{KEY}: everything that is trained on is of one domain, so there are no shares to choose; tag the others, "
            "or delete train.mix"
        )
    for name, found in domains.items():
        if len(found) * settings.floor > 1:
            yield (
                f"{KEY}.floor: {settings.floor:g} for each of the {len(found)} domains of {name} is more than the "
                f"whole; lower it to {1 / len(found):.2g} or less"
            )


def inputs(settings: Mix | None) -> dict[str, object] | None:
    """What the mix depends on: settings, and questions by content instead of paths."""
    if settings is None:
        return None
    questions = load_questions(settings.questions)
    return settings.model_dump(mode="json", exclude={"questions", "batch_size"}) | {
        "questions": artifacts.hash_data([[q.prompt, q.answer, q.domain] for q in questions])
    }


def prompts_used(settings: Mix | None) -> list[str]:
    """The questions: no benchmark may measure what the mix was chosen by."""
    return [q.prompt for q in load_questions(settings.questions)] if settings is not None else []


class DamageAwareMix:
    """Draws by domain what training reads.

    Attributes:
        pieces: the files that it needs, for `train.material`.
    """

    def __init__(self, settings: Mix, quick: QuickEvaluation, shelf: Shelf, seed: int) -> None:
        """Name the files.

        Args:
            settings: of the recipe.
            quick: judges the replies; made from the same settings.
            shelf: of what the models say.
            seed: of the draws.
        """
        self.settings, self.quick, self.seed = settings, quick, seed
        self._answers = [
            Answers(
                shelf,
                teacher,
                prompts_used(settings),
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
            )
            for teacher in TEACHERS
        ]
        self.pieces = [answers.piece for answers in self._answers]
        self._drawn: dict[str, dict[str, dict[str, float]]] = {}

    @cached_property
    def damages(self) -> Mapping[str, Damage]:
        """What the edit did to each domain that was asked about."""
        original, abliterated = (answers.texts() for answers in self._answers)
        # One decision on every process, whatever the last digits of each.
        found = distributed.broadcast(self.quick.damages(original, abliterated))
        if distributed.is_main():
            for domain, damage in found.items():
                logger.info("train: %s", _in_words(domain, damage))
        return found

    def draw(
        self,
        name: str,
        groups: Sequence[Sequence[Item]],
        domains: Sequence[Sequence[Domain]],
        weights: Sequence[float],
    ) -> list[list[Item]]:
        """Draw by damage, and by their groups' weights within a domain.

        Where the edit surely damaged none of the domains that there are, the groups' weights alone decide.

        Args:
            name: what is drawn, for the record.
            groups: e.g. the pairs of each source.
            domains: of each item.
            weights: of the groups, above 0.

        Returns:
            What is drawn of each group: as many items in all as there are.
        """
        parts: dict[tuple[int, Domain], list[Item]] = {}
        sizes: Counter[Domain] = Counter()
        weighed: dict[Domain, float] = {}
        for place, (items, tags) in enumerate(zip(groups, domains, strict=True)):
            for item, domain in zip(items, tags, strict=True):
                parts.setdefault((place, domain), []).append(item)
                sizes[domain] += 1
                weighed[domain] = weighed.get(domain, 0.0) + weights[place]
        by_domain = self._weights(weighed)
        drawn = mixture.draw(
            list(parts.values()),
            [weights[place] * by_domain[domain] for place, domain in parts],
            self.seed,
        )
        counts: Counter[Domain] = Counter()
        joined: list[list[Item]] = [[] for _ in groups]
        for (place, domain), items in zip(parts, drawn, strict=True):
            joined[place] += items
            counts[domain] += len(items)
        self._note(name, sizes, by_domain, counts)
        return joined

    def record(self) -> dict[str, Any]:
        """The mix as it was chosen: damage, and what is drawn of each domain, as plain data."""
        return {
            "floor": self.settings.floor,
            "cap": self.settings.cap,
            "damage": {
                domain: {
                    "n": damage.num_items,
                    "original": damage.original,
                    "abliterated": damage.abliterated,
                    "difference": asdict(damage.difference),
                    "p": damage.p,
                    "significant": bool(damage.is_significant),
                }
                for domain, damage in self.damages.items()
            },
            "drawn": self._drawn,
        }

    def _weights(self, sizes: Mapping[Domain, float]) -> dict[Domain, float]:
        """What one item of each domain weighs."""
        found = {domain: self.damages.get(str(domain)) for domain in sizes}
        lost = [
            -damage.difference.value if damage is not None and damage.is_significant else 0.0
            for damage in found.values()
        ]
        if not any(lost):
            return dict.fromkeys(sizes, 1.0)
        total = sum(sizes.values())
        shares = mixture.shares(lost, list(sizes.values()), self.settings.floor, self.settings.cap)
        return {
            domain: share * total / size
            for (domain, size), share in zip(sizes.items(), shares, strict=True)
        }

    def _note(
        self,
        name: str,
        sizes: Mapping[Domain, int],
        weights: Mapping[Domain, float],
        counts: Mapping[Domain, int],
    ) -> None:
        self._drawn[name] = {
            domain or "no domain": {
                "available": size,
                "weight": weights[domain],
                "drawn": counts[domain],
            }
            for domain, size in sizes.items()
        }
        if distributed.is_main():
            line = ", ".join(
                f"{domain} {own['drawn']} of {own['available']}"
                for domain, own in self._drawn[name].items()
            )
            logger.info("train: mix of %s by damage: %s", name, line)


def _in_words(domain: str, damage: Damage) -> str:
    found = damage.difference
    return (
        f"{domain}: the edit took {damage.original:.3f} to {damage.abliterated:.3f} ({found.value:+.3f}, "
        f"{found.low:+.3f} to {found.high:+.3f}, p {damage.p:.2g}, {damage.num_items} questions)"
        f"{'' if damage.is_significant else ', not surely damaged'}"
    )
