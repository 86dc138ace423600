"""One table per family between published tensor names and the module names of our classes.

The same table loads weights, writes them back and gives every LoRA its published name. A row
pairs one published module with one or more of ours; with several, the published weight is
theirs stacked along the first dimension (fused q, k and v). ``{}`` stands for a block's index,
so a table fits any depth, and widths come from the model itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .weights import Source


@dataclass(frozen=True)
class Row:
    """``published`` is made of ``inner``, in this order.

    Args:
        weight_name: the published name of the parameter that we call ``weight``.
        halves_swapped: the two halves along the first dimension are in the other order.
        parts: how the rows are divided among ``inner``, as whole-number shares; nothing means
            equally.
        aliases: other names of the published module. The first one is ComfyUI's, if that differs.
        bare: the names are those of a parameter that no module of its own holds.
    """

    published: str
    inner: tuple[str, ...]
    weight_name: str = "weight"
    halves_swapped: bool = False
    parts: tuple[int, ...] = ()
    aliases: tuple[str, ...] = ()
    bare: bool = False

    def heights(self, num_rows: int) -> list[int]:
        """Rows of each of ``inner`` when the published weight has ``num_rows``.

        Raises:
            ValueError: they cannot be divided like that.
        """
        shares = self.parts or (1,) * len(self.inner)
        if num_rows % sum(shares):
            raise ValueError(f"{num_rows} rows cannot be divided as {shares}")
        return [share * num_rows // sum(shares) for share in shares]


@dataclass(frozen=True)
class Fusion:
    """A published module (or bare parameter) and ours that it is made of, in stacking order."""

    published: str
    inner: tuple[str, ...]
    row: Row


def fusions(table: Sequence[Row], module: nn.Module) -> list[Fusion]:
    """Every published module and bare parameter of this model, in the model's own order."""
    modules = [name for name, _ in module.named_modules()]
    parameters = [name for name, _ in module.named_parameters()]
    order = {name: position for position, name in enumerate(modules)}
    order |= {name: order[name.rpartition(".")[0]] for name in parameters}
    found: list[Fusion] = []
    for row in table:
        pattern = re.compile(re.escape(row.inner[0]).replace(r"\{\}", r"(\d+)"))
        for name in parameters if row.bare else modules:
            if match := pattern.fullmatch(name):
                index = match.groups()
                inner = tuple(part.format(*index) for part in row.inner)
                found.append(Fusion(row.published.format(*index), inner, row))
    return sorted(found, key=lambda fusion: order[fusion.inner[0]])


def key_map(table: Sequence[Row], module: nn.Module, *, prefix: str = "") -> dict[str, Source]:
    """Name of each of our tensors -> where it is in a published file (`weights.load_into`)."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    sources: dict[str, Source] = {}
    for fusion in fusions(table, module):
        for published, keys in _keys(fusion):
            published = f"{prefix}{published}"
            first_row = 0
            for key in keys:
                if key not in shapes:
                    continue
                transform = _part_of(fusion, first_row, first_row + shapes[key][0])
                sources[key] = (published, transform) if transform else published
                first_row += shapes[key][0]
    return sources


def published_state_dict(table: Sequence[Row], module: nn.Module) -> dict[str, Tensor]:
    """The model's weights under their published names; the inverse of loading.

    Raises:
        ValueError: a tensor of the model is in no row of the table.
    """
    state = module.state_dict()
    published: dict[str, Tensor] = {}
    used: set[str] = set()
    for fusion in fusions(table, module):
        for name, keys in _keys(fusion):
            if keys[0] not in state:
                continue
            tensor = torch.cat([state[key] for key in keys]) if len(keys) > 1 else state[keys[0]]
            tensor = _swap_halves(tensor) if fusion.row.halves_swapped else tensor
            published[name] = tensor
            used.update(keys)
    if left := state.keys() - used:
        raise ValueError(f"no published name for {sorted(left)[:3]}")
    return published


def _keys(fusion: Fusion) -> list[tuple[str, list[str]]]:
    """The published name of each tensor that there may be, and ours that it is made of."""
    if fusion.row.bare:
        return [(fusion.published, list(fusion.inner))]
    published = {"weight": fusion.row.weight_name, "bias": "bias"}
    return [
        (f"{fusion.published}.{name}", [f"{inner}.{ours}" for inner in fusion.inner])
        for ours, name in published.items()
    ]


def _part_of(fusion: Fusion, first_row: int, end_row: int) -> Callable[[Tensor], Tensor] | None:
    if fusion.row.halves_swapped:
        return _swap_halves
    return partial(_rows, first=first_row, end=end_row) if len(fusion.inner) > 1 else None


def _rows(tensor: Tensor, *, first: int, end: int) -> Tensor:
    return tensor[first:end]


def _swap_halves(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])
