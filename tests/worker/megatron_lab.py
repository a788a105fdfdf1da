"""A Megatron trainer in a process of its own, to be asked from a test.

What comes in: a socket's path and settings as JSON. What goes out: the answers of the trainer's
methods, pickled. It is a process because Megatron's parallel state is one for each.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from app.errors import LoragateError
from app.settings import Settings
from app.worker.trainers.megatron import MegatronTrainer, follow


class Lab:
    """The test's side: `lab.probe(…)` is what the trainer's `probe` answers or raises."""

    def __init__(self, folder: Path, launcher: tuple[str, ...] = (), **values: Any) -> None:
        listener = Listener(str(folder / "lab"))
        command = [*(launcher or (sys.executable, "-m")), __name__]
        words = [listener.address, json.dumps({"worker_device": "cpu", **values}, default=str)]
        self.process = subprocess.Popen(
            [*command, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        self._connection: Connection[Any, Any] = listener.accept()
        listener.close()
        self._answer()

    def __getattr__(self, method: str) -> Any:
        def ask(*args: Any, **kwargs: Any) -> Any:
            self._connection.send_bytes(pickle.dumps((method, args, kwargs)))
            return self._answer()

        return ask

    def end(self) -> int:
        """Close the trainer; the process's exit status."""
        if self.process.poll() is None:
            self.close()
        return self.process.wait(30)

    def _answer(self) -> Any:
        answer = pickle.loads(self._connection.recv_bytes())
        if isinstance(answer, LoragateError):
            raise answer
        return answer


def main(address: str, values: str) -> None:
    settings = Settings(**json.loads(values))
    if follow(settings):
        return
    assert settings.worker_model is not None
    with Client(address) as connection:
        try:
            trainer = MegatronTrainer.start(settings, settings.worker_model)
        except LoragateError as exc:
            connection.send_bytes(pickle.dumps(exc))
            return
        connection.send_bytes(pickle.dumps(None))
        method = ""
        while method != "close":
            method, args, kwargs = pickle.loads(connection.recv_bytes())
            answer = _answer(trainer, method, args, kwargs)
            connection.send_bytes(pickle.dumps(answer))


def _answer(trainer: Any, method: str, args: Any, kwargs: Any) -> Any:
    try:
        target = trainer
        for part in method.split("."):
            target = getattr(target, part)
        return target(*args, **kwargs) if callable(target) else target
    except LoragateError as exc:
        return exc


if __name__ == "__main__":
    main(*sys.argv[1:])
