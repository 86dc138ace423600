from __future__ import annotations

import math

import pytest
import torch
from pack.engine.errors import ConfigError
from pack.engine.low_rank import (
    METHODS,
    Decomposition,
    RankChoice,
    decompose,
    decompose_kronecker,
    decompose_product,
    product_squared_norm,
    rank_for,
    squared_error,
    squared_norm,
    truncate,
)
from torch import Tensor

# (O, I, R): tall, wide, square, a rank larger than one side (a LoHa as a LoRA), than both, and 1.
SHAPES = [(40, 12, 5), (12, 40, 5), (16, 16, 16), (6, 30, 9), (5, 7, 20), (9, 9, 1)]


def factors(shape: tuple[int, int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, columns, rank = shape
    up = torch.randn(rows, rank, generator=generator)
    return up * torch.logspace(0, -2, rank), torch.randn(rank, columns, generator=generator)


def with_spectrum(rows: int, columns: int, singular: Tensor) -> Tensor:
    """A matrix with these singular values, in float64."""
    generator = torch.Generator().manual_seed(1)
    count = len(singular)
    draws = [torch.randn(n, count, generator=generator).double() for n in (rows, columns)]
    left, right = (torch.linalg.qr(draw).Q for draw in draws)
    return (left * singular.double()) @ right.mT


def error(matrix: Tensor, up: Tensor, down: Tensor) -> float:
    matrix = matrix.double()
    return float((matrix - up.double() @ down.double()).norm() / matrix.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 100])
def test_a_truncated_product_is_the_best_approximation(
    shape: tuple[int, int, int], rank: int
) -> None:
    up, down = factors(shape)
    product = up.double() @ down.double()
    left, singular, right = torch.linalg.svd(product, full_matrices=False)
    best = (left[:, :rank] * singular[:rank]) @ right[:rank]

    found = truncate(up, down, rank=rank)

    kept = found.up_OR.shape[1]
    assert kept == found.down_RI.shape[0] == min(rank, *shape)
    # Rounding the factors to float32 moves the product by at most 2 * 2^-24 of |up| |down|.
    bound = 2**-22 * singular[0] * math.sqrt(kept)
    assert (found.up_OR.double() @ found.down_RI.double() - best).norm() <= bound
    torch.testing.assert_close(found.singular_values, singular[:kept], rtol=1e-12, atol=1e-13)
    left_out = singular[kept:].norm() / singular.norm()
    assert found.relative_error == pytest.approx(float(left_out), rel=1e-9, abs=1e-13)


def test_both_sides_carry_the_same_share_of_each_singular_value() -> None:
    up, down = factors((30, 20, 6))
    found = truncate(up, down, rank=4)
    roots = found.singular_values.sqrt().float()
    torch.testing.assert_close(found.up_OR.norm(dim=0), roots)
    torch.testing.assert_close(found.down_RI.norm(dim=1), roots)


def test_factors_that_cancel_leave_only_what_they_differ_by() -> None:
    up, down = factors((30, 20, 4))
    extra_up, extra_down = factors((30, 20, 1), seed=5)
    small = 1e-4
    found = decompose_product(
        torch.cat([up, -up, small * extra_up], dim=1), torch.cat([down, down, extra_down])
    )
    norm = small * extra_up.norm() * extra_down.norm()
    assert found.singular_R[0] == pytest.approx(float(norm), rel=1e-6)
    assert found.truncated(9).up_OR.shape[1] == 1


def test_a_product_of_zeros_has_rank_one_and_no_error() -> None:
    found = truncate(torch.zeros(5, 3), torch.randn(3, 4), rank=2)
    assert found.up_OR.shape == (5, 1)
    assert not found.up_OR.any() and not found.down_RI.any()
    assert found.relative_error == 0


def test_rank_is_as_large_as_the_product_needs() -> None:
    up, down = factors((30, 20, 3))
    found = truncate(torch.cat([up, up], dim=1), torch.cat([down, down]), rank=6)
    assert found.up_OR.shape[1] == 3
    assert error(2 * up.double() @ down.double(), found.up_OR, found.down_RI) < 1e-6


@pytest.mark.parametrize("limit", [None, 7, 100])
def test_a_kronecker_product_is_decomposed_by_its_factors(limit: int | None) -> None:
    first, second = factors((6, 4, 3)), factors((5, 8, 4), seed=5)
    whole = torch.kron(
        first[0].double() @ first[1].double(), second[0].double() @ second[1].double()
    )
    singular = torch.linalg.svdvals(whole)

    found = decompose_kronecker(decompose_product(*first), decompose_product(*second), limit=limit)

    kept = min(limit or 12, 12)
    torch.testing.assert_close(found.singular_R, singular[:kept], rtol=1e-10, atol=1e-12)
    assert found.squared_norm == pytest.approx(float(whole.square().sum()))
    approximation = (found.left_OR * found.singular_R) @ found.right_RI
    difference = (whole - approximation).norm()
    assert float(difference) == pytest.approx(float(singular[kept:].norm()), abs=1e-11)


SPECTRA = {
    "one cliff": torch.cat([torch.full((8,), 1.0), torch.full((292,), 1e-3)]),
    "slow decay": 1 / torch.arange(1, 301).double().sqrt(),
    "fast decay": torch.logspace(0, -12, 300),
    "flat": torch.ones(300),
    "rank 8": torch.linspace(1, 0.5, 8),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("size", [(400, 320), (320, 400)])
def test_a_sketch_is_nearly_as_good_as_the_exact_decomposition(
    name: str, size: tuple[int, int]
) -> None:
    matrix = with_spectrum(*size, SPECTRA[name])
    singular = SPECTRA[name].double()
    best = float(singular[8:].norm() / singular.norm())

    found = decompose(
        matrix.float(), rank=8, generator=torch.Generator().manual_seed(0), exact_below=0
    )

    reached = found.truncated(8)
    # Iterations end when one gains 0.15 % of the error, and float32 ends at about 1e-6.
    assert found.relative_error(8) <= 1.01 * best + 2e-6
    true_error = error(matrix, reached.up_OR, reached.down_RI)
    assert true_error == pytest.approx(found.relative_error(8), rel=1e-3, abs=2e-6)
    assert (found.singular_R <= singular[:8] * (1 + 1e-5)).all()
    assert found.squared_norm == pytest.approx(float(singular.square().sum()), rel=1e-5)


@pytest.mark.parametrize(("size", "rank"), [((40, 30), 4), ((400, 300), 80)])
def test_small_matrices_and_large_ranks_are_decomposed_exactly(
    size: tuple[int, int], rank: int
) -> None:
    matrix = torch.randn(size, generator=torch.Generator().manual_seed(2))
    singular = torch.linalg.svdvals(matrix.double())
    found = decompose(matrix, rank=rank, generator=torch.Generator())
    torch.testing.assert_close(found.singular_R, singular[:rank], rtol=1e-12, atol=0)
    best = singular[rank:].norm() / singular.norm()
    assert found.relative_error(rank) == pytest.approx(float(best), rel=1e-12)


def test_a_sketch_is_the_same_for_the_same_seed() -> None:
    matrix = torch.randn(300, 300, generator=torch.Generator().manual_seed(2))
    first, second = (
        decompose(matrix, rank=4, generator=torch.Generator().manual_seed(7)).truncated(4)
        for _ in range(2)
    )
    assert torch.equal(first.up_OR, second.up_OR)


def test_norms_agree_with_those_of_the_formed_matrix() -> None:
    up, down = factors((70, 50, 6))
    matrix = torch.randn(70, 50, generator=torch.Generator().manual_seed(3))
    product = up.double() @ down.double()
    assert product_squared_norm(up, down) == pytest.approx(float(product.square().sum()))
    assert squared_norm(matrix) == pytest.approx(float(matrix.double().square().sum()))
    difference = matrix.double() - product
    expected = float(difference.square().sum())
    assert squared_error(matrix, up, down) == pytest.approx(expected, rel=1e-5)


def spectrum(*values: float, rest: float = 0.0) -> Decomposition:
    empty = torch.empty(0)
    return Decomposition(empty, torch.tensor(values, dtype=torch.float64), empty, rest)


@pytest.mark.parametrize(
    ("method", "amount", "rank"),
    [
        # Of the singular values 4, 2, 2, 1: squares 16, 4, 4, 1 of 25, and a sum of 9.
        ("energy", 0.64, 1),
        ("energy", 0.641, 2),
        ("energy", 0.96, 3),
        ("energy", 1.0, 4),
        ("frobenius", 0.8, 1),
        ("frobenius", 0.81, 2),
        ("ratio", 1.5, 1),
        ("ratio", 2.0, 1),
        ("ratio", 2.1, 3),
        ("ratio", 5.0, 4),
        ("cumulative", 4 / 9, 1),
        ("cumulative", 0.45, 2),
        ("cumulative", 8 / 9, 3),
        ("cumulative", 1.0, 4),
    ],
)
def test_the_smallest_rank_that_keeps_the_amount(method: str, amount: float, rank: int) -> None:
    assert rank_for(spectrum(4, 2, 2, 1), method=method, amount=amount) == rank
    assert rank_for(spectrum(4, 2, 2, 1, 0), method=method, amount=amount) == rank


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("amount", [0.05, 0.3, 0.77, 0.999])
def test_a_lower_rank_would_keep_less(method: str, amount: float) -> None:
    singular = torch.rand(40, generator=torch.Generator().manual_seed(4)).double()
    singular = singular.sort(descending=True).values
    amount = 1 / amount if method == "ratio" else amount
    found = Decomposition(torch.empty(0), singular, torch.empty(0))
    rank = rank_for(found, method=method, amount=amount)

    def enough(count: int) -> bool:
        kept = singular[:count]
        if method == "energy":
            return bool(kept.square().sum() >= amount * singular.square().sum())
        if method == "frobenius":
            return bool(kept.norm() >= amount * singular.norm())
        if method == "cumulative":
            return bool(kept.sum() >= amount * singular.sum())
        return bool((singular[count:] <= singular[0] / amount).all())

    assert enough(rank)
    assert rank == 1 or not enough(rank - 1)


def test_what_a_sketch_left_out_counts_as_energy() -> None:
    # 16 + 4 of 25 are known, so 0.81 cannot be reached with what is there.
    assert rank_for(spectrum(4, 2, rest=5.0), method="energy", amount=0.7) == 2
    assert RankChoice(amount=0.99).of(spectrum(4, 2, rest=5.0)) == 2


def test_a_choice_is_limited_by_the_largest_rank_and_by_what_there_is() -> None:
    found = spectrum(4, 2, 2, 1)
    assert RankChoice(rank=3).of(found) == 3
    assert RankChoice(rank=30).of(found) == 4
    assert RankChoice(rank=3, max_rank=2).of(found) == 2
    assert RankChoice(amount=1.0, max_rank=2).of(found) == 2
    assert RankChoice(amount=0.5).of(spectrum(0, 0)) == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "neither is given"),
        ({"rank": 4, "amount": 0.5}, "both are given"),
        ({"rank": 0}, "rank = 0"),
        ({"amount": 0.5, "max_rank": -1}, "max_rank = -1"),
        ({"amount": 1.5}, "at most 1"),
        ({"amount": 0.0}, "above 0"),
        ({"amount": float("nan")}, "above 0"),
        ({"amount": 0.9, "method": "ratio"}, "above 1"),
        ({"amount": float("nan"), "method": "ratio"}, "above 1"),
        ({"amount": 0.9, "method": "knee"}, "energy, frobenius, ratio, cumulative"),
    ],
)
def test_a_choice_that_means_nothing_is_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        RankChoice(**settings)
