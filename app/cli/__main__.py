"""`python -m app.cli`: the same as `loragate`."""

from __future__ import annotations

from app.cli import main

main()
