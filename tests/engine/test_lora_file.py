from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pack.engine.adapter_weights import LoRAWeights
from pack.engine.architectures.flux_names import NAMES
from pack.engine.errors import CheckpointError
from pack.engine.lora_file import read_lora, save_adapters
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SHAPES = {"double_blocks.0.img_attn.qkv": (12, 4), "single_blocks.3.linear1": (6, 4)}


def weights(rank: int = 2) -> dict[str, LoRAWeights]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: LoRAWeights(
            torch.randn(rank, in_features, generator=generator),
            torch.randn(out_features, rank, generator=generator),
            alpha=1.5,
        )
        for name, (out_features, in_features) in SHAPES.items()
    }


def save(
    path: Path,
    layers: dict[str, LoRAWeights],
    *,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
) -> None:
    save_adapters(path, layers, NAMES, SHAPES, dtype=dtype, metadata=metadata or {})


def read(path: Path) -> dict[str, LoRAWeights]:
    return read_lora(path, [NAMES], shapes=SHAPES).layers


def test_keys_are_those_of_comfyui(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, weights(), dtype=torch.bfloat16, metadata={"ss_seed": "1"})
    tensors = load_file(path)
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    assert tensors[f"{name}.lora_A.weight"].shape == (2, 4)
    assert tensors[f"{name}.lora_B.weight"].shape == (12, 2)
    assert tensors[f"{name}.lora_B.weight"].dtype == torch.bfloat16
    assert tensors[f"{name}.alpha"].item() == 1.5
    assert len(tensors) == 6
    with safe_open(path, "pt") as file:
        assert {"ss_seed": "1"}.items() <= file.metadata().items()


def test_a_lora_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, weights())
    for name, lora in read(path).items():
        assert torch.equal(lora.down, weights()[name].down)
        assert torch.equal(lora.up, weights()[name].up)
        assert lora.alpha == 1.5


def test_alpha_is_the_rank_when_the_file_has_none(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, weights())
    save_file({k: v for k, v in load_file(path).items() if "alpha" not in k}, path)
    assert {lora.alpha for lora in read(path).values()} == {2.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_never_written(tmp_path: Path, value: float) -> None:
    broken = weights()
    broken["single_blocks.3.linear1"].up[1, 1] = value
    with pytest.raises(CheckpointError, match=r"single_blocks.3.linear1.lora_B.weight became NaN"):
        save(tmp_path / "a.safetensors", broken)
    assert list(tmp_path.iterdir()) == []


def test_a_value_too_large_for_fp16_is_found(tmp_path: Path) -> None:
    large = weights()
    large["single_blocks.3.linear1"].up[0, 0] = 1e6
    with pytest.raises(CheckpointError, match="infinite"):
        save(tmp_path / "a.safetensors", large, dtype=torch.float16)


def test_a_name_that_is_no_layer_of_the_model_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layer"):
        wrong = {"double_blocks.9.nothing": weights()["single_blocks.3.linear1"]}
        save(tmp_path / "a.safetensors", wrong)


def change_key(old: str, new: str):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


NAME = "diffusion_model.single_blocks.3.linear1"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (change_key("single_blocks.3", "single_blocks.4"), "nearest layer is 'single_blocks.3"),
        (change_key("lora_B", "lora_C"), "is not a key of any kind of LoRA"),
        (lambda t: t.pop(f"{NAME}.lora_B.weight"), "factor is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "'extra' is not a key"),
        (
            lambda t: t.update({f"{NAME}.lora_A.weight": torch.zeros(2, 8)}),
            "made for a model of another size",
        ),
        (lambda t: (t.clear(), t.update({"taesd_encoder.0.weight": torch.zeros(1)})), "TAESD"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_in_one_sentence(
    tmp_path: Path, change, sentence: str
) -> None:
    path = tmp_path / "a.safetensors"
    save(path, weights())
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
