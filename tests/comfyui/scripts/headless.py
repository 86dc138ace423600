"""Makes ``import comfy`` work on a machine with a CPU build of torch, without starting a server.

torchaudio and torchvision's compiled operators have no CPU build for every torch; image models
need only that the names can be imported.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any


def prepare(comfyui: str) -> None:
    """Call before the first import of ComfyUI's modules."""
    sys.argv = ["main.py", "--cpu"]
    sys.path.insert(0, comfyui)
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        for name in ("torchaudio", "torchaudio.functional"):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__spec__ = ModuleSpec(name, None)
        sys.modules["torchaudio"].functional = sys.modules["torchaudio.functional"]
    import torch

    register_fake: Any = torch.library.register_fake

    def tolerant(operator: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        if isinstance(operator, str) and operator.startswith("torchvision::"):
            return lambda function: function
        return register_fake(operator, *args, **kwargs)

    torch.library.register_fake = tolerant
    import comfy.options

    comfy.options.enable_args_parsing()
