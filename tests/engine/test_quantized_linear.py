from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from pack.engine import quantized_linear
from pack.engine.quantize import MODES, empty, quantize
from pack.engine.quantized_linear import QuantizedLinear
from pack.engine.workspace import Workspace
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(in_features: int = 128, out_features: int = 96, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, bias=bias)
    layer.weight.data = normal(out_features, in_features, seed=1) * 0.1
    if bias:
        layer.bias.data = normal(out_features, seed=2)
    return layer


def both_ways(layer: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    output = layer(x)
    output.backward(grad)
    assert x.grad is not None
    return output.detach(), x.grad


def kept_tensors(layer: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """What autograd keeps for the backward pass of the layer."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        layer(x)
    return kept


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", ["e4m3", "e5m2", "int8"])
def test_output_and_gradient_are_exactly_those_of_the_restored_weight(
    format: str, mode: str, bias: bool, dtype: torch.dtype
) -> None:
    layer = QuantizedLinear.from_linear(linear(bias=bias), format=format, mode=mode)
    weight = layer.dequantized(dtype)
    assert weight.dtype == dtype
    known_bias = None if layer.bias is None else layer.bias.to(dtype)
    x, grad = normal(2, 7, 128).to(dtype), normal(2, 7, 96, seed=3).to(dtype)
    output, gradient = both_ways(layer, x, grad)
    expected, wanted = both_ways(lambda x: F.linear(x, weight, known_bias), x, grad)
    assert torch.equal(output, expected) and torch.equal(gradient, wanted)


@pytest.mark.parametrize("workspace", [None, Workspace()])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk", [1, 96 * 64, 5 * 128, 10**9])
def test_some_rows_or_columns_at_once_give_the_same(
    chunk: int, mode: str, bias: bool, workspace: Workspace | None
) -> None:
    # In float64 different orders of the same sums agree to 1e-14.
    stored = quantize(linear().weight, mode=mode)
    offset = normal(96, seed=2).double() if bias else None
    layer = QuantizedLinear(stored, offset, chunk=chunk, workspace=workspace)
    x, grad = normal(2, 7, 128).double(), normal(2, 7, 96, seed=3).double()
    output, gradient = both_ways(layer, x, grad)
    weight = layer.dequantized(torch.float64)
    expected, wanted = both_ways(lambda x: F.linear(x, weight, offset), x, grad)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradient, wanted)


def test_the_gradient_agrees_with_finite_differences() -> None:
    layer = QuantizedLinear(quantize(linear(64, 3).weight), normal(3).double(), chunk=64)
    x = normal(2, 64).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("workspace", [None, Workspace()])
def test_nothing_but_codes_and_scales_is_kept_for_the_backward_pass(
    workspace: Workspace | None, chunk: int | None
) -> None:
    layer = QuantizedLinear(quantize(linear().weight), chunk=chunk, workspace=workspace)
    resident = {layer.codes.data_ptr(), layer.scale.data_ptr()}
    kept = kept_tensors(layer, normal(5, 128).requires_grad_())
    assert {tensor.data_ptr() for tensor in kept} == resident


def test_layers_that_share_a_workspace_do_not_disturb_each_other() -> None:
    apart = nn.Sequential(*(QuantizedLinear.from_linear(linear(64, 64)) for _ in range(3)))
    together = copy.deepcopy(apart)
    workspace = Workspace()
    for layer in together:
        layer.workspace = workspace
    x, grad = normal(5, 64), normal(5, 64, seed=3)
    for a, b in zip(both_ways(apart, x, grad), both_ways(together, x, grad), strict=True):
        assert torch.equal(a, b)


def test_the_layer_works_where_nothing_has_a_gradient() -> None:
    layer = QuantizedLinear.from_linear(linear())
    output = layer(normal(128))
    assert output.shape == (96,) and not output.requires_grad
    assert not any(True for _ in layer.parameters())


def test_gradient_checkpointing_changes_nothing() -> None:
    block = nn.Sequential(
        QuantizedLinear.from_linear(linear(64, 96)),
        nn.GELU(),
        QuantizedLinear.from_linear(linear(96, 64)),
    )
    x, grad = normal(5, 64), normal(5, 64, seed=3)
    plain = both_ways(block, x, grad)
    again = both_ways(lambda x: checkpoint(block, x, use_reentrant=False), x, grad)
    assert torch.equal(plain[0], again[0]) and torch.equal(plain[1], again[1])


def test_under_autocast_it_computes_in_the_type_of_autocast() -> None:
    layer = QuantizedLinear.from_linear(linear())
    x = normal(5, 128).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert torch.equal(output, layer(x.bfloat16()))
    output.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.parametrize("opaque", [("cpu",), ()])
@pytest.mark.parametrize("mode", ["block", "tensor"])
def test_compiled_it_is_one_graph_that_keeps_no_restored_weight(
    mode: str, opaque: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_linear, "_OPAQUE_FORWARD", opaque)
    layer = QuantizedLinear.from_linear(linear(), mode=mode)
    block = nn.Sequential(nn.Tanh(), layer, nn.GELU())
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x, grad = normal(5, 128), normal(5, 96, seed=3)
    for a, b in zip(both_ways(compiled, x, grad), both_ways(block, x, grad), strict=True):
        torch.testing.assert_close(a, b)
    for tensor in kept_tensors(compiled, x.requires_grad_()):
        assert tensor.shape != layer.codes.shape or tensor.dtype == layer.codes.dtype


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half().cpu()])
def test_codes_and_scales_keep_their_types(convert: Callable[[nn.Module], nn.Module]) -> None:
    layer = QuantizedLinear.from_linear(linear())
    before = layer.dequantized()
    convert(nn.Sequential(layer))
    assert layer.codes.dtype == torch.float8_e4m3fn and layer.scale.dtype == torch.float32
    assert layer.bias is not None and layer.bias.dtype in (torch.bfloat16, torch.float16)
    assert torch.equal(layer.dequantized(), before)


def test_a_layer_without_values_is_filled_from_a_state_dict() -> None:
    full = QuantizedLinear.from_linear(linear())
    hollow = QuantizedLinear.from_linear(linear().to("meta"))
    assert all(tensor.is_meta for tensor in hollow.state_dict().values())
    hollow.load_state_dict(full.state_dict(), strict=True, assign=True)
    assert torch.equal(hollow(normal(5, 128)), full(normal(5, 128)))
    placed = QuantizedLinear(empty((96, 128), device="meta"), torch.empty(96, device="meta"))
    placed.to_empty(device="cpu").load_state_dict(full.state_dict(), strict=True)
    assert torch.equal(placed(normal(5, 128)), full(normal(5, 128)))


def test_without_values_it_still_says_what_shape_comes_out() -> None:
    layer = QuantizedLinear(empty((96, 128), device="meta"))
    assert layer(torch.empty(2, 7, 128, device="meta")).shape == (2, 7, 96)


@pytest.mark.parametrize("mode", MODES)
def test_another_weight_is_rounded_in_the_same_way(mode: str) -> None:
    layer = QuantizedLinear.from_linear(
        linear(), format="e5m2", mode=mode, block_size=32, scale_dtype=torch.bfloat16
    )
    other = normal(96, 128, seed=5)
    memory = layer.codes.data_ptr()
    layer.requantize(other)
    expected = quantize(other, format="e5m2", mode=mode, block_size=32, scale_dtype=torch.bfloat16)
    assert layer.codes.data_ptr() == memory
    assert torch.equal(layer.codes.float(), expected.codes.float())
    assert torch.equal(layer.scale, expected.scale)
    with pytest.raises(ValueError, match="not the shape"):
        layer.requantize(normal(96, 64))


def test_a_copy_computes_the_same() -> None:
    model = nn.Sequential(QuantizedLinear.from_linear(linear()))
    assert torch.equal(copy.deepcopy(model)(normal(5, 128)), model(normal(5, 128)))


def test_it_says_what_it_is() -> None:
    text = str(QuantizedLinear.from_linear(linear(), mode="channel"))
    assert text == (
        "QuantizedLinear(in_features=128, out_features=96, bias=True, format=e4m3, mode=channel)"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["e4m3", "int8"])
def test_a_gpu_is_never_waited_for(format: str) -> None:
    layer = QuantizedLinear.from_linear(linear().cuda(), format=format)
    x = normal(5, 128).cuda().requires_grad_()
    grad = normal(5, 96, seed=3).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(x.grad, grad @ layer.dequantized())
