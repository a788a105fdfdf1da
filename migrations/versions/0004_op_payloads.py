"""What single ops work on, apart from their jobs, and the tokens that a run's probes are of.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "op_payloads",
        sa.Column(
            "job_number",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=False,
            nullable=False,
        ),
        sa.Column("run", sa.String(length=128), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_number"],
            ["jobs.number"],
            name=op.f("fk_op_payloads_job_number"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("job_number", name=op.f("pk_op_payloads")),
    )
    op.create_index("ix_op_payloads_run", "op_payloads", ["run", "job_number"])
    op.add_column(
        "training_runs", sa.Column("probe_tokens", sa.JSON(none_as_null=True), nullable=True)
    )


def downgrade() -> None:
    op.drop_column("training_runs", "probe_tokens")
    op.drop_index("ix_op_payloads_run", table_name="op_payloads")
    op.drop_table("op_payloads")
