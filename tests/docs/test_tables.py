"""The tables say what the code declares: all of it, and nothing else."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from sqlalchemy import UniqueConstraint

from app import domain, errors
from app.api.errors import KINDS, headers_of
from app.control import adapters, aliases, archives, inspect_probe, keys, safetensors_header, usage
from app.control.inspect_adapter import FEATURES, MAX_CONFIG_BYTES
from app.db.schema import METADATA
from app.telemetry import METRICS, Event
from tests.docs.pages import ROOT, codes, page

PLATFORM = page("docs/platform-engineers.md")
OPERATORS = page("docs/operators.md")
LOCKING = page("docs/locking.md")

#: What FastAPI finds wrong with a body is a 422 with this code.
ALSO_422 = "invalid_request"


def classes() -> Iterator[type[errors.LoragateError]]:
    yield from (
        found
        for found in vars(errors).values()
        if isinstance(found, type) and issubclass(found, errors.LoragateError)
    )


def statuses() -> dict[str, set[int]]:
    """Every code a client may see, and the HTTP statuses it comes with."""
    found: dict[str, set[int]] = {}
    for cls in classes():
        found.setdefault(cls.code, set()).add(KINDS[cls][0])
    for name, code in _given_codes():
        found.setdefault(code, set()).add(KINDS[getattr(errors, name)][0])
    found[ALSO_422].add(422)
    return found


def _given_codes() -> Iterator[tuple[str, str]]:
    """(class, code) of every `SomeError(…, code="…")` in the gateway."""
    for path in (ROOT / "app").rglob("*.py"):
        if path.relative_to(ROOT).parts[1] in ("worker", "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                for keyword in node.keywords:
                    if keyword.arg == "code" and isinstance(keyword.value, ast.Constant):
                        yield node.func.id, str(keyword.value.value)


def documented() -> dict[str, tuple[set[int], str]]:
    """Code -> statuses and advice, from the page."""
    return {
        code: ({int(status) for status in http.split(", ")}, retry)
        for cell, http, _, retry, _ in PLATFORM.table("Code")
        for code in codes(cell)
    }


def test_every_error_is_documented() -> None:
    assert {code: http for code, (http, _) in documented().items()} == statuses()


def test_the_advice_on_retries_is_what_the_headers_say() -> None:
    for cls in classes():
        if cls is errors.AdapterRejected:  # takes faults, not words
            continue
        headers, advice = headers_of(cls("x")), documented()[cls.code][1]
        if "Retry-After" in headers:
            assert advice == "yes", cls.code
        if headers.get("X-Should-Retry") == "false":
            assert advice == "no", cls.code


def test_researchers_are_told_the_same() -> None:
    known = statuses()
    for cell, where, _ in page("docs/researchers.md").table("`code`"):
        for code in codes(cell):
            assert int(where.partition(",")[0]) in known[code]


def test_every_check_at_registration_is_documented() -> None:
    checked = {
        "peft_type",
        "base_model_name_or_path",
        "r",
        "rank_pattern",
        "lora_alpha",
        "alpha_pattern",
        "target_modules",
        *FEATURES,
    }
    named = {field for cell, _ in PLATFORM.table("Field") for field in codes(cell)}
    assert named == checked


def test_limits_are_the_code_s() -> None:
    limits = dict(PLATFORM.table("What"))
    assert limits["its config; its safetensors header"] == (
        f"{MAX_CONFIG_BYTES >> 20} MiB; {safetensors_header.MAX_HEADER_BYTES >> 20} MiB "
        f"and {safetensors_header.MAX_TENSORS:,} tensors"
    )
    assert limits["members of an archive"] == f"{archives.MAX_MEMBERS:,}"
    assert limits["an adapter's name; an alias's"].startswith(
        f"{domain.ADAPTER_NAME_MAX}; {domain.ALIAS_NAME_MAX} "
    )
    assert limits["a probe"] == (
        f"{inspect_probe.MAX_ROWS} rows of 2 to {inspect_probe.MAX_IDS} token ids; "
        f"as a file, {inspect_probe.MAX_PROBE_BYTES >> 20} MiB"
    )
    assert limits["`metadata`"] == f"{adapters.MAX_METADATA_BYTES >> 10} KiB"
    assert limits["targets of an alias; a weight"] == (
        f"{aliases.MAX_TARGETS}; 1 to {aliases.MAX_WEIGHT:,}"
    )
    assert limits["a key's globs"] == f"{keys.MAX_MODELS:,}"
    assert adapters.MAX_PAGE == keys.MAX_PAGE
    assert limits["a page of adapters or keys; of usage"] == (
        f"{adapters.MAX_PAGE:,}; {usage.MAX_PAGE:,}"
    )


def test_every_metric_is_documented() -> None:
    table = OPERATORS.table("Metric")
    rows = [(codes(name)[0], kind, codes(labels)) for name, kind, labels, _ in table]
    declared = [
        (f"{m.name}_total" if m.kind == "counter" else m.name, m.kind, list(m.labels))
        for m in METRICS
    ]
    assert rows == declared


def test_every_log_event_is_documented() -> None:
    named = [code for cell, _ in OPERATORS.table("Event") for code in codes(cell)]
    assert sorted(named) == sorted(event.value for event in Event)


def test_every_table_and_index_is_in_the_locking_page() -> None:
    tables = METADATA.tables.values()
    named = {code for cell, *_ in LOCKING.table("Table") for code in codes(cell)}
    assert named == {table.name for table in tables}
    indexes = {str(index.name) for table in tables for index in table.indexes}
    unique = {
        str(each.name)
        for table in tables
        for each in table.constraints
        if isinstance(each, UniqueConstraint)
    }
    assert {code for cell, _ in LOCKING.table("Index") for code in codes(cell)} == indexes | unique
