from __future__ import annotations

import math

import pytest
import torch
from pack.engine.networks.lokr import AddLoKr, LoKrAdapter, factorization
from pack.engine.networks.network import inject
from pack.engine.networks.settings import Dropouts, LayerSettings
from torch import nn
from torch.autograd.graph import saved_tensors_hooks


@pytest.mark.parametrize(
    ("dimension", "factor", "expected"),
    [
        (512, -1, (16, 32)),
        (3072, -1, (48, 64)),
        (5120, -1, (64, 80)),
        (13824, -1, (108, 128)),
        (12288, -1, (96, 128)),
        (3072, 7, (6, 512)),
        (3072, 8, (8, 384)),
        (8, 1, (1, 8)),
        (1, -1, (1, 1)),
        (9, -1, (3, 3)),
        (13, -1, (1, 13)),
        (16, 8, (2, 8)),
        (3072, 4000, (48, 64)),
    ],
)
def test_dimensions_are_divided_as_the_peer_divides_them(
    dimension: int, factor: int, expected: tuple[int, int]
) -> None:
    assert factorization(dimension, factor) == expected


def test_every_dimension_is_divided_into_two_that_give_it() -> None:
    for dimension in range(1, 400):
        for factor in (-1, 3, 8):
            small, large = factorization(dimension, factor)
            assert small * large == dimension and small <= large
        small, large = factorization(dimension)
        best = max(d for d in range(1, math.isqrt(dimension) + 1) if dimension % d == 0)
        assert small == best


@pytest.mark.parametrize("is_low_rank", [True, False])
@pytest.mark.parametrize("skipped", [0, 2])
@pytest.mark.parametrize("is_masked", [True, False])
def test_gradients_agree_with_finite_differences(
    is_low_rank: bool, skipped: int, is_masked: bool
) -> None:
    torch.manual_seed(0)
    num_out = 6 if skipped == 0 else 3
    sizes = [(5, num_out), (5, 8), (2, 4), (3, 1), (1, 2)]
    if not is_low_rank:
        sizes = [*sizes[:3], (3, 2)]
    given = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    mask = torch.rand(num_out, dtype=torch.float64) if is_masked else None

    def function(*given: torch.Tensor) -> torch.Tensor:
        out, x, w1, *w2 = given
        return AddLoKr.apply(out * 1, x, w1, w2[0], w2[1] if is_low_rank else None, mask, skipped)

    assert torch.autograd.gradcheck(function, given)
    out, x, w1, *w2 = given
    change = torch.kron(w1, w2[0] @ w2[1] if is_low_rank else w2[0])
    added = x @ change[skipped : skipped + num_out].t()
    expected = out + (added if mask is None else added * mask)
    torch.testing.assert_close(function(*given), expected)


def layer(rank: int, num_in: int = 64, num_out: int = 48, **options: object) -> LoKrAdapter:
    settings = LayerSettings("lokr", rank, alpha=2.0, **options)  # pyright: ignore
    generator = torch.Generator().manual_seed(0)
    return LoKrAdapter(num_in, num_out, settings=settings, dropouts=Dropouts(), generator=generator)


def test_the_larger_factor_is_whole_where_the_rank_saves_nothing() -> None:
    # 64 = 8 * 8 and 48 = 6 * 8: rank 4 is not below half of 8.
    assert layer(3).w2 is None and layer(3).scale == 2 / 3
    assert layer(4).w2 is not None and layer(4).scale == 1
    assert layer(1, full_matrix=True).w2 is not None
    assert layer(3, factor=2).weights().shape == layer(3).weights().shape == (48, 64)
    assert tuple(layer(3, factor=2).w1.shape) == (2, 2)


@pytest.mark.parametrize("rank", [2, 100])
def test_nothing_of_the_size_of_the_weight_is_kept(rank: int) -> None:
    model = nn.Sequential(nn.Linear(64, 48)).requires_grad_(False)
    layers = {"it": (("0",), LayerSettings("lokr", rank, alpha=1.0))}
    inject(model, layers, generator=torch.Generator())
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    x = torch.randn(10, 64, requires_grad=True)
    own.add(x.untyped_storage().data_ptr())
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    assert kept in ([], [48])  # at most w1, with the scale


def test_a_part_computes_only_the_rows_that_it_is_part_of() -> None:
    """The last of three parts begins in the middle of a Kronecker row."""
    torch.manual_seed(0)
    parts = nn.ModuleList(nn.Linear(6, size) for size in (5, 4, 3)).requires_grad_(False)
    layers = {"it": (("0", "1", "2"), LayerSettings("lokr", 1, alpha=1.0, full_matrix=True))}
    network = inject(parts, layers, generator=torch.Generator())
    adapter = network.adapters["it"]
    assert isinstance(adapter, LoKrAdapter) and adapter.height == 4
    parts[2](torch.randn(3, 6)).sum().backward()
    assert adapter.w1.grad is not None
    nn.init.ones_(adapter.w2)
    adapter.zero_grad()
    parts[2](torch.randn(3, 6)).sum().backward()
    assert adapter.w1.grad.any(dim=1).tolist() == [False, False, True]
