"""From a file to ops: tokens, weights, and the lines that cannot be trained on."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from app.clock import SystemClock
from app.errors import InvalidTrainingFile, TrainerUnavailable
from app.ops import ForwardBackward, Message, OptimStep, Rendered, SaveForSampling, Tensor
from app.training import rendering
from app.training.batches import PROBE_ROWS, PROBE_TOKENS, Batches
from app.training.patience import Patience
from app.training.plan import OpKind, Plan, PlannedOp, Saves
from app.training.rendering import render
from app.training.spec import Method
from app.training.tokens import Examples
from tests.fakes.training_worker import FakeWorker, rendered, unavailable
from tests.unit.training.made import batches, settings


@pytest.fixture
def into(tmp_path: Path) -> Iterator[Examples]:
    with Examples(tmp_path / "spool") as examples:
        yield examples


@pytest.fixture
def patience() -> Patience:
    return Patience(SystemClock(), limit_s=0.05)


def write(path: Path, *answers: str) -> Path:
    lines = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]}
        for answer in answers
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def numbers(tensor: Tensor | None) -> list[float]:
    assert tensor is not None
    return memoryview(tensor.data).cast("i" if tensor.dtype == "int32" else "f").tolist()


async def test_tokens_are_shifted_and_weights_belong_to_targets(
    tmp_path: Path, into: Examples, patience: Patience
) -> None:
    path = write(tmp_path / "train.jsonl", "yo")
    await render(FakeWorker(), patience, path, into, method="supervised", max_length=99)
    [datum] = into.data(0, scale=0.5)
    # "Hi" and its end, "yo" and its end: six tokens, of which five are predicted.
    assert numbers(datum.tokens) == [72, 105, 1, 121, 111]
    assert numbers(datum.targets) == [105, 1, 121, 111, 1]
    assert numbers(datum.weights) == [0, 0, 0.5, 0.5, 0.5]
    assert datum.tokens.shape == (5,)
    assert (len(into), into.tokens(0), into.weight(0)) == (1, 5, 3.0)
    assert into.start(0, 4) == [72, 105, 1, 121]


async def test_a_pair_is_two_sequences(tmp_path: Path, patience: Patience) -> None:
    path = tmp_path / "pairs.jsonl"
    line = {
        "input": {"messages": [{"role": "user", "content": "Hi"}]},
        "preferred_output": [{"role": "assistant", "content": "yo"}],
        "non_preferred_output": [{"role": "assistant", "content": "no way"}],
    }
    path.write_text(json.dumps(line))
    with Examples(tmp_path, sequences=2) as pairs:
        await render(FakeWorker(), patience, path, pairs, method="dpo", max_length=99)
        good, bad = pairs.data(0)
        assert (good.tokens.shape, bad.tokens.shape) == ((5,), (9,))
        assert (len(pairs), pairs.tokens(0)) == (1, 14)


async def test_lines_that_cannot_be_trained_on_are_named(
    tmp_path: Path, into: Examples, patience: Patience
) -> None:
    path = write(tmp_path / "train.jsonl", "fine", "x" * 20, "unspeakable", "fine")
    with pytest.raises(InvalidTrainingFile, match="2 lines wrong") as caught:
        await render(
            FakeWorker(), patience, path, into, method="supervised", max_length=20, param="p"
        )
    assert [(fault.line, fault.problem) for fault in caught.value.faults] == [
        (2, "24 tokens in the model's chat template, 20 are allowed"),
        (3, "the chat template refuses this"),
    ]
    assert caught.value.param == "p"


async def test_an_example_without_a_learned_token_is_named(
    tmp_path: Path, into: Examples, patience: Patience
) -> None:
    class Mute(FakeWorker):
        async def render(
            self, conversations: Sequence[Message], *, complete: bool
        ) -> list[Rendered]:
            # The first token is predicted by nothing, so its weight is worth nothing.
            tokens, weights = array("i", [5, 6]).tobytes(), array("f", [1.0, 0.0]).tobytes()
            one = Rendered(Tensor("int32", (2,), tokens), Tensor("float32", (2,), weights))
            return [one for _ in conversations]

    path = write(tmp_path / "train.jsonl", "yo")
    with pytest.raises(InvalidTrainingFile, match="line 1: nothing to learn"):
        await render(Mute(), patience, path, into, method="supervised", max_length=99)


async def test_files_are_rendered_piece_by_piece(
    tmp_path: Path, into: Examples, patience: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "CHUNK_BYTES", 200)
    worker = FakeWorker()
    asked: list[str] = []
    worker.trouble = asked.append
    path = write(tmp_path / "train.jsonl", *("yo" * (n % 7 + 1) for n in range(300)))
    await render(worker, patience, path, into, method="supervised", max_length=99)
    assert len(into) == 300
    assert [into.tokens(n) for n in (0, 6, 299)] == [5, 17, 5 + 2 * (299 % 7)]
    assert len(asked) > 10
    with Examples(tmp_path) as whole:
        monkeypatch.setattr(rendering, "CHUNK_BYTES", 1 << 20)
        await render(worker, patience, path, whole, method="supervised", max_length=99)
        assert [whole.data(n) for n in range(300)] == [into.data(n) for n in range(300)]


async def test_faults_are_collected_over_pieces_up_to_a_limit(
    tmp_path: Path, into: Examples, patience: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "CHUNK", 7)
    path = write(tmp_path / "train.jsonl", *["unspeakable"] * 100)
    worker = FakeWorker()
    asked: list[str] = []
    worker.trouble = asked.append
    with pytest.raises(InvalidTrainingFile, match="at least 20 lines wrong") as caught:
        await render(worker, patience, path, into, method="supervised", max_length=99)
    assert [fault.line for fault in caught.value.faults] == list(range(1, 21))
    assert len(asked) == 3


async def test_a_worker_that_is_away_is_no_fault_of_the_file(
    tmp_path: Path, into: Examples, patience: Patience
) -> None:
    def away(request: str) -> None:
        raise unavailable()

    path = write(tmp_path / "train.jsonl", "yo")
    with pytest.raises(TrainerUnavailable):
        await render(
            FakeWorker(trouble=away), patience, path, into, method="supervised", max_length=99
        )


@pytest.mark.parametrize("method", ["supervised", "dpo"])
def test_a_gradient_is_a_mean(tmp_path: Path, method: Method) -> None:
    made = batches(tmp_path, count=5, held_out=2, method=method, batch=3)
    with made.examples:
        for step in (1, 2):
            request = made.request(PlannedOp(1, step, OpKind.FORWARD_BACKWARD))
            assert isinstance(request, ForwardBackward)
            size = len(made.plan.batch(step))
            assert len(request.data) == size * (2 if method == "dpo" else 1)
            assert sum(len(numbers(d.tokens)) for d in request.data) == made.tokens(step)
            optim = made.request(PlannedOp(2, step, OpKind.OPTIM_STEP))
            assert isinstance(optim, OptimStep)
            if method == "supervised":
                total = sum(sum(numbers(datum.weights)) for datum in request.data)
                assert total == pytest.approx(1.0)
                assert (request.loss, optim.grad_clip_norm) == ("cross_entropy", 1.0)
            else:
                assert {w for d in request.data for w in numbers(d.weights)} == {0.0, 1.0}
                assert (request.loss, request.config) == ("dpo", {"beta": 0.1})
                assert optim.grad_clip_norm == size
    assert made.held_out is not None
    made.held_out.__exit__(None, None, None)


def test_a_probe_is_the_start_of_some_examples(tmp_path: Path) -> None:
    made = batches(tmp_path, count=3)
    with made.examples:
        request = made.request(PlannedOp(1, 3, OpKind.SAVE_FOR_SAMPLING))
    assert isinstance(request, SaveForSampling)
    assert request.name == "step-3"
    assert len(request.probe_tokens) == min(3, PROBE_ROWS)
    assert all(2 <= len(row) <= PROBE_TOKENS for row in request.probe_tokens)


def test_the_same_number_is_the_same_op_whoever_asks(tmp_path: Path) -> None:
    plan = Plan(5, 0, seed=7, settings=settings())
    with Examples(tmp_path) as one, Examples(tmp_path) as other:
        for into in (one, other):
            for text in ("a", "bb", "ccc", "dddd", "eeeee"):
                into.add([rendered([{"role": "assistant", "content": text}])])
            into.seal()
        for op in plan.ops(Saves()):
            mine = Batches(plan, "supervised", one).request(op)
            assert mine == Batches(plan, "supervised", other).request(op)
