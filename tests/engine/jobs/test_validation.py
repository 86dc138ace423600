from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pack.engine import flow, seeds
from pack.engine.dataset import CachedItem, load_item, read_item
from pack.engine.events import Event, Message, Progress
from pack.engine.jobs.validation import Validator
from pack.engine.validation_history import read_validation
from pack.engine.weights import save_tensors
from pack.tests.engine.jobs import tiny
from torch import Tensor, nn

SHAPES = [(16, 1, 4, 6), (16, 1, 6, 4), (16, 1, 4, 6)]


class Knowing(nn.Module):
    """Knows the image, so that its velocity is the true one plus ``offset`` (and dropout)."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(0.0))
        self.dropout = nn.Dropout(0.5)

    def forward(self, noisy: Tensor, t_B: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        velocity = (noisy - conditions["text_embeds"]) / t_B[:, None, None, None, None]
        return velocity + self.dropout(self.offset.expand_as(noisy))


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[CachedItem]:
    """Three images in two shapes, whose text tells what is in the image."""
    folder = tmp_path_factory.mktemp("cache")
    found: list[CachedItem] = []
    for index, shape in enumerate(SHAPES):
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(index))
        paths = folder / f"{index}.safetensors", folder / f"{index}_text.safetensors"
        for path, name in zip(paths, ("latents", "text_embeds"), strict=True):
            save_tensors(path, {name: latents}, {})
        found.append(read_item(*paths, f"content {index}", repeats=1))
    return found


class Measured:
    """A validator of a model that knows the images, and what it reported."""

    def __init__(
        self,
        items: Sequence[CachedItem],
        path: Path,
        saved: dict[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        self.model = Knowing().train()
        self.events: list[Event] = []
        config = tiny.config(changes)
        self.validator = Validator(
            config, self.model, items, path / "v.jsonl", self.events.append, saved or {}
        )

    def measure(self, step: int, *, loss: float) -> float:
        """With a model whose loss is this at every time."""
        with torch.no_grad():
            self.model.offset.fill_(math.sqrt(loss) if loss >= 0 else loss)
        return self.validator.measure(step)


def test_a_model_that_predicts_perfectly_has_no_loss(
    items: list[CachedItem], tmp_path: Path
) -> None:
    # Velocities are up to 10; dividing the rounding of their sum, 2**-23 of it, by t = 1/8.
    assert Measured(items, tmp_path).measure(1, loss=0) < (10 * 2**-23 * 8) ** 2


def test_the_loss_is_the_mean_over_images_at_the_middles_of_the_range(
    items: list[CachedItem], tmp_path: Path
) -> None:
    """Written out for a model that always says the same."""

    class Constant(Knowing):
        def forward(self, noisy: Tensor, t_B: Tensor, conditions: dict[str, Tensor]) -> Tensor:
            assert torch.equal(conditions["guidance"], torch.tensor([3.0]))
            return (torch.full_like(noisy, 0.25) * t_B) + self.offset

    config = tiny.config(
        validation_times=2, min_timestep=200, max_timestep=600, guidance_scale=3.0, seed=9
    )
    path = tmp_path / "v.jsonl"
    validator = Validator(config, Constant(), items, path, lambda event: None)
    loss = validator.measure(5)

    expected: dict[float, list[float]] = {0.3: [], 0.5: []}
    for index, shape in enumerate(SHAPES):
        latents = load_item(items[index])["latents"][None]
        for t, losses in expected.items():
            seed = seeds.derive(9, f"validation noise content {index}")
            noise = torch.randn((1, *shape), generator=seeds.generator(seed, f"held-out {t}"))
            target = flow.velocity_target(latents, noise)
            losses.append((0.25 * t - target).square().mean().item())
    means = [sum(losses) / 3 for losses in expected.values()]
    [measurement] = read_validation(path)
    assert measurement.step == 5 and measurement.times == pytest.approx((0.3, 0.5))
    assert measurement.losses == pytest.approx(means, rel=1e-5)
    assert loss == measurement.loss == pytest.approx(sum(means) / 2, rel=1e-5)


def test_the_same_model_has_the_same_loss_whenever_and_beside_whatever(
    items: list[CachedItem], tmp_path: Path
) -> None:
    all_images = Measured(items, tmp_path / "all")
    torch.manual_seed(1)
    first = all_images.measure(10, loss=0.5)
    torch.manual_seed(2)
    assert all_images.measure(20, loss=0.5) == first
    again = Measured(items, tmp_path / "again", batch_size=2)
    assert again.measure(10, loss=0.5) == first
    # With only rounding as its loss, every image shows its own noise.
    alone = [
        Measured([item], tmp_path / item.content).measure(1, loss=0) for item in reversed(items)
    ]
    assert all_images.measure(30, loss=0) == pytest.approx(sum(alone) / 3, rel=1e-12)
    assert len({*alone}) == 3


def test_nothing_is_dropped_and_the_training_goes_on_as_before(
    items: list[CachedItem], tmp_path: Path
) -> None:
    measured = Measured(items, tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert measured.measure(1, loss=0.25) == pytest.approx(0.25, rel=1e-4)
    assert torch.equal(torch.rand(3), expected)
    assert measured.model.training and measured.model.dropout.training
    assert measured.model.offset.grad is None


@pytest.mark.parametrize(
    ("settings", "due"), [({}, {3, 6}), ({"validate_every_n_steps": 2}, {2, 4, 6})]
)
def test_it_is_due_after_epochs_or_steps_and_never_twice(
    items: list[CachedItem], tmp_path: Path, settings: dict[str, Any], due: set[int]
) -> None:
    measured = Measured(items, tmp_path, **settings)
    found: set[int] = set()
    for step in range(7):
        # An epoch has three steps; step 0 ends "epoch 0".
        ended = range(step // 3, step // 3 + (step % 3 == 0))
        if measured.validator.due(step, ended):
            found.add(step)
            measured.measure(step, loss=0.1)
            assert not measured.validator.due(step, ended)
    assert found == due


LOSSES = st.lists(
    st.one_of(st.integers(1, 6).map(lambda tenths: tenths / 10), st.just(-math.inf)),
    min_size=1,
    max_size=8,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(LOSSES, st.integers(1, 4), st.integers(0, 8))
def test_best_and_stop_are_those_of_a_list_of_all_losses_also_in_a_run_that_continues(
    items: list[CachedItem],
    tmp_path_factory: pytest.TempPathFactory,
    losses: list[float],
    patience: int,
    interrupted: int,
) -> None:
    folder = tmp_path_factory.mktemp("run")
    config = {"early_stop_patience": patience, "validation_times": 1}
    run = Measured(items[:1], folder, **config)
    seen: list[float] = []
    for number, loss in enumerate(losses, start=1):
        if number == interrupted:
            saved = json.loads(json.dumps(run.validator.state()))
            run.measure(number * 10, loss=0.01)  # is lost
            run = Measured(items[:1], folder, saved, **config)
        seen.append(run.measure(number * 10, loss=loss))
        finite = [value for value in seen if math.isfinite(value)]
        best = seen.index(min(finite)) if finite else None
        behind = len(seen) - 1 - best if best is not None else len(seen)
        validator = run.validator
        assert validator.best_step == (None if best is None else (best + 1) * 10)
        assert validator.is_best == (behind == 0)
        assert validator.should_stop == (behind >= patience)
        assert validator.last_step == number * 10
    written = read_validation(folder / "v.jsonl")
    assert [each.step for each in written] == [10 * (index + 1) for index in range(len(losses))]


def test_going_back_to_the_beginning_forgets_everything(
    items: list[CachedItem], tmp_path: Path
) -> None:
    measured = Measured(items, tmp_path, early_stop_patience=1)
    for step, loss in ((1, 0.1), (2, 0.2)):
        measured.measure(step, loss=loss)
    assert measured.validator.should_stop
    measured.validator.restore({})
    assert measured.validator.state() == Measured(items, tmp_path).validator.state()
    assert not measured.validator.should_stop and not measured.validator.is_best
    assert read_validation(tmp_path / "v.jsonl") == []


def test_the_loss_and_the_lowest_are_told(items: list[CachedItem], tmp_path: Path) -> None:
    measured = Measured(items, tmp_path)
    for step, loss in ((1, 0.5), (2, 0.25), (3, 0.75), (4, -math.inf)):
        measured.measure(step, loss=loss)
    messages = [event for event in measured.events if isinstance(event, Message)]
    assert [message.text for message in messages] == [
        "validation loss after step 1: 0.5, the lowest so far",
        "validation loss after step 2: 0.25, the lowest so far",
        "validation loss after step 3: 0.75, the lowest was 0.25 after step 2",
        "the validation loss after step 4 is inf",
    ]
    assert [message.level for message in messages] == ["info", "info", "info", "warning"]
    done = [event.done for event in measured.events if isinstance(event, Progress)]
    assert done == [1, 2, 3] * 4


def test_masks_and_the_kind_of_loss_are_those_of_the_training(tmp_path: Path) -> None:
    latents = torch.zeros(16, 1, 4, 6)
    mask = torch.zeros(1, 1, 4, 6)
    mask[..., :3] = 1
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_tensors(paths[0], {"latents": latents, "mask": mask}, {})
    save_tensors(paths[1], {"text_embeds": latents}, {})
    item = read_item(*paths, "content", repeats=1)

    class HalfRight(Knowing):
        """Wrong by 2 where the mask is black."""

        def forward(self, noisy: Tensor, t_B: Tensor, conditions: dict[str, Tensor]) -> Tensor:
            assert set(conditions) == {"text_embeds", "guidance"}
            return super().forward(noisy, t_B, conditions) + 2 * (1 - mask) + 0 * self.offset

    def loss(**changes: Any) -> float:
        config = tiny.config(changes)
        path = tmp_path / "v.jsonl"
        return Validator(config, HalfRight(), [item], path, lambda event: None).measure(1)

    assert loss() == pytest.approx(0, abs=1e-9)
    # Weights 1 and 1/2: a third of all counts where the error is 2.
    assert loss(unmasked_weight=0.5) == pytest.approx(4 / 3, rel=1e-5)
    assert loss(unmasked_weight=0.5, loss_type="l1") == pytest.approx(2 / 3, rel=1e-5)
