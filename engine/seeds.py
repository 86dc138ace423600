"""Random seeds as functions of what they are for.

Every draw of a run comes from a generator seeded by the run's seed, its purpose and its position,
so a run that is continued draws what it would have drawn, and nothing has to be stored.
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, purpose: str, index: int = 0) -> int:
    """A 63-bit seed that is the same on every platform."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(
    seed: int, purpose: str, index: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator on ``device`` seeded by `derive`."""
    return torch.Generator(device).manual_seed(derive(seed, purpose, index))
