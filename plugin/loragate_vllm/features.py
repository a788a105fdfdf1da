"""GET /loragate/features: which prompt logprobs this engine gets right.

What comes in: a gateway's question. What goes out: the answer of the engine's workers themselves,
which know whether they were patched; an engine that cannot say is taken to be wrong.
"""

from __future__ import annotations

import logging
from typing import Any

from loragate_vllm import __version__, hook

logger = logging.getLogger("vllm.plugins.loragate")

PATH = "/loragate/features"

#: The method of a worker, and what its answers mean.
METHOD = "loragate_features"
PROMPT = "prompt_logprobs"
LORA = "prompt_logprobs_with_lora"
LM_HEAD = "prompt_logprobs_with_lm_head_lora"
#: What it computes in: how far its logprobs may be from another program's.
DTYPE = "dtype"


def install() -> None:
    """Teach workers to answer, and the API server to ask them."""
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from vllm import __version__ as vllm_version
    from vllm.entrypoints.serve.instrumentator.basic import router
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, METHOD, of_worker)
    if any(getattr(route, "path", None) == PATH for route in router.routes):
        return

    async def show_features(request: Request) -> JSONResponse:
        found = await of_server(request.app.state)
        return JSONResponse({"plugin": __version__, "vllm": vllm_version, **found})

    # The annotations are names of this function, not of the module.
    show_features.__annotations__ = {"request": Request, "return": JSONResponse}
    router.add_api_route(PATH, show_features, methods=["GET"], response_class=JSONResponse)


def of_worker(worker: Any) -> dict[str, Any]:
    """What one worker gets right, and what it computes in."""
    dtype = str(worker.model_config.dtype).removeprefix("torch.")
    return {**_right(worker), DTYPE: dtype}


def _right(worker: Any) -> dict[str, bool]:
    runner = worker.model_runner
    if getattr(worker, "lora_config", None) is None:
        return {PROMPT: True, LORA: True, LM_HEAD: True}
    if getattr(runner, hook.MARK, False):
        # With lm_head left out of the server's LoRA modules an adapter's lm_head does nothing.
        return {PROMPT: True, LORA: True, LM_HEAD: bool(hook.wrappers(runner.get_model()))}
    device = str(getattr(worker, "device", "cpu"))
    safe = not device.startswith("cpu")
    return {PROMPT: safe, LORA: safe, LM_HEAD: False}


async def of_server(state: Any) -> dict[str, Any]:
    """What all workers of its engine get right. Asked once: it ends with its engine."""
    found: dict[str, Any] | None = getattr(state, METHOD, None)
    if found is not None:
        return found
    names = (PROMPT, LORA, LM_HEAD)
    try:
        answers = await state.engine_client.collective_rpc(METHOD)
    except Exception:
        logger.exception("loragate-vllm: the engine does not say what it gets right.")
        return dict.fromkeys(names, False)
    found = {name: all(answer[name] for answer in answers) for name in names}
    found[DTYPE] = answers[0][DTYPE]
    setattr(state, METHOD, found)
    return found
