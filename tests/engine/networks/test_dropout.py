from __future__ import annotations

import pytest
import torch
from pack.engine.networks.network import Network, inject
from pack.engine.networks.settings import Dropouts, LayerSettings
from pack.tests.engine.networks.layers import KINDS, adapters, build
from torch import nn

SAMPLES = 4000


def layer(kind: str, dropouts: Dropouts, *, rank: int = 3) -> tuple[nn.Module, Network]:
    """One layer of zeros with an adapter, so that the output is what the adapter adds."""
    base = nn.Linear(8, 6).requires_grad_(False)
    nn.init.zeros_(base.weight)
    nn.init.zeros_(base.bias)
    model = nn.Sequential(base)
    settings = LayerSettings(kind, rank, alpha=2.0)  # pyright: ignore
    generator = torch.Generator().manual_seed(0)
    network = inject(model, {"it": (("0",), settings)}, dropouts=dropouts, generator=generator)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=generator)
    return model.train(), network


def test_ranks_are_dropped_per_sample_and_the_rest_is_scaled_up() -> None:
    model, network = layer("lora", Dropouts(rank=0.25))
    torch.manual_seed(0)
    x = torch.randn(1, 5, 8).expand(SAMPLES, 5, 8)
    down = x[0] @ network.named_tensors()["it.A"].t()
    up = network.named_tensors()["it.B"]
    added = model(x)
    # What each rank gives is found by solving for its share, the same for all five tokens.
    shares = torch.linalg.pinv(up) @ added.transpose(1, 2) / down.t() / (2 / 3)
    assert torch.allclose(shares, shares[:, :, :1].expand_as(shares), atol=1e-3)
    kept = shares[:, :, 0] > 0.5
    torch.testing.assert_close(shares[:, :, 0], kept / 0.75, rtol=1e-3, atol=1e-3)
    # 12000 draws of probability 0.75: a standard error of 0.4 %.
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.016)


def test_values_between_the_factors_are_dropped_one_by_one() -> None:
    model, network = layer("lora", Dropouts(neuron=0.25))
    x = torch.randn(1, 1, 8).expand(SAMPLES, 5, 8)
    up = network.named_tensors()["it.B"]
    down = x[0, 0] @ network.named_tensors()["it.A"].t()
    torch.manual_seed(0)
    shares = torch.linalg.lstsq(up, model(x).flatten(0, 1).t()).solution / down[:, None] / (2 / 3)
    kept = shares > 0.5
    torch.testing.assert_close(shares, kept / 0.75, rtol=1e-3, atol=1e-3)
    # 60000 draws of probability 0.75: a standard error of 0.18 %.
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.008)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_a_whole_adapter_is_dropped_and_not_scaled_up_otherwise(kind: str) -> None:
    model, _ = layer(kind, Dropouts(module=0.25), rank=1)
    x = torch.randn(4, 5, 8)
    full = model.eval()(x)
    model.train()
    torch.manual_seed(0)
    uses = [model(x) for _ in range(800)]
    dropped = [not use.any() for use in uses]
    for use, is_dropped in zip(uses, dropped, strict=True):
        if not is_dropped:
            torch.testing.assert_close(use, full, rtol=1e-4, atol=1e-5)
    # A standard error of 1.5 %.
    assert sum(dropped) / len(uses) == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_output_rows_of_products_are_dropped_and_the_rest_is_scaled_up(kind: str) -> None:
    model, _ = layer(kind, Dropouts(rank=0.25), rank=1)
    x = torch.randn(4, 5, 8)
    full = model.eval()(x)
    model.train()
    torch.manual_seed(0)
    kept = 0.0
    for _ in range(300):
        added = model(x)
        mask = added.abs().amax(dim=(0, 1)) > 0
        torch.testing.assert_close(added, full * mask / 0.75, rtol=1e-4, atol=1e-5)
        kept += float(mask.float().mean()) / 300
    assert kept == pytest.approx(0.75, abs=0.04)  # 1800 draws, a standard error of 1 %


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_dropped_outside_of_training(kind: str) -> None:
    x, model, plain = torch.randn(2, 7, 8), build(), build()
    network = adapters(model, kind, dropouts=Dropouts(rank=0.9, module=0.9))
    adapters(plain, kind)
    assert network.has_dropout
    state = torch.get_rng_state()
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_what_is_dropped(kind: str) -> None:
    x, model = torch.randn(2, 7, 8), build()
    adapters(model, kind, dropouts=Dropouts(rank=0.5, module=0.5))
    torch.manual_seed(0)
    first = [model(x) for _ in range(4)]
    torch.manual_seed(0)
    assert all(torch.equal(model(x), each) for each in first)
    assert any(not torch.equal(each, first[0]) for each in first)


def test_every_parameter_has_a_gradient_whatever_is_dropped() -> None:
    model, network = layer("lora", Dropouts(module=0.999))
    model(torch.randn(2, 5, 8)).sum().backward()
    assert all(each.grad is not None for each in network.parameters())


def test_the_textbook_form_has_the_same_gradients_under_the_same_draws() -> None:
    model, network = layer("lora", Dropouts(0.2, 0.3, 0.1))
    x = torch.randn(2, 5, 8, requires_grad=True)
    lora_A, lora_B = network.parameters()
    torch.manual_seed(5)
    found = torch.autograd.grad(model(x).square().sum(), [x, lora_A, lora_B])
    torch.manual_seed(5)
    keeps = torch.rand(()) >= 0.1
    hidden = torch.nn.functional.dropout(x @ lora_A.t(), 0.2)
    hidden = hidden * (torch.rand(2, 1, 3) >= 0.3) / 0.7 * keeps
    expected = (2 / 3) * hidden @ lora_B.t()
    for ours, exact in zip(
        found, torch.autograd.grad(expected.square().sum(), [x, lora_A, lora_B]), strict=True
    ):
        torch.testing.assert_close(ours, exact)
