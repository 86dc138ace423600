"""Writes what a tool made of LoRAs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..adapter_weights import AdapterWeights, FullWeights, LoRAWeights
from ..errors import NotFiniteError
from ..layer_names import LayerNames
from ..lora_file import write_lora
from .lora_inputs import text_tensors


def write(
    path: Path,
    adapters: Mapping[str, AdapterWeights],
    names: LayerNames,
    *,
    text_keys: Mapping[str, Mapping[str, str]],
    format: str,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> list[str]:
    """As `lora_file.write_lora`, with the layers of text encoders among ``adapters``.

    Args:
        text_keys: of those layers; see `lora_inputs.Opened`.
    """
    text = {name: adapter for name, adapter in adapters.items() if name in text_keys}
    layers = {name: adapter for name, adapter in adapters.items() if name not in text_keys}
    return write_lora(
        path,
        layers,
        names,
        format=format,
        dtype=dtype,
        metadata=_with_ranks(metadata, adapters.values()),
        other=_rounded(path, text_tensors(text, text_keys), dtype),
    )


def _with_ranks(metadata: Mapping[str, str], adapters: Iterable[AdapterWeights]) -> dict[str, str]:
    """What ``ss_*`` metadata say of a LoRA's kind and ranks; "Dynamic" where those differ."""
    low_rank = [adapter for adapter in adapters if not isinstance(adapter, FullWeights)]
    ranks = {str(adapter.rank) for adapter in low_rank}
    alphas = {f"{adapter.alpha:.9g}" for adapter in low_rank}
    found = dict(metadata)
    found["ss_network_dim"] = ranks.pop() if len(ranks) == 1 else "Dynamic"
    found["ss_network_alpha"] = alphas.pop() if len(alphas) == 1 else "Dynamic"
    module = metadata.get("ss_network_module", "")
    if all(isinstance(adapter, LoRAWeights) for adapter in low_rank) and ".lora" not in module:
        # It was another kind, whose settings mean nothing now.
        found["ss_network_module"] = "networks.lora"
        found.pop("ss_network_args", None)
    return found


def _rounded(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    rounded = {
        key: tensor if key.endswith(".alpha") else tensor.to(dtype)
        for key, tensor in tensors.items()
    }
    for key, tensor in rounded.items():
        if not tensor.isfinite().all():
            raise NotFiniteError(
                f"{path}: {key} has values that are NaN, infinite or too large for "
                f"{str(dtype).removeprefix('torch.')}; use bf16 or fp32"
            )
    return rounded
