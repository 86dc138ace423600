from __future__ import annotations

import pytest
import torch
from pack.engine.networks.decomposition import DecomposedLinear, Decomposition
from pack.engine.networks.network import inject
from pack.engine.networks.settings import Dropouts, LayerSettings
from pack.tests.engine.networks.layers import FUSED, adapters, build
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F  # noqa: N812


def test_gradients_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    x, gain, weight, bias, lora_A, lora_B = (
        torch.randn(size, dtype=torch.float64)
        for size in ((2, 5, 6), (6,), (4, 6), (4,), (3, 6), (4, 3))
    )
    trained = [each.requires_grad_() for each in (x, gain, lora_A, lora_B)]

    def function(*given: torch.Tensor) -> torch.Tensor:
        x, gain, lora_A, lora_B = given
        return DecomposedLinear.apply(x, gain, weight, bias, lora_A, lora_B, 0.7)

    assert torch.autograd.gradcheck(function, trained)


def test_it_is_the_textbook_form_with_the_norm_over_all_parts_held_constant() -> None:
    model = build(torch.float64)
    network = adapters(model, "dora")
    model.double()
    base = build(torch.float64)
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.cat([base.q.weight, base.k.weight, base.v.weight])
    bias = torch.cat([base.q.bias, base.k.bias, base.v.bias])
    lora_A, lora_B, magnitude = network.adapters["qkv"].tensors().values()

    trained = weight + 2.0 * lora_B @ lora_A
    norm = trained.detach().norm(dim=0, keepdim=True)
    expected = F.linear(x, trained * magnitude / norm, bias)
    found = torch.cat([model.q(x), model.k(x), model.v(x)], dim=-1)
    # The norms of the base's columns were taken in float32.
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **close)
    wanted = [x, lora_A, lora_B, magnitude]
    for ours, exact in zip(
        torch.autograd.grad(found.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_magnitude_begins_as_the_norm_of_the_published_columns(dtype: torch.dtype) -> None:
    model = build(dtype)
    network = adapters(model, "dora", trained=False)
    base = build(dtype)
    weight = torch.cat([base.q.weight, base.k.weight, base.v.weight]).float()
    magnitude = network.named_tensors()["qkv.magnitude"]
    assert magnitude.shape == (1, 8)
    torch.testing.assert_close(magnitude.detach()[0], weight.norm(dim=0))


def test_a_magnitude_is_not_rounded_to_bf16() -> None:
    """A gain of 1.02 would be 1.0234 there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).requires_grad_(False).bfloat16()
    layers = {"it": (("0",), LayerSettings("lora", 2, 2.0, decompose=True))}
    network = inject(model, layers, generator=torch.Generator())
    x = torch.randn(2000, 64).bfloat16()
    with torch.no_grad():
        before = model(x).float()
        network.named_tensors()["it.magnitude"].mul_(1.02)
        after = model(x).float()
    slope = (after * before).sum() / before.square().sum()
    assert float(slope) == pytest.approx(1.02, abs=5e-4)


def test_norms_of_the_base_are_in_no_saved_state_and_bases_not_there_twice() -> None:
    model = build()
    names = set(model.state_dict())
    adapters(model, "dora")
    added = {name for name in model.state_dict() if "adapter." in name}
    assert all("squares" not in name for name in added)
    # Each adapter is below every part of its layer, and its bases nowhere else.
    assert {name for name in model.state_dict() if "adapter." not in name} == {
        ".base.".join(name.rsplit(".", 1)) for name in names
    }


def test_only_the_input_and_what_is_small_is_kept() -> None:
    model = nn.Sequential(nn.Linear(64, 48)).requires_grad_(False)
    layers = {"it": (("0",), LayerSettings("lora", 2, 2.0, decompose=True))}
    inject(model, layers, generator=torch.Generator())
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    x = torch.randn(30, 64, requires_grad=True)
    own.add(x.untyped_storage().data_ptr())
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    assert sorted(kept) == [30 * 2, *[64] * (len(kept) - 1)]


@pytest.mark.parametrize("dropouts", [Dropouts(0.3), Dropouts(rank=0.3, module=0.3)])
def test_without_training_dropouts_leave_a_decomposition_as_it_is(dropouts: Dropouts) -> None:
    x, model, other = torch.randn(2, 7, 8), build(), build()
    adapters(model, "dora", dropouts=dropouts)
    adapters(other, "dora")
    assert torch.equal(model.eval()(x), other(x))
    # The column norm is that of the whole adapter, so without it the base is only scaled.
    assert not torch.equal(model.train()(x), other(x))


class Stored(nn.Module):
    """A linear layer that keeps its weight in another way."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.register_buffer("halved", linear.weight.detach() / 2)
        self.register_buffer("bias", linear.bias.detach())

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.get_buffer("halved") * 2).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dequantized(x.dtype), self.get_buffer("bias"))


def test_a_layer_with_another_storage_is_asked_for_its_weight() -> None:
    x, model, other = torch.randn(2, 7, 8), build(), build()
    for path in FUSED["qkv"]:
        model.set_submodule(path, Stored(model.get_submodule(path)))  # pyright: ignore
    networks = [adapters(each, "dora") for each in (model, other)]
    torch.testing.assert_close(model(x), other(x))
    for each in (model, other):
        each(x).square().sum().backward()
    for a, b in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_norm_is_right_for_a_large_change() -> None:
    torch.manual_seed(0)
    bases = [nn.Linear(6, 4).requires_grad_(False), nn.Linear(6, 3).requires_grad_(False)]
    lora_A, lora_B = torch.randn(2, 6), 10 * torch.randn(7, 2)
    found = Decomposition(bases).norm(lora_A, lora_B, 1.5)
    whole = torch.cat([base.weight for base in bases]) + 1.5 * lora_B @ lora_A
    torch.testing.assert_close(found, whole.norm(dim=0))
