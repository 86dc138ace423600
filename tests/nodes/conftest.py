"""Imports single modules of ``nodes`` where there is no ComfyUI."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pack.tests.nodes import stand_ins

FOLDER = Path(__file__).parents[2] / "nodes"


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str], Any]]:
    """Gives a module of ``nodes`` by its name; all share the same stand-ins."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins.modules().items():
            patch.setitem(sys.modules, name, module)
        # Without what nodes/__init__.py does, which is to import all of them.
        package = types.ModuleType("pack.nodes")
        package.__path__ = [str(FOLDER)]
        patch.setitem(sys.modules, package.__name__, package)
        yield lambda name: importlib.import_module(f"{package.__name__}.{name}")
        for name in [name for name in sys.modules if name.startswith("pack.nodes.")]:
            del sys.modules[name]


@pytest.fixture
def comfyui(load: Callable[[str], Any], tmp_path: Path) -> stand_ins.FolderPaths:
    """The folders of a ComfyUI, empty, for one test."""
    folder_paths = sys.modules["folder_paths"]
    assert isinstance(folder_paths, stand_ins.FolderPaths)
    folder_paths.move(tmp_path / "ComfyUI")
    return folder_paths


@pytest.fixture
def node_types(load: Callable[[str], Any], comfyui: stand_ins.FolderPaths) -> dict[str, Any]:
    """Every class of a node by the node's id."""
    loaded = [load(path.stem) for path in FOLDER.glob("*.py") if path.stem != "__init__"]
    found = {kind for module in loaded for kind in vars(module).values() if _is_node(kind)}
    return {kind.define_schema().node_id: kind for kind in found}


def _is_node(kind: Any) -> bool:
    own = isinstance(kind, type) and kind is not stand_ins.ComfyNode
    return own and issubclass(kind, stand_ins.ComfyNode)
