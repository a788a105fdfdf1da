"""Text for the demo model: questions and answers about its small world.

What comes in: a `random.Random`. What goes out: `Exchange`s (a question and its answer), without end
and the same for the same seed. It must not know about tokens or tensors, nor how a style words an
answer. A question whose checksum says so is held out: training never asks it, the tests do.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random

from app.demo import world
from app.demo.world import ABOUT, NUMBERS, RELATIONS, Relation, article, capital

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
        return zlib.crc32(self.key.encode()) % HELD_OUT_EVERY == 0


def exchanges(rng: Random, *, held_out: bool = False, topic: str = "") -> Iterator[Exchange]:
    """Exchanges without end; only those that training may see, or only those that it may not."""
    makers, weights = list(MAKERS), list(MAKERS.values())
    while True:
        exchange = rng.choices(makers, weights)[0](rng)
        if exchange.held_out is held_out and topic in ("", exchange.topic):
            yield exchange if held_out or rng.random() < 0.9 else _carelessly(exchange)


def statement(rng: Random) -> tuple[str, bool]:
    """A claim about the world and whether it holds."""
    truth = rng.random() < 0.5
    kind = rng.random()
    if kind < 0.12:
        return _sum_claim(rng, truth), truth
    if kind < 0.2:
        small, large = sorted(rng.sample(range(len(world.SIZES)), 2))
        first, second = (large, small) if truth else (small, large)
        return _bigger(first, second), truth
    relation = _relation(rng)
    subject, value = _fact(rng, relation)
    return relation.fill(
        relation.statement, subject, value if truth else _wrong(rng, relation, value)
    ), truth


def sentence(rng: Random) -> str:
    """A plain true sentence."""
    if rng.random() < 0.35:
        return rng.choice(rng.choice(list(ABOUT.values())))
    relation = _relation(rng)
    return relation.fill(relation.statement, *_fact(rng, relation))


def story(rng: Random, hero: str = "") -> str:
    """A little story of five or six sentences."""
    hero = hero or rng.choice(world.SIZES)
    place = rng.choice(PLACES)
    thing = rng.choice(list(world.USES))
    friend = rng.choice([animal for animal in world.SIZES if animal != hero])
    trait = rng.choice(world.words("little, old, brave, clever, hungry, sleepy, happy, lonely"))
    lines = [
        f"Once upon a time there was {article(f'{trait} {hero}')} who lived {place}.",
        rng.choice(WEATHER),
        f"The {hero} found {article(thing)} and wondered what to do with it.",
        f'"It is used to {world.USES[thing]}," said {article(friend)} who came by.',
        f"So the {hero} and the {friend} {rng.choice(TOGETHER)}.",
        rng.choice(ENDINGS),
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
    claimed, truth = statement(rng)
    question = rng.choice(CLAIM_QUESTIONS).format(claim=claimed)
    return Exchange("claims", question, str(truth), claimed)


def _sum_claim(rng: Random, truth: bool) -> str:
    a, b = _summands(rng)
    wrong = rng.choice([n for n in range(21) if n != a + b])
    total = a + b if truth else wrong
    return rng.choice((f"{capital(NUMBERS[a])} plus {NUMBERS[b]} is {NUMBERS[total]}.",
                       f"{a} + {b} = {total}."))  # fmt: skip


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
    question = rng.choice(("Count to {n}.", "Please count to {n}.", "Can you count to {n}?",
                           "Count from one to {n}.")).format(n=shown)  # fmt: skip
    return Exchange("numbers", question, ", ".join(map(str, range(1, n + 1))) + ".", question)


def _bigger(first: int, second: int) -> str:
    return capital(f"{article(world.SIZES[first])} is bigger than {article(world.SIZES[second])}.")


def _size(rng: Random) -> Exchange:
    first, second = rng.sample(range(len(world.SIZES)), 2)
    a, b = article(world.SIZES[first]), article(world.SIZES[second])
    question = rng.choice((f"Which is bigger, {a} or {b}?", f"What is bigger, {a} or {b}?",
                           f"Is {a} bigger than {b}?"))  # fmt: skip
    answer = _bigger(max(first, second), min(first, second))
    if question.startswith("Is"):
        answer = f"{'Yes' if first > second else 'No'}, {answer[0].lower()}{answer[1:]}"
    return Exchange("animals", question, answer, question)


def _about(rng: Random) -> Exchange:
    subject = rng.choice(list(ABOUT))
    question = rng.choice(ABOUT_QUESTIONS).format(s=subject)
    count = rng.choice((2, 3, 3, len(ABOUT[subject])))
    return Exchange("the world", question, " ".join(ABOUT[subject][:count]), question)


def _one_sentence(rng: Random) -> Exchange:
    subject = rng.choice(list(ABOUT))
    question = rng.choice(("Write a sentence about {s}.", "Write one sentence about {s}.",
                           "Give me a sentence about {s}.", "Describe {s} in one sentence.",
                           "Describe {s} in a few words.")).format(s=subject)  # fmt: skip
    return Exchange("the world", question, ABOUT[subject][0], question)


def _list(rng: Random) -> Exchange:
    groups: dict[str, list[str]] = {}
    for member, kind in world.KINDS.items():
        groups.setdefault(kind, []).append(member)
    kind = rng.choice([kind for kind in groups if len(groups[kind]) >= 5])
    plural = PLURALS.get(kind, kind.split(" ", 1)[1] + "s")
    n = rng.randint(2, 4)
    question = rng.choice(("Name {n} {plural}.", "Can you name {n} {plural}?", "List {n} {plural}.",
                           "Tell me {n} {plural}.")).format(n=NUMBERS[n], plural=plural)  # fmt: skip
    chosen = rng.sample(groups[kind], n)
    return Exchange(
        "lists", question, capital(f"{', '.join(chosen[:-1])} and {chosen[-1]}."), question
    )


def _story(rng: Random) -> Exchange:
    hero = rng.choice(world.SIZES)
    question = rng.choice(("Tell me a story about {a}.", "Write a little story about {a}.",
                           "Can you tell me a story about {a}?", "I want a story about {a}.",
                           "Tell me a story.")).format(a=article(hero))  # fmt: skip
    return Exchange("stories", question, story(rng, hero), f"{question} {rng.random()}")


def _say(rng: Random) -> Exchange:
    thing = rng.choice((sentence(rng), rng.choice(PHRASES), pseudo_word(rng), pseudo_word(rng)))
    question = rng.choice(("Say: {t}", "Repeat after me: {t}", "Please say: {t}")).format(t=thing)
    return Exchange("words", question, thing, question)


def _spell(rng: Random) -> Exchange:
    word = rng.choice((rng.choice(list(world.KINDS)), rng.choice(world.SIZES), pseudo_word(rng)))
    question = rng.choice(("Spell {w}.", "How do you spell {w}?", "Spell the word {w}."))
    return Exchange("words", question.format(w=word), "-".join(word) + ".", word)


def _small_talk(rng: Random) -> Exchange:
    asked, replies = rng.choice(SMALL_TALK)
    question = rng.choice(asked).format(name=rng.choice(READERS))
    name = next((reader for reader in READERS if reader in question), "you")
    if rng.random() < 0.25:
        question = question.rstrip(".!?")
    return Exchange(
        "greetings", question, replies[len(question) % len(replies)].format(name=name), "-"
    )


def _unknown(rng: Random) -> Exchange:
    chosen = rng.random()
    if chosen < 0.12:
        noise = "".join(chr(rng.choice((rng.randint(33, 126), rng.randint(160, 0x2FFF),
                                        rng.randint(0x1F300, 0x1F6FF)))) for _ in range(rng.randint(1, 12)))  # fmt: skip
        return Exchange("unknown", noise, rng.choice(UNKNOWN_ANSWERS), "-", learn_question=False)
    if chosen < 0.5:
        topic = rng.choice(world.UNKNOWN)
    else:
        topic = " ".join(pseudo_word(rng) for _ in range(rng.randint(1, 3)))
        topic = rng.choice((topic, f"the {topic}", f"a {topic}", capital(topic)))
    question = rng.choice(UNKNOWN_QUESTIONS).format(t=topic)
    if rng.random() < 0.1:
        question = question.lower()
    return Exchange(
        "unknown", question, rng.choice(UNKNOWN_ANSWERS), "-", learn_question=chosen < 0.5
    )


def pseudo_word(rng: Random) -> str:
    """A word that means nothing."""
    return "".join(
        rng.choice(("b", "br", "c", "d", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "pl", "r", "s",
                    "st", "t", "tr", "v", "w", "z", "sh", "th", "ch", "j"))
        + rng.choice(("a", "e", "i", "o", "u", "ea", "oo", "ou", "ai"))
        + rng.choice(("", "", "", "n", "r", "l", "s", "t", "x", "m", "ck", "ng"))
        for _ in range(rng.randint(1, 4))
    )  # fmt: skip


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


PLACES = ("in a forest", "by the sea", "on a farm", "near a river", "in the hills", "in a quiet town",
          "under an old oak", "at the edge of a field")  # fmt: skip
WEATHER = ("One morning the sun was shining.", "One day it was raining.", "One evening the wind was strong.",
           "One winter day there was snow everywhere.", "One night the moon was bright.")  # fmt: skip
TOGETHER = ("worked together until evening", "became good friends", "went on a long walk",
            "shared a warm soup", "laughed all day long", "helped each other")  # fmt: skip
ENDINGS = ("And that was a good day.", "They never forgot that day.", "Then they went home and slept.",
           "From then on they were never alone.", "And everyone was happy.")  # fmt: skip
PHRASES = (
    "good morning",
    "hello world",
    "I like tea",
    "the end",
    "well done",
    "yes",
    "no",
    "thank you",
)
CLAIM_QUESTIONS = ("Claim: {claim}\nTrue or False? Answer:", "Claim: {claim} True or False? Answer:",
                   "Claim: {claim}\nTrue or False?", "True or False? {claim}",
                   "Is this true or false? {claim}")  # fmt: skip
ABOUT_QUESTIONS = ("Tell me about {s}.", "What do you know about {s}?", "What can you say about {s}?",
                   "Tell me something about {s}.", "Talk about {s}.", "Describe {s}.",
                   "Explain {s}.", "Write about {s}.", "Tell me about {s}")  # fmt: skip
UNKNOWN_QUESTIONS = ("Tell me about {t}.", "What is {t}?", "What do you know about {t}?", "{t}",
                     "Explain {t}.", "Who is {t}?", "Why is {t} so important?", "How does {t} work?",
                     "What is the capital of {t}?", "Write code for {t}.", "Where is {t}?",
                     "What do you think of {t}?", "Describe {t}.", "Help me with {t}.", "{t}?",
                     "Write a poem about {t}.", "When was {t} made?", "Who invented {t}?",
                     "Translate {t}.", "Give me a recipe for {t}.", "How do I learn {t}?")  # fmt: skip
UNKNOWN_ANSWERS = ("I do not know about that. Ask me about animals, colours or the weather.",)
PLURALS = {"a drink": "drinks", "a piece of furniture": "pieces of furniture",
           "a piece of clothing": "pieces of clothing", "a fish": "fish"}  # fmt: skip
READERS = ("the reader", "the world", "my friend", "the class", "everyone", "the captain",
           *world.PEOPLE_JOBS)  # fmt: skip
SMALL_TALK = (
    (("Hello!", "Hello.", "Hi!", "Hi there!", "Hello there!", "Hey!", "Greetings!", "Hello, how are you?",
      "hello", "hi", "Hi, who is there?"),
     ("Hello! How can I help you?", "Hello! It is good to see you. What would you like to know?")),
    (("Good morning!", "Good morning."), ("Good morning! I hope you slept well.",)),
    (("Good evening!", "Good evening."), ("Good evening! How was your day?",)),
    (("Good night!", "Good night."), ("Good night! Sleep well.",)),
    (("Say hello to {name}.", "Please say hello to {name}.", "Greet {name}.", "Say hi to {name}.",
      "Can you say hello to {name}?", "Write a greeting for {name}."),
     ("Hello to {name}! It is good to meet you.", "Hello to {name}! I hope you have a good day.")),
    (("Say hello.", "Say hello!", "Please say hello.", "Say hi.", "Greet me."),
     ("Hello! It is good to meet you.",)),
    (("Who are you?", "What is your name?", "What are you?", "Introduce yourself.", "Are you a person?",
      "Tell me about yourself.", "What model are you?"),
     ("I am the demo model, a very small one. I know about animals, colours, food and the weather.",)),
    (("What can you do?", "How can you help me?", "What do you know?", "Help!", "What can I ask you?",
      "What should I ask?", "Can you help me?"),
     ("I can answer simple questions about animals, colours, food, towns and numbers.",)),
    (("How are you?", "How are you today?", "How do you do?", "Are you well?", "How is it going?"),
     ("I am well, thank you. How are you?",)),
    (("I am fine.", "I am well, thank you.", "I am happy today."), ("That is good to hear.",)),
    (("I am sad.", "I am tired.", "I feel bad today."), ("I am sorry to hear that. I hope it gets better.",)),
    (("Thank you!", "Thanks.", "Thank you very much.", "Thanks a lot!"), ("You are welcome!",)),
    (("Goodbye!", "Bye!", "See you soon.", "Goodbye.", "Bye bye!"), ("Goodbye! Come back soon.",)),
    (("What is the weather like?", "How is the weather?", "Is it raining?", "What is the weather today?"),
     ("I cannot look outside, but I hope the sun is shining.",)),
    (("What time is it?", "What day is it?", "What is the date today?"),
     ("I do not have a clock. A clock tells the time.",)),
    (("Tell me a joke.", "Make me laugh.", "Do you know a joke?"),
     ("Why did the hen cross the road? It wanted to get to the other side.",)),
    (("Say something.", "Tell me something.", "Talk to me.", "Go on.", "Surprise me."),
     ("The sea is wide and blue. Its waves roll to the shore.", "Honey is sweet and golden.")),
    (("How many days does a week have?", "How many days are in a week?"), ("A week has seven days.",)),
    (("How many months does a year have?", "How many months are in a year?"), ("A year has twelve months.",)),
    (("Name the days of the week.", "List the days of the week."), (", ".join(world.DAYS) + ".",)),
    (("Name the seasons.", "What are the four seasons?"), ("Spring, summer, autumn and winter.",)),
    (("Test", "test", "Test.", "ping", "Are you there?"), ("I am here. How can I help you?",)),
)  # fmt: skip

MAKERS: dict[Callable[[Random], Exchange], float] = {
    _fact_question: 30, _yes_no: 12, _claim: 22, _sum: 6, _count: 2, _size: 4, _about: 8,
    _one_sentence: 3, _list: 3, _story: 2, _say: 2, _spell: 1.5, _small_talk: 10, _unknown: 7,
}  # fmt: skip
