"""Products with the frozen weights of the base.

What comes in: activations and a weight. What goes out: their product, by whichever library of
this machine is fast. It must not know: what it is for. No gradient is recorded.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

_one_dnn: Any = torch.backends.mkldnn.is_available
ONE_DNN = bool(_one_dnn())


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs · weightᵀ + bias: [..., in], [out, in] and [out] to [..., out].

    torch leaves single precision on a CPU to MKL, which uses half the width of a processor that
    is not Intel's. oneDNN uses all of it: the same numbers, at 250 instead of 115 GFLOP/s of one
    Zen 5 core. torch.compile calls it by this operator, too.
    """
    if inputs.dtype != torch.float32 or inputs.device.type != "cpu" or not ONE_DNN:
        return functional.linear(inputs, weight, bias)
    try:
        found = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    except RuntimeError:
        # It compiles a kernel at its first use, and never again if memory was short just then.
        return functional.linear(inputs, weight, bias)
    return cast(Tensor, found)
