"""The pack inside ComfyUI, and tiny models that are loaded with both; for `native_quantized`.

To be imported after `headless.prepare`.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.sd
import server  # noqa: F401
import torch
from comfy.quant_ops import QuantizedTensor
from safetensors.torch import load_file

import nodes

messages: list[str] = []
detect = comfy.model_detection.detect_unet_config


class Collect(logging.Handler):
    """Keeps what ComfyUI warns of, such as keys that are missing or not expected."""

    def emit(self, record: logging.LogRecord) -> None:
        messages.append(record.getMessage())


def detect_any_size(state: dict[str, Any], prefix: str, metadata: Any = None) -> Any:
    """ComfyUI assumes the size of Qwen-Image's heads and text; tiny ones are told here."""
    config = detect(state, prefix, metadata=metadata)
    if config and config["image_model"] == "qwen_image":
        config["num_attention_heads"] = state[f"{prefix}img_in.weight"].shape[0] // 128
        config["joint_attention_dim"] = state[f"{prefix}txt_norm.weight"].shape[0]
    return config


comfy.model_detection.detect_unet_config = detect_any_size
logging.getLogger().addHandler(Collect(level=logging.WARNING))


class Pack:
    """Our modules under the names that ComfyUI gave them."""

    def __init__(self, path: str) -> None:
        assert asyncio.run(nodes.load_custom_node(path, module_parent="custom_nodes"))
        name = nodes.NODE_CLASS_MAPPINGS["LoraLoom_LoadQuantizedModel"].__module__
        root = name.removesuffix(".nodes.quantized_model")
        self.eight_bit = importlib.import_module(f"{root}.nodes.eight_bit_model")
        self.loading = importlib.import_module(f"{root}.engine.quantized_loading")


class Model:
    """One tiny model: ``outputs`` of files that ComfyUI loads by itself are kept."""

    def __init__(self, job: dict[str, Any], pack: Pack) -> None:
        self.job = job
        self.pack = pack
        self.inputs = load_file(job["inputs"])
        self.outputs: dict[str, torch.Tensor] = {}
        self.base = self.wanted(job["model"])

    def load(
        self, path: str | None = None, way: str = "e4m3 block", loras: Any = (), **more: Any
    ) -> Any:
        format, mode, block_size = self.job["ways"][way]["settings"]
        settings = self.pack.loading.QuantizationSettings(
            format=format, mode=mode, block_size=block_size, **more
        )
        request = self.pack.eight_bit.ModelRequest(
            Path(path or self.job["model"]),
            settings,
            tuple(loras),
            architecture=self.job["architecture"],
        )
        return self.pack.eight_bit.load_model(request, report=lambda event: None).patcher

    def output(self, patcher: Any) -> torch.Tensor:
        comfy.model_management.load_models_gpu([patcher])
        return patcher.model.apply_model(**self.inputs).clone()

    def wanted(self, path: str) -> torch.Tensor:
        if path not in self.outputs:
            self.outputs[path] = self.output(plainly(path))
        return self.outputs[path]

    def compared(self, found: torch.Tensor, path: str) -> list[float]:
        return distances(found, self.wanted(path), self.base)


def distances(found: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> list[float]:
    """Largest deviation, largest value, and largest change that was to be."""
    return [
        float((found - wanted).abs().max()),
        float(wanted.abs().max()),
        float((wanted - base).abs().max()),
    ]


def plainly(path: str) -> Any:
    """With ComfyUI's own loader."""
    return comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.float32})


def codes_of(patcher: Any) -> dict[str, torch.Tensor]:
    """Bytes of all weights in 8 bits and of their scales."""
    found: dict[str, torch.Tensor] = {}
    for name, module in patcher.model.diffusion_model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, QuantizedTensor):
            found[name] = weight._qdata.view(torch.uint8).clone()
            found[f"{name} scale"] = weight._params.scale.clone()
    return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[key]) for key, value in first.items()
    )
