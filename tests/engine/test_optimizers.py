from __future__ import annotations

import torch
from pack.engine.optimizers import create, set_learning_rate
from torch import nn


def test_adamw_takes_the_steps_of_the_formula() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    arguments = {"weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-6}
    optimizer = create("AdamW", [parameter], lr=0.01, arguments=arguments)

    expected = parameter.detach().double()
    first, second = torch.zeros(2).double(), torch.zeros(2).double()
    for step in range(1, 4):
        gradient = torch.tensor([0.5 * step, -1.0])
        parameter.grad = gradient.clone()
        optimizer.step()
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        update = (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-6)
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * update
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=1e-7)


def test_the_learning_rate_reaches_every_group() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = create("AdamW", parameters, lr=1.0, arguments={})
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
