"""What a training run needs in memory at its peak, from numbers that are known beforehand.

`activations` finds how much a forward and backward pass holds; everything else is counted here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_MIB, _GIB = 2**20, 2**30
# Adapters and their gradients are float32.
_BYTES_PER_WEIGHT = 4


@dataclass(frozen=True)
class Host:
    """What lies in the memory of the computer even if there is a GPU.

    Args:
        program_bytes: of the process before the model is loaded.
        dataset_bytes: of the cached images that are kept.
        is_continued: the run goes on from a state, whose copy is kept to go back to.
    """

    program_bytes: int
    dataset_bytes: int
    is_continued: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for; together they are the peak."""

    parts: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    def in_words(self) -> str:
        """Such as "21.3 GiB (model 12.2 GiB, activations 8.1 GiB, ...)", the largest first.

        What is less than a hundredth is not listed.
        """
        ordered = sorted(self.parts.items(), key=lambda part: -part[1])
        listed = [
            f"{name} {size_in_words(size)}"
            for name, size in ordered
            if size >= self.total_bytes / 100
        ]
        return f"{size_in_words(self.total_bytes)} ({', '.join(listed)})"


def size_in_words(num_bytes: int) -> str:
    """Such as "21.3 GiB" or "3.4 MiB"."""
    unit, name = (_GIB, "GiB") if num_bytes >= _GIB else (_MIB, "MiB")
    return f"{num_bytes / unit:.1f} {name}"


def estimate(
    *,
    model_bytes: int,
    num_trained: int,
    optimizer_bytes: int,
    activation_bytes: int,
    batch_bytes: int,
    host: Host | None,
) -> MemoryEstimate:
    """The peak of a training run.

    Args:
        num_trained: numbers that are trained, all adapters together.
        optimizer_bytes: what the optimizer keeps for them.
        activation_bytes: see `activations.peak_bytes`; with the gradients of the adapters.
        batch_bytes: of the largest batch.
        host: for a run on the CPU; None for what lies on an accelerator.
    """
    adapters = _BYTES_PER_WEIGHT * num_trained
    parts = {
        "model": model_bytes,
        "LoRA and optimizer": adapters + optimizer_bytes,
        "activations": activation_bytes,
        "batch": batch_bytes,
    }
    if host:
        # The batch that is read ahead, and the parts that both are stacked from.
        parts["batch"] = 3 * batch_bytes
        parts["images"] = host.dataset_bytes
        parts["program"] = host.program_bytes
        parts["first state"] = adapters + (optimizer_bytes if host.is_continued else 0)
        # A state is put together in memory before it is written; activations are gone by then.
        parts["activations"] = max(activation_bytes, 2 * (adapters + optimizer_bytes))
    return MemoryEstimate(parts)


def frozen_bytes(model: nn.Module) -> int:
    """What a model on any device, also the meta device, holds besides what is trained."""
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}
    return sum(each.nbytes for each in tensors.values() if not each.requires_grad)


def optimizer_bytes(
    shapes: Iterable[torch.Size],
    make: Callable[[Sequence[nn.Parameter]], Optimizer],
    *,
    device: torch.device,
) -> int:
    """What an optimizer keeps for parameters of these shapes: makes a step and counts.

    One shape is in memory at a time.
    """
    total = 0
    for shape, count in Counter(shapes).items():
        parameter = nn.Parameter(torch.zeros(shape, device=device))
        parameter.grad = torch.ones_like(parameter)
        optimizer = make([parameter])
        optimizer.step()
        kept = optimizer.state[parameter].values()
        total += count * sum(each.nbytes for each in kept if isinstance(each, Tensor))
    return total
