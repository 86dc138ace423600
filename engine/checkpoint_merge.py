"""Merging adapters into a model on disk, tensor by tensor, into another file.

Memory holds one layer at a time, whatever the size of the model. What no adapter is for is
copied byte for byte; a quantized weight is dequantized, changed and stored as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .adapter_weights import AdapterWeights, FullWeights
from .checkpoint_layers import Piece, StoredLayer, StoredModel
from .errors import CheckpointError, NotFiniteError
from .lora_merge import MergeTally, Weighted, add_adapters, check_bias, needs_whole, part_of
from .quantized_layout import HEADER_FIELD, QuantizedLayout, header_without
from .tensor_stream import TensorPlan, file_size, in_aligned_order, tensor_stream
from .weights import Checkpoint

# Of a quantized weight, when it is compared with what it was to be: as in `lora_merge`.
_DECODED_VALUES = 2**16


class _Target(NamedTuple):
    """A tensor that changes: a piece of the weight (or bias) of a published layer."""

    layer: str
    piece: Piece
    is_bias: bool


@dataclass(frozen=True)
class CheckpointMerge:
    """All that `write_merged` needs to know; made by `plan_merge`.

    Args:
        adapters: by published name, in the order in which they are added.
        dtype: of the floating-point tensors of the transformer; None as they are.
        tensors: what the file will hold, in its order.
        metadata: of the file.
        device: where the adapters are added.
    """

    checkpoint: Checkpoint
    layout: QuantizedLayout
    model: StoredModel
    adapters: Mapping[str, Sequence[Weighted]]
    dtype: torch.dtype | None
    targets: Mapping[str, _Target]
    tensors: Mapping[str, TensorPlan]
    metadata: Mapping[str, str]
    device: torch.device | str = "cpu"

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return file_size(self.tensors, self.metadata)


def plan_merge(
    checkpoint: Checkpoint,
    layout: QuantizedLayout,
    model: StoredModel,
    loras: Sequence[tuple[Mapping[str, AdapterWeights], float]],
    *,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> CheckpointMerge:
    """Find out what the merged file will hold; nothing but headers is read.

    Args:
        loras: adapters by published name, whose shapes are those of the model, and their
            multipliers.
        dtype: None keeps the type of every tensor.
        metadata: of the file.

    Raises:
        CheckpointError: a bias that a LoRA changes is missing, or a weight cannot be read.
    """
    adapters: dict[str, list[Weighted]] = {}
    for layers, multiplier in loras:
        for name, adapter in layers.items():
            adapters.setdefault(name, []).append(Weighted(adapter, multiplier))
    targets: dict[str, _Target] = {}
    for name, weighted in adapters.items():
        targets |= _targets(name, model.layers[name], weighted, checkpoint)
    for key in targets:
        if layout.is_quantized(key) and (refusal := layout.weights[key].refusal):
            raise CheckpointError(refusal)
    if dtype is not None and HEADER_FIELD in metadata:
        metadata = header_without(metadata, model.prefix)
    tensors: dict[str, TensorPlan] = {}
    for key in _in_file_order(checkpoint):
        if (planned := _planned(key, checkpoint, layout, model.prefix, dtype)) is not None:
            tensors[key] = planned
    return CheckpointMerge(
        checkpoint,
        layout,
        model,
        adapters,
        dtype,
        targets,
        in_aligned_order(tensors),
        metadata,
    )


@torch.no_grad()
def write_merged(
    merge: CheckpointMerge, output: Path, *, on_written: Callable[[int], None]
) -> MergeTally:
    """Write the file, which is whole or absent.

    Args:
        on_written: called with the number of bytes written so far.

    Raises:
        NotFiniteError: a weight became NaN or infinite.
        CheckpointError: a weight cannot be read.
    """
    tally = MergeTally()
    num_written = 0
    waiting = merge.tensors.keys() - _changing_scales(merge)
    with tensor_stream(output, merge.tensors, merge.metadata) as write:
        for key in _in_file_order(merge.checkpoint):
            if key not in waiting:
                continue
            for name, tensor in _tensors_for(key, merge, tally, output).items():
                write(name, tensor)
                num_written += merge.tensors[name].num_bytes
            on_written(num_written)
    return tally


def _targets(
    name: str, layer: StoredLayer, weighted: Sequence[Weighted], checkpoint: Checkpoint
) -> dict[str, _Target]:
    found: dict[str, _Target] = {}
    for adapter, _ in weighted:
        if adapter.shape is not None:
            found |= {piece.key: _Target(name, piece, False) for piece in layer.weight}
        if adapter.bias_diff is not None:
            shapes = [checkpoint.shape(piece.key) for piece in layer.bias]
            check_bias(name, adapter.bias_diff, shapes)
            found |= {piece.key: _Target(name, piece, True) for piece in layer.bias}
    return found


def _in_file_order(checkpoint: Checkpoint) -> list[str]:
    """So that disks are read forward."""
    order = {path: index for index, path in enumerate(checkpoint.paths)}
    entries = checkpoint.entries
    return sorted(entries, key=lambda key: (order[entries[key].path], entries[key].offset))


def _planned(
    key: str,
    checkpoint: Checkpoint,
    layout: QuantizedLayout,
    prefix: str,
    dtype: torch.dtype | None,
) -> TensorPlan | None:
    """What becomes of a tensor; None if it is left out."""
    stored = TensorPlan(checkpoint.dtype(key), checkpoint.shape(key))
    if dtype is None or not key.startswith(prefix):
        return stored
    if key in layout.companions:
        return None
    if layout.is_quantized(key) or stored.dtype.is_floating_point:
        return TensorPlan(dtype, layout.shape(checkpoint, key))
    return stored


def _changing_scales(merge: CheckpointMerge) -> set[str]:
    """Scales that are written with new codes of their weights."""
    if merge.dtype is not None:
        return set()
    weights = merge.layout.weights
    return {scale for key in merge.targets if key in weights for scale in weights[key].scales()}


def _is_copied(key: str, merge: CheckpointMerge) -> bool:
    if merge.dtype is None or not key.startswith(merge.model.prefix):
        return True
    same = merge.tensors[key].dtype == merge.checkpoint.dtype(key)
    return same and not merge.layout.is_quantized(key)


def _tensors_for(
    key: str, merge: CheckpointMerge, tally: MergeTally, output: Path
) -> dict[str, Tensor]:
    """What is written for a tensor of the checkpoint, the scales of its new codes with it."""
    planned = merge.tensors[key]
    if key in merge.targets:
        exact = merged_tensor(key, merge, tally)
        _check_finite(tally, key, output)
        if merge.layout.is_quantized(key) and merge.dtype is None:
            encoded = merge.layout.encode(key, exact)
            for rows, stored in merge.layout.decode_rows(key, encoded, _DECODED_VALUES):
                tally.rounded(exact[rows], stored)
        else:
            encoded = {key: exact.to(planned.dtype)}
            if exact.dtype != planned.dtype:
                tally.rounded(exact, encoded[key])
        _check_finite(tally, key, output)
        return encoded
    if _is_copied(key, merge):
        return {key: merge.checkpoint.read(key)}
    converted = merge.layout.read(merge.checkpoint, key, planned.dtype)
    if planned.dtype == torch.float16 and not converted.isfinite().all():
        raise NotFiniteError(
            f"{output}: {key} has values that float16 cannot hold, so the file was not written; "
            "choose bf16 or fp32"
        )
    return {key: converted}


@torch.no_grad()
def merged_tensor(key: str, merge: CheckpointMerge, tally: MergeTally) -> Tensor:
    """The changed weight or bias ``key``, rounded only if that is the type to be written."""
    layer_name, piece, is_bias = merge.targets[key]
    layer = merge.model.layers[layer_name]
    weighted = merge.adapters[layer_name]
    if is_bias:
        weighted = [
            Weighted(FullWeights(adapter.bias_diff), multiplier)
            for adapter, multiplier in weighted
            if adapter.bias_diff is not None
        ]
    else:
        weighted = [each for each in weighted if each.adapter.shape is not None]
    tensor = _working_copy(key, merge)
    pieces = layer.bias if is_bias else layer.weight
    if len(pieces) > 1 and any(needs_whole(each.adapter) for each in weighted):
        whole = torch.cat([_working_copy(each.key, merge, exact=True) for each in pieces])
        add_adapters(whole, weighted, MergeTally())
        changed = whole[piece.first : piece.end].clone()
        tally.changed(tensor, changed)
        return changed
    if len(pieces) > 1:
        weighted = [
            Weighted(part_of(adapter, piece.first, piece.end), multiplier)
            for adapter, multiplier in weighted
        ]
    if layer.halves_swapped:
        tensor = _swap_halves(tensor)
    add_adapters(tensor, weighted, tally)
    return _swap_halves(tensor) if layer.halves_swapped else tensor


def _working_copy(key: str, merge: CheckpointMerge, *, exact: bool = False) -> Tensor:
    """A weight in its own type if that is the one to be written, or else in float32."""
    stored = merge.checkpoint.dtype(key)
    same = stored == merge.tensors[key].dtype and not merge.layout.is_quantized(key)
    wide = torch.float64 if stored == torch.float64 else torch.float32
    read = merge.layout.read(merge.checkpoint, key, stored if same and not exact else wide)
    return read.to(merge.device)


def _check_finite(tally: MergeTally, key: str, output: Path) -> None:
    if not tally.is_finite():
        raise NotFiniteError(
            f"{output}: {key} became NaN or infinite, so the file was not written; use a smaller "
            "multiplier, or choose bf16 or fp32"
        )


def _swap_halves(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])
