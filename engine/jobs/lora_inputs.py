"""What tools for LoRA files start from: files of any spelling, and the text encoders' part of them.

Tensors for text encoders stay under the keys of their file. Where they are plain LoRAs, the tools
work on them as on the layers of the transformer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor

from ..adapter_weights import AdapterWeights, FullWeights, LoRAWeights, tensors
from ..architectures.names import LAYER_NAMES
from ..errors import CheckpointError, ConfigError
from ..hardware import DTYPES
from ..layer_names import LayerNames
from ..lora_file import LoRAFile, read_lora

_PART = re.compile(
    r"(?P<stem>.+)(?P<end>\.(lora_(?P<side>[AB]|down|up)(\.default)?\.weight|alpha))"
)
_SIDES = {"A": "down", "down": "down", "B": "up", "up": "up", None: "alpha"}


@dataclass(frozen=True)
class Opened:
    """A LoRA file, with the layers of text encoders beside those of the transformer.

    Args:
        text_layers: by the begin of their keys.
        text_keys: begin of the keys -> part ("down", "up", "alpha") -> key.
    """

    file: LoRAFile
    text_layers: dict[str, AdapterWeights]
    text_keys: dict[str, dict[str, str]]

    @property
    def adapters(self) -> dict[str, AdapterWeights]:
        """All layers, those of the transformer first."""
        return self.file.layers | self.text_layers

    @property
    def dtype(self) -> torch.dtype:
        """The type that holds all its numbers."""
        return widest(self.adapters.values())

    @property
    def rank(self) -> int:
        """The largest of its layers'; 0 if none has one."""
        return max((_rank(adapter) for adapter in self.adapters.values()), default=0)


def families(architecture: str) -> list[LayerNames]:
    """The families that "auto" or a setting ``architecture`` allows.

    Raises:
        ConfigError: there is none of this name.
    """
    if architecture == "auto":
        return list(LAYER_NAMES.values())
    if architecture in LAYER_NAMES:
        return [LAYER_NAMES[architecture]]
    near = get_close_matches(architecture, LAYER_NAMES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known are auto, {', '.join(LAYER_NAMES)}"
    raise ConfigError(f"architecture = {architecture!r} is unknown; {hint}")


def dtype_named(name: str | None, default: torch.dtype) -> torch.dtype:
    """The type that a setting names.

    Raises:
        ConfigError: there is none of this name.
    """
    if name is None:
        return default
    if name not in DTYPES or name == "no":
        raise ConfigError(f"dtype = {name!r} is unknown; choose bf16, fp16 or fp32")
    return DTYPES[name]


def open_lora(path: Path, architecture: str = "auto") -> Opened:
    """Read a LoRA file whose layers can be added up: any kind but with a magnitude.

    Raises:
        EngineError: the file cannot be read, or has layers that cannot be added up.
    """
    file = read_lora(path, families(architecture))
    for name, adapter in file.layers.items():
        if not isinstance(adapter, FullWeights) and adapter.magnitude is not None:
            raise CheckpointError(
                f"{path}: {name} has a magnitude (DoRA), so that what it adds depends on the "
                "model; merge it into the model, and extract a LoRA from that"
            )
    return Opened(file, *_text_encoders(path, file.other))


def text_tensors(
    layers: Mapping[str, AdapterWeights], keys: Mapping[str, Mapping[str, str]]
) -> dict[str, Tensor]:
    """The tensors of text encoders' layers under the keys that they came from."""
    found: dict[str, Tensor] = {}
    for stem, adapter in layers.items():
        assert isinstance(adapter, LoRAWeights)
        found[keys[stem]["down"]] = adapter.down
        found[keys[stem]["up"]] = adapter.up
        found[keys[stem].get("alpha", f"{stem}.alpha")] = torch.tensor(adapter.alpha)
    return found


def widest(adapters: Iterable[AdapterWeights]) -> torch.dtype:
    """The type of floating-point numbers that holds all of theirs; bf16 and fp16 need fp32."""
    found: torch.dtype | None = None
    for adapter in adapters:
        for tensor in tensors(adapter).values():
            found = torch.promote_types(found, tensor.dtype) if found else tensor.dtype
    return found if found and found in DTYPES.values() else torch.float32


def _rank(adapter: AdapterWeights) -> int:
    return 0 if isinstance(adapter, FullWeights) else adapter.rank or 0


def _text_encoders(
    path: Path, other: Mapping[str, Tensor]
) -> tuple[dict[str, AdapterWeights], dict[str, dict[str, str]]]:
    keys: dict[str, dict[str, str]] = {}
    for key in other:
        match = _PART.fullmatch(key)
        if not match:
            raise _not_plain(path, key)
        keys.setdefault(match["stem"], {})[_SIDES[match["side"]]] = key
    return {stem: _text_layer(path, parts, other) for stem, parts in keys.items()}, keys


def _text_layer(path: Path, parts: Mapping[str, str], other: Mapping[str, Tensor]) -> LoRAWeights:
    if "down" not in parts or "up" not in parts:
        raise _not_plain(path, next(iter(parts.values())))
    for key in parts.values():
        if not other[key].isfinite().all():
            raise CheckpointError(f"{path}: {key} is NaN or infinite; the file is damaged")
    down, up = other[parts["down"]], other[parts["up"]]
    if down.dim() < 2 or up.dim() < 2 or not down.numel():
        raise _not_plain(path, parts["down"])
    up = up.flatten(1)
    alpha = other[parts["alpha"]] if "alpha" in parts else torch.tensor(down.shape[0])
    if up.shape[1] != down.shape[0] or alpha.numel() != 1:
        raise _not_plain(path, parts["up"])
    return LoRAWeights(down, up, float(alpha.item()))


def _not_plain(path: Path, key: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {key} is for a text encoder and no plain LoRA, which this tool cannot work on; "
        "use a file without text encoders"
    )
