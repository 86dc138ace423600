"""Rules that hold for every node."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from pack.engine.config import FIELDS, NetworkArguments

NODES = Path(__file__).parents[2] / "nodes"
SOURCES = {path.stem: path.read_text("utf-8") for path in NODES.glob("*.py")}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
CLASSES = {
    node.name: (module, node)
    for module, tree in TREES.items()
    for node in tree.body
    if isinstance(node, ast.ClassDef) and any("ComfyNode" in ast.unparse(b) for b in node.bases)
}
MOST_LINES = 15
# What widgets may be for that `execute` takes as settings.
SETTINGS = FIELDS.keys() | NetworkArguments.model_fields.keys()


def execute_of(node: ast.ClassDef) -> ast.FunctionDef:
    """What a node runs."""
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    return next(method for method in methods if method.name == "execute")


def is_looked_up(name: str) -> bool:
    """Whether some code reads ``inputs["name"]``, or names with numbers of which it is one."""
    numbered = re.sub(r"\d$", "{number}", name)
    ways = (f'inputs["{name}"]', f'inputs.get("{name}")', f'inputs[f"{numbered}"]')
    return any(way in source for source in SOURCES.values() for way in ways)


def test_every_node_is_registered_once() -> None:
    lists = [
        node.value
        for node in TREES["__init__"].body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "NODES"
    ]
    (registered,) = lists
    assert isinstance(registered, ast.List)
    names = [ast.unparse(name) for name in registered.elts]
    assert sorted(names) == sorted(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_execute_only_translates(name: str) -> None:
    module, node = CLASSES[name]
    execute = execute_of(node)
    lines = SOURCES[module].splitlines()[execute.body[0].lineno - 1 : execute.end_lineno]
    code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    assert len(code) <= MOST_LINES, f"move what {name}.execute does into a function"


@pytest.mark.parametrize("name", CLASSES)
def test_execute_uses_all_that_it_is_given(name: str) -> None:
    _, node = CLASSES[name]
    execute = execute_of(node)
    given = {argument.arg for argument in ast.walk(execute.args) if isinstance(argument, ast.arg)}
    used = {part.id for part in ast.walk(execute) if isinstance(part, ast.Name)}
    assert not given - used - {"cls"}


def test_execute_takes_every_input(node_types: dict[str, Any]) -> None:
    for node_id, kind in node_types.items():
        signature = inspect.signature(kind.execute)
        inputs = {made.id: made for made in kind.define_schema().inputs}
        takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        named = {p.name: p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD}
        assert named.keys() <= inputs.keys(), node_id
        others = inputs.keys() - named.keys()
        assert takes_any or not others, node_id
        # What is not named is taken as a setting, or looked up by its name.
        widgets = {name for name in others if inputs[name].is_widget}
        assert not {name for name in widgets - SETTINGS if not is_looked_up(name)}, node_id
        for name, parameter in named.items():
            has_default = parameter.default is not parameter.empty
            assert has_default == inputs[name].options.get("optional", False), (node_id, name)


def test_a_schema_has_what_a_user_sees(node_types: dict[str, Any]) -> None:
    assert len(node_types) == len(CLASSES)
    for node_id, kind in node_types.items():
        schema = kind.define_schema()
        assert node_id.startswith("LoraLoom_") and schema.category.split("/")[0] == "LoRA Loom"
        assert schema.display_name and schema.description.endswith((".", "..."))
        ids = [made.id for made in schema.inputs]
        assert len(ids) == len(set(ids)), node_id
        for made in schema.inputs:
            assert not made.is_widget or made.options["tooltip"], (node_id, made.id)
        assert all(output.display_name for output in schema.outputs)


def test_no_two_nodes_are_called_the_same(node_types: dict[str, Any]) -> None:
    names = [kind.define_schema().display_name for kind in node_types.values()]
    assert len(names) == len(set(names))
