from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pack.engine.errors import DataError
from pack.tests.nodes.stand_ins import FolderPaths
from PIL import Image


@pytest.fixture
def node(load: Callable[[str], Any], comfyui: FolderPaths) -> Any:
    return load("dataset").DatasetFromFolder


@pytest.fixture
def cats(comfyui: FolderPaths) -> Path:
    """Three pictures with captions of 1 to 3 words."""
    folder = comfyui.base / "input/cats"
    folder.mkdir()
    for index in range(1, 4):
        Image.new("RGB", (40 * index, 50)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("cat " * index)
    return folder


def widgets(node: Any, **changes: Any) -> dict[str, Any]:
    """The values of a new node."""
    made = [made for made in node.define_schema().inputs if "default" in made.options]
    return {**{made.id: made.options["default"] for made in made}, **changes}


def fingerprint(node: Any, control_folder: str = "none") -> str:
    return node.fingerprint_inputs(folder="input/cats", control_folder=control_folder)


def test_a_folder_becomes_settings_a_sheet_and_a_report(node: Any, cats: Path) -> None:
    values = widgets(node, batch_size=2, num_repeats=3, resolution=64)
    settings, sheet, report = node.execute("input/cats", "none", **values).values
    assert settings["image_directory"] == cats and settings["control_directory"] is None
    assert (settings["resolution"], settings["batch_size"]) == ((64, 64), 2)
    assert sheet.shape[0] == 1 and sheet.shape[-1] == 3
    assert report.splitlines() == [
        "3 images with captions, 0 with control images",
        "40-120 pixels wide, 50-50 high",
        "captions of 1 to 3 words",
        "about 5 batches of 2 an epoch",
    ]


def test_control_pictures_are_found_by_their_names(
    node: Any, cats: Path, comfyui: FolderPaths
) -> None:
    control = comfyui.base / "datasets/control"
    control.mkdir()
    for index in range(1, 4):
        Image.new("RGB", (40, 40)).save(control / f"{index}.png")
    settings, _, report = node.execute("input/cats", "datasets/control", **widgets(node)).values
    assert settings["control_directory"] == control
    assert report.startswith("3 images with captions, 3 with control images")


def test_masks_and_regularization_images_are_counted(
    node: Any, cats: Path, comfyui: FolderPaths
) -> None:
    masks, others = comfyui.base / "datasets/masks", comfyui.base / "input/others"
    for folder in (masks, others):
        folder.mkdir()
    Image.new("L", (40, 50)).save(masks / "1.png")
    for index in range(5):
        Image.new("RGB", (40, 50)).save(others / f"{index}.png")
        (others / f"{index}.txt").write_text("a dog")
    values = widgets(node, batch_size=2)
    values |= {"mask_folder": "datasets/masks", "regularization_folder": "input/others"}
    settings, _, report = node.execute("input/cats", "none", **values).values
    assert settings["mask_directory"] == masks
    assert settings["regularization_directory"] == others
    assert report.splitlines()[0] == "3 images with captions, 0 with control images, 1 with masks"
    assert report.splitlines()[-2:] == [
        "5 regularization images",
        "about 5 batches of 2 an epoch",  # 2 and, apart from these, 3
    ]


def test_the_opacity_of_pictures_can_be_their_mask(node: Any, cats: Path) -> None:
    Image.new("RGBA", (40, 50), (255, 0, 0, 128)).save(cats / "1.png")
    settings, _, report = node.execute(
        "input/cats", "none", **widgets(node, alpha_mask=True)
    ).values
    assert settings["alpha_mask"] is True and ", 1 with masks" in report


def test_a_prompt_from_before_there_were_masks_runs(node: Any, cats: Path) -> None:
    later = ("mask_folder", "alpha_mask", "regularization_folder")
    values = {name: value for name, value in widgets(node).items() if name not in later}
    settings, _, _ = node.execute("input/cats", "none", **values).values
    assert settings["mask_directory"] is settings["regularization_directory"] is None


def test_a_folder_elsewhere_is_refused_before_anything_runs(node: Any, cats: Path) -> None:
    assert node.validate_inputs(folder="input/cats") is True
    assert node.validate_inputs(folder=str(cats)) is True  # though it is not in the list
    assert node.validate_inputs(folder=None) is True  # linked, and so not known yet
    sentence = node.validate_inputs(folder="/etc")
    assert sentence.startswith("folder '/etc': datasets are read from ")


@pytest.mark.parametrize("folders", [("/etc", "none"), ("input/cats", "input/../output")])
def test_a_folder_elsewhere_that_came_by_a_link_is_refused(
    node: Any, cats: Path, folders: tuple[str, str]
) -> None:
    with pytest.raises(DataError, match="^folder .*: datasets are read from "):
        node.execute(*folders, **widgets(node))


def test_a_folder_that_stays_as_it_is_is_not_read_again(node: Any, cats: Path) -> None:
    assert fingerprint(node) == fingerprint(node)
    (cats / ".loom_cache").mkdir()
    before = fingerprint(node)
    (cats / ".loom_cache/1.safetensors").touch()
    assert fingerprint(node) == before


@pytest.mark.parametrize("change", ["add", "remove", "edit", "touch", "caption", "cache"])
def test_a_folder_that_changed_is_read_again(node: Any, cats: Path, change: str) -> None:
    (cats / ".loom_cache").mkdir()
    before = fingerprint(node)
    match change:
        case "add":
            (cats / "4.png").touch()
        case "remove":
            (cats / "3.png").unlink()
        case "edit":
            Image.new("RGB", (7, 7), "red").save(cats / "3.png")
        case "touch":
            os.utime(cats / "3.png", ns=(1, 1))
        case "caption":
            (cats / "3.txt").write_text("a dog")
        case "cache":
            (cats / ".loom_cache").rmdir()
    assert fingerprint(node) != before


def test_control_pictures_that_changed_are_read_again(
    node: Any, cats: Path, comfyui: FolderPaths
) -> None:
    control = comfyui.base / "datasets/control"
    control.mkdir()
    before = fingerprint(node, "datasets/control")
    (control / "1.png").touch()
    assert fingerprint(node, "datasets/control") != before


@pytest.mark.parametrize("name", ["mask_folder", "regularization_folder"])
def test_other_pictures_that_changed_are_read_again(
    node: Any, cats: Path, comfyui: FolderPaths, name: str
) -> None:
    folder = comfyui.base / "datasets/more"
    folder.mkdir()
    read = {"folder": "input/cats", name: "datasets/more"}
    before = node.fingerprint_inputs(**read)
    (folder / "1.png").touch()
    assert node.fingerprint_inputs(**read) != before


def test_a_folder_that_is_gone_has_a_fingerprint_too(node: Any) -> None:
    assert "does not exist" in fingerprint(node)
