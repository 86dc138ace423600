"""The files that `test_native_quantized` gives to ComfyUI, and checkpoints to compare with.

Those are in float32: they hold the weights that codes and scales mean, so that ComfyUI, which
knows nothing of how they came about, must compute the same with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pack.engine.adapter_weights import LoRAWeights, delta
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.jobs import quantize as job
from pack.engine.lora_file import write_lora
from pack.engine.quantize import dequantize, quantize
from pack.engine.quantized_loading import QuantizationSettings
from pack.tests.references import checkpoint_layouts, random_adapters, tiny_native
from pack.tests.references.random_adapters import Draw
from safetensors.torch import load_file, save_file
from torch import Tensor

# Format, mode and block size.
WAYS = {
    "e4m3 block": ("e4m3", "block", 64),
    "e4m3 tensor": ("e4m3", "tensor", 64),
    "e5m2 channel": ("e5m2", "channel", 64),
    "int8 block": ("int8", "block", 32),
    "int8 tensor": ("int8", "tensor", 64),
}
STRENGTH = 0.6
# Weights that are kept in 8 bits: those of matrices in the blocks, but for the first group.
_NEVER = {
    "flux_kontext": r"norm|mod",
    "hunyuan_video": r"norm|_mod|modulation",
    "wan": r"norm",
    "qwen_image": r"norm",
}
_BLOCKS = {
    "flux_kontext": r"(double|single)_blocks\.",
    "hunyuan_video": r"(double|single)_blocks\.",
    "wan": r"blocks\.",
    "qwen_image": r"transformer_blocks\.",
}


class QuantizedCases:
    """Writes the files of one model."""

    def __init__(self, folder: Path, model: str) -> None:
        folder.mkdir()
        self.folder = folder
        self.family = tiny_native.MODELS[model]
        self.names = LAYER_NAMES[self.family]
        self.state, inputs = tiny_native.build(model)
        self.source = self._save("model", self.state)
        self.inputs = self._save("inputs", inputs)
        self.adapters = self._adapters()
        self.lora = folder / "lora.safetensors"
        write_lora(
            self.lora, self.adapters, self.names, format="comfyui", dtype=torch.float32, metadata={}
        )

    def job(self) -> dict[str, Any]:
        """What the script is to do."""
        scratch = self.folder / "scratch"
        scratch.mkdir()
        rounded = self.rounded(self.state, "e4m3 block")
        return {
            "model": str(self.source),
            # In diffusers' names a small HunyuanVideo could as well be FramePack.
            "architecture": self.family if self.family == "hunyuan_video" else "auto",
            "inputs": str(self.inputs),
            "scratch": str(scratch),
            "ways": {
                name: {"settings": way, "wanted": str(self._save(f"{name} rounded", tensors))}
                for name, way in WAYS.items()
                for tensors in (self.rounded(self.state, name),)
            },
            "lora": {
                "path": str(self.lora),
                "strength": STRENGTH,
                "wanted": str(self._save("rounded with lora", self.with_lora(rounded))),
                "merged_first": str(
                    self._save("merged first", self.rounded(self.with_lora(self.state)))
                ),
            },
            "files": self._files(),
        }

    def is_quantized(self, key: str) -> bool:
        """Whether the weight ``key`` is kept in 8 bits."""
        family = self.family
        is_in_block = re.match(_BLOCKS[family], key) and key.endswith(".weight")
        is_matrix = self.state[key].dim() == 2
        return bool(is_in_block and is_matrix and not re.search(_NEVER[family], key))

    def rounded(self, state: Mapping[str, Tensor], way: str = "e4m3 block") -> dict[str, Tensor]:
        """The checkpoint with what is left of the weights in 8 bits."""
        format, mode, block_size = WAYS[way]

        def round_trip(weight: Tensor) -> Tensor:
            return dequantize(quantize(weight, format=format, mode=mode, block_size=block_size))

        return self._changed(state, round_trip)

    def with_lora(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint with the LoRA added."""
        found = dict(state)
        for name, adapter in self.adapters.items():
            key = f"{name}.weight"
            found[key] = state[key] + STRENGTH * delta(adapter)
        return found

    def _adapters(self) -> dict[str, LoRAWeights]:
        """Small enough that most of what they change is less than a step of 8 bits."""
        draw = Draw(20)
        found: dict[str, LoRAWeights] = {}
        for key, weight in self.state.items():
            if self.is_quantized(key):
                made = random_adapters.lora(weight, draw, 4)
                found[key.removesuffix(".weight")] = replace(made, up=made.up * 0.1)
        return found

    def _files(self) -> dict[str, dict[str, str]]:
        """Files in 8 bits, and the checkpoint that each of them means."""
        found: dict[str, dict[str, str]] = {}

        def add(name: str, path: Path, wanted: Mapping[str, Tensor]) -> None:
            found[name] = {"found": str(path), "wanted": str(self._save(f"for {name}", wanted))}

        for layout, way in (("blockwise", "int8 block"), ("comfyui", "e4m3 tensor")):
            add(layout, self._quantized_file(layout, way), self.rounded(self.state, way))
        old, metadata = self._with_marker()
        add("marker", self._save("marker", old, metadata), self.rounded(self.state, "e4m3 tensor"))
        cast = self._changed(self.state, lambda weight: weight.to(torch.float8_e4m3fn))
        plain = self._changed(self.state, lambda weight: weight.to(torch.float8_e4m3fn).float())
        add("cast", self._save("cast", cast), plain)
        if self.family != "qwen_image":  # which has diffusers' names anyway
            split = checkpoint_layouts.as_diffusers(self.state, self.names)
            add("diffusers", self._save("diffusers", split), self.rounded(self.state))
        prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in self.state.items()}
        prefixed["vae.decoder.conv_in.weight"] = torch.ones(4, 4, 3, 3)
        add("checkpoint", self._save("checkpoint", prefixed), self.rounded(self.state))
        return found

    def _quantized_file(self, layout: str, way: str) -> Path:
        format, mode, block_size = WAYS[way]
        output = self.folder / f"{layout}.safetensors"
        job.run(
            dit=self.source,
            output=output,
            settings=QuantizationSettings(format=format, mode=mode, block_size=block_size),
            layout=layout,
            architecture=self.family,
            report=lambda event: None,
        )
        return output

    def _with_marker(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """ComfyUI's older way: codes, ``.scale_weight``, and a tensor that says so."""
        tensors = dict(self.state)
        for key in filter(self.is_quantized, self.state):
            made = quantize(self.state[key], mode="tensor")
            tensors[key] = made.codes
            tensors[f"{key.removesuffix('weight')}scale_weight"] = made.scale
        return tensors | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}

    def _changed(
        self, state: Mapping[str, Tensor], change: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        return {
            key: change(tensor) if self.is_quantized(key) else tensor
            for key, tensor in state.items()
        }

    def _save(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> Path:
        path = self.folder / f"{name}.safetensors"
        owned = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(owned, path, metadata=dict(metadata or {}))
        return path


def same_bits(first: Path, second: Path, key: str) -> bool:
    """Whether two files have the same bytes for a tensor."""
    a, b = load_file(first)[key], load_file(second)[key]
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
