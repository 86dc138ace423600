"""Whether an optimizer works at all, seen before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import optimizer_state

MakeOptimizer = Callable[[Sequence[nn.Parameter]], Optimizer]
# Like A and B of a LoRA. bitsandbytes quantizes the state of 4096 elements or more.
_SHAPES = ((64, 72), (72, 64))
_STEPS = 6  # Schedule-Free RAdam only begins then


def try_out(
    make: MakeOptimizer,
    evaluating: Callable[[Optimizer], AbstractContextManager[None]],
    device: torch.device,
) -> None:
    """Train two small matrices, save and restore the state, and go on.

    Raises:
        ValueError: the parameters became NaN, or a restored run goes on with other bits.
        Exception: whatever the optimizer raises.
    """
    parameters = _parameters(device)
    optimizer = make(parameters)
    for step in range(_STEPS):
        _step(optimizer, parameters, step)
        with evaluating(optimizer):
            _require_finite(parameters, step)
    tensors: dict[str, Tensor] = {}
    packed = optimizer_state.pack(optimizer, tensors)
    copies = [nn.Parameter(each.detach().clone()) for each in parameters]
    restored = make(copies)
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    optimizer_state.unpack(restored, packed, own)
    _step(optimizer, parameters, _STEPS)
    _step(restored, copies, _STEPS)
    if not all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True)):
        raise ValueError(
            "a run that was saved and continued differs from one that was not, because it draws "
            "random numbers or keeps more than its state_dict() holds"
        )


def _parameters(device: torch.device) -> list[nn.Parameter]:
    down_RI, up_OR = (torch.zeros(shape, device=device) for shape in _SHAPES)
    down_RI.copy_(_ramp(down_RI))
    return [nn.Parameter(down_RI), nn.Parameter(up_OR)]


def _step(optimizer: Optimizer, parameters: Sequence[nn.Parameter], step: int) -> None:
    for index, parameter in enumerate(parameters):
        # While B is zero, the gradient of A is, too.
        size = 0.0 if step == index == 0 else 0.01 * (-1) ** index / (step + 1)
        parameter.grad = _ramp(parameter) * size
    optimizer.step()


def _ramp(like: Tensor) -> Tensor:
    return torch.linspace(-1, 1, like.numel(), device=like.device).view(like.shape)


def _require_finite(parameters: Sequence[nn.Parameter], step: int) -> None:
    if not all(parameter.isfinite().all() for parameter in parameters):
        raise ValueError(f"what it trains becomes NaN or infinite in step {step + 1}")
