from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pack.engine.errors import DataError
from pack.tests.nodes.stand_ins import FolderPaths


@pytest.fixture
def paths(load: Callable[[str], Any], comfyui: FolderPaths) -> Any:
    return load("paths")


def images(folder: Path) -> Path:
    """The folder with a picture in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "1.PNG").touch()
    return folder


def add_datasets(comfyui: FolderPaths, folder: Path) -> Path:
    """Make the folder one more that ComfyUI calls "datasets"."""
    folder.mkdir(exist_ok=True)
    comfyui.folder_names_and_paths["datasets"][0].append(str(folder))
    return folder


def without_datasets(comfyui: FolderPaths) -> None:
    """As ComfyUI was before 0.30."""
    del comfyui.folder_names_and_paths["datasets"]


# Lists of datasets


def test_folders_with_images_are_listed_below_the_names_of_their_roots(
    paths: Any, comfyui: FolderPaths
) -> None:
    images(comfyui.base / "input/dogs")
    images(comfyui.base / "input/cats/black/small")
    images(comfyui.base / "datasets/cats")
    assert paths.dataset_folders() == ["datasets/cats", "input/cats/black/small", "input/dogs"]


def test_folders_without_images_and_hidden_ones_are_not_listed(
    paths: Any, comfyui: FolderPaths
) -> None:
    images(comfyui.base / "input/.cache")
    images(comfyui.base / "input/cats/.loom_cache")
    (comfyui.base / "input/texts").mkdir()
    (comfyui.base / "input/texts/1.txt").touch()
    images(comfyui.base / "input")  # where ComfyUI puts uploads; nobody's dataset
    assert paths.dataset_folders() == []


def test_the_search_for_images_ends_four_folders_down(paths: Any, comfyui: FolderPaths) -> None:
    images(comfyui.base / "input/1/2/3/4")
    images(comfyui.base / "input/1/2/3/4/5")
    (comfyui.base / "input/1/again").symlink_to(comfyui.base / "input", target_is_directory=True)
    listed = paths.dataset_folders()
    assert "input/1/2/3/4" in listed
    assert max(name.count("/") for name in listed) == 4


def test_links_that_lead_out_are_not_listed(paths: Any, comfyui: FolderPaths) -> None:
    images(comfyui.base / "output/secret")
    images(comfyui.base / "datasets/cats")
    (comfyui.base / "input/out").symlink_to(comfyui.base / "output/secret")
    (comfyui.base / "datasets/same").symlink_to(comfyui.base / "datasets/cats")
    assert paths.dataset_folders() == ["datasets/cats", "datasets/same"]


def test_a_name_in_two_datasets_folders_is_listed_once(
    paths: Any, comfyui: FolderPaths, tmp_path: Path
) -> None:
    images(comfyui.base / "datasets/cats")
    images(add_datasets(comfyui, tmp_path / "disk") / "cats")
    assert paths.dataset_folders() == ["datasets/cats"]


def test_a_comfyui_without_datasets_has_those_of_input(paths: Any, comfyui: FolderPaths) -> None:
    without_datasets(comfyui)
    cats = images(comfyui.base / "input/cats")
    assert paths.dataset_folders() == ["input/cats"]
    assert paths.dataset_folder("input/cats") == cats
    with pytest.raises(DataError, match="^folder 'datasets/cats': datasets are read from"):
        paths.dataset_folder("datasets/cats")


def test_a_root_that_does_not_exist_is_empty(paths: Any, comfyui: FolderPaths) -> None:
    (comfyui.base / "datasets").rmdir()
    (comfyui.base / "input").rmdir()
    assert paths.dataset_folders() == []


# A dataset by its name


def test_every_listed_folder_is_found(paths: Any, comfyui: FolderPaths, tmp_path: Path) -> None:
    found = [
        images(comfyui.base / "datasets/a b"),
        images(add_datasets(comfyui, tmp_path / "disk") / "猫"),
        images(comfyui.base / "input/cats"),
        images(comfyui.base / "input/cats/black"),
    ]
    assert [paths.dataset_folder(name) for name in paths.dataset_folders()] == found


def test_the_first_of_two_datasets_folders_wins(
    paths: Any, comfyui: FolderPaths, tmp_path: Path
) -> None:
    images(add_datasets(comfyui, tmp_path / "disk") / "cats")
    assert paths.dataset_folder("datasets/cats") == tmp_path / "disk/cats"
    first = images(comfyui.base / "datasets/cats")
    assert paths.dataset_folder("datasets/cats") == first


def test_a_name_that_was_saved_on_windows_is_found(paths: Any, comfyui: FolderPaths) -> None:
    black = images(comfyui.base / "input/cats/black")
    assert paths.dataset_folder("input\\cats\\black") == black


def test_a_whole_path_inside_of_a_root_is_taken(
    paths: Any, comfyui: FolderPaths, tmp_path: Path
) -> None:
    for root in (comfyui.base / "input", add_datasets(comfyui, tmp_path / "disk")):
        cats = images(root / "cats")
        assert paths.dataset_folder(str(cats)) == cats


@pytest.mark.parametrize(
    "name",
    [
        "{base}/output/secret",
        "{base}/input/../output/secret",
        "{base}/input/out",
        "{base}/input_of_another/cats",
        "/etc",
        "input/../output/secret",
        "input/cats/../../output/secret",
        "input//etc",
        "input/out",
        "input\\..\\output\\secret",
        "input/cats\0",
        "\0",
        "datasets/../output/secret",
        "output/secret",
        "~",
        "cats",
        "..",
        ".",
        "",
    ],
)
def test_a_folder_elsewhere_is_refused_with_where_to_move_it(
    paths: Any, comfyui: FolderPaths, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    images(comfyui.base / "output/secret")
    images(comfyui.base / "input_of_another/cats")
    cats = images(comfyui.base / "input/cats")
    (comfyui.base / "input/out").symlink_to(comfyui.base / "output/secret")
    monkeypatch.chdir(cats.parent)
    name = name.format(base=comfyui.base)
    with pytest.raises(DataError) as caught:
        paths.dataset_folder(name)
    sentence = str(caught.value)
    assert sentence.startswith(f"folder {name!r}: datasets are read from {comfyui.base / 'input'}")
    assert "extra_model_paths.yaml" in sentence and "\n" not in sentence


def test_a_link_that_stays_inside_is_followed(paths: Any, comfyui: FolderPaths) -> None:
    images(comfyui.base / "datasets/cats")
    (comfyui.base / "input/cats").symlink_to(comfyui.base / "datasets/cats")
    assert paths.dataset_folder("input/cats") == comfyui.base / "input/cats"


@pytest.mark.parametrize("name", ["input/dogs", "datasets/dogs", "input/cats/1.PNG"])
def test_a_folder_that_is_gone_is_named(paths: Any, comfyui: FolderPaths, name: str) -> None:
    images(comfyui.base / "input/cats")
    with pytest.raises(DataError) as caught:
        paths.dataset_folder(name)
    path = comfyui.base / name
    assert str(caught.value) == (
        f"folder {name!r}: {path} does not exist; choose a folder of the list"
    )


# Where new files go


def test_new_loras_go_where_comfyui_lists_them(paths: Any, comfyui: FolderPaths) -> None:
    output, models = comfyui.base / "output/loras", comfyui.base / "models/loras"
    assert paths.loras_folder() == output
    comfyui.folder_names_and_paths["loras"] = ([str(models)], set())
    assert paths.loras_folder() == models
    comfyui.folder_names_and_paths["loras"] = ([], set())
    assert paths.loras_folder() == output


def test_other_files_have_folders_of_their_own(paths: Any, comfyui: FolderPaths) -> None:
    assert paths.recipes_folder() == comfyui.base / "output/lora_loom"
    assert paths.own_cache("demo") == comfyui.base / "user/lora_loom/demo"
    assert paths.temporary_file("a.toml") == comfyui.base / "temp/lora_loom/a.toml"


def test_a_diffusion_model_is_one_of_comfyuis_list(paths: Any, comfyui: FolderPaths) -> None:
    file = comfyui.base / "models/diffusion_models/flux.safetensors"
    file.touch()
    assert paths.diffusion_models() == ["flux.safetensors"]
    assert paths.diffusion_model("flux.safetensors") == file
    with pytest.raises(DataError, match="^diffusion model 'gone': there is no such file in"):
        paths.diffusion_model("gone")
