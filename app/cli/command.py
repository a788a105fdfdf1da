"""How a function becomes a command that talks to a gateway.

What comes in: a function from a `Gateway` and its own options to the API's JSON, and one that
shows that JSON to a person. What goes out: a typer command that also has `--url`, `--key` and
`--json`.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from app.cli.gateway import Gateway
from app.cli.terminal import stdout
from app.settings import ClientSettings

_Url = Annotated[str | None, typer.Option("--url", help="The gateway's address; or LORAGATE_URL.")]
_Key = Annotated[str | None, typer.Option("--key", help="Your API key; or LORAGATE_API_KEY.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the API's JSON.")]

_SHARED = tuple(
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    for name, default, annotation in (
        ("url", None, _Url),
        ("key", None, _Key),
        ("as_json", False, _Json),
    )
)


def command(
    to: typer.Typer,
    name: str,
    show: Callable[[Any], RenderableType],
    *,
    well: Callable[[Any], bool] = lambda found: True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make the decorated function the command `name` of `to`, its result shown by `show`.

    A result that is not `well` is shown as any other, and the command ends with status 1.
    """

    def decorate(verb: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(verb)
        def run(*, url: str | None, key: str | None, as_json: bool, **options: Any) -> None:
            settings = ClientSettings()
            secret = settings.api_key.get_secret_value() if settings.api_key else None
            with Gateway(url or settings.url, key or secret) as gateway:
                found = verb(gateway, **options)
            if as_json:
                stdout.file.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
            else:
                stdout.print(show(found))
            if not well(found):
                raise typer.Exit(1)

        # typer reads the signature: the verb's own parameters, without the gateway.
        _, *own = inspect.signature(verb, eval_str=True).parameters.values()
        parameters = [*own, *_SHARED]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        to.command(name)(run)
        return verb

    return decorate
