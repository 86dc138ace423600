"""The outputs of Train LoRA are read from the files of the run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.config import Config, ModelConfig, OutputConfig
from pack.engine.jobs.outputs import RunFiles
from pack.engine.latent_file import save_latents
from pack.engine.loss_history import LossHistory, Step
from pack.engine.validation_history import Measurement, append_measurement
from pack.tests.nodes.stand_ins import ComfyNode, ExecutionBlocker
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

NAMES = (
    *("lora", "lora path", "loss map", "loss curve", "previews", "report"),
    *("samples", "loss by noise level"),
)


class Vae:
    """Every latent pixel is 8 x 8 green ones."""

    def decode(self, raw_NCHW: Tensor) -> Tensor:
        batch, _, height, width = raw_NCHW.shape
        return torch.tensor([0.0, 1.0, 0.0]).expand(batch, 8 * height, 8 * width, 3)


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    """Those of a run of four steps without anything else."""
    files = RunFiles(tmp_path, "cats")
    save_file({"a.lora_A.weight": torch.ones(2, 3)}, files.lora)
    files.state.touch()
    with LossHistory(files.history) as history:
        for step in range(1, 5):
            history.append(Step(step, 1, 1 / step, 1e-4, 0.5, 0.25))
    return files


@pytest.fixture
def outputs(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, files: RunFiles
) -> Callable[..., dict[str, Any]]:
    def load_torch_file(path: str, *, safe_load: bool) -> dict[str, Tensor]:
        assert safe_load
        return load_file(path)

    monkeypatch.setattr(
        sys.modules["comfy.utils"], "load_torch_file", load_torch_file, raising=False
    )
    results = load("results")

    def read(vae: Any = None) -> dict[str, Any]:
        output = OutputConfig(output_dir=files.folder, output_name="cats", resume=True)
        config = Config(output=output, model=ModelConfig(architecture="flux_kontext"))
        given = results.outputs(config, vae, ["a message"], ComfyNode)
        return dict(zip(NAMES, given.values, strict=True))

    return read


def is_left_out(value: Any) -> bool:
    """Whether the nodes behind an output are not executed."""
    return isinstance(value, ExecutionBlocker)


def test_the_outputs_are_those_of_the_node(load: Callable[[str], Any], comfyui: Any) -> None:
    shown = load("train").TrainLora.define_schema().outputs
    assert tuple(output.display_name for output in shown) == NAMES
    assert [output.display_name for output in shown if output.is_output_list] == ["samples"]


def test_a_run_without_more_gives_lora_loss_and_report(
    outputs: Callable[..., dict[str, Any]], files: RunFiles
) -> None:
    found = outputs()
    assert list(found["lora"]) == ["a.lora_A.weight"]
    assert found["lora path"] == str(files.lora)
    assert found["loss map"] == {"loss": [1, 1 / 2, 1 / 3, 1 / 4]}
    assert found["loss curve"].shape[-1] == 3
    assert found["report"].splitlines() == [
        "cats.safetensors: 4 steps, loss 0.2500 at the end, 0.25 s a step",
        str(files.lora),
        "a message",
    ]
    for name in ("previews", "samples", "loss by noise level"):
        assert is_left_out(found[name]), name


def test_the_validation_is_told_and_drawn(
    outputs: Callable[..., dict[str, Any]], files: RunFiles
) -> None:
    before = outputs()["loss curve"]
    for step, loss in ((1, 0.5), (2, 0.3), (3, float("nan")), (4, 0.4)):
        append_measurement(files.validation, Measurement(step, loss, (0.5,), (loss,)))
    found = outputs()
    assert "validation loss 0.4000 at the end, lowest 0.3000 after step 2" in found["report"]
    assert not torch.equal(found["loss curve"], before)


def test_the_samples_are_those_that_were_drawn_last(
    outputs: Callable[..., dict[str, Any]], files: RunFiles
) -> None:
    files.samples.mkdir()
    for step in (50, 100):
        for index, (height, width) in enumerate(((2, 2), (4, 3))):
            path = files.samples / f"cats-step{step:08d}-{index:02d}.latent"
            save_latents(path, torch.zeros(1, 16, height, width))
    Image.new("RGB", (16, 16), "red").save(files.samples / "cats-step00000100-00.png")
    Image.new("RGB", (16, 16), "red").save(files.samples / "dogs-step00000200-00.png")
    first, second = outputs(Vae())["samples"]
    assert first.shape == (1, 16, 16, 3) and first[0, 0, 0].tolist() == [1, 0, 0]  # as written
    assert second.shape == (1, 32, 24, 3) and second[0, 0, 0].tolist() == [0, 1, 0]  # decoded


def test_the_loss_by_noise_level_is_drawn(
    outputs: Callable[..., dict[str, Any]], files: RunFiles
) -> None:
    record = {"edges": [0, 0.5, 1], "mean": [None, 0.2], "count": [0, 3]}
    files.loss_by_time.write_text(json.dumps(record))
    assert outputs()["loss by noise level"].shape[-1] == 3
    files.loss_by_time.write_text(json.dumps(record | {"mean": [None, None], "count": [0, 0]}))
    assert is_left_out(outputs()["loss by noise level"])
