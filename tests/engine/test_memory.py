from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from pack.engine import memory, optimizers
from pack.engine.memory import Host, MemoryEstimate, estimate, size_in_words
from torch import nn
from torch.optim import Optimizer

NUMBERS = {
    "model_bytes": 1000,
    "num_trained": 10,
    "optimizer_bytes": 80,
    "activation_bytes": 500,
    "batch_bytes": 7,
}


def test_on_an_accelerator_only_what_lies_there_counts() -> None:
    found = estimate(**NUMBERS, host=None)
    assert found.parts == {
        "model": 1000,
        "LoRA and optimizer": 40 + 80,
        "activations": 500,
        "batch": 7,
    }
    assert found.total_bytes == 1627


def test_on_the_cpu_the_program_the_images_and_a_first_state_count_too() -> None:
    new = estimate(**NUMBERS, host=Host(program_bytes=300, dataset_bytes=60))
    assert new.total_bytes == 1627 + 2 * 7 + 300 + 60 + 40
    continued = estimate(**NUMBERS, host=Host(300, 60, is_continued=True))
    assert continued.total_bytes == new.total_bytes + 80


def test_a_state_that_is_larger_than_the_activations_counts_in_their_place() -> None:
    host = Host(program_bytes=0, dataset_bytes=0)
    found = estimate(**{**NUMBERS, "activation_bytes": 5}, host=host)
    assert found.parts["activations"] == 2 * (40 + 80)


def test_an_estimate_is_told_with_its_large_parts_first() -> None:
    gib = 2**30
    found = MemoryEstimate({"batch": gib // 100, "activations": 2 * gib, "model": 12 * gib})
    assert found.in_words() == "14.0 GiB (model 12.0 GiB, activations 2.0 GiB)"


@pytest.mark.parametrize(
    ("num_bytes", "words"), [(0, "0.0 MiB"), (3 * 2**19, "1.5 MiB"), (2**30, "1.0 GiB")]
)
def test_sizes_in_words(num_bytes: int, words: str) -> None:
    assert size_in_words(num_bytes) == words


def test_frozen_weights_and_buffers_are_counted_once() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(4, 8))
    model[2].weight = model[0].weight  # pyright: ignore[reportArgumentType]
    model.requires_grad_(False)
    model[2].bias.requires_grad_(True)
    # Weight, scale and shift of the norm, its mean, variance and counter (int64).
    assert memory.frozen_bytes(model) == 4 * (32 + 8 + 8 + 8 + 8) + 8
    half = nn.BatchNorm1d(8).requires_grad_(False).to("meta", torch.bfloat16)
    assert memory.frozen_bytes(half) == 2 * (8 + 8 + 8 + 8) + 8


@pytest.mark.parametrize(
    ("name", "per_number"),
    # AdamW keeps two moments, Lion one; AdamWScheduleFree a second moment and another point.
    [("AdamW", 8), ("Lion", 4), ("AdamWScheduleFree", 8), ("SGDScheduleFree", 4)],
)
def test_what_an_optimizer_keeps_is_found_by_making_a_step(name: str, per_number: int) -> None:
    package = {"Lion": "lion_pytorch"}.get(name, "schedulefree")
    if name != "AdamW":
        pytest.importorskip(package)

    def make(parameters: Sequence[nn.Parameter]) -> Optimizer:
        group = optimizers.ParameterGroup("lora", parameters)
        return optimizers.create(name, [group], lr=1e-3, arguments={}, allowed=())

    shapes = [torch.Size((16, 64)), torch.Size((128, 16)), torch.Size((16, 64))]
    found = memory.optimizer_bytes(shapes, make, device=torch.device("cpu"))
    num_trained = 16 * 64 * 2 + 128 * 16
    # Some keep a step number for every parameter besides.
    assert 0 <= found - per_number * num_trained <= 8 * len(shapes)


def test_an_optimizer_that_keeps_rows_and_columns_is_counted_by_shape() -> None:
    def make(parameters: Sequence[nn.Parameter]) -> Optimizer:
        group = optimizers.ParameterGroup("lora", parameters)
        return optimizers.create("Adafactor", [group], lr=1e-3, arguments={}, allowed=())

    found = memory.optimizer_bytes([torch.Size((16, 640))], make, device=torch.device("cpu"))
    assert 4 * (16 + 640) <= found <= 4 * (16 + 640) + 16
