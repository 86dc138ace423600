from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pack.engine.tensor_stream import TensorPlan, file_size, in_aligned_order, tensor_stream
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

TENSORS = {
    "b": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
    "number": torch.tensor(2.5, dtype=torch.float64),
    "codes": torch.randn(7, 3).to(torch.float8_e4m3fn),
    "text": torch.tensor(list(b"{}"), dtype=torch.uint8),
    'ä"\\': torch.ones(1),
}


def plan_of(tensors: dict[str, Tensor]) -> dict[str, TensorPlan]:
    return {name: TensorPlan(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and torch.equal(
            a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)
        )
        for name in a
    )


@pytest.mark.parametrize("order", [list(TENSORS), sorted(TENSORS), list(TENSORS)[::-1]])
def test_the_safetensors_library_reads_what_was_written_in_any_order(
    tmp_path: Path, order: list[str]
) -> None:
    path = tmp_path / "a.safetensors"
    plan = in_aligned_order(plan_of(TENSORS))
    metadata = {"format": "pt", "title": 'ä\n"quoted"'}
    with tensor_stream(path, plan, metadata) as write:
        for name in order:
            write(name, TENSORS[name])
    assert same(load_file(path), TENSORS)
    assert path.stat().st_size == file_size(plan, metadata)
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata


def test_a_tensor_that_is_a_view_is_written_as_it_looks(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    view = torch.randn(4, 6)[:, ::2].t()
    with tensor_stream(path, plan_of({"a": view}), {}) as write:
        write("a", view)
    assert torch.equal(load_file(path)["a"], view)


def test_an_order_without_gaps_is_kept_and_any_other_is_aligned() -> None:
    kept = {"x": TensorPlan(torch.float32, (3,)), "y": TensorPlan(torch.int8, (3,))}
    assert list(in_aligned_order(kept)) == ["x", "y"]
    moved = in_aligned_order({"y": kept["y"], "x": kept["x"], "z": kept["y"]})
    assert list(moved) == ["x", "y", "z"]


@pytest.mark.parametrize("break_", ["missing", "twice", "shape", "dtype", "unknown"])
def test_what_is_not_as_planned_leaves_no_file(tmp_path: Path, break_: str) -> None:
    path = tmp_path / "a.safetensors"
    tensor = torch.ones(2, 2)
    with (
        pytest.raises((ValueError, KeyError)),
        tensor_stream(path, plan_of({"a": tensor, "b": tensor}), {}) as write,
    ):
        write("a", tensor)
        if break_ == "twice":
            write("a", tensor)
        elif break_ != "missing":
            name = "c" if break_ == "unknown" else "b"
            write(name, tensor.half() if break_ == "dtype" else tensor.view(-1))
    assert not list(tmp_path.iterdir())
