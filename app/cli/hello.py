"""The first lines a newcomer sees: how to ask the gateway that has just started.

What comes in: the address it will listen on. What goes out: a curl line and a Python snippet on
standard output, once a model is there to answer them.
"""

from __future__ import annotations

import sys
import threading
import time

import httpx
import typer

from app import demo

_PERIOD_S = 0.3
_PATIENCE_S = 300.0

_HELLO = """
loragate is ready: {url} answers as the base model and as {adapters}.
Try it from another terminal, with curl:

curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "{first}", "messages": [{{"role": "user", "content": "{question}"}}]}}'

or with {python}:

from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key="none")
for model in {models}:
    print(f"\\n{{model}}: ", end="")
    for chunk in client.chat.completions.create(
        model=model,
        messages=[{{"role": "user", "content": "{question}"}}],
        stream=True,
    ):
        print(chunk.choices[0].delta.content or "", end="", flush=True)

The API is described at {url}/docs. Ctrl+C stops it.
"""


def greet_when_ready(host: str, port: int) -> None:
    """Print the greeting from a thread of its own once a replica is healthy."""
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    threading.Thread(target=_greet, args=(url,), name="hello", daemon=True).start()


def greeting(url: str) -> str:
    """What is printed: both ways to ask work as they stand."""
    names = list(demo.ADAPTERS)
    return _HELLO.format(
        url=url,
        adapters=", ".join(names),
        first=names[0],
        models=tuple(names[:3]),
        question=demo.SAMPLE_PROMPTS[1],
        python=sys.executable,
    )


def _greet(url: str) -> None:
    typer.echo("loragate: loading the demo model; the first start takes a minute", err=True)
    until = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until:
        if _ready(url):
            typer.echo(greeting(url))
            return
        time.sleep(_PERIOD_S)
    typer.echo(f"loragate: no model became ready in {_PATIENCE_S:.0f} s; see the log", err=True)


def _ready(url: str) -> bool:
    try:
        answer = httpx.get(f"{url}/readyz", timeout=2.0)
        pools = answer.json().get("pools", {}) if answer.status_code == 200 else {}
    except (httpx.HTTPError, ValueError):
        return False
    return any(pool["healthy"] for pool in pools.values())
