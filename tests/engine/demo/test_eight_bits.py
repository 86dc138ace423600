"""The demo's training on its model in 8 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from pack.engine.config import QuantizationConfig
from pack.engine.demo import job
from pack.engine.events import silent
from pack.engine.jobs import cache, train
from pack.engine.jobs.outputs import RunFiles


def losses(folder: Path, quantization: QuantizationConfig) -> tuple[float, float]:
    """On the held-out creatures, before and after the demo's training in bfloat16."""
    config = job._config(folder, job.STEPS)
    training = config.training.model_copy(update={"mixed_precision": "bf16"})
    config = config.model_copy(update={"training": training, "quantization": quantization})
    cache.run(config, silent)
    train.run(config, silent)
    tuned = job._with(config, lora_weight=[RunFiles(folder, job.NAME).lora])
    return job._loss(config), job._loss(tuned)


@pytest.mark.slow
def test_the_demo_learns_as_much_in_8_bits(tmp_path: Path) -> None:
    before, plain = losses(tmp_path / "bf16", QuantizationConfig())
    eight_bit = QuantizationConfig(fp8_base=True, fp8_scaled=True)
    _, quantized = losses(tmp_path / "e4m3", eight_bit)
    assert plain < 0.3 * before
    assert abs(quantized / plain - 1) < 0.01
