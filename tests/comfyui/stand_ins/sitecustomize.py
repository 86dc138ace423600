"""Lets ComfyUI and its child processes start on a machine with a CPU build of torch.

torchaudio and torchvision's compiled operators have no CPU build for every torch. Models of images
need only that both can be imported. Python runs this file at its start when the folder is in
PYTHONPATH; where nothing is missing, nothing changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class StandIn(ModuleType):
    """A package of which any name can be imported; every one is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class StandInLoader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__version__ = "0"


class MissingTorchaudio(MetaPathFinder):
    """Comes last, so it is only asked for what nobody else finds."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] != "torchaudio":
            return None
        return ModuleSpec(name, StandInLoader(), is_package=True)


class TolerantTorchvision(MetaPathFinder):
    """Lets torchvision describe operators that are not there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            _ignore_missing_operators()
        return None


def _ignore_missing_operators() -> None:
    import torch.library

    register_fake: Any = torch.library.register_fake

    def tolerant(operator: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        described = register_fake(operator, *args, **kwargs)

        def describe(function: Any) -> Any:
            try:
                return described(function)
            except RuntimeError as error:
                if "does not exist" not in str(error):
                    raise
                return function

        return describe

    torch.library.register_fake = tolerant


sys.meta_path.insert(0, TolerantTorchvision())
sys.meta_path.append(MissingTorchaudio())
