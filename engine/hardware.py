"""Names in settings -> devices and number types, and what the machine reports."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import torch

from .errors import EngineError

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "no": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

# Of glibc's malloc.h, and the size from which a block gets memory of its own.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_BYTES = 2**18


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


def give_freed_memory_back() -> None:
    """Let the CPU's large tensors return their memory to the system as soon as they are freed.

    glibc would keep it, in pieces that the next ones often do not fit into: a FLUX of 0.3 billion
    weights had its peak at 2.7 GiB instead of 2.0. Other systems do so by themselves.
    """
    if platform.libc_ver()[0] == "glibc":
        import ctypes

        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        # Setting one of both turns off that they grow with what is freed; this is what they keep.
        library.mallopt(_M_TRIM_THRESHOLD, _LARGE_BYTES)


def resident_bytes() -> int:
    """What this process has in memory now."""
    import psutil

    return psutil.Process().memory_info().rss


def available_bytes(device: torch.device) -> int | None:
    """What can still be allocated on a device; None where nobody tells."""
    if device.type == "cpu":
        import psutil

        return psutil.virtual_memory().available
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What PyTorch keeps for the next tensors is free for us.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return None


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory use so far: the accelerator's allocations, or the process's resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if platform.system() == "Windows":
        import psutil

        memory: Any = psutil.Process().memory_info()
        return memory.peak_wset / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        # What getrusage says includes the size that the parent had when it started us.
        for line in status.read_text("ascii", "replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def stored_or(name: str) -> torch.dtype | None:
    """The type that a setting names; None, meaning "as stored in the file", for "auto"."""
    return None if name == "auto" else DTYPES[name]
