"""The nodes, in the order of the menu."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .config_files import ConfigFromToml, ConfigToToml
from .dataset import CacheDataset, DatasetFromFolder
from .demo import DemoModel, DemoTextEncode
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
    LoraSettings,
    OptimizerSettings,
    LrScheduler,
    TimestepSampling,
    TrainingOptions,
    ConfigToToml,
    ConfigFromToml,
    DemoModel,
    DemoTextEncode,
]


class LoraLoom(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> LoraLoom:
    """What ComfyUI calls when it loads the pack."""
    return LoraLoom()
