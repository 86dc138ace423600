"""Nodes of optional settings for Train LoRA: what is measured, drawn and logged on the way."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..engine.config import FIELDS
from ..engine.config_types import DYNAMO_BACKENDS
from . import paths
from .sockets import CATEGORY, CompileType, LoggingType, SamplesType, ValidationType
from .widgets import settings, widget

_MENU = f"{CATEGORY}/settings"


class Validation(io.ComfyNode):
    """Pictures that are measured rather than trained."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_Validation",
            display_name="Validation",
            category=_MENU,
            description="Measures the loss of pictures that are not trained: a folder of their "
            "own, or a share of the dataset. Connect it to Cache Dataset, too.",
            search_aliases=["early stop", "overfitting", "held out"],
            inputs=[
                io.Combo.Input(
                    "validation_folder",
                    options=[paths.NO_FOLDER, *paths.dataset_folders()],
                    tooltip=FIELDS["validation_directory"].description,
                ),
                widget("validation_split", max=0.95),
                widget("validate_every_n_steps"),
                widget("early_stop_patience"),
                widget("keep_best"),
                widget("validation_times", advanced=True),
            ],
            outputs=[ValidationType.Output(display_name="validation")],
        )

    @classmethod
    def fingerprint_inputs(cls, validation_folder: str | None = None, **widgets: Any) -> str:
        return paths.fingerprint(validation_folder)

    @classmethod
    def execute(cls, validation_folder: str, **widgets: Any) -> io.NodeOutput:
        values = settings("Validation", widgets)
        values["validation_directory"] = paths.chosen_folder(validation_folder)
        return io.NodeOutput(values)


class SamplePrompts(io.ComfyNode):
    """What is drawn while the training goes on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_SamplePrompts",
            display_name="Sample Prompts",
            category=_MENU,
            description="Draws prompts while the training goes on. Connect it to Cache Dataset, "
            "too, whose CLIP encodes them.",
            search_aliases=["preview", "sample during training"],
            inputs=[
                widget(
                    "sample_lines",
                    tooltip="One prompt a line, with options behind it where they differ: --w 512 "
                    "--h 512 (size), --s 20 (steps), --g 2.5 (guidance), --d 1 (seed).",
                    placeholder="a lighthouse at night, my style --w 768 --h 512 --d 1",
                ),
                widget("sample_every_n_steps", default=250),
                widget("sample_every_n_epochs"),
                widget("sample_at_first"),
            ],
            outputs=[SamplesType.Output(display_name="samples")],
        )

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        values = settings("Sample Prompts", widgets)
        paths.check_prompts("Sample Prompts", values["sample_lines"])
        return io.NodeOutput(values)


class Logging(io.ComfyNode):
    """Curves for TensorBoard and wandb."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_Logging",
            display_name="Logging",
            category=_MENU,
            description="Writes loss, learning rate and samples for TensorBoard or wandb into "
            "ComfyUI's output/lora_loom/logs. wandb stays offline unless you have logged in with "
            "its own command.",
            search_aliases=["tensorboard", "wandb"],
            inputs=[
                widget(
                    "log_with",
                    options=["tensorboard", "wandb", "all"],
                    default="tensorboard",
                    tooltip="Which logger; all: both.",
                ),
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="Folder inside output/lora_loom/logs; empty: that one itself. Each run "
                    "gets one inside.",
                ),
                widget("log_prefix"),
                widget("log_tracker_name"),
                widget("wandb_run_name"),
                widget("log_config"),
                io.Combo.Input(
                    "tracker_config",
                    options=[paths.NO_FOLDER, *paths.recipe_files()],
                    advanced=True,
                    tooltip=FIELDS["log_tracker_config"].description,
                ),
            ],
            outputs=[LoggingType.Output(display_name="logging")],
        )

    @classmethod
    def execute(cls, folder: str, tracker_config: str, **widgets: Any) -> io.NodeOutput:
        values = settings("Logging", widgets)
        values["logging_dir"] = paths.logs_folder(folder)
        values["log_tracker_config"] = paths.chosen_recipe(tracker_config)
        return io.NodeOutput(values)


class Compile(io.ComfyNode):
    """Faster steps after a slow first one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_Compile",
            display_name="Compile",
            category=_MENU,
            description="Compiles the model's blocks with torch.compile: the first step takes "
            "minutes, those after it are faster. Needs a C++ compiler or Triton.",
            search_aliases=["torch.compile", "dynamo"],
            inputs=[
                widget("dynamo_backend", options=list(DYNAMO_BACKENDS), default="INDUCTOR"),
                widget("dynamo_mode"),
                widget("dynamo_fullgraph", advanced=True),
                widget("dynamo_dynamic", advanced=True),
            ],
            outputs=[CompileType.Output(display_name="compile")],
        )

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        return io.NodeOutput(settings("Compile", widgets))
