"""How the layers of a model family are called, in settings and in the LoRA files of others.

Every layer has a *published* name, that of the checkpoint its makers gave out
(``double_blocks.0.img_attn.qkv``). LoRA files may name it otherwise: with underscores in place of
dots, by ComfyUI's name where that differs, or by the modules of diffusers' class, which may be
only a part of it (``transformer_blocks.0.attn.to_q``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol, runtime_checkable

from torch import nn

from .key_table import Row, fusions


@dataclass(frozen=True)
class LayerNames:
    """The names of one family's layers.

    Args:
        family: as in the setting ``architecture``.
        base_models: what ``ss_base_model_version``, or ``modelspec.architecture`` without
            "/lora", says in LoRA files of the family.
        table: published names and diffusers' for every module with weights.
        blocks: what the published names in the repeated blocks begin with. By default those
            layers are trained ...
        default_excludes: ... but for those whose name one of these patterns matches wholly.
        always_excludes: as those, also where the user has patterns of their own.
        own_excludes_replace: patterns of the user replace ``default_excludes`` rather than to be
            added.
        never_quantized: linear layers of the blocks that stay in their own type where the model is
            kept in 8 bits; patterns as above.
        depth: number of repeated blocks of the published model, by the name of their list; it
            tells apart families with the same names.
    """

    family: str
    base_models: tuple[str, ...]
    table: tuple[Row, ...]
    blocks: tuple[str, ...]
    default_excludes: tuple[str, ...] = ()
    always_excludes: tuple[str, ...] = ()
    own_excludes_replace: bool = False
    never_quantized: tuple[str, ...] = ()
    depth: tuple[tuple[str, int], ...] = ()


class Place(NamedTuple):
    """What a name means: the published module, or with ``part`` only that one of ``row.inner``."""

    published: str
    row: Row
    part: int | None


def locate(names: LayerNames, name: str) -> Place | None:
    """What a module of the family is called when a file calls it ``name``; None if unknown.

    Dots may be underscores. Prefixes such as ``lora_unet_`` are not part of the name.
    """
    for pattern, row, part in _patterns(names):
        if match := pattern.fullmatch(name):
            return Place(row.published.format(*match.groups()), row, part)
    return None


def row_of(names: LayerNames, published: str) -> tuple[Row, tuple[str, ...]] | None:
    """The row of a published name, and the indices of its blocks; None if unknown."""
    for row in names.table:
        if match := re.fullmatch(_template(row.published), published):
            return row, match.groups()
    return None


def other_names(names: LayerNames, published: str) -> list[str]:
    """What else a published layer, or a part of it, is called: by ComfyUI, by diffusers."""
    if not (found := row_of(names, published)):
        return []
    row, index = found
    every = dict.fromkeys(each.format(*index) for each in (*row.aliases, *row.inner))
    return [name for name in every if name != published]


class LayerOfModel(NamedTuple):
    """Our modules that a published layer is made of, and the shape [O, I, *K] of its weight."""

    inner: tuple[str, ...]
    shape: tuple[int, ...]


def published_layers(names: LayerNames, transformer: nn.Module) -> dict[str, LayerOfModel]:
    """Every linear layer and convolution that a LoRA may be for, by its published name.

    In the model's own order. Left out is the one whose halves diffusers has in the other order:
    an adapter of its modules would not be one of the published layer.
    """
    found: dict[str, LayerOfModel] = {}
    for fusion in fusions(names.table, transformer):
        if fusion.row.bare or fusion.row.halves_swapped:
            continue
        modules = [transformer.get_submodule(name) for name in fusion.inner]
        shapes = [_weight_shape(module) for module in modules]
        if not shapes[0]:
            continue
        num_rows = sum(shape[0] for shape in shapes)
        found[fusion.published] = LayerOfModel(fusion.inner, (num_rows, *shapes[0][1:]))
    return found


@runtime_checkable
class _AnyLinear(Protocol):
    """A linear layer, however its weight is stored."""

    in_features: int
    out_features: int


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    """[O, I, *K]; nothing for what is neither a linear layer nor a convolution."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return tuple(module.weight.shape)
    if isinstance(module, _AnyLinear):
        return module.out_features, module.in_features
    return ()


@lru_cache(maxsize=32)
def _patterns(names: LayerNames) -> list[tuple[re.Pattern[str], Row, int | None]]:
    found: list[tuple[re.Pattern[str], Row, int | None]] = []
    for row in names.table:
        whole = dict.fromkeys((row.published, *row.aliases))
        found += [(_pattern(template), row, None) for template in whole]
        if len(row.inner) == 1:
            found.append((_pattern(row.inner[0]), row, None if not row.halves_swapped else 0))
        else:
            found += [(_pattern(each), row, part) for part, each in enumerate(row.inner)]
    return found


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(_template(template).replace(r"\.", "[._]"))


def _template(template: str) -> str:
    return re.escape(template).replace(r"\{\}", r"(\d+)")
