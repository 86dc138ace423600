"""The nodes, in the order of the menu."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import control
from .check import CheckTraining
from .config_files import ConfigFromToml, ConfigToToml
from .dataset import CacheDataset, DatasetFromFolder
from .demo import DemoModel, DemoTextEncode
from .loss import Loss
from .run_settings import Compile, Logging, SamplePrompts, Validation
from .settings import (
    LoraSettings,
    LrScheduler,
    OptimizerSettings,
    TimestepSampling,
    TrainingOptions,
)
from .train import TrainingModel, TrainLora

NODES: list[type[io.ComfyNode]] = [
    TrainingModel,
    DatasetFromFolder,
    CacheDataset,
    TrainLora,
    CheckTraining,
    LoraSettings,
    OptimizerSettings,
    LrScheduler,
    TimestepSampling,
    Loss,
    TrainingOptions,
    Validation,
    SamplePrompts,
    Logging,
    Compile,
    ConfigToToml,
    ConfigFromToml,
    DemoModel,
    DemoTextEncode,
]


class LoraLoom(ComfyExtension):
    """The pack."""

    async def on_load(self) -> None:
        control.add_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> LoraLoom:
    """What ComfyUI calls when it loads the pack."""
    return LoraLoom()
