"""The `loragate` command as users run it: a subprocess against a real gateway."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.hub import COMMIT, running
from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import BASE, Gateway, StartGateway, StartUpstream, Workbench
from tests.waiting import wait_until


class Shell:
    """A terminal whose LORAGATE_URL is the gateway's."""

    def __init__(self, url: str, **variables: str) -> None:
        self.environment = {**os.environ, "LORAGATE_URL": url, "NO_COLOR": "1", **variables}

    def run(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "app.cli", *map(str, arguments)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        if code == 0:
            assert done.stderr == ""
        elif code == 1:
            assert done.stdout == ""
            assert done.stderr.startswith("error: ")
            assert done.stderr.count("\n") == 1, done.stderr
        return done

    def __call__(self, *arguments: object) -> str:
        return self.run(*arguments).stdout

    def json(self, *arguments: object) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)

    def error(self, *arguments: object) -> str:
        return self.run(*arguments, code=1).stderr


@pytest.fixture
def loragate(gateway: Gateway) -> Shell:
    return Shell(gateway.url)


def test_an_adapters_life(
    gateway: Gateway, loragate: Shell, workbench: Workbench, tmp_path: Path
) -> None:
    assert "no adapters; add one with" in loragate("adapters", "list")
    added = loragate("adapters", "add", workbench.adapter(), "--name", "pirate", "--alias", "prod")
    assert "pirate@1" in added
    assert BASE in added

    folder = workbench.adapter()
    again = loragate.json("adapters", "add", folder, "-n", "pirate")
    assert again["created"] is True
    assert again["version"]["model"] == "pirate@2"
    same = loragate("adapters", "add", folder, "-n", "pirate")
    assert "pirate@2 has these very weights already" in same

    archive = tmp_path / "parrot.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        for path in workbench.adapter().iterdir():
            packed.add(path, path.name)
    assert "parrot@1" in loragate("adapters", "add", archive)  # named by its file
    on_server = workbench.adapter()
    assert "monkey@1" in loragate("adapters", "add", "--server-path", on_server, "-n", "monkey")

    listed = loragate("adapters", "list")
    assert re.search(r"pirate +tiny +2 +2 +latest → 2, prod → 1", listed)
    assert loragate.json("adapters", "list") == gateway.client.get("/admin/adapters").json()
    assert "after monkey" in loragate("adapters", "list", "--limit", "1")
    shown = loragate("adapters", "show", "pirate")
    assert "q_proj v_proj" in shown
    assert "4.5 KiB" in shown or "KiB" in shown

    assert "prod → 2" in loragate("adapters", "alias", "pirate", "prod", "2")
    split = loragate("adapters", "alias", "pirate", "prod", "1=9", "2=1")
    assert "prod → 1=9 2=1 (sticky by user)" in split
    by_key = loragate("adapters", "alias", "pirate", "prod", "1=8", "2=2", "--sticky", "key")
    assert "prod → 1=8 2=2 (sticky by key)" in by_key
    assert "prod → 1=8 2=2 (sticky by key)" in loragate("adapters", "list")
    assert "prod → 1=9 2=1 (sticky by key)" in loragate(
        "adapters", "rollback", "pirate", "--alias", "prod"
    )
    assert "prod → 2" in loragate("adapters", "rollback", "pirate", "--alias", "prod")
    assert "prod" not in loragate("adapters", "alias", "pirate", "prod", "--delete")
    assert "latest → 1" in loragate("adapters", "rollback", "pirate")

    assert {"pirate@1", "pirate"} <= {m["id"] for m in loragate.json("models")["data"]}
    assert re.search(r"pirate@2 +tiny", loragate("models"))
    assert loragate("adapters", "remove", "pirate@2") == "Removed pirate@2.\n"
    assert loragate.json("adapters", "remove", "pirate")["id"] == "pirate"
    assert "no adapter 'pirate'" in loragate.error("adapters", "show", "pirate")


def test_pools_and_replicas(
    loragate: Shell, gateway: Gateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    assert re.search(r"pool +tiny +tiny +16 +8 +8 +256 +1024 +1", loragate("pools", "list"))
    config = workbench.base / "config.json"
    made = loragate.json(
        "pools", "add", "other", "--base-model", "acme/base", "--config", config, "--also", "b"
    )
    assert made["base_model_known"] is True
    assert made["base_model_aliases"] == ["b"]
    table = loragate("pools", "update", "other", "--max-lora-rank", 128, "--also", "c")
    assert re.search(r"other +acme/base +acme/base +128 +8 +8 +256 +1024 +0", table)
    options = ("--served-name", "b", "--max-loras", 4, "--store-mount", "/mnt", "--config", config)
    changed = loragate.json("pools", "update", "other", *options)
    assert changed["base_model_aliases"] == ["c"]
    expected = ("b", 128, 4, "/mnt")
    fields = ("served_name", "max_lora_rank", "max_loras", "store_mount")
    assert tuple(changed[field] for field in fields) == expected
    options = ("--max-cpu-loras", 32, "--max-inflight", 16, "--max-queue", 0)
    changed = loragate.json("pools", "update", "other", *options)
    fields = ("max_cpu_loras", "max_inflight", "max_queue")
    assert tuple(changed[field] for field in fields) == (32, 16, 0)
    cleared = loragate.json("pools", "update", "other", "--store-mount", "", "--max-cpu-loras", 0)
    assert (cleared["store_mount"], cleared["max_loras"]) == (None, 4)
    assert cleared["max_cpu_loras"] is None
    assert "no pool 'lost'" in loragate.error("pools", "update", "lost", "--max-loras", 4)
    replica = loragate.json("replicas", "add", "other", upstream.url)
    wait_until(lambda: "healthy" in loragate("replicas", "list", "--pool", "other"))
    assert "(cordoned)" in loragate("replicas", "cordon", replica["id"])
    assert "(cordoned)" not in loragate("replicas", "uncordon", replica["id"])
    assert "drain it first" in loragate.error("replicas", "remove", replica["id"])
    assert "draining" in loragate("replicas", "drain", replica["id"])
    assert "Removed the replica" in loragate("replicas", "remove", replica["id"])
    assert "Removed the pool other." in loragate("pools", "remove", "other")
    assert len(loragate.json("replicas", "list")["data"]) == 1


def test_servers_that_want_a_key(
    gateway: Gateway, loragate: Shell, start_upstream: StartUpstream
) -> None:
    """A key that came along reaches the server, and is never shown."""
    first, second = (start_upstream("acme/base", api_key="sk-servers") for _ in range(2))
    options = ("--base-model", "acme/base", "--replica", first.url, "--server-key", "sk-servers")
    said = loragate("pools", "add", "other", *options, "--json")
    said += loragate("replicas", "add", "other", second.url, "--server-key", "sk-servers")
    listed = loragate("replicas", "list", "--pool", "other", "--json")
    assert "sk-servers" not in said + listed
    wait_until(lambda: loragate("replicas", "list", "--pool", "other").count("healthy") == 2)
    with gateway.openai_client() as client:
        for _ in range(4):
            client.completions.create(model="acme/base", prompt="hello")


def test_an_adapter_from_a_hub(
    start_gateway: StartGateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    with running() as hub:
        hub.offer("acme/parrot-lora", workbench.adapter(), "main", "v1.0")
        settings = {"hub_endpoint": hub.url, "hub_token": "hf_secret"}
        loragate = Shell(start_gateway(upstream.url, **settings).url)

        added = loragate("adapters", "add", "--from-hub", "acme/parrot-lora", "--alias", "prod")
        assert f"hub:acme/parrot-lora@{COMMIT}" in added
        assert "Ask for 'parrot-lora@1'" in added  # named by its repository
        options = ("--from-hub", "acme/parrot-lora@v1.0", "-n", "parrot", "--metadata", '{"a": 1}')
        assert loragate.json("adapters", "add", *options)["adapter"]["metadata"] == {"a": 1}
        again = loragate("adapters", "add", *options)
        assert "these very weights already" in again
        asked = [path for path, _ in hub.asked]
        assert "/api/models/acme/parrot-lora/revision/v1.0" in asked
        assert {key for _, key in hub.asked} == {"Bearer hf_secret"}

        lost = loragate.error("adapters", "add", "--from-hub", "acme/lost")
        assert "shows this gateway no repository acme/lost" in lost
        assert hub.url in lost
        assert "is not a repo id" in loragate.error("adapters", "add", "--from-hub", "lost")
    away = loragate.error("adapters", "add", "--from-hub", "acme/parrot-lora@v1.0")
    assert "could not be fetched" in away
    assert "hf_secret" not in added + again + lost + away


def test_metadata_from_the_command_line(
    loragate: Shell, workbench: Workbench, tmp_path: Path
) -> None:
    team = json.dumps({"team": "søk & fúnd"})
    added = loragate("adapters", "add", workbench.adapter(), "-n", "bot", "--metadata", team)
    assert "team=søk & fúnd" in loragate("adapters", "show", "bot"), added
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps({"run": 7, "notes": "x" * 16_000}))
    options = ("--server-path", workbench.adapter(), "-n", "bot", "--metadata", f"@{kept}")
    assert loragate.json("adapters", "add", *options)["version"]["metadata"]["run"] == 7
    # The same sixteen kilobytes, in a URL this time.
    options = (workbench.adapter(), "-n", "bot", "--metadata", f"@{kept}")
    assert loragate.json("adapters", "add", *options)["version"]["metadata"]["run"] == 7

    def refused(metadata: str) -> str:
        options = ("-n", "bot", "--metadata", metadata)
        return loragate.error("adapters", "add", workbench.adapter(), *options)

    kept.write_text(json.dumps({"notes": "x" * 17_000}))
    assert "16384 are allowed" in refused(f"@{kept}")
    assert "is not JSON" in refused("{team: me}")
    assert "not an object" in refused("[]")
    assert "No such file" in refused("@/nowhere.json")


def test_keys_and_status(loragate: Shell, gateway: Gateway) -> None:
    assert "create one with the scope 'admin' first" in loragate.error("keys", "create", "ci")
    made = loragate("keys", "create", "root", "--scope", "admin", "--scope", "inference")
    secret = re.search(r"lg-\S{40}", made)
    assert secret is not None
    assert "shown once" in made
    denied = loragate.error("keys", "list")
    assert "LORAGATE_API_KEY" in denied

    admin = Shell(gateway.url, LORAGATE_API_KEY=secret[0])
    key = admin.json("keys", "create", "ci", "--model", "pir*", "--expires-in", "30d")
    assert key["models"] == ["pir*"]
    assert re.search(r"ci +inference +pir\* +20\d\d-", admin("keys", "list"))
    assert admin("keys", "revoke", key["id"]) == f"Revoked {key['id']}.\n"
    assert "ci" not in admin("keys", "list", "--no-revoked")
    assert secret[0] not in admin("keys", "list")
    assert loragate("keys", "list", "--key", secret[0])

    assert re.search(r"publish +\d+ +0 ", admin("tasks"))
    assert admin("usage") == "nothing was used yet\n"
    assert admin.json("usage") == {"object": "list", "data": []}


def test_a_refused_adapter_is_one_line_with_every_reason(
    loragate: Shell, workbench: Workbench
) -> None:
    folder = workbench.adapter(rank=64)
    said = loragate.error("adapters", "add", folder, "--name", "wide")
    assert "found 64" in said
    assert "16" in said
    (folder / "adapter_model.safetensors").unlink()
    said = loragate.error("adapters", "add", folder, "--name", "wide")
    assert "has no adapter_model.safetensors" in said


def test_a_gateway_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    said = Shell(url).error("adapters", "list")
    assert url in said
    assert "loragate serve" in said
    assert "--url" in said
    assert "is not the URL of a gateway" in Shell("gateway:8080").error("models")


def test_something_else_that_answers(upstream: FakeUpstream) -> None:
    """Pointing it at a vLLM server by mistake is easy."""
    assert "is it a loragate gateway?" in Shell(upstream.url).error("adapters", "list")


@pytest.mark.parametrize(
    "arguments",
    [
        ("adapters", "add"),
        ("adapters", "add", "folder", "--from-hub", "a/b"),
        ("adapters", "alias", "pirate", "prod"),
        ("adapters", "alias", "pirate", "prod", "two"),
        ("keys", "create", "ci", "--scope", "root"),
        ("keys", "create", "ci", "--expires-in", "soon"),
        ("replicas", "add", "pool"),
        ("pools", "update", "pool"),
        ("pools", "update", "pool", "--max-loras", "few"),
        ("nonsense",),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    done = Shell("http://127.0.0.1:9").run(*arguments, code=2)
    assert "Usage: " in done.stderr


def test_every_command_explains_itself() -> None:
    shell = Shell("http://127.0.0.1:9")
    text = shell("--help")
    for noun in ("serve", "worker", "migrate", "adapters", "pools", "replicas", "keys"):
        assert noun in text
    for noun, verb in (("adapters", "add"), ("keys", "create"), ("pools", "add")):
        assert "--json" in shell(noun, verb, "--help")


def test_serve_refuses_an_open_door_without_a_key(tmp_path: Path) -> None:
    shell = Shell("", LORAGATE_DATA_DIR=str(tmp_path), LORAGATE_EMBEDDED="off")
    said = shell.error("serve", "--host", "0.0.0.0", "--port", "0")
    assert "LORAGATE_ADMIN_KEY" in said
    assert "--host 127.0.0.1" in said


def test_serve_says_which_setting_is_wrong() -> None:
    assert "LORAGATE_PORT" in Shell("", LORAGATE_PORT="99999").error("serve")
    assert "LORAGATE_LOG_LEVEL" in Shell("", LORAGATE_LOG_LEVEL="LOUD").error("serve")


def test_settings_show_no_secret() -> None:
    secrets = {
        "LORAGATE_ADMIN_KEY": "hidden-1",
        "LORAGATE_API_KEY": "hidden-2",
        "LORAGATE_DATABASE_URL": "postgresql://bob:hidden-3@db/loragate",
        "LORAGATE_POOLS": '[{"name": "p", "base_model": "b[/]", "api_key": "hidden-4"}]',
    }
    shown = Shell("http://here", **secrets)("settings")
    assert "hidden" not in shown
    assert "postgresql://bob:***@db/loragate" in shown
    assert "http://here" in shown
    assert Shell("")("settings", "--markdown").startswith("# Settings")


def test_serve_listens_where_it_is_told_and_ends_on_sigterm(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shell = Shell(
        f"http://127.0.0.1:{port}",
        LORAGATE_DATA_DIR=str(tmp_path),
        LORAGATE_EMBEDDED="off",
        LORAGATE_ADMIN_KEY="root-secret",
        LORAGATE_API_KEY="root-secret",
    )
    serving = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve", "--host", "0.0.0.0", "--port", str(port)],
        env=shell.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: connects(port), within_s=20)
        assert "no pools" in shell("pools", "list")
        assert shell.json("keys", "create", "ci")["scopes"] == ["inference"]
    finally:
        serving.terminate()
        _, log = serving.communicate(timeout=20)
    # uvicorn ends by the signal it got, once everything is closed.
    assert serving.returncode in (0, -signal.SIGTERM), log
    assert "Application shutdown complete" in log
    assert "Traceback" not in log
    # With a key in the registry the admin key is not needed any more.
    del shell.environment["LORAGATE_ADMIN_KEY"]
    again = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve", "--host", "0.0.0.0", "--port", str(port)],
        env=shell.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: connects(port) or again.poll() is not None, within_s=20)
        assert again.poll() is None
    finally:
        again.terminate()
        again.communicate(timeout=20)


def connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_migrate_twice(tmp_path: Path) -> None:
    shell = Shell("", LORAGATE_DATA_DIR=str(tmp_path))
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "app.cli", "migrate"],
            env=shell.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "The schema is current.\n")
    said = shell.error("migrate", "--database-url", "mysql://x")
    assert "sqlite and postgresql" in said


def test_upload_over_the_limit_is_said_plainly(
    start_gateway: StartGateway, upstream: FakeUpstream, workbench: Workbench
) -> None:
    gateway = start_gateway(upstream.url, max_adapter_bytes=2000)
    folder = workbench.adapter()
    (folder / "adapter_model.safetensors").write_bytes(bytes(64 << 20))
    said = Shell(gateway.url).error("adapters", "add", folder, "--name", "big")
    assert "LORAGATE_MAX_ADAPTER_BYTES" in said


def test_a_worker_without_torch_says_what_to_install(tmp_path: Path) -> None:
    missing = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
    (tmp_path / "torch.py").write_text(missing)
    said = Shell("", PYTHONPATH=str(tmp_path)).error("worker", "--port", "0")
    assert "pip install 'loragate[worker]'" in said
