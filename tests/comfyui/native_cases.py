"""The LoRA files that `test_native_lora` gives to ComfyUI, and the checkpoints to compare with.

Where our own writer made the file, the checkpoints are those of the merging tool; where another
tool's spelling is imitated, they come from plain sums.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pack.engine.adapter_weights import AdapterWeights, FullWeights, delta, merged
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.jobs import lora_merge
from pack.engine.lora_file import read_lora, write_lora
from pack.tests.references import foreign_spellings, random_adapters, tiny_native
from pack.tests.references.foreign_spellings import Spelling
from pack.tests.references.random_adapters import Draw
from safetensors.torch import load_file, save_file
from torch import Tensor

STRENGTHS = (1.0, 0.6, -0.5)
KINDS = random_adapters.KINDS
# ComfyUI knows diffusers' names for these two; files for diffusers hold LoRAs only.
FOR_DIFFUSERS = ("FLUX.1 Kontext", "Qwen-Image")
WRITTEN = [
    (model, kind, format)
    for model in tiny_native.MODELS
    for kind in KINDS
    for format in ("comfyui", "kohya")
] + [(model, kind, "diffusers") for model in FOR_DIFFUSERS for kind in ("lora", "loha")]
# In its bypass mode ComfyUI has no LoKr of three-dimensional convolutions.
BYPASS = {
    model: ("lora", "loha", "dora", "full", *(("lokr",) if model in FOR_DIFFUSERS else ()))
    for model in tiny_native.MODELS
}
# Where a file says how it is quantized: ComfyUI's older way, its two newer ones, not at all.
LAYOUTS = ("marker", "header", "tensors", "cast")
QUANTIZED = ("FLUX.1 Kontext", "HunyuanVideo")


@dataclass(frozen=True)
class Foreign:
    """A tool's file; ``taken`` is whether ComfyUI loads all of it, a part (None) or nothing."""

    spelling: Spelling
    taken: bool | None
    kind: str = "lora"

    def adapter(self, weight: Tensor, draw: Draw, rank: int) -> AdapterWeights:
        if self.kind == "lokr":
            return random_adapters.lokr(weight, draw, rank)
        adapter = random_adapters.lora(weight, draw, rank)
        # Only kohya's files say alpha; for others it is the rank.
        return adapter if self.spelling.suffixes == "kohya" else replace(adapter, alpha=float(rank))


FOREIGN: dict[str, dict[str, Foreign]] = {
    "FLUX.1 Kontext": {
        "diffusers": Foreign(Spelling("transformer.", "diffusers", diffusers=True), taken=True),
        "peft": Foreign(Spelling("base_model.model.", "peft", diffusers=True), taken=False),
        "OneTrainer": Foreign(
            Spelling("lora_transformer_", "kohya", underscores=True, diffusers=True), taken=True
        ),
        "SimpleTuner": Foreign(
            Spelling("lycoris_", "kohya", underscores=True, diffusers=True),
            taken=True,
            kind="lokr",
        ),
    },
    "Wan 2.1 i2v": {
        "diffusers": Foreign(Spelling("transformer.", "diffusers", diffusers=True), taken=False),
        "no prefix": Foreign(Spelling("", "diffusers"), taken=False),
        "Wan-Fun": Foreign(Spelling("lora_unet__", "kohya", underscores=True), taken=True),
    },
    "Qwen-Image": {
        "musubi-tuner": Foreign(Spelling("lora_unet_", "kohya", underscores=True), taken=True),
        "peft": Foreign(Spelling("", "peft"), taken=True),
        "old diffusers": Foreign(Spelling("transformer.", "old diffusers"), taken=True),
        "OneTrainer": Foreign(
            Spelling("lora_transformer_", "kohya", underscores=True), taken=False
        ),
    },
    "HunyuanVideo": {
        "diffusion-pipe": Foreign(Spelling("transformer.", "diffusers"), taken=True),
        "diffusers": Foreign(Spelling("transformer.", "diffusers", diffusers=True), taken=False),
        "musubi-tuner": Foreign(Spelling("lora_unet_", "kohya", underscores=True), taken=None),
    },
}


class Cases:
    """Writes the files of one model, and says what ComfyUI is to do with each."""

    def __init__(self, folder: Path, model: str) -> None:
        folder.mkdir()
        self.name = model
        self.folder = folder
        self.family = tiny_native.MODELS[model]
        self.names = LAYER_NAMES[self.family]
        self.state, inputs = tiny_native.build(model)
        self.model = self._save("model", self.state)
        self.extracted = folder / "extracted.lora.safetensors"
        self.inputs = self._save("inputs", inputs)
        self.cases: dict[str, dict[str, Any]] = {}
        self.pairs: dict[str, dict[str, str]] = {}

    def job(self) -> dict[str, Any]:
        full = self.cases["full as comfyui"]["merged"]["1.0"]
        return {
            "model": str(self.model),
            "inputs": str(self.inputs),
            "extract": {"checkpoint": full, "lora": str(self.extracted)},
            "cases": self.cases,
            "pairs": self.pairs,
        }

    def add_written(self, kind: str) -> None:
        """One kind of adapter on every layer, as our writer spells it."""
        adapters = KINDS[kind](self.state)
        formats = [each for model, of, each in WRITTEN if (model, of) == (self.name, kind)]
        paths = {each: self._written(f"{kind} as {each}", adapters, each) for each in formats}
        checkpoints = {each: self._merged(kind, paths["comfyui"], each) for each in STRENGTHS}
        bypass = {0.6: checkpoints[0.6]} if kind in BYPASS[self.name] else {}
        for format, path in paths.items():
            self._add(f"{kind} as {format}", path, checkpoints, bypass)

    def add_half_precision(self) -> None:
        adapters = KINDS["lora"](self.state)
        path = self._written("bf16", adapters, "comfyui", dtype=torch.bfloat16)
        self._add("bf16", path, {1.0: self._merged("bf16", path, 1.0)})

    def add_foreign(self, tool: str, foreign: Foreign) -> None:
        """A file of another tool: as it is, and read and written by us."""
        adapters, expected = self._of_modules(foreign)
        path = self.folder / f"{tool}.lora.safetensors"
        foreign_spellings.save(path, adapters, foreign.spelling)
        file = read_lora(path, LAYER_NAMES.values(), shapes=self._shapes())
        checkpoints = {each: self._summed(tool, expected, each) for each in (1.0, -0.5)}
        self._add(f"{tool} itself", path, checkpoints if foreign.taken else {})
        for format in ("comfyui", "kohya"):
            name = f"{tool} as {format}"
            self._add(name, self._written(name, file.layers, format), checkpoints)

    def add_row_norms(self) -> None:
        """DoRA with the norm of each row, with what ComfyUI makes of it."""
        draw, adapters, natives = Draw(9), {}, {}
        for name, weight in random_adapters.layers_of(self.state).items():
            adapter = random_adapters.lora(weight, draw, 3)
            rows = random_adapters.row_norms(weight, draw)
            adapters[name] = replace(adapter, magnitude=rows)
            scale = rows / weight.norm(dim=1, keepdim=True)
            natives[name] = FullWeights(scale * (weight + delta(adapter)) - weight)
        path = self._written("row norms", adapters, "comfyui")
        self._add("row norms as ComfyUI", path, {1.0: self._summed("row norms", natives, 1.0)})
        self._add("row norms", path, {1.0: self._merged("row norms of ours", path, 1.0)})
        diffusers = self._written("row norms as diffusers", adapters, "diffusers")
        self._add("row norms as diffusers", diffusers, {})

    def add_convolution(self) -> None:
        """A LoKr of a three-dimensional convolution: as LyCORIS stores it, and as we do."""
        layer = "patch_embedding"
        adapter = random_adapters.lokr(self.state[f"{layer}.weight"], Draw(10), 2, factors=0)
        change = {layer: FullWeights(delta(adapter))}
        checkpoints = {1.0: self._summed("convolution", change, 1.0)}
        path = self.folder / "convolution.lora.safetensors"
        foreign_spellings.save(path, {layer: adapter}, Spelling("diffusion_model.", "kohya"))
        self._add("convolution as LyCORIS", path, checkpoints)
        ours = self._written("convolution as comfyui", {layer: adapter}, "comfyui")
        self._add("convolution as comfyui", ours, checkpoints)

    def add_quantized(self, layout: str) -> None:
        """An FP8 model with a LoRA merged in, and the weights that its codes and scales mean."""
        tensors, metadata = _quantized(self.state, self.names.blocks, layout)
        source = self._save(layout, tensors, metadata)
        lora = self._written(f"for {layout}", KINDS["lora"](self.state), "comfyui")
        path = self._merged(f"{layout} with LoRA", lora, 1.0, model=source)
        found = load_file(path)
        plain: dict[str, Tensor] = {}
        for key in self.state:
            layer = key.removesuffix(".weight")
            scale = found.get(f"{layer}.weight_scale", found.get(f"{layer}.scale_weight"))
            plain[key] = found[key].float() * (1.0 if scale is None else scale)
        wanted = self._save(f"{layout} in float32", plain)
        self.pairs[layout] = {"found": str(path), "wanted": str(wanted)}

    def _of_modules(
        self, foreign: Foreign
    ) -> tuple[dict[str, AdapterWeights], dict[str, AdapterWeights]]:
        """Adapters by module, and the differences that they make together by layer.

        The second module of the first layer that has several gets none.
        """
        draw, skipped = Draw(11), False
        adapters: dict[str, AdapterWeights] = {}
        expected: dict[str, AdapterWeights] = {}
        for layer, weight in random_adapters.layers_of(self.state).items():
            if not layer.startswith(self.names.blocks):
                continue
            modules = [layer]
            if foreign.spelling.diffusers:
                modules = foreign_spellings.modules_of(self.family, layer)
            heights = foreign_spellings.heights_of(modules, weight.shape[0])
            differences: list[Tensor] = []
            for module, part in zip(modules, weight.split(heights), strict=True):
                if not skipped and module != modules[0]:
                    skipped = True
                    differences.append(torch.zeros_like(part))
                    continue
                adapters[module] = foreign.adapter(part, draw, 1 + len(adapters) % 4)
                differences.append(delta(adapters[module]))
            expected[layer] = FullWeights(torch.cat(differences))
        return adapters, expected

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        layers = random_adapters.layers_of(self.state)
        return {name: tuple(weight.shape) for name, weight in layers.items()}

    def _save(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str] = MappingProxyType({}),
    ) -> Path:
        path = self.folder / f"{name}.safetensors"
        owned = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(owned, path, metadata=dict(metadata))
        return path

    def _written(
        self,
        name: str,
        adapters: Mapping[str, AdapterWeights],
        format: str,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        path = self.folder / f"{name}.lora.safetensors"
        write_lora(path, adapters, self.names, format=format, dtype=dtype, metadata={})
        return path

    def _merged(self, name: str, lora: Path, strength: float, *, model: Path | None = None) -> Path:
        output = self.folder / f"{name} {strength}.safetensors"
        lora_merge.run(
            dit=model or self.model,
            loras=[(lora, strength)],
            output=output,
            architecture=self.family,
            report=lambda event: None,
        )
        return output

    def _summed(self, name: str, changes: Mapping[str, AdapterWeights], strength: float) -> Path:
        state = dict(self.state)
        for layer, change in changes.items():
            assert isinstance(change, FullWeights) and change.diff is not None
            state[f"{layer}.weight"] = state[f"{layer}.weight"] + strength * change.diff
        return self._save(f"{name} {strength}", state)

    def _add(
        self,
        name: str,
        lora: Path,
        checkpoints: Mapping[float, Path],
        bypass: Mapping[float, Path] = MappingProxyType({}),
    ) -> None:
        self.cases[name] = {
            "lora": str(lora),
            "merged": {str(strength): str(path) for strength, path in checkpoints.items()},
            "bypass": {str(strength): str(path) for strength, path in bypass.items()},
        }


def checkpoint_with(
    state: Mapping[str, Tensor], adapters: Mapping[str, AdapterWeights], strength: float
) -> dict[str, Tensor]:
    """The tensors of a model with adapters, layer by layer in float32."""
    changed = dict(state)
    for name, adapter in adapters.items():
        key = f"{name}.weight" if f"{name}.weight" in state else f"{name}.scale"
        changed[key] = merged(state[key], adapter, multiplier=strength)
        if adapter.bias_diff is not None:
            changed[f"{name}.bias"] = state[f"{name}.bias"] + strength * adapter.bias_diff
    return changed


def _quantized(
    state: Mapping[str, Tensor], blocks: tuple[str, ...], layout: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Linear layers in the blocks as FP8 with a scale for the tensor, in one of `LAYOUTS`."""
    found: dict[str, Tensor] = {}
    settings: dict[str, dict[str, str]] = {}
    for key, tensor in state.items():
        layer = key.removesuffix(".weight")
        if layer == key or tensor.dim() != 2 or not layer.startswith(blocks):
            found[key] = tensor
            continue
        scale = torch.tensor(1.0) if layout == "cast" else tensor.abs().max() / 448
        found[key] = (tensor / scale).to(torch.float8_e4m3fn)
        settings[layer] = {"format": "float8_e4m3fn"}
        if layout == "marker":
            found[f"{layer}.scale_weight"] = scale
        elif layout != "cast":
            found[f"{layer}.weight_scale"] = scale
        if layout == "tensors":
            text = json.dumps(settings[layer]).encode()
            found[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if layout == "marker":
        found["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    if layout == "header":
        return found, {"_quantization_metadata": json.dumps({"layers": settings})}
    return found, {}
