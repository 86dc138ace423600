"""The recipe of a training as a TOML file for the shell and ``accelerate launch``, and back."""

from __future__ import annotations

import itertools
from typing import Any

from comfy_api.latest import io, ui

from ..engine.atomic_file import write_text
from ..engine.config import GROUPS, Config
from ..engine.config_file import load_config, parse_config, to_toml
from ..engine.errors import ConfigError
from . import paths, training
from .sockets import (
    CATEGORY,
    CompileType,
    DatasetType,
    LoggingType,
    LoraType,
    LossType,
    LrSchedulerType,
    MetadataType,
    OptimizerType,
    OptionsType,
    SamplesType,
    TimestepsType,
    TrainingModelType,
    ValidationType,
)
from .train import more_training_inputs, training_inputs

_MENU = f"{CATEGORY}/recipe"
# What each socket carries. Where files go and what happens to old ones is for the node to say.
_PARTS: dict[str, tuple[str, ...]] = {
    "model": (
        *GROUPS["model"].model_fields,
        *GROUPS["quantization"].model_fields,
        "mixed_precision",
        "gradient_checkpointing",
    ),
    "dataset": tuple(GROUPS["dataset"].model_fields),
    "lora": (
        *(name for name in GROUPS["network"].model_fields if name != "network_dim"),
        "save_precision",
        "save_format",
    ),
    "optimizer": ("optimizer_type", "optimizer_args", "max_grad_norm"),
    "lr_scheduler": (
        "lr_scheduler",
        "lr_scheduler_type",
        "lr_scheduler_args",
        "lr_warmup_steps",
        "lr_scheduler_min_lr_ratio",
        "lr_scheduler_num_cycles",
        "lr_scheduler_power",
        "lr_decay_steps",
        "lr_scheduler_timescale",
        "rex_alpha",
        "rex_beta",
    ),
    "timesteps": tuple(GROUPS["timesteps"].model_fields),
    "options": (
        "max_train_epochs",
        "gradient_accumulation_steps",
        "save_every_n_epochs",
        "save_last_n_steps",
        "save_last_n_epochs",
        "save_state",
        "save_last_n_steps_state",
        "save_last_n_epochs_state",
        "autosave_minutes",
        "on_divergence",
        "divergence_factor",
        "infer_steps",
        "embedded_cfg_scale",
        "flow_shift",
        "device",
        "cpu_threads",
    ),
    "loss": tuple(GROUPS["loss"].model_fields),
    "validation": tuple(GROUPS["validation"].model_fields),
    "samples": tuple(GROUPS["samples"].model_fields),
    "logging": tuple(GROUPS["logging"].model_fields),
    "compile": ("dynamo_backend", "dynamo_mode", "dynamo_fullgraph", "dynamo_dynamic"),
    "metadata": tuple(GROUPS["metadata"].model_fields),
}


class ConfigToToml(io.ComfyNode):
    """Writes down what Train LoRA would do."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_ConfigToToml",
            display_name="Training Config to TOML",
            category=_MENU,
            description="Writes a training as a TOML file that runs in the shell: "
            "python -m engine train --config_file FILE, or accelerate launch -m engine train ...",
            is_output_node=True,
            inputs=[*training_inputs(), *more_training_inputs()],
            outputs=[
                io.String.Output(display_name="toml"),
                io.String.Output(display_name="path"),
            ],
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        config = training.config("Training Config to TOML", "continue", inputs)
        path = paths.recipes_folder() / f"{config.output.output_name}.toml"
        text = to_toml(config)
        write_text(path, text)
        return io.NodeOutput(text, str(path), ui=ui.PreviewText(f"{path}\n\n{text}"))


class ConfigFromToml(io.ComfyNode):
    """Reads a recipe back into sockets and values."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_ConfigFromToml",
            display_name="Training Config from TOML",
            category=_MENU,
            description="Reads a training from a TOML file or text. Connect the outputs to the "
            "inputs of the same names on Train LoRA.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[paths.NO_FOLDER, *paths.recipe_files()],
                    tooltip="A recipe in ComfyUI's input folder or beside a trained LoRA.",
                ),
                io.String.Input(
                    "toml", default="", multiline=True, tooltip="The text of a recipe instead."
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, file: str, toml: str) -> io.NodeOutput:
        config = _read(file, toml)
        paths.check_inside(config, itertools.chain(*_PARTS.values()))
        return io.NodeOutput(*(_carried(config, made.display_name) for made in _outputs()))


def _outputs() -> list[io.Output]:
    """Sockets and values; what came later stands at the end, because saved workflows count."""
    return [
        TrainingModelType.Output(display_name="model"),
        DatasetType.Output(display_name="dataset"),
        LoraType.Output(display_name="lora"),
        OptimizerType.Output(display_name="optimizer"),
        LrSchedulerType.Output(display_name="lr_scheduler"),
        TimestepsType.Output(display_name="timesteps"),
        OptionsType.Output(display_name="options"),
        io.String.Output(display_name="output_name"),
        io.Int.Output(display_name="max_train_steps"),
        io.Float.Output(display_name="learning_rate"),
        io.Int.Output(display_name="network_dim"),
        io.Int.Output(display_name="seed"),
        LossType.Output(display_name="loss"),
        ValidationType.Output(display_name="validation"),
        SamplesType.Output(display_name="samples"),
        LoggingType.Output(display_name="logging"),
        CompileType.Output(display_name="compile"),
        io.Int.Output(display_name="save_every_n_steps"),
        io.Int.Output(display_name="preview_images"),
        MetadataType.Output(display_name="metadata"),
    ]


def _carried(config: Config, output: str) -> Any:
    """The settings of a socket, or one as the widget of its name shows it."""
    if output in _PARTS:
        return {name: config.value(name) for name in _PARTS[output]}
    unset = {"output_name": "my_lora", "save_every_n_steps": 0}
    value = config.value(output)
    return unset[output] if value is None else value


def _read(file: str, toml: str) -> Config:
    if toml.strip():
        return parse_config(toml, "toml")
    if file == paths.NO_FOLDER:
        raise ConfigError("Training Config from TOML: choose a file, or paste a recipe into toml")
    return load_config(paths.recipe_file(file), {}, {})
