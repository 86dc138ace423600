"""Noise, noisy latents and target of one training batch, against other ways to make them.

A video latent of 480p, [1, 16, 21, 60, 104] in float32 (8.4 MB). "plain" writes the formulas;
"half precision" draws the noise in the type of the cache, as some trainers do; "floor" draws it
and nothing else. Run from the repository root: ``python -m benchmarks.noising``. Prints medians in
milliseconds, all ways in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from engine import flow

SHAPE = (1, 16, 21, 60, 104)
Way = Callable[[Tensor, Tensor, torch.Generator], object]


def ours(latents: Tensor, t_B: Tensor, generator: torch.Generator) -> object:
    """What the training step does."""
    return flow.mix(latents, flow.draw_noise(latents, generator=generator), t_B)


def with_offset(latents: Tensor, t_B: Tensor, generator: torch.Generator) -> object:
    """The same with ``noise_offset``."""
    return flow.mix(latents, flow.draw_noise(latents, generator=generator, offset=0.1), t_B)


def plain(latents: Tensor, t_B: Tensor, generator: torch.Generator) -> object:
    """The formulas, each with a result of its own."""
    return _formulas(latents, torch.randn(latents.shape, generator=generator), t_B)


def half_precision(latents: Tensor, t_B: Tensor, generator: torch.Generator) -> object:
    """Noise like latents in bfloat16, mixed by a time in float32."""
    latents = latents.bfloat16()
    noise = torch.randn(SHAPE, generator=generator, dtype=latents.dtype)
    return _formulas(latents, noise, t_B)


def _formulas(latents: Tensor, noise: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    t = t_B.view(-1, 1, 1, 1, 1)
    return (1 - t) * latents + t * noise, noise - latents


def floor(latents: Tensor, t_B: Tensor, generator: torch.Generator) -> object:
    """Nothing but the noise."""
    return torch.randn(latents.shape, generator=generator)


WAYS: dict[str, Way] = {
    "ours": ours,
    "ours, noise_offset": with_offset,
    "plain": plain,
    "half precision": half_precision,
    "floor": floor,
}


def measure(rounds: int) -> dict[str, float]:
    """Median milliseconds of each way."""
    latents, t_B = torch.randn(SHAPE), torch.tensor([0.37])
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for index in range(rounds + 5):
        for name, way in WAYS.items():
            start = time.perf_counter()
            way(latents, t_B, generator)
            if index >= 5:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1000 for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="of each way")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name, milliseconds in measure(arguments.rounds).items():
        sys.stdout.write(f"{name:20s} {milliseconds:6.2f} ms\n")


if __name__ == "__main__":
    main()
