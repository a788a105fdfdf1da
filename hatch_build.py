"""Compiles the gateway's hot path into the wheel, when asked to (docs/adr/0014).

What comes in: the modules listed in pyproject.toml, and LORAGATE_COMPILE=1 in the environment of
the build. What goes out: their extension modules, beside their sources in the wheel. Without the
variable nothing happens and nothing is needed: the wheel is the one for any Python. Nothing is
written into the checkout, where it would take the place of the source.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "LORAGATE_COMPILE"

#: Types are `make check`'s matter: here they only decide which code is made of them. What is not
#: installed while a package is built is Any.
_SETUP = """
from mypyc.build import mypycify
from setuptools import setup

options = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent"]
extensions = mypycify(
    [*options, *{modules!r}], group_name="loragate", opt_level="3", debug_level="0"
)
setup(name="loragate", packages=[], ext_modules=extensions)
"""


class CompileHook(BuildHookInterface[Any]):
    """hatchling's hook: what a build needs, and what it adds to the wheel."""

    _folder: TemporaryDirectory[str] | None = None

    def dependencies(self) -> list[str]:
        return ["mypy[mypyc]>=2.4,<2.5"] if self._wanted() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Raises RuntimeError, with the compiler's own words, if it fails."""
        if not self._wanted():
            return
        if version == "editable":
            raise RuntimeError(f"{VARIABLE}=1 needs a build of its own: leave --editable out")
        self._folder = TemporaryDirectory(prefix="loragate-compile-")
        built = self._compile(Path(self._folder.name))
        build_data["force_include"].update(built)
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def _wanted(self) -> bool:
        return os.environ.get(VARIABLE) == "1"

    def _compile(self, folder: Path) -> dict[str, str]:
        """Where each extension module is, and its place in the wheel."""
        setup = folder / "setup.py"
        setup.write_text(_SETUP.format(modules=self.config["modules"]))
        (folder / "app").symlink_to(Path(self.root) / "app")
        lib = folder / "lib"
        command = [sys.executable, setup.name, "--quiet", "build_ext", "--build-lib", str(lib)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"compiling failed:\n{done.stdout}{done.stderr}")
        made = [path for path in lib.rglob("*") if path.is_file()]
        return {str(path): str(path.relative_to(lib)) for path in made}
