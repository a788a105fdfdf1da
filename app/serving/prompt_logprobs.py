"""Whether a replica may be asked for prompt logprobs.

What comes in: the version asked for and what the replica gets right. What goes out: why not, or
None. Knows nothing of requests or of how the features were found out.
"""

from __future__ import annotations

from app.backends.base import Features
from app.domain import AdapterVersion

_WAY_OUT = (
    "Install loragate-vllm beside its vLLM, or leave out `prompt_logprobs` and `echo` with "
    "`logprobs`: logprobs of generated tokens are not affected."
)


def refusal(
    version: AdapterVersion | None, features: Features, *, lm_head_loaded: bool = False
) -> str | None:
    """Why this replica cannot answer prompt logprobs of `version` right; None if it can.

    Args:
        version: what is asked for; None is the base.
        features: what the replica gets right.
        lm_head_loaded: whether an adapter that changes lm_head is loaded there. vLLM then gives
            its weights to the prompt rows of whoever shares a step with it.
    """
    who = "the base" if version is None else version.upstream_name
    if not features.prompt_logprobs:
        return (
            f"Prompt logprobs of {who} are not safe here: this replica runs a vLLM that may be one "
            f"for CPUs, which dies of them when LoRA is enabled. {_WAY_OUT}"
        )
    if version is not None and not features.lora_prompt_logprobs:
        return f"This replica does not get prompt logprobs of adapters right. {_WAY_OUT}"
    if features.lm_head_prompt_logprobs:
        return None
    if version is not None and version.targets_lm_head:
        return (
            f"{who} changes lm_head, which this replica's vLLM leaves out of prompt logprobs or "
            f"applies to the wrong rows. {_WAY_OUT}"
        )
    if lm_head_loaded:
        return (
            "An adapter that changes lm_head is loaded on this replica, whose vLLM may apply it to "
            f"the prompt logprobs of {who}. {_WAY_OUT}"
        )
    return None
