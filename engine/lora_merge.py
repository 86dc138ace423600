"""Adding adapters to the weights that they are for: exact in float32, rounded once.

A weight is worked on by rows, so that beside it memory holds a few MiB. Where a norm over all
rows is given (DoRA with one magnitude for each column), the whole layer has to be there.

Shapes: O out features, I in features, K kernel of a convolution; a weight is [O, I, *K].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .adapter_weights import AdapterWeights, FullWeights, LoKrWeights, delta, merged, rows
from .errors import CheckpointError

# 256 KiB of float32 stay in the cache of one core: three times as fast as 4 MiB. A GPU is better
# served with few large kernels.
_ROWS_VALUES_CPU, _ROWS_VALUES_GPU = 2**16, 2**22


class Weighted(NamedTuple):
    """An adapter and how many times it is added."""

    adapter: AdapterWeights
    multiplier: float


@runtime_checkable
class Requantizable(Protocol):
    """A linear layer whose weight is not stored as numbers of their own value."""

    in_features: int
    out_features: int

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [O, I] itself."""
        ...

    def requantize(self, weight: Tensor) -> None:
        """Store another weight [O, I], the way the present one is stored."""
        ...


class MergeTally:
    """How much weights were meant to change, and how far rounding took them from that."""

    def __init__(self) -> None:
        self._change = self._error = torch.zeros((), dtype=torch.float64)

    def changed(self, before: Tensor, exact: Tensor) -> None:
        """``exact`` is what ``before`` should become."""
        distance = squared_distance(before, exact)
        self._change = self._change.to(distance.device) + distance

    def rounded(self, exact: Tensor, stored: Tensor) -> None:
        """``stored`` is what became of ``exact``."""
        distance = squared_distance(exact, stored)
        self._error = self._error.to(distance.device) + distance

    def is_finite(self) -> bool:
        """False once a value that is NaN or infinite was given."""
        return bool(self._change.isfinite()) and bool(self._error.isfinite())

    def rounding(self) -> float:
        """Root mean square of the rounding error, in parts of that of the change.

        Below 0.1 nothing is lost that one could see; above 1 the change is smaller than what the
        type can express. 0 if nothing changed.
        """
        if not self._change:
            return 0.0
        return math.sqrt(float(self._error) / float(self._change))


@dataclass(frozen=True)
class MergeSummary:
    """``num_layers`` were changed; ``rounding`` as in `MergeTally.rounding`."""

    num_layers: int
    rounding: float


@torch.no_grad()
def merge_into(
    transformer: nn.Module,
    layers: Mapping[str, tuple[str, ...]],
    adapters: Mapping[str, AdapterWeights],
    *,
    multiplier: float,
) -> MergeSummary:
    """Add ``multiplier`` times the adapters to the model's own weights, in float32, rounded once.

    A quantized weight (`Requantizable`) is dequantized, changed and quantized again.

    Args:
        transformer: changed in place.
        layers: published name -> the modules it is made of, in stacking order.
        adapters: by published name.

    Raises:
        CheckpointError: an adapter is for a layer that the model does not have, or one of another
            size; nothing was changed then.
    """
    check_layers(adapters, layers)
    for name, adapter in adapters.items():
        _check_modules(name, adapter, [transformer.get_submodule(path) for path in layers[name]])
    tally = MergeTally()
    for name, adapter in adapters.items():
        modules = [transformer.get_submodule(path) for path in layers[name]]
        _merge_layer(modules, adapter, multiplier, tally)
    return MergeSummary(len(adapters), tally.rounding())


@torch.no_grad()
def add_adapters(weight: Tensor, adapters: Sequence[Weighted], tally: MergeTally) -> None:
    """Change a weight [O, I, *K] in place; later adapters find what earlier ones have made.

    The sum is made in float32 (float64 if the weight is) and rounded to the weight's type.

    Args:
        weight: of an ordinary floating-point type.
        adapters: for exactly these rows (`part_of`).
    """
    moved = [Weighted(_beside(weight, each.adapter), each.multiplier) for each in adapters]
    if any(needs_whole(each.adapter) for each in moved):
        _add(weight, moved, tally)
        return
    moved = [Weighted(_rowwise(each.adapter), each.multiplier) for each in moved]
    step = max(1, _rows_values(weight) * weight.shape[0] // max(1, weight.numel()))
    for first in range(0, weight.shape[0], step):
        end = min(first + step, weight.shape[0])
        parts = [Weighted(part_of(each.adapter, first, end), each.multiplier) for each in moved]
        _add(weight[first:end], parts, tally)


def needs_whole(adapter: AdapterWeights) -> bool:
    """Whether no rows of the layer can be changed without knowing the others."""
    if isinstance(adapter, FullWeights) or adapter.magnitude is None:
        return False
    return adapter.magnitude.shape[0] == 1 or isinstance(adapter, LoKrWeights)


def part_of(adapter: AdapterWeights, first: int, end: int) -> AdapterWeights:
    """The adapter of rows ``first`` to ``end``.

    Raises:
        ValueError: it `needs_whole`.
    """
    part = rows(adapter, first, end)
    if part is not None:
        return part
    if needs_whole(adapter):
        raise ValueError("it cannot be divided by rows")
    return FullWeights(delta(adapter)[first:end])


def check_layers(adapters: Iterable[str], layers: Iterable[str], where: str = "") -> None:
    """See that there is a layer for every adapter.

    Args:
        where: begins the sentence, such as the path of the file with the adapters.

    Raises:
        CheckpointError: there is none; says which layers have names like it.
    """
    known = list(layers)
    present = set(known)
    missing = [name for name in adapters if name not in present]
    if not missing:
        return
    near = get_close_matches(missing[0], known, n=3)
    hint = f"the nearest are {', '.join(near)}" if near else "its layers have other names"
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    raise CheckpointError(
        f"{where}{': ' if where else ''}the LoRA is for a layer {missing[0]!r}{more} that this "
        f"model does not have; {hint}"
    )


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Sum of squared differences, in float64, without a temporary of the whole size."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    step = _rows_values(a)
    for part_a, part_b in zip(a.reshape(-1).split(step), b.reshape(-1).split(step), strict=True):
        distance = torch.linalg.vector_norm(part_a.float().sub(part_b.float()))
        total += distance.double().square()
    return total


def _add(weight: Tensor, adapters: Sequence[Weighted], tally: MergeTally) -> None:
    before = weight.to(torch.promote_types(weight.dtype, torch.float32))
    exact = before
    for adapter, multiplier in adapters:
        exact = merged(exact, adapter, multiplier=multiplier)
    tally.changed(before, exact)
    weight.copy_(exact)
    if weight.dtype != exact.dtype:
        tally.rounded(exact, weight)


def _merge_layer(
    modules: Sequence[nn.Module], adapter: AdapterWeights, multiplier: float, tally: MergeTally
) -> None:
    if adapter.shape is not None:
        if needs_whole(adapter) and len(modules) > 1:
            weights = [_working_copy(module) for module in modules]
            whole = torch.cat(weights)
            add_adapters(whole, [Weighted(adapter, multiplier)], tally)
            parts = whole.split([weight.shape[0] for weight in weights])
            for module, part in zip(modules, parts, strict=True):
                _store(module, part, tally)
        else:
            _merge_modules(modules, adapter, multiplier, tally)
    if adapter.bias_diff is not None:
        first = 0
        for module in modules:
            bias = _bias(module)
            assert bias is not None  # `_check_modules`
            part = FullWeights(adapter.bias_diff[first : first + bias.shape[0]])
            add_adapters(bias, [Weighted(part, multiplier)], tally)
            first += bias.shape[0]


def _merge_modules(
    modules: Sequence[nn.Module], adapter: AdapterWeights, multiplier: float, tally: MergeTally
) -> None:
    first = 0
    for module in modules:
        in_place = not isinstance(module, Requantizable)
        weight = module.get_parameter("weight") if in_place else _working_copy(module)
        part = adapter if len(modules) == 1 else part_of(adapter, first, first + weight.shape[0])
        add_adapters(weight, [Weighted(part, multiplier)], tally)
        if not in_place:
            _store(module, weight, tally)
        first += weight.shape[0]


def _working_copy(module: nn.Module) -> Tensor:
    if isinstance(module, Requantizable):
        return module.dequantized(torch.float32)
    return module.get_parameter("weight").to(torch.float32, copy=True)


def _store(module: nn.Module, exact: Tensor, tally: MergeTally) -> None:
    if isinstance(module, Requantizable):
        module.requantize(exact)
        tally.rounded(exact, module.dequantized(torch.float32))
        return
    weight = module.get_parameter("weight")
    weight.copy_(exact)
    tally.rounded(exact, weight)


def _check_modules(name: str, adapter: AdapterWeights, modules: Sequence[nn.Module]) -> None:
    shapes = [_weight_shape(module) for module in modules]
    whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if adapter.shape is not None and adapter.shape != whole:
        raise CheckpointError(
            f"{name}: the LoRA is for a layer of {_in_words(adapter.shape)}, but the model's is "
            f"{_in_words(whole)}; it was made for a model of another size"
        )
    if adapter.bias_diff is not None:
        biases = [_bias(module) for module in modules]
        shapes = [None if bias is None else tuple(bias.shape) for bias in biases]
        check_bias(name, adapter.bias_diff, shapes)


def check_bias(name: str, bias_diff: Tensor, shapes: Sequence[tuple[int, ...] | None]) -> None:
    """See that a change of the bias fits a layer whose pieces have biases of these shapes.

    Raises:
        CheckpointError: a bias is missing or of another size.
    """
    present = [shape for shape in shapes if shape is not None]
    if len(present) < len(shapes) or not present:
        raise CheckpointError(
            f"{name}: the LoRA changes the bias of this layer, but it has none in this model"
        )
    if tuple(bias_diff.shape) != (sum(shape[0] for shape in present),):
        raise CheckpointError(
            f"{name}: the LoRA changes a bias of {_in_words(bias_diff.shape)}, but the model's has "
            f"{sum(shape[0] for shape in present)}; it was made for a model of another size"
        )


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, Requantizable):
        return (module.out_features, module.in_features)
    return tuple(module.get_parameter("weight").shape)


def _bias(module: nn.Module) -> Tensor | None:
    named = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return dict(named).get("bias")


def _in_words(shape: Sequence[int]) -> str:
    return " x ".join(str(size) for size in shape)


def _rowwise(adapter: AdapterWeights) -> AdapterWeights:
    # A Kronecker product has no rows of its own where a factor would be cut.
    return FullWeights(delta(adapter)) if isinstance(adapter, LoKrWeights) else adapter


def _beside(weight: Tensor, adapter: AdapterWeights) -> AdapterWeights:
    """The adapter on the device of a weight, and its factors in the type that sums are made in."""
    device, dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
    # A full difference is as large as the weight, and needs no type until it is added.
    dtype = None if isinstance(adapter, FullWeights) else dtype
    moved = {
        name: tuple(part.to(device, dtype) for part in value)
        if isinstance(value, tuple)
        else value.to(device, dtype)
        for name, value in vars(adapter).items()
        if isinstance(value, Tensor | tuple)
    }
    return replace(adapter, **moved)


def _rows_values(tensor: Tensor) -> int:
    return _ROWS_VALUES_CPU if tensor.device.type == "cpu" else _ROWS_VALUES_GPU
