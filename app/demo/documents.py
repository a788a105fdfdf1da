"""From exchanges to rows of token ids, with a weight on every token that is to be learnt.

What comes in: a tokenizer and a seeded `random.Random`. What goes out: lists of equal length
for the trainer. It must not know about the model or about gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from random import Random
from typing import TypeAlias

from tokenizers import Tokenizer

from app.demo import corpus
from app.demo.corpus import Exchange, exchanges
from app.demo.styles import STYLES
from app.demo.tokenizer import END_OF_TEXT_ID, TURN_END_ID, TURN_START_ID
from app.demo.world import NUMBERS, capital

Marked: TypeAlias = tuple[list[int], list[int]]
"""Token ids, and how much each is to be learnt: 0 not at all, 1, or `HEAVY`."""

HEAVY = 5
DECISIVE = ("True", "False", "Yes", "No", *NUMBERS[2:], *map(capital, NUMBERS), *"0123456789")
"""Words that carry the point of an answer among many that are easy to guess."""

ASSISTANTS = ("You are a helpful assistant.", "You are a friendly assistant.", "Answer briefly.",
              "You answer the questions of the reader.", "Be kind and clear.")  # fmt: skip


class Documents:
    """Marked token ids of whole documents; remembers where the text is."""

    def __init__(self, tokenizer: Tokenizer, rng: Random, *, held_out: bool = False) -> None:
        self._tokenizer = tokenizer
        self._rng = rng
        pieces = [tokenizer.encode(f"{space}{w}").ids for w in DECISIVE for space in ("", " ")]
        self._decisive = {ids[0] for ids in pieces if len(ids) == 1}
        self._exchanges = exchanges(rng, held_out=held_out)
        self._claims = exchanges(rng, held_out=held_out, topic="claims")

    def base(self) -> Iterator[Marked]:
        """What the base learns from: mostly chats, some plain text, some answers in a style."""
        kinds: dict[Callable[[], Marked], float] = {
            self._chat: 0.62, self._plain: 0.1, self._instructed: 0.1,
            self._drill: 0.14, self._sums: 0.04,
        }  # fmt: skip
        while True:
            yield self._rng.choices(list(kinds), list(kinds.values()))[0]()

    def answered(self, answer: Callable[[Exchange], str]) -> Iterator[Marked]:
        """What an adapter learns from: the same questions, its own answers, only those marked."""
        while True:
            system = self._rng.choice(ASSISTANTS) if self._rng.random() < 0.1 else ""
            turns = [(x, answer(x)) for x in self._some_exchanges()]
            yield self._turns(system, turns, learn_questions=False)

    def long(self) -> Marked:
        """One question after several hundred tokens of plain sentences."""
        rng = self._rng
        exchange = next(self._exchanges)
        told = " ".join(corpus.sentence(rng) for _ in range(rng.randint(30, 75)))
        ids, marks = self._turn("user", f"{told}\n\n{exchange.question}", exchange.learn_question)
        answer_ids, answer_marks = self._turn("assistant", exchange.answer, True)
        return ids + answer_ids, marks + answer_marks

    def _chat(self) -> Marked:
        system = self._rng.choice(ASSISTANTS) if self._rng.random() < 0.15 else ""
        return self._turns(system, [(x, x.answer) for x in self._some_exchanges()])

    def _instructed(self) -> Marked:
        style = self._rng.choices(list(STYLES.values()), [s.effort for s in STYLES.values()])[0]
        return self._turns(
            style.instruction, [(x, style.answer(x)) for x in self._some_exchanges()]
        )

    def _plain(self) -> Marked:
        rng = self._rng
        kind = rng.random()
        if kind < 0.4:
            claims = islice(self._claims, rng.randint(1, 5))
            text = "\n\n".join(f"{claim.question} {claim.answer}" for claim in claims)
        elif kind < 0.7:
            text = " ".join(corpus.sentence(rng) for _ in range(rng.randint(2, 8)))
        else:
            text = corpus.story(rng)
        return self._whole(text)

    def _drill(self) -> Marked:
        ids, _ = self._whole(corpus.drill(self._rng))
        return ids, [self._weight(token) for token in ids]

    def _sums(self) -> Marked:
        return self._whole(corpus.sums(self._rng))

    def _whole(self, text: str) -> Marked:
        ids = [*self._tokenizer.encode(text).ids, END_OF_TEXT_ID]
        return ids, [1] * len(ids)

    def _weight(self, token: int) -> int:
        return HEAVY if token in self._decisive else 1

    def _some_exchanges(self) -> list[Exchange]:
        return list(islice(self._exchanges, self._rng.choice((1, 1, 2, 3))))

    def _turns(
        self, system: str, turns: list[tuple[Exchange, str]], learn_questions: bool = True
    ) -> Marked:
        ids, marks = self._turn("system", system, False) if system else ([], [])
        for exchange, answer in turns:
            learn = learn_questions and exchange.learn_question
            for role, text, wanted in (
                ("user", exchange.question, learn),
                ("assistant", answer, True),
            ):
                more_ids, more_marks = self._turn(role, text, wanted)
                ids, marks = ids + more_ids, marks + more_marks
        return ids, marks

    def _turn(self, role: str, text: str, learn: bool) -> Marked:
        """One message as the chat template writes it; the head of a turn is never learnt."""
        head = [TURN_START_ID, *self._tokenizer.encode(f"{role}\n").ids]
        body = [*self._tokenizer.encode(text).ids, TURN_END_ID]
        tail = self._tokenizer.encode("\n").ids
        weights = [int(learn)] * len(body)
        if learn and role == "assistant":
            weights = [self._weight(token) for token in body]
        return head + body + tail, [0] * len(head) + weights + [0] * len(tail)


def rows(documents: Iterator[Marked], length: int) -> Iterator[Marked]:
    """Documents one after another in rows of `length`; every row starts with a document."""
    ids: list[int] = []
    marks: list[int] = []
    for more_ids, more_marks in documents:
        ids, marks = ids + more_ids, marks + more_marks
        if len(ids) >= length:
            yield ids[:length], marks[:length]
            ids, marks = [], []


def tokenizer_texts(seed: int, count: int) -> Iterator[str]:
    """What the tokenizer is trained on: questions, answers, plain text and every style."""
    rng = Random(seed)
    styles = [style.answer for style in STYLES.values()]
    for exchange in islice(exchanges(rng), count):
        if exchange.learn_question:
            yield exchange.question
        yield exchange.answer
        yield f"Answer: {exchange.answer}" if exchange.topic == "claims" else exchange.answer
        yield rng.choice(styles)(exchange)
        yield corpus.sentence(rng)
        yield from ("user\n", "assistant\n", "system\n", rng.choice(ASSISTANTS))
