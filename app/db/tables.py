"""The registry's tables.

What comes in: values set by `app.control`. What goes out: rows, which never leave the transaction
they were read in. Knows nothing of HTTP, files or the data plane.

A row the data plane sees carries the `revision` of the transaction that last touched it. The
number comes from the one-row counter `registry_revision`, taken as the last statement before the
commit (`Database.begin`), so a higher revision was committed later and a reader that has seen
revision N needs only rows above N.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    UniqueConstraint,
    false,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator


class Instant(TypeDecorator[datetime]):
    """An aware UTC datetime. SQLite keeps no offset, so it is put back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


#: SQLite gives a rowid only to INTEGER; PostgreSQL should not run out at two billion.
Id = BigInteger().with_variant(Integer, "sqlite")


class Row(DeclarativeBase):
    """Every table's parent."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_N_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012  # read by SQLAlchemy when the class is made
        datetime: Instant,
        dict[str, Any]: JSON,
        list[Any]: JSON,
    }


class RevisionRow(Row):
    """One row, id 1: the number of the last committed change the data plane must see."""

    __tablename__ = "registry_revision"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(BigInteger)


class BaseModelRow(Row):
    """A base model: its config.json and the other names it goes by."""

    __tablename__ = "base_models"

    name: Mapped[str] = mapped_column(String(256), primary_key=True)
    config: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    aliases: Mapped[list[Any]]


class PoolRow(Row):
    """The servers of one base. A base has one pool, so a model name leads to one place."""

    __tablename__ = "pools"
    __table_args__ = (UniqueConstraint("base_model"),)

    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    base_model: Mapped[str] = mapped_column(ForeignKey("base_models.name"))
    served_name: Mapped[str] = mapped_column(String(256))
    max_lora_rank: Mapped[int]
    max_loras: Mapped[int]
    store_mount: Mapped[str | None] = mapped_column(String(1024))
    declared: Mapped[bool]
    created_at: Mapped[datetime]
    max_cpu_loras: Mapped[int | None]
    max_inflight: Mapped[int] = mapped_column(server_default="256")
    max_queue: Mapped[int] = mapped_column(server_default="1024")
    dialect: Mapped[str] = mapped_column(String(16), server_default="vllm")


class ReplicaRow(Row):
    """One server of a pool. `api_key` is sent upstream, so it is kept as it is."""

    __tablename__ = "replicas"
    __table_args__ = (UniqueConstraint("pool", "url"),)

    id: Mapped[str] = mapped_column(String(160), primary_key=True)
    pool: Mapped[str] = mapped_column(ForeignKey("pools.name", ondelete="CASCADE"))
    url: Mapped[str] = mapped_column(String(1024))
    api_key: Mapped[str | None] = mapped_column(String(1024))
    cordoned: Mapped[bool]
    draining: Mapped[bool]
    declared: Mapped[bool]
    created_at: Mapped[datetime]


class AdapterRow(Row):
    """An adapter's name. The row outlives a deletion, so `last_number` never goes back."""

    __tablename__ = "adapters"
    __table_args__ = (UniqueConstraint("name"), Index("ix_adapters_revision", "revision"))

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    base_model: Mapped[str] = mapped_column(ForeignKey("base_models.name"))
    pool: Mapped[str] = mapped_column(String(128))
    last_number: Mapped[int]
    details: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]
    revision: Mapped[int] = mapped_column(BigInteger)


class VersionRow(Row):
    """Immutable weights. `released_at`: deleted, and no replica holds it any more.

    `held_back`: registered, and `latest` has not come to it yet, since it is first to be loaded
    where the adapter is used, or is a checkpoint of a job that has not succeeded.

    `probe` is read only where it is asked for by name: it may be long, and a list of versions
    needs to know no more than whether there is one.
    """

    __tablename__ = "adapter_versions"
    __table_args__ = (
        UniqueConstraint("adapter_id", "number"),
        Index("ix_adapter_versions_digest", "digest"),
        Index("ix_adapter_versions_unreleased", "released_at", "deleted_at"),
    )

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id"))
    number: Mapped[int]
    base_model: Mapped[str] = mapped_column(String(256))
    pool: Mapped[str] = mapped_column(String(128))
    digest: Mapped[str] = mapped_column(String(64))
    rank: Mapped[int]
    target_modules: Mapped[list[Any]]
    bytes: Mapped[int] = mapped_column(BigInteger)
    source: Mapped[str] = mapped_column(String(2048))
    details: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]
    released_at: Mapped[datetime | None]
    targets_lm_head: Mapped[bool] = mapped_column(server_default=false())
    held_back: Mapped[bool] = mapped_column(server_default=false())
    probe: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True), deferred=True)


class AliasRow(Row):
    """Where an alias points now: a list of [version number, weight]."""

    __tablename__ = "aliases"

    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    targets: Mapped[list[Any]]
    sticky: Mapped[str] = mapped_column(String(16), server_default="user")


class AliasMoveRow(Row):
    """Where an alias pointed before each move, so that the newest one can be undone."""

    __tablename__ = "alias_moves"
    __table_args__ = (Index("ix_alias_moves_newest", "adapter_id", "alias", "id"),)

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id"))
    alias: Mapped[str] = mapped_column(String(64))
    before: Mapped[list[Any]]
    moved_at: Mapped[datetime]


class KeyRow(Row):
    """An API key. Only the sha-256 of the secret is kept; a revoked key stays as a tombstone."""

    __tablename__ = "api_keys"
    __table_args__ = (UniqueConstraint("digest"), Index("ix_api_keys_revision", "revision"))

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    digest: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[Any]]
    models: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    revision: Mapped[int] = mapped_column(BigInteger)


class UsageRow(Row):
    """What one key asked of one model in one hour."""

    __tablename__ = "usage_hours"

    hour: Mapped[datetime] = mapped_column(primary_key=True)
    key_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    model: Mapped[str] = mapped_column(String(300), primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
