"""`loragate settings`: every setting, what it means and what it is now; and docs/settings.md.

What comes in: the declarations in `app.settings`. What goes out: a table for a person, or the
Markdown page, which a test compares with the one in the repository.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.table import Table
from rich.text import Text

from app.cli.terminal import stdout
from app.settings import BackendSettings, ClientSettings, PoolSettings, Settings

_INTRO = """\
# Settings

Every setting is an environment variable. `loragate settings` shows what they are now; this page
is `loragate settings --markdown`.
"""

_PASSWORD = re.compile(r"://([^:/@]*):[^@]*@")
#: (what is described, what its variables begin with, title, introduction); None: not variables.
_SECTIONS: tuple[tuple[type[BaseModel], str | None, str, str], ...] = (
    (Settings, "LORAGATE_", "The gateway and the worker", ""),
    (
        BackendSettings,
        "",
        "Backends",
        "These have no prefix: they are what Tink's users know. [Backends](backends.md) says how\n"
        "they go together.\n",
    ),
    (
        PoolSettings,
        None,
        "A pool in `LORAGATE_POOLS`",
        "The variable is a JSON list of objects with these fields:\n\n```sh\n"
        'LORAGATE_POOLS=\'[{"name": "llama", "base_model": "meta-llama/Llama-3.1-8B", '
        '"replicas": ["http://10.0.0.5:8000"]}]\'\n```\n',
    ),
    (ClientSettings, "LORAGATE_", "The command line as a client of a gateway", ""),
)


def show(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the reference page instead.")
    ] = False,
) -> None:
    """Show every setting: its variable, its value now, and what it means."""
    if markdown:
        stdout.file.write(reference())
        return
    table = Table("variable", "now", "meaning", box=None)
    for settings in (Settings(), BackendSettings(), ClientSettings()):
        prefix = str(settings.model_config["env_prefix"])
        for name, field in type(settings).model_fields.items():
            now = getattr(settings, name)
            shown = Text(_PASSWORD.sub("://\\1:***@", _plain(now)))
            if now == field.default:
                shown.stylize("dim")
            table.add_row(f"{prefix}{name.upper()}", shown, Text(field.description or ""))
    stdout.print(table)


def reference() -> str:
    """docs/settings.md, whole."""
    return "\n".join([_INTRO, *(_section(*section) for section in _SECTIONS)])


def _section(model: type[BaseModel], prefix: str | None, title: str, intro: str) -> str:
    lines = [
        f"## {title}\n",
        *([intro] if intro else []),
        "| | Default | Meaning |",
        "|---|---|---|",
    ]
    lines += _rows(model, prefix)
    return "\n".join(lines) + "\n"


def _rows(model: type[BaseModel], prefix: str | None) -> Iterator[str]:
    for name, field in model.model_fields.items():
        variable = name if prefix is None else f"{prefix}{name.upper()}"
        default = "required" if field.is_required() else _default(field)
        yield f"| `{variable}` | {default} | {field.description} |"


def _default(field: FieldInfo) -> str:
    plain = _plain(field.default)
    return f"`{plain}`" if plain else ""


def _plain(value: Any) -> str:
    """The value as it would be written in the environment; a secret stays hidden."""
    if value is None or value == ():
        return ""
    if isinstance(value, tuple):
        return ":".join(map(str, value))
    return str(value)
