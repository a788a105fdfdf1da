"""The `loragate` command: the programs (serve, worker, migrate), and a client of a gateway.

What comes in: arguments. What goes out: results on stdout, errors as one line on stderr with exit
code 1, wrong usage with 2. The programs are imported when they are run, so that the client starts
fast and needs no torch.
"""

from __future__ import annotations

import sys

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError

from app.cli import adapters, backends, jobs, keys, pools, probes, programs, settings, status
from app.cli.terminal import fail
from app.errors import LoragateError
from app.settings import BackendSettings

app = typer.Typer(
    help="An OpenAI-compatible gateway for LoRA adapters on vLLM pools.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(programs.serve)
app.command("worker")(programs.worker)
app.command("migrate")(programs.migrate)
app.command("settings")(settings.show)
app.command("backends")(backends.show)
probes.install(adapters.app)
app.add_typer(adapters.app, name="adapters")
app.add_typer(pools.app, name="pools")
app.add_typer(pools.replicas, name="replicas")
app.add_typer(keys.app, name="keys")
app.add_typer(jobs.app, name="jobs")
status.install(app)


def main() -> None:
    """Run the command; an error a person can mend is one line, never a traceback."""
    try:
        app()
    except LoragateError as exc:
        fail(str(exc))
    except ValidationError as exc:
        fault = exc.errors()[0]
        prefix = "" if exc.title == BackendSettings.__name__ else "LORAGATE_"
        name = "_".join(str(part) for part in fault["loc"][:1]).upper()
        fail(f"the setting {prefix}{name} is wrong: {fault['msg']}")
    except SettingsError as exc:
        _, name, *_ = str(exc).split('"')
        fail(f"the setting LORAGATE_{name.upper()} is wrong: it is not JSON")
    except OSError as exc:
        fail(str(exc))
    except KeyboardInterrupt:
        sys.exit(130)
