"""What only the worker raises, hung on the program's own tree.

    LoragateError
    ├── RequestError
    │   └── InvalidRequest
    │       ├── Malformed                malformed          the body has the wrong shape
    │       └── AdapterRefused           adapter_refused    a load or unload that makes no sense
    └── EngineError                      engine_error
        ├── StepFailed                   step_failed        the requests of one forward pass
        └── EngineDead                   engine_dead        nothing more will be answered

`http.faults` maps each class to the status and type vLLM answers.
"""

from __future__ import annotations

from app.errors import InvalidRequest, LoragateError


class Malformed(InvalidRequest):
    """The body is not JSON, or a field of it has the wrong type."""

    code = "malformed"


class AdapterRefused(InvalidRequest):
    """A load or unload that contradicts what is there, or says too little."""

    code = "adapter_refused"


class EngineError(LoragateError):
    """The engine could not finish what it had accepted."""

    code = "engine_error"


class StepFailed(EngineError):
    """One forward pass failed; the requests in it are lost, the engine goes on."""

    code = "step_failed"


class EngineDead(EngineError):
    """The engine thread is gone; the process is to be replaced."""

    code = "engine_dead"


def bad_value(message: str, parameter: str, value: object = None) -> InvalidRequest:
    """The form vLLM gives its own complaints: the parameter, and the value when it helps."""
    detail = f"parameter={parameter}" if value is None else f"parameter={parameter}, value={value}"
    return InvalidRequest(f"{message} ({detail})", param=parameter)
