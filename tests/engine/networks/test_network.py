from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pack.engine.adapter_weights import (
    LoHaWeights,
    LoKrWeights,
    LoRAWeights,
    converted,
    delta,
    tensors,
)
from pack.engine.networks.network import inject
from pack.engine.networks.settings import Dropouts
from pack.tests.engine.networks.layers import FUSED, KINDS, SETTINGS, adapters, build
from torch import nn

ALL_KINDS = pytest.mark.parametrize("kind", KINDS)


def test_adapters_are_enabled_again_after_an_error() -> None:
    x, model = torch.randn(2, 7, 8), build()
    network = adapters(model, "lora")
    expected = model(x)
    with pytest.raises(KeyError), network.disabled():
        raise KeyError
    assert torch.equal(model(x), expected) and torch.is_grad_enabled()


def test_loras_begin_uniform_in_the_order_of_the_layers_and_with_zeros() -> None:
    """Exactly these values: earlier runs and their saved states began with them."""
    network = adapters(build(), "lora", trained=False, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    for name, (num_in, num_out) in {"qkv": (8, 16), "out": (16, 8)}.items():
        bound = 1 / math.sqrt(num_in)
        expected = torch.empty(3, num_in).uniform_(-bound, bound, generator=generator)
        assert torch.equal(network.named_tensors()[f"{name}.A"], expected)
        assert torch.equal(network.named_tensors()[f"{name}.B"], torch.zeros(num_out, 3))


@ALL_KINDS
def test_the_same_seed_gives_the_same_adapters(kind: str) -> None:
    first, second = (adapters(build(), kind, trained=False) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@ALL_KINDS
def test_at_first_only_the_gradients_of_the_up_side_are_not_zero(kind: str) -> None:
    """The change is zero, but it can be learned."""
    model = build()
    network = adapters(model, kind, trained=False)
    for adapter in network.weights().values():
        assert not delta(adapter).any()
    model(torch.randn(2, 7, 8)).square().sum().backward()
    for adapter in network.adapters.values():
        assert any(each.grad is not None and each.grad.any() for each in adapter.up_side())


@ALL_KINDS
def test_names_in_training_states_are_those_of_the_layer_and_its_tensor(kind: str) -> None:
    network = adapters(build(), kind)
    names = {
        "lora": ["A", "B"],
        "dora": ["A", "B", "magnitude"],
        "loha": ["w1_a", "w1_b", "w2_a", "w2_b"],
        "loha of a high rank": ["w1_a", "w1_b", "w2_a", "w2_b"],
        "lokr": ["w1", "w2_a", "w2_b"],
        "lokr with a whole factor": ["w1", "w2"],
    }[kind]
    found = network.named_tensors()
    assert list(found) == [f"{layer}.{name}" for layer in FUSED for name in names]
    assert {id(each) for each in found.values()} == {id(each) for each in network.parameters()}


@ALL_KINDS
def test_weights_share_memory_with_the_parameters(kind: str) -> None:
    network = adapters(build(), kind)
    ours = {each.data_ptr() for each in network.parameters()}
    for weights in network.weights().values():
        assert {each.data_ptr() for each in tensors(weights).values()} <= ours
        assert not any(each.requires_grad for each in tensors(weights).values())


@ALL_KINDS
def test_an_adapter_that_is_loaded_changes_the_model_as_where_it_came_from(kind: str) -> None:
    """Also from another alpha, which here is 6 or 2."""
    x, source, model = torch.randn(2, 7, 8), build(), build()
    saved = adapters(source, kind).weights()
    expected = source(x)
    layers = {name: (inner, replace(SETTINGS[kind], alpha=1.5)) for name, inner in FUSED.items()}
    network = inject(model, layers, generator=torch.Generator())
    network.load(saved)
    torch.testing.assert_close(model(x), expected)
    assert all(adapter.alpha == 1.5 for adapter in network.weights().values())


def test_a_lora_that_becomes_a_dora_changes_the_model_as_before() -> None:
    x, source, model = torch.randn(2, 7, 8), build(), build()
    saved = adapters(source, "lora").weights()
    adapters(model, "dora", trained=False).load(saved)
    torch.testing.assert_close(model(x), source(x))


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "lokr with a whole factor"])
def test_another_alpha_costs_no_precision_where_a_file_is_rounded(kind: str) -> None:
    """1 / 3 is not a number of bf16; the parameters are in float32."""
    network = adapters(build(), kind)
    saved = {
        name: replace(converted(each, torch.bfloat16), alpha=each.alpha / 3)
        for name, each in network.weights().items()
    }
    network.load(saved)
    for name, each in network.weights().items():
        torch.testing.assert_close(delta(each), delta(saved[name]))


def test_layers_that_are_not_loaded_stay_as_they_are() -> None:
    network = adapters(build(), "lora")
    before = network.adapters["out"].weights()
    network.load({"qkv": LoRAWeights(torch.ones(3, 8), torch.ones(16, 3), 6.0)})
    assert network.adapters["out"].weights() is not before
    assert torch.equal(network.named_tensors()["qkv.A"], torch.ones(3, 8))


@pytest.mark.parametrize(
    ("kind", "weights", "message"),
    [
        ("lora", LoRAWeights(torch.ones(2, 8), torch.ones(16, 2), 6.0), r"qkv: .*\(2, 8\)"),
        (
            "lora",
            LoRAWeights(torch.ones(3, 8), torch.ones(16, 3), 6.0, torch.ones(1, 8)),
            "qkv: .*magnitude",
        ),
        ("lora", LoKrWeights(torch.ones(4, 2), torch.ones(4, 4), 6.0), "qkv: .*LoKrWeights"),
        ("loha", LoRAWeights(torch.ones(3, 8), torch.ones(16, 3), 6.0), "qkv: a LoHa"),
        ("lokr", LoKrWeights(torch.ones(4, 2), torch.ones(4, 4), 6.0), "qkv: .*w2"),
    ],
)
def test_what_does_not_fit_is_not_loaded(kind: str, weights: LoRAWeights, message: str) -> None:
    network = adapters(build(), kind)
    with pytest.raises(ValueError, match=message):
        network.load({"qkv": weights})
    with pytest.raises(ValueError, match="proj has no adapter"):
        network.load({"proj": weights})


def test_a_kronecker_product_is_loaded_from_factors_of_factors() -> None:
    network = adapters(build(), "lokr with a whole factor")
    w1 = (torch.randn(4, 2), torch.randn(2, 2))
    w2 = (torch.randn(4, 2), torch.randn(2, 4))
    weights = LoKrWeights(w1, w2, alpha=3.0)
    network.load({"qkv": weights})
    torch.testing.assert_close(delta(network.weights()["qkv"]), delta(weights))


@ALL_KINDS
def test_groups_hold_every_parameter_once_and_the_up_side_apart(kind: str) -> None:
    network = adapters(build(), kind)
    (only,) = network.parameter_groups(None)
    assert only.name == "lora" and list(only.parameters) == list(network.parameters())
    base, plus = network.parameter_groups(16.0)
    assert (base.name, base.lr_ratio, plus.name, plus.lr_ratio) == (
        "lora",
        1.0,
        "lora plus",
        16.0,
    )
    together = [id(each) for group in (base, plus) for each in group.parameters]
    assert sorted(together) == sorted(id(each) for each in network.parameters())
    ups = {"lora": {"B"}, "loha": {"w1_a", "w2_a"}, "lokr": {"w2_a"}}
    names = {
        name.rsplit(".", 1)[1]
        for name, tensor in network.named_tensors().items()
        if any(tensor is each for each in plus.parameters)
    }
    assert names == (
        {"w2"} if "whole" in kind else ups["lora" if kind == "dora" else kind.split()[0]]
    )


@ALL_KINDS
def test_norms_over_the_limit_are_scaled_to_it_and_others_not_touched(kind: str) -> None:
    network = adapters(build(), kind)
    norms = {name: delta(each).double().norm() for name, each in network.weights().items()}
    before = {name: delta(each).double() for name, each in network.weights().items()}
    smaller, larger = sorted(norms, key=lambda name: norms[name])
    maximum = float((norms[smaller] + norms[larger]) / 2)
    untouched = {name: t.clone() for name, t in network.named_tensors().items()}

    report = network.limit_norms(maximum)

    after = {name: delta(each).double() for name, each in network.weights().items()}
    ratio = maximum / norms[larger]
    torch.testing.assert_close(after[larger], before[larger] * ratio, rtol=1e-5, atol=1e-6)
    for name, tensor in network.named_tensors().items():
        if name.startswith(smaller) or name.endswith("magnitude"):
            assert torch.equal(tensor, untouched[name])
    assert int(report.num_scaled) == 1
    assert float(report.max_norm) == pytest.approx(maximum, rel=1e-5)
    mean = float(maximum + norms[smaller]) / 2
    assert float(report.mean_norm) == pytest.approx(mean, rel=1e-5)


@ALL_KINDS
def test_adapters_that_change_nothing_yet_have_no_norm_to_limit(kind: str) -> None:
    network = adapters(build(), kind, trained=False)
    before = [each.clone() for each in network.parameters()]
    report = network.limit_norms(0.5)
    assert [float(value) for value in report] == [0, 0, 0]
    assert all(map(torch.equal, before, network.parameters()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "q: a layer of class Adapted"),
        ({"layers": {}}, "no layer"),
        ({"path": "norm"}, "norm: a layer of class LayerNorm"),
        ({"path": "conv", "settings": SETTINGS["loha"]}, "conv: .* a plain LoRA"),
        ({"path": "conv", "settings": SETTINGS["dora"]}, "conv: .* a plain LoRA"),
        ({"path": "trained"}, "trained is not frozen"),
        (
            {"path": "o", "settings": SETTINGS["lokr"], "dropouts": Dropouts(neuron=0.1)},
            "no neuron dropout; use rank or module",
        ),
    ],
)
def test_what_cannot_take_an_adapter_says_why(change: dict, message: str) -> None:
    model = build()
    model.norm, model.conv = nn.LayerNorm(8), nn.Conv2d(8, 8, 1)
    model.requires_grad_(False)
    model.trained = nn.Linear(8, 8)
    settings = change.get("settings", SETTINGS["lora"])
    generator = torch.Generator()
    inject(model, {"q": (("q",), settings)}, generator=generator)
    layers = change.get("layers", {"it": ((change.get("path", "q"),), settings)})
    with pytest.raises(ValueError, match=message):
        inject(model, layers, dropouts=change.get("dropouts", Dropouts()), generator=generator)


def test_kinds_can_be_mixed_in_one_network() -> None:
    model = build()
    layers = {"qkv": (FUSED["qkv"], SETTINGS["loha"]), "out": (FUSED["out"], SETTINGS["lokr"])}
    network = inject(model, layers, generator=torch.Generator())
    found = network.weights()
    assert isinstance(found["qkv"], LoHaWeights) and isinstance(found["out"], LoKrWeights)
    assert not network.has_dropout
