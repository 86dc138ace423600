from __future__ import annotations

from pathlib import Path

import pytest
from pack.engine.errors import DataError
from pack.engine.manifest import scan_folder
from PIL import Image


def add(folder: Path, name: str, caption: str | None = "a thing") -> Path:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (20, 10)).save(folder / name)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption, "utf-8")
    return folder / name


def test_images_come_sorted_with_their_captions(tmp_path: Path) -> None:
    add(tmp_path, "b.png", "\ufeff  second \n")
    add(tmp_path, "a.PNG", "first, naïve")
    (tmp_path / "notes.md").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not seen")
    samples = scan_folder(tmp_path)
    assert [(s.image.name, s.caption, s.size) for s in samples] == [
        ("a.PNG", "first, naïve", (20, 10)),
        ("b.png", "second", (20, 10)),
    ]


def test_control_images_are_found_by_name_in_numeric_order(tmp_path: Path) -> None:
    for name in ("cat.png", "cat_2.png"):
        add(tmp_path / "images", name)
    for name in ("cat.jpg", "cat_10.png", "cat_2.png", "cat_2_1.png", "catalog.png"):
        add(tmp_path / "control", name, None)
    samples = scan_folder(tmp_path / "images", control_directory=tmp_path / "control")
    assert [[path.name for path in sample.controls] for sample in samples] == [
        ["cat.jpg", "cat_2.png", "cat_10.png"],
        ["cat_2.png", "cat_2_1.png"],
    ]


def test_everything_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    add(tmp_path, "good.png")
    add(tmp_path, "no_caption.png", None)
    add(tmp_path, "empty.png", " \n")
    add(tmp_path, "latin.png").with_suffix(".txt").write_bytes("naïve".encode("latin-1"))
    add(tmp_path, "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        scan_folder(tmp_path)
    message = str(caught.value)
    assert "4 of 5 images cannot be used" in message
    for part in (
        "no_caption.png: the caption no_caption.txt is missing",
        "empty.txt: the caption is empty",
        "latin.txt: the caption is not UTF-8",
        "broken.png: this is not an image",
    ):
        assert part in message


def test_a_long_list_of_problems_is_cut(tmp_path: Path) -> None:
    for number in range(25):
        add(tmp_path, f"{number}.png", None)
    with pytest.raises(DataError, match="and 5 more"):
        scan_folder(tmp_path)


def test_a_missing_control_image_is_named(tmp_path: Path) -> None:
    add(tmp_path / "images", "cat.png")
    add(tmp_path / "control", "dog.png", None)
    with pytest.raises(DataError, match=r"cat\.png: there is no control image"):
        scan_folder(tmp_path / "images", control_directory=tmp_path / "control")


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        scan_folder(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        scan_folder(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image in the folder"):
        scan_folder(tmp_path / "empty")


def test_masks_are_found_by_name_and_may_be_missing(tmp_path: Path) -> None:
    for name in ("cat.png", "dog.jpg", "cat.jpg"):
        add(tmp_path / "images", name)
    add(tmp_path / "masks", "cat.webp", None)
    add(tmp_path / "masks", "other.png", None)
    samples = scan_folder(tmp_path / "images", mask_directory=tmp_path / "masks")
    mask = tmp_path / "masks" / "cat.webp"
    assert [sample.mask for sample in samples] == [mask, mask, None]
    assert [sample.mask for sample in scan_folder(tmp_path / "images")] == [None] * 3


def test_the_opacity_of_an_image_is_its_mask_if_it_has_any(tmp_path: Path) -> None:
    add(tmp_path, "a.png")
    b = add(tmp_path, "b.png")
    Image.new("RGBA", (20, 10)).save(b)
    assert [sample.mask for sample in scan_folder(tmp_path, alpha_mask=True)] == [None, b]
    assert [sample.mask for sample in scan_folder(tmp_path)] == [None, None]


@pytest.mark.parametrize(
    ("size", "fits"),
    [((20, 10), True), ((7, 3), True), ((2000, 1001), True), ((10, 10), False), ((10, 20), False)],
)
def test_a_mask_must_have_the_shape_of_its_image(
    tmp_path: Path, size: tuple[int, int], *, fits: bool
) -> None:
    add(tmp_path / "images", "cat.png")
    mask = add(tmp_path / "masks", "cat.png", None)
    Image.new("L", size).save(mask)
    if fits:
        assert scan_folder(tmp_path / "images", mask_directory=mask.parent)[0].mask == mask
    else:
        with pytest.raises(DataError, match=rf"cat\.png is {size[0]}x{size[1]} pixels and the im"):
            scan_folder(tmp_path / "images", mask_directory=mask.parent)


def test_two_masks_of_one_name_are_refused(tmp_path: Path) -> None:
    add(tmp_path / "images", "cat.png")
    for name in ("cat.png", "cat.webp"):
        add(tmp_path / "masks", name, None)
    with pytest.raises(DataError, match=r"several masks, cat\.png and cat\.webp; remove"):
        scan_folder(tmp_path / "images", mask_directory=tmp_path / "masks")


def test_a_message_names_the_setting_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="regularization_directory = .*does not exist"):
        scan_folder(tmp_path / "nothing", setting="regularization_directory")
