"""What the layers of a LoRA add to their weights, in numbers.

Singular values come from the factors where that is possible: those of a product of rank R cost
(O + I) R^2 and the weight [O, I] is never formed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import adapter_ranks
from .adapter_weights import (
    AdapterWeights,
    FullWeights,
    LoHaWeights,
    LoKrWeights,
    LoRAWeights,
    as_lora,
    converted,
    delta,
    merged,
    num_values,
    tensors,
)

KINDS: dict[type[AdapterWeights], str] = {
    LoRAWeights: "LoRA",
    LoHaWeights: "LoHa",
    LoKrWeights: "LoKr",
    FullWeights: "full difference",
}
# Singular values of a matrix without factors are computed if its shorter side is at most so long:
# one of 768 x 3072 takes a second on one core of a CPU. A LoHa is a product of rank R^2, which
# takes 0.4 s at R = 16 and a layer of 3072 x 12288, and ten times that at R = 32.
_LONGEST_WHOLE, _LARGEST_PRODUCT = 768, 256
_ENERGY = 0.99
_BLOCK = re.compile(r"(?P<blocks>.*?)\.(?P<index>\d+)\.(?P<kind>.+)")

NOT_FINITE = "has values that are NaN or infinite"
SATURATED = "has values at the limit of their number type"
NO_EFFECT = "does nothing"
ZERO_ALPHA = "does nothing, because alpha is 0"


class Place(NamedTuple):
    """Where a layer is: ``single_blocks``, 3, ``linear1``; no blocks and -1 if in none."""

    blocks: str
    number: int
    kind: str

    @property
    def block(self) -> str:
        return f"{self.blocks}.{self.number}" if self.blocks else "outside of blocks"


@dataclass(frozen=True)
class LayerStatistics:
    """One layer; "change" is what the adapter adds to the weight, without a magnitude (DoRA).

    Args:
        kind: one of `KINDS`, with ", DoRA" if it has a magnitude.
        rank: of the factors; None where there are none, as for ``alpha`` and ``scale``.
        dtype: that of most of its numbers.
        norm: of the change (Frobenius); of the change of the bias where there is no other. It is
            NaN if a number is not finite.
        largest: singular value. None, as for all that follows from singular values, where the
            change is no matrix or its singular values would take too long.
        effective_rank: ``(sum s^2)^2 / sum s^4``: how many equal singular values would be spread
            out as much.
        energy_rank: number of singular values that have 99 % of the squared norm.
        weight_norm: of the weight that it is for.
        model_change: norm of all that happens to that weight, magnitude included.
        problems: phrases that go on after the layer's name.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    rank: int | None
    alpha: float | None
    scale: float | None
    dtype: str
    num_values: int
    num_bytes: int
    norm: float
    largest: float | None = None
    effective_rank: float | None = None
    energy_rank: int | None = None
    weight_norm: float | None = None
    model_change: float | None = None
    problems: tuple[str, ...] = ()

    @property
    def place(self) -> Place:
        match = _BLOCK.fullmatch(self.name)
        return Place(match[1], int(match[2]), match[3]) if match else Place("", -1, self.name)

    @property
    def relative_norm(self) -> float | None:
        """The change of the weight as a part of the weight; None if that is not known."""
        if self.weight_norm is None or self.model_change is None:
            return None
        return self.model_change / self.weight_norm if self.weight_norm else math.inf


@dataclass(frozen=True)
class Total:
    """Several layers together: norms are roots of sums of squares, ranks are means."""

    num_layers: int
    norm: float
    largest: float | None
    effective_rank: float | None
    energy_rank: float | None
    relative_norm: float | None


@torch.no_grad()
def layer_statistics(
    name: str, adapter: AdapterWeights, weight: Tensor | None = None
) -> LayerStatistics:
    """The statistics of one layer.

    Args:
        weight: that it is for, of the adapter's shape.
    """
    full = isinstance(adapter, FullWeights)
    parts = tensors(adapter)
    main = max(parts.values(), key=torch.numel).dtype if parts else torch.float32
    problems = _problems(adapter)
    singular = None if NOT_FINITE in problems else singular_values(adapter)
    norm = math.nan
    if NOT_FINITE not in problems:
        norm = _norm(adapter) if singular is None else float(singular.norm())
    if norm == 0 and not _changes_bias(adapter):
        problems = (*problems, ZERO_ALPHA if not full and adapter.alpha == 0 else NO_EFFECT)
    magnitude = not full and adapter.magnitude is not None
    spread = _Spread() if singular is None else _spread(singular)
    return LayerStatistics(
        name,
        kind=KINDS[type(adapter)] + (", DoRA" if magnitude else ""),
        shape=adapter.shape,
        rank=None if full else adapter.rank,
        alpha=None if full else adapter.alpha,
        scale=None if full else adapter.scale,
        dtype=str(main).removeprefix("torch."),
        num_values=num_values(adapter),
        num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in parts.values()),
        norm=norm,
        largest=spread.largest,
        effective_rank=spread.effective_rank,
        energy_rank=spread.energy_rank,
        weight_norm=None if weight is None else float(weight.float().norm()),
        model_change=None if weight is None else _model_change(weight, adapter, norm),
        problems=problems,
    )


def singular_values(adapter: AdapterWeights) -> Tensor | None:
    """All of the change that are above rounding, descending, in float64.

    None if the change is no matrix, or a large one that is no product of small ones.
    """
    if not adapter_ranks.is_matrix(adapter):
        return None
    if isinstance(adapter, LoRAWeights):
        return _of_product(*adapter_ranks.factors(adapter))
    if isinstance(adapter, LoKrWeights):
        # Those of a Kronecker product are all products of those of its factors.
        first, second = (_of_factor(part) for part in (adapter.w1, adapter.w2))
        return torch.outer(first, second).flatten().sort(descending=True)[0] * abs(adapter.scale)
    shape = adapter.shape
    assert shape is not None
    shorter = min(shape[0], math.prod(shape[1:]))
    if isinstance(adapter, LoHaWeights) and adapter.rank**2 <= min(shorter // 2, _LARGEST_PRODUCT):
        lora = as_lora(converted(_without_magnitude(adapter), torch.float32))
        assert isinstance(lora, LoRAWeights)
        return _of_product(*adapter_ranks.factors(lora))
    if shorter > _LONGEST_WHOLE:
        return None
    return torch.linalg.svdvals(delta(adapter, torch.float64).flatten(1))


def effective_rank(singular: Tensor) -> float:
    """Participation ratio ``(sum s^2)^2 / sum s^4``; 0 for a matrix of zeros."""
    energy = singular.double().square()
    return float(energy.sum().square() / energy.square().sum()) if energy.any() else 0.0


def energy_rank(singular: Tensor, part: float = _ENERGY) -> int:
    """How many of the descending singular values have this part of the squared norm."""
    energy = singular.double().square().cumsum(0)
    if not len(energy) or not energy[-1]:
        return 0
    return int((energy < part * energy[-1]).sum()) + 1


def grouped(
    layers: Iterable[LayerStatistics], key: Callable[[LayerStatistics], str]
) -> dict[str, list[LayerStatistics]]:
    """The layers of each group, in the order of their first ones."""
    groups: dict[str, list[LayerStatistics]] = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    return groups


def total(layers: Sequence[LayerStatistics]) -> Total:
    """Layers together; what is unknown of one counts for nothing, NaN makes NaN."""
    largest = [layer.largest for layer in layers if layer.largest is not None]
    effective = [layer.effective_rank for layer in layers if layer.effective_rank is not None]
    energy = [layer.energy_rank for layer in layers if layer.energy_rank is not None]
    known = [layer for layer in layers if layer.relative_norm is not None]
    weights = math.hypot(*(layer.weight_norm or 0.0 for layer in known))
    changes = math.hypot(*(layer.model_change or 0.0 for layer in known))
    return Total(
        len(layers),
        math.hypot(*(layer.norm for layer in layers)),
        max(largest, default=None),
        sum(effective) / len(effective) if effective else None,
        sum(energy) / len(energy) if energy else None,
        changes / weights if weights else None,
    )


def statistics_as_json(layers: Sequence[LayerStatistics], about: Mapping[str, object]) -> str:
    """For scripts: ``about`` with all layers and their total; NaN becomes null."""
    record = {
        **about,
        "total": asdict(total(layers)),
        "layers": [{**asdict(each), "relative_norm": each.relative_norm} for each in layers],
    }
    return json.dumps(_finite(record), indent=1)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Spread(NamedTuple):
    largest: float | None = None
    effective_rank: float | None = None
    energy_rank: int | None = None


def _spread(singular: Tensor) -> _Spread:
    return _Spread(float(singular[0]), effective_rank(singular), energy_rank(singular))


def _model_change(weight: Tensor, adapter: AdapterWeights, norm: float) -> float:
    if isinstance(adapter, FullWeights) or adapter.magnitude is None:
        return norm
    return float((merged(weight.float(), adapter) - weight.float()).norm())


def _problems(adapter: AdapterWeights) -> tuple[str, ...]:
    found: dict[str, None] = {}
    scale = 1.0 if isinstance(adapter, FullWeights) else adapter.scale
    if not math.isfinite(scale):
        found[NOT_FINITE] = None
    for tensor in tensors(adapter).values():
        wide = tensor.float()
        if not wide.isfinite().all():
            found[NOT_FINITE] = None
        elif tensor.element_size() < 4 and (wide.abs() >= torch.finfo(tensor.dtype).max).any():
            found[SATURATED] = None
    return tuple(found)


def _norm(adapter: AdapterWeights) -> float:
    if adapter.shape is None:
        return 0.0 if adapter.bias_diff is None else float(adapter.bias_diff.double().norm())
    return math.sqrt(adapter_ranks.squared_change(adapter))


def _changes_bias(adapter: AdapterWeights) -> bool:
    return adapter.bias_diff is not None and bool(adapter.bias_diff.any())


def _without_magnitude(adapter: LoHaWeights) -> LoHaWeights:
    return LoHaWeights(adapter.w1_a, adapter.w1_b, adapter.w2_a, adapter.w2_b, adapter.alpha)


def _of_factor(part: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    if isinstance(part, tuple):
        return _of_product(part[0].double(), part[1].double().flatten(1))
    return torch.linalg.svdvals(part.double().flatten(1))


def _of_product(left_OR: Tensor, right_RI: Tensor) -> Tensor:
    triangles = (torch.linalg.qr(each, mode="r").R for each in (left_OR, right_RI.mT))
    first, second = triangles
    return torch.linalg.svdvals(first @ second.mT)
