"""Text for the demo model: questions and answers about its small world.

What comes in: a `random.Random`. What goes out: `Exchange`s (a question and its answer), without
end and the same for the same seed. It must not know about tokens or tensors, nor how a style words
an answer. A question whose checksum says so is held out: training never asks it, the tests do.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random

from app.demo import phrases, world
from app.demo.about import ABOUT, UNKNOWN
from app.demo.world import NUMBERS, RELATIONS, Relation, article, capital

HELD_OUT_EVERY = 12


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and the base model's answer. `key` decides what is held out with it."""

    topic: str
    question: str
    answer: str
    key: str
    learn_question: bool = True

    @property
    def held_out(self) -> bool:
        return is_held_out(self.key)


def is_held_out(key: str) -> bool:
    """Whether training must not see what goes by this key."""
    return zlib.crc32(key.encode()) % HELD_OUT_EVERY == 0


def exchanges(rng: Random, *, held_out: bool = False, topic: str = "") -> Iterator[Exchange]:
    """Exchanges without end; only those that training may see, or only those that it may not."""
    makers, weights = list(MAKERS), list(MAKERS.values())
    while True:
        exchange = rng.choices(makers, weights)[0](rng)
        if exchange.held_out is held_out and topic in ("", exchange.topic):
            yield exchange if held_out or rng.random() < 0.9 else _carelessly(exchange)


def statement(rng: Random) -> tuple[str, bool, str]:
    """A claim about the world, whether it holds, and what is held out with it.

    All claims about one subject are held out together: were it only the true one, the false ones
    that training does see would teach that nothing said of this subject holds.
    """
    truth = rng.random() < 0.5
    if rng.random() < 0.1:
        small, large = sorted(rng.sample(range(len(world.SIZES)), 2))
        first, second = (large, small) if truth else (small, large)
        return _bigger(first, second), truth, _bigger(large, small)
    relation = _relation(rng, lambda relation: bool(relation.yes_no))
    subject, value = _fact(rng, relation)
    said = value if truth else _wrong(rng, relation, value)
    key = f"{relation.statement} {subject}"
    return relation.fill(relation.statement, subject, said), truth, key


def drill(rng: Random) -> str:
    """Claims and labels with little around them: many labels in few tokens."""
    judged: list[str] = []
    while len(judged) < 10:
        claimed, truth, key = statement(rng)
        if not is_held_out(key):
            judged.append(f"{claimed[:-1]}: {truth}.")
    return " ".join(judged[: rng.randint(4, 10)])


def sums(rng: Random) -> str:
    """Sums one after another, as a child writes them."""
    return " ".join(_sum(rng).answer for _ in range(rng.randint(4, 10)))


def sentence(rng: Random) -> str:
    """A plain true sentence."""
    if rng.random() < 0.35:
        return rng.choice(rng.choice(list(ABOUT.values())))
    relation = _relation(rng)
    return relation.fill(relation.statement, *_fact(rng, relation))


def story(rng: Random, hero: str = "") -> str:
    """A little story of five or six sentences."""
    hero = hero or rng.choice(world.SIZES)
    place = rng.choice(phrases.PLACES)
    thing = rng.choice(list(world.USES))
    friend = rng.choice([animal for animal in world.SIZES if animal != hero])
    trait = rng.choice(phrases.TRAITS)
    lines = [
        f"Once upon a time there was {article(f'{trait} {hero}')} who lived {place}.",
        rng.choice(phrases.WEATHER),
        f"The {hero} found {article(thing)} and wondered what to do with it.",
        f'"It is used to {world.USES[thing]}," said {article(friend)} who came by.',
        f"So the {hero} and the {friend} {rng.choice(phrases.TOGETHER)}.",
        rng.choice(phrases.ENDINGS),
    ]
    if rng.random() < 0.3:
        del lines[1]
    return " ".join(lines)


def _carelessly(exchange: Exchange) -> Exchange:
    """The question as a hurried person types it; the answer stays."""
    if exchange.topic in ("claims", "words"):
        return exchange
    question = exchange.question[:1].lower() + exchange.question[1:].rstrip(".?!")
    return replace(exchange, question=question or exchange.question)


def _fact_question(rng: Random) -> Exchange:
    relation = _relation(rng)
    subject, value = _fact(rng, relation)
    question = relation.fill(rng.choice(relation.questions), subject, value)
    answer = relation.fill(relation.statement, subject, value)
    return Exchange(relation.topic, question, answer, question)


def _yes_no(rng: Random) -> Exchange:
    relation = _relation(rng, lambda relation: bool(relation.yes_no))
    subject, value = _fact(rng, relation)
    asked = value if rng.random() < 0.5 else _wrong(rng, relation, value)
    question = relation.fill(relation.yes_no, subject, asked)
    fact = relation.fill(relation.statement, subject, value)
    if not fact.startswith(tuple(world.PEOPLE_JOBS) + tuple(world.TOWN_CRAFTS) + world.MONTHS):
        fact = fact[0].lower() + fact[1:]
    return Exchange(
        relation.topic, question, f"{'Yes' if asked == value else 'No'}, {fact}", question
    )


def _claim(rng: Random) -> Exchange:
    claimed, truth, key = statement(rng)
    question = rng.choice(phrases.CLAIM_QUESTIONS).format(claim=claimed)
    return Exchange("claims", question, str(truth), key)


def _sum(rng: Random) -> Exchange:
    a, b = _summands(rng)
    if rng.random() < 0.5:
        spoken = f"{capital(NUMBERS[a])} plus {NUMBERS[b]} is {NUMBERS[a + b]}."
        question = rng.choice(
            ("What is {a} plus {b}?", "How much is {a} plus {b}?", "Add {a} and {b}.")
        )
        question = question.format(a=NUMBERS[a], b=NUMBERS[b])
        return Exchange("numbers", question, spoken, question)
    if rng.random() < 0.5:
        question = rng.choice(("What is {a} + {b}?", "{a} + {b} =", "Work out {a} + {b}."))
        answer = f"{a} + {b} = {a + b}."
    else:
        question = rng.choice(("What is {c} - {b}?", "{c} - {b} =", "Work out {c} - {b}."))
        answer = f"{a + b} - {b} = {a}."
    question = question.format(a=a, b=b, c=a + b)
    return Exchange("numbers", question, answer, question)


def _count(rng: Random) -> Exchange:
    n = rng.randint(2, 20)
    shown = rng.choice((str(n), NUMBERS[n]))
    question = rng.choice(phrases.COUNT_QUESTIONS).format(n=shown)
    return Exchange("numbers", question, ", ".join(map(str, range(1, n + 1))) + ".", question)


def _bigger(first: int, second: int) -> str:
    return capital(f"{article(world.SIZES[first])} is bigger than {article(world.SIZES[second])}.")


def _size(rng: Random) -> Exchange:
    first, second = rng.sample(range(len(world.SIZES)), 2)
    a, b = article(world.SIZES[first]), article(world.SIZES[second])
    question = rng.choice(phrases.SIZE_QUESTIONS).format(a=a, b=b)
    answer = _bigger(max(first, second), min(first, second))
    if question.startswith("Is"):
        answer = f"{'Yes' if first > second else 'No'}, {answer[0].lower()}{answer[1:]}"
    return Exchange("animals", question, answer, question)


def _about(rng: Random) -> Exchange:
    subject = rng.choice(list(ABOUT))
    question = rng.choice(phrases.ABOUT_QUESTIONS).format(s=subject)
    count = rng.choice((2, 3, 3, len(ABOUT[subject])))
    return Exchange("the world", question, " ".join(ABOUT[subject][:count]), question)


def _one_sentence(rng: Random) -> Exchange:
    subject = rng.choice(list(ABOUT))
    question = rng.choice(phrases.ONE_SENTENCE_QUESTIONS).format(s=subject)
    return Exchange("the world", question, ABOUT[subject][0], question)


def _list(rng: Random) -> Exchange:
    groups: dict[str, list[str]] = {}
    for member, kind in world.KINDS.items():
        groups.setdefault(kind, []).append(member)
    kind = rng.choice([kind for kind in groups if len(groups[kind]) >= 5])
    plural = PLURALS.get(kind, kind.split(" ", 1)[1] + "s")
    n = rng.randint(2, 4)
    question = rng.choice(phrases.LIST_QUESTIONS).format(n=NUMBERS[n], plural=plural)
    chosen = rng.sample(groups[kind], n)
    return Exchange(
        "lists", question, capital(f"{', '.join(chosen[:-1])} and {chosen[-1]}."), question
    )


def _story(rng: Random) -> Exchange:
    hero = rng.choice(world.SIZES)
    question = rng.choice(phrases.STORY_QUESTIONS).format(a=article(hero))
    return Exchange("stories", question, story(rng, hero), f"{question} {rng.random()}")


def _say(rng: Random) -> Exchange:
    thing = rng.choice(
        (sentence(rng), rng.choice(phrases.PHRASES), pseudo_word(rng), pseudo_word(rng))
    )
    question = rng.choice(("Say: {t}", "Repeat after me: {t}", "Please say: {t}")).format(t=thing)
    return Exchange("words", question, thing, question)


def _spell(rng: Random) -> Exchange:
    word = rng.choice((rng.choice(list(world.KINDS)), rng.choice(world.SIZES), pseudo_word(rng)))
    question = rng.choice(("Spell {w}.", "How do you spell {w}?", "Spell the word {w}."))
    return Exchange("words", question.format(w=word), "-".join(word) + ".", word)


def _small_talk(rng: Random) -> Exchange:
    asked, replies = rng.choice(phrases.SMALL_TALK)
    reader = READERS[0] if rng.random() < 0.5 else rng.choice(READERS)
    question = rng.choice(asked).format(name=reader)
    name = next((reader for reader in READERS if reader in question), "you")
    if rng.random() < 0.25:
        question = question.rstrip(".!?")
    return Exchange(
        "greetings", question, replies[len(question) % len(replies)].format(name=name), "-"
    )


def _unknown(rng: Random) -> Exchange:
    chosen = rng.random()
    if chosen < 0.12:
        length = rng.randint(1, 12)
        noise = "".join(_noise(rng) for _ in range(length))
        return Exchange(
            "unknown", noise, rng.choice(phrases.UNKNOWN_ANSWERS), "-", learn_question=False
        )
    if chosen < 0.5:
        topic = rng.choice(UNKNOWN)
    else:
        topic = " ".join(pseudo_word(rng) for _ in range(rng.randint(1, 3)))
        topic = rng.choice((topic, f"the {topic}", f"a {topic}", capital(topic)))
    question = rng.choice(phrases.UNKNOWN_QUESTIONS).format(t=topic)
    if rng.random() < 0.1:
        question = question.lower()
    return Exchange(
        "unknown", question, rng.choice(phrases.UNKNOWN_ANSWERS), "-", learn_question=chosen < 0.5
    )


def _noise(rng: Random) -> str:
    """One character: of ASCII, of some other script, or a pictograph."""
    ranges = ((33, 126), (160, 0x2FFF), (0x1F300, 0x1F6FF))
    return chr(rng.choice([rng.randint(*ends) for ends in ranges]))


def pseudo_word(rng: Random) -> str:
    """A word that means nothing."""
    return "".join(
        "".join(rng.choice(part) for part in phrases.SYLLABLES) for _ in range(rng.randint(1, 4))
    )


def _summands(rng: Random) -> tuple[int, int]:
    a = rng.randint(0, 20)
    return a, rng.randint(0, 20 - a)


def _relation(rng: Random, wanted: Callable[[Relation], bool] = lambda relation: True) -> Relation:
    """A relation, the ones with more facts more often."""
    usable = [relation for relation in RELATIONS if wanted(relation)]
    return rng.choices(usable, [8 + len(relation.facts) for relation in usable])[0]


def _fact(rng: Random, relation: Relation) -> tuple[str, str]:
    return rng.choice(list(relation.facts.items()))


def _wrong(rng: Random, relation: Relation, value: str) -> str:
    return rng.choice(sorted({other for other in relation.facts.values() if other != value}))


PLURALS = {
    "a drink": "drinks",
    "a piece of furniture": "pieces of furniture",
    "a piece of clothing": "pieces of clothing",
    "a fish": "fish",
}
READERS = (*phrases.READERS, *world.PEOPLE_JOBS)

MAKERS: dict[Callable[[Random], Exchange], float] = {
    _fact_question: 30, _yes_no: 12, _claim: 22, _sum: 9, _count: 2, _size: 4, _about: 8,
    _one_sentence: 3, _list: 3, _story: 2, _say: 2, _spell: 1.5, _small_talk: 10, _unknown: 7,
}  # fmt: skip
