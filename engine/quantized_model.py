"""Filling a model that was built without memory; its linear layers may be in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from .quantization_report import LayerReport, report_of
from .quantize import Quantized, dequantize
from .quantized_linear import QuantizedLinear
from .quantized_loading import QuantizedSource
from .quantized_stream import Stored, stored_tensors
from .weights import Source, check_fit, targets_by_source
from .workspace import Workspace

Part = Callable[[Tensor], Tensor] | None


def put_empty_layers(
    module: nn.Module,
    source: QuantizedSource,
    key_map: Mapping[str, Source],
    *,
    ignore: Iterable[str] = (),
) -> None:
    """Make a model what `load_quantized` would make of it, still without memory.

    Raises:
        CheckpointError: as `load_quantized`.
    """
    headers = source.headers()
    check_fit(module, headers, key_map, ignore=ignore)
    targets = targets_by_source(module.state_dict(), headers, key_map)
    for key, way in source.eight_bit.items():
        empty = way.empty("meta")
        for target, part in targets.get(key, []):
            if isinstance(_linear(module, target), nn.Linear):
                _put(module, target, _part_of(empty, part), {}, None)


def load_quantized(
    module: nn.Module,
    source: QuantizedSource,
    key_map: Mapping[str, Source],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    ignore: Iterable[str] = (),
    measure: bool = False,
) -> list[LayerReport]:
    """Fill a model, tensor by tensor, strictly; gives what became of the layers in 8 bits.

    Parts of a weight that the file has as one share its codes and scales. Memory of the CPU holds
    the result and two layers at most.

    Args:
        module: built under ``accelerate.init_empty_weights``; its parameters are replaced, and so
            are its linear layers that get into 8 bits.
        key_map: as of `weights.load_into`; a part of a tensor is made of its rows.
        dtype: of every floating-point tensor that is not in 8 bits.
        ignore: names in the file that are allowed to stay unused.
        measure: find the rounding errors, too.

    Raises:
        CheckpointError: a tensor is missing, left over or has another shape than the module.
        NotFiniteError: a weight to be rounded has a value that is NaN or infinite.
    """
    headers = source.headers()
    check_fit(module, headers, key_map, ignore=ignore)
    targets = targets_by_source(module.state_dict(), headers, key_map)
    keys = [key for key in source.tensors() if key in targets]
    loaded: dict[str, Tensor] = {}
    layers: dict[str, Quantized] = {}
    reports: list[LayerReport] = []
    for stored in stored_tensors(source, keys, dtype=dtype, device=device, measure=measure):
        _sort(module, stored, targets[stored.key], dtype, loaded, layers)
        if isinstance(stored.value, Quantized):
            reports.append(report_of(source, stored))
    workspace = Workspace()
    for target, quantized in layers.items():
        _put(module, target, quantized, loaded, workspace)
    module.load_state_dict(loaded, strict=True, assign=True)
    module.to(device)  # what is in no file, such as a table of positions
    return reports


def keep_from_broadcasts(model: nn.Module) -> None:
    """Let DistributedDataParallel, when it wraps the model, leave its layers in 8 bits alone.

    It would send all codes to every process in every step, and with gloo it cannot send FP8. The
    processes have loaded the same ones.
    """
    names = [
        f"{path}.{name}"
        for path, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear)
        for name, _ in layer.named_buffers()
    ]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def scratch_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """What the layers in 8 bits need to restore their weights in, all together, at most."""
    layers = [each for each in module.modules() if isinstance(each, QuantizedLinear)]
    # On a CPU a part of the weight is restored, which is in float32 at first.
    sizes = [min(each.codes.numel(), each.chunk or each.codes.numel()) for each in layers]
    return max(sizes, default=0) * dtype.itemsize


def _sort(
    module: nn.Module,
    stored: Stored,
    targets: Iterable[tuple[str, Part]],
    dtype: torch.dtype,
    loaded: dict[str, Tensor],
    layers: dict[str, Quantized],
) -> None:
    """Put what was read where it belongs."""
    for target, part in targets:
        value = stored.value
        if isinstance(value, Quantized):
            if isinstance(_linear(module, target), nn.Linear):
                layers[target] = _part_of(value, part)
                continue
            value = dequantize(value, dtype)
        loaded[target] = (part(value) if part else value).contiguous()


def _linear(module: nn.Module, target: str) -> nn.Module:
    return module.get_submodule(target.rpartition(".")[0])


def _part_of(whole: Quantized, part: Part) -> Quantized:
    if part is None:
        return whole
    scale = whole.scale if whole.mode == "tensor" else part(whole.scale)
    return replace(whole, codes=part(whole.codes), scale=scale)


def _put(
    module: nn.Module,
    target: str,
    quantized: Quantized,
    loaded: dict[str, Tensor],
    workspace: Workspace | None,
) -> None:
    """Replace the Linear of a weight; what it is made of goes to ``loaded`` as well."""
    path = target.rpartition(".")[0]
    linear = module.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    bias = loaded.get(f"{path}.bias", linear.bias)
    layer = QuantizedLinear(quantized, bias, workspace=workspace).train(linear.training)
    module.set_submodule(path, layer)
    loaded |= {f"{path}.codes": quantized.codes, f"{path}.scale": quantized.scale}
