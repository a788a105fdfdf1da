"""The base's products are torch's own, whichever library computes them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from app.worker.trainers import products


@pytest.mark.parametrize("one_dnn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_that_of_linear(
    one_dnn: bool, dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    inputs, weight = torch.randn(1, 37, 24, dtype=dtype), torch.randn(40, 24, dtype=dtype)
    added = torch.randn(40, dtype=dtype) if bias else None
    monkeypatch.setattr(products, "ONE_DNN", one_dnn and products.ONE_DNN)
    found = products.product(inputs, weight, added)
    assert found.dtype == dtype
    assert torch.allclose(found, functional.linear(inputs, weight, added), atol=1e-5, rtol=1e-5)


def test_the_way_back_takes_a_weight_as_it_lies() -> None:
    torch.manual_seed(0)
    grad, weight = torch.randn(1, 37, 40), torch.randn(40, 24)
    assert torch.allclose(products.product(grad, weight.mT), grad @ weight, atol=1e-4)


def test_a_kernel_that_could_not_be_compiled_is_done_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def short(*operands: object) -> torch.Tensor:
        raise RuntimeError("could not create a primitive")

    torch.manual_seed(0)
    inputs, weight = torch.randn(1, 37, 24), torch.randn(40, 24)
    expected = functional.linear(inputs, weight)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", short)
    monkeypatch.setattr(products, "ONE_DNN", True)
    assert torch.equal(products.product(inputs, weight), expected)
