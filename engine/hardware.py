"""Names in settings -> devices and number types, and what the machine reports."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch

from .errors import EngineError

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "no": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def find_device(name: str) -> torch.device:
    """The device that a setting names; "auto" is the accelerator if there is one, else the CPU.

    Raises:
        EngineError: the device does not exist on this machine.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    device = torch.device(name)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise EngineError(
            f"device {name!r} is not available here; use device = 'auto' or 'cpu'"
        ) from None
    return device


def use_threads(count: int | None) -> None:
    """Let work on the CPU use this many threads; None leaves PyTorch's choice."""
    if count:
        torch.set_num_threads(count)


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory use so far: the accelerator's allocations, or the process's resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if platform.system() == "Windows":
        import psutil

        memory: Any = psutil.Process().memory_info()
        return memory.peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def stored_or(name: str) -> torch.dtype | None:
    """The type that a setting names; None, meaning "as stored in the file", for "auto"."""
    return None if name == "auto" else DTYPES[name]
