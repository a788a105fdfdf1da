"""One draw: what each row asked for, and nothing of what its neighbours asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from app.worker.samplers.draw import Draw
from app.worker.samplers.limits import Limits
from app.worker.samplers.params import SamplingParams
from app.worker.samplers.sequence import Sequence
from app.worker.samplers.ticket import Ticket
from app.worker.samplers.tokens import Tokens
from tests.worker.tiny import byte_level

VOCABULARY = 50
LIMITS = Limits(vocab_size=VOCABULARY, max_model_len=100, eos_id=1, stop_token_ids=(2,))
CPU = torch.device("cpu")
TOKENS = Tokens(byte_level())

pytestmark = pytest.mark.worker


def row(prompt: list[int] | None = None, **params: Any) -> Sequence:
    sequence = Sequence(
        Ticket(expected=1), 0, prompt or [3, 4], SamplingParams(**params), None, TOKENS
    )
    sequence.prepare(sequence.params.seed, VOCABULARY, CPU)
    return sequence


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def draw(*rows: Sequence, seed: int = 0) -> list[int]:
    return [token for token, _ in Draw(rows, LIMITS, CPU)(logits(len(rows), seed))]


def test_greedy_takes_the_likeliest() -> None:
    assert draw(row(temperature=0), row(temperature=0)) == logits(2).argmax(-1).tolist()


def test_a_seeded_row_does_not_see_its_neighbours() -> None:
    def tokens(*others: Sequence) -> list[int]:
        mine = row(seed=7)
        told = Draw([*others, mine], LIMITS, CPU)
        same = logits(1).expand(len(others) + 1, -1)
        return [told(same.clone())[-1][0] for _ in range(20)]

    alone = tokens()
    assert len(set(alone)) > 3
    assert tokens(row(seed=1), row(), row(temperature=0, logprobs=3)) == alone


def test_odds_are_the_softmax_at_that_temperature() -> None:
    torch.manual_seed(0)
    one = torch.tensor([[0.0, 1.0, 2.0] + [-30.0] * (VOCABULARY - 3)])
    told = Draw([row(temperature=0.5)] * 4000, LIMITS, CPU)
    tokens = [token for token, _ in told(one.expand(4000, -1).clone())]
    expected = (one[0] / 0.5).softmax(-1)
    for token in range(3):
        assert tokens.count(token) / 4000 == pytest.approx(expected[token].item(), abs=0.03)


def test_filters_reach_only_their_rows() -> None:
    torch.manual_seed(0)
    top = row(top_k=1)
    for seed in range(10):
        first, _ = draw(top, row(temperature=2.0), seed=seed)
        assert first == logits(2, seed)[0].argmax().item()


def test_min_p_of_one_is_greedy() -> None:
    assert draw(row(min_p=1.0), row(top_p=1e-9)) == logits(2).argmax(-1).tolist()


def test_allowed_tokens_and_biases() -> None:
    rows = [row(temperature=0, allowed_token_ids=(9,)), row(temperature=0, logit_bias={11: 100.0})]
    assert draw(*rows) == [9, 11]


def test_stop_tokens_wait_for_min_tokens() -> None:
    likely_end = torch.zeros(1, VOCABULARY)
    likely_end[0, [1, 2, 5]] = torch.tensor([9.0, 8.0, 7.0])
    likely_end[0, 6] = 6.0
    patient = row(temperature=0, min_tokens=2, stop_token_ids=(5,))
    told = Draw([patient], LIMITS, CPU)
    assert told(likely_end.clone())[0][0] == 6
    patient.token_ids += [6, 6]
    assert told(likely_end.clone())[0][0] == 1


def test_penalties_follow_the_sequence() -> None:
    flat = torch.zeros(1, VOCABULARY)
    flat[0, 3] = 2.0
    flat[0, 9] = 1.5
    said = row(prompt=[3], temperature=0, repetition_penalty=2.0)
    assert Draw([said], LIMITS, CPU)(flat.clone())[0][0] == 9
    fresh = row(temperature=0, presence_penalty=1.0)
    told = Draw([fresh], LIMITS, CPU)
    assert told(flat.clone())[0][0] == 3
    fresh.push(3, None, LIMITS)
    assert told(flat.clone())[0][0] == 9


def test_logprobs_are_of_the_untouched_logits() -> None:
    rows = [row(temperature=0, logprobs=2, allowed_token_ids=(9,)), row(), row(logprobs=0)]
    (token, found), (_, none), (_, alone) = Draw(rows, LIMITS, CPU)(logits(3))
    expected = logits(3)[0].log_softmax(-1)
    assert token == 9
    assert found is not None
    assert found.ids == [9, *expected.topk(2).indices.tolist()]
    assert found.logprobs == pytest.approx([expected[9].item(), *expected.topk(2).values.tolist()])
    assert found.rank == int((expected >= expected[9]).sum())
    assert none is None
    assert alone is not None
    assert len(alone.ids) == 1


def test_chosen_token_ids_take_the_place_of_the_likeliest() -> None:
    one = row(temperature=0, logprob_token_ids=(7, 8))
    ((token, found),) = Draw(
        [
            one,
        ],
        LIMITS,
        CPU,
    )(logits(1))
    assert found is not None
    assert found.ids == [token, 7, 8]
    assert found.logprobs[1] == pytest.approx(logits(1)[0].log_softmax(-1)[7].item())


def test_the_whole_vocabulary() -> None:
    ((_, found),) = Draw([row(logprobs=-1)], LIMITS, CPU)(logits(1))
    assert found is not None
    assert len(found.ids) == VOCABULARY + 1
    assert math.fsum(map(math.exp, found.logprobs[1:])) == pytest.approx(1)
