"""What nodes may import: each other, ComfyUI, and what the engine offers to all."""

from __future__ import annotations

import ast

import pytest
from pack.tests.test_boundaries import (
    HEAVY,
    ROOT,
    Import,
    absolute,
    imports,
    is_family,
    loaded_by,
    module_of,
    modules,
    problem_of_package,
)

NODES = ROOT / "nodes"


def from_engine(node: Import) -> list[tuple[str, ast.alias]]:
    """What an import in nodes takes from which module of the engine."""
    if isinstance(node, ast.Import) or node.level != 2:
        return []
    top, *base = (node.module or "").split(".")
    return [(module_of(base, alias.name), alias) for alias in node.names if top == "engine"]


def problem_of_relative_import(node: Import) -> str:
    """What is wrong with a relative import in nodes, or nothing."""
    if isinstance(node, ast.Import) or node.level < 2:
        return ""
    named = from_engine(node)
    if not named:
        return "nodes import from . and ..engine only"
    if any(is_family(module) for module, _ in named):
        return "a family is used through the protocol in architectures/base"
    if any(alias.name.startswith("_") for _, alias in named):
        return "names with an underscore are the engine's own"
    return ""


def private_names(tree: ast.Module) -> list[ast.Attribute]:
    """Every ``module._name`` of a module of the engine."""
    taken = [alias for node, _ in imports(tree) for _, alias in from_engine(node)]
    ours = {alias.asname or alias.name for alias in taken}
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ours
        and node.attr.startswith("_")
    ]


def problems_of_nodes(module: str, source: str) -> list[str]:
    """Everything in a module of nodes that breaks a rule, one sentence each."""
    file = f"nodes/{module}.py"
    tree = ast.parse(source)
    found = [
        (node.lineno, problem_of_package(file, name, in_function=in_function))
        for node, in_function in imports(tree)
        for name in absolute(node)
    ]
    found += [(node.lineno, problem_of_relative_import(node)) for node, _ in imports(tree)]
    found += [
        (node.lineno, f"{node.attr}: names with an underscore are the engine's own")
        for node in private_names(tree)
    ]
    return [f"{file}:{line}: {problem}" for line, problem in found if problem]


def test_nodes_use_what_the_engine_offers() -> None:
    found = [
        problem
        for module, source in modules(NODES).items()
        for problem in problems_of_nodes(module, source)
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("from engine.config import Config", "import relatively"),
        ("from pack.engine import launch", "import relatively"),
        ("from .. import engine", "from . and ..engine only"),
        ("from ..benchmarks import train_step", "from . and ..engine only"),
        ("from ...other_pack import nodes", "from . and ..engine only"),
        ("from ..engine.architectures import flux_kontext", "through the protocol"),
        ("from ..engine.architectures.flux_kontext import FluxKontext", "through the protocol"),
        ("from ..engine.jobs.cache import _summary", "the engine's own"),
        ("from ..engine.jobs import cache\ncache._summary(0)", "_summary: names with an"),
        ("from ..engine.jobs import cache as job\njob._summary(0)", "_summary: names with an"),
        ("import folder_paths", "only nodes/paths.py does that"),
        ("def f():\n    from folder_paths import models_dir", "only nodes/paths.py does that"),
        ("import subprocess", "only engine/launch.py does that"),
        ("import matplotlib.pyplot", "inside the function"),
    ],
)
def test_a_wrong_import_in_nodes_is_refused(source: str, reason: str) -> None:
    (problem,) = problems_of_nodes("train", source)
    assert reason in problem and "nodes/train.py:" in problem


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("paths", "import folder_paths"),
        ("train", "import comfy.utils\nfrom server import PromptServer"),
        ("train", "from . import paths\nfrom .paths import loras_folder\npaths._depth"),
        ("train", "from ..engine import launch\nfrom ..engine.jobs.outputs import RunFiles"),
        ("train", "from ..engine.architectures.base import Architecture"),
        ("train", "def f():\n    import transformers"),
    ],
)
def test_a_right_import_in_nodes_is_not_refused(module: str, source: str) -> None:
    assert problems_of_nodes(module, source) == []


def test_what_nodes_import_of_the_engine_loads_nothing_heavy() -> None:
    wanted = {
        module.removesuffix("/__init__")
        for source in modules(NODES).values()
        for node, _ in imports(ast.parse(source))
        for module, _ in from_engine(node)
    }
    assert len(wanted) > 10  # the imports were found at all
    loaded = loaded_by(*(f"engine.{name}".replace("/", ".") for name in wanted))
    assert "torch" in loaded and not HEAVY & loaded
