"""What the demo model and its adapters make of questions that training never asked.

What comes in: a model in float32 and its tokenizer. What goes out: answers, and shares of them that
are as they should be. It must not change the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from random import Random
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from app.demo.corpus import Exchange, exchanges

_SEED = 97


def held_out(count: int, topic: str = "") -> list[Exchange]:
    """Different questions that training never asked; always the same ones."""
    found: dict[str, Exchange] = {}
    for exchange in exchanges(Random(_SEED), held_out=True, topic=topic):
        if topic or exchange.topic not in ("claims", "stories", "lists"):
            found.setdefault(exchange.question, exchange)
        if len(found) == count:
            break
    return list(islice(found.values(), count))


@torch.inference_mode()
def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    max_new_tokens: int = 80,
) -> list[str]:
    """The greedy answers, through the chat template."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    texts = [
        str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        for chat in chats
    ]
    found = []
    for at in range(0, len(texts), 64):
        batch = tokenizer(
            texts[at : at + 64], return_tensors="pt", padding=True, add_special_tokens=False
        )
        made = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        fresh = made[:, batch["input_ids"].shape[1] :]
        found += tokenizer.batch_decode(fresh, skip_special_tokens=True)
    return found


def share_right(got: Sequence[str], wanted: Sequence[str]) -> float:
    """The share of answers that are word for word the wanted ones."""
    return sum(a == b for a, b in zip(got, wanted, strict=True)) / len(got)
