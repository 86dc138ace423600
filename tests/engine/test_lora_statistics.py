"""Tests of the numbers about the layers of a LoRA, against matrices that are formed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pack.engine import lora_statistics
from pack.engine.adapter_weights import (
    AdapterWeights,
    FullWeights,
    LoHaWeights,
    LoKrWeights,
    LoRAWeights,
    delta,
    merged,
)
from pack.engine.lora_statistics import (
    NO_EFFECT,
    NOT_FINITE,
    SATURATED,
    ZERO_ALPHA,
    grouped,
    layer_statistics,
    statistics_as_json,
    total,
)
from torch import Tensor


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(seed: int = 0, *kernel: int) -> LoRAWeights:
    return LoRAWeights(normal(seed, 4, 20, *kernel), normal(seed + 1, 24, 4), alpha=2.0)


def loha(seed: int = 0, rank: int = 2) -> LoHaWeights:
    a, b = (normal(seed + n, 24, rank) for n in (1, 2))
    c, d = (normal(seed + n, rank, 20) for n in (3, 4))
    return LoHaWeights(a, c, b, d, alpha=3.0)


def lokr(*, w1_pair: bool, w2_pair: bool) -> LoKrWeights:
    w1 = (normal(1, 4, 2), normal(2, 2, 5)) if w1_pair else normal(1, 4, 5)
    w2 = (normal(3, 6, 2), normal(4, 2, 4)) if w2_pair else normal(3, 6, 4)
    return LoKrWeights(w1, w2, alpha=-1.0)


ADAPTERS: dict[str, Callable[[], AdapterWeights]] = {
    "LoRA": lora,
    "LoRA of a convolution": lambda: lora(5, 3, 3),
    "LoRA with a negative alpha": lambda: replace(lora(), alpha=-7.0),
    "LoRA of a higher rank than the weight": lambda: LoRAWeights(
        normal(0, 30, 20), normal(1, 24, 30), alpha=1.0
    ),
    "LoHa": loha,
    "LoHa of a high rank": lambda: loha(rank=6),
    "LoKr": lambda: lokr(w1_pair=False, w2_pair=False),
    "LoKr with a product": lambda: lokr(w1_pair=False, w2_pair=True),
    "LoKr of two products": lambda: lokr(w1_pair=True, w2_pair=True),
    "full difference": lambda: FullWeights(normal(0, 24, 20)),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_norm_and_spread_are_those_of_the_matrix_itself(name: str) -> None:
    adapter = ADAPTERS[name]()
    found = layer_statistics("blocks.3.q", adapter)
    matrix = delta(adapter, torch.float64).flatten(1)
    singular = torch.linalg.svdvals(matrix)
    energy = singular.square()
    # Factors of float32 are exact in float64; a LoHa's are multiplied in float32.
    near = pytest.approx
    assert found.norm == near(float(matrix.norm()), rel=1e-6)
    assert found.largest == near(float(singular[0]), rel=1e-6)
    assert found.effective_rank == near(float(energy.sum() ** 2 / (energy**2).sum()), rel=1e-6)
    parts = energy.cumsum(0) / energy.sum()
    assert found.energy_rank is not None
    assert parts[found.energy_rank - 1] >= 0.99
    assert found.energy_rank == 1 or parts[found.energy_rank - 2] < 0.99
    assert found.shape == tuple(delta(adapter).shape)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_equal_singular_values_have_their_number_as_effective_rank(count: int) -> None:
    basis = torch.linalg.qr(normal(0, 16, 16)).Q
    adapter = LoRAWeights(basis[:count], basis[:, :count] * 5, alpha=1.0)
    found = layer_statistics("q", adapter)
    assert found.effective_rank == pytest.approx(count, rel=1e-5)
    assert found.energy_rank == count


def test_scale_does_not_change_how_a_layer_is_spread() -> None:
    small, large = (layer_statistics("q", replace(lora(), alpha=a)) for a in (0.5, 64.0))
    assert large.norm == pytest.approx(128 * small.norm)
    assert large.effective_rank == pytest.approx(small.effective_rank)
    assert large.energy_rank == small.energy_rank


def test_what_the_layer_is_made_of() -> None:
    adapter = replace(lora(), down=lora().down.bfloat16(), up=lora().up.bfloat16())
    found = layer_statistics("q", adapter)
    assert (found.kind, found.rank, found.alpha, found.scale) == ("LoRA", 4, 2.0, 0.5)
    assert (found.dtype, found.num_values, found.num_bytes) == ("bfloat16", 176, 352)


def test_a_difference_of_a_bias_or_a_norm_has_a_norm_but_no_singular_values() -> None:
    scale = layer_statistics("norm", FullWeights(torch.tensor([3.0, 4.0])))
    bias = layer_statistics("q", FullWeights(None, torch.tensor([3.0, 4.0])))
    for found in (scale, bias):
        assert found.norm == 5 and not found.problems
        assert found.largest is found.effective_rank is found.energy_rank is found.rank is None


def test_a_large_matrix_without_small_factors_is_not_decomposed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lora_statistics, "_LONGEST_WHOLE", 10)
    for adapter in (FullWeights(normal(0, 24, 20)), loha(rank=6)):
        found = layer_statistics("q", adapter)
        assert found.largest is None
        assert found.norm == pytest.approx(float(delta(adapter).norm()), rel=1e-5)
    assert layer_statistics("q", loha(rank=2)).largest is not None


# The weight


def test_the_change_is_compared_with_the_weight() -> None:
    weight = normal(9, 24, 20)
    found = layer_statistics("q", lora(), weight)
    expected = float(delta(lora()).norm() / weight.norm())
    assert found.relative_norm == pytest.approx(expected, rel=1e-5)
    assert layer_statistics("q", lora()).relative_norm is None


def test_a_magnitude_counts_in_what_happens_to_the_weight() -> None:
    weight = normal(9, 24, 20)
    adapter = replace(lora(), magnitude=weight.norm(dim=0, keepdim=True) * 1.5)
    found = layer_statistics("q", adapter, weight)
    assert found.kind == "LoRA, DoRA"
    assert found.norm == pytest.approx(float(delta(lora()).norm()), rel=1e-5)
    change = float((merged(weight, adapter) - weight).norm())
    assert found.relative_norm == pytest.approx(change / float(weight.norm()), rel=1e-5)


def test_a_weight_of_zeros_is_infinitely_far_from_any_change() -> None:
    assert layer_statistics("q", lora(), torch.zeros(24, 20)).relative_norm == math.inf


# Problems


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["up", "down"])
def test_a_number_that_is_not_finite_is_found(bad: float, field: str) -> None:
    tensor = getattr(lora(), field).clone()
    tensor[0, 0] = bad
    found = layer_statistics("q", replace(lora(), **{field: tensor}))
    assert found.problems == (NOT_FINITE,)
    assert math.isnan(found.norm) and found.largest is None


def test_an_alpha_that_is_not_finite_is_found() -> None:
    assert layer_statistics("q", replace(lora(), alpha=math.nan)).problems == (NOT_FINITE,)


def test_a_value_at_the_limit_of_half_precision_is_found() -> None:
    up = lora().up.half()
    assert not layer_statistics("q", replace(lora(), up=up)).problems
    up[2, 1] = -65504
    assert layer_statistics("q", replace(lora(), up=up)).problems == (SATURATED,)


def test_layers_that_do_nothing_are_found() -> None:
    untrained = replace(lora(), up=torch.zeros(24, 4))
    assert layer_statistics("q", untrained).problems == (NO_EFFECT,)
    assert layer_statistics("q", replace(lora(), alpha=0.0)).problems == (ZERO_ALPHA,)
    with_bias = replace(untrained, bias_diff=torch.ones(24))
    assert not layer_statistics("q", with_bias).problems
    assert layer_statistics("q", untrained).effective_rank == 0
    assert layer_statistics("q", untrained).energy_rank == 0


# Together


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("double_blocks.12.img_attn.qkv", ("double_blocks", 12, "img_attn.qkv")),
        ("txt_in.refiner.blocks.1.mlp.0", ("txt_in.refiner.blocks", 1, "mlp.0")),
        ("img_in", ("", -1, "img_in")),
    ],
)
def test_a_name_says_where_the_layer_is(name: str, place: tuple[str, int, str]) -> None:
    assert layer_statistics(name, lora()).place == place


def test_the_total_is_that_of_all_changes_beside_each_other() -> None:
    weight = normal(9, 24, 20)
    layers = [layer_statistics(f"blocks.{n}.q", lora(10 * n), weight * (n + 1)) for n in range(3)]
    found = total(layers)
    changes = torch.cat([delta(lora(10 * n)) for n in range(3)])
    weights = torch.cat([weight * (n + 1) for n in range(3)])
    assert found.num_layers == 3
    assert found.norm == pytest.approx(float(changes.norm()), rel=1e-5)
    assert found.relative_norm == pytest.approx(float(changes.norm() / weights.norm()), rel=1e-5)
    assert found.largest == max(layer.largest or 0 for layer in layers)


def test_layers_are_grouped_in_the_order_in_which_they_come() -> None:
    names = ["b.1.q", "b.0.q", "b.1.k", "x"]
    groups = grouped([layer_statistics(n, lora()) for n in names], lambda x: x.place.block)
    assert {name: [x.name for x in each] for name, each in groups.items()} == {
        "b.1": ["b.1.q", "b.1.k"],
        "b.0": ["b.0.q"],
        "outside of blocks": ["x"],
    }


def test_statistics_become_json_without_nan() -> None:
    broken = replace(lora(), alpha=math.nan)
    layers = [layer_statistics("a.0.q", lora()), layer_statistics("a.1.q", broken)]
    record = json.loads(
        statistics_as_json(layers, {"path": "x"}),
        parse_constant=lambda word: pytest.fail(f"{word} is no JSON"),
    )
    assert record["path"] == "x" and record["total"]["num_layers"] == 2
    assert record["layers"][0]["norm"] == layers[0].norm
    assert record["layers"][1]["norm"] is None
    assert record["layers"][1]["problems"] == [NOT_FINITE]
