"""Trainings on, and pictures of, models in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine import memory
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.errors import ConfigError
from pack.engine.events import Event, Message
from pack.engine.jobs import quantize
from pack.engine.jobs.generate import SamplingSettings, initial_noise, load_with_loras, sample
from pack.engine.jobs.model import quantization_of
from pack.engine.jobs.outputs import RunFiles
from pack.engine.lora_file import read_lora
from pack.engine.loss_history import read_history
from pack.engine.quantized_linear import QuantizedLinear
from pack.engine.quantized_loading import QuantizationSettings
from pack.tests.engine.jobs import tiny
from pack.tests.engine.jobs.test_train import assert_same_run, run, run_and_stop
from torch import Tensor, nn

FLUX = FluxKontext()
CPU = torch.device("cpu")
EIGHT_BIT = {"fp8_base": True, "fp8_scaled": True}


def quantized_layers(transformer: nn.Module) -> int:
    return sum(isinstance(each, QuantizedLinear) for each in transformer.modules())


def latents(transformer: nn.Module) -> Tensor:
    conditions = {"text_embeds": torch.ones(1, 8, 64), "pooled": torch.ones(1, 64)}
    noise = initial_noise(FLUX, width=48, height=32, seed=0)
    return sample(FLUX, transformer, noise, conditions, SamplingSettings(2, 1.0, 1.0))


def told(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Message)]


@pytest.mark.parametrize("number_format", ["e4m3", "int8"])
def test_a_training_in_8_bits_learns_and_a_stopped_one_continues_to_the_same_bits(
    training: dict[str, Any], tmp_path: Path, number_format: str
) -> None:
    settings = training | EIGHT_BIT
    settings |= {"quantize_format": number_format, "max_train_steps": 4}
    settings |= {"gradient_checkpointing": True}
    run(settings, output_dir=tmp_path / "whole")
    run_and_stop(2, settings, output_dir=tmp_path / "parts")
    run(settings, output_dir=tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    layers = read_lora(RunFiles(tmp_path / "whole", "tiny").lora, [FLUX.layer_names]).layers
    assert len(layers) == 2 * 8 + 4 * 2


def test_the_loss_in_8_bits_is_near_that_of_the_model_itself(
    training: dict[str, Any], tmp_path: Path
) -> None:
    settings = training | {"mixed_precision": "no", "max_train_steps": 1}
    formats = {"plain": {}, "e4m3": EIGHT_BIT, "int8": EIGHT_BIT | {"quantize_format": "int8"}}
    losses: dict[str, float] = {}
    for name, changes in formats.items():
        run(settings, changes, output_dir=tmp_path / name)
        [step] = read_history(RunFiles(tmp_path / name, "tiny").history)
        losses[name] = step.loss
    assert 0 < abs(losses["e4m3"] / losses["plain"] - 1) < 0.02
    assert 0 < abs(losses["int8"] / losses["plain"] - 1) < 0.005


def test_loras_are_merged_before_the_weights_are_rounded(
    training: dict[str, Any], tmp_path: Path
) -> None:
    run(training, output_dir=tmp_path, max_train_steps=3, save_precision="fp32")
    lora = RunFiles(tmp_path, "tiny").lora
    plain = tiny.config(training, mixed_precision="no", lora_weight=[lora])
    eight = tiny.config(training, EIGHT_BIT, mixed_precision="no", lora_weight=[lora])
    merged, rounded = (load_with_loras(each, FLUX, CPU) for each in (plain, eight))
    # 8 of each of 2 double and 2 of each of 4 single blocks, whose fused layers have 3 or 4 parts
    assert quantized_layers(rounded) == 2 * (6 + 2 * 3) + 4 * (1 + 4)
    for name, layer in rounded.named_modules():
        if isinstance(layer, QuantizedLinear):
            exact = merged.get_submodule(name).get_parameter("weight")
            error = (layer.dequantized() - exact).norm() / exact.norm()
            assert 0 < error < 0.03
    assert (latents(rounded) - latents(merged)).norm() < 0.05 * latents(merged).norm()


def test_the_second_start_reads_the_copy_in_8_bits(
    training: dict[str, Any], tmp_path: Path
) -> None:
    settings = training | EIGHT_BIT | {"quantized_cache": tmp_path / "cache", "max_train_steps": 1}
    first = run(settings, output_dir=tmp_path / "first")
    [copy] = (tmp_path / "cache").rglob("*.safetensors")
    second = run(settings, output_dir=tmp_path / "second")
    reading = f"reading the model in 8 bits from {copy}"
    assert reading not in told(first) and reading in told(second)
    tiny.assert_same_file(
        RunFiles(tmp_path / "first", "tiny").lora, RunFiles(tmp_path / "second", "tiny").lora
    )
    run(training | EIGHT_BIT, output_dir=tmp_path / "without", max_train_steps=1)
    tiny.assert_same_file(
        RunFiles(tmp_path / "first", "tiny").lora, RunFiles(tmp_path / "without", "tiny").lora
    )


@pytest.mark.parametrize("layout", ["blockwise", "comfyui"])
def test_a_file_in_8_bits_is_trained_as_it_is(
    training: dict[str, Any], tmp_path: Path, layout: str
) -> None:
    path = tmp_path / "small.safetensors"
    quantize.run(
        dit=training["dit"],
        output=path,
        settings=QuantizationSettings(),
        layout=layout,
        report=lambda event: None,
    )
    events = run(training, output_dir=tmp_path / "out", dit=path, max_train_steps=2)
    assert any(
        "are in 8 bits in the file and are used as they are" in text for text in told(events)
    )
    config = tiny.config(training, dit=path)
    assert quantized_layers(load_with_loras(config, FLUX, CPU)) > 0
    if layout == "blockwise":
        run(training | EIGHT_BIT, output_dir=tmp_path / "same", max_train_steps=2)
        first, second = (RunFiles(tmp_path / each, "tiny").lora for each in ("out", "same"))
        model = {"ss_sd_model_name", "ss_fp8_base", "ss_fp8_scaled"}
        tiny.assert_same_file(first, second, but=model)


def test_the_estimate_of_memory_knows_the_smaller_model(training: dict[str, Any]) -> None:
    plain, eight = (
        memory.frozen_bytes(
            FLUX.empty_transformer(
                training["dit"], quantization=quantization_of(tiny.config(training, changes))
            )
        )
        for changes in ({}, EIGHT_BIT)
    )
    # float32 without a file's type: 4 bytes become 1 and a 64th of 4 in the blocks.
    assert 0.2 < eight / plain < 0.6


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"fp8_base": True}, "fp8_base goes with fp8_scaled"),
        ({"fp8_scaled": True}, "fp8_scaled needs fp8_base"),
        ({"quantized_cache": Path("a")}, "quantized_cache is for fp8_scaled"),
        (EIGHT_BIT | {"quantize_format": "int8", "quantize_compat": True}, "has no int8"),
        (
            EIGHT_BIT | {"quantize_exclude_patterns": ["nothing"]},
            "quantize_exclude_patterns: 'nothing'",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    training: dict[str, Any], tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(training, settings, output_dir=tmp_path)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_is_only_continued_with_the_same_weights(
    training: dict[str, Any], tmp_path: Path
) -> None:
    run(training, output_dir=tmp_path, max_train_steps=1)
    with pytest.raises(ConfigError, match="made with other settings: fp8_scaled"):
        run(training, EIGHT_BIT, output_dir=tmp_path, max_train_steps=2, resume=True)
