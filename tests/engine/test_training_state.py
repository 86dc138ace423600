from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine import optimizer_state
from pack.engine.config_types import OPTIMIZERS
from pack.engine.errors import CheckpointError
from pack.engine.networks.network import inject
from pack.engine.networks.settings import LayerSettings
from pack.engine.optimizers import ParameterGroup, create, evaluating
from pack.engine.plugins import WELL_KNOWN
from pack.engine.training_state import (
    Progress,
    load_state,
    read_progress,
    recipe_differences,
    save_state,
)
from pack.engine.weights import open_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Optimizer


class Run:
    """A small regression with adapters, so that optimizer state is real."""

    def __init__(
        self,
        name: str = "AdamW",
        arguments: Mapping[str, Any] | None = None,
        *,
        rank: int = 2,
        size: int = 4,
        ratio: float | None = None,
    ) -> None:
        self.size = size
        torch.manual_seed(0)
        layers = nn.Linear(size, size), nn.Linear(size, size - 1)
        self.model = nn.Sequential(*layers).requires_grad_(False)
        settings = LayerSettings("lora", rank, alpha=2)
        targets = {"a.0": (("0",), settings), "b": (("1",), settings)}
        generator = torch.Generator().manual_seed(1)
        self.network = inject(self.model, targets, generator=generator)
        parameters = list(self.network.parameters())
        groups = [ParameterGroup("lora", parameters)]
        if ratio:
            groups = [
                ParameterGroup("down", parameters[::2]),
                ParameterGroup("up", parameters[1::2], ratio),
            ]
        self.optimizer = create(
            name, groups, lr=0.1, arguments=arguments or {}, allowed=WELL_KNOWN, warmup_steps=3
        )
        self.scaler = GradScaler("cpu", enabled=False)

    def step(self, index: int) -> None:
        x = torch.randn(8, self.size, generator=torch.Generator().manual_seed(index))
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()
        self.optimizer.step()

    def steps(self, first: int, end: int) -> Run:
        for index in range(first, end):
            self.step(index)
        return self

    def save(self, path: Path, progress: Progress, **extra: Mapping[str, Tensor]) -> None:
        save_state(path, self.network, self.optimizer, self.scaler, progress, **extra)

    def load(self, path: Path) -> tuple[Progress, dict[str, Tensor]]:
        return load_state(path, self.network, self.optimizer, self.scaler)

    def bits(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.network.parameters()]


def assert_same(a: Run, b: Run) -> None:
    for one, other in zip(a.bits(), b.bits(), strict=True):
        assert torch.equal(one, other)


def remembered(optimizer: Optimizer) -> tuple[Any, dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    return optimizer_state.pack(optimizer, tensors), tensors


def assert_remember_the_same(a: Run, b: Run) -> None:
    (values, tensors), (other_values, others) = remembered(a.optimizer), remembered(b.optimizer)
    assert values == other_values and tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype is others[name].dtype and torch.equal(tensor, others[name]), name


CASES: list[tuple[str, dict[str, Any], float | None]] = [
    *((name, {}, None) for name in OPTIMIZERS),
    ("AdamW", {"fused": False, "amsgrad": True}, 16.0),
    ("AdamWScheduleFree", {"weight_decay": 0.1, "r": 1.0}, 16.0),
    ("Prodigy", {"slice_p": 3, "weight_decay": 0.1, "growth_rate": 1.02}, None),
    ("Adafactor", {"relative_step": True, "warmup_init": True, "beta1": 0.9}, None),
    ("bitsandbytes.optim.PagedAdamW8bit", {}, None),
    ("bitsandbytes.optim.AdEMAMix8bit", {}, None),
    ("schedulefree.AdamWScheduleFreePaper", {}, None),
    ("torch.optim.NAdam", {}, 16.0),
    ("torch.optim.Rprop", {}, None),
    ("torch.optim.ASGD", {}, None),
]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(("name", "arguments", "ratio"), CASES)
def test_a_run_continues_with_the_same_bits(
    tmp_path: Path, name: str, arguments: dict[str, Any], ratio: float | None
) -> None:
    def run() -> Run:  # 4096 elements or more are quantized in 8 bits
        return Run(name, arguments, rank=64, size=72, ratio=ratio)

    straight = run().steps(0, 10)
    first, path, progress = run().steps(0, 5), tmp_path / "s.state", Progress(5, {"a": 1}, "data")
    with evaluating(first.optimizer):
        pass
    first.save(path, progress)
    second = run()
    assert second.load(path) == (progress, {})
    assert_remember_the_same(first, second)
    second.steps(5, 10)
    assert_same(straight, second)
    assert_remember_the_same(straight, second)
    # Saving did not change the run that was saved, either.
    assert_same(straight, first.steps(5, 10))


@pytest.mark.parametrize("saved_at", [0, 1, 4])
@pytest.mark.parametrize("name", ["AdamW", "AdamWScheduleFree", "Prodigy"])
def test_a_run_that_goes_back_repeats_itself(tmp_path: Path, name: str, saved_at: int) -> None:
    run, path = Run(name).steps(0, saved_at), tmp_path / "s.state"
    run.save(path, Progress(saved_at, {}, ""))
    run.steps(saved_at, 8)
    end = run.bits()
    run.load(path)
    run.steps(saved_at, 8)
    for a, b in zip(end, run.bits(), strict=True):
        assert torch.equal(a, b)


def test_the_learning_rate_is_not_that_of_the_file(tmp_path: Path) -> None:
    run, path = Run("AdamW", {"weight_decay": 0.5}, ratio=4.0).steps(0, 2), tmp_path / "s.state"
    run.save(path, Progress(2, {}, ""))
    other = Run("AdamW", {"weight_decay": 0.25}, ratio=4.0)
    for group in other.optimizer.param_groups:
        group["lr"] = 7.0
    other.load(path)
    for group in other.optimizer.param_groups:
        assert group["lr"] == 7.0 and group["weight_decay"] == 0.25 and group["fused"]
    assert [group["name"] for group in other.optimizer.param_groups] == ["down", "up"]


class KeepsEverything(SGD):
    """Has in its state and groups what plain optimizers have not, and depends on all of it."""

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.param_groups[0].setdefault("count", torch.zeros((), dtype=torch.int64)).add_(1)
        self.param_groups[0]["lowest"] = float("-inf")
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["coarse"] = torch.zeros_like(parameter, dtype=torch.bfloat16).t()
                state["exact"] = torch.zeros(3, dtype=torch.float64) + 1 / 3
                state["byte"] = torch.zeros(5, dtype=torch.uint8)
                state["flag"], state["nothing"], state["text"] = True, None, "two words"
                state["list"] = [1, (2.5, "x"), {"deep": torch.ones(2, dtype=torch.int16)}]
                state["by_number"] = {3: "three", "3": torch.zeros(0)}
                state["alias"] = state["exact"]
                state["part"] = state["exact"][1:]
            state["coarse"] += 0.1
            state["byte"] += 1
            state["list"][2]["deep"] += 1
            size = state["coarse"].t().float() + state["byte"].sum() * state["exact"].sum()
            parameter.data -= 0.001 * (size * len(state["text"])).to(parameter.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "own": ["kept", (1, 2)]}


def test_state_of_any_kind_is_kept_as_it_is(tmp_path: Path) -> None:
    def run() -> Run:
        made = Run()
        made.optimizer = KeepsEverything([{"params": list(made.network.parameters())}], lr=0.1)
        return made

    first, path = run().steps(0, 3), tmp_path / "s.state"
    first.save(path, Progress(3, {}, ""))
    second = run()
    second.load(path)
    assert_remember_the_same(first, second)
    parameter = next(second.network.parameters())
    state = second.optimizer.state[parameter]
    assert state["coarse"].dtype is torch.bfloat16 and state["exact"].dtype is torch.float64
    assert (state["flag"], state["nothing"], state["text"]) == (True, None, "two words")
    assert state["list"][:2] == [1, (2.5, "x")] and isinstance(state["list"][1], tuple)
    assert set(state["by_number"]) == {3, "3"}
    assert second.optimizer.param_groups[0]["lowest"] == float("-inf")
    assert_same(first.steps(3, 6), second.steps(3, 6))


def test_what_only_pickle_could_store_is_refused(tmp_path: Path) -> None:
    run = Run().steps(0, 1)
    run.optimizer.state[next(run.network.parameters())]["object"] = object()
    with pytest.raises(CheckpointError, match="state.0.object is a object, which cannot be stored"):
        run.save(tmp_path / "s.state", Progress(1, {}, ""))
    assert not (tmp_path / "s.state").exists()


def test_the_position_is_read_without_the_network(tmp_path: Path) -> None:
    run, path = Run().steps(0, 1), tmp_path / "s.safetensors"
    recipe = {"learning_rate": 1e-4, "betas": [0.9, 0.99]}
    progress = Progress(7, recipe, "x", {"guard": {"lowest": 0.1 + 0.2, "recent": [float("inf")]}})
    run.save(path, progress)
    assert read_progress(path) == progress


def test_extra_tensors_are_given_back_as_they_were(tmp_path: Path) -> None:
    run, path = Run().steps(0, 1), tmp_path / "s.state"
    extra = {
        "sums": torch.linspace(0, 1, 10, dtype=torch.float64),
        "counts": torch.arange(10),
        "holes.and.dots": torch.tensor([float("nan"), 1.0]),
    }
    run.save(path, Progress(1, {}, ""), extra_tensors=extra)
    _, loaded = Run().load(path)
    assert loaded.keys() == extra.keys()
    for name, tensor in extra.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_a_state_before_the_first_step_can_be_continued(tmp_path: Path) -> None:
    run, path = Run(), tmp_path / "s.safetensors"
    run.save(path, Progress(0, {}, ""))
    again = Run()
    again.load(path)
    again.step(0)
    run.step(0)
    assert_same(run, again)


def write_format_1(path: Path, run: Run) -> None:
    """As the first version of the engine wrote it."""
    tensors = {f"lora.{name}": each.detach() for name, each in run.network.named_tensors().items()}
    for index, entries in run.optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            tensors[f"optimizer.{index}.{key}"] = value
    header = {
        "format": "lora_loom_state_1",
        "step": 3,
        "recipe": {"rank": 2},
        "data": "data",
        "optimizer": {},
        "scaler": {},
    }
    save_file(tensors, path, {"lora_loom": json.dumps(header)})


def test_a_state_of_the_first_format_can_be_continued(tmp_path: Path) -> None:
    first, second, path = Run().steps(0, 3), Run(), tmp_path / "s.state"
    write_format_1(path, first)
    assert read_progress(path) == Progress(3, {"rank": 2}, "data", {})
    assert second.load(path) == (Progress(3, {"rank": 2}, "data", {}), {})
    assert_same(first.steps(3, 6), second.steps(3, 6))


def test_the_header_stays_readable(tmp_path: Path) -> None:
    run, path = Run("AdamWScheduleFree").steps(0, 2), tmp_path / "s.state"
    run.save(path, Progress(2, {}, ""))
    checkpoint = open_checkpoint(path)
    header = json.loads(checkpoint.metadata["lora_loom"])
    assert header["format"] == "lora_loom_state_2"
    assert header["optimizer_class"] == "AdamWScheduleFree"
    assert {"lora.a.0.A", "optimizer.state.0.z", "optimizer.state.3.exp_avg_sq"} <= set(
        checkpoint.entries
    )
    groups = dict(header["optimizer"]["dict"])["groups"]
    assert dict(groups[0]["dict"])["k"] == 2


def test_a_state_of_another_network_is_refused(tmp_path: Path) -> None:
    run, path = Run(rank=2), tmp_path / "s.safetensors"
    run.save(path, Progress(0, {}, ""))
    with pytest.raises(CheckpointError, match="another model or network"):
        Run(rank=3).load(path)


def test_a_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    run, path = Run("Lion").steps(0, 1), tmp_path / "s.state"
    run.save(path, Progress(1, {}, ""))
    with pytest.raises(CheckpointError, match="is of the optimizer Lion, not AdamW; set the"):
        Run("AdamW").load(path)


def test_a_state_of_other_groups_is_refused(tmp_path: Path) -> None:
    run, path = Run().steps(0, 1), tmp_path / "s.state"
    run.save(path, Progress(1, {}, ""))
    with pytest.raises(CheckpointError, match="1 groups of parameters, not 2"):
        Run(ratio=16.0).load(path)


@pytest.mark.parametrize("where", ["lora", "optimizer"])
def test_a_state_that_is_nan_is_not_written(tmp_path: Path, where: str) -> None:
    run, path = Run().steps(0, 1), tmp_path / "s.state"
    run.save(path, Progress(1, {}, ""))
    before, parameter = path.read_bytes(), next(run.network.parameters())
    broken = parameter.data if where == "lora" else run.optimizer.state[parameter]["exp_avg"]
    broken[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=f"{where}.* became NaN or infinite, so the state"):
        run.save(path, Progress(2, {}, ""))
    assert path.read_bytes() == before


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
