"""The tensors of a LoRA file in each of the formats that are written.

ComfyUI's and kohya's hold every kind of adapter. That of diffusers holds LoRAs only, of its own
modules and with alpha multiplied into the second factor, as its loaders expect.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from . import lora_formats, lora_metadata
from .adapter_weights import AdapterWeights, FullWeights, LoHaWeights, LoKrWeights, LoRAWeights
from .errors import ConfigError
from .layer_names import LayerNames, row_of
from .lora_parts import lycoris_tensors
from .lora_pieces import NotExactError, low_rank, split

_FACTORS = {"comfyui": ("lora_A", "lora_B"), "kohya": ("lora_down", "lora_up")}


@dataclass(frozen=True)
class Spelled:
    """Tensors by key, what the header must say about them, and what could not stay as it was."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def spell(
    path: Path, layers: Mapping[str, AdapterWeights], names: LayerNames, *, format: str
) -> Spelled:
    """All tensors of a file.

    Raises:
        ConfigError: the format is unknown, or cannot hold a layer.
        ValueError: a layer is not one of the family (a bug of ours).
    """
    if format not in lora_formats.FORMATS:
        known = ", ".join(lora_formats.FORMATS)
        raise ConfigError(f"{path}: there is no format {format!r} of LoRA files; choose of {known}")
    if not layers:
        raise ConfigError(f"{path}: there is no layer to write; choose other layers")
    if format == "diffusers":
        return _diffusers(path, layers, names)
    tensors: dict[str, Tensor] = {}
    for published, adapter in layers.items():
        full = isinstance(adapter, FullWeights)
        stem = lora_formats.stem(format, names, published, low_rank=not full)
        tensors |= {f"{stem}.{end}": each for end, each in _parts(adapter, format).items()}
    return Spelled(tensors, {}, _remarks(layers))


def _parts(adapter: AdapterWeights, format: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if isinstance(adapter, LoRAWeights):
        down, up = _FACTORS[format]
        found = {f"{down}.weight": adapter.down, f"{up}.weight": _with_kernel(adapter)}
    if not isinstance(adapter, FullWeights):
        found["alpha"] = _scalar(adapter)
    return found | lycoris_tensors(adapter)


def _scalar(adapter: LoRAWeights | LoHaWeights | LoKrWeights) -> Tensor:
    return torch.tensor(adapter.alpha, dtype=torch.float32)


def _with_kernel(adapter: LoRAWeights) -> Tensor:
    """[O, R], of a convolution [O, R, 1, 1], as others have it."""
    return adapter.up.reshape(*adapter.up.shape, *(1 for _ in adapter.down.shape[2:]))


def _remarks(layers: Mapping[str, AdapterWeights]) -> list[str]:
    rows = sum(
        not isinstance(each, FullWeights)
        and each.magnitude is not None
        and each.magnitude.shape[1] == 1
        for each in layers.values()
    )
    if not rows:
        return []
    return [
        f"in {rows} layers DoRA has a magnitude for each row, which ComfyUI divides by the norm "
        "before the change instead of after it, so that its results differ, the more the larger "
        "the change is"
    ]


def _diffusers(path: Path, layers: Mapping[str, AdapterWeights], names: LayerNames) -> Spelled:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    changed: Counter[str] = Counter()
    for published, adapter in layers.items():
        found = row_of(names, published)
        if found is None:
            raise ValueError(f"{published} is no layer of {names.family}")
        try:
            if adapter.bias_diff is not None:
                raise NotExactError("changes a bias")
            lora = low_rank(adapter)
            parts = split(lora.adapter, found[0])
        except NotExactError as error:
            raise ConfigError(
                f"{path}: {published} {error}, which a file for diffusers cannot hold; "
                "choose the format comfyui"
            ) from None
        if lora.remark:
            changed[lora.remark] += 1
        for inner, part in zip(lora_formats.inner_names(names, published), parts, strict=True):
            if part is not None:
                tensors |= _peft(path, f"transformer.{inner}", part)
                ranks[inner] = part.rank if isinstance(part, LoRAWeights) else 0
    _check_magnitudes(path, tensors, ranks)
    remarks = [f"in {number} layers {what}" for what, number in changed.items()]
    if any("magnitude" in key for key in tensors):
        remarks.append(
            "ComfyUI reads no magnitudes from files for diffusers; choose the format comfyui for it"
        )
    return Spelled(tensors, _header(ranks, tensors), remarks)


def _peft(path: Path, stem: str, part: AdapterWeights) -> dict[str, Tensor]:
    assert isinstance(part, LoRAWeights)  # a LoRA is split into LoRAs
    up = _with_kernel(part)
    up = up if part.scale == 1 else up.float() * part.scale
    found = {f"{stem}.lora_A.weight": part.down, f"{stem}.lora_B.weight": up}
    if part.magnitude is not None:
        if part.magnitude.shape[1] != 1 or part.down.dim() > 2:
            raise ConfigError(
                f"{path}: {stem} has DoRA magnitudes that diffusers does not know (of columns or "
                "of a convolution); choose the format comfyui"
            )
        found[f"{stem}.lora_magnitude_vector"] = part.magnitude.flatten()
    return found


def _check_magnitudes(path: Path, tensors: Mapping[str, Tensor], ranks: Mapping[str, int]) -> None:
    given = sum(key.endswith("magnitude_vector") for key in tensors)
    if given not in (0, len(ranks)):
        raise ConfigError(
            f"{path}: only {given} of {len(ranks)} modules have DoRA magnitudes, but diffusers "
            "has them for all or none; choose the format comfyui"
        )


def _header(ranks: Mapping[str, int], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Settings for peft, where its readers could guess wrong.

    peft has one rank and alpha for all modules unless it is told of others, and a reader that
    takes alpha from the first module would scale those of another rank.
    """
    if len(set(ranks.values())) <= 1:
        return {}
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{module}": rank for module, rank in ranks.items() if rank != common}
    settings = {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "use_dora": any(key.endswith("magnitude_vector") for key in tensors),
        "lora_bias": False,
    }
    named = {f"transformer.{key}": value for key, value in settings.items()}
    return {lora_metadata.DIFFUSERS_KEY: json.dumps(named, sort_keys=True)}
