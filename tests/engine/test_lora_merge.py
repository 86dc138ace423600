from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pack.engine import lora_merge
from pack.engine.adapter_weights import (
    AdapterWeights,
    FullWeights,
    LoHaWeights,
    LoKrWeights,
    LoRAWeights,
)
from pack.engine.errors import CheckpointError
from pack.engine.lora_merge import MergeTally, Weighted, add_adapters, merge_into, part_of
from torch import Tensor, nn

RANK = 3


def draw(*shape: int, seed: int, std: float = 0.2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def lora(out: int, into: tuple[int, ...], seed: int = 0) -> LoRAWeights:
    return LoRAWeights(draw(RANK, *into, seed=seed), draw(out, RANK, seed=seed + 1), alpha=1.5)


def loha(out: int, into: tuple[int, ...], seed: int = 0) -> LoHaWeights:
    a, b, c, d = (
        draw(*shape, seed=seed + i, std=0.5)
        for i, shape in enumerate([(out, RANK), (RANK, *into)] * 2)
    )
    return LoHaWeights(a, b, c, d, alpha=2.0)


def lokr(out: int, into: tuple[int, ...], seed: int = 0) -> LoKrWeights:
    return LoKrWeights(
        draw(2, 4, seed=seed),
        (draw(out // 2, RANK, seed=seed + 1), draw(RANK, into[0] // 4, *into[1:], seed=seed + 2)),
        alpha=6.0,
    )


def reference_delta(adapter: AdapterWeights) -> Tensor:
    """From the papers' formulas, element by element in float64."""
    if isinstance(adapter, FullWeights):
        assert adapter.diff is not None
        return adapter.diff.double()
    if isinstance(adapter, LoRAWeights):
        product = torch.einsum("or,r...->o...", adapter.up.double(), adapter.down.double())
        return product * adapter.alpha / RANK
    if isinstance(adapter, LoHaWeights):
        first = torch.einsum("or,r...->o...", adapter.w1_a.double(), adapter.w1_b.double())
        second = torch.einsum("or,r...->o...", adapter.w2_a.double(), adapter.w2_b.double())
        return first * second * adapter.alpha / RANK
    assert isinstance(adapter.w1, Tensor) and isinstance(adapter.w2, tuple)
    second = torch.einsum("or,r...->o...", adapter.w2[0].double(), adapter.w2[1].double())
    blocks = [torch.cat([one * second for one in row], dim=1) for row in adapter.w1.double()]
    return torch.cat(blocks) * adapter.alpha / RANK


def reference_merged(weight: Tensor, adapter: AdapterWeights, multiplier: float) -> Tensor:
    """In float64, with DoRA's magnitude along rows or columns."""
    base = weight.double()
    trained = base + reference_delta(adapter)
    if not isinstance(adapter, FullWeights) and adapter.magnitude is not None:
        flat = trained.transpose(0, 1) if adapter.magnitude.shape[0] == 1 else trained
        norm = flat.flatten(1).norm(dim=1)
        ratio = adapter.magnitude.double().flatten() / norm
        shape = [-1 if size > 1 else 1 for size in adapter.magnitude.shape]
        trained = trained * ratio.view(*shape, *[1] * (trained.dim() - 2))
    return base + multiplier * (trained - base)


KINDS = {
    "lora": lora,
    "loha": loha,
    "lokr": lokr,
    "full": lambda out, into, seed=0: FullWeights(draw(out, *into, seed=seed)),
    "dora of rows": lambda out, into, seed=0: replace(
        lora(out, into, seed), magnitude=draw(out, 1, seed=seed + 9).abs() + 0.5
    ),
    "dora of columns": lambda out, into, seed=0: replace(
        lora(out, into, seed), magnitude=draw(1, into[0], seed=seed + 9).abs() + 0.5
    ),
    "lokr with magnitude": lambda out, into, seed=0: replace(
        lokr(out, into, seed), magnitude=draw(out, 1, seed=seed + 9).abs() + 0.5
    ),
}


class Model(nn.Module):
    """A published layer in three uneven parts, a convolution, and a norm."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q = nn.Linear(8, 6, dtype=dtype)
        self.to_k = nn.Linear(8, 2, dtype=dtype)
        self.to_v = nn.Linear(8, 4, bias=False, dtype=dtype)
        self.conv = nn.Conv2d(4, 6, 3, dtype=dtype)
        self.norm = nn.LayerNorm(8, dtype=dtype)


LAYERS = {"qkv": ("to_q", "to_k", "to_v"), "conv": ("conv",), "norm": ("norm",), "q": ("to_q",)}


def weight_of(model: nn.Module, layer: str) -> Tensor:
    return torch.cat([model.get_submodule(name).weight.detach() for name in LAYERS[layer]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", ["qkv", "conv"])
def test_a_merged_weight_is_base_plus_delta_rounded_once(
    layer: str, kind: str, dtype: torch.dtype
) -> None:
    model = Model(dtype)
    before = weight_of(model, layer)
    adapter = KINDS[kind](before.shape[0], tuple(before.shape[1:]))
    expected = reference_merged(before, adapter, -0.7)
    summary = merge_into(model, LAYERS, {layer: adapter}, multiplier=-0.7)
    assert summary.num_layers == 1
    found = weight_of(model, layer)
    assert found.dtype == dtype
    # Half a unit in the last place, and what float32 sums may differ by.
    info = torch.finfo(dtype)
    bound = expected.abs() * info.eps / 2 + info.smallest_normal * info.eps + 2e-6
    assert ((found.double() - expected).abs() <= bound).all()


def test_a_norm_and_a_bias_in_pieces_take_full_differences() -> None:
    model = Model(torch.bfloat16)
    model.to_v.bias = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    norm, bias = (
        model.norm.weight.detach().clone(),
        [module.bias.detach().clone() for module in (model.to_q, model.to_k, model.to_v)],
    )
    before, conv = weight_of(model, "qkv"), model.conv.bias.detach().clone()
    adapters = {
        "norm": FullWeights(draw(8, seed=1), draw(8, seed=2)),
        "qkv": FullWeights(None, draw(12, seed=3)),
        "conv": replace(lora(6, (4, 3, 3)), bias_diff=draw(6, seed=4)),
    }
    merge_into(model, LAYERS, adapters, multiplier=2.0)
    assert torch.equal(model.norm.weight, (norm.float() + 2 * draw(8, seed=1)).bfloat16())
    expected = torch.cat(bias).float() + 2 * draw(12, seed=3)
    found = torch.cat([module.bias for module in (model.to_q, model.to_k, model.to_v)])
    assert torch.equal(found, expected.bfloat16())
    assert torch.equal(weight_of(model, "qkv"), before)
    assert torch.equal(model.conv.bias, (conv.float() + 2 * draw(6, seed=4)).bfloat16())


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        ({"qkw": lora(12, (8,))}, "qkv"),
        ({"qkv": lora(12, (9,))}, "another size"),
        ({"qkv": lora(11, (8,))}, "12 x 8"),
        ({"qkv": FullWeights(None, torch.ones(12))}, "bias"),
        ({"norm": FullWeights(None, torch.ones(7))}, "bias of 7"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(
    adapters: dict[str, AdapterWeights], words: str
) -> None:
    model = Model(torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words) as caught:
        merge_into(model, LAYERS, {"conv": lora(6, (4, 3, 3)), **adapters}, multiplier=1.0)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Halves(nn.Module):
    """Stores its weight in steps of 1/64 and counts what is done with it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("codes", (weight * 64).round().to(torch.int16))
        self.num_writes = 0

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.get_buffer("codes").to(dtype or torch.float32) / 64

    def requantize(self, weight: Tensor) -> None:
        self.num_writes += 1
        self.codes = (weight * 64).round().to(torch.int16)


@pytest.mark.parametrize("kind", ["lora", "lokr", "dora of columns"])
def test_quantized_modules_are_dequantized_changed_and_quantized_again(kind: str) -> None:
    model = Model(torch.float32)
    for name in ("to_q", "to_k"):
        model.set_submodule(name, Halves(model.get_submodule(name).weight.detach()))
    modules = [model.to_q, model.to_k]
    base = torch.cat([*(module.dequantized() for module in modules), model.to_v.weight.detach()])
    adapter = KINDS[kind](12, (8,))
    expected = reference_merged(base, adapter, 0.5)
    summary = merge_into(model, LAYERS, {"qkv": adapter}, multiplier=0.5)
    found = torch.cat([*(module.dequantized() for module in modules), model.to_v.weight.detach()])
    assert (found[:8].double() - expected[:8]).abs().max() <= 1 / 128 + 1e-6
    torch.testing.assert_close(found[8:].double(), expected[8:], rtol=0, atol=1e-6)
    assert [module.num_writes for module in modules] == [1, 1]
    error = (found.double() - expected).norm() / (expected - base.double()).norm()
    assert summary.rounding == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_large_weights_are_changed_in_parts_as_if_they_were_whole(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = draw(12, 8, seed=5)
    adapters = [Weighted(KINDS[kind](12, (8,), seed=s), 0.5) for s in (0, 20)]
    expected = weight.clone()
    add_adapters(expected, adapters, MergeTally())
    monkeypatch.setattr(lora_merge, "_ROWS_VALUES_CPU", 20)
    found = weight.clone()
    add_adapters(found, adapters, MergeTally())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_rounding_is_measured_in_parts_of_the_change() -> None:
    weight = draw(64, 64, seed=0, std=1.0).bfloat16()
    adapter = FullWeights(draw(64, 64, seed=1, std=1e-3))
    before, tally = weight.clone(), MergeTally()
    add_adapters(weight, [Weighted(adapter, 1.0)], tally)
    exact = before.double() + adapter.diff.double()
    expected = (weight.double() - exact).norm() / adapter.diff.double().norm()
    assert tally.rounding() == pytest.approx(float(expected), rel=1e-3)
    assert tally.rounding() > 0.5 and tally.is_finite()
    assert MergeTally().rounding() == 0.0


def test_a_value_that_is_not_finite_shows_in_the_tally() -> None:
    tally = MergeTally()
    weight = torch.full((2, 2), 6e4, dtype=torch.float16)
    add_adapters(weight, [Weighted(FullWeights(torch.full((2, 2), 6e3)), 1.0)], tally)
    assert not tally.is_finite()


def test_rows_of_a_kronecker_product_that_cut_a_factor_are_its_full_difference() -> None:
    adapter = lokr(12, (8,))
    part = part_of(adapter, 1, 5)
    assert isinstance(part, FullWeights) and part.diff is not None
    torch.testing.assert_close(part.diff.double(), reference_delta(adapter)[1:5], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="rows"):
        part_of(replace(adapter, magnitude=torch.ones(1, 8)), 1, 5)
