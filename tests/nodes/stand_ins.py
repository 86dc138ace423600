"""The modules of ComfyUI that our nodes import, as far as they use them.

They only record what they are given; `tests/comfyui` runs the nodes in a real ComfyUI.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ALL = {"display_name", "optional", "tooltip", "advanced"}
_WIDGETS = {
    "Boolean": {"default"},
    "Combo": {"default", "options"},
    "Float": {"default", "min", "max", "step", "round"},
    "Int": {"default", "min", "max", "step", "control_after_generate"},
    "String": {"default", "force_input", "multiline", "placeholder"},
}
_SOCKETS = ("Clip", "Conditioning", "Image", "Latent", "Model", "Vae")


@dataclass(frozen=True)
class Input:
    """What an input of a schema was made with."""

    kind: str
    id: str
    options: dict[str, Any]

    @property
    def is_widget(self) -> bool:
        return self.kind in _WIDGETS

    @property
    def shown(self) -> str:
        """The name on the node."""
        return self.options.get("display_name", self.id)


class ComfyNode:
    """Base of a node."""

    hidden = types.SimpleNamespace(unique_id="7")


class NodeOutput:
    """What a node gives."""

    def __init__(self, *values: Any, ui: Any = None) -> None:
        self.values = values
        self.ui = ui


class ExecutionBlocker:
    """An output after which no node is executed."""

    def __init__(self, message: str | None) -> None:
        self.message = message


class FolderPaths(types.ModuleType):
    """``folder_paths`` of a ComfyUI that lives in ``base``."""

    def __init__(self) -> None:
        super().__init__("folder_paths")
        self.folder_names_and_paths: dict[str, tuple[list[str], set[str]]] = {}

    def move(self, base: Path) -> None:
        """Use the folders of a new ComfyUI, as its own installation makes them."""
        places = {
            "loras": ["models/loras", "output/loras"],
            "diffusion_models": ["models/unet", "models/diffusion_models"],
            "custom_nodes": ["custom_nodes"],
            "datasets": ["datasets"],
        }
        for folder in ("input", "output", "temp", "user", *sum(places.values(), [])):
            (base / folder).mkdir(parents=True)
        self.base = base
        self.models_dir = str(base / "models")
        self.folder_names_and_paths = {
            name: ([str(base / folder) for folder in folders], set())
            for name, folders in places.items()
        }

    def get_input_directory(self) -> str:
        return str(self.base / "input")

    def get_output_directory(self) -> str:
        return str(self.base / "output")

    def get_temp_directory(self) -> str:
        return str(self.base / "temp")

    def get_user_directory(self) -> str:
        return str(self.base / "user")

    def get_folder_paths(self, name: str) -> list[str]:
        return list(self.folder_names_and_paths[name][0])

    def get_filename_list(self, name: str) -> list[str]:
        return [path.name for folder in self._folders(name) for path in sorted(folder.iterdir())]

    def get_full_path(self, name: str, file: str) -> str | None:
        paths = [folder / file for folder in self._folders(name)]
        return next((str(path) for path in paths if path.is_file()), None)

    def _folders(self, name: str) -> list[Path]:
        return [Path(folder) for folder in self.get_folder_paths(name)]


def modules() -> dict[str, types.ModuleType]:
    """Every stand-in by its name."""
    io = types.SimpleNamespace(
        ComfyNode=ComfyNode,
        ControlAfterGenerate=types.SimpleNamespace(fixed="fixed"),
        Custom=lambda name: _type(name, set()),
        Hidden=types.SimpleNamespace(unique_id="unique_id"),
        NodeOutput=NodeOutput,
        Schema=types.SimpleNamespace,
        **{name: _type(name, takes) for name, takes in _WIDGETS.items()},
        **{name: _type(name, set()) for name in _SOCKETS},
    )
    ui = types.SimpleNamespace(PreviewText=_ui, PreviewImage=_ui)
    contents: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.latent_formats": {"Flux": None},
        "comfy.model_management": {"InterruptProcessingException": type("_", (Exception,), {})},
        "comfy.sd": {},
        "comfy.utils": {},
        "comfy_api": {},
        "comfy_api.latest": {"io": io, "ui": ui},
        "comfy_execution": {},
        "comfy_execution.graph_utils": {"ExecutionBlocker": ExecutionBlocker},
        "server": {"PromptServer": types.SimpleNamespace(instance=None)},
    }
    made: dict[str, types.ModuleType] = {"folder_paths": FolderPaths()}
    for name, names in contents.items():
        made[name] = types.ModuleType(name)
        made[name].__dict__.update(names)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, made[name])
    return made


def _type(kind: str, takes: set[str]) -> types.SimpleNamespace:
    def make_input(id: str, **options: Any) -> Input:
        assert options.keys() <= _ALL | takes, f"{kind}.Input takes no {options.keys() - takes}"
        return Input(kind, id, options)

    def make_output(display_name: str, is_output_list: bool = False) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            kind=kind, display_name=display_name, is_output_list=is_output_list
        )

    return types.SimpleNamespace(Input=make_input, Output=make_output)


def _ui(shown: Any, **_options: Any) -> Any:
    return types.SimpleNamespace(shown=shown, as_dict=lambda: {"shown": shown})
