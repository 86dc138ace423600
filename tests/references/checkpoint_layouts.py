"""A transformer's tensors in the layouts that its files come in, from those of its makers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from pack.engine.layer_names import LayerNames
from safetensors.torch import save_file
from torch import Tensor


def as_diffusers(state: Mapping[str, Tensor], names: LayerNames) -> dict[str, Tensor]:
    """Under the names of diffusers' modules, each published layer cut into them."""
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        for row in names.table:
            pattern = re.escape(row.published).replace(r"\{\}", r"(\d+)")
            leaf = "" if row.bare else rf"\.({row.weight_name}|bias)"
            if not (match := re.fullmatch(pattern + leaf, key)):
                continue
            groups = match.groups()
            index = groups if row.bare else groups[:-1]
            end = "" if row.bare else f".{'bias' if groups[-1] == 'bias' else 'weight'}"
            if row.halves_swapped:
                first, second = tensor.chunk(2)
                tensor = torch.cat([second, first])
            heights = row.heights(len(tensor)) if len(row.inner) > 1 else [len(tensor)]
            for inner, part in zip(row.inner, tensor.split(heights), strict=True):
                found[inner.format(*index) + end] = part.clone()
            break
        else:
            raise KeyError(key)
    return found


def save_split(folder: Path, state: Mapping[str, Tensor], *, parts: int = 3) -> Path:
    """A split set with its index in ``folder``; the path of one part."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-{part + 1:05d}-of-{parts:05d}.safetensors" for part in range(parts)]
    files = {key: names[index % parts] for index, key in enumerate(state)}
    for name in names:
        save_file({k: t for k, t in state.items() if files[k] == name}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}), "utf-8")
    return folder / names[1]
