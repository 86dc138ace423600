"""What the nodes of LoRA tools have in common: inputs, what these mean, runs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.utils
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..engine import launch
from ..engine.architectures.names import LAYER_NAMES
from ..engine.errors import ConfigError, DataError
from ..engine.events import Event, Reporter
from ..engine.jobs.tool_result import ToolResult
from ..engine.lora_command import DTYPES, FORMATS
from . import paths
from .images import to_comfy
from .made_files import EXISTING_FILE, digest, facts
from .progress import NodeProgress, check_cancelled
from .sockets import LoraModelType
from .widgets import settings, widget

AS_IN_FILE = "as in the file"
NUM_LORAS = 4
_SHOWN_LORAS = 2


# Inputs


def lora_input(name: str = "lora", *, tooltip: str, **options: Any) -> io.Input:
    """A choice of ComfyUI's LoRAs."""
    choices = [paths.NO_FOLDER, *paths.loras()]
    return io.Combo.Input(name, options=choices, tooltip=tooltip, **options)


def path_input(instead_of: str = "lora") -> io.Input:
    """The path of a LoRA from another node."""
    return io.String.Input(
        "lora_path",
        optional=True,
        force_input=True,
        tooltip=f"Path that another node gives, such as Train LoRA; used instead of {instead_of}.",
    )


def several_loras(*, shown: int = _SHOWN_LORAS) -> list[io.Input]:
    """Choices of LoRAs, each with its strength; all but the first ``shown`` are advanced."""
    inputs: list[io.Input] = []
    for number in range(1, NUM_LORAS + 1):
        advanced = number > shown or None
        inputs += [
            lora_input(f"lora_{number}", tooltip="A LoRA.", advanced=advanced),
            io.Float.Input(
                f"strength_{number}",
                default=1.0,
                min=-100.0,
                max=100.0,
                step=0.05,
                tooltip=f"How strongly lora_{number} counts; a negative number takes away.",
                advanced=advanced,
            ),
        ]
    return inputs


def format_input(default: str = AS_IN_FILE, **options: Any) -> io.Input:
    """How layers are called."""
    choices = list(FORMATS) if default in FORMATS else [default, *FORMATS]
    tooltip = "How the layers are called; ComfyUI reads comfyui for every family it has."
    return io.Combo.Input("format", options=choices, tooltip=tooltip, **options)


def dtype_input(default: str = AS_IN_FILE, **options: Any) -> io.Input:
    """Number type of the file."""
    choices = list(DTYPES) if default in DTYPES else [default, *DTYPES]
    tooltip = "Number type; bf16 is half as large as fp32."
    return io.Combo.Input("dtype", options=choices, tooltip=tooltip, **options)


def output_inputs(name: str) -> list[io.Input]:
    """Where the file goes, and of which family it is."""
    return [
        widget("output_name", default=name, tooltip="Name of the new file, without extension."),
        io.Combo.Input(
            "existing_file",
            options=list(EXISTING_FILE),
            advanced=True,
            tooltip="What to do if there is a file of that name that was not made from the same "
            "inputs: keep it and fail, or replace it.",
        ),
        architecture_input(),
    ]


def architecture_input() -> io.Input:
    """The family, for files that do not tell."""
    return io.Combo.Input(
        "architecture",
        options=["auto", *LAYER_NAMES],
        advanced=True,
        tooltip="Model family; auto finds it from the file.",
    )


# What they mean


def source(lora: str, lora_path: str | None) -> Path:
    """The LoRA that is chosen or linked.

    Raises:
        EngineError: there is none.
    """
    found = paths.linked_lora(lora_path) if lora_path else paths.chosen_lora(lora)
    if found is None:
        raise DataError("lora: none is chosen; choose one of the list, or connect lora_path")
    return found


def weighted_sources(inputs: Mapping[str, Any]) -> list[tuple[Path, float]]:
    """The LoRAs of `several_loras`, but for those of strength 0; ``lora_path`` is the first.

    Raises:
        EngineError: a file does not exist, or there is none.
    """
    found: list[tuple[Path, float]] = []
    for number in range(1, NUM_LORAS + 1):
        path = paths.chosen_lora(inputs[f"lora_{number}"])
        if number == 1 and inputs.get("lora_path"):
            path = paths.linked_lora(inputs["lora_path"])
        if path is not None and (strength := inputs[f"strength_{number}"]) != 0:
            found.append((path, strength))
    if not found:
        raise DataError("lora_1: no LoRA is chosen with a strength; choose one of the list")
    return found


def chosen(choice: str) -> str | None:
    """A format or number type; None for that of the file."""
    return None if choice == AS_IN_FILE else choice


def new_lora(where: str, output_name: str) -> Path:
    """The file that a node writes; ``where`` names the node.

    Raises:
        ConfigError: it is no name of a file.
    """
    return paths.loras_folder() / _file_name(where, output_name)


def new_model(where: str, output_name: str) -> Path:
    """As `new_lora`, of a diffusion model."""
    return paths.diffusion_models_folder() / _file_name(where, output_name)


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """Changes with the files that are chosen, and with those of the name that is written."""
    places = [paths.loras_folder(), paths.diffusion_models_folder()]
    files = [folder / f"{inputs.get('output_name')}.safetensors" for folder in places]
    texts = {value for value in inputs.values() if isinstance(value, str)}
    files += [paths.lora(name) for name in sorted(texts & set(paths.loras()))]
    files += [paths.diffusion_model(name) for name in sorted(texts & set(paths.diffusion_models()))]
    return digest([facts(path) for path in files])


# Running


def reporter(progress: NodeProgress) -> Reporter:
    """Shows a tool's progress, and ends it when the user cancels."""

    def report(event: Event) -> None:
        check_cancelled()
        progress(event)

    return report


def run_in_child(tool: str, arguments: list[str], progress: NodeProgress) -> str:
    """Run a tool in a process of its own, as the shell does; gives its report.

    Patterns are written by whoever made the workflow, and one that takes for ever must not take
    ComfyUI with it.

    Raises:
        EngineError: the tool failed.
        InterruptProcessingException: the user cancelled.
    """
    log = paths.temporary_file(f"{tool}.log")
    launch.run_tool(tool, arguments, log=log, on_event=progress, poll=check_cancelled)
    return progress.messages[-1]


def lora_output(node: type[io.ComfyNode], result: ToolResult) -> io.NodeOutput:
    """LoRA, path, report and, of tools that draw one, the picture."""
    lora = comfy.utils.load_torch_file(str(result.path), safe_load=True)
    values = [lora, str(result.path), result.report]
    if result.picture is None:
        return io.NodeOutput(*values, ui=ui.PreviewText(result.report))
    return io.NodeOutput(*values, to_comfy([result.picture]), ui=shown(node, result))


def lora_outputs(*, picture: bool) -> list[io.Output]:
    """The schema of `lora_output`."""
    outputs = [
        LoraModelType.Output(display_name="lora"),
        io.String.Output(display_name="lora path"),
        io.String.Output(display_name="report"),
    ]
    return [*outputs, io.Image.Output(display_name="picture")] if picture else outputs


def shown(node: type[io.ComfyNode], result: ToolResult) -> dict[str, Any]:
    """Report and picture on the node."""
    text = ui.PreviewText(result.report).as_dict()
    if result.picture is None:
        return text
    return ui.PreviewImage(to_comfy([result.picture]), cls=node).as_dict() | text


def picture(result: ToolResult) -> Any:
    """IMAGE, or what keeps nodes behind from running."""
    return to_comfy([result.picture]) if result.picture else ExecutionBlocker(None)


def _file_name(where: str, output_name: str) -> str:
    name = settings(where, {"output_name": output_name})["output_name"]
    if name is None:
        raise ConfigError(f"{where}: output_name is empty; give the file a name")
    return f"{name}.safetensors"
