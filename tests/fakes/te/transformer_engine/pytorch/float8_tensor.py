"""A tensor of eight-bit numbers: never made here."""


class Float8Tensor:
    """What Megatron asks of every parameter whether it is one."""
