from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pack.engine.errors import DataError
from pack.engine.media import image_size, load_image, resize_to_bucket, to_image, to_tensor
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
