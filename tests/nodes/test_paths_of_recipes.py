"""Which files a recipe may be read from, and which it may name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pack.engine.config import FIELDS, Config
from pack.engine.config_file import parse_config
from pack.engine.errors import ConfigError
from pack.engine.setting_words import base_types
from pack.tests.nodes.stand_ins import FolderPaths

PATH_SETTINGS = [name for name, field in FIELDS.items() if Path in base_types(field.annotation)]


@pytest.fixture
def paths(load: Callable[[str], Any], comfyui: FolderPaths) -> Any:
    return load("paths")


def test_recipes_of_input_and_beside_loras_are_listed_and_found(
    paths: Any, comfyui: FolderPaths
) -> None:
    files = [
        comfyui.base / "input/mine.toml",
        comfyui.base / "output/loras/cats.toml",
        comfyui.base / "output/lora_loom/cats.toml",
    ]
    for path in files:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    names = paths.recipe_files()
    assert names == ["input/mine.toml", "loras/cats.toml", "lora_loom/cats.toml"]
    assert [paths.recipe_file(name) for name in names] == files


@pytest.mark.parametrize(
    "name",
    [
        "input/gone.toml",
        "input/../secret.toml",
        "input/link.toml",
        "input//etc/passwd",
        "input/mine.toml\0",
        "mine.toml",
        "other/mine.toml",
        "input/",
        "input",
        "/etc/passwd",
        "",
    ],
)
def test_anything_else_is_no_recipe(paths: Any, comfyui: FolderPaths, name: str) -> None:
    (comfyui.base / "input/mine.toml").touch()
    (comfyui.base / "secret.toml").touch()
    (comfyui.base / "input/link.toml").symlink_to(comfyui.base / "secret.toml")
    with pytest.raises(ConfigError) as caught:
        paths.recipe_file(name)
    assert str(caught.value) == (f"file {name!r}: there is no such recipe; choose one of the list")


def recipe(name: str, path: str) -> Config:
    """A recipe with this one path."""
    many = list in base_types(FIELDS[name].annotation)
    return parse_config(f"{name} = ['{path}']" if many else f"{name} = '{path}'", "toml")


@pytest.mark.parametrize("path", ["/etc/passwd", "~/.ssh/id_rsa", "{base}/input/../../x"])
@pytest.mark.parametrize("name", PATH_SETTINGS)
def test_a_recipe_may_not_name_a_file_elsewhere(
    paths: Any, comfyui: FolderPaths, name: str, path: str
) -> None:
    path = path.format(base=comfyui.base)
    with pytest.raises(ConfigError) as caught:
        paths.check_inside(recipe(name, path))
    sentence = str(caught.value)
    assert sentence.startswith(f"{name} = {os.path.expanduser(path)}: ") and "\n" not in sentence


@pytest.mark.parametrize("name", PATH_SETTINGS)
def test_a_recipe_may_name_files_of_comfyui(paths: Any, comfyui: FolderPaths, name: str) -> None:
    for folder in ("models/vae", "input/cats", "output/loras", "datasets/cats", "user/default"):
        paths.check_inside(recipe(name, f"{comfyui.base}/{folder}/new"))


def test_there_are_paths_in_recipes_at_all(paths: Any) -> None:
    assert {"dit", "image_directory", "resume", "lora_weight"} < set(PATH_SETTINGS)
    paths.check_inside(Config())


@pytest.mark.parametrize("place", ["custom_nodes/other/x", "temp/x", "x"])
def test_not_everything_of_comfyui_is_for_recipes(
    paths: Any, comfyui: FolderPaths, place: str
) -> None:
    with pytest.raises(ConfigError, match="^dit = .*: a recipe in a workflow may only name"):
        paths.check_inside(recipe("dit", f"{comfyui.base}/{place}"))


def test_a_recipe_names_files_by_their_full_paths(
    paths: Any, comfyui: FolderPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The training process has another current folder than ComfyUI.
    monkeypatch.chdir(comfyui.base / "input")
    with pytest.raises(ConfigError, match="^dit = flux.safetensors: "):
        paths.check_inside(recipe("dit", "flux.safetensors"))


def test_a_model_on_another_disk_that_comfyui_knows_may_be_named(
    paths: Any, comfyui: FolderPaths, tmp_path: Path
) -> None:
    comfyui.folder_names_and_paths["vae"] = ([str(tmp_path / "disk")], set())
    paths.check_inside(recipe("vae", f"{tmp_path}/disk/ae.safetensors"))
    with pytest.raises(ConfigError):
        paths.check_inside(recipe("vae", f"{tmp_path}/disk2/ae.safetensors"))


def test_the_recipe_of_the_demo_may_name_its_model(load: Callable[[str], Any], paths: Any) -> None:
    pack = Path(load("paths").__file__).parents[1]
    paths.check_inside(recipe("dit", f"{pack}/engine/demo/model/transformer/x.safetensors"))
