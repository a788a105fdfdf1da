"""Numbers of eight bits: never on here."""

from contextlib import nullcontext


class FP8GlobalStateManager:
    """What Megatron asks whether they are on."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


fp8_autocast = fp8_model_init = nullcontext
