"""Writing a safetensors file tensor by tensor, so that memory never holds all of them.

The header stands at the beginning, so what will be written has to be known beforehand. The
layout is documented at https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .atomic_file import replacing
from .weights import DTYPES

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_ALIGNMENT = 8


class TensorPlan(NamedTuple):
    """Type and shape of a tensor that is to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def in_aligned_order(plan: Mapping[str, TensorPlan]) -> dict[str, TensorPlan]:
    """The plan as it is if every tensor begins at a multiple of its item size.

    Otherwise those with larger items come first, as the safetensors library orders them.
    """
    offset = 0
    for tensor in plan.values():
        if offset % tensor.dtype.itemsize:
            ordered = sorted(plan.items(), key=lambda item: -item[1].dtype.itemsize)
            return dict(ordered)
        offset += tensor.num_bytes
    return dict(plan)


def file_size(plan: Mapping[str, TensorPlan], metadata: Mapping[str, str]) -> int:
    """Bytes of the whole file."""
    return len(_header(plan, metadata)) + sum(tensor.num_bytes for tensor in plan.values())


@contextmanager
def tensor_stream(
    path: Path, plan: Mapping[str, TensorPlan], metadata: Mapping[str, str]
) -> Iterator[Callable[[str, Tensor], None]]:
    """A function that writes one tensor of the plan; the file is whole or absent.

    In the order of the plan the file is written forward; any other order gives the same file.

    Raises:
        ValueError: a tensor is not as planned or was written before, or the block ends before all
            were written.
    """
    header = _header(plan, metadata)
    ends = accumulate((tensor.num_bytes for tensor in plan.values()), initial=len(header))
    starts = dict(zip(plan, ends, strict=False))
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            file.write(header)

            def write(name: str, tensor: Tensor) -> None:
                found = TensorPlan(tensor.dtype, tuple(tensor.shape))
                if found != plan[name]:
                    raise ValueError(f"{name} is {found}, not {plan[name]} as planned")
                start = starts.pop(name, None)
                if start is None:
                    raise ValueError(f"{name} was written twice")
                if tensor.numel():
                    file.seek(start)
                    bytes_ = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                    file.write(bytes_.numpy().data)

            yield write
        if starts:
            raise ValueError(f"{min(starts)} was not written")


def _header(plan: Mapping[str, TensorPlan], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in plan.items():
        end = offset + tensor.num_bytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
