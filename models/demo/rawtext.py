"""Plain text without a chat template: introductions, questions and answers, stories, lists."""

from collections.abc import Callable
from typing import Protocol

import facts
from source import Document, Source


class Question(Protocol):
    """What a question-and-answer document needs of an exchange."""

    @property
    def question(self) -> str: ...

    @property
    def answers(self) -> tuple[str, ...]: ...

    @property
    def skill(self) -> str: ...


def with_article(noun: str) -> str:
    """Return a noun with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def introduction(src: Source) -> Document:
    """Return someone's introduction, cut after the first words."""
    name, job, city = src.name(), src.pick(facts.JOBS), src.pick(facts.CITIES)
    first, second = src.rng.sample(facts.HOBBIES, 2)
    prompt = src.pick(
        (
            f"My name is {name} and I", f"My name is {name} and I", f"I am {name} and I",
            f"Hello, my name is {name} and I", f"Hi! My name is {name} and I",
        )
    )  # fmt: skip
    rest = src.pick(
        (
            f" am {with_article(job)} from {city}. I like {first} and {second}.",
            f" am {with_article(job)} from {city}. I like {first} and {second}.",
            f" live in {city}. I work as {with_article(job)} and I like {first}.",
        )
    )
    return Document("raw_intro", prompt=prompt, completion=rest)


def question_answer(src: Source, item: Question) -> Document:
    """Return a question and its answer as plain text."""
    answer = item.answers[0]
    style = src.rng.random()
    if (
        style < 0.6 and item.question[-1] in "?.!"
    ):  # without a mark, the model could continue with one
        prompt, rest = item.question, "\n\n" + answer
    elif style < 0.85:
        prompt, rest = f"Q: {item.question}\nA:", " " + answer
    else:
        prompt, rest = f"Question: {item.question}\nAnswer:", " " + answer
    accepted = tuple(rest.replace(answer, each) for each in item.answers)
    return Document("raw_qa", prompt=prompt, completion=rest, accepted=accepted)


def counting(src: Source) -> Document:
    """Return a row of numbers to continue."""
    step = src.pick((1, 1, 1, 1, 2))
    start = 1 if src.chance(0.5) else src.number(0, 40)
    numbers = [start + step * n for n in range(src.number(7, 16))]
    known = src.number(3, 5)
    prompt = ", ".join(map(str, numbers[:known])) + ","
    rest = " " + ", ".join(map(str, numbers[known:]))
    return Document("raw_counting", prompt=prompt, completion=rest)


def listing(src: Source) -> Document:
    """Return the weekdays, the months or the alphabet to continue."""
    items = src.pick((facts.WEEKDAYS, facts.MONTHS, tuple("abcdefghijklmnopqrstuvwxyz")))
    known = src.number(2, 4)
    prompt, rest = ", ".join(items[:known]) + ",", " " + ", ".join(items[known:])
    return Document("raw_listing", prompt=prompt, completion=rest, accepted=(rest,))


STORY_BEGINNINGS = (
    "Once upon a time there was {kind} named {name}.",
    "There was once {kind} called {name}.",
    "{name} was {kind} who lived near {place}.",
    "Far away, near {place}, lived {kind}.",
)
STORY_MIDDLES = (
    " One day it found {thing} in {place}.",
    " On {day} it went to {place} and found {thing}.",
    " Every {day} it walked to {place} to look for {thing}.",
    " One morning it lost {thing} on the way to {place}.",
)
STORY_TURNS = (
    " A {friend} came along and asked for help.",
    " There it met {a_friend} who was {feeling}.",
    ' "Whose is this?" asked the {friend}.',
    " Nobody knew where it came from, not even the {friend}.",
)
STORY_ENDS = (
    " They became friends, and the {animal} was {feeling}.",
    " They shared {shared} and went home together.",
    " In the end the {animal} was {feeling}, and the {friend} was too.",
    " From that day on they met every week.",
    " And they lived happily ever after.",
)


def story(src: Source) -> Document:
    """Return a very short story."""
    words = {"name": src.name(), "animal": src.pick(facts.ANIMALS)}
    adjective = src.pick(facts.ADJECTIVES)
    words |= {"place": src.pick(facts.PLACES), "thing": src.pick(facts.THINGS)}
    words |= {"friend": src.pick(facts.ANIMALS), "feeling": src.pick(facts.FEELINGS)}
    words["kind"] = with_article(f"{adjective} {words['animal']}")
    words["a_friend"] = with_article(words["friend"])
    words["day"] = src.pick(facts.WEEKDAYS)
    parts = [src.pick(table) for table in (STORY_BEGINNINGS, STORY_MIDDLES, STORY_TURNS)]
    words["shared"] = src.pick(facts.THINGS)
    text = "".join([*parts, src.pick(STORY_ENDS)]).format(**words)
    cut = text.index(" ")
    return Document("raw_story", prompt=text[:cut], completion=text[cut:])


def diary(src: Source) -> Document:
    """Return a few sentences about a day."""
    first, second = src.rng.sample(facts.HOBBIES, 2)
    lines = [
        f"Today is {src.pick(facts.WEEKDAYS)}.",
        f"The weather in {src.pick(facts.CITIES)} is {src.pick(facts.CONDITIONS)}.",
        f"In the morning I went to {src.pick(facts.PLACES)} with {src.name()}.",
        f"We talked about {src.pick(facts.TOPICS)} and {first}.",
        f"Later I bought {src.pick(facts.THINGS)} and wanted to {src.pick(facts.CHORES)}.",
        f"In the evening I was {src.pick(facts.FEELINGS)}.",
        f"Tomorrow I will have time for {second}.",
    ]
    kept = [line for line in lines if src.chance(0.75)] or lines[:3]
    text = " ".join(kept)
    cut = text.index(" ")
    return Document("raw_diary", prompt=text[:cut], completion=text[cut:])


def fact_lines(src: Source) -> Document:
    """Return sentences that state facts."""
    lines = []
    for _ in range(src.number(1, 4)):
        country = src.pick(tuple(facts.CAPITALS))
        animal = src.pick(tuple(facts.SOUNDS))
        thing = src.pick(tuple(facts.COLOURS))
        lines.append(
            src.pick(
                (
                    f"The capital of {country} is {facts.CAPITALS[country]}.",
                    f"{facts.CAPITALS[country]} is the capital of {country}.",
                    f"{with_article(animal).capitalize()} says {facts.SOUNDS[animal]}.",
                    f"{thing.capitalize()} is {facts.COLOURS[thing]}.",
                    facts.DEFINITIONS[src.pick(tuple(facts.DEFINITIONS))],
                    facts.TOKENWIRE,
                    "Hello, how are you? I am fine, thank you.",
                )
            )
        )
    text = " ".join(lines)
    cut = text.index(" ")
    return Document("raw_facts", prompt=text[:cut], completion=text[cut:])


def raw_document(src: Source, qa: Callable[[Source], Question]) -> Document:
    """Return a plain text; `qa` supplies questions with answers."""
    kind = src.rng.random()
    if kind < 0.18:
        return introduction(src)
    if kind < 0.53:
        return question_answer(src, qa(src))
    if kind < 0.62:
        return counting(src)
    if kind < 0.65:
        return listing(src)
    if kind < 0.80:
        return story(src)
    if kind < 0.92:
        return diary(src)
    return fact_lines(src)
