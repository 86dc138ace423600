"""The nodes, in the order of the menu."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import control
from .check import CheckTraining
from .config_files import ConfigFromToml, ConfigToToml
from .dataset import CacheDataset, DatasetFromFolder
from .demo import DemoModel, DemoTextEncode
from .lora_making import CombineLoras, ExtractLora, MergeLora, PostHocEma
from .lora_settings import LoraMetadata, LoraSettings
from .lora_tools import ConvertLora, InspectLora, LoraTargets, ResizeLora
from .loss import Loss
from .magcache import MagCache, MagCacheCalibrate, SaveMagCacheRatios
from .quantized_model import LoadQuantizedModel, QuantizeModel
from .run_settings import Compile, Logging, SamplePrompts, Validation
from .settings import (
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
    LoraMetadata,
    ConfigToToml,
    ConfigFromToml,
    LoraTargets,
    InspectLora,
    ConvertLora,
    MergeLora,
    CombineLoras,
    ResizeLora,
    ExtractLora,
    PostHocEma,
    LoadQuantizedModel,
    QuantizeModel,
    MagCache,
    MagCacheCalibrate,
    SaveMagCacheRatios,
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
