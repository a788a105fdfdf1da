"""What a reader copies would work: commands, variables, paths of the API, Python.

Nothing is run here; the README's own commands are, in tests/acceptance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

import pytest
import typer
from fastapi import FastAPI
from pydantic import TypeAdapter
from typer.core import TyperGroup

from app.api import errors, health, openapi, tink
from app.api.admin import router as admin
from app.api.admin.uploads import NewVersion
from app.api.openai import files, fine_tuning, models, uploads
from app.cli import app as cli
from app.settings import ClientSettings, PoolSettings, Settings
from tests.docs.pages import Page, page, pages

PAGES = pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
_VARIABLE = re.compile(r"LORAGATE_[A-Z0-9_]*[A-Z0-9]")
_ROUTE = re.compile(r"(GET|POST|PUT|PATCH|DELETE) (/\S+)")
_SENDS = ("-d", "--data", "--data-binary", "-T")
#: typer brings a click of its own, so this is not `click.UsageError`.
UsageError = typer.BadParameter.__base__
#: What the build reads, and the gateway does not.
BUILD_VARIABLES = {"LORAGATE_COMPILE"}
_POOLS = re.compile(r"LORAGATE_POOLS='([^']+)'")


def parse(words: list[str]) -> None:
    """Let the real command read its arguments; it is not run.

    Raises:
        KeyError: there is no such command.
        UsageError: there is no such option.
        typer.BadParameter: a value is missing or wrong.
    """
    command = typer.main.get_command(cli)
    name, *arguments = words
    while isinstance(command, TyperGroup) and arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0)
        command = command.commands[name]
    if not isinstance(command, TyperGroup) and "--help" not in arguments:
        command.make_context(name, arguments)


@PAGES
def test_commands_parse(page: Page) -> None:
    for words in page.commands():
        if words[0] == "loragate":
            parse(words)


@PAGES
def test_commands_in_the_text_exist(page: Page) -> None:
    """They may leave arguments out; what they say must be right."""
    for code in page.inline():
        if code.startswith("loragate "):
            with suppress(typer.BadParameter):
                parse(code.partition(" > ")[0].split())


def test_a_wrong_command_is_noticed() -> None:
    with pytest.raises(KeyError):
        parse(["loragate", "adaptors", "list"])
    with pytest.raises(UsageError):
        parse(["loragate", "adapters", "list", "--frobnicate"])


@PAGES
def test_variables_are_settings(page: Page) -> None:
    known = {
        f"LORAGATE_{name.upper()}"
        for settings in (Settings, ClientSettings)
        for name in settings.model_fields
    }
    assert set(_VARIABLE.findall(page.text)) <= known | BUILD_VARIABLES


@PAGES
def test_declared_pools_are_valid(page: Page) -> None:
    for block in page.blocks("bash", "sh"):
        for declared in _POOLS.findall(block):
            TypeAdapter(tuple[PoolSettings, ...]).validate_json(declared)


@pytest.fixture(scope="module")
def routes() -> dict[str, set[str]]:
    """The paths of the API, as expressions, and their methods."""
    app = FastAPI(version="0")
    for router in (
        health.router,
        models.router,
        files.router,
        uploads.router,
        fine_tuning.router,
        tink.router,
        admin,
    ):
        app.include_router(router)
    errors.install(app)
    openapi.install(app)
    return {
        re.sub(r"\{\w+\}", "[^/]+", path): {method.upper() for method in methods}
        for path, methods in app.openapi()["paths"].items()
    }


@PAGES
def test_routes_exist(page: Page, routes: dict[str, set[str]]) -> None:
    for method, path in [*_curled(page), *_ROUTE.findall("\n".join(page.inline()))]:
        found = [methods for known, methods in routes.items() if re.fullmatch(known, path)]
        assert any(method in methods for methods in found), f"{method} {path}"


def _curled(page: Page) -> Iterator[tuple[str, str]]:
    for words in page.commands():
        if words[0] != "curl":
            continue
        sends = any(word in _SENDS for word in words)
        method = words[words.index("-X") + 1] if "-X" in words else "POST" if sends else "GET"
        url = next(word for word in words if word.startswith("http://"))
        yield method, urlsplit(url).path
        if "-d" in words:
            json.loads(words[words.index("-d") + 1])


def test_sources_are_what_a_registration_takes() -> None:
    bodies = [
        code for code in page("docs/platform-engineers.md").inline() if code.startswith('{"source"')
    ]
    assert len(bodies) == 2
    for body in bodies:
        NewVersion.model_validate_json(body)


@PAGES
def test_python_compiles(page: Page) -> None:
    for code in page.blocks("python"):
        compile(code, page.name, "exec")
