"""Types of our sockets. All carry settings and paths (flat name -> value), never live models."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "LoRA Loom"

TrainingModelType = io.Custom("LORALOOM_MODEL")
DatasetType = io.Custom("LORALOOM_DATASET")
LoraType = io.Custom("LORALOOM_LORA")
OptimizerType = io.Custom("LORALOOM_OPTIMIZER")
LrSchedulerType = io.Custom("LORALOOM_LR_SCHEDULER")
TimestepsType = io.Custom("LORALOOM_TIMESTEPS")
OptionsType = io.Custom("LORALOOM_OPTIONS")
LossType = io.Custom("LORALOOM_LOSS")
ValidationType = io.Custom("LORALOOM_VALIDATION")
SamplesType = io.Custom("LORALOOM_SAMPLES")
LoggingType = io.Custom("LORALOOM_LOGGING")
CompileType = io.Custom("LORALOOM_COMPILE")
MetadataType = io.Custom("LORALOOM_METADATA")
TextEncoderType = io.Custom("LORALOOM_TEXT_ENCODER")

# ComfyUI's own; the first goes into its node Load LoRA Model, the second into Loss Graph.
LoraModelType = io.Custom("LORA_MODEL")
LossMapType = io.Custom("LOSS_MAP")
