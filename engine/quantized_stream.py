"""The tensors of a model on disk, one after the other, most of them in 8 bits.

Weights are read and rounded in pieces that stay in a processor's cache, by several threads, so
that memory holds little besides the results.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .checkpoint_merge import merged_tensor
from .errors import NotFiniteError
from .lora_merge import MergeTally
from .quantize import Quantized, dequantize, quantize_into
from .quantized_loading import EightBit, QuantizationSettings, QuantizedSource
from .workers import in_order, num_workers
from .workspace import Workspace

# Weights that are read at once, and those that errors are measured of at once.
_PIECE, _MEASURED = 2**21, 2**18
# Whole weights that may be in memory besides the results, while one scale for all is looked for.
_MOST_WHOLE = 2


class Squares(NamedTuple):
    """Sums of squares over a weight: of what rounding changed, and of the weight itself."""

    error: float
    weight: float


class Stored(NamedTuple):
    """What became of the tensor ``key``; ``squares`` if they were asked for and known."""

    key: str
    value: Tensor | Quantized
    squares: Squares | None = None


def stored_tensors(
    source: QuantizedSource,
    keys: Iterable[str],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    measure: bool = False,
) -> Generator[Stored, None, None]:
    """The tensors of a model in the order of ``keys``, which are best in that of the file.

    Args:
        dtype: of floating-point tensors that are not in 8 bits; None leaves each its own.
        measure: find the rounding errors, which takes about as long as the rounding.

    Raises:
        NotFiniteError: a weight to be rounded has a value that is NaN or infinite.
        CheckpointError: the file became shorter.
    """
    work = _Work(source, dtype, torch.device(device), measure)
    return in_order(work.tensor, keys, num_threads=num_workers(device))


class _Work:
    """What the threads share."""

    def __init__(
        self,
        source: QuantizedSource,
        dtype: torch.dtype | None,
        device: torch.device,
        measure: bool,
    ) -> None:
        self.source = source
        self.merge = source.merge and replace(source.merge, device=device)
        self.dtype = dtype
        self.device = device
        self.measure = measure
        self.workspace = Workspace()
        self.whole = threading.BoundedSemaphore(_MOST_WHOLE)

    @torch.no_grad()
    def tensor(self, key: str) -> Stored:
        way = self.source.eight_bit.get(key)
        if way is None:
            return Stored(key, self._plain(key))
        if way.taken:
            return Stored(key, self._taken(key, way))
        settings = self.source.settings or QuantizationSettings()
        result = way.empty(self.device)
        in_pieces = (
            way.mode != "tensor"
            and self.device.type == "cpu"
            and not self._is_merged(key)
            and not self.source.layout.is_quantized(key)
        )
        try:
            if in_pieces:
                squares = self._in_pieces(key, result, settings)
            else:
                with self.whole:
                    weight_OI = self._whole(key)
                    squares = self._rounded(weight_OI, result, settings)
        except ValueError as error:
            raise NotFiniteError(
                f"{self.source.checkpoint.entries[key].path}: {key} has values that are NaN or "
                f"infinite{' with the LoRAs merged' if self._is_merged(key) else ''}, which have "
                "no place in 8 bits; get the file again"
            ) from error
        return Stored(key, result, squares)

    def _is_merged(self, key: str) -> bool:
        return self.merge is not None and key in self.merge.targets

    def _in_pieces(
        self, key: str, result: Quantized, settings: QuantizationSettings
    ) -> Squares | None:
        total = Squares(0.0, 0.0)
        for first, piece in self.source.checkpoint.pieces(key, _PIECE):
            some = result.rows(first, first + piece.shape[0])
            squares = self._rounded(piece, some, settings)
            if squares is not None:
                total = Squares(total.error + squares.error, total.weight + squares.weight)
        return total if self.measure else None

    def _rounded(
        self, weight_OI: Tensor, result: Quantized, settings: QuantizationSettings
    ) -> Squares | None:
        weight_OI = weight_OI.float() if weight_OI.dtype == torch.float64 else weight_OI
        quantize_into(
            result,
            weight_OI,
            search=settings.search,
            compat=settings.compat,
            workspace=self.workspace,
        )
        return rounding(weight_OI, result, self.workspace) if self.measure else None

    def _whole(self, key: str) -> Tensor:
        """A weight with everything merged into it, on the device."""
        if self._is_merged(key):
            return self._merged(key)
        if self.source.layout.is_quantized(key):
            read = self.source.layout.read(self.source.checkpoint, key, torch.float32)
            return read.to(self.device)
        return self.source.checkpoint.read(key, device=self.device)

    def _taken(self, key: str, way: EightBit) -> Quantized:
        found = self.source.layout.quantized(self.source.checkpoint, key)
        assert found is not None  # or it could not be taken
        scale = found.scale.to(self.device, way.scale_dtype)
        return replace(found, codes=found.codes.to(self.device), scale=scale)

    def _plain(self, key: str) -> Tensor:
        source = self.source
        own = source.plain_dtype(key)
        dtype = self.dtype if self.dtype is not None and own.is_floating_point else own
        if self._is_merged(key):
            with self.whole:
                return self._merged(key).to(dtype)
        if source.layout.is_quantized(key) and key.startswith(source.model.prefix):
            return source.layout.read(source.checkpoint, key, dtype).to(self.device)
        return source.checkpoint.read(key, dtype, self.device)

    def _merged(self, key: str) -> Tensor:
        """With the LoRAs, in the type of the file; in float32 what is in 8 bits there."""
        assert self.merge is not None
        tally = MergeTally()
        merged = merged_tensor(key, self.merge, tally)
        if not tally.is_finite():
            raise NotFiniteError(
                f"{self.source.checkpoint.entries[key].path}: {key} became NaN or infinite when "
                "the LoRAs were merged; use a smaller multiplier"
            )
        is_quantized = self.source.layout.is_quantized(key)
        return merged if is_quantized else merged.to(self.source.checkpoint.dtype(key))


def rounding(weight_OI: Tensor, quantized: Quantized, workspace: Workspace | None) -> Squares:
    """What rounding changed, summed in float64 over pieces in float32."""
    rows = max(1, _MEASURED // max(1, weight_OI.shape[1]))
    sums = torch.zeros(2, dtype=torch.float64, device=weight_OI.device)
    workspace = workspace or Workspace()
    for first in range(0, weight_OI.shape[0], rows):
        few = weight_OI[first : first + rows]
        codes = quantized.rows(first, first + few.shape[0])
        out = workspace.empty("restored", few.shape, torch.float32, few.device)
        restored = dequantize(codes, out=out, workspace=workspace).sub_(few)
        norms = [torch.linalg.vector_norm(each) for each in (restored, few.float())]
        sums += torch.stack(norms).double().square()
    return Squares(*sums.tolist())
