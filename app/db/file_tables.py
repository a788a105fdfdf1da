"""The tables of files and of uploads that come in parts.

What comes in: values set by `app.control`. What goes out: rows, which never leave the transaction
they were read in. The bytes are in `file_store`.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from app.db.tables import Id, Row


class FileRow(Row):
    """A file that was uploaded, or that a job produced. The bytes are on disk."""

    __tablename__ = "files"
    __table_args__ = (Index("ix_files_key", "key_id", "number"), Index("ix_files_digest", "digest"))

    number: Mapped[int] = mapped_column(Id, primary_key=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    key_id: Mapped[str] = mapped_column(String(64))
    filename: Mapped[str] = mapped_column(String(512))
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]


class UploadRow(Row):
    """A file that arrives in parts; `file_id` once it is complete.

    `file_expires_after_s`: how long that file is to live.
    """

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    key_id: Mapped[str] = mapped_column(String(64))
    filename: Mapped[str] = mapped_column(String(512))
    purpose: Mapped[str] = mapped_column(String(32))
    mime_type: Mapped[str] = mapped_column(String(128))
    bytes: Mapped[int] = mapped_column(BigInteger)
    status: Mapped[str] = mapped_column(String(16))
    file_id: Mapped[str | None] = mapped_column(String(40))
    file_expires_after_s: Mapped[int | None]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]


class UploadPartRow(Row):
    """One part of an upload; its bytes are on disk until the upload ends."""

    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"))
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]
