"""Imports point down, and the gateway starts without the libraries that only the worker needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
HEAVY = ("torch", "transformers", "peft", "safetensors", "vllm", "app.worker")
LOADED = f"""
import json, sys
import app.main
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""


def test_imports_point_down() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    found = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_gateway_imports_no_torch() -> None:
    found = subprocess.run(
        [sys.executable, "-c", LOADED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(found.stdout) == []
