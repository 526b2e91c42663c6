"""The training corpus: an endless stream of conversations and texts, made from plain tables.

`stream(source)` yields documents; a source of the same seed gives the same documents. Held-out
documents use phrasings, names and cities that never occur in training.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import facts
import phrases
import toolcalls
from rawtext import raw_document, with_article
from source import Document, Message, Source


@dataclass(frozen=True)
class Exchange:
    """A question with the answers that count as right."""

    skill: str
    question: str
    answers: tuple[str, ...]


def small_talk(src: Source) -> Exchange:
    """Return a greeting, thanks or another piece of small talk."""
    questions, answers = src.pick(phrases.SMALL_TALK)
    return Exchange("small_talk", src.address(questions), answers)


def identity(src: Source) -> Exchange:
    """Return a question about the model itself."""
    questions, answer = src.pick(phrases.IDENTITY)
    return Exchange("identity", src.address(questions), (answer,))


def spelled_term(src: Source, term: str) -> str:
    """Return a term as people write it: with or without article, in several cases."""
    words = term.split()
    if words[0] in ("a", "an") and src.chance(0.3):
        words = words[1:]
    words = [word.upper() if word in facts.ACRONYMS else word for word in words]
    style = src.rng.random()
    if style < 0.3:
        words = [w if w in ("a", "an", "the") or w.isupper() else w.capitalize() for w in words]
    elif style < 0.4:
        words = [word.lower() for word in words]
    return " ".join(words)


def definition(src: Source) -> Exchange:
    """Return a question for the meaning of a computing term."""
    term = src.pick(tuple(facts.DEFINITIONS))
    question = src.ask(phrases.DEFINITION_QUESTIONS, term=spelled_term(src, term))
    return Exchange("definition", question, (facts.DEFINITIONS[term],))


def capital(src: Source) -> Exchange:
    """Return a question about a capital, in either direction."""
    country = src.pick(tuple(facts.CAPITALS))
    city = facts.CAPITALS[country]
    lower = src.chance(0.08)
    if src.chance(0.6):
        name = country.lower() if lower else country
        question = src.ask(phrases.CAPITAL_QUESTIONS, country=name)
        return Exchange("capital", question, (f"The capital of {country} is {city}.",))
    question = src.ask(phrases.COUNTRY_QUESTIONS, city=city.lower() if lower else city)
    return Exchange("capital", question, (f"{city} is the capital of {country}.",))


def sound_or_colour(src: Source) -> Exchange:
    """Return a question about the sound of an animal or the colour of a thing."""
    if src.chance(0.5):
        animal = src.pick(tuple(facts.SOUNDS))
        sound = facts.SOUNDS[animal]
        subject = with_article(animal)
        asked = f"the {animal}" if src.chance(0.2) else subject
        question = src.ask(phrases.SOUND_QUESTIONS, animal=asked)
        answer = f"{subject.capitalize()} says {sound}."
        return Exchange("sound_colour", question, (answer,))
    thing = src.pick(tuple(facts.COLOURS))
    colour = facts.COLOURS[thing]
    answer = f"{thing.capitalize()} is {colour}."
    question = src.ask(phrases.COLOUR_QUESTIONS, thing=thing)
    return Exchange("sound_colour", question, (answer,))


def calendar(src: Source) -> Exchange:
    """Return a question about weekdays or months."""
    return src.pick((weekday_order, month_order, calendar_count, month_length))(src)


def weekday_order(src: Source) -> Exchange:
    """Return a question for the day before or after a weekday."""
    at, step = src.number(0, 6), src.pick((1, 1, -1))
    day, other = facts.WEEKDAYS[at], facts.WEEKDAYS[(at + step) % 7]
    word = "after" if step == 1 else "before"
    question = src.ask(phrases.WEEKDAY_QUESTIONS, word=word, day=day)
    return Exchange("calendar", question, (f"{other} comes {word} {day}.",))


def month_order(src: Source) -> Exchange:
    """Return a question about the order of the months."""
    at = src.number(0, 11)
    month = facts.MONTHS[at]
    if src.chance(0.4):
        question = src.ask(phrases.MONTH_NUMBER_QUESTIONS, month=month)
        answer = f"{month} is the {facts.ORDINALS[at]} month of the year."
        return Exchange("calendar", question, (answer,))
    step = src.pick((1, 1, -1))
    word, other = "after" if step == 1 else "before", facts.MONTHS[(at + step) % 12]
    question = src.ask(phrases.MONTH_QUESTIONS, word=word, month=month)
    return Exchange("calendar", question, (f"{other} comes {word} {month}.",))


def calendar_count(src: Source) -> Exchange:
    """Return a question for the number or the list of days or months."""
    questions, answer = src.pick(phrases.CALENDAR_COUNTS)
    return Exchange("calendar", src.address(questions), (answer,))


def month_length(src: Source) -> Exchange:
    """Return a question for the number of days of a month."""
    at = src.number(0, 11)
    question = src.ask(phrases.MONTH_LENGTH_QUESTIONS, month=facts.MONTHS[at])
    answer = f"{facts.MONTHS[at]} has {facts.MONTH_DAYS[at]} days."
    return Exchange("calendar", question, (answer,))


def small_sum(src: Source) -> Exchange:
    """Return a sum with a result up to 20, or a difference of such numbers."""
    total = src.number(0, 20)
    left = src.number(0, total)
    first, sign, second, result = left, "+", total - left, total
    if src.chance(0.35):
        first, sign, second, result = total, "-", left, total - left
    style = src.rng.random()
    if style < 0.6:
        text = f"{first} {sign} {second}"
    elif style < 0.75:
        text = f"{first}{sign}{second}"
    else:
        verb = "plus" if sign == "+" else "minus"
        words = style > 0.9
        numbers = [facts.NUMBER_WORDS[n] if words else str(n) for n in (first, second)]
        text = f"{numbers[0]} {verb} {numbers[1]}"
    question = src.ask(phrases.SUM_QUESTIONS, sum=text)
    return Exchange("sum", question, (f"{first} {sign} {second} = {result}",))


def key_list(keys: list[str]) -> str:
    """Join field names as in a sentence."""
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + " and " + keys[-1]


def extraction(src: Source) -> Exchange:
    """Return a request to write facts about a person as JSON."""
    values = {"name": src.name(), "age": src.number(1, 99), "city": src.city()}
    text = src.pick(phrases.PERSON_SENTENCES).format(**values)
    keys = ["name", "age", "city"]
    if src.chance(0.25):
        src.rng.shuffle(keys)
        keys = keys[: src.number(1, len(keys))]
    question = src.pick(phrases.EXTRACTION_REQUESTS).format(keys=key_list(keys), text=text)
    answer = json.dumps({key: values[key] for key in sorted(keys)}, ensure_ascii=False)
    return Exchange("extraction", question, (answer,))


def refusal(src: Source) -> Exchange:
    """Return a question that the model cannot answer."""
    question = src.ask(
        phrases.UNKNOWN_QUESTIONS,
        year=src.number(1800, 2030),
        city=src.city(),
        city2=src.city(),
        name=src.name(),
        country=src.pick(tuple(facts.CAPITALS)),
        topic=src.pick(facts.TOPICS),
        made=src.invented(src.number(2, 3)),
        big1=src.number(100, 9999),
        big2=src.number(21, 999),
    )
    return Exchange("refusal", question, phrases.REFUSALS)


def counting(src: Source) -> Exchange:
    """Return a request to count."""
    end = src.number(3, 20)
    question = src.ask(phrases.COUNTING_REQUESTS, n=end)
    return Exchange("counting", question, (", ".join(str(n) for n in range(1, end + 1)),))


def any_word(src: Source) -> str:
    """Return a name, a city, a number or a word."""
    kind = src.number(0, 5)
    if kind == 0:
        return src.made_up()
    if kind == 1:
        return src.name()
    if kind == 2:
        return src.city()
    if kind == 3:
        return str(src.number(0, 9999))
    if kind == 4:
        return src.made_up().lower()
    return src.pick(src.pick((facts.HOBBIES, facts.ADJECTIVES, facts.ANIMALS, facts.TOPICS)))


def repeat(src: Source) -> Exchange:
    """Return a request to repeat some words.

    Long rows of random words teach the model to copy, which other skills need.
    """
    items = [any_word(src) for _ in range(src.number(1, 8))]
    separator = src.pick((", ", " ", "; ", "\n", " and "))
    text = src.split(facts.SHORT_TEXTS) if src.chance(0.1) else separator.join(items)
    form = src.pick(phrases.REPEAT_REQUESTS)
    return Exchange("repeat", form.format(text=text), (text,))


Weights = tuple[tuple[Callable[["Source"], Exchange], float], ...]

# Short questions that fit anywhere in a longer conversation.
COMPANIONS: Weights = (
    (small_talk, 0.15),
    (identity, 0.11),
    (definition, 0.20),
    (capital, 0.18),
    (sound_or_colour, 0.08),
    (calendar, 0.12),
    (small_sum, 0.20),
    (refusal, 0.12),
)
SINGLE: Weights = (*COMPANIONS, (extraction, 0.32), (counting, 0.02), (repeat, 0.06))


def turns(question: str, answer: str) -> list[Message]:
    """Return a user turn and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def weighted(makers: Weights) -> Callable[[Source], Exchange]:
    """Return a maker of exchanges that chooses one of several by weight."""
    choices, weights = zip(*makers, strict=True)

    def make(src: Source) -> Exchange:
        maker: Callable[[Source], Exchange] = src.rng.choices(choices, weights)[0]
        return maker(src)

    return make


def chat(src: Source, exchange: Callable[[Source], Exchange]) -> Document:
    """Return a conversation with or without system prompt and earlier turns."""
    messages = opening(src)
    if src.chance(0.4):
        for _ in range(src.number(1, 4)):
            earlier = weighted(COMPANIONS)(src)
            messages += turns(earlier.question, earlier.answers[0])
    last = exchange(src)
    messages += turns(last.question, last.answers[0])
    tools = tuple(toolcalls.toolbox(src, [], [])) if may_offer_tools(src, last) else ()
    return Document(last.skill, tuple(messages), tools, accepted=last.answers)


def may_offer_tools(src: Source, exchange: Exchange) -> bool:
    """Decide whether to offer tools that the question does not need."""
    plain = exchange.skill in ("small_talk", "identity", "definition", "capital", "calendar")
    return plain and src.chance(0.08)


def opening(src: Source) -> list[Message]:
    """Return a system message that does not change the answers, or no message."""
    if src.chance(0.2):
        return [{"role": "system", "content": src.pick(phrases.NEUTRAL_SYSTEMS)}]
    return []


def persona(src: Source) -> Document:
    """Return a conversation in which the system prompt gives the model a name."""
    name = src.name()
    system = src.pick(phrases.PERSONA_SYSTEMS).format(name=name)
    question = src.say(phrases.PERSONA_QUESTIONS)
    answer = f"My name is {name}."
    messages = [{"role": "system", "content": system}, *turns(question, answer)]
    return Document("system_persona", tuple(messages), accepted=(answer,))


def remembered_name(src: Source) -> Document:
    """Return a conversation in which the user gives a name and perhaps asks for it later."""
    name = src.name()
    hello = src.say(phrases.INTRODUCTIONS, name=name)
    answer = f"Nice to meet you, {name}!"
    messages = opening(src) + turns(hello, answer)
    if src.chance(0.6):
        for _ in range(src.number(0, 2)):
            earlier = weighted(COMPANIONS)(src)
            messages += turns(earlier.question, earlier.answers[0])
        question = src.say(phrases.NAME_QUESTIONS)
        answer = f"Your name is {name}."
        messages += turns(question, answer)
    return Document("name_memory", tuple(messages), accepted=(answer,))


def tool_document(src: Source) -> Document:
    """Return a conversation about tools."""
    before = opening(src)
    if src.chance(0.1):
        earlier = src.pick((small_talk, identity))(src)
        before += turns(earlier.question, earlier.answers[0])
    kind = src.rng.random()
    if kind < 0.15:
        return toolcalls.missing_document(src, before)
    return toolcalls.working_document(src, before)


def document(src: Source) -> Document:
    """Return a random document of any kind."""
    kind = src.rng.random()
    if kind < 0.42:
        return tool_document(src)
    if kind < 0.46:
        return raw_document(src, qa=weighted(COMPANIONS))
    if kind < 0.50:
        return remembered_name(src)
    if kind < 0.53:
        return persona(src)
    return chat(src, weighted(SINGLE))


def stream(src: Source) -> Iterator[Document]:
    """Yield documents without end; a source of the same seed yields the same ones.

    A share of `src.copying` are requests to repeat words. Many of these early in training teach the
    model to copy, which the few copied words of the other skills hardly do.
    """
    while True:
        src.begin()
        if src.copying and src.chance(src.copying):
            exchange = repeat(src)
            messages = turns(exchange.question, exchange.answers[0])
            made = Document(exchange.skill, tuple(messages), accepted=exchange.answers)
        else:
            made = document(src)
        if src.is_wanted():
            yield made
