"""What ComfyUI says of its nodes in ``/object_info``, in the words that the workflows need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_WIDGETS = {"BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3", "FLOAT", "INT", "STRING"}
_EMPTY = {"BOOLEAN": False, "FLOAT": 0.0, "INT": 0, "STRING": ""}
_DYNAMIC = "COMFY_DYNAMICCOMBO_V3"


@dataclass(frozen=True)
class Input:
    """A socket or a widget of a node; ``options`` are those of ``/object_info``."""

    name: str
    kind: str
    required: bool
    options: Mapping[str, Any]

    @property
    def is_widget(self) -> bool:
        return self.kind in _WIDGETS and not self.options.get("forceInput")

    @property
    def has_control(self) -> bool:
        """Whether a second widget, such as "fixed", follows: what happens to a seed after a run."""
        return bool(self.options.get("control_after_generate"))

    @property
    def label(self) -> str:
        return self.options.get("display_name") or self.name

    @property
    def choices(self) -> list[Any] | None:
        """What a combo offers; empty for files, which only the user's machine knows."""
        if self.kind == _DYNAMIC:
            return [option["key"] for option in self.options["options"]]
        return list(self.options.get("options", [])) if self.kind == "COMBO" else None

    @property
    def default(self) -> Any:
        """What a new node shows; None where the user has to choose a file."""
        fallback = next(iter(self.choices or []), _EMPTY.get(self.kind))
        return self.options.get("default", fallback)


@dataclass(frozen=True)
class Output:
    name: str
    kind: str


@dataclass(frozen=True)
class NodeType:
    """A kind of node; ``module`` is where ComfyUI loaded it from."""

    name: str
    title: str
    module: str
    is_output: bool
    groups: Mapping[str, Mapping[str, Any]]
    outputs: tuple[Output, ...]

    def inputs(self, values: Mapping[str, Any]) -> list[Input]:
        """All inputs in the order of the schema; ``values`` decide which a dynamic combo has."""
        return list(_inputs(self.groups, values, ""))


def read_types(object_info: Mapping[str, Any]) -> dict[str, NodeType]:
    """Node types by name from an answer of ``/object_info``."""
    return {name: _node_type(name, info) for name, info in object_info.items()}


def _node_type(name: str, info: Mapping[str, Any]) -> NodeType:
    order = info.get("input_order", {})
    groups = {
        group: {key: inputs[key] for key in order.get(group, inputs)}
        for group, inputs in info["input"].items()
        if group in ("required", "optional")
    }
    kinds = ["COMBO" if isinstance(kind, list) else kind for kind in info["output"]]
    names = info.get("output_name") or kinds
    return NodeType(
        name,
        info.get("display_name") or name,
        info["python_module"],
        bool(info["output_node"]),
        groups,
        tuple(Output(*pair) for pair in zip(names, kinds, strict=True)),
    )


def _inputs(groups: Mapping[str, Any], values: Mapping[str, Any], prefix: str) -> Iterator[Input]:
    for group in ("required", "optional"):
        for name, (kind, *rest) in groups.get(group, {}).items():
            options = dict(rest[0]) if rest else {}
            if isinstance(kind, list):  # how nodes of the first API write a combo
                kind, options = "COMBO", options | {"options": kind}
            one = Input(prefix + name, kind, group == "required", options)
            yield one
            if kind == _DYNAMIC:
                chosen = values.get(one.name, one.default)
                for option in options["options"]:
                    if option["key"] == chosen:
                        yield from _inputs(option["inputs"], values, f"{one.name}.")
