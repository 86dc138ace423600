"""LoRA files of every spelling and kind, each key accounted for when they are read and written.

Layers have their published names here (`layer_names`). What a file calls otherwise is renamed;
what it has for the modules that diffusers makes of a published layer is combined, exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from . import lora_family, lora_formats, lora_metadata, lora_spelling
from .adapter_weights import AdapterWeights, FullWeights
from .errors import CheckpointError, NotFiniteError
from .layer_names import LayerNames, Place
from .lora_parts import PartsReader
from .lora_pieces import NotExactError, combined
from .peft_settings import PeftAlpha
from .weights import open_checkpoint, save_tensors

# Published name of a layer -> shape of its weight [O, I, *K]; of a norm's, [D].
LayerShapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LoRAFile:
    """What a file holds.

    Args:
        names: the family that it is for.
        layers: adapters by the published name of their layer.
        other: tensors of text encoders, by their keys, as they are.
        format: how the keys are spelled, one of `lora_formats.FORMATS`.
        remarks: sentences on what reading had to do.
    """

    path: Path
    names: LayerNames
    layers: dict[str, AdapterWeights]
    other: dict[str, Tensor]
    metadata: dict[str, str]
    format: str
    remarks: tuple[str, ...] = ()


def read_lora(
    path: Path,
    families: Iterable[LayerNames],
    *,
    shapes: LayerShapes | None = None,
    check_finite: bool = True,
) -> LoRAFile:
    """Read a LoRA for one of ``families``, whatever program wrote it.

    Alpha is the rank when the file says nothing, as in every program that reads such files.

    Args:
        shapes: of the layers of the model at hand; each layer of the file must be there and fit.
        check_finite: refuse NaN and infinity.

    Raises:
        CheckpointError: the file is no LoRA, is damaged, or a key or shape does not fit.
        ConfigError: several families fit and nothing tells which it is.
    """
    checkpoint = open_checkpoint(path)
    metadata = checkpoint.metadata
    keys = lora_formats.parse(path, checkpoint.entries)
    located = lora_family.find(path, list(keys.modules), families, metadata=metadata, layers=shapes)
    alpha = PeftAlpha(path, metadata)
    reader = PartsReader(path, checkpoint, alpha, check_finite)
    layers = _Layers(path, reader, shapes, keys.modules)
    found = {
        published: layers.read(published, modules)
        for published, modules in _by_layer(located.places).items()
    }
    remarks = [*located.remarks, *layers.sentences()]
    if alpha.used:
        remarks.append(f"alpha was taken from {alpha.source}")
    if keys.other:
        remarks.append(f"{len(keys.other)} keys of text encoders are kept as they are")
    return LoRAFile(
        path,
        located.names,
        found,
        {key: checkpoint.read(key) for key in keys.other},
        metadata,
        _format(located.places),
        tuple(remarks),
    )


def write_lora(
    path: Path,
    layers: Mapping[str, AdapterWeights],
    names: LayerNames,
    *,
    format: str = "comfyui",
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    other: Mapping[str, Tensor] = MappingProxyType({}),
) -> list[str]:
    """Write a LoRA; the file is either whole and sound or not there.

    Args:
        dtype: of all factors; computed in float32 and rounded once.
        other: tensors that are written as they are.

    Returns:
        Sentences on what could not be written as it was.

    Raises:
        ConfigError: a layer cannot be written in this format.
        NotFiniteError: a value is NaN or infinite, or too large for ``dtype``.
        ValueError: a layer is not one of the family (a bug of ours).
    """
    spelled = lora_spelling.spell(path, layers, names, format=format)
    cast = {key: _cast(path, key, tensor, dtype) for key, tensor in spelled.tensors.items()}
    _own_memory(cast)
    _check_names(path, cast, names, layers)
    cast |= other
    header = {k: v for k, v in metadata.items() if k != lora_metadata.DIFFUSERS_KEY}
    save_tensors(path, cast, lora_metadata.with_hashes(cast, header | spelled.metadata))
    return spelled.remarks


def save_adapters(
    path: Path,
    weights: Mapping[str, AdapterWeights],
    names: LayerNames,
    shapes: LayerShapes,
    *,
    format: str = "comfyui",
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> list[str]:
    """Write the adapters of a model whose layers have these shapes; as `write_lora` else.

    Raises:
        ValueError: a name or shape does not belong to the model (a bug of ours).
    """
    for name, adapter in weights.items():
        if name not in shapes:
            raise ValueError(f"{name} is no layer of the model")
        if adapter.shape not in (None, tuple(shapes[name])):
            raise ValueError(f"{name} has an adapter for {adapter.shape}, not {shapes[name]}")
    return write_lora(path, weights, names, format=format, dtype=dtype, metadata=metadata)


@dataclass(frozen=True)
class _Layers:
    """Reads layer by layer and counts what had to be done."""

    path: Path
    reader: PartsReader
    shapes: LayerShapes | None
    keys: Mapping[str, Mapping[str, str]]
    counts: Counter[str] = field(default_factory=Counter)

    def read(self, published: str, modules: Mapping[str, Place]) -> AdapterWeights:
        row = next(iter(modules.values())).row
        shape = self._shape(published)
        tail = None if shape is None else shape[1:]
        by_part: dict[int | None, str] = {}
        for module, place in modules.items():
            if by_part and (place.part in by_part or None in (place.part, *by_part)):
                raise CheckpointError(
                    f"{self.path}: {by_part.get(place.part, next(iter(modules)))} and {module} are "
                    f"both for {published}; the file holds two LoRAs, save each in its own file"
                )
            by_part[place.part] = module
        found = {
            part: self.reader.read(module, self.keys[module], tail)
            for part, module in by_part.items()
        }
        adapter = found.get(None)
        if adapter is None:
            pieces = [found.get(part) for part in range(len(row.inner))]
            adapter = self._combined(published, pieces, shape, modules)
        self._check(published, adapter, shape)
        if not isinstance(adapter, FullWeights) and adapter.alpha == 0:
            self.counts["alpha is 0, so that the layer does nothing"] += 1
        return adapter

    def sentences(self) -> list[str]:
        return [f"in {number} layers {what}" for what, number in self.counts.items()]

    def _combined(
        self,
        published: str,
        pieces: list[AdapterWeights | None],
        shape: tuple[int, ...] | None,
        modules: Mapping[str, Place],
    ) -> AdapterWeights:
        row = next(iter(modules.values())).row
        try:
            result = combined(pieces, row, shape[0] if shape else None)
        except NotExactError as error:
            raise CheckpointError(
                f"{self.path}: {next(iter(modules))} belongs to {published}, which {error}; "
                "there is no adapter that does the same"
            ) from None
        if len(row.inner) > 1:
            self.counts["the adapters of diffusers' modules became one of the published layer"] += 1
        if result.remark:
            self.counts[result.remark] += 1
        return result.adapter

    def _shape(self, published: str) -> tuple[int, ...] | None:
        if self.shapes is None:
            return None
        if published not in self.shapes:
            raise CheckpointError(
                f"{self.path}: the LoRA is for a layer {published!r} that this model does not have"
                f"{_near(published, self.shapes)}"
            )
        return tuple(self.shapes[published])

    def _check(
        self, published: str, adapter: AdapterWeights, shape: tuple[int, ...] | None
    ) -> None:
        if shape is None:
            return
        given = adapter.shape or shape
        rows = given[0] if adapter.bias_diff is None else adapter.bias_diff.shape[0]
        if given != shape or rows != shape[0]:
            found = [rows, *given[1:]]
            raise CheckpointError(
                f"{self.path}: {published} has an adapter for a weight of {found}, but the layer "
                f"is {list(shape)}; it was made for a model of another size"
            )


def _by_layer(places: Mapping[str, Place]) -> dict[str, dict[str, Place]]:
    """The modules of the file that each published layer is made of."""
    found: dict[str, dict[str, Place]] = {}
    for module, place in places.items():
        found.setdefault(place.published, {})[module] = place
    return found


def _format(places: Mapping[str, Place]) -> str:
    spellings = Counter(lora_formats.spelling(module, each) for module, each in places.items())
    return spellings.most_common(1)[0][0]


def _near(name: str, known: Iterable[str]) -> str:
    found = get_close_matches(name, list(known), n=1)
    return f"; the nearest layer is {found[0]!r}" if found else ""


def _cast(path: Path, key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``, but for what scales whole layers and is small."""
    small = key.endswith((".alpha", ".dora_scale", ".lora_magnitude_vector"))
    cast = tensor.detach().to("cpu", torch.float32 if small else dtype).contiguous()
    if cast.isfinite().all():
        return cast
    if tensor.isfinite().all():
        raise NotFiniteError(
            f"{path}: {key} has values up to {tensor.abs().max().item():.3g}, which became "
            f"infinite in {str(dtype).removeprefix('torch.')}, so nothing was written; choose "
            "bf16 or fp32"
        )
    raise NotFiniteError(
        f"{path}: {key} became NaN or infinite, so the LoRA was not written; what was "
        "saved before is untouched, start again with a lower learning_rate"
    )


def _own_memory(tensors: dict[str, Tensor]) -> None:
    """Copy what shares memory with another tensor, which safetensors refuses to write."""
    seen: set[int] = set()
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen:
            tensors[key] = tensor.clone()
        seen.add(storage)


def _check_names(
    path: Path, tensors: Iterable[str], names: LayerNames, layers: Iterable[str]
) -> None:
    """That a reader finds the layers that were written."""
    modules = lora_formats.parse(path, tensors).modules
    found = {place.published for each in modules if (place := lora_formats.place_of(names, each))}
    if found != set(layers):
        raise ValueError(f"{sorted(found ^ set(layers))[:3]} would not be found again")
