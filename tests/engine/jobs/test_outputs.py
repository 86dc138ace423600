from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pack.engine.config import Config
from pack.engine.config_file import to_toml
from pack.engine.errors import ConfigError, EngineError
from pack.engine.jobs.outputs import (
    RunFiles,
    explained,
    find_start,
)
from pack.tests.engine.jobs import tiny


def settings(folder: Path, **changes: Any) -> Config:
    return tiny.config(output_dir=folder, output_name="a.b", **changes)


def fill(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("something")
    return path


def test_all_files_of_a_run_begin_with_its_name(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, "a.b")
    paths = [files.lora, files.state, files.recipe, files.history, files.validation]
    paths += [files.loss_by_time, files.best, files.control, files.status]
    assert [path.name for path in (*paths, files.lora_at_step(20), files.lora_at_epoch(3))] == [
        "a.b.safetensors",
        "a.b.state",
        "a.b.toml",
        "a.b.loss_history.jsonl",
        "a.b.validation.jsonl",
        "a.b.loss_by_time.json",
        "a.b-best.safetensors",
        "a.b.control",
        "a.b.status.json",
        "a.b-step00000020.safetensors",
        "a.b-000003.safetensors",
    ]


def test_a_new_run_starts_where_nothing_of_its_name_is(tmp_path: Path) -> None:
    for other in ("a.safetensors", "a.b2.safetensors", "axb-000001.safetensors", "a.b-1.png"):
        fill(tmp_path / other)
    # Of a run that failed in its first step.
    RunFiles(tmp_path, "a.b").history.touch()
    assert find_start(settings(tmp_path)) == (RunFiles(tmp_path, "a.b"), None)
    assert find_start(settings(tmp_path / "new")) == (RunFiles(tmp_path / "new", "a.b"), None)


@pytest.mark.parametrize(
    "name",
    [
        "a.b.safetensors",
        "a.b.state",
        "a.b-step00000020.safetensors",
        "a.b-000003.safetensors",
        "a.b.loss_history.jsonl",
        "a.b.toml",
    ],
)
def test_no_file_of_another_run_is_replaced_unasked(tmp_path: Path, name: str) -> None:
    fill(tmp_path / name)
    with pytest.raises(ConfigError) as caught:
        find_start(settings(tmp_path))
    message = str(caught.value)
    assert f"{tmp_path} already holds {name}; use --resume" in message and "\n" not in message
    assert find_start(settings(tmp_path, overwrite=True))[1] is None


def test_many_files_are_named_in_short(tmp_path: Path) -> None:
    for step in range(5):
        fill(RunFiles(tmp_path, "a.b").lora_at_step(step))
    with pytest.raises(ConfigError, match=r"step00000000.*, .*step00000001.* and 3 more; use"):
        find_start(settings(tmp_path))


def test_a_recipe_that_says_the_same_is_no_obstacle(tmp_path: Path) -> None:
    config = settings(tmp_path)
    (tmp_path / "a.b.toml").write_text(to_toml(config), "utf-8")
    assert find_start(config)[1] is None


def test_resuming_finds_the_state_of_the_same_name(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, "a.b")
    for path in (files.lora, files.state, files.history, files.lora_at_step(2)):
        fill(path)
    assert find_start(settings(tmp_path, resume=True)) == (files, files.state)


def test_resuming_without_a_state_starts_anew_but_replaces_no_lora(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, "a.b")
    # Of a run that was killed before its first state was whole.
    for path in (files.history, files.lora_at_step(2)):
        fill(path)
    assert find_start(settings(tmp_path, resume=True)) == (files, None)
    fill(files.lora)
    with pytest.raises(ConfigError, match=r"holds a\.b\.safetensors, but no a\.b\.state"):
        find_start(settings(tmp_path, resume=True))
    assert find_start(settings(tmp_path, resume=True, overwrite=True)) == (files, None)


def test_a_state_that_is_named_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing.state does not exist"):
        find_start(settings(tmp_path, resume=tmp_path / "nothing.state"))


def test_a_state_of_another_run_lets_nothing_be_replaced(tmp_path: Path) -> None:
    files, other = RunFiles(tmp_path, "a.b"), fill(tmp_path / "other.state")
    assert find_start(settings(tmp_path, resume=other)) == (files, other)
    fill(files.lora)
    with pytest.raises(ConfigError, match="already holds"):
        find_start(settings(tmp_path, resume=other))
    # The run's own state is its own under any name.
    fill(files.state)
    itself = tmp_path / "x" / ".." / files.state.name
    (tmp_path / "x").mkdir()
    assert find_start(settings(tmp_path, resume=itself)) == (files, files.state)


def test_numbered_files_are_told_by_step_and_epoch(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, "a.b")
    step, epoch = fill(files.lora_at_step(20)), fill(files.lora_at_epoch(3))
    state = fill(files.lora_at_step(20).with_suffix(".state"))
    for name in ("a.b-best.safetensors", "a.b-step20.safetensors", "a.b.c-000001.safetensors"):
        fill(tmp_path / name)
    assert files.numbered(".safetensors") == {step: ("step", 20), epoch: ("epoch", 3)}
    assert files.numbered(".state") == {state: ("step", 20)}
    assert files.is_own_state(state) and not files.is_own_state(files.state)
    assert files.is_own_state(fill(files.state)) and not files.is_own_state(
        fill(tmp_path / "c.state")
    )


def test_only_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, "a.b")
    written = [files.lora, files.state, files.recipe, files.history, files.validation]
    written += [files.loss_by_time, files.best, files.lora_at_step(1), files.lora_at_epoch(1)]
    written += [files.lora_at_step(1).with_suffix(".state")]
    left = [fill(path.with_name(f".{path.name}.123.tmp")) for path in written]
    kept = [fill(path) for path in written]
    for name in (".a.safetensors.1.tmp", ".a.b2.toml.1.tmp", ".a.b.safetensors.x.tmp", ".axb.toml"):
        kept.append(fill(tmp_path / name))
    files.remove_leftovers()
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in kept)
    RunFiles(tmp_path / "nowhere", "a").remove_leftovers()


def test_what_the_disk_says_becomes_one_sentence(tmp_path: Path) -> None:
    path = fill(tmp_path / "file") / "a.safetensors"
    with pytest.raises(EngineError) as caught, explained(path):
        path.write_text("below a file there is no folder")
    assert str(caught.value).startswith(f"{path}: the file cannot be written (")
    assert "untouched" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(KeyError), explained(path):
        raise KeyError
