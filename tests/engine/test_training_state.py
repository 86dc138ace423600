from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pack.engine.errors import CheckpointError
from pack.engine.lora import inject
from pack.engine.optimizers import create
from pack.engine.training_state import (
    Progress,
    load_state,
    read_progress,
    recipe_differences,
    save_state,
)
from safetensors.torch import save_file
from torch import nn
from torch.amp.grad_scaler import GradScaler


class Run:
    """A tiny regression with adapters, so that optimizer state is real."""

    def __init__(self, rank: int = 2) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).requires_grad_(False)
        targets = {"a.0": ("0",), "b": ("1",)}
        generator = torch.Generator().manual_seed(1)
        self.network = inject(self.model, targets, rank=rank, alpha=2, generator=generator)
        self.optimizer = create("AdamW", list(self.network.parameters()), lr=0.1, arguments={})
        self.scaler = GradScaler("cpu", enabled=False)

    def step(self, index: int) -> None:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(index))
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()
        self.optimizer.step()

    def bits(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.network.parameters()]


def test_a_run_continues_with_the_same_bits(tmp_path: Path) -> None:
    straight = Run()
    for index in range(6):
        straight.step(index)

    first = Run()
    for index in range(3):
        first.step(index)
    progress = Progress(3, {"rank": 2}, "data")
    save_state(tmp_path / "s.safetensors", first.network, first.optimizer, first.scaler, progress)
    second = Run()
    path = tmp_path / "s.safetensors"
    assert load_state(path, second.network, second.optimizer, second.scaler) == progress
    for index in range(3, 6):
        second.step(index)

    for a, b in zip(straight.bits(), second.bits(), strict=True):
        assert torch.equal(a, b)


def test_the_position_is_read_without_the_network(tmp_path: Path) -> None:
    run, progress = Run(), Progress(7, {"learning_rate": 1e-4, "betas": [0.9, 0.99]}, "x")
    run.step(0)
    path = tmp_path / "s.safetensors"
    save_state(path, run.network, run.optimizer, run.scaler, progress)
    assert read_progress(path) == progress


def test_a_state_before_the_first_step_can_be_continued(tmp_path: Path) -> None:
    run, path = Run(), tmp_path / "s.safetensors"
    save_state(path, run.network, run.optimizer, run.scaler, Progress(0, {}, ""))
    again = Run()
    load_state(path, again.network, again.optimizer, again.scaler)
    again.step(0)
    run.step(0)
    for a, b in zip(run.bits(), again.bits(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_another_network_is_refused(tmp_path: Path) -> None:
    run, path = Run(rank=2), tmp_path / "s.safetensors"
    save_state(path, run.network, run.optimizer, run.scaler, Progress(0, {}, ""))
    other = Run(rank=3)
    with pytest.raises(CheckpointError, match="another model or network"):
        load_state(path, other.network, other.optimizer, other.scaler)


def test_a_file_that_is_no_state_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not a training state"):
        read_progress(tmp_path / "a.safetensors")


def test_settings_that_differ_are_named_with_both_values() -> None:
    saved, now = {"seed": 1, "network_dim": 16, "gone": 0}, {"seed": 1, "network_dim": 32}
    assert recipe_differences(saved, now) == [
        "gone (was 0, now None)",
        "network_dim (was 16, now 32)",
    ]
