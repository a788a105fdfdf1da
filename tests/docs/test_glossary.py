"""docs/glossary.md is what app/domain.py says."""

from __future__ import annotations

import subprocess
import sys

from tests.docs.pages import ROOT


def test_the_page_is_current() -> None:
    made = subprocess.run(
        [sys.executable, "docs/glossary.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    page = (ROOT / "docs" / "glossary.md").read_text()
    assert page == made.stdout, "run: python docs/glossary.py > docs/glossary.md"
