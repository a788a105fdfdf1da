"""What the pages point at is there."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT, Page, page, pages

PAGES = pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
_PATH = re.compile(r"(?:app|bench|docs|migrations|tests)/[\w./-]*\w")


@PAGES
def test_links_lead_somewhere(page: Page) -> None:
    for link in page.links():
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.path.parent / path).resolve() if path else page.path
        assert target.exists(), link
        if anchor:
            assert anchor in Page(target).anchors(), link


@PAGES
def test_files_that_are_named_exist(page: Page) -> None:
    for code in page.inline():
        if _PATH.fullmatch(code):
            assert (ROOT / code).exists(), code


def test_every_page_is_linked_from_another() -> None:
    linked = {
        (each.path.parent / link.partition("#")[0]).resolve()
        for each in pages()
        for link in each.links()
    }
    adrs = ROOT / "docs" / "adr"
    found = {each.path for each in pages() if each.path.parent != adrs or adrs not in linked}
    assert not found - linked - {page("README.md").path}
