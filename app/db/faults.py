"""What drivers and disks raise, in our own words.

What comes in: a block that runs SQL, or one that writes files. What goes out: `InvalidRequest` if
the value that was sent is to blame, `StorageUnavailable` if the machine is; anything else as it
was. Knows nothing of what was being stored.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnectionLeft

from app.errors import InvalidRequest, LoragateError, StorageUnavailable

#: What writing says when there is no room, and reading never says.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})

_DISK = NO_ROOM | {errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES}
_UNSTORABLE = "A value in the request is one that no name or number here can have."
#: The class of PostgreSQL's error codes that blame the value.
_DATA_EXCEPTION = "22"
_FULL, _LOCKED, _READ_ONLY = "has no room left", "is locked by someone else", "is read-only"
_BROKEN, _SILENT = "cannot be read or written", "does not answer"
_SQLITE = {
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_IOERR: _BROKEN,
    sqlite3.SQLITE_CANTOPEN: _BROKEN,
}
#: Beginnings of PostgreSQL's error codes; the first that fits counts.
_POSTGRESQL = {
    "53100": _FULL,  # disk_full
    "53": "has no resources left",
    "55P03": _LOCKED,  # lock_not_available
    "40": _LOCKED,  # lost against another transaction
    "25006": _READ_ONLY,  # a standby
    "58": _BROKEN,
    "57": _SILENT,  # shutting down, or starting
    "08": _SILENT,
}


@contextmanager
def from_sql() -> Iterator[None]:
    """Translate what a database's driver raises. Each has its own idea of which error it is."""
    try:
        yield
    except (OverflowError, UnicodeEncodeError) as exc:
        raise InvalidRequest(_UNSTORABLE) from exc
    except Exception as exc:
        cause = _drivers_own(exc)
        found = _translated(exc, cause)
        if found is None:
            raise
        # Not from `exc`: SQLAlchemy's text has the statement's values in it.
        raise found from cause


@contextmanager
def from_disk(what: str = "adapter store") -> Iterator[None]:
    """Translate what the file system of a store raises; `what` is the store's name."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in _DISK:
            raise
        raise StorageUnavailable(
            f"The {what} cannot be written: {os.strerror(exc.errno)}. "
            "Mend that on the gateway's machine, and ask again."
        ) from exc


def _drivers_own(exc: Exception) -> BaseException:
    """The error under SQLAlchemy's; while connecting there is none above it."""
    if isinstance(exc, DBAPIError) and exc.orig is not None:
        return exc.orig.__cause__ or exc.orig
    return exc


def _translated(exc: Exception, cause: BaseException) -> LoragateError | None:
    state = str(getattr(cause, "sqlstate", None) or "")
    if isinstance(exc, DBAPIError) and isinstance(cause, ValueError | OverflowError):
        return InvalidRequest(_UNSTORABLE)
    if state.startswith(_DATA_EXCEPTION):
        return InvalidRequest(_UNSTORABLE)
    reason = _SQLITE.get(getattr(cause, "sqlite_errorcode", 0) & 0xFF) or next(
        (why for code, why in _POSTGRESQL.items() if state.startswith(code)), None
    )
    lost = isinstance(exc, OSError | NoConnectionLeft) or (
        isinstance(exc, DBAPIError) and exc.connection_invalidated
    )
    if reason is None and not lost:
        return None
    return StorageUnavailable(
        f"The gateway's database {reason or _SILENT}. Mend that, or ask again later; "
        "requests to models go on."
    )
