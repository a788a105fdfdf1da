"""A Megatron trainer in a process of its own, to be asked from a test.

What comes in: settings. What goes out: what the trainer's methods answer or raise. It is a process
because Megatron has one parallel state for each.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Client, Listener
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from app.errors import LoragateError
from app.settings import Settings
from app.telemetry import configure_logging
from app.worker.trainers.megatron import MegatronTrainer, follow

PYTHON = (sys.executable, "-m")
NAME = "tests.worker.megatron_lab"


class Lab:
    """The test's side: `lab.probe(…)` is what the trainer's `probe` answers or raises.

    `lab.ask("a.b", …)` reaches what the trainer has inside.
    """

    def __init__(
        self,
        folder: Path,
        *,
        launcher: Sequence[str] = PYTHON,
        env: Mapping[str, str] = MappingProxyType({}),
        **settings: object,
    ) -> None:
        values = {"worker_device": "cpu", **settings}
        with Listener(str(folder / "lab")) as listener:
            self.log = folder / "log"
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    [*launcher, NAME, str(listener.address), json.dumps(values, default=str)],
                    env={**os.environ, "OMP_NUM_THREADS": "1", **env},
                    stdout=log,
                    stderr=log,
                )
            self._connection = listener.accept()
        try:
            self._answer()
        except LoragateError:
            self._connection.close()
            self.process.wait(30)
            raise

    def again(self, **settings: object) -> None:
        """Another trainer in the same process, once the last is closed or refused to start."""
        self._connection.send_bytes(packed({"worker_device": "cpu", **settings}))
        self._answer()

    def __getattr__(self, method: str) -> Any:
        return lambda *args, **kwargs: self.ask(method, *args, **kwargs)

    def ask(self, path: str, *args: object, **kwargs: object) -> Any:
        self._connection.send_bytes(packed((path, args, kwargs)))
        return self._answer()

    def end(self) -> int:
        """Close the trainer; the process's exit status."""
        self.ask("close")
        self._connection.close()
        return self.process.wait(30)

    def _answer(self) -> Any:
        answer = unpacked(self._connection.recv_bytes())
        if isinstance(answer, LoragateError):
            raise answer
        return answer


def packed(answer: object) -> bytes:
    """Not by pickle alone: Megatron has tensors pickled so that only Megatron can read them."""
    buffer = io.BytesIO()
    torch.save(answer, buffer)
    return buffer.getvalue()


def unpacked(answer: bytes) -> Any:
    return torch.load(io.BytesIO(answer), weights_only=False)


def main(address: str, values: str) -> None:
    given = json.loads(values)
    settings = Settings(**given)
    configure_logging(settings.log_level, settings.log_format)
    if follow(settings):
        return
    with Client(address) as connection, suppress(EOFError):
        while True:
            try:
                _serve(connection, Settings(**given))
            except LoragateError as exc:
                connection.send_bytes(packed(exc))
            given = unpacked(connection.recv_bytes())
            # What Megatron chose for the last model's attention, and would insist on.
            for name in [name for name in os.environ if name.startswith("NVTE_")]:
                del os.environ[name]


def _serve(connection: Any, settings: Settings) -> None:
    """One trainer, until it is closed."""
    assert settings.worker_model is not None
    trainer = MegatronTrainer.start(settings, settings.worker_model)
    connection.send_bytes(packed(None))
    path = ""
    while path != "close":
        path, args, kwargs = unpacked(connection.recv_bytes())
        connection.send_bytes(packed(_do(trainer, path, args, kwargs)))


def _do(trainer: Any, path: str, args: Any, kwargs: Any) -> Any:
    if path == "exported_by_bridge":
        base = trainer._team.engine.base
        return dict(base.bridge.export_adapter_weights([base.model], show_progress=False))
    target = trainer
    for part in path.split("."):
        target = getattr(target, part)
    try:
        return target(*args, **kwargs) if callable(target) else target
    except LoragateError as exc:
        return exc


if __name__ == "__main__":
    main(*sys.argv[1:])
