"""Every module says what its room is, stays small, and declares nothing that nobody uses."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from app import telemetry
from app.telemetry import METRICS, Event

ROOT = Path(__file__).parent.parent.parent
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("app", "tests", "bench")
    for path in (ROOT / folder).rglob("*.py")
    if path.stat().st_size
)
LINES = 600
TELEMETRY = "app/telemetry.py"


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text())


@cache
def names_used() -> frozenset[str]:
    """Every name and attribute in the app, outside the file that declares them."""
    found: set[str] = set()
    for module in MODULES:
        if module.startswith("app/") and module != TELEMETRY:
            for node in ast.walk(tree(module)):
                if isinstance(node, ast.Attribute):
                    found.add(node.attr)
                elif isinstance(node, ast.Name):
                    found.add(node.id)
    return frozenset(found)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_opens_with_its_room(module: str) -> None:
    docstring = ast.get_docstring(tree(module))
    assert docstring, f"{module} does not say what it is for"
    assert len(docstring) > 20


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_no_longer_than_a_person_can_hold(module: str) -> None:
    assert len((ROOT / module).read_text().splitlines()) <= LINES


def test_every_event_is_logged_somewhere() -> None:
    assert sorted(event.name for event in Event if event.name not in names_used()) == []


def test_every_metric_is_collected_somewhere() -> None:
    declared = {name: m for name, m in vars(telemetry).items() if isinstance(m, telemetry.Metric)}
    assert set(declared.values()) == set(METRICS)
    assert sorted(name for name in declared if name not in names_used()) == []
