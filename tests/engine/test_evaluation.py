from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from pack.engine.evaluation import evaluating
from torch import nn


def make() -> nn.Sequential:
    """Dropout at several depths, one of them put into evaluation mode on purpose."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))
    ).train()
    model[2].get_submodule("0").eval()
    return model


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seed_all() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def test_nothing_is_dropped_and_no_gradient_kept_inside() -> None:
    model = make()
    x = torch.ones(2, 4)
    with evaluating(model):
        first, second = model(x), model(x)
    assert torch.equal(first, second) and not first.requires_grad
    assert not torch.equal(model(x), model(x)) and model(x).requires_grad


@pytest.mark.parametrize("fails", [False, True])
def test_every_generator_and_every_mode_is_as_before(*, fails: bool) -> None:
    model = make()
    modes = [module.training for module in model.modules()]
    seed_all()
    expected = draws()
    seed_all()
    try:
        with evaluating(model):
            draws()
            torch.manual_seed(99)
            random.seed(99)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert draws() == expected
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


@pytest.mark.gpu
def test_the_generator_of_the_models_device_is_as_before() -> None:
    model = make().cuda()
    torch.cuda.manual_seed(1)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(1)
    with evaluating(model):
        torch.rand(3, device="cuda")
    assert torch.equal(torch.rand(3, device="cuda"), expected)
