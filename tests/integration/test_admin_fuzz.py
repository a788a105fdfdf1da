"""Whatever is sent to the admin routes, the answer is an envelope and the fault the caller's."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration.gateway import Gateway

ROUTES = (
    ("POST", "/admin/adapters"),
    ("GET", "/admin/adapters/{}"),
    ("DELETE", "/admin/adapters/{}"),
    ("POST", "/admin/adapters/{}/versions"),
    ("GET", "/admin/adapters/pirate/versions/{}"),
    ("DELETE", "/admin/adapters/pirate/versions/{}"),
    ("PUT", "/admin/adapters/pirate/aliases/{}"),
    ("DELETE", "/admin/adapters/pirate/aliases/{}"),
    ("POST", "/admin/adapters/pirate/rollback"),
    ("POST", "/admin/pools"),
    ("PATCH", "/admin/pools/{}"),
    ("POST", "/admin/pools/pool/replicas"),
    ("PATCH", "/admin/replicas/{}"),
    ("POST", "/admin/keys"),
    ("DELETE", "/admin/keys/{}"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("GET", "/v1/models/{}"),
)
FIELDS = st.sampled_from(
    ["name", "source", "path", "hf_repo", "base_model", "alias", "version", "targets", "weight",
     "url", "scopes", "models", "expires_at", "expires_in_s", "metadata", "lora_name",
     "lora_path", "max_loras", "base_model_config", "cordoned"]
)  # fmt: skip
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=40)
    | st.sampled_from(["pirate", "admin", "pool", "http://127.0.0.1:9", "a/b", "/etc", "\x00"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=6),
    max_leaves=12,
)
PARTS = st.text(min_size=1, max_size=20) | st.sampled_from(["pirate", "\x00", "9" * 30, "-1", "%"])


@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(route=st.sampled_from(ROUTES), part=PARTS, body=VALUES)
def test_no_input_is_the_gateways_fault(
    gateway: Gateway, route: tuple[str, str], part: str, body: Any
) -> None:
    method, path = route
    url = path.format(quote(part, safe="", errors="replace"))
    sent: dict[str, Any] = {} if method in ("GET", "DELETE") else {"content": dumped(body)}
    answer = gateway.client.request(
        method, url, headers={"content-type": "application/json"}, **sent
    )
    assert answer.status_code < 500, (answer.status_code, answer.text)
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["message"]
        assert error["type"] == "invalid_request_error"


def dumped(body: Any) -> bytes:
    return json.dumps(body).encode()
