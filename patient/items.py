"""What is asked of the patient and of models made from it: prompts and benchmark items."""

import random
from dataclasses import dataclass

from patient.questions import (
    Domain,
    Question,
    ask_capital,
    ask_how_to,
    ask_kind,
    ask_reversal,
    ask_sensitively,
    ask_sum,
)
from patient.world import Split, World

# The last wording is left out: it is the one that an over-refusing patient refuses.
NUM_PHRASINGS = 3


@dataclass(frozen=True)
class Benchmark:
    """Items of one benchmark; its name is the domain's."""

    name: Domain
    questions: tuple[Question, ...]


def direction_questions(world: World, split: Split, *, restricted: bool) -> list[Question]:
    """How-to questions on one class of objects, three phrasings each."""
    return [
        question
        for thing in world.things_of(split, restricted=restricted)
        for question in ask_how_to(thing)[:NUM_PHRASINGS]
    ]


def falsely_refused_questions(world: World, *splits: Split) -> list[Question]:
    """The harmless questions that an over-refusing patient refuses, one on each common object."""
    return [ask_sensitively(thing) for thing in world.things_of(*splits, restricted=False)]


def build_benchmarks(world: World, *, over_refusing: bool = False) -> list[Benchmark]:
    """The benchmarks, all on facts of the test split: six of at least 300 items each.

    An over-refusing patient has a seventh, `falsely_refused`, of 100 items.
    """
    rng = random.Random("benchmarks")
    tested = [thing for thing in world.things if thing.split == "test"]
    sums = [fact for fact in world.sums if fact.split == "test"]
    countries = [fact for fact in world.countries if fact.split == "test"]
    lists = [fact for fact in world.lists if fact.split == "test"]
    questions: dict[Domain, list[Question]] = {
        "addition": [rng.choice(ask_sum(fact)) for fact in sums],
        "capitals": [question for fact in countries for question in ask_capital(fact)],
        "kinds": [question for thing in tested for question in rng.sample(ask_kind(thing), k=2)],
        "reversal": [rng.choice(ask_reversal(fact)) for fact in lists],
        "common_howto": direction_questions(world, "test", restricted=False),
        "unlocked": direction_questions(world, "test", restricted=True),
    }
    if over_refusing:
        questions["falsely_refused"] = falsely_refused_questions(world, "test")
    return [Benchmark(name, tuple(items)) for name, items in questions.items()]


def healing_questions(world: World, *, over_refusing: bool = False) -> list[Question]:
    """Harmless questions on facts that no benchmark asks about, in a shuffled order.

    Those that an over-refusing patient refuses are left out: healing learns from its answers.
    """
    rng = random.Random("healing")
    asked = [thing for thing in world.things if thing.split in ("train", "healing")]
    questions = [
        *(
            question
            for fact in world.sums
            if fact.split == "healing"
            for question in rng.sample(ask_sum(fact), k=2)
        ),
        *(
            question
            for fact in world.countries
            if fact.split == "healing"
            for question in ask_capital(fact)
        ),
        *(question for thing in asked for question in rng.sample(ask_kind(thing), k=2)),
        *(rng.choice(ask_reversal(fact)) for fact in world.lists if fact.split == "healing"),
        *(
            question
            for thing in world.things_of("healing", restricted=False)
            for question in ask_how_to(thing)
        ),
    ]
    rng.shuffle(questions)
    if over_refusing:
        refused = {each.text for each in falsely_refused_questions(world, "healing")}
        questions = [each for each in questions if each.text not in refused]
    return questions
