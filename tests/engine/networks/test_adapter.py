"""What holds for adapters of every kind."""

from __future__ import annotations

import copy

import pytest
import torch
from pack.engine.adapter_weights import delta
from pack.engine.networks.network import Network, inject
from pack.engine.networks.settings import Dropouts
from pack.engine.quantized_linear import QuantizedLinear
from pack.tests.engine.networks.layers import (
    FUSED,
    KINDS,
    SETTINGS,
    adapters,
    build,
    merged_model,
)
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

ALL_KINDS = pytest.mark.parametrize("kind", KINDS)


def gradients(network: Network) -> list[torch.Tensor]:
    return [each.grad for each in network.parameters() if each.grad is not None]


@ALL_KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_does_not_change_at_initialisation(kind: str, dtype: torch.dtype) -> None:
    x, model = torch.randn(2, 7, 8, dtype=dtype), build(dtype)
    before = model(x)
    adapters(model, kind, trained=False)
    assert torch.equal(model(x), before)


@ALL_KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_output_is_that_of_the_merged_weights(kind: str, dtype: torch.dtype) -> None:
    x, model = torch.randn(2, 7, 8, dtype=dtype), build(dtype)
    network = adapters(model, kind)
    expected = merged_model(build(torch.float64), network.weights())(x.double())
    # A few roundings of numbers of size 1 to 10: of weight, product, sum and sine.
    epsilon = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(model(x).double(), expected, rtol=16 * epsilon, atol=16 * epsilon)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dora"])
def test_gradients_are_those_of_the_merged_weights_and_reach_only_the_adapters(kind: str) -> None:
    """Those of a DoRA are in `test_decomposition`: a part counts as a constant there."""
    model = build(torch.float64)
    network = adapters(model, kind)
    model.double()
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)

    def plain(x: torch.Tensor) -> torch.Tensor:
        """The textbook form, differentiated by PyTorch."""
        weights = {name: _differentiable_delta(adapter) for name, adapter in pairs}
        base = build(torch.float64)
        qkv = torch.cat([base.q.weight, base.k.weight, base.v.weight]) + weights["qkv"]
        bias = torch.cat([base.q.bias, base.k.bias, base.v.bias])
        return F.linear(F.linear(x, qkv, bias).sin(), base.o.weight + weights["out"])

    pairs = list(network.adapters.items())
    wanted = [x, *network.parameters()]
    expected = torch.autograd.grad(plain(x).square().sum(), wanted)
    model(x).square().sum().backward()
    assert {name for name, each in model.named_parameters() if each.grad is not None} == {
        name for name, _ in model.named_parameters() if "adapter." in name
    }
    for found, exact in zip([each.grad for each in wanted], expected, strict=True):
        torch.testing.assert_close(found, exact)


def _differentiable_delta(adapter: nn.Module) -> torch.Tensor:
    found = dict(adapter.named_parameters())
    scale = adapter.scale
    if "lora_A" in found:
        return scale * found["lora_B"] @ found["lora_A"]
    if "w1" not in found:
        first, second = (found[f"{name}_a"] @ found[f"{name}_b"] for name in ("w1", "w2"))
        return scale * first * second
    second = found["w2"] if "w2" in found else found["w2_a"] @ found["w2_b"]
    return scale * torch.kron(found["w1"], second)


@ALL_KINDS
def test_a_bf16_model_keeps_float32_adapters_with_float32_gradients(kind: str) -> None:
    model = build(torch.bfloat16)
    network = adapters(model, kind)
    output = model(torch.randn(2, 7, 8, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    found = gradients(network)
    assert len(found) == len(list(network.parameters()))
    assert all(each.dtype == torch.float32 and each.isfinite().all() for each in found)


@ALL_KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_gradients_are_those_of_float32_to_rounding(kind: str, dtype: torch.dtype) -> None:
    def found(dtype: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(2)
        x = torch.randn(2, 7, 8).to(dtype).requires_grad_()
        model = build(torch.bfloat16).to(dtype)
        network = adapters(model, kind)
        for adapter in network.adapters.values():
            adapter.to(torch.promote_types(dtype, torch.float32))
        model(x).square().mean().backward()
        assert x.grad is not None
        return [x.grad.double(), *(each.double() for each in gradients(network))]

    tolerance = 32 * torch.finfo(dtype).eps
    for rough, exact in zip(found(dtype), found(torch.float64), strict=True):
        assert (rough - exact).norm() <= tolerance * exact.norm()


@ALL_KINDS
@pytest.mark.parametrize("dropouts", [Dropouts(), Dropouts(rank=0.5, module=0.5)])
def test_gradient_checkpointing_does_not_change_a_gradient(kind: str, dropouts: Dropouts) -> None:
    def found(*, checkpointed: bool) -> list[torch.Tensor]:
        model = build()
        network = adapters(model, kind, dropouts=dropouts)
        x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
        torch.manual_seed(4)
        out = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        assert isinstance(out, torch.Tensor) and x.grad is None
        torch.rand(5)
        out.square().mean().backward()
        return [*gradients(network), *([x.grad] if x.grad is not None else [])]

    assert all(map(torch.equal, found(checkpointed=True), found(checkpointed=False)))


@ALL_KINDS
@pytest.mark.parametrize("dropouts", [Dropouts(), Dropouts(rank=0.5, module=0.5)])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_has_no_break_and_the_same_gradients(
    kind: str, dropouts: Dropouts, backend: str
) -> None:
    torch._dynamo.reset()
    model = build()
    network = adapters(model, kind, dropouts=dropouts)
    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    x = torch.randn(2, 7, 8)
    results: list[list[torch.Tensor]] = []
    for each in (model, compiled):
        torch.manual_seed(5)
        given = x.clone().requires_grad_()
        trained = [parameter for parameter in each.parameters() if parameter.requires_grad]
        out = each(given)
        results.append([out, *torch.autograd.grad(out.square().mean(), [given, *trained])])
    assert len(results[0]) == 2 + len(list(network.parameters()))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@ALL_KINDS
def test_disabled_adapters_leave_the_model_bit_for_bit_also_when_compiled(kind: str) -> None:
    torch._dynamo.reset()
    x, model = torch.randn(2, 7, 8), build()
    before = model(x)
    network = adapters(model, kind)
    with_adapters = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for run in (model, compiled):
        with network.disabled():
            inside = run(x)
            with network.disabled():
                pass
            assert torch.equal(run(x), before)
        assert torch.equal(inside, before) and not inside.requires_grad
        assert torch.equal(run(x), with_adapters) and not torch.equal(with_adapters, before)


@ALL_KINDS
def test_a_model_without_data_runs_forward_and_backward(kind: str) -> None:
    """As the estimate of memory does."""
    model = build().to("meta")
    network = adapters(model, kind, trained=False, dropouts=Dropouts(rank=0.1, module=0.1))
    x = torch.empty(2, 7, 8, device="meta", requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and x.grad.is_meta
    assert all(each.is_meta for each in gradients(network))


@ALL_KINDS
def test_copying_a_model_copies_its_adapters(kind: str) -> None:
    x, model = torch.randn(2, 7, 8), build()
    network = adapters(model, kind)
    other = copy.deepcopy(model)
    expected = model(x)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(other(x), expected)


class Doubled(nn.Linear):
    """A linear layer of another class."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


@ALL_KINDS
def test_any_layer_that_is_linear_takes_an_adapter(kind: str) -> None:
    torch.manual_seed(0)
    x, base = torch.randn(3, 7, 8), Doubled(8, 6).requires_grad_(False)
    model = nn.Sequential(base)
    layers = {"it": (("0",), SETTINGS[kind])}
    network = inject(model, layers, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x), base(x))
    if kind == "dora":
        return
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    change = delta(network.weights()["it"])
    torch.testing.assert_close(model(x), base(x) + x @ change.t(), rtol=1e-4, atol=1e-4)


@ALL_KINDS
@pytest.mark.parametrize("is_compiled", [False, True])
def test_quantized_layers_take_adapters(kind: str, is_compiled: bool) -> None:
    x, model, plain = torch.randn(2, 7, 8), build(), build()
    for path in (*FUSED["qkv"], *FUSED["out"]):
        stored = QuantizedLinear.from_linear(plain.get_submodule(path), mode="tensor")
        model.set_submodule(path, stored)
        plain.get_submodule(path).weight.copy_(stored.dequantized())
    networks = [adapters(each, kind) for each in (model, plain)]
    run = model
    if is_compiled:
        torch._dynamo.reset()
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for each in (run, plain):
        given = x.clone().requires_grad_()
        out = each(given)
        out.square().mean().backward()
        results.append([out, given.grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(*map(gradients, networks), strict=True):
        torch.testing.assert_close(found, expected)
