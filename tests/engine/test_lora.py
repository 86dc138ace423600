from __future__ import annotations

import pytest
import torch
from pack.engine.lora import LoRALinear, inject, linear_shapes, merge
from torch import nn
from torch.utils.checkpoint import checkpoint

TARGETS = {"qkv": ("q", "k", "v"), "out": ("o",)}


class Attention(nn.Module):
    """Split projections, as our classes have them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 4), nn.Linear(8, 5)
        self.o = nn.Linear(15, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1))


def build(dtype: torch.dtype = torch.float32) -> Attention:
    torch.manual_seed(0)
    return Attention().to(dtype).requires_grad_(False)


def injected(model: nn.Module, *, trained: bool, alpha: float = 6.0):
    generator = torch.Generator().manual_seed(1)
    network = inject(model, TARGETS, rank=3, alpha=alpha, generator=generator)
    if trained:
        with torch.no_grad():
            for adapter in network.adapters.values():
                adapter.lora_B.normal_(generator=generator)
    return network


def test_the_output_does_not_change_at_initialisation() -> None:
    x, model = torch.randn(2, 7, 8), build()
    before = model(x)
    injected(model, trained=False)
    assert torch.equal(model(x), before)


def test_split_layers_act_as_one_adapter_of_the_fused_layer() -> None:
    x, plain, model = torch.randn(2, 7, 8), build(), build()
    network = injected(model, trained=True)
    qkv, out = network.adapters["qkv"], network.adapters["out"]

    weight = torch.cat([plain.q.weight, plain.k.weight, plain.v.weight])
    bias = torch.cat([plain.q.bias, plain.k.bias, plain.v.bias])
    fused = x @ (weight + 2.0 * qkv.lora_B @ qkv.lora_A).T + bias
    expected = fused @ (plain.o.weight + 2.0 * out.lora_B @ out.lora_A).T + plain.o.bias

    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("multiplier", [1.0, -0.5])
def test_merging_gives_the_output_of_the_adapters(multiplier: float) -> None:
    x, merged, model = torch.randn(2, 7, 8), build(), build()
    network = injected(model, trained=True)
    for adapter in network.adapters.values():
        adapter.scale *= multiplier
    merge(merged, TARGETS, network.weights(), multiplier=multiplier)
    torch.testing.assert_close(merged(x), model(x))


def test_a_bf16_model_keeps_float32_adapters_and_its_own_output_type() -> None:
    model = build(torch.bfloat16)
    network = injected(model, trained=True)
    output = model(torch.randn(2, 7, 8, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    for parameter in network.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32


def test_gradients_reach_only_the_adapters_and_equal_the_fused_ones() -> None:
    x, model = torch.randn(2, 7, 8), build()
    network = injected(model, trained=True)
    model(x).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }

    plain = build()
    pairs = {name: (a.lora_A.detach(), a.lora_B.detach()) for name, a in network.adapters.items()}
    for pair in pairs.values():
        for tensor in pair:
            tensor.requires_grad_()
    weight = torch.cat([plain.q.weight, plain.k.weight, plain.v.weight])
    bias = torch.cat([plain.q.bias, plain.k.bias, plain.v.bias])
    down, up = pairs["qkv"]
    fused = x @ (weight + 2.0 * up @ down).T + bias
    down_o, up_o = pairs["out"]
    loss = (fused @ (plain.o.weight + 2.0 * up_o @ down_o).T + plain.o.bias).square().sum()
    grads = torch.autograd.grad(loss, [down, up])
    torch.testing.assert_close(network.adapters["qkv"].lora_A.grad, grads[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.adapters["qkv"].lora_B.grad, grads[1], rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_adapters() -> None:
    first, second = (injected(build(), trained=False) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_shapes_are_those_of_the_published_layers() -> None:
    assert linear_shapes(build(), TARGETS) == {"qkv": (15, 8), "out": (8, 15)}


def test_only_linear_layers_take_an_adapter() -> None:
    model = build()
    injected(model, trained=False)
    assert isinstance(model.q, LoRALinear)
    with pytest.raises(ValueError, match="q is a LoRALinear"):
        injected(model, trained=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_adapters_are_disabled_is_the_base_model_bit_for_bit(
    dtype: torch.dtype,
) -> None:
    x, model = torch.randn(2, 7, 8, dtype=dtype), build(dtype)
    before = model(x)
    network = injected(model, trained=True)
    with_adapters = model(x)
    with network.disabled():
        inside = model(x)
        with network.disabled():
            pass
        assert torch.equal(model(x), before)
    assert torch.equal(inside, before) and not inside.requires_grad
    assert torch.equal(model(x), with_adapters) and not torch.equal(with_adapters, before)


def test_adapters_are_enabled_again_after_an_error() -> None:
    x, model = torch.randn(2, 7, 8), build()
    network = injected(model, trained=True)
    expected = model(x)
    with pytest.raises(KeyError), network.disabled():
        raise KeyError
    assert torch.equal(model(x), expected) and torch.is_grad_enabled()


def test_a_gradient_does_not_notice_that_adapters_were_disabled_in_between() -> None:
    """Also where gradient checkpointing computes the model again in the backward pass."""
    x = torch.randn(2, 7, 8)

    def gradients(*, disabled: bool, checkpointed: bool) -> list[torch.Tensor]:
        model = build()
        network = injected(model, trained=True)
        out = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        assert isinstance(out, torch.Tensor)
        if disabled:
            with network.disabled():
                checkpoint(model, x, use_reentrant=False)
        out.square().mean().backward()
        return [each.grad for each in network.parameters() if each.grad is not None]

    expected = gradients(disabled=False, checkpointed=False)
    assert len(expected) == 4
    for checkpointed in (False, True):
        found = gradients(disabled=True, checkpointed=checkpointed)
        assert all(map(torch.equal, found, expected))


def test_disabling_does_not_break_a_compiled_graph() -> None:
    x, model = torch.randn(2, 7, 8), build()
    before = model(x)
    network = injected(model, trained=True)
    with_adapters = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # which refuses a break
    for _ in range(2):
        assert torch.equal(compiled(x), with_adapters)
        with network.disabled():
            assert torch.equal(compiled(x), before)
