"""The whole schema: whoever takes the metadata from here misses no table.

What comes in: the modules that declare tables. What goes out: their one `METADATA`.
"""

from __future__ import annotations

from app.db import file_tables, job_tables, tables

MODULES = (tables, job_tables, file_tables)
METADATA = tables.Row.metadata
