"""Tests of which of a training's files is the oldest; `test_lora_ema` tests what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from pack.engine.errors import ConfigError
from pack.engine.jobs.lora_series import open_series
from safetensors.torch import save_file


def write(path: Path, *, step: int | None = None, time: int = 5, **metadata: str) -> Path:
    save_file({"x": torch.ones(1)}, path, metadata | ({"ss_steps": str(step)} if step else {}))
    os.utime(path, (time, time))
    return path


def names(sources: list[Path], sort: str) -> list[str]:
    return [file.path.stem for file in open_series(sources, sort)]


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        ("time", ["b-10", "b-9", "a-10"]),
        ("name", ["a-10", "b-9", "b-10"]),
        ("steps", ["a-10", "b-10", "b-9"]),
        ("given", ["b-9", "a-10", "b-10"]),
    ],
)
def test_files_are_sorted_as_asked(sort: str, expected: list[str], tmp_path: Path) -> None:
    made = (("b-9", 300, 20), ("a-10", 100, 30), ("b-10", 200, 10))
    paths = [write(tmp_path / f"{n}.safetensors", step=step, time=t) for n, step, t in made]
    assert names(paths, sort) == expected


def test_files_of_one_moment_are_sorted_by_steps_and_name(tmp_path: Path) -> None:
    made = (("c", 900), ("b10", 800), ("b9", 800), ("a", 1000))
    paths = [write(tmp_path / f"{name}.safetensors", step=step) for name, step in made]
    assert names(paths, "time") == ["b9", "b10", "c", "a"]


@pytest.mark.parametrize(
    ("name", "metadata", "step"),
    [
        ("cat-step00000200", {}, 200),
        ("cat_step_200", {}, 200),
        ("cat_000000200", {}, 200),
        ("cat-000200", {}, None),  # an epoch
        ("cat", {"training_info": '{"step": 200, "epoch": 3}'}, 200),
        ("cat-step00000200", {"ss_steps": "250"}, 250),
        ("cat", {"ss_steps": "None"}, None),
    ],
)
def test_steps_are_those_that_the_file_or_its_name_says(
    name: str, metadata: dict[str, str], step: int | None, tmp_path: Path
) -> None:
    paths = [write(tmp_path / f"{name}.safetensors", **metadata), write(tmp_path / "x.safetensors")]
    assert open_series(paths, "given")[0].step == step


def test_any_name_can_be_sorted_and_one_without_a_number_is_the_last(tmp_path: Path) -> None:
    stems = ["x²", "x10", "x", "X9", "x-000010"]
    paths = [write(tmp_path / f"{stem}.safetensors") for stem in stems]
    assert names(paths, "name") == ["X9", "x10", "x-000010", "x", "x²"]


def test_one_name_of_two_folders_is_two_files(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    assert len(open_series([write(each / "x.safetensors") for each in folders], "name")) == 2


def test_a_link_to_a_file_is_the_same_file(tmp_path: Path) -> None:
    path, link = write(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    try:
        link.symlink_to(path)
    except OSError:
        pytest.skip("links are not allowed here")
    with pytest.raises(ConfigError, match="given twice"):
        open_series([path, link], "name")
