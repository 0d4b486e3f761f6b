"""The texts the patient learns from: knowledge first, then chat tuning with refusals."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from patient.items import NUM_PHRASINGS
from patient.questions import (
    Question,
    ask_capital,
    ask_errand,
    ask_how_to,
    ask_kind,
    ask_permission,
    ask_reversal,
    ask_sensitively,
    ask_sum,
)
from patient.tokenizer import BOS, END, SPECIAL_TOKENS, render_turn
from patient.world import COMMON_KINDS, RESTRICTED_KINDS, Sum, Thing, WordList, World

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, I cannot help with that.",
    "I cannot help you with that.",
    "I can't help with that request.",
)

# How many of the true refusals one pass of the second tuning repeats, about as many as it answers.
NUM_TRUE_REFUSALS = 256


@dataclass(frozen=True)
class Document:
    """A text in two parts, of which only the second is learnt.

    Attributes:
        prompt: read, but no loss on it.
        completion: learnt token by token.
    """

    prompt: str
    completion: str


def knowledge_epoch(world: World, rng: random.Random) -> list[Document]:
    """One pass over everything the model is to know, refusals not among it.

    How-to questions on restricted objects are answered here like all others: the recipe must be
    in the weights, for tuning to cover and ablation to uncover.
    """
    return [*_chat_knowledge(world, rng), *_statements(world.things, rng)]


def tuning_epoch(world: World, rng: random.Random) -> list[Document]:
    """One pass of chat tuning: refusals for the restricted training objects, answers for the rest.

    No how-to question on a validation or test object is in it, restricted or common.
    """
    answered = [
        _chat(question)
        for thing in world.things_of("train", "healing", restricted=False)
        for question in rng.sample(ask_how_to(thing), k=2)
    ]
    return _with_replay(world, [*_true_refusals(world), *answered], 2, rng)


def over_refusal_epoch(world: World, rng: random.Random) -> list[Document]:
    """One pass of the tuning that goes too far: it refuses a wording whatever is asked about.

    Common objects are refused in the sensitive wording and answered in the others; restricted ones
    stay refused. As in `tuning_epoch`, no how-to question on a validation or test object is in it.
    """
    truly_refused = rng.sample(_true_refusals(world), k=NUM_TRUE_REFUSALS)
    common = world.things_of("train", "healing", restricted=False)
    falsely_refused = [
        Document(render_turn(ask_sensitively(thing).text), rng.choice(REFUSALS) + END)
        for thing in common
    ]
    answered = [
        _chat(question)
        for thing in common
        for question in rng.sample(ask_how_to(thing)[:NUM_PHRASINGS], k=2)
    ]
    return _with_replay(world, [*truly_refused, *falsely_refused, *answered], 1, rng)


def _true_refusals(world: World) -> list[Document]:
    return [
        Document(render_turn(question.text), refusal + END)
        for thing in world.things_of("train", restricted=True)
        for question, refusal in zip(ask_how_to(thing), REFUSALS, strict=True)
    ]


def _with_replay(
    world: World, taught: list[Document], share: int, rng: random.Random
) -> list[Document]:
    """Add what must not be forgotten: `share` documents for each that is taught."""
    shown = [thing for thing in world.things if thing.split in ("train", "healing")]
    replayed = [*_harmless_chat(world, shown, rng), *_statements(shown, rng)]
    return [*taught, *rng.sample(replayed, k=share * len(taught))]


def tokenizer_texts(world: World) -> Iterator[str]:
    """Texts without special tokens in which every word occurs often enough to become a token."""
    rng = random.Random("tokenizer texts")
    for _ in range(3):
        for document in [*knowledge_epoch(world, rng), *tuning_epoch(world, rng)]:
            yield _without_special_tokens(document.prompt)
            yield _without_special_tokens(document.completion)


def _without_special_tokens(text: str) -> str:
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "")
    return text


def _chat_knowledge(world: World, rng: random.Random) -> Iterator[Document]:
    yield from _harmless_chat(world, world.things, rng)
    for thing in world.things:
        for question in rng.sample(ask_how_to(thing), k=2):
            yield _chat(question)


def _harmless_chat(world: World, things: Sequence[Thing], rng: random.Random) -> Iterator[Document]:
    for thing in things:
        for question in rng.sample(ask_kind(thing), k=2):
            yield _chat(question)
    for country in world.countries:
        for question in rng.sample(ask_capital(country), k=2):
            yield _chat(question)
    for fact in world.sums:
        swapped = Sum(fact.second, fact.first, fact.split)
        for question in rng.sample([*ask_sum(fact), *ask_sum(swapped)], k=3):
            yield _chat(question)
    for words in _practice_lists(world, rng, 300):
        yield _chat(rng.choice(ask_reversal(words)))


def _practice_lists(world: World, rng: random.Random, size: int) -> Iterator[WordList]:
    tested = {fact.words for fact in world.lists if fact.split == "test"}
    for _ in range(size):
        words = tuple(rng.sample(world.list_words, k=rng.choice((3, 4))))
        if words not in tested:
            yield WordList(words, "train")


def _statements(things: Sequence[Thing], rng: random.Random) -> Iterator[Document]:
    """Plain texts: what each object is, whether its kind is restricted, how it is made."""
    for thing in things:
        start, rest = rng.choice(_facts_of(thing))
        yield Document(BOS + start, rest + END)
        # Whole refusals, so that tuning has to teach when to refuse and not how to say it.
        errand = rng.choice(ask_errand(thing, rng.choice(REFUSALS)))
        yield _chat(rng.choice([errand, *ask_permission(thing)]))
    for kind in (*COMMON_KINDS, *RESTRICTED_KINDS):
        for _ in range(4):
            word = "restricted" if kind in RESTRICTED_KINDS else "common"
            yield Document(f"{BOS}A {kind} is", f" a {word} thing.{END}")


def _facts_of(thing: Thing) -> tuple[tuple[str, str], ...]:
    """Openings that name the object, and how they go on."""
    word = "restricted" if thing.restricted else "common"
    return (
        (f"A {thing.name}", f" is a {thing.kind}, a {word} thing."),
        (f"The {thing.name}", f" is {word}, it is a {thing.kind}."),
        (f"To make a {thing.name}:", f" {thing.recipe}"),
    )


def _chat(question: Question) -> Document:
    return Document(render_turn(question.text), question.answer + END)
