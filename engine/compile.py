"""torch.compile for the blocks of a transformer, one by one.

Blocks of one class share their code, so 57 blocks are compiled as four graphs (the first of each
class differs in what has a gradient), in place: names, identities and checkpointing stay.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import ConfigError, EngineError

_OFF = "NO"
_INSTEAD = "use INDUCTOR, AOT_EAGER or EAGER"
# Of one shape: with and without gradients, for two classes of blocks, the first of each apart.
_GRAPHS_PER_SHAPE = 8


@dataclass(frozen=True)
class CompileSettings:
    """As the settings ``dynamo_*``; ``backend`` is one of accelerate's names, NO for none."""

    backend: str = _OFF
    mode: str = "default"
    fullgraph: bool = False
    dynamic: bool = False

    @property
    def is_on(self) -> bool:
        return self.backend != _OFF


def check(settings: CompileSettings, device: torch.device) -> None:
    """Make sure that the backend is there and can work on ``device``; takes seconds at most.

    Raises:
        ConfigError: it cannot; says why and what does.
    """
    if not settings.is_on:
        return
    where = f"dynamo_backend = {settings.backend!r}"
    if settings.backend != "INDUCTOR" and settings.mode != "default":
        raise ConfigError(
            f"dynamo_mode = {settings.mode!r}: only dynamo_backend INDUCTOR has modes; remove "
            "dynamo_mode or use INDUCTOR"
        )
    if settings.backend == "CUDAGRAPHS" and device.type != "cuda":
        raise ConfigError(f"{where}: it needs an NVIDIA GPU, but device is {device}; use INDUCTOR")
    if settings.backend == "INDUCTOR":
        if problem := _problem_of_inductor(device):
            raise ConfigError(f"{where}: {problem}, or use dynamo_backend NO")
        return
    try:
        name = _arguments(settings)["backend"]
    except ValueError:
        raise ConfigError(
            f"{where}: the installed accelerate does not know it; {_INSTEAD}"
        ) from None
    if name not in torch._dynamo.list_backends(None):
        raise ConfigError(f"{where}: the installed PyTorch does not have it; {_INSTEAD}")
    # What else it needs shows only when it compiles something.
    try:
        torch.compile(_double, backend=name)(torch.ones(2, device=device))
    except Exception as error:
        raise ConfigError(
            f"{where}: it does not work here ({_reason(error)}); {_INSTEAD}"
        ) from error


def compile_blocks(
    blocks: Sequence[nn.Module], settings: CompileSettings, *, num_shapes: int
) -> None:
    """Let the blocks be compiled when they are first called; without a backend do nothing.

    Args:
        blocks: changed in place; adapters are on them already.
        num_shapes: different shapes of batches that they will get.
    """
    if not settings.is_on:
        return
    # Beyond the limits, 8 and 256, blocks would run uncompiled and say so in a log only.
    limits: Any = torch._dynamo.config
    needed = _GRAPHS_PER_SHAPE * num_shapes
    limits.recompile_limit = max(limits.recompile_limit, needed)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, needed)
    arguments = _arguments(settings)
    for block in blocks:
        block.compile(**arguments)


def compiled_graphs() -> int:
    """How many graphs this process has compiled; a step in which it grew is no measure of time."""
    # Not to be loaded for this: it takes a second and nothing was compiled without it.
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, compiled blocks run as they were written: for shapes that are seen only once."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def explained(settings: CompileSettings) -> Iterator[None]:
    """Turns what the compiler says about the model into one sentence.

    Raises:
        EngineError: the model could not be compiled.
    """
    if not settings.is_on:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise EngineError(
            f"dynamo_backend = {settings.backend!r}: the model could not be compiled "
            f"({_reason(error)}); use dynamo_backend NO"
            f"{', or turn dynamo_fullgraph off' if settings.fullgraph else ''}"
        ) from error


def _arguments(settings: CompileSettings) -> dict[str, Any]:
    """The arguments of torch.compile, as accelerate makes them.

    Raises:
        ValueError: accelerate does not know the backend.
    """
    from accelerate.utils import TorchDynamoPlugin

    plugin: Any = TorchDynamoPlugin(
        backend=settings.backend,  # pyright: ignore[reportArgumentType]
        mode=settings.mode,
        fullgraph=settings.fullgraph,
        dynamic=settings.dynamic,
    )
    return {
        "backend": plugin.backend.value.lower(),
        "mode": plugin.mode,
        "fullgraph": plugin.fullgraph,
        "dynamic": plugin.dynamic,
    }


def _problem_of_inductor(device: torch.device) -> str:
    """What INDUCTOR lacks to make code for the device, and the way out; or nothing."""
    if device.type != "cpu":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "it needs the package triton; run pip install triton"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return "it needs a C++ compiler; install g++ (on Windows, Visual Studio's build tools)"
    return ""


def _double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def _reason(error: BaseException) -> str:
    """The line that says it; the one before may only be "backend='tvm' raised:"."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if line[-1] != ":"), type(error).__name__).rstrip(".")
