"""Training twice gives the same bytes; what is held out is never in what training reads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from app import demo
from app.demo.corpus import exchanges

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.worker,
    pytest.mark.timeout(300),
    # PEFT asks transformers 5 by the old name of this property.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

import torch  # noqa: E402

from app.demo.styles import STYLES  # noqa: E402
from app.demo.train import Plan, train  # noqa: E402

TINY = Plan(
    base_steps=2,
    base_batch_tokens=128,
    adapter_steps=2,
    adapter_batch_tokens=128,
    checks=1,
    tokenizer_texts=500,
)


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def test_two_trainings_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = {name: STYLES[name] for name in ("pirate", "json")}
    monkeypatch.setattr("app.demo.train.STYLES", two)
    first, second = train(tmp_path / "a", TINY), train(tmp_path / "b", TINY)
    assert first == second
    assert len(first["files"]) == 5 + 2 * len(two)


def test_every_style_is_shipped() -> None:
    assert set(STYLES) == set(demo.ADAPTERS)


def test_training_never_sees_a_held_out_question() -> None:
    seen = {x.key for x in islice(exchanges(Random(1)), 20_000)}
    kept = {x.key for x in islice(exchanges(Random(2), held_out=True), 500)}
    assert kept
    assert not seen & kept


def test_the_same_seed_asks_the_same_questions() -> None:
    assert [*islice(exchanges(Random(3)), 200)] == [*islice(exchanges(Random(3)), 200)]
