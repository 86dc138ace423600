"""Which layers of a family a model on disk has, whatever its tensors are called.

The names may have a prefix (``model.diffusion_model.``), and a layer may be in pieces where
diffusers has several modules for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from . import file_kinds
from .errors import CheckpointError, ConfigError
from .layer_names import LayerNames, Place, locate
from .quantized_layout import QuantizedLayout
from .weights import Checkpoint

_PREFIXES = (
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "model.",
    "net.",
    "model.model.",  # what ComfyUI saves of HunyuanVideo
)


class Piece(NamedTuple):
    """The tensor ``key`` holds rows ``first`` to ``end`` of a layer."""

    key: str
    first: int
    end: int


@dataclass(frozen=True)
class StoredLayer:
    """The tensors of one published layer, in stacking order.

    Args:
        weight: its pieces; none if only a bias is there.
        bias: none if it has no bias.
        shape: of the whole weight.
        halves_swapped: what is stored has the two halves of its rows in the other order.
    """

    weight: tuple[Piece, ...]
    bias: tuple[Piece, ...]
    shape: tuple[int, ...]
    halves_swapped: bool = False


class StoredModel(NamedTuple):
    """The layers of a family in a checkpoint, by published name.

    ``prefix`` is what the names of its tensors begin with; others are not the transformer's.
    """

    names: LayerNames
    prefix: str
    layers: dict[str, StoredLayer]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Published name -> shape of the weight."""
        return {name: layer.shape for name, layer in self.layers.items() if layer.weight}


def stored_model(
    checkpoint: Checkpoint,
    layout: QuantizedLayout,
    families: Mapping[str, LayerNames],
    architecture: str = "auto",
) -> StoredModel:
    """Find the layers of a checkpoint.

    Args:
        families: that there are, by name.
        architecture: one of ``families``, or "auto" for the one that knows most of the names.

    Raises:
        CheckpointError: it is no model of such a family, or a piece of a layer is missing.
        ConfigError: there is no such family, or it cannot be told apart from another.
    """
    path = checkpoint.paths[0]
    if architecture != "auto" and architecture not in families:
        raise ConfigError(
            f"architecture: {architecture!r} is unknown; choose auto, {', '.join(families)}"
        )
    asked = families.values() if architecture == "auto" else (families[architecture],)
    keys = [key for key in checkpoint.entries if key not in layout.companions]
    found = [_located(names, prefix, keys) for names in asked for prefix in _prefixes(keys)]
    most = max(len(each.places) for each in found)
    best = [each for each in found if len(each.places) == most]
    num_keys = sum(key.startswith(best[0].prefix) for key in keys)
    if 2 * most < num_keys or not most:
        raise CheckpointError(
            f"{path}: this is {file_kinds.describe(checkpoint.keys())}, not a diffusion model of "
            f"{'a known family' if architecture == 'auto' else architecture}"
        )
    if len({each.names.family for each in best}) > 1:
        listed = " and ".join(sorted(each.names.family for each in best))
        raise ConfigError(
            f"{path}: {listed} have layers of these names; say which with architecture"
        )
    layers = _layers(best[0], checkpoint, layout, path)
    return StoredModel(best[0].names, best[0].prefix, layers)


class _Located(NamedTuple):
    names: LayerNames
    prefix: str
    places: dict[str, tuple[Place, str]]  # key -> where it belongs, "weight" or "bias"


def _prefixes(keys: list[str]) -> list[str]:
    return [prefix for prefix in _PREFIXES if any(key.startswith(prefix) for key in keys)]


def _located(names: LayerNames, prefix: str, keys: list[str]) -> _Located:
    places: dict[str, tuple[Place, str]] = {}
    for key in keys:
        if key.startswith(prefix) and (place := _place(names, key.removeprefix(prefix))):
            places[key] = place
    return _Located(names, prefix, places)


def _place(names: LayerNames, key: str) -> tuple[Place, str] | None:
    module, _, parameter = key.rpartition(".")
    if place := locate(names, module):
        if parameter in ("weight", place.row.weight_name) and not place.row.bare:
            return place, "weight"
        if parameter == "bias" and not place.row.bare:
            return place, "bias"
    place = locate(names, key)
    return (place, "weight") if place and place.row.bare else None


def _layers(
    located: _Located, checkpoint: Checkpoint, layout: QuantizedLayout, path: Path
) -> dict[str, StoredLayer]:
    by_layer: dict[str, dict[str, dict[int, str]]] = {}
    swapped: dict[str, bool] = {}
    num_pieces: dict[str, int] = {}
    for key, (place, parameter) in located.places.items():
        pieces = by_layer.setdefault(place.published, {}).setdefault(parameter, {})
        index = place.part or 0
        if index in pieces:
            raise CheckpointError(
                f"{path}: both {pieces[index]} and {key} are the {parameter} of {place.published}"
            )
        pieces[index] = key
        swapped[place.published] = place.row.halves_swapped and place.part is not None
        if place.part is not None:
            num_pieces[place.published] = len(place.row.inner)
    layers: dict[str, StoredLayer] = {}
    for name, parameters in by_layer.items():
        for pieces in parameters.values():
            if len(pieces) != num_pieces.get(name, 1):
                raise CheckpointError(
                    f"{path}: {name} is not whole, only {', '.join(sorted(pieces.values()))} of "
                    f"{num_pieces.get(name, 1)} pieces are there; get the file again"
                )
        weight = _stacked(parameters.get("weight", {}), checkpoint, layout)
        shape: tuple[int, ...] = ()
        if weight:
            rest = layout.shape(checkpoint, weight[0].key)[1:]
            shape = (weight[-1].end, *rest)
        bias = _stacked(parameters.get("bias", {}), checkpoint, layout)
        layers[name] = StoredLayer(weight, bias, shape, swapped[name])
    return layers


def _stacked(
    pieces: Mapping[int, str], checkpoint: Checkpoint, layout: QuantizedLayout
) -> tuple[Piece, ...]:
    stacked: list[Piece] = []
    first = 0
    for index in sorted(pieces):
        shape = layout.shape(checkpoint, pieces[index])
        end = first + (shape[0] if shape else 1)
        stacked.append(Piece(pieces[index], first, end))
        first = end
    return tuple(stacked)
