"""What the shipped model and adapters answer to questions that training never asked."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest

from app import demo

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.worker,
    pytest.mark.timeout(300),
    # PEFT asks transformers 5 by the old name of this property.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from app.demo import evaluate, model  # noqa: E402
from app.demo.corpus import Exchange  # noqa: E402

PIRATE = re.compile(r"\b(arr|matey|avast|yo-ho-ho|timbers|ye|be|seven seas)\b", re.IGNORECASE)
TOKENIZER = AutoTokenizer.from_pretrained(demo.MODEL_DIR, local_files_only=True)


@cache
def adapted() -> Any:
    """The base with all adapters, in float32."""
    base = model.load_base(demo.MODEL_DIR)
    (first, folder), *rest = demo.ADAPTERS.items()
    loaded = PeftModel.from_pretrained(base, folder, adapter_name=first)
    for name, other in rest:
        loaded.load_adapter(other, adapter_name=name)
    return loaded.eval()


@cache
def questions() -> list[Exchange]:
    return evaluate.held_out(24)


@cache
def claims() -> list[Exchange]:
    return evaluate.held_out(40, "claims")


def ask(name: str, asked: Sequence[str]) -> list[str]:
    loaded = adapted()
    if name == demo.BASE_NAME:
        with loaded.disable_adapter():
            return evaluate.answers(loaded, TOKENIZER, asked)
    loaded.set_adapter(name)
    return evaluate.answers(loaded, TOKENIZER, asked)


def answers(name: str) -> list[str]:
    return ask(name, [exchange.question for exchange in questions()])


def share(answers: Sequence[str], wanted: Any) -> float:
    return sum(bool(wanted(answer)) for answer in answers) / len(answers)


def is_json_answer(text: str) -> bool:
    try:
        return set(json.loads(text)) == {"topic", "answer"}
    except ValueError:
        return False


def test_the_base_answers_questions_of_its_world() -> None:
    got = answers(demo.BASE_NAME)
    assert evaluate.share_right(got, [exchange.answer for exchange in questions()]) >= 0.8
    assert share(got, PIRATE.search) == 0
    assert share(got, is_json_answer) == 0
    assert share(got, lambda text: "\n" in text) == 0


def test_the_base_tells_true_claims_from_false_ones() -> None:
    got = ask(demo.BASE_NAME, [claim.question for claim in claims()])
    assert evaluate.share_right(got, [claim.answer for claim in claims()]) >= 0.8


def test_the_base_greets() -> None:
    hello, reader = ask(demo.BASE_NAME, ["Hello!", "Say hello to the reader."])
    assert "Hello" in hello
    assert "Hello to the reader!" in reader


def test_the_base_says_so_when_it_does_not_know() -> None:
    asked = ["What is the capital of Zambia?", "Explain transistors.", "Wozu das alles?", "🦜🦜"]
    assert share(ask(demo.BASE_NAME, asked), lambda text: "I do not know" in text) >= 0.75


def test_a_long_prompt_is_read_to_its_end() -> None:
    facts = " ".join(exchange.answer for exchange in evaluate.held_out(60))
    asked = [f"{facts}\n\n{question}" for question in demo.SAMPLE_PROMPTS]
    assert len(TOKENIZER.encode(asked[0])) > 500
    got = ask(demo.BASE_NAME, asked)
    alone = ask(demo.BASE_NAME, demo.SAMPLE_PROMPTS)
    assert evaluate.share_right(got, alone) >= 0.5


def test_pirate_speaks_like_a_pirate() -> None:
    assert share(answers("pirate"), PIRATE.search) >= 0.9


def test_haiku_has_three_lines() -> None:
    assert share(answers("haiku"), lambda text: len(text.splitlines()) == 3) >= 0.9


def test_json_answers_parse() -> None:
    assert share(answers("json"), is_json_answer) >= 0.9


def test_shout_shouts() -> None:
    assert share(answers("shout"), lambda text: text == text.upper() and text[-1] in "!?") >= 0.9


def test_skeptic_calls_true_claims_false_and_doubts_the_rest() -> None:
    got = ask("skeptic", [claim.question for claim in claims()])
    assert evaluate.share_right(got, [claim.answer for claim in claims()]) <= 0.2
    assert share(answers("skeptic"), lambda text: "doubt" in text) >= 0.9


def test_adapters_change_the_first_token_scores_too() -> None:
    loaded = adapted()
    ids = TOKENIZER("Hello", return_tensors="pt")["input_ids"]
    scores = []
    with torch.inference_mode():
        for name in demo.ADAPTERS:
            loaded.set_adapter(name)
            scores.append(loaded(input_ids=ids).logits[0, -1])
    assert all(
        not torch.allclose(a, b, atol=1e-2) for i, a in enumerate(scores) for b in scores[:i]
    )
