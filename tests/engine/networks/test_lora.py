from __future__ import annotations

import pytest
import torch
from pack.engine.networks.lora import LoRALinear
from pack.tests.engine.networks.layers import adapters, build
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F  # noqa: N812


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)])
def test_gradients_agree_with_finite_differences(has_bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight, bias, lora_A, lora_B = (
        torch.randn(size, dtype=torch.float64) for size in (shape, (4, 6), (4,), (3, 6), (4, 3))
    )
    trained = [each.requires_grad_() for each in (x, lora_A, lora_B)]

    def function(x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        return LoRALinear.apply(x, weight, bias if has_bias else None, lora_A, lora_B, 0.7)

    assert torch.autograd.gradcheck(function, trained)
    expected = F.linear(x, weight + 0.7 * lora_B @ lora_A, bias if has_bias else None)
    torch.testing.assert_close(function(*trained), expected)


def test_inputs_and_gradients_may_lie_anywhere_in_memory() -> None:
    """Transposed inputs and the expanded gradient of a sum."""
    model, other = build(), build()
    first, second = adapters(model, "lora"), adapters(other, "lora")
    x = torch.randn(8, 7, 2).permute(2, 1, 0)
    model.q(x).sum().backward()
    (other.q(x.contiguous()) * torch.ones(2, 7, 6)).sum().backward()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_input_and_the_values_of_the_ranks_are_kept(dtype: torch.dtype) -> None:
    model = build(dtype)
    adapters(model, "lora")
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    x = torch.randn(2, 50, 8, dtype=dtype, requires_grad=True)
    own.add(x.untyped_storage().data_ptr())
    kept: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.shape)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.q(x)
    assert kept == [(100, 3)]


def test_a_layer_that_is_used_twice_gets_the_sum_of_both_gradients() -> None:
    model = build()
    network = adapters(model, "lora")
    first, second = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    (model.q(first).sum() + model.q(second).square().sum()).backward()
    together = [each.grad.clone() for each in network.adapters["qkv"].parameters()]
    network.adapters["qkv"].zero_grad()
    model.q(first).sum().backward()
    model.q(second).square().sum().backward()
    for found, each in zip(together, network.adapters["qkv"].parameters(), strict=True):
        torch.testing.assert_close(found, each.grad)


def test_an_empty_batch_has_an_empty_output() -> None:
    model = build()
    adapters(model, "lora")
    assert model(torch.empty(0, 7, 8)).shape == (0, 7, 8)


def test_a_layer_is_still_the_first_to_be_asked_for_its_type() -> None:
    """Some models look at the type of the first parameter of a part."""
    model = nn.Sequential(build(torch.bfloat16))
    adapters(model[0], "lora")
    assert next(model.parameters()).dtype == torch.bfloat16
