"""The pages a person reads, taken apart so that tests can check what they say.

What comes in: the README and docs/*.md. What goes out: fenced blocks, commands as a shell would
split them, inline code, links, headings and tables. It knows nothing of what any of them mean.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
_INLINE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_ASSIGNMENT = re.compile(r"\w+=")
_BETWEEN_COMMANDS = {"|", "||", "&&", ";", "&"}


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def prose(self) -> str:
        """The page without its fenced blocks."""
        return _FENCE.sub("", self.text)

    def blocks(self, *languages: str) -> list[str]:
        return [code for language, code in _FENCE.findall(self.text) if language in languages]

    def commands(self) -> Iterator[list[str]]:
        """Every command of the shell blocks as words, without the variables set before it."""
        for block in self.blocks("bash", "sh"):
            for line in block.replace("\\\n", " ").replace("|\n", "| ").splitlines():
                yield from _commands(line)

    def inline(self) -> list[str]:
        """The inline code, each piece on one line."""
        return [" ".join(code.split()) for code in _INLINE.findall(self.prose)]

    def links(self) -> list[str]:
        return _LINK.findall(self.prose)

    def anchors(self) -> set[str]:
        """Where a link may lead to inside the page: GitHub's names for its headings."""
        headings = re.findall(r"^#+ (.+)$", self.prose, re.M)
        return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}

    def table(self, first_column: str) -> list[list[str]]:
        """The rows of the table whose first heading this is."""
        lines = iter(self.prose.splitlines())
        for line in lines:
            if line.startswith(f"| {first_column} |"):
                next(lines)
                return [_cells(row) for row in _while_rows(lines)]
        raise AssertionError(f"{self.name} has no table that begins with {first_column!r}")


def codes(cell: str) -> list[str]:
    """The inline code of a table cell."""
    return _INLINE.findall(cell)


def page(name: str) -> Page:
    return Page(ROOT / name)


def pages() -> list[Page]:
    """The README and everything under docs."""
    return [Page(ROOT / "README.md"), *map(Page, sorted((ROOT / "docs").rglob("*.md")))]


def _commands(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # a line of a text in quotes that goes over several
        return
    command: list[str] = []
    for word in [*words, ";"]:
        if word in _BETWEEN_COMMANDS:
            if command:
                yield command
            command = []
        elif command or not _ASSIGNMENT.match(word):
            command.append(word)


def _while_rows(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("|"):
            return
        yield line


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().removeprefix("|").removesuffix("|").split("|")]
