"""The nodes of settings: what their sockets carry, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.config import Config
from pack.engine.errors import ConfigError, DataError
from pack.engine.schedules import ScheduleSettings, multiplier
from pack.tests.nodes.stand_ins import FolderPaths
from PIL import Image
from torch.nn import functional as F  # noqa: N812

# Where a new node is something else than the setting's default, because whoever adds it wants it.
WANTED = {
    "LoraLoom_Compile": {"dynamo_backend": "INDUCTOR"},
    "LoraLoom_Logging": {"log_with": "tensorboard"},
    "LoraLoom_SamplePrompts": {"sample_every_n_steps": 250},
}
SETTINGS_NODES = (
    "LoraLoom_LoraSettings",
    "LoraLoom_Optimizer",
    "LoraLoom_LrScheduler",
    "LoraLoom_TimestepSampling",
    "LoraLoom_Loss",
    "LoraLoom_TrainingOptions",
    "LoraLoom_Validation",
    "LoraLoom_SamplePrompts",
    "LoraLoom_Logging",
    "LoraLoom_Compile",
    "LoraLoom_LoraMetadata",
)


def new(kind: Any, **changes: Any) -> dict[str, Any]:
    """What a new node sends, but for what a test changes."""
    widgets = {made.id: made.options for made in kind.define_schema().inputs if made.is_widget}
    values = {
        name: options["default"] if "default" in options else options["options"][0]
        for name, options in widgets.items()
    }
    return {**values, **changes}


def run(kind: Any, **changes: Any) -> Any:
    return kind.execute(**new(kind, **changes)).values


@pytest.fixture
def picture(comfyui: FolderPaths) -> Path:
    folder = comfyui.base / "input/cats"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    return folder


@pytest.mark.parametrize("node_id", SETTINGS_NODES)
def test_a_new_node_changes_nothing_but_what_it_is_added_for(
    node_types: dict[str, Any], comfyui: FolderPaths, node_id: str
) -> None:
    carried = dict(run(node_types[node_id])[0])
    if node_id == "LoraLoom_Logging":
        assert carried.pop("logging_dir") == comfyui.base / "output/lora_loom/logs"
    wanted = {name: Config().value(name) for name in carried} | WANTED.get(node_id, {})
    assert carried == wanted


@pytest.mark.parametrize("node_id", SETTINGS_NODES)
def test_what_came_later_may_be_missing_in_a_prompt(
    node_types: dict[str, Any], node_id: str
) -> None:
    """A prompt that was saved before an input existed runs as it did."""
    kind = node_types[node_id]
    later = [made.id for made in kind.define_schema().inputs if made.options.get("optional")]
    values = {name: value for name, value in new(kind).items() if name not in later}
    carried = kind.execute(**values).values[0]
    assert {**run(kind)[0], **carried} == run(kind)[0]


# Optimizer


def test_another_optimizer_replaces_the_chosen_one(node_types: dict[str, Any]) -> None:
    kind = node_types["LoraLoom_Optimizer"]
    assert run(kind, optimizer_type="Lion")[0]["optimizer_type"] == "Lion"
    for name in ("torch.optim.SGD", " torch.optim.SGD "):
        carried = run(kind, optimizer_type="Lion", other_optimizer=name)[0]
        assert carried["optimizer_type"] == "torch.optim.SGD"


def test_an_optimizer_that_is_no_class_is_refused(node_types: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^Optimizer: optimizer_type = .*or package\.Class"):
        run(node_types["LoraLoom_Optimizer"], other_optimizer="os.system()")


# LR Scheduler


def drawn(monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]) -> list[list[float]]:
    """Receives the curves that are drawn."""
    curves: list[list[float]] = []

    def remember(curve: list[float], *, title: str) -> Image.Image:
        curves.append(curve)
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(load("settings").plots, "schedule_curve", remember)
    return curves


def test_the_curve_is_that_of_the_arguments(
    node_types: dict[str, Any], monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]
) -> None:
    curves = drawn(monkeypatch, load)
    kind = node_types["LoraLoom_LrScheduler"]
    args = "step_rules='1:3,0.5:5,0.1'"
    carried, _ = run(
        kind, lr_scheduler="piecewise_constant", lr_scheduler_args=args, max_train_steps=7
    )
    assert carried["lr_scheduler_args"] == [args]
    assert curves == [[1, 1, 1, 0.5, 0.5, 0.1, 0.1]]


def test_the_curve_is_that_of_a_class_after_the_warm_up(
    node_types: dict[str, Any], monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]
) -> None:
    curves = drawn(monkeypatch, load)
    run(
        node_types["LoraLoom_LrScheduler"],
        lr_scheduler_type="StepLR",
        lr_scheduler_args="step_size=2\ngamma=0.5",
        lr_warmup_steps=2.0,
        max_train_steps=7,
    )
    assert curves[0] == pytest.approx([0.5, 1, 1, 1, 0.5, 0.5, 0.25])


def test_without_arguments_the_curve_is_that_of_its_inputs(
    node_types: dict[str, Any], monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]
) -> None:
    curves = drawn(monkeypatch, load)
    run(node_types["LoraLoom_LrScheduler"], lr_scheduler="cosine", max_train_steps=9)
    assert curves == [[multiplier("cosine", step, ScheduleSettings(9)) for step in range(9)]]


def test_a_schedule_of_a_package_that_is_not_allowed_is_not_imported(
    node_types: dict[str, Any],
) -> None:
    with pytest.raises(ConfigError, match="antigravity was not imported"):
        run(node_types["LoraLoom_LrScheduler"], lr_scheduler_type="antigravity.Fly")


# Loss


@pytest.mark.parametrize("name", ["mse", "l1", "huber", "smooth_l1"])
def test_the_loss_that_is_drawn_is_pytorchs(
    node_types: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    load: Callable[[str], Any],
    name: str,
) -> None:
    seen: dict[str, Any] = {}

    def remember(errors: list[float], curves: dict[str, Any], *, chosen: str) -> Image.Image:
        seen.update(errors=torch.tensor(errors), curve=torch.tensor(curves[chosen]))
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(load("loss").plots, "loss_functions", remember)
    carried, image = run(node_types["LoraLoom_Loss"], loss_type=name, huber_c=0.5)
    assert (carried["loss_type"], image.shape) == (name, (1, 4, 4, 3))
    errors, zero = seen["errors"], torch.zeros(len(seen["errors"]))
    expected = {
        "mse": F.mse_loss(errors, zero, reduction="none"),
        "l1": F.l1_loss(errors, zero, reduction="none"),
        "huber": F.huber_loss(errors, zero, reduction="none", delta=0.5),
        "smooth_l1": F.smooth_l1_loss(errors, zero, reduction="none", beta=0.5),
    }[name]
    assert torch.allclose(seen["curve"], expected)
    assert errors.min() < -1 and errors.max() > 1


def test_an_empty_word_is_none(node_types: dict[str, Any]) -> None:
    carried, _ = run(node_types["LoraLoom_Loss"], trigger_word="loomling")
    assert (carried["trigger_word"], carried["preservation_class"]) == ("loomling", None)


# Validation


def test_pictures_for_validation_come_from_a_folder_of_comfyui(
    node_types: dict[str, Any], picture: Path
) -> None:
    kind = node_types["LoraLoom_Validation"]
    carried = run(kind, validation_folder="input/cats", early_stop_patience=3)[0]
    assert carried["validation_directory"] == picture
    assert carried["early_stop_patience"] == 3 and carried["validate_every_n_steps"] is None
    with pytest.raises(DataError, match="^folder '/etc': datasets are read from "):
        run(kind, validation_folder="/etc")


def test_validation_is_read_again_when_its_folder_changed(
    node_types: dict[str, Any], picture: Path
) -> None:
    fingerprint = node_types["LoraLoom_Validation"].fingerprint_inputs
    before = fingerprint(validation_folder="input/cats", validation_split=0.0)
    assert before == fingerprint(validation_folder="input/cats", validation_split=0.0)
    (picture / "2.png").touch()
    assert before != fingerprint(validation_folder="input/cats", validation_split=0.0)


# Sample Prompts


def test_each_line_is_a_prompt(node_types: dict[str, Any]) -> None:
    lines = "a cat --w 512 --d 3\n\n  a dog \n# not this"
    carried = run(node_types["LoraLoom_SamplePrompts"], sample_lines=lines)[0]
    assert carried["sample_lines"] == ["a cat --w 512 --d 3", "a dog", "# not this"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat --zz 5", "^Sample Prompts, line 2: unknown option --zz"),
        ("a cat --w wide", "^Sample Prompts, line 2: --w 'wide': expected a whole number"),
        ("a cat --ci /etc/passwd", "^Sample Prompts, line 2: --ci = /etc/passwd: a recipe in a"),
        ("a cat --ci ../secret.png", r"^Sample Prompts, line 2: --ci = \.\./secret\.png: a recipe"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(
    node_types: dict[str, Any], line: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(node_types["LoraLoom_SamplePrompts"], sample_lines=f"a dog\n{line}")


def test_a_control_image_may_lie_in_comfyuis_folders(
    node_types: dict[str, Any], picture: Path
) -> None:
    line = f"a cat --ci {picture / '1.png'}"
    assert run(node_types["LoraLoom_SamplePrompts"], sample_lines=line)[0]["sample_lines"] == [line]


# Logging


@pytest.mark.parametrize(
    ("folder", "below"), [("", ""), ("cats", "cats"), (" a/b ", "a/b"), ("a\\b", "a/b")]
)
def test_logs_go_below_the_output_folder(
    node_types: dict[str, Any], comfyui: FolderPaths, folder: str, below: str
) -> None:
    carried = run(node_types["LoraLoom_Logging"], folder=folder)[0]
    assert carried["logging_dir"] == comfyui.base / "output/lora_loom/logs" / below
    assert carried["log_tracker_config"] is None


@pytest.mark.parametrize("folder", ["..", "../../custom_nodes", "/etc", "a/../../b", "a\0"])
def test_logs_go_nowhere_else(node_types: dict[str, Any], folder: str) -> None:
    with pytest.raises(ConfigError, match="^folder .*: logs are written below .*logs only; "):
        run(node_types["LoraLoom_Logging"], folder=folder)


def test_arguments_of_a_logger_come_from_a_file_of_comfyui(
    node_types: dict[str, Any], comfyui: FolderPaths
) -> None:
    file = comfyui.base / "input/tracker.toml"
    file.touch()
    carried = run(node_types["LoraLoom_Logging"], tracker_config="input/tracker.toml")[0]
    assert carried["log_tracker_config"] == file
    with pytest.raises(ConfigError, match="there is no such recipe"):
        run(node_types["LoraLoom_Logging"], tracker_config="input/../x.toml")


def test_no_node_asks_for_a_key(node_types: dict[str, Any]) -> None:
    """It would be saved with the workflow and inside of pictures."""
    for kind in node_types.values():
        for made in kind.define_schema().inputs:
            assert not {"key", "token", "password"} & set(made.id.split("_")), made.id


# Timestep Sampling


@pytest.mark.parametrize(
    ("buckets", "edges"), [(0, []), (1, []), (4, [0.25, 0.5, 0.75]), (10_000, [])]
)
def test_parts_that_are_trained_equally_often_are_drawn_if_they_are_few(
    node_types: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    load: Callable[[str], Any],
    buckets: int,
    edges: list[float],
) -> None:
    seen: dict[str, Any] = {}

    def remember(times: list[float], **options: Any) -> Image.Image:
        seen.update(options, times=torch.tensor(times))
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(load("settings").plots, "time_histogram", remember)
    kind = node_types["LoraLoom_TimestepSampling"]
    run(
        kind,
        timestep_sampling="uniform",
        num_timestep_buckets=buckets,
        shown_resolution=1024,
    )
    assert seen["edges"] == pytest.approx(edges)
    assert seen["times"].median().item() == pytest.approx(0.5, abs=1e-4)
