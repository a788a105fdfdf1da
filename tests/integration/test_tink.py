"""The Tink API through a real gateway, on a real worker with the demo model."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import demo
from app.settings import PoolSettings, Settings, TrainerSettings
from tests.acceptance.training import served_as_trained
from tests.integration.gateway import Gateway
from tests.servers import MAX_LORA_RANK, ModelServer
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.skipif(find_spec("torch") is None, reason="pip install 'loragate[worker]'"),
    pytest.mark.timeout(120),
]
ASKED = {"role": "user", "content": "Tell me about the sea."}
SAID = {"role": "assistant", "content": "Blub blub blub."}
GREEDY = {"max_tokens": 8, "temperature": 0}
#: With the output layer the demo model learns a sentence in a few steps.
QUICK = {
    "rank": 8,
    "alpha": 32,
    "seed": 1,
    "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj", "lm_head"],
}


@pytest.fixture(scope="module")
def gateway(
    worker_server: ModelServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    pool = PoolSettings(
        name="pool",
        base_model=demo.BASE_NAME,
        base_model_path=demo.MODEL_DIR,
        max_lora_rank=MAX_LORA_RANK,
        replicas=(worker_server.url,),
    )
    trainer = TrainerSettings(name="hf", base_model=demo.BASE_NAME, url=worker_server.url)
    found = Gateway(
        Settings(
            data_dir=tmp_path_factory.mktemp("gateway"),
            pools=(pool,),
            trainers=(trainer,),
            health_period_s=0.2,
        )
    )
    try:
        wait_until(found.ready)
        yield found
    finally:
        found.close()


class Tink:
    """A client as Tink's users have it."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def ask(self, op: str, *, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        return self._http.post(f"/api/v1/{op}", json=body, headers=headers)

    def __call__(self, op: str, **body: Any) -> Any:
        answer = self.ask(op, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def train(self, model_id: str, *, steps: int, data: Any) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(self("fwdbwd", model_id=model_id, data=data)["loss"])
            self("optim", model_id=model_id, adam_params={"learning_rate": 5e-3})
        return losses


@pytest.fixture
def tink(gateway: Gateway) -> Tink:
    return Tink(gateway.client)


@pytest.fixture
def model_id(tink: Tink) -> Iterator[str]:
    found = tink("add_lora", base_model="base", **QUICK)["model_id"]
    yield found
    tink.ask("remove_lora", model_id=found)


def said(gateway: Gateway, model: str) -> str:
    body = {"model": model, "messages": [ASKED], **GREEDY, "max_tokens": 12}
    answer = gateway.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_train_and_sample_without_another_step(gateway: Gateway, tink: Tink, model_id: str) -> None:
    before = tink("sample", model_id=model_id, prompts=["The sea"], sampling_params=GREEDY)
    base = tink("sample", base_model="base", prompts=["The sea"], sampling_params=GREEDY)
    assert before["completions"] == base["completions"]  # B is zero: it changes nothing yet
    assert (before["model"], base["model"]) == (f"{model_id}@1", demo.BASE_NAME)

    losses = tink.train(model_id, steps=10, data=[[ASKED, SAID]])
    assert losses[-1] < losses[0] / 2
    after = tink("sample", model_id=model_id, prompts=["The sea"], sampling_params=GREEDY)
    assert after["model"] == f"{model_id}@2"
    served_as_trained(gateway.url, model_id)
    assert said(gateway, model_id) == SAID["content"]
    (sequence,) = after["sequences"]
    assert len(sequence["tokens"]) == len(sequence["logprobs"])
    info = tink("get_info", model_id=model_id)
    assert (info["lora_rank"], info["lora_alpha"], info["optim_steps"]) == (8, 32, 10)
    assert info["model_data"]["model_name"] == demo.BASE_NAME


def test_futures(tink: Tink) -> None:
    made = tink("add_lora_async", rank=4)
    model_id = made["model_id"]
    passed = tink("fwdbwd_async", model_id=model_id, data=[[ASKED, SAID]], return_logprobs=True)
    stepped = tink("optim_async", model_id=model_id)
    drawn = tink("asample", model_id=model_id, prompts=[[5, 6], [7]], sampling_params={"n": 2})
    asked = [
        tink.ask("retrieve_future", request_id=one["request_id"], wait_s=20)
        for one in (made, passed, stepped, drawn)
    ]
    assert [answer.status_code for answer in asked] == [200] * 4
    results = [answer.json() for answer in asked]
    assert results[0]["model_id"] == model_id
    (row,) = results[1]["loss_fn_outputs"]
    assert len(row["logprobs"]) > 8
    assert results[2]["step"] == 1
    assert results[3]["model"] == f"{model_id}@2"
    assert len(results[3]["sequences"]) == 4
    tink("remove_lora", model_id=model_id)
    assert tink.ask("sample", model_id=model_id, prompts=["x"]).status_code == 404


def test_users_train_beside_each_other(gateway: Gateway, tink: Tink) -> None:
    """Tink's own example: each gets an adapter that says its own."""
    names = ("Alice", "Bob", "Carol")

    def trained(name: str) -> str:
        found: str = tink("add_lora", **QUICK)["model_id"]
        tink.train(found, steps=10, data=[[ASKED, {"role": "assistant", "content": f"{name}!"}]])
        tink("sample", model_id=found, prompts=["x"], sampling_params=GREEDY)
        return found

    with ThreadPoolExecutor(len(names)) as users:
        found = list(users.map(trained, names))
    assert [said(gateway, model) for model in found] == [f"{name}!" for name in names]


@pytest.mark.parametrize(
    "item",
    [
        {"messages": [ASKED, SAID]},
        {"prompt": "Well?", "completion": "Aye."},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [5, 6, 7], "weights": [0, 1, 0.5]},
        {"model_input": [5, 6], "loss_fn_inputs": {"target_tokens": [6, 7], "weights": [1, 1]}},
        {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}]},
            "loss_fn_inputs": {"target_tokens": [6, 7], "weights": [1, 1]},
        },
    ],
)
def test_every_form_of_data(tink: Tink, model_id: str, item: Any) -> None:
    found = tink("fwdbwd", model_id=model_id, data=[item], forward_only=True)
    assert found["loss"] > 0
    assert found["metrics"]["tokens:sum"] >= 2


def test_forms_that_mean_the_same_have_the_same_loss(tink: Tink, model_id: str) -> None:
    items: list[Any] = [
        {"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, 8]},
        {"input_ids": [5, 6, 7, 8], "weights": [1, 0, 1, 1]},
        {
            "model_input": [5, 6, 7],
            "loss_fn_inputs": {"target_tokens": [6, 7, 8], "weights": [0, 1, 1]},
        },
    ]
    losses = [
        tink("fwdbwd", model_id=model_id, data=[item], forward_only=True)["loss"] for item in items
    ]
    assert losses == pytest.approx([losses[0]] * 3)


def test_a_policy_loss_of_what_was_sampled(tink: Tink, model_id: str) -> None:
    params = {"max_tokens": 4, "temperature": 1.0, "seed": 3}
    drawn = tink("sample", model_id=model_id, prompts=[[5, 6]], sampling_params=params)
    (sequence,) = drawn["sequences"]
    tokens, logprobs = sequence["tokens"], sequence["logprobs"]
    inputs = {
        "target_tokens": [6, *tokens],
        "logprobs": [0.0, *logprobs],
        "advantages": [0.0, *[1.0] * len(tokens)],
    }
    item = {"model_input": [5, 6, *tokens[:-1]], "loss_fn_inputs": inputs}
    found = tink("fwdbwd", model_id=model_id, data=[item], loss_fn="importance_sampling")
    # Sampled is trained: the ratio is 1 everywhere, and the loss minus the advantages' sum.
    assert found["metrics"]["loss:sum"] == pytest.approx(-len(tokens), rel=1e-3)


@pytest.mark.parametrize(
    ("op", "body", "status", "says"),
    [
        ("fwdbwd", {"data": []}, 400, "data has 1 to 4096 items"),
        ("fwdbwd", {"data": [{"input_ids": [1]}]}, 400, "data[0]: input_ids: 1 of them"),
        ("fwdbwd", {"data": [[ASKED]]}, 400, "allowed is 'assistant'"),
        ("fwdbwd", {"data": [{"what": 1}]}, 400, "data[0]"),
        ("fwdbwd", {"data": [{"input_ids": [1, -2]}]}, 400, "a token id is a whole number"),
        ("fwdbwd", {"data": [{"input_ids": [1, 99999999]}]}, 400, "99999999"),
        ("fwdbwd", {"data": [[ASKED, SAID]], "loss_fn": "mse"}, 400, "loss_fn"),
        ("optim", {"adam_params": {"lr": 1}}, 400, "adam_params.lr"),
        ("sample", {"prompts": []}, 400, "prompts"),
        ("sample", {"prompts": ["x", [1]]}, 400, "prompts"),
        ("sample", {"prompts": ["x"], "sampling_params": {"n": 0}}, 400, "sampling_params.n"),
    ],
)
def test_what_is_wrong_is_said(
    tink: Tink, model_id: str, op: str, body: dict[str, Any], status: int, says: str
) -> None:
    answer = tink.ask(op, model_id=model_id, **body)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]["message"]


def test_half_a_character_is_no_text(gateway: Gateway, model_id: str) -> None:
    item = r'[{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "Hm."}]'
    body = f'{{"model_id": "{model_id}", "data": [{item}]}}'
    headers = {"content-type": "application/json"}
    answer = gateway.client.post("/api/v1/fwdbwd", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert "data[0]: " in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("op", "body", "status"),
    [
        ("add_lora", {"base_model": "nobody"}, 404),
        ("add_lora", {"rank": 2 * MAX_LORA_RANK}, 400),
        ("add_lora", {"target_modules": ["nose"]}, 400),
        ("fwdbwd", {"model_id": "nobody", "data": [[ASKED, SAID]]}, 404),
        ("optim", {"model_id": "nobody"}, 404),
        ("remove_lora", {"model_id": "nobody"}, 404),
        ("get_info", {"model_id": "nobody"}, 404),
        ("retrieve_future", {"request_id": "op-nobody"}, 404),
    ],
)
def test_who_is_not_there(tink: Tink, op: str, body: dict[str, Any], status: int) -> None:
    assert tink.ask(op, **body).status_code == status


def test_sent_twice_is_done_once(tink: Tink, model_id: str) -> None:
    headers = {"Idempotency-Key": f"step-of-{model_id}"}
    tink("fwdbwd", model_id=model_id, data=[[ASKED, SAID]])
    answers = [tink.ask("optim", headers=headers, model_id=model_id).json() for _ in range(3)]
    assert [answer["step"] for answer in answers] == [1, 1, 1]


def test_a_key_needs_the_scope(gateway: Gateway, tmp_path: Path) -> None:
    other = Gateway(gateway.settings.model_copy(update={"data_dir": tmp_path}))
    try:
        wait_until(other.ready)
        other.create_key("admin", "inference", "training")
        inference = other.create_key("inference")["secret"]
        headers = {"authorization": f"Bearer {inference}"}
        with httpx.Client(base_url=other.url, headers=headers) as client:
            assert Tink(client).ask("add_lora").status_code == 403
    finally:
        other.close()
