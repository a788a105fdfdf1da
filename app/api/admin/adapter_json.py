"""Adapters, versions and aliases as the admin API shows them.

What comes in: the control plane's views. What goes out: pydantic models, whose descriptions are
the manual under /docs. No routes and no verbs.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from app.api.admin.shapes import Answer
from app.control import views
from app.domain import Sticky


class Target(Answer):
    """One version of an alias and its share of the requests."""

    version: int = Field(ge=1, description="The version's number.", examples=[3])
    weight: int = Field(1, ge=1, description="Its share, against the others'.", examples=[9])


class Version(Answer):
    """Immutable weights."""

    adapter: str = Field(examples=["support-bot"])
    number: int = Field(examples=[3])
    model: str = Field(
        description="What to write in `model` for this version.", examples=["support-bot@3"]
    )
    digest: str = Field(description="sha-256 of its files.", examples=["9f2c…"])
    rank: int = Field(description="The largest rank of any module.", examples=[16])
    target_modules: list[str] = Field(examples=[["q_proj", "v_proj"]])
    base_model: str = Field(examples=["meta-llama/Llama-3.1-8B-Instruct"])
    bytes: int = Field(examples=[27297032])
    source: str = Field(description="Where it came from.", examples=["upload"])
    created_at: datetime
    metadata: dict[str, Any] = Field(examples=[{"team": "support"}])
    targets_lm_head: bool = Field(description="Whether it changes the output layer.")
    probed: bool = Field(description="Whether it has a probe, which every load is checked with.")


class Adapter(Answer):
    """A named line of LoRA weights."""

    name: str = Field(description="What to write in `model`.", examples=["support-bot"])
    base_model: str = Field(examples=["meta-llama/Llama-3.1-8B-Instruct"])
    pool: str = Field(examples=["llama"])
    created_at: datetime
    metadata: dict[str, Any] = Field(examples=[{"team": "support"}])
    latest: int | None = Field(description="The version `name` stands for.", examples=[3])
    aliases: dict[str, list[Target]] = Field(
        description="Pointers, or weighted splits, over versions; `name:alias` in `model`.",
        examples=[{"latest": [{"version": 3, "weight": 1}]}],
    )
    sticky: dict[str, Sticky] = Field(
        description="Of each alias: what keeps a client on one version while it is split.",
        examples=[{"latest": "user"}],
    )
    versions: list[Version]


class Registered(Answer):
    """What was registered; `created` is false when the newest version has these weights."""

    adapter: Adapter
    version: Version
    created: bool = Field(examples=[True])


class Adapters(Answer):
    """A page of adapters by name."""

    object: Literal["list"] = "list"
    data: list[Adapter]
    has_more: bool
    next_after: str | None = Field(description="`after` for the next page.")


def registered_json(found: views.Registered) -> Registered:
    return Registered(
        adapter=adapter_json(found.adapter),
        version=version_json(found.version),
        created=found.created,
    )


def adapter_json(view: views.AdapterView) -> Adapter:
    return Adapter(
        name=view.name,
        base_model=view.base_model,
        pool=view.pool,
        created_at=view.created_at,
        metadata=dict(view.metadata),
        latest=view.latest,
        aliases={alias: targets_json(targets) for alias, targets in view.aliases.items()},
        sticky=dict(view.sticky),
        versions=[version_json(version) for version in view.versions],
    )


def targets_json(targets: Iterable[tuple[int, int]]) -> list[Target]:
    return [Target(version=number, weight=weight) for number, weight in targets]


def version_json(view: views.VersionView) -> Version:
    return Version.model_validate(view)
