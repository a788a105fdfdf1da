"""What a fleet needs to know: a pool's slots and queue, a version's probe and whether it waits
for its release, an alias's stickiness.

Revision ID: 0002
Revises: 0001

Columns are added and dropped one by one, never by copying a table: on SQLite a copy drops the old
table, and with foreign keys on that deletes the rows which refer to it.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("pools", sa.Column("max_cpu_loras", sa.Integer(), nullable=True))
    op.add_column(
        "pools", sa.Column("max_inflight", sa.Integer(), server_default="256", nullable=False)
    )
    op.add_column(
        "pools", sa.Column("max_queue", sa.Integer(), server_default="1024", nullable=False)
    )
    op.add_column(
        "adapter_versions",
        sa.Column("targets_lm_head", sa.Boolean(), server_default=sa.false(), nullable=False),
    )
    op.add_column(
        "adapter_versions",
        sa.Column("held_back", sa.Boolean(), server_default=sa.false(), nullable=False),
    )
    op.add_column(
        "adapter_versions", sa.Column("probe", sa.JSON(none_as_null=True), nullable=True)
    )
    op.add_column(
        "aliases",
        sa.Column("sticky", sa.String(length=16), server_default="user", nullable=False),
    )
    versions = sa.table(
        "adapter_versions",
        sa.column("target_modules", sa.JSON()),
        sa.column("targets_lm_head", sa.Boolean()),
    )
    names = sa.cast(versions.c.target_modules, sa.Text())
    op.execute(
        sa.update(versions)
        .where(names.contains('"lm_head"', autoescape=True))
        .values(targets_lm_head=sa.true())
    )


def downgrade() -> None:
    op.drop_column("aliases", "sticky")
    op.drop_column("adapter_versions", "probe")
    op.drop_column("adapter_versions", "held_back")
    op.drop_column("adapter_versions", "targets_lm_head")
    op.drop_column("pools", "max_queue")
    op.drop_column("pools", "max_inflight")
    op.drop_column("pools", "max_cpu_loras")
