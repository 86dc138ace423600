from __future__ import annotations

import pytest
import torch
from pack.engine.adapter_weights import merged
from pack.engine.networks.network import inject
from pack.engine.networks.settings import Dropouts, LayerSettings
from torch import nn

LAYERS = {
    "1 x 1": lambda: nn.Conv2d(5, 6, 1),
    "3 x 3": lambda: nn.Conv2d(5, 6, 3, stride=2, padding=1, dilation=2, bias=False),
    "as large as before": lambda: nn.Conv2d(5, 6, 3, padding="same"),
    "around the edge": lambda: nn.Conv2d(5, 6, 3, padding=1, padding_mode="circular"),
    "patches": lambda: nn.Conv3d(5, 6, (1, 2, 2), stride=(1, 2, 2)),
}


def adapted(layer: nn.Module, *, dropouts: Dropouts | None = None):
    model = nn.Sequential(layer).requires_grad_(False)
    layers = {"it": (("0",), LayerSettings("lora", rank=3, alpha=1.5))}
    generator = torch.Generator().manual_seed(1)
    network = inject(model, layers, dropouts=dropouts or Dropouts(), generator=generator)
    return model, network, generator


@pytest.mark.parametrize("name", LAYERS)
def test_a_convolution_acts_and_learns_as_with_merged_weights(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    model, network, generator = adapted(layer)
    model.double()
    x = torch.randn(2, 5, *(8,) * (layer.weight.dim() - 2), dtype=torch.float64)
    x.requires_grad_()
    assert torch.equal(model(x), layer(x))

    with torch.no_grad():
        network.adapters["it"].lora_B.normal_(generator=generator)
    out = model(x)
    lora_A, lora_B = network.parameters()
    change = 0.5 * torch.einsum("or,ri...->oi...", lora_B, lora_A)
    torch.testing.assert_close(merged(layer.weight, network.weights()["it"]), layer.weight + change)
    expected = layer._conv_forward(x, layer.weight + change, layer.bias)
    torch.testing.assert_close(out, expected)
    for found, exact in zip(
        torch.autograd.grad(out.square().sum(), [x, lora_A, lora_B]),
        torch.autograd.grad(expected.square().sum(), [x, lora_A, lora_B]),
        strict=True,
    ):
        torch.testing.assert_close(found, exact)


def test_bf16_convolutions_keep_float32_adapters() -> None:
    model, network, _ = adapted(nn.Conv2d(5, 6, 3).bfloat16())
    out = model(torch.randn(2, 5, 8, 8, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(
        each.grad is not None and each.grad.dtype == torch.float32 for each in network.parameters()
    )


def test_a_convolution_of_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="of one group, not 5"):
        adapted(nn.Conv2d(5, 5, 3, groups=5))


def test_norm_and_loading_know_the_kernel() -> None:
    model, network, generator = adapted(nn.Conv2d(5, 6, 3))
    with torch.no_grad():
        network.adapters["it"].lora_B.normal_(generator=generator)
    norm = merged(torch.zeros(6, 5, 3, 3), network.weights()["it"]).norm()
    assert float(network.limit_norms(1e9).max_norm) == pytest.approx(float(norm), rel=1e-5)
    other_model, other, _ = adapted(model[0].base)
    other.load(network.weights())
    x = torch.randn(2, 5, 8, 8)
    torch.testing.assert_close(other_model(x), model(x))
    assert set(other.named_tensors()) == {"it.A", "it.B"}


def test_a_compiled_convolution_has_no_break() -> None:
    torch._dynamo.reset()
    model, _, _ = adapted(nn.Conv2d(5, 6, 3), dropouts=Dropouts(0.1, 0.1, 0.1))
    x = torch.randn(2, 5, 8, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(compiled(x), expected)
