"""Training Model and Train LoRA: settings in, a finished LoRA out."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..engine.architectures import find_architecture
from ..engine.config import FIELDS
from ..engine.presets import MEMORY_PRESETS
from . import paths, results, training
from .sockets import (
    CATEGORY,
    CompileType,
    DatasetType,
    LoggingType,
    LoraModelType,
    LoraType,
    LossMapType,
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
from .widgets import settings, widget

_SCALED = {"fp8_base": True, "fp8_scaled": True}
# What the choices of Training Model's weights mean.
_WEIGHTS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "fp8": _SCALED | {"quantize_format": "e4m3"},
    "fp8 (e5m2)": _SCALED | {"quantize_format": "e5m2"},
    "int8": _SCALED | {"quantize_format": "int8"},
}
_EIGHT_BIT = (
    "quantize_mode",
    "quantize_block_size",
    "quantize_scale_dtype",
    "quantize_search",
    "quantize_exclude_patterns",
)


class TrainingModel(io.ComfyNode):
    """The model that a LoRA is trained for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        presets = "; ".join(f"{name}: {preset.help}" for name, preset in MEMORY_PRESETS.items())
        return io.Schema(
            node_id="LoraLoom_TrainingModel",
            display_name="Training Model",
            category=CATEGORY,
            description="The diffusion model that the LoRA is for. It is only read when the "
            "training starts, in a process of its own.",
            search_aliases=["train", "flux"],
            inputs=[
                io.Combo.Input(
                    "dit", options=paths.diffusion_models(), tooltip=FIELDS["dit"].description
                ),
                io.Combo.Input(
                    "memory",
                    options=list(MEMORY_PRESETS),
                    tooltip=f"Speed against memory. {presets}.",
                ),
                widget("architecture", advanced=True),
                widget("mixed_precision", advanced=True),
                io.Combo.Input(
                    "weights",
                    options=list(_WEIGHTS),
                    optional=True,
                    tooltip="How the weights of the model's blocks are kept: as they are, or in 8 "
                    "bits with scales, which take half the memory of bf16. int8 is the more exact.",
                ),
                *(widget(name, advanced=True, optional=True) for name in _EIGHT_BIT),
                io.Boolean.Input(
                    "keep_copy",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Keep the model in 8 bits in ComfyUI's user folder, so that the next "
                    "training only reads it.",
                ),
            ],
            outputs=[TrainingModelType.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls,
        dit: str,
        memory: str,
        architecture: str,
        weights: str = next(iter(_WEIGHTS)),
        keep_copy: bool = False,
        **widgets: Any,
    ) -> io.NodeOutput:
        path = paths.diffusion_model(dit)
        own = {"architecture": find_architecture(architecture, path).name, **widgets}
        own |= MEMORY_PRESETS[memory].settings | _WEIGHTS[weights]
        values = settings("Training Model", own) | {"dit": path}
        if keep_copy and _WEIGHTS[weights]:
            values["quantized_cache"] = paths.own_cache("models")
        return io.NodeOutput(values)


class TrainLora(io.ComfyNode):
    """Trains in a child process; the output is the finished file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_TrainLora",
            display_name="Train LoRA",
            category=CATEGORY,
            description="Trains a LoRA. Cancel stops and saves; queueing again continues where it "
            "was, and returns at once when it is finished. The file is in ComfyUI's list of LoRAs.",
            search_aliases=["train", "lora", "finetune"],
            is_output_node=True,
            inputs=[
                *training_inputs(),
                io.Combo.Input(
                    "existing_run",
                    options=list(training.EXISTING_RUN),
                    advanced=True,
                    tooltip="What to do with an earlier run of the same name: continue it, or "
                    "replace it by a new one.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the previews and samples."),
                *more_training_inputs(),
            ],
            outputs=[
                LoraModelType.Output(display_name="lora"),
                io.String.Output(display_name="lora path"),
                LossMapType.Output(display_name="loss map"),
                io.Image.Output(display_name="loss curve"),
                io.Image.Output(display_name="previews"),
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="samples", is_output_list=True),
                io.Image.Output(display_name="loss by noise level"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(
        cls, output_name: Any = None, existing_run: Any = None, **inputs: Any
    ) -> int | None:
        # Another one after each run that got further, so that it can be continued.
        return training.last_change(output_name) if existing_run == "continue" else None

    @classmethod
    def execute(cls, existing_run: str, vae: Any = None, **inputs: Any) -> io.NodeOutput:
        config = training.config("Train LoRA", existing_run, inputs)
        messages = training.train(config, vae, cls.hidden.unique_id)
        return results.outputs(config, vae, messages, cls)


def training_inputs() -> list[io.Input]:
    """What decides a training, for the nodes that start it or write it down."""
    return [
        TrainingModelType.Input("model"),
        DatasetType.Input("dataset"),
        widget("output_name", default="my_lora"),
        widget("max_train_steps"),
        widget("learning_rate"),
        widget("network_dim"),
        widget("seed", control_after_generate=io.ControlAfterGenerate.fixed),
        widget("save_every_n_steps"),
        widget("preview_images"),
        LoraType.Input("lora", optional=True),
        OptimizerType.Input("optimizer", optional=True),
        LrSchedulerType.Input("lr_scheduler", optional=True),
        TimestepsType.Input("timesteps", optional=True),
        OptionsType.Input("options", optional=True),
    ]


def more_training_inputs() -> list[io.Input]:
    """The rest of `training_inputs`, which came later: saved workflows count the inputs."""
    return [
        LossType.Input("loss", optional=True),
        ValidationType.Input("validation", optional=True),
        SamplesType.Input("samples", optional=True),
        LoggingType.Input("logging", optional=True),
        CompileType.Input("compile", optional=True),
        MetadataType.Input("metadata", optional=True),
    ]
