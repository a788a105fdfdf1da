"""Writes docs/glossary.md: `python docs/glossary.py > docs/glossary.md`.

What comes in: the docstrings of `app.domain`. What goes out: Markdown, one section a noun.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from app import domain  # noqa: E402

INTRO = """\
# Glossary

One noun, one meaning, one home: [app/domain.py](../app/domain.py), from whose docstrings this page
is written (`python docs/glossary.py > docs/glossary.md`).
"""


def glossary() -> str:
    """The page, whole."""
    return "\n".join([INTRO, *(_section(noun) for noun in nouns())])


def nouns() -> list[type]:
    """The classes that domain.py defines, in its order."""
    tree = ast.parse(inspect.getsource(domain))
    return [getattr(domain, node.name) for node in tree.body if isinstance(node, ast.ClassDef)]


def _section(noun: type) -> str:
    return f"## {noun.__name__}\n\n{inspect.getdoc(noun)}\n" + "".join(
        f"\n{line}\n" for line in _parts(noun)
    )


def _parts(noun: type) -> Iterator[str]:
    """What it is made of: an enum's values, a dataclass's fields, its properties' meaning."""
    if issubclass(noun, Enum):
        yield "One of: " + ", ".join(f"`{member.value}`" for member in noun) + "."
    elif is_dataclass(noun):
        yield "Has: " + ", ".join(f"`{field.name}`" for field in fields(noun)) + "."
    for name, member in vars(noun).items():
        if isinstance(member, property):
            yield f"`{name}`: {inspect.getdoc(member)}"


if __name__ == "__main__":
    sys.stdout.write(glossary())
