"""Training with torch.compile; `test_compile.py` has what the compiler does to blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pack.engine.errors import ConfigError
from pack.engine.events import Event, Progress, silent
from pack.engine.jobs import train
from pack.engine.jobs.outputs import RunFiles
from pack.engine.loss_history import read_history
from pack.tests.engine.jobs import tiny


@pytest.fixture(autouse=True)
def _as_new() -> None:
    """What other tests compiled does not count."""
    import torch

    torch.compiler.reset()


def run(folder: Path, *settings: dict[str, Any], **changes: Any) -> list[Event]:
    events: list[Event] = []
    train.run(tiny.config(*settings, output_dir=folder, **changes), events.append)
    return events


def test_a_backend_that_only_captures_changes_no_bit(
    training: dict[str, Any], tmp_path: Path
) -> None:
    run(tmp_path / "plain", training, max_train_steps=4)
    captured = {"dynamo_backend": "EAGER", "dynamo_fullgraph": True}
    run(tmp_path / "captured", training, captured, max_train_steps=4)
    first, second = (RunFiles(tmp_path / name, "tiny").lora for name in ("plain", "captured"))
    tiny.assert_same_file(first, second, but=["ss_dynamo_backend"])


def test_steps_that_compile_count_for_no_mean_time(
    training: dict[str, Any], tmp_path: Path
) -> None:
    events = run(tmp_path, training, dynamo_backend="AOT_EAGER", max_train_steps=12)
    told = [e for e in events if isinstance(e, Progress) and e.task == "train"]
    seconds = [step.seconds for step in read_history(RunFiles(tmp_path, "tiny").history)]
    # Two sizes of pictures and a short batch are compiled in the first epoch of three steps.
    assert told[-1].step_seconds is not None
    assert told[-1].step_seconds < 0.5 * sum(seconds) / len(seconds)


@pytest.mark.slow
def test_a_compiled_run_that_is_continued_ends_with_the_same_bits(
    training: dict[str, Any], tmp_path: Path
) -> None:
    settings = training | {
        "dynamo_backend": "INDUCTOR",
        "sample_lines": ["a star --w 32 --h 32 --s 2"],
        "sample_every_n_steps": 2,
        "validation_split": 0.3,
    }
    run(tmp_path / "whole", settings, max_train_steps=6)
    run(tmp_path / "halves", settings, max_train_steps=3)
    run(tmp_path / "halves", settings, max_train_steps=6, resume=True)
    first, second = (RunFiles(tmp_path / name, "tiny") for name in ("whole", "halves"))
    tiny.assert_same_file(first.lora, second.lora)
    tiny.assert_same_file(first.state, second.state)


def test_what_cannot_compile_is_told_before_anything_is_loaded(
    training: dict[str, Any], tmp_path: Path
) -> None:
    nowhere = training | {"dit": tmp_path / "nowhere.safetensors"}
    with pytest.raises(ConfigError, match="dynamo_backend = 'CUDAGRAPHS': it needs an NVIDIA GPU"):
        train.run(tiny.config(nowhere, output_dir=tmp_path, dynamo_backend="CUDAGRAPHS"), silent)
