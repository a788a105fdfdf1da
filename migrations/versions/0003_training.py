"""Durable jobs with their events and checkpoints, files, runs that live across single ops, and
the dialect of a pool.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0003'
down_revision = '0002'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "pools",
        sa.Column("dialect", sa.String(length=16), server_default="vllm", nullable=False),
    )
    op.create_table('files',
    sa.Column('number', sa.BigInteger().with_variant(sa.Integer(), 'sqlite'), nullable=False),
    sa.Column('id', sa.String(length=40), nullable=False),
    sa.Column('key_id', sa.String(length=64), nullable=False),
    sa.Column('filename', sa.String(length=512), nullable=False),
    sa.Column('purpose', sa.String(length=32), nullable=False),
    sa.Column('bytes', sa.BigInteger(), nullable=False),
    sa.Column('digest', sa.String(length=64), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('deleted_at', sa.DateTime(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('number', name=op.f('pk_files')),
    sa.UniqueConstraint('id', name=op.f('uq_files_id'))
    )
    op.create_index('ix_files_digest', 'files', ['digest'], unique=False)
    op.create_index('ix_files_key', 'files', ['key_id', 'number'], unique=False)

    op.create_table('jobs',
    sa.Column('number', sa.BigInteger().with_variant(sa.Integer(), 'sqlite'), nullable=False),
    sa.Column('id', sa.String(length=40), nullable=False),
    sa.Column('kind', sa.String(length=16), nullable=False),
    sa.Column('key_id', sa.String(length=64), nullable=False),
    sa.Column('trainer', sa.String(length=128), nullable=True),
    sa.Column('lock', sa.String(length=160), nullable=True),
    sa.Column('priority', sa.Integer(), nullable=False),
    sa.Column('status', sa.String(length=16), nullable=False),
    sa.Column('spec', sa.JSON(), nullable=False),
    sa.Column('progress', sa.JSON(), nullable=False),
    sa.Column('details', sa.JSON(), nullable=False),
    sa.Column('result', sa.JSON(none_as_null=True), nullable=True),
    sa.Column('error', sa.JSON(none_as_null=True), nullable=True),
    sa.Column('attempts', sa.Integer(), nullable=False),
    sa.Column('max_attempts', sa.Integer(), nullable=False),
    sa.Column('progressed_attempt', sa.Integer(), server_default='0', nullable=False),
    sa.Column('claim_number', sa.BigInteger(), nullable=True),
    sa.Column('lease_token', sa.String(length=64), nullable=True),
    sa.Column('lease_expires_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('not_before', sa.DateTime(timezone=True), nullable=True),
    sa.Column('cancel_requested', sa.Boolean(), nullable=False),
    sa.Column('pause_requested', sa.Boolean(), nullable=False),
    sa.Column('last_event', sa.Integer(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('started_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('finished_at', sa.DateTime(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('number', name=op.f('pk_jobs')),
    sa.UniqueConstraint('id', name=op.f('uq_jobs_id'))
    )
    op.create_index('ix_jobs_claims', 'jobs', ['trainer', 'claim_number'], unique=False)
    op.create_index('ix_jobs_key', 'jobs', ['key_id', 'number'], unique=False)
    op.create_index('ix_jobs_lock', 'jobs', ['lock'], unique=True, sqlite_where=sa.text("status = 'running'"), postgresql_where=sa.text("status = 'running'"))
    op.create_index('ix_jobs_status', 'jobs', ['status', 'trainer', 'priority', 'key_id', 'number', 'kind', 'lock', 'not_before'], unique=False)
    op.create_index('ix_jobs_turns', 'jobs', ['trainer', 'priority', 'key_id', 'claim_number'], unique=False)

    op.create_table('training_runs',
    sa.Column('id', sa.String(length=128), nullable=False),
    sa.Column('key_id', sa.String(length=64), nullable=False),
    sa.Column('trainer', sa.String(length=128), nullable=False),
    sa.Column('base_model', sa.String(length=256), nullable=False),
    sa.Column('spec', sa.JSON(), nullable=False),
    sa.Column('next_seq', sa.Integer(), nullable=False),
    sa.Column('optim_steps', sa.Integer(), nullable=False),
    sa.Column('saved_steps', sa.Integer(), nullable=True),
    sa.Column('version', sa.Integer(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('removed_at', sa.DateTime(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_training_runs'))
    )
    op.create_index('ix_training_runs_key', 'training_runs', ['key_id'], unique=False)

    op.create_table('uploads',
    sa.Column('id', sa.String(length=40), nullable=False),
    sa.Column('key_id', sa.String(length=64), nullable=False),
    sa.Column('filename', sa.String(length=512), nullable=False),
    sa.Column('purpose', sa.String(length=32), nullable=False),
    sa.Column('mime_type', sa.String(length=128), nullable=False),
    sa.Column('bytes', sa.BigInteger(), nullable=False),
    sa.Column('status', sa.String(length=16), nullable=False),
    sa.Column('file_id', sa.String(length=40), nullable=True),
    sa.Column('file_expires_after_s', sa.Integer(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_uploads'))
    )
    op.create_table('checkpoints',
    sa.Column('id', sa.String(length=40), nullable=False),
    sa.Column('job_number', sa.BigInteger().with_variant(sa.Integer(), 'sqlite'), nullable=False),
    sa.Column('step', sa.Integer(), nullable=False),
    sa.Column('model', sa.String(length=300), nullable=False),
    sa.Column('metrics', sa.JSON(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['job_number'], ['jobs.number'], name=op.f('fk_checkpoints_job_number'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_checkpoints')),
    sa.UniqueConstraint('job_number', 'step', name=op.f('uq_checkpoints_job_number_step'))
    )
    op.create_table('job_events',
    sa.Column('job_number', sa.BigInteger().with_variant(sa.Integer(), 'sqlite'), nullable=False),
    sa.Column('number', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('type', sa.String(length=16), nullable=False),
    sa.Column('level', sa.String(length=8), nullable=False),
    sa.Column('message', sa.String(length=4096), nullable=False),
    sa.Column('data', sa.JSON(), nullable=False),
    sa.Column('step', sa.Integer(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['job_number'], ['jobs.number'], name=op.f('fk_job_events_job_number'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('job_number', 'number', name=op.f('pk_job_events'))
    )
    op.create_index('ix_job_events_step', 'job_events', ['job_number', 'step'], unique=True, sqlite_where=sa.text('step IS NOT NULL'), postgresql_where=sa.text('step IS NOT NULL'))

    op.create_table('upload_parts',
    sa.Column('id', sa.String(length=40), nullable=False),
    sa.Column('upload_id', sa.String(length=40), nullable=False),
    sa.Column('bytes', sa.BigInteger(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['upload_id'], ['uploads.id'], name=op.f('fk_upload_parts_upload_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_upload_parts'))
    )


def downgrade() -> None:
    op.drop_table('upload_parts')
    op.drop_index('ix_job_events_step', table_name='job_events', sqlite_where=sa.text('step IS NOT NULL'), postgresql_where=sa.text('step IS NOT NULL'))

    op.drop_table('job_events')
    op.drop_table('checkpoints')
    op.drop_table('uploads')
    op.drop_index('ix_training_runs_key', table_name='training_runs')

    op.drop_table('training_runs')
    op.drop_index('ix_jobs_turns', table_name='jobs')
    op.drop_index('ix_jobs_status', table_name='jobs')
    op.drop_index('ix_jobs_lock', table_name='jobs', sqlite_where=sa.text("status = 'running'"), postgresql_where=sa.text("status = 'running'"))
    op.drop_index('ix_jobs_key', table_name='jobs')
    op.drop_index('ix_jobs_claims', table_name='jobs')

    op.drop_table('jobs')
    op.drop_index('ix_files_key', table_name='files')
    op.drop_index('ix_files_digest', table_name='files')

    op.drop_table('files')
    op.drop_column("pools", "dialect")
