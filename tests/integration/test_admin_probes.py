"""Probes over the admin API and the command line: stored, shown, refused, computed."""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from app import demo
from tests.integration.gateway import Gateway, Workbench
from tests.integration.test_cli import Shell

PROBE = {
    "token_ids": [[1, 2, 3], [4, 5]],
    "logprobs": [[-0.5, -1.0], [-2.5]],
    "dtype": "bfloat16",
}
URL = "/admin/adapters/pirate/versions/1/probe"


@pytest.fixture
def loragate(gateway: Gateway) -> Shell:
    return Shell(gateway.url)


def test_a_probe_set_later(gateway: Gateway, workbench: Workbench) -> None:
    found = gateway.register("pirate", workbench.adapter())
    assert (found["version"]["probed"], found["version"]["targets_lm_head"]) == (False, False)
    missing = gateway.client.get(URL)
    assert missing.status_code == 404
    assert missing.json()["error"]["message"] == "pirate@1 has no probe."
    put = gateway.client.put(URL, json=PROBE)
    assert put.status_code == 200, put.text
    assert (put.json()["model"], put.json()["probed"]) == ("pirate@1", True)
    assert gateway.client.get(URL).json() == PROBE
    shown = gateway.client.get("/admin/adapters/pirate").json()
    assert [version["probed"] for version in shown["versions"]] == [True]
    deleted = gateway.client.delete(URL)
    assert deleted.json() == {"id": "pirate@1", "object": "adapter.version.probe", "deleted": True}
    assert gateway.client.delete(URL).status_code == 404
    assert gateway.client.put(URL.replace("1", "7"), json=PROBE).status_code == 404


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"logprobs": [[-0.5, -1.0]]}, "adapter_rejected", "logprobs"),
        ({"token_ids": [[1, 2, 300], [4, 5]]}, "adapter_rejected", "token_ids[0]"),
        ({"logprobs": [[-0.5, 3.0], [-2.5]]}, "adapter_rejected", "logprobs[0]"),
        ({"token_ids": [[1] * 513]}, "adapter_rejected", "token_ids[0]"),
        ({"dtype": "int8"}, "invalid_request", "dtype"),
        ({"token_ids": "1 2 3"}, "invalid_request", "token_ids"),
        ({"tokens": []}, "invalid_request", "tokens"),
    ],
)
def test_what_is_wrong_with_a_probe(
    gateway: Gateway, workbench: Workbench, changes: dict[str, Any], code: str, param: str
) -> None:
    gateway.register("pirate", workbench.adapter())
    answer = gateway.client.put(URL, json={**PROBE, **changes})
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert gateway.client.get(URL).status_code == 404


def test_no_number_is_no_logprob(gateway: Gateway, workbench: Workbench) -> None:
    gateway.register("pirate", workbench.adapter())
    raw = json.dumps({**PROBE, "logprobs": [[-0.5, math.nan], [-2.5]]})
    headers = {"content-type": "application/json"}
    answer = gateway.client.put(URL, content=raw, headers=headers)
    assert answer.status_code in (400, 422), answer.text
    assert "logprobs" in answer.text or "JSON" in answer.text


def test_a_probe_uploaded_with_the_weights(gateway: Gateway, workbench: Workbench) -> None:
    folder = workbench.adapter()
    (folder / "probe.json").write_text(json.dumps(PROBE))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(folder, "pirate")
    headers = {"content-type": "application/x-tar"}

    def upload(name: str) -> Any:
        params = {"name": name}
        body = packed.getvalue()
        return gateway.client.post("/admin/adapters", params=params, content=body, headers=headers)

    answer = upload("pirate")
    assert answer.status_code == 201, answer.text
    assert answer.json()["version"]["probed"] is True
    assert gateway.client.get(URL).json() == PROBE
    (folder / "probe.json").write_text(json.dumps({**PROBE, "logprobs": []}))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(folder, "pirate")
    refused = upload("parrot")
    assert refused.status_code == 422
    assert refused.json()["error"]["details"][0]["field"] == "probe.json: logprobs"
    assert gateway.client.get("/admin/adapters/parrot").status_code == 404


def test_a_probe_from_a_file(
    gateway: Gateway, loragate: Shell, workbench: Workbench, tmp_path: Path
) -> None:
    folder = workbench.adapter()
    loragate("adapters", "add", folder, "--name", "pirate")
    assert re.search(r"upload\S* +no ", loragate("adapters", "show", "pirate"))
    file = tmp_path / "made.json"
    file.write_text(json.dumps(PROBE))
    said = loragate("adapters", "probe", "pirate", "--file", file)
    assert said == "pirate@1 has a probe: 2 rows, 5 token ids, bfloat16.\n"
    assert re.search(r"upload\S* +yes ", loragate("adapters", "show", "pirate"))
    assert loragate.json("adapters", "probe", "pirate@1", "--file", file) == {
        "model": "pirate@1",
        **PROBE,
    }
    for text, says in (
        ("nonsense", "is not JSON"),
        ("[]", "not a JSON object"),
        ('{"logprobs": [[NaN]]}', "NaN is no number"),
        ('{"token_ids": [], "logprobs": []}', "token_ids: found 0"),
    ):
        file.write_text(text)
        assert says in loragate.error("adapters", "probe", "pirate", "--file", file)
    file.write_text(json.dumps(PROBE))
    assert "no version 7" in loragate.error("adapters", "probe", "pirate@7", "--file", file)
    assert "no adapter 'lost'" in loragate.error("adapters", "probe", "lost", "--file", file)
    assert "give --adapter" in loragate.run("adapters", "probe", "pirate", code=2).stderr


def test_a_folder_with_a_probe_is_sent_whole(
    gateway: Gateway, loragate: Shell, workbench: Workbench
) -> None:
    folder = workbench.adapter()
    (folder / "probe.json").write_text(json.dumps(PROBE))
    added = loragate.json("adapters", "add", folder, "--name", "pirate")
    assert added["version"]["probed"] is True


def test_a_probe_of_other_files_is_refused(
    gateway: Gateway, loragate: Shell, workbench: Workbench, tmp_path: Path
) -> None:
    """It would say of every right replica that it is wrong."""
    loragate("adapters", "add", workbench.adapter(), "--name", "pirate")
    words = ("adapters", "probe", "pirate", "--model", workbench.base, "--adapter")
    assert "not hold the files of pirate@1" in loragate.error(*words, workbench.adapter())
    assert "has no adapter_config.json" in loragate.error(*words, tmp_path)


@pytest.mark.worker
def test_a_probe_is_computed_and_holds(gateway: Gateway, loragate: Shell, tmp_path: Path) -> None:
    folder = demo.ADAPTERS["pirate"]
    config = demo.MODEL_DIR / "config.json"
    loragate("pools", "add", "demo", "--base-model", demo.BASE_NAME, "--config", config)
    loragate("adapters", "add", folder, "--name", "pirate")
    words = ("adapters", "probe", "pirate", "--adapter", folder)
    said = loragate(*words, "--model", demo.MODEL_DIR)
    assert re.fullmatch(r"pirate@1 has a probe: 4 rows, \d+ token ids, float32\.\n", said)
    first = gateway.client.get(URL).json()
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(first["token_ids"][1::-1]))
    again = loragate.json(*words, "--model", demo.MODEL_DIR, "--prompts", prompts)
    assert again["token_ids"] == first["token_ids"][1::-1]
    for one, two in zip(again["logprobs"], first["logprobs"][1::-1], strict=True):
        assert one == pytest.approx(two, abs=1e-5)
    assert "where the base model's folder is" in loragate.error(*words)
