"""`loragate backends`: what the environment would have this gateway train and sample with.

What comes in: the settings. What goes out: a table of operations and who does them, and how to
start what the gateway does not start itself. It asks no gateway and no server.
"""

from __future__ import annotations

import shlex

from rich.table import Table
from rich.text import Text

from app.cli.terminal import stdout
from app.errors import NotTrainable
from app.settings import BackendSettings, Settings


def show() -> None:
    """Show which backend does what with the settings as they are now."""
    from app.control.backends import Operation, combine, vllm_command

    settings, variables = Settings(), BackendSettings()
    found = combine(variables, settings)
    table = Table("operation", "backend", box=None)
    for operation in Operation:
        try:
            does = Text(found.does(operation))
        except NotTrainable as exc:
            does = Text(str(exc), style="dim")
        table.add_row(operation.value, does)
    stdout.print(table)
    for pool in found.pools:
        stdout.print(f"pool {pool.name}: {pool.base_model} at {', '.join(pool.replicas)}")
    for trainer in found.trainers:
        stdout.print(f"trainer {trainer.name}: {trainer.base_model} at {trainer.url}")
    if found.embedded is not None:
        stdout.print(f"embedded worker: {found.embedded.base_model}, started with the gateway")
    if variables.use_vllm:
        command = shlex.join(vllm_command(variables, settings))
        stdout.print(
            f"start vLLM with: VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 {command}", soft_wrap=True
        )
