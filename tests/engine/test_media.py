from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pack.engine.errors import DataError
from pack.engine.media import (
    has_opacity,
    image_size,
    load_image,
    load_mask,
    load_opacity,
    mask_tensor,
    resize_to_bucket,
    to_image,
    to_tensor,
)
from PIL import Image


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((6, 8), 40000, dtype=np.uint16))
    else:
        image = noise(8, 6).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    loaded = load_image(path)
    assert loaded.mode == "RGB" and loaded.size == (8, 6)
    if mode == "I;16":
        assert loaded.getpixel((0, 0)) == (156, 156, 156)  # 40000 / 256


def test_transparent_parts_become_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((1, 1)) == (255, 255, 255)


def test_the_camera_s_orientation_is_honoured(tmp_path: Path) -> None:
    image = noise(8, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    assert image_size(tmp_path / "a.png") == (4, 8)
    loaded = load_image(tmp_path / "a.png")
    assert np.array_equal(np.asarray(loaded), np.rot90(np.asarray(image), k=-1))


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for read in (load_image, image_size):
        with pytest.raises(DataError, match=r"a\.png"):
            read(path)


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    noise(64, 64).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="damaged"):
        load_image(tmp_path / "a.png")


def test_resizing_covers_the_bucket_and_keeps_the_middle() -> None:
    image = Image.new("RGB", (100, 50), "black")
    image.paste("white", (25, 0, 75, 50))
    cut = resize_to_bucket(image, (32, 32))
    assert cut.size == (32, 32)
    assert np.asarray(cut).min() > 200
    assert resize_to_bucket(image, (100, 50)) is image


@pytest.mark.parametrize("size", [(16, 64), (64, 16), (33, 47), (200, 200)])
def test_any_image_fits_any_bucket(size: tuple[int, int]) -> None:
    assert resize_to_bucket(noise(57, 31), size).size == size


def test_pixels_survive_the_way_to_a_tensor_and_back() -> None:
    image = noise(5, 3)
    tensor = to_tensor(image)
    assert tensor.shape == (3, 3, 5) and tensor.min() >= -1 and tensor.max() <= 1
    assert np.array_equal(np.asarray(to_image(tensor)), np.asarray(image))
    assert to_image(torch.full((3, 1, 1), 9.0)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "I;16", "LA", "RGBA"])
def test_a_mask_of_every_mode_is_black_and_white(tmp_path: Path, mode: str) -> None:
    left_white = np.zeros((6, 8), dtype=np.uint8)
    left_white[:, :4] = 255
    image = Image.fromarray(left_white)
    if mode == "I;16":
        image = Image.fromarray(left_white.astype(np.uint16) * 257)
    elif mode in ("LA", "RGBA"):
        # White all over, but transparent on the right.
        opacity, image = image, Image.new("L", (8, 6), "white").convert(mode)
        image.putalpha(opacity)
    else:
        image = image.convert(mode)
    image.save(tmp_path / "a.png")
    mask = load_mask(tmp_path / "a.png")
    assert mask.mode == "L" and np.array_equal(np.asarray(mask), left_white)


def test_the_opacity_of_a_picture_is_told_apart_from_none(tmp_path: Path) -> None:
    opacity = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))
    for mode in ("RGBA", "LA"):
        image = noise(8, 6).convert(mode)
        image.putalpha(opacity)
        image.save(tmp_path / "a.png")
        assert has_opacity(tmp_path / "a.png")
        assert np.array_equal(np.asarray(load_opacity(tmp_path / "a.png")), np.asarray(opacity))
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8)).convert("P")
    palette.save(tmp_path / "p.png", transparency=0)
    assert has_opacity(tmp_path / "p.png")
    assert np.asarray(load_opacity(tmp_path / "p.png")).tolist() == [[0, 255], [255, 0]]
    noise(8, 6).save(tmp_path / "plain.png")
    assert not has_opacity(tmp_path / "plain.png")
    assert (np.asarray(load_opacity(tmp_path / "plain.png")) == 255).all()


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (48, 96), (40, 30)])
@pytest.mark.parametrize("mask_scale", [1, 2])
def test_a_mask_covers_the_same_place_as_its_image(size: tuple[int, int], mask_scale: int) -> None:
    """A white shape in an image is found where the mask says, after both were cut."""
    shape = np.zeros((100, 120), dtype=np.uint8)
    shape[20:70, 30:110] = 255
    image = Image.fromarray(shape).convert("RGB")
    mask = Image.fromarray(shape.repeat(mask_scale, 0).repeat(mask_scale, 1))
    found = mask_tensor(mask, image.size, size)
    expected = (to_tensor(resize_to_bucket(image, size))[:1] + 1) / 2
    assert found.shape == (1, size[1], size[0]) and found.min() >= 0 and found.max() <= 1
    # The filters differ in the two or three pixels beside an edge only.
    off = (found - expected).abs()
    assert ((off > 0.5).float().mean() < 0.001) and off.mean() < 0.02


def test_a_white_mask_stays_white() -> None:
    white = Image.new("L", (123, 77), "white")
    for size in ((64, 64), (256, 16), (123, 77)):
        assert (mask_tensor(white, (123, 77), size) == 1).all()
        assert (mask_tensor(white, (246, 154), size) == 1).all()
