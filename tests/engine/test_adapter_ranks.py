from __future__ import annotations

import math

import pytest
import torch
from pack.engine.adapter_ranks import (
    combined,
    decomposed,
    is_matrix,
    lora_of,
    squared_change,
    squared_difference,
)
from pack.engine.adapter_weights import AdapterWeights, FullWeights, LoRAWeights, converted, delta
from pack.engine.low_rank import truncate
from pack.tests.references import random_adapters
from pack.tests.references.random_adapters import Draw
from torch import Tensor

SHAPES = [(24, 16), (16, 24, 3, 3), (12, 8, 1, 2, 2)]
FACTORS = {"lokr of two": 0, "lokr of three": 1, "lokr of four": 2}
KINDS = ["lora", "loha", "lokr of two", "lokr of three", "lokr of four", "full"]


def adapter_of(kind: str, shape: tuple[int, ...], seed: int = 0, rank: int = 3) -> AdapterWeights:
    draw = Draw(seed)
    weight = draw(*shape, std=1.0)
    if kind == "full":
        return FullWeights(draw(*shape, std=0.5))
    if kind == "lora":
        return random_adapters.lora(weight, draw, rank)
    if kind == "loha":
        return random_adapters.loha(weight, draw, rank)
    return random_adapters.lokr(weight, draw, rank, factors=FACTORS[kind])


def exactly(adapter: AdapterWeights) -> Tensor:
    return delta(adapter, torch.float64).flatten(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [None, 4])
def test_singular_values_are_those_of_the_formed_difference(
    kind: str, shape: tuple[int, ...], limit: int | None
) -> None:
    adapter = adapter_of(kind, shape)
    matrix = exactly(adapter)
    singular = torch.linalg.svdvals(matrix)

    found = decomposed(adapter, limit=limit, generator=torch.Generator().manual_seed(0))

    count = len(found.singular_R)
    assert limit is None or count >= min(limit, torch.linalg.matrix_rank(matrix))
    # A difference that is formed is formed in float32.
    torch.testing.assert_close(found.singular_R, singular[:count], rtol=1e-5, atol=1e-5)
    norm = float(matrix.square().sum())
    assert found.squared_norm == pytest.approx(norm, rel=1e-5)
    kept = min(4, count)
    approximation = (found.left_OR * found.singular_R)[:, :kept] @ found.right_RI[:kept]
    error = float((matrix - approximation).square().sum() / norm)
    best = float(singular[kept:].square().sum() / norm)
    assert math.sqrt(error) == pytest.approx(math.sqrt(best), rel=1e-4, abs=1e-5)


def test_a_negative_scale_turns_the_sign_of_a_kronecker_product() -> None:
    adapter = adapter_of("lokr of three", (24, 16))
    turned = type(adapter)(**{**vars(adapter), "alpha": -adapter.alpha})
    found = decomposed(turned, limit=None, generator=torch.Generator())
    product = (found.left_OR * found.singular_R) @ found.right_RI
    torch.testing.assert_close(product, exactly(turned), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_a_combined_adapter_adds_the_weighted_sum(
    first: str, second: str, shape: tuple[int, ...]
) -> None:
    parts = [(adapter_of(first, shape, 0), 0.75), (adapter_of(second, shape, 1, rank=2), -1.5)]
    expected = sum(weight * exactly(part) for part, weight in parts)
    result = combined(parts)
    torch.testing.assert_close(exactly(result).float(), expected.float(), rtol=1e-4, atol=1e-5)
    assert result.shape == shape
    if first == second == "lora":
        assert isinstance(result, LoRAWeights)


def test_ranks_add_up_and_are_never_higher_than_the_weight_needs() -> None:
    parts = [(adapter_of("lora", (24, 16), seed, rank=5), 1.0) for seed in range(5)]
    assert combined(parts[:3]).rank == 15
    whole = combined(parts)
    assert isinstance(whole, LoRAWeights) and whole.rank == 16
    expected = sum(exactly(part) for part, _ in parts)
    torch.testing.assert_close(exactly(whole), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.37, 0.37), (-0.37, 0.37)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equal_weights_and_scales_need_no_rounding(
    weights: tuple[float, float], dtype: torch.dtype
) -> None:
    parts = [
        (converted(adapter_of("lora", (24, 16), seed), dtype), weight)
        for seed, weight in enumerate(weights)
    ]
    exact = combined(parts)
    stored = converted(exact, dtype)
    assert squared_difference(exact, stored) <= 1e-14 * squared_change(exact)
    expected = sum(weight * exactly(part) for part, weight in parts)
    torch.testing.assert_close(exactly(stored), expected, rtol=1e-6, atol=1e-7)


def test_a_layer_that_does_nothing_combines_with_others() -> None:
    nothing = LoRAWeights(torch.ones(2, 16), torch.ones(24, 2), alpha=0.0)
    assert not exactly(combined([(nothing, 1.0)])).any()
    other = adapter_of("lora", (24, 16))
    torch.testing.assert_close(exactly(combined([(nothing, 1.0), (other, 1.0)])), exactly(other))


def test_differences_of_biases_add_up_beside_those_of_the_weight() -> None:
    lora = adapter_of("lora", (24, 16))
    biased = type(lora)(**{**vars(lora), "bias_diff": torch.arange(24.0)})
    only_bias = FullWeights(None, torch.ones(24))
    result = combined([(biased, 2.0), (only_bias, -1.0)])
    assert isinstance(result, LoRAWeights)
    assert torch.equal(result.bias_diff, 2 * torch.arange(24.0) - 1)
    torch.testing.assert_close(exactly(result), 2 * exactly(lora), rtol=1e-6, atol=1e-6)
    nothing_else = combined([(only_bias, 3.0)])
    assert nothing_else.shape is None and torch.equal(
        nothing_else.bias_diff, torch.full((24,), 3.0)
    )
    assert squared_change(nothing_else) == 0


def test_a_magnitude_is_refused() -> None:
    lora = adapter_of("lora", (24, 16))
    dora = type(lora)(**{**vars(lora), "magnitude": torch.ones(1, 16)})
    with pytest.raises(ValueError, match="magnitude"):
        combined([(dora, 1.0), (lora, 1.0)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_those_of_the_formed_differences(kind: str, shape: tuple[int, ...]) -> None:
    adapter = adapter_of(kind, shape)
    found = decomposed(adapter, limit=None, generator=torch.Generator()).truncated(2)
    for stored in (
        lora_of(found, shape=shape, dtype=torch.bfloat16),
        converted(adapter, torch.bfloat16),
    ):
        expected = float((exactly(adapter) - exactly(stored)).square().sum())
        # float32 products limit the difference of two that are nearly the same.
        norm = squared_change(adapter)
        assert squared_difference(adapter, stored) == pytest.approx(expected, rel=1e-3, abs=1e-10)
        assert norm == pytest.approx(float(exactly(adapter).square().sum()), rel=1e-5)


def test_a_lora_of_factors_has_the_shape_of_the_weight_and_scale_one() -> None:
    draw = Draw(0)
    found = truncate(draw(12, 5, std=1.0), draw(5, 8 * 4, std=1.0), rank=3)
    lora = lora_of(found, shape=(12, 8, 1, 2, 2), dtype=torch.float32)
    assert lora.shape == (12, 8, 1, 2, 2) and lora.scale == 1 and lora.rank == 3
    torch.testing.assert_close(
        exactly(lora), found.up_OR.double() @ found.down_RI.double(), rtol=1e-6, atol=1e-6
    )


def test_scales_and_biases_are_no_matrices() -> None:
    assert not is_matrix(FullWeights(torch.ones(3)))
    assert not is_matrix(FullWeights(None, torch.ones(3)))
    assert is_matrix(FullWeights(torch.ones(3, 2)))
    assert squared_change(FullWeights(torch.full((3,), 2.0))) == pytest.approx(12)
