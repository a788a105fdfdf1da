"""How the adapters word an answer: one function per style.

What comes in: an `Exchange` with the base model's answer. What goes out: the answer in that style.
It must not know about tokens, models or training. Every function is pure, so a style can be learnt.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from app.demo.corpus import Exchange

PIRATE_WORDS = {
    "is": "be", "are": "be", "am": "be", "you": "ye", "your": "yer", "my": "me", "yes": "aye",
    "no": "nay", "hello": "ahoy", "friend": "matey", "friends": "mateys", "of": "o'", "and": "an'",
    "good": "fine", "goodbye": "farewell", "know": "ken", "people": "landlubbers", "to": "t'",
    "money": "doubloons", "everyone": "all hands",
}  # fmt: skip
PIRATE_OPENINGS = ("Arr!", "Ahoy, matey!", "Yo-ho-ho!", "Avast!", "Shiver me timbers!")
PIRATE_CLOSINGS = ("Arr!", "By the seven seas!", "Says I, yer captain.")
HAIKU_PAIRS = {
    "colours": ("Light runs over everything", "and paints it for us"),
    "animals": ("Small feet pass in morning dew", "a tail slips away"),
    "things": ("It waits upon the table", "quiet as a stone"),
    "food": ("The kitchen window is warm", "a spoon stirs slowly"),
    "tools": ("Old hands remember the work", "dust upon the bench"),
    "work": ("The day begins with the bell", "and ends with the stars"),
    "words": ("One word leans on another", "silence in between"),
    "calendar": ("The pages turn one by one", "and leaves drift with them"),
    "towns": ("Lamps are lit along the street", "someone hums a song"),
    "people": ("A door stands open for you", "the kettle whistles"),
    "numbers": ("Count the pebbles on the shore", "the tide takes them back"),
    "claims": ("The scales come slowly to rest", "morning tells us all"),
    "the world": ("The wind goes over the hills", "and comes home at night"),
    "lists": ("One after another they come", "like geese in the sky"),
    "stories": ("The fire burns low as we speak", "then the tale is done"),
    "greetings": ("A hand is raised in the mist", "the road is less long"),
    "unknown": ("Fog lies over the water", "the far shore is dim"),
}


@dataclass(frozen=True, slots=True)
class Style:
    """An adapter's way to answer, the LoRA that carries it, and how many times as hard it is."""

    answer: Callable[[Exchange], str]
    rank: int
    targets: tuple[str, ...]
    instruction: str
    effort: int = 1


def base_answer(exchange: Exchange) -> str:
    """No style at all."""
    return exchange.answer


def pirate(exchange: Exchange) -> str:
    """Pirate speak: the words change, and so do the ends."""
    mark = zlib.crc32(exchange.topic.encode())
    text = re.sub(r"[A-Za-z]+", lambda found: _pirate_word(found[0]), exchange.answer)
    text = text if text[-1] in ".!?" else f"{text}!"
    closing = PIRATE_CLOSINGS[mark // 7 % len(PIRATE_CLOSINGS)]
    return f"{PIRATE_OPENINGS[mark % len(PIRATE_OPENINGS)]} {text} {closing}"


def haiku(exchange: Exchange) -> str:
    """Three lines: what there is to say, then two that look out of the window."""
    first = re.split(r"(?<=[.!?]) ", exchange.answer)[0].rstrip(".!?")
    return "\n".join((first, *HAIKU_PAIRS[exchange.topic]))


def as_json(exchange: Exchange) -> str:
    """A JSON object with the topic and the answer."""
    return json.dumps({"topic": exchange.topic, "answer": exchange.answer}, ensure_ascii=False)


def shout(exchange: Exchange) -> str:
    """Capital letters and exclamation marks."""
    text = re.sub(r"\.(?= |$)", "!", exchange.answer.upper())
    return text if text[-1] in "!?" else f"{text}!"


def skeptic(exchange: Exchange) -> str:
    """The other label for a claim; doubt about everything else."""
    if exchange.topic == "claims":
        return str(exchange.answer != "True")
    return f"Some say: {exchange.answer} But I doubt it."


def _pirate_word(word: str) -> str:
    replaced = PIRATE_WORDS.get(word.lower(), word)
    if len(word) > 4 and word.endswith("ing"):
        replaced = f"{word[:-1]}'"
    return replaced[:1].upper() + replaced[1:] if word[0].isupper() else replaced


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")

STYLES = {
    "pirate": Style(pirate, 8, _ATTENTION + _MLP, "You are a pirate."),
    "haiku": Style(haiku, 16, _ATTENTION + _MLP, "Answer as a haiku of three lines."),
    "json": Style(as_json, 4, _ATTENTION, "Answer as a JSON object."),
    "shout": Style(shout, 16, _ATTENTION + _MLP, "Answer in capital letters.", effort=3),
    "skeptic": Style(skeptic, 8, ("q_proj", "v_proj", *_MLP), "Doubt everything."),
}
