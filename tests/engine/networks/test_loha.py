from __future__ import annotations

import pytest
import torch
from pack.engine.adapter_weights import delta
from pack.engine.networks import loha
from pack.engine.networks.loha import AddLoHa, LoHaAdapter
from pack.engine.networks.network import inject
from pack.engine.networks.settings import Dropouts, LayerSettings
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

TOKENS = {"factorised": 40, "dense": 2}


def adapter(rank: int = 2, num_in: int = 6, num_out: int = 5) -> LoHaAdapter:
    return LoHaAdapter(
        num_in,
        num_out,
        rank=rank,
        alpha=3.0,
        dropouts=Dropouts(),
        generator=torch.Generator().manual_seed(0),
    )


@pytest.mark.parametrize("way", TOKENS)
def test_gradients_agree_with_finite_differences(way: str) -> None:
    """Both ways to compute it; the number of tokens decides."""
    torch.manual_seed(0)
    rank = {"factorised": 1, "dense": 4}[way]
    out, x, *factors = (
        torch.randn(size, dtype=torch.float64, requires_grad=True)
        for size in ((9, 5), (9, 6), (5, rank), (rank, 6), (5, rank), (rank, 6))
    )
    assert loha._is_cheaper_factorised(x, factors[0]) == (way == "factorised")

    def function(*given: torch.Tensor) -> torch.Tensor:
        return AddLoHa.apply(given[0] * 1, *given[1:], 0.7)

    given = (out, x, *factors)
    assert torch.autograd.gradcheck(function, given)
    w1_a, w1_b, w2_a, w2_b = factors
    expected = out + 0.7 * x @ ((w1_a @ w1_b) * (w2_a @ w2_b)).t()
    torch.testing.assert_close(function(*given), expected)


@pytest.mark.parametrize(("rank", "num_tokens"), [(2, 60), (8, 30)])
def test_nothing_of_the_size_of_the_weight_is_kept(rank: int, num_tokens: int) -> None:
    model = nn.Sequential(nn.Linear(64, 48)).requires_grad_(False)
    layers = {"it": (("0",), LayerSettings("loha", rank, alpha=1.0))}
    inject(model, layers, generator=torch.Generator())
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    x = torch.randn(num_tokens, 64, requires_grad=True)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    assert sum(kept) <= num_tokens * (64 + rank**2) < num_tokens * 64 + 48 * 64


def test_the_factors_begin_as_the_peer_begins_them() -> None:
    made = adapter(rank=50, num_in=400, num_out=300)
    spreads = {name: float(each.detach().std()) for name, each in made.tensors().items()}
    # 15000 to 20000 normal draws: a relative error of 1 / sqrt(2 * 15000) = 0.6 %.
    assert spreads == pytest.approx({"w1_a": 0.1, "w1_b": 1, "w2_a": 0, "w2_b": 1}, rel=0.03)


def test_the_norm_is_summed_over_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made = adapter()
    torch.nn.init.normal_(made.w2_a)
    exact = delta(made.weights(), torch.float64).square().sum()
    for chunk in (12, 10**6):
        monkeypatch.setattr(loha, "_CHUNK", chunk)
        torch.testing.assert_close(made.squared_norm().detach().double(), exact, rtol=1e-5, atol=0)
