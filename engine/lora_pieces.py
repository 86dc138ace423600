"""Adapters of published layers from those of the modules that diffusers makes of them, and back.

Diffusers has q, k and v (and the first half of the MLP) as modules of their own where the makers
of a model published one layer. What is trained there is an adapter of some rows of that layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .adapter_weights import (
    AdapterWeights,
    FullWeights,
    LoHaWeights,
    LoKrWeights,
    LoRAWeights,
    as_lora,
    delta,
    rows,
    stacked,
    unstacked,
)
from .key_table import Row


class NotExactError(Exception):
    """There is no adapter that does exactly the same; the message is the rest of a sentence."""


@dataclass(frozen=True)
class Combined:
    """``remark`` says what the adapter had to become, if it could not stay what it was."""

    adapter: AdapterWeights
    remark: str | None = None


def combined(parts: Sequence[AdapterWeights | None], row: Row, num_rows: int | None) -> Combined:
    """The adapter of a published layer; None stands for a module without one.

    Args:
        parts: of ``row.inner``, in that order.
        num_rows: of the published layer; by default what the parts' rows make likely.

    Raises:
        NotExactError: no adapter does the same, or the parts do not fit.
    """
    if len(row.inner) == 1 and parts[0] is not None:
        return _swapped(parts[0]) if row.halves_swapped else Combined(parts[0])
    heights = _heights(parts, row, num_rows)
    there = [part for part in parts if part is not None]
    if len({part.shape[1:] for part in there if part.shape is not None}) > 1:
        raise NotExactError("has parts with different numbers of inputs")
    magnitudes = [_magnitude(part) for part in there]
    if any(each is not None for each in magnitudes):
        there = [_without_magnitude(part) for part in there]
    alike, remark = _alike(there)
    whole = stacked(alike)
    if whole is None:
        raise NotExactError("has parts that cannot be combined")
    whole = _spread(whole, [part is not None for part in parts], heights)
    if any(each is not None for each in magnitudes):
        whole = _with_magnitudes(whole, magnitudes, complete=len(there) == len(parts))
    result = _swapped(whole) if row.halves_swapped else Combined(whole)
    return Combined(result.adapter, remark or result.remark)


def split(adapter: AdapterWeights, row: Row) -> list[AdapterWeights | None]:
    """The adapters of ``row.inner``, those without effect as None; the inverse of `combined`.

    Where all are without effect (a LoRA before its first step), all are given.

    Raises:
        NotExactError: the published layer's adapter cannot be cut.
    """
    if row.halves_swapped:
        adapter = _swapped(adapter).adapter
    if len(row.inner) == 1:
        return [adapter]
    if adapter.shape is None:
        raise NotExactError("changes the bias only")
    try:
        heights = row.heights(adapter.shape[0])
    except ValueError as error:
        raise NotExactError(f"does not have the rows of this family ({error})") from None
    parts = unstacked(adapter, heights)
    if parts is None:
        raise NotExactError("cannot be cut into the modules that diffusers has")
    effective = [_has_effect(part) for part in parts]
    if not any(effective):
        return list(parts)
    return [part if used else None for part, used in zip(parts, effective, strict=True)]


def low_rank(adapter: AdapterWeights) -> Combined:
    """The same change as a LoRA, for programs that know nothing else.

    Raises:
        NotExactError: it would be no smaller than the weight, or it has none.
    """
    if isinstance(adapter, LoRAWeights):
        return Combined(adapter)
    if isinstance(adapter, FullWeights):
        raise NotExactError("is a full difference, not a LoRA")
    lora = as_lora(_without_magnitude(adapter))
    assert lora is not None  # only a full difference or a magnitude prevents it
    if lora.rank >= min(lora.shape[0], lora.down[0].numel()):
        raise NotExactError(f"would need the full rank {lora.rank} as a LoRA")
    kind = "LoHa" if isinstance(adapter, LoHaWeights) else "LoKr"
    return Combined(
        replace(lora, magnitude=adapter.magnitude), f"a {kind} was written as a LoRA of larger rank"
    )


def _heights(parts: Sequence[AdapterWeights | None], row: Row, num_rows: int | None) -> list[int]:
    shares = row.parts or (1,) * len(row.inner)
    found = [None if part is None else _num_rows(part) for part in parts]
    if num_rows is None:
        share, height = next(
            (share, each) for share, each in zip(shares, found, strict=True) if each is not None
        )
        num_rows = height * sum(shares) // share
    try:
        heights = row.heights(num_rows)
    except ValueError:
        heights = []
    if len(heights) != len(found) or any(
        given not in (None, expected) for given, expected in zip(found, heights, strict=True)
    ):
        listed = ", ".join("none" if each is None else str(each) for each in found)
        raise NotExactError(f"has parts of {listed} rows, which do not make up the layer")
    return heights


def _num_rows(adapter: AdapterWeights) -> int:
    if adapter.shape is not None:
        return adapter.shape[0]
    assert adapter.bias_diff is not None
    return adapter.bias_diff.shape[0]


def _alike(parts: list[AdapterWeights]) -> tuple[list[AdapterWeights], str | None]:
    """The parts as adapters of one kind that can be stacked."""
    kinds = {type(part) for part in parts}
    if len(parts) == 1 or kinds in ({LoRAWeights}, {LoHaWeights}):
        return parts, None
    if kinds == {FullWeights}:
        return _full(parts), None
    loras = [None if isinstance(part, FullWeights) else as_lora(part) for part in parts]
    exact = [each for each in loras if each is not None]
    if len(exact) == len(parts) and all(
        each.rank < min(each.shape[0], each.down[0].numel()) for each in exact
    ):
        return list(exact), "parts that are no LoRAs were combined as one of larger rank"
    return _full(parts), "parts of full rank were combined as a full difference"


def _full(parts: list[AdapterWeights]) -> list[AdapterWeights]:
    """As full differences, with zeros where only some have a bias or a weight."""
    shape = next((part.shape for part in parts if part.shape is not None), None)
    biases = [part.bias_diff for part in parts if part.bias_diff is not None]
    found: list[AdapterWeights] = []
    for part in parts:
        num_rows = _num_rows(part)
        diff = None
        if part.shape is not None:
            # A full difference stays in its own type, exactly.
            diff = part.diff if isinstance(part, FullWeights) else delta(part)
        elif shape is not None:
            diff = torch.zeros(num_rows, *shape[1:])
        bias = part.bias_diff
        if bias is None and biases:
            bias = biases[0].new_zeros(num_rows)
        found.append(FullWeights(diff, bias))
    return found


def _spread(adapter: AdapterWeights, there: list[bool], heights: list[int]) -> AdapterWeights:
    """Rows of zeros put where a part has no adapter."""
    if all(there):
        return adapter

    def spread(tensor: Tensor) -> Tensor:
        pieces = iter(tensor.split([h for h, used in zip(heights, there, strict=True) if used]))
        return torch.cat(
            [
                next(pieces) if used else tensor.new_zeros(height, *tensor.shape[1:])
                for used, height in zip(there, heights, strict=True)
            ]
        )

    bias = adapter.bias_diff if adapter.bias_diff is None else spread(adapter.bias_diff)
    if isinstance(adapter, LoRAWeights):
        return replace(adapter, up=spread(adapter.up), bias_diff=bias)
    if isinstance(adapter, LoHaWeights):
        w1_a, w2_a = spread(adapter.w1_a), spread(adapter.w2_a)
        return replace(adapter, w1_a=w1_a, w2_a=w2_a, bias_diff=bias)
    if isinstance(adapter, LoKrWeights):
        lora = as_lora(adapter)
        if lora is not None and lora.rank < min(lora.shape[0], lora.down[0].numel()):
            return _spread(lora, there, heights)
        return _spread(FullWeights(delta(adapter), adapter.bias_diff), there, heights)
    diff = adapter.diff if adapter.diff is None else spread(adapter.diff)
    return FullWeights(diff, bias)


def _with_magnitudes(
    whole: AdapterWeights, magnitudes: list[Tensor | None], *, complete: bool
) -> AdapterWeights:
    given = [each for each in magnitudes if each is not None]
    if isinstance(whole, FullWeights) or not complete or len(given) != len(magnitudes):
        raise NotExactError("has magnitudes (DoRA) for a part of its rows only")
    if any(each.shape[1] != 1 for each in given):
        raise NotExactError("has magnitudes (DoRA) of the columns of its parts")
    return replace(whole, magnitude=torch.cat(given))


def _swapped(adapter: AdapterWeights) -> Combined:
    """The adapter with the two halves of its rows in the other order."""
    num_rows = _num_rows(adapter)
    if num_rows % 2:
        raise NotExactError(f"has {num_rows} rows, which are no two halves")
    column = _magnitude(adapter)
    if column is not None and column.shape[0] == 1:
        lone = replace(adapter, magnitude=None)
        result = _swapped(lone)
        return Combined(replace(result.adapter, magnitude=column), result.remark)
    halves = [rows(adapter, num_rows // 2, num_rows), rows(adapter, 0, num_rows // 2)]
    parts = [half for half in halves if half is not None]
    if isinstance(adapter, LoKrWeights):
        upper, lower = (parts[0], parts[1]) if len(parts) == 2 else (None, None)
        if isinstance(upper, LoKrWeights) and isinstance(lower, LoKrWeights):
            return Combined(_stacked_lokr(upper, lower))
        lora = as_lora(_without_magnitude(adapter))
        assert lora is not None
        lora = replace(lora, magnitude=adapter.magnitude)
        remark = "a LoKr was read as a LoRA of larger rank, because its rows change places"
        return Combined(_swapped(lora).adapter, remark)
    magnitudes = [_magnitude(part) for part in parts]
    whole = stacked([_without_magnitude(part) for part in parts])
    assert whole is not None
    given = [each for each in magnitudes if each is not None]
    return Combined(replace(whole, magnitude=torch.cat(given)) if given else whole)


def _stacked_lokr(upper: LoKrWeights, lower: LoKrWeights) -> LoKrWeights:
    """Of two that are rows of one, so that all but their rows of ``w1`` are the same."""
    if isinstance(upper.w1, tuple) and isinstance(lower.w1, tuple):
        w1 = (torch.cat([upper.w1[0], lower.w1[0]]), upper.w1[1])
    else:
        assert isinstance(upper.w1, Tensor) and isinstance(lower.w1, Tensor)
        w1 = torch.cat([upper.w1, lower.w1])
    magnitude, bias = upper.magnitude, upper.bias_diff
    if magnitude is not None and lower.magnitude is not None:
        magnitude = torch.cat([magnitude, lower.magnitude])
    if bias is not None and lower.bias_diff is not None:
        bias = torch.cat([bias, lower.bias_diff])
    return replace(upper, w1=w1, magnitude=magnitude, bias_diff=bias)


def _magnitude(adapter: AdapterWeights) -> Tensor | None:
    return None if isinstance(adapter, FullWeights) else adapter.magnitude


def _without_magnitude(adapter: AdapterWeights) -> AdapterWeights:
    return adapter if isinstance(adapter, FullWeights) else replace(adapter, magnitude=None)


def _has_effect(adapter: AdapterWeights) -> bool:
    if adapter.bias_diff is not None and adapter.bias_diff.any():
        return True
    if isinstance(adapter, FullWeights):
        return adapter.diff is not None and bool(adapter.diff.any())
    if adapter.magnitude is not None:
        return True
    left = adapter.up if isinstance(adapter, LoRAWeights) else None
    if isinstance(adapter, LoHaWeights):
        left = adapter.w1_a
    return left is None or bool(left.any())
