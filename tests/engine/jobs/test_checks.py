from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.errors import CheckpointError, ConfigError, EngineError
from pack.engine.events import Event, Finished, Message, silent
from pack.engine.jobs import cache, checks, outputs, train
from pack.engine.jobs.needs import Needs, needs_of, num_batch_shapes
from pack.engine.jobs.plan import plan_run
from pack.engine.weights import open_checkpoint, save_tensors
from pack.tests.conftest import ROOT
from pack.tests.engine.jobs import tiny

FLUX = FluxKontext()
CPU = torch.device("cpu")


def check(*settings: dict[str, Any], **changes: Any) -> list[str]:
    """What the check says, one sentence each."""
    events: list[Event] = []
    checks.run(tiny.config(*settings, **changes), events.append)
    assert events[-1] == Finished("check")
    return [event.text for event in events if isinstance(event, Message)]


def needs(training: dict[str, Any], **changes: Any) -> Needs:
    config = tiny.config(training, **changes)
    items = cache.cached_items(config, FLUX, silent)
    plan = plan_run(config, items, num_processes=1, start=0)
    transformer = FLUX.empty_transformer(training["dit"])
    return needs_of(config, FLUX, transformer, items, plan, CPU)


def test_the_check_says_what_would_be_done(training: dict[str, Any], tmp_path: Path) -> None:
    said = check(training, output_dir=tmp_path / "out", max_train_steps=6)
    assert said[0].startswith("images: 5, of sizes 48x48, 64x32; batches per epoch: 3; ")
    assert said[1] == "optimizer steps: 6; batches per step: 1; epochs: 2.0"
    assert said[2].startswith("LoRA: rank 4, layers: 24, trained numbers: ")
    assert said[3].startswith("disk: ") and said[4].startswith("memory of cpu: about ")
    assert said[5].startswith("with memory preset balanced: about ")
    assert list((tmp_path / "out").iterdir()) == []


def test_images_that_are_not_encoded_yet_are_counted_with_their_sizes(
    training: dict[str, Any], tmp_path: Path
) -> None:
    images = shutil.copytree(training["image_directory"], tmp_path / "images")
    settings = {**training, "image_directory": images, "output_dir": tmp_path / "out"}
    encoded = check(settings, max_train_steps=6)
    shutil.rmtree(images / ".loom_cache")
    said = check(settings, max_train_steps=6)
    assert "still to be encoded: 5 of the images, 5 captions" in said[0]
    assert said[1:3] == encoded[1:3]
    # With what is encoded beside it, new images make batches together with the others.
    cache.run(tiny.config(settings), silent)
    tiny.write_image(images / "new.png", (48, 48), "something")
    assert "batches per epoch: 3; still to be encoded: 1 " in check(settings)[0]


def test_a_run_that_would_be_continued_says_what_is_done(
    training: dict[str, Any], tmp_path: Path
) -> None:
    train.run(tiny.config(training, output_dir=tmp_path, max_train_steps=2), silent)
    said = check(training, output_dir=tmp_path, max_train_steps=6, resume=True)
    assert "optimizer steps: 6, of which 2 are done;" in said[1]


def test_the_check_refuses_what_the_training_would(
    training: dict[str, Any], tmp_path: Path
) -> None:
    train.run(tiny.config(training, output_dir=tmp_path, max_train_steps=1), silent)
    with pytest.raises(ConfigError, match="already holds"):
        check(training, output_dir=tmp_path)
    with pytest.raises(ConfigError, match="output_dir"):
        check({name: value for name, value in training.items() if name != "output_dir"})


def test_numbers_and_file_sizes_are_those_of_the_run(
    training: dict[str, Any], tmp_path: Path
) -> None:
    train.run(tiny.config(training, output_dir=tmp_path, max_train_steps=1), silent)
    expected = needs(training)
    lora, state = tmp_path / "tiny.safetensors", tmp_path / "tiny.state"
    trained = sum(
        torch.Size(entry.shape).numel()
        for key, entry in open_checkpoint(lora).entries.items()
        if not key.endswith(".alpha")
    )
    assert expected.num_trained == trained
    # What is allowed for their headers does not depend on the size of the model.
    headers = 64 * 2**10
    assert lora.stat().st_size <= expected.lora_bytes <= lora.stat().st_size + headers
    assert abs(state.stat().st_size - expected.state_bytes) <= headers


def changed_model(
    training: dict[str, Any], folder: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> Path:
    checkpoint = open_checkpoint(training["dit"])
    tensors = {key: checkpoint.read(key) for key in checkpoint.entries}
    change(tensors)
    save_tensors(folder / "changed.safetensors", tensors, {})
    return folder / "changed.safetensors"


def test_a_model_with_a_tensor_missing_is_refused_before_it_is_read(
    training: dict[str, Any], tmp_path: Path
) -> None:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["single_blocks.1.linear2.bias"]

    path = changed_model(training, tmp_path, remove)
    with pytest.raises(CheckpointError, match="single_blocks.1.linear2.bias is missing"):
        check(training, dit=path, output_dir=tmp_path / "out")


def test_a_tensor_of_another_shape_is_refused_before_it_is_read(
    training: dict[str, Any], tmp_path: Path
) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        key = "double_blocks.1.img_attn.qkv.weight"
        tensors[key] = tensors[key][:-1].contiguous()

    path = changed_model(training, tmp_path, cut)
    with pytest.raises(CheckpointError, match="double_blocks.1.img_attn.qkv.weight gives a tensor"):
        check(training, dit=path, output_dir=tmp_path / "out")


def test_a_model_file_that_is_not_there_is_named(training: dict[str, Any], tmp_path: Path) -> None:
    gone = tmp_path / "gone.safetensors"
    with pytest.raises(CheckpointError, match=r"vae = .*gone.safetensors: there is no such file"):
        checks.check_files(tiny.config(training, vae=gone))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_model_file_that_may_not_be_read_is_named(
    training: dict[str, Any], tmp_path: Path
) -> None:
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(b"")
    secret.chmod(0)
    with pytest.raises(CheckpointError, match="secret.safetensors may not be read"):
        checks.check_files(tiny.config(training, vae=secret))


def before_loading(training: dict[str, Any], folder: Path, **changes: Any) -> list[Message]:
    config = tiny.config(training, output_dir=folder, **changes)
    items = cache.cached_items(config, FLUX, silent)
    plan = plan_run(config, items, num_processes=1, start=0)
    return checks.before_loading(config, FLUX, items, outputs.RunFiles(folder, "tiny"), plan, CPU)


def test_nothing_is_said_when_there_is_enough_of_everything(
    training: dict[str, Any], tmp_path: Path
) -> None:
    assert before_loading(training, tmp_path) == []


def test_too_little_memory_is_a_warning_that_says_what_to_do(
    training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=2**20))
    (warning,) = before_loading(training, tmp_path)
    assert warning.level == "warning"
    assert warning.text.startswith("training needs about ") and "but cpu has" in warning.text
    assert "with gradient_checkpointing it is" in warning.text
    (warning,) = before_loading(training, tmp_path, gradient_checkpointing=True)
    assert warning.text.endswith("; use a smaller resolution or batch_size")


def test_a_full_disk_is_an_error(
    training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(EngineError, match=r"the files of this run need .* but only 1\.0 MiB"):
        before_loading(training, tmp_path)


def test_checkpointing_and_smaller_batches_need_less(training: dict[str, Any]) -> None:
    large = needs(training).memory(gradient_checkpointing=False).parts["activations"]
    small = needs(training, batch_size=1).memory(gradient_checkpointing=False).parts["activations"]
    less = needs(training).memory(gradient_checkpointing=True).parts["activations"]
    assert less < small < large


def test_batches_of_every_size_and_the_short_ones_have_shapes(training: dict[str, Any]) -> None:
    items = needs(training).items
    # Three images of one size and two of another: 2 + 1 and 2.
    assert num_batch_shapes(items, batch_size=2) == 3
    assert num_batch_shapes(items, batch_size=1) == 2
    assert num_batch_shapes(items, batch_size=5) == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="allocators differ")
@pytest.mark.parametrize("case", [["demo"], ["small"]])
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(case: list[str]) -> None:
    """Both number types, with and without checkpointing, in processes of their own."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--only", *case],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    ratios = [float(line.split()[-1]) for line in run.stdout.splitlines()]
    assert len(ratios) == 4
    assert all(0.9 <= ratio <= 1.1 for ratio in ratios), run.stdout


@pytest.mark.gpu
def test_the_estimate_is_within_a_tenth_of_the_peak_on_a_gpu() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--only", "mid-512"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    ratios = [float(line.split()[-1]) for line in run.stdout.splitlines()]
    assert len(ratios) == 4
    assert all(0.9 <= ratio <= 1.1 for ratio in ratios), run.stdout
