"""Lets ComfyUI and its child processes start where torchvision and torchaudio have no CPU build.

On PYTHONPATH, Python runs this before anything else. Image models only need that the names can be
imported; where the packages work, nothing changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _Empty:
    """Loads a module in which every name is an empty class."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__path__ = []
        module.__version__ = "0"
        module.__getattr__ = _empty_class
        return module

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


class _Finder:
    """Steps in where one of the two packages is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package = name.partition(".")[0]
        if package == "torchaudio" and PathFinder.find_spec("torchaudio") is None:
            return ModuleSpec(name, _Empty(), is_package=True)
        if name == "torchvision":
            _tolerate_missing_operators()
        return None


def _empty_class(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__init__": lambda self, *args, **kwargs: None})


def _tolerate_missing_operators() -> None:
    import torch

    register_fake: Any = torch.library.register_fake

    def tolerant(operator: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        if isinstance(operator, str) and operator.startswith("torchvision::"):
            return lambda function: function
        return register_fake(operator, *args, **kwargs)

    torch.library.register_fake = tolerant


sys.meta_path.insert(0, _Finder())
