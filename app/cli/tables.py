"""The API's JSON as a person wants to see it.

What comes in: parsed JSON. What goes out: something rich can print. No HTTP, no options.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_STICKY = {"user": "sticky by user", "key": "sticky by key", "none": "not sticky"}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def table(*columns: str, rows: Iterable[Iterable[object]], empty: str) -> RenderableType:
    """Rows under their headings, or one line that says there are none."""
    found = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        found.add_row(*(Text(_cell(value)) for value in row))
    return found if found.row_count else Text(empty)


def card(**fields: object) -> Table:
    """One thing, a field a line; what is empty is left out."""
    found = Table(box=None, show_header=False, pad_edge=False)
    for name, value in fields.items():
        if value not in ("", None):
            found.add_row(Text(name.replace("_", " "), style="dim"), Text(_cell(value)))
    return found


def line(text: str) -> Text:
    return Text(text)


def when(stamp: str | None) -> str:
    """An API timestamp in this machine's zone, to the minute."""
    if stamp is None:
        return ""
    return datetime.fromisoformat(stamp).astimezone().strftime("%Y-%m-%d %H:%M")


def when_unix(seconds: int | None) -> str:
    """Unix seconds, as OpenAI's API has them, in this machine's zone."""
    if seconds is None:
        return ""
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def size(count: int) -> str:
    value = float(count)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable: the last unit returns")


def targets(split: list[dict[str, int]]) -> str:
    """Where an alias points: `3`, or `3=90 4=10`."""
    if len(split) == 1:
        return str(split[0]["version"])
    return " ".join(f"{part['version']}={part['weight']}" for part in split)


def adapters(found: dict[str, Any]) -> RenderableType:
    rows = table(
        "name", "base model", "latest", "versions", "aliases", "created",
        rows=(
            (
                each["name"],
                each["base_model"],
                each["latest"],
                len(each["versions"]),
                _aliases(each),
                when(each["created_at"]),
            )
            for each in found["data"]
        ),
        empty="no adapters; add one with `loragate adapters add ./folder --name NAME`",
    )  # fmt: skip
    if not found["has_more"]:
        return rows
    return Group(rows, Text(f"there are more: --after {found['next_after']}", style="dim"))


def adapter(found: dict[str, Any]) -> RenderableType:
    head = card(
        name=found["name"],
        base_model=found["base_model"],
        pool=found["pool"],
        aliases=_aliases(found),
        created=when(found["created_at"]),
        metadata=_pairs(found["metadata"]),
    )
    versions = table(
        "model", "rank", "modules", "size", "digest", "source", "probe", "created",
        rows=(
            (
                each["model"],
                each["rank"],
                " ".join(each["target_modules"]),
                size(each["bytes"]),
                each["digest"][:12],
                each["source"],
                "yes" if each["probed"] else "no",
                when(each["created_at"]),
            )
            for each in found["versions"]
        ),
        empty="no versions",
    )  # fmt: skip
    return Group(head, Text(), versions)


def version(found: dict[str, Any]) -> RenderableType:
    return card(
        model=found["model"],
        base_model=found["base_model"],
        rank=found["rank"],
        modules=" ".join(found["target_modules"]),
        size=size(found["bytes"]),
        digest=found["digest"],
        source=found["source"],
        probe="yes" if found["probed"] else "no",
        created=when(found["created_at"]),
        metadata=_pairs(found["metadata"]),
    )


def pools(found: dict[str, Any]) -> RenderableType:
    return table(
        "name", "base model", "served as", "max rank", "max loras", "in memory", "in flight",
        "queue", "replicas",
        rows=(
            (
                each["name"],
                each["base_model"],
                each["served_name"],
                each["max_lora_rank"],
                each["max_loras"],
                each["max_cpu_loras"] or each["max_loras"],
                each["max_inflight"],
                each["max_queue"],
                len(each["replicas"]),
            )
            for each in found["data"]
        ),
        empty="no pools; add one with `loragate pools add NAME --base-model MODEL`",
    )  # fmt: skip


def replicas(found: dict[str, Any]) -> RenderableType:
    return table(
        "id", "pool", "url", "state", "in flight", "adapters",
        rows=(
            (
                each["id"],
                each["pool"],
                each["url"],
                each["state"] + (" (cordoned)" if each["cordoned"] else ""),
                each["inflight"],
                len(each["resident"]),
            )
            for each in found["data"]
        ),
        empty="no replicas; add one with `loragate replicas add POOL URL`",
    )  # fmt: skip


def keys(found: dict[str, Any]) -> RenderableType:
    return table(
        "id", "name", "scopes", "models", "created", "expires", "revoked",
        rows=(
            (
                each["id"],
                each["name"],
                " ".join(each["scopes"]),
                "all" if each["models"] is None else " ".join(each["models"]),
                when(each["created_at"]),
                when(each["expires_at"]) or "never",
                when(each["revoked_at"]),
            )
            for each in found["data"]
        ),
        empty="no keys; make one with `loragate keys create NAME`",
    )  # fmt: skip


def new_key(found: dict[str, Any]) -> RenderableType:
    return Group(
        card(id=found["id"], name=found["name"], scopes=" ".join(found["scopes"])),
        Text(),
        Text(found["secret"], style="bold"),
        Text("This is shown once. Keep it now.", style="dim"),
    )


def tasks(found: dict[str, Any]) -> RenderableType:
    return table(
        "task", "runs", "failures", "last run", "took", "details",
        rows=(
            (
                each["name"],
                each["runs"],
                each["failures"],
                when(each["last_started_at"]),
                "" if each["last_duration_s"] is None else f"{each['last_duration_s']:.3f} s",
                each["last_error"] or _pairs(each["details"]),
            )
            for each in found["data"]
        ),
        empty="no tasks",
    )  # fmt: skip


def usage(found: dict[str, Any]) -> RenderableType:
    return table(
        "hour", "key", "model", "requests", "prompt tokens", "completion tokens",
        rows=(
            (
                when(each["hour"]),
                each["key_id"],
                each["model"],
                each["requests"],
                each["prompt_tokens"],
                each["completion_tokens"],
            )
            for each in found["data"]
        ),
        empty="nothing was used yet",
    )  # fmt: skip


def models(found: dict[str, Any]) -> RenderableType:
    return table(
        "model", "base model",
        rows=((each["id"], each["parent"] or "(a base model)") for each in found["data"]),
        empty="no models; is there a pool? see `loragate pools list`",
    )  # fmt: skip


def _aliases(adapter: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} → {targets(split)}" + (f" ({_STICKY[kind]})" if len(split) > 1 else "")
        for name, split in adapter["aliases"].items()
        for kind in [adapter["sticky"][name]]
    )


def _pairs(values: dict[str, Any] | None) -> str:
    return " ".join(f"{name}={value}" for name, value in (values or {}).items())


def _cell(value: object) -> str:
    return "" if value is None else str(value)
