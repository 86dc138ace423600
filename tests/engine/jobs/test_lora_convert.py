from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pack.engine.adapter_weights import AdapterWeights, LoRAWeights, delta
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.errors import CheckpointError, ConfigError
from pack.engine.jobs import lora_convert
from pack.engine.lora_file import read_lora, write_lora
from safetensors.torch import load_file, save_file

FLUX = LAYER_NAMES["flux_kontext"]
METADATA = {
    "ss_base_model_version": "flux_kontext",
    "ss_steps": "100",
    "modelspec.title": "old",
    "sshs_model_hash": "stale",
}


def draw(rank: int, seed: int, shape: tuple[int, int] = (24, 12)) -> LoRAWeights:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, shape[1], generator=generator)
    return LoRAWeights(down, torch.randn(shape[0], rank, generator=generator), alpha=rank / 2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    layers: dict[str, AdapterWeights] = {
        "double_blocks.0.img_attn.qkv": draw(2, 0),
        "double_blocks.1.img_attn.qkv": draw(2, 1),
        "double_blocks.1.img_mlp.0": draw(3, 2),
    }
    other = {"lora_te1_x.alpha": torch.tensor(1.0)}
    write_lora(path, layers, FLUX, dtype=torch.bfloat16, metadata=METADATA, other=other)
    return path


def test_the_report_says_what_was_read_and_what_changed(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "new.safetensors"
    result = lora_convert.run(source=source, output=output, format="kohya")
    assert result.path == output
    first, second, third, *rest = result.report.splitlines()
    assert first.startswith(f"{source} (") and first.endswith("comfyui format for flux_kontext")
    assert second == "3 LoRA layers, 252 numbers in bfloat16"
    assert third == "2 rank 2, 1 rank 3; scale (alpha / rank) 0.5"
    assert rest[0].startswith(f"written as kohya in bfloat16: {output} (")
    assert rest[1:] == ["- 1 keys of text encoders are kept as they are"]


@pytest.mark.parametrize("format", ["comfyui", "kohya", "diffusers"])
def test_effect_text_encoders_type_and_training_metadata_stay(
    source: Path, tmp_path: Path, format: str
) -> None:
    output = tmp_path / "new.safetensors"
    lora_convert.run(source=source, output=output, format=format)
    before, after = read_lora(source, [FLUX]), read_lora(output, LAYER_NAMES.values())
    assert after.format == format
    for name, adapter in before.layers.items():
        assert torch.equal(delta(after.layers[name]), delta(adapter))
    assert after.other.keys() == {"lora_te1_x.alpha"}
    assert {each.dtype for key, each in load_file(output).items() if "alpha" not in key} == {
        torch.bfloat16
    }
    assert after.metadata["ss_steps"] == "100"
    assert after.metadata["modelspec.title"] == "new"
    assert after.metadata["sshs_model_hash"] != "stale"
    assert after.metadata["lora_loom.operation"] == f"converted from comfyui to {format}"


def test_rounding_to_a_smaller_type_is_said(source: Path, tmp_path: Path) -> None:
    wide, narrow = tmp_path / "wide.safetensors", tmp_path / "narrow.safetensors"
    report = lora_convert.run(source=source, output=wide, format="comfyui", dtype="fp32").report
    assert "rounded" not in report
    report = lora_convert.run(source=wide, output=narrow, format="comfyui", dtype="fp16").report
    assert report.endswith("- numbers were rounded from float32 to float16")
    assert {each.down.dtype for each in read_lora(narrow, [FLUX]).layers.values()} == {
        torch.float16
    }


def test_loras_of_the_peers_trainer_become_comfyuis(tmp_path: Path) -> None:
    """Names and alpha of HunyuanVideo as musubi-tuner writes them, of which ComfyUI loads half."""
    source, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    stem = "lora_unet_double_blocks_0_img_mlp_fc1"
    tensors = {
        f"{stem}.lora_down.weight": torch.randn(2, 6),
        f"{stem}.lora_up.weight": torch.randn(8, 2),
        f"{stem}.alpha": torch.tensor(1),
    }
    save_file(tensors, source, {"ss_base_model_version": "hunyuan_video"})
    lora_convert.run(source=source, output=output, format="comfyui")
    written = load_file(output)
    name = "diffusion_model.double_blocks.0.img_mlp.fc1"
    assert torch.equal(written[f"{name}.lora_A.weight"], tensors[f"{stem}.lora_down.weight"])
    assert torch.equal(written[f"{name}.lora_B.weight"], tensors[f"{stem}.lora_up.weight"])
    assert written[f"{name}.alpha"].item() == 1


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"format": "webui"}, ConfigError, "no format 'webui'"),
        ({"dtype": "int8"}, ConfigError, "dtype"),
        ({"architecture": "flux"}, ConfigError, "architecture"),
        ({"architecture": "wan"}, CheckpointError, "no layer of wan"),
    ],
)
def test_wrong_settings_are_refused_and_nothing_is_written(
    source: Path, tmp_path: Path, options: dict[str, str], error: type, sentence: str
) -> None:
    output = tmp_path / "new.safetensors"
    settings = {"format": "kohya", **options}
    with pytest.raises(error, match=sentence):
        lora_convert.run(source=source, output=output, **settings)
    assert not output.exists()


def test_a_file_is_replaced_only_when_that_is_allowed(source: Path, tmp_path: Path) -> None:
    before = source.read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        lora_convert.run(source=source, output=source, format="kohya")
    assert source.read_bytes() == before
    lora_convert.run(source=source, output=source, format="kohya", overwrite=True)
    assert read_lora(source, [FLUX]).format == "kohya"
