"""A model file as ComfyUI's own MODEL, with the layers of its blocks in 8 bits.

The engine reads, merges and rounds one tensor after the other; ComfyUI finds out what model it is
and builds it. Between them stand names: a file of diffusers has other ones, and several tensors
where ComfyUI has one layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sd
import torch
from torch import Tensor

from ..engine.architectures.names import LAYER_NAMES
from ..engine.checkpoint_layers import Piece, StoredModel, stored_model
from ..engine.errors import CheckpointError
from ..engine.events import Event, Progress, Reporter
from ..engine.layer_names import row_of
from ..engine.quantization_report import LayerReport, report_of, summary
from ..engine.quantize import Quantized, dequantize
from ..engine.quantized_layout import layout_of
from ..engine.quantized_loading import (
    QuantizationSettings,
    QuantizedSource,
    quantized_source,
    read_loras,
    remarks,
)
from ..engine.quantized_stream import stored_tensors
from ..engine.weights import open_checkpoint
from . import block_layout

_MIB = 2**20


@dataclass(frozen=True)
class ModelRequest:
    """What to load, so that it can be loaded again.

    Args:
        loras: files to merge before weights are rounded, and their multipliers.
        measure: find the rounding errors, too, which takes about as long as the rounding.
        architecture: a family's name, or "auto".
    """

    path: Path
    settings: QuantizationSettings
    loras: tuple[tuple[Path, float], ...] = ()
    measure: bool = False
    architecture: str = "auto"


class LoadedModel(NamedTuple):
    """ComfyUI's patcher of a model, and what became of its layers."""

    patcher: Any
    layers: list[LayerReport]
    report: str


def load_model(
    request: ModelRequest, *, report: Reporter, disable_dynamic: bool = False
) -> LoadedModel:
    """Read a model, merge LoRAs, and round the layers that are not in 8 bits yet.

    Memory holds the result and two layers at most.

    Args:
        disable_dynamic: ComfyUI's word for a model that is loaded and unloaded as a whole.

    Raises:
        EngineError: this ComfyUI is too old, a file cannot be read, or they do not go together.
    """
    block_layout.check_comfyui()
    from comfy.hooks import EnumHookMode

    checkpoint = open_checkpoint(request.path)
    layout = layout_of(checkpoint)
    names = stored_model(checkpoint, layout, LAYER_NAMES, request.architecture).names
    adapters, told = read_loras(checkpoint, names, request.loras)
    source = quantized_source(checkpoint, names, request.settings, adapters)
    types = _types(source)
    layers: list[LayerReport] = []
    tensors = _native_tensors(source, _read(source, request.measure, layers, report), types.compute)
    state = {name: _as_comfyui_has_it(name, value, types.compute) for name, value in tensors}
    options = {
        "custom_operations": block_layout.operations(types.compute),
        "dtype": types.storage,
    }
    patcher = comfy.sd.load_diffusion_model_state_dict(
        state,
        model_options=options,
        metadata=dict(checkpoint.metadata),
        disable_dynamic=disable_dynamic,
    )
    if patcher is None:  # `_types` asked the same question
        raise _unknown_model(source)
    patcher.cached_patcher_init = (reload_patcher, (request,))
    # In its other mode ComfyUI copies patched weights as floats over those in 8 bits.
    patcher.set_hook_mode(EnumHookMode.MinVram)
    lines = [f"{request.path.name}: {names.family}", *told, *remarks(source), summary(layers)]
    return LoadedModel(patcher, layers, "\n".join(lines))


def reload_patcher(request: ModelRequest, disable_dynamic: bool = False) -> Any:
    """The patcher of the same model, read again; what ComfyUI calls where it needs a second one."""
    return load_model(request, report=_ignore, disable_dynamic=disable_dynamic).patcher


class _Types(NamedTuple):
    """What ComfyUI keeps the tensors in that are not in 8 bits, and what it computes in."""

    storage: torch.dtype
    compute: torch.dtype


def _types(source: QuantizedSource) -> _Types:
    """As ComfyUI's own loader chooses them.

    Raises:
        CheckpointError: it knows no such model.
    """
    from comfy import model_detection

    empty = ((key, _without_values(source, key)) for key in _own_keys(source))
    state = dict(_native_tensors(source, empty, torch.float32))
    config = model_detection.model_config_from_unet(state, "", metadata=source.checkpoint.metadata)
    if config is None:
        raise _unknown_model(source)
    own_type = source.checkpoint.main_dtype(source.checkpoint.entries)
    supported = list(config.supported_inference_dtypes)
    storage = comfy.model_management.unet_dtype(
        model_params=sum(tensor.numel() for tensor in state.values()),
        supported_dtypes=supported,
        weight_dtype=own_type if own_type.itemsize > 1 else None,
    )
    device = comfy.model_management.get_torch_device()
    compute = comfy.model_management.unet_manual_cast(storage, device, supported)
    return _Types(storage, compute or storage)


def _unknown_model(source: QuantizedSource) -> CheckpointError:
    return CheckpointError(
        f"{source.checkpoint.paths[0]}: ComfyUI has no model like this "
        f"({source.model.names.family}), so it cannot sample with it"
    )


def _own_keys(source: QuantizedSource) -> list[str]:
    """The tensors of the diffusion model; a checkpoint may hold others beside it."""
    return [key for key in source.tensors() if key.startswith(source.model.prefix)]


def _without_values(source: QuantizedSource, key: str) -> Tensor:
    shape = source.layout.shape(source.checkpoint, key)
    return torch.empty(shape, dtype=source.plain_dtype(key), device="meta")


def _read(
    source: QuantizedSource, measure: bool, layers: list[LayerReport], report: Reporter
) -> Iterator[tuple[str, Tensor | Quantized]]:
    """Every tensor of the diffusion model; ``layers`` gets what became of those in 8 bits."""
    keys = _own_keys(source)
    sizes = {key: source.checkpoint.entries[key].num_bytes for key in keys}
    done, total_mib = 0, -(-sum(sizes.values()) // _MIB)
    stream: Any = stored_tensors(source, keys, dtype=None, measure=measure)
    with closing(stream):
        for stored in stream:
            if isinstance(stored.value, Quantized):
                layers.append(report_of(source, stored))
            yield stored.key, stored.value
            done += sizes[stored.key]
            report(Progress("load", done // _MIB, total_mib, unit="MiB"))


class _Place(NamedTuple):
    """A tensor is the ``index``-th of ``count`` pieces of the one that ComfyUI calls ``name``."""

    name: str
    index: int
    count: int
    halves_swapped: bool


def _native_tensors(
    source: QuantizedSource,
    tensors: Iterable[tuple[str, Tensor | Quantized]],
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor | Quantized]]:
    """The same under ComfyUI's names, pieces put together.

    Args:
        dtype: of a weight whose pieces were rounded in different ways, and so is restored.
    """
    model = source.model
    places = _places(model)
    waiting: dict[str, dict[int, Tensor | Quantized]] = {}
    for key, value in tensors:
        own = _Place(key.removeprefix(model.prefix), 0, 1, halves_swapped=False)
        place = places.get(key, own)
        pieces = waiting.setdefault(place.name, {})
        pieces[place.index] = value
        if len(pieces) == place.count:
            whole = _joined([pieces[index] for index in sorted(pieces)], dtype)
            del waiting[place.name]
            if place.halves_swapped and isinstance(whole, Tensor):
                whole = torch.cat(list(reversed(whole.chunk(2))))
            yield place.name, whole


def _places(model: StoredModel) -> dict[str, _Place]:
    """Where the tensors belong whose names in the file are not those of ComfyUI."""
    found: dict[str, _Place] = {}
    for published, layer in model.layers.items():
        row, index = row_of(model.names, published) or (None, ())
        assert row is not None  # or it would be no layer of the model
        known = {published, *(alias.format(*index) for alias in row.aliases)}
        endings: Mapping[str, tuple[Piece, ...]] = {
            "" if row.bare else f".{row.weight_name}": layer.weight,
            ".bias": layer.bias,
        }
        for ending, pieces in endings.items():
            for number, piece in enumerate(pieces):
                own = piece.key.removeprefix(model.prefix)
                if (own if row.bare else own.rpartition(".")[0]) in known:
                    continue
                name = f"{published}{ending}"
                found[piece.key] = _Place(name, number, len(pieces), layer.halves_swapped)
    return found


def _joined(pieces: list[Tensor | Quantized], dtype: torch.dtype) -> Tensor | Quantized:
    """One tensor of all rows."""
    if len(pieces) == 1:
        return pieces[0]
    codes = [piece for piece in pieces if isinstance(piece, Quantized)]
    if not codes:
        return torch.cat([piece for piece in pieces if isinstance(piece, Tensor)])
    first = codes[0]
    alike = {(each.format, each.mode, each.block_size, each.scale.dtype) for each in codes}
    if len(codes) < len(pieces) or len(alike) > 1:
        restored = (
            dequantize(piece, dtype) if isinstance(piece, Quantized) else piece.to(dtype)
            for piece in pieces
        )
        return torch.cat(list(restored))
    mode = first.mode
    scales = [each.scale for each in codes]
    if mode == "tensor":  # each piece has its own
        mode = "channel"
        scales = [each.scale.expand(each.codes.shape[0], 1) for each in codes]
    stacked = torch.cat([each.codes.view(torch.uint8) for each in codes]).view(first.codes.dtype)
    return Quantized(stacked, torch.cat(scales), mode, first.block_size)


def _as_comfyui_has_it(name: str, value: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Quantized):
        return block_layout.quantized_weight(value, dtype)
    # What linear layers make of it anyway. They would do so with all weights still in memory.
    return value.to(dtype) if name.endswith(".weight") and value.dim() == 2 else value


def _ignore(event: Event) -> None:
    """Reports nothing."""
