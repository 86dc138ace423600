"""Compared with what ComfyUI's own library made (comfy-kitchen 0.2.31, on a CPU)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pack.engine.microscaling import (
    NVFP4,
    from_nvfp4,
    mxfp8,
    nvfp4,
    powers_of_two,
    rotated,
    tiled,
    untiled,
)
from safetensors.torch import load_file
from torch import Tensor

FILE = load_file(Path(__file__).parents[1] / "data" / "comfyui_quantized.safetensors")


def weight() -> Tensor:
    """Rows of very different size, one of zeros, and a block of zeros."""
    return FILE["weight"].float()


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_mxfp8_is_that_of_comfyui_bit_for_bit() -> None:
    codes, exponents = mxfp8(weight())
    assert torch.equal(bits(codes), bits(FILE["mxfp8.codes"]))
    assert torch.equal(tiled(exponents), FILE["mxfp8.scale"])
    values = codes.float().unflatten(1, (-1, 32)) * powers_of_two(exponents).unsqueeze(-1)
    assert torch.equal(values.flatten(1)[:8], FILE["mxfp8.values"])


def test_nvfp4_is_that_of_comfyui_bit_for_bit() -> None:
    found = nvfp4(weight())
    assert torch.equal(found.codes, FILE["nvfp4.codes"])
    assert torch.equal(bits(found.block_scale), bits(FILE["nvfp4.block_scale"]))
    assert found.scale == FILE["nvfp4.scale"]
    stored = NVFP4(FILE["nvfp4.codes"], FILE["nvfp4.block_scale"], FILE["nvfp4.scale"])
    assert torch.equal(from_nvfp4(stored)[:8], FILE["nvfp4.values"])


def test_rotated_codes_are_turned_back_as_comfyui_does() -> None:
    values = FILE["convrot.codes"].float() * FILE["convrot.scale"]
    torch.testing.assert_close(rotated(values, 16)[:8], FILE["convrot.values"])


@pytest.mark.parametrize("size", [4, 16, 64])
def test_a_rotation_is_its_own_inverse_and_keeps_lengths(size: int) -> None:
    values = torch.randn(5, 192, generator=torch.Generator().manual_seed(0))
    turned = rotated(values, size)
    torch.testing.assert_close(turned.norm(dim=1), values.norm(dim=1))
    torch.testing.assert_close(rotated(turned, size), values)


def test_a_rotation_has_a_power_of_four_as_its_size() -> None:
    with pytest.raises(ValueError, match="power of 4"):
        rotated(torch.ones(1, 32), 32)


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (129, 5), (300, 7)])
def test_tiles_hold_every_scale_and_zeros(shape: tuple[int, int]) -> None:
    scales = torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(0)).byte()
    stored = tiled(scales)
    assert stored.shape[0] % 128 == 0 and stored.shape[1] % 4 == 0
    assert torch.equal(untiled(stored, *shape), scales)
    assert int(stored.ne(0).sum()) == scales.numel()
    # Row r, column c of a tile lies at 16 (r mod 32) + 4 (r div 32) + c.
    row, column = shape[0] - 1, shape[1] - 1
    tile = (row // 128) * (stored.shape[1] // 4) + column // 4
    place = 512 * tile + 16 * (row % 32) + 4 * (row % 128 // 32) + column % 4
    assert stored.flatten()[place] == scales[row, column]


def test_powers_of_two_are_exact_down_to_the_smallest() -> None:
    codes = torch.tensor([0, 1, 127, 128, 254, 255], dtype=torch.uint8)
    values = powers_of_two(codes)
    assert values[:5].tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0, 2.0**127]
    assert values[5].isnan()


def test_no_value_of_mxfp8_is_clipped_and_none_wastes_a_power_of_two() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * 1e-3
    weight[0, 0], weight[1, 0] = 448 * 2.0**-20, 448 * 2.0**-20 * (1 + 2**-23)
    codes, exponents = mxfp8(weight)
    amax = weight.unflatten(1, (-1, 32)).abs().amax(-1)
    scale = powers_of_two(exponents)
    assert (amax <= 448 * scale).all() and (amax > 448 * scale / 2).all()
    assert codes.float().isfinite().all()


def test_nearest_levels_of_four_bits_are_found_with_ties_to_even() -> None:
    # The largest is 6 with a scale of 1, so that values are what they are divided by.
    middles = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    row = torch.tensor([*middles, *(-value for value in middles), 6.0, 0.0])
    # 448 x 6 in another block makes the scale of the tensor 1.
    top = torch.zeros(16)
    top[0] = 448.0 * 6
    found = from_nvfp4(nvfp4(torch.stack([row, top])))
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert found[0].tolist() == [*expected, *(-value for value in expected), 6.0, 0.0]
