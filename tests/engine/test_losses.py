from __future__ import annotations

import math

import pytest
import torch
from pack.engine.losses import MEASURES, mask_weight, sample_means
from torch import Tensor, nn

SHAPES = [(3, 4, 5, 6), (3, 4, 2, 5, 6)]  # images and videos, or images with T = 1


def pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("c", [0.1, 1.0, 3.0])
def test_the_measures_are_the_published_formulas(c: float) -> None:
    prediction, target = pair((200,))
    for index, (a, b) in enumerate(zip(prediction.tolist(), target.tolist(), strict=True)):
        d = abs(a - b)
        huber = d * d / 2 if d <= c else c * (d - c / 2)
        expected = {"mse": d * d, "l1": d, "huber": huber, "smooth_l1": huber / c}
        for name, measure in MEASURES.items():
            found = measure(prediction, target, c)[index].item()
            # Four roundings in float32, on values of which no two large ones are subtracted.
            assert found == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MEASURES)
def test_the_mean_over_samples_is_pytorch_s_own_loss(name: str, shape: tuple[int, ...]) -> None:
    prediction, target = pair(shape)
    own = {
        "mse": nn.MSELoss(),
        "l1": nn.L1Loss(),
        "huber": nn.HuberLoss(delta=0.3),
        "smooth_l1": nn.SmoothL1Loss(beta=0.3),
    }
    means = sample_means(MEASURES[name](prediction, target, 0.3))
    assert means.shape == shape[:1]
    torch.testing.assert_close(means.mean(), own[name](prediction, target))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_masked_mean_is_that_of_slow_loops(shape: tuple[int, ...]) -> None:
    prediction, target = pair(shape)
    errors = MEASURES["mse"](prediction, target, 1.0)
    mask = torch.rand(shape[0], 1, *shape[2:], generator=torch.Generator().manual_seed(1))
    weight = mask_weight(mask, unmasked=0.2)
    found = sample_means(errors, weight)
    for sample in range(shape[0]):
        total = counted = 0.0
        places = mask[sample, 0].flatten().tolist()
        for channel in errors[sample].flatten(1).tolist():
            for error, masked_in in zip(channel, places, strict=True):
                total += error * (0.2 + 0.8 * masked_in)
                counted += 0.2 + 0.8 * masked_in
        assert found[sample].item() == pytest.approx(total / counted, rel=1e-5)


def test_a_white_mask_is_no_mask_bit_for_bit() -> None:
    errors = MEASURES["mse"](*pair((3, 4, 1, 5, 7)), 1.0)
    for unmasked in (0.0, 0.3, 1.0):
        weight = mask_weight(torch.ones(3, 1, 1, 5, 7), unmasked=unmasked)
        assert torch.equal(sample_means(errors, weight), sample_means(errors))


def test_an_unmasked_weight_of_one_ignores_the_mask() -> None:
    errors = MEASURES["mse"](*pair((3, 4, 1, 5, 7)), 1.0)
    mask = torch.rand(3, 1, 1, 5, 7)
    assert torch.equal(sample_means(errors, mask_weight(mask, unmasked=1.0)), sample_means(errors))


def test_a_sample_that_is_masked_out_has_neither_loss_nor_gradient() -> None:
    prediction, target = pair((2, 4, 1, 5, 7))
    prediction.requires_grad_()
    mask = torch.ones(2, 1, 1, 5, 7)
    mask[0] = 0
    errors = MEASURES["mse"](prediction, target, 1.0)
    means = sample_means(errors, mask_weight(mask, unmasked=0.0))
    means.sum().backward()
    assert means[0] == 0 and means[1] > 0
    assert prediction.grad is not None
    assert (prediction.grad[0] == 0).all() and prediction.grad.isfinite().all()


def test_the_size_of_what_is_masked_in_does_not_weigh_a_sample() -> None:
    """The same error everywhere has the same mean under every mask."""
    errors = torch.full((4, 2, 1, 8, 8), 0.7)
    mask = torch.zeros(4, 1, 1, 8, 8)
    for sample, side in enumerate((1, 2, 5, 8)):
        mask[sample, ..., :side, :side] = 1
    means = sample_means(errors, mask_weight(mask, unmasked=0.0))
    assert means.tolist() == pytest.approx([0.7] * 4, rel=1e-6)
    assert math.isclose(sum(means.tolist()), 2.8, rel_tol=1e-6)
