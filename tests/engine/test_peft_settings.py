from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from pack.engine.adapter_weights import LoKrWeights, LoRAWeights, delta
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.errors import CheckpointError
from pack.engine.lora_file import read_lora
from safetensors.torch import save_file

QWEN = LAYER_NAMES["qwen_image"]
QUERY, KEY = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"


def write(path: Path, prefix: str, metadata: dict[str, str], *, alpha: float | None = None) -> None:
    tensors = {}
    for module in (QUERY, KEY):
        tensors[f"{prefix}{module}.lora_A.weight"] = torch.ones(4, 6)
        tensors[f"{prefix}{module}.lora_B.weight"] = torch.ones(6, 4)
        if alpha is not None:
            tensors[f"{prefix}{module}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, metadata)


def scales(path: Path) -> dict[str, float]:
    read = read_lora(path, [QWEN])
    assert all(isinstance(each, LoRAWeights) for each in read.layers.values())
    return {name: each.scale for name, each in read.layers.items() if isinstance(each, LoRAWeights)}


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_alpha_of_each_module_comes_from_the_header_of_diffusers(
    tmp_path: Path, prefix: str
) -> None:
    path = tmp_path / "a.safetensors"
    settings = {"r": 8, "lora_alpha": 16, "alpha_pattern": {f"^{KEY}": 2}, "rank_pattern": {}}
    named = {f"{prefix}{key}": value for key, value in settings.items()}
    write(path, prefix, {"lora_adapter_metadata": json.dumps(named)})
    assert scales(path) == {QUERY: 4.0, KEY: 0.5}
    assert "alpha was taken from the header" in read_lora(path, [QWEN]).remarks


def test_alpha_of_the_keys_wins_over_the_header(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    settings = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 16})
    write(path, "transformer.", {"lora_adapter_metadata": settings}, alpha=2.0)
    assert scales(path) == {QUERY: 0.5, KEY: 0.5}
    assert read_lora(path, [QWEN]).remarks == ()


def test_rank_stabilised_loras_are_divided_by_the_root_of_the_rank(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    settings = json.dumps({"r": 4, "lora_alpha": 3, "use_rslora": True})
    write(path, "", {"lora_adapter_metadata": settings})
    assert set(scales(path).values()) == {3 / math.sqrt(4)}


def test_pefts_own_files_have_their_settings_beside_them(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    write(path, "base_model.model.", {})
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {"attn.to_k": 1}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert scales(path) == scales(tmp_path) == {QUERY: 2.0, KEY: 0.25}
    other = tmp_path / "another.safetensors"
    path.rename(other)
    assert set(scales(other).values()) == {1.0}


def test_peft_scales_lokr_without_factors_too(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    w1, w2 = torch.randn(2, 3), torch.randn(3, 2)
    save_file({f"{QUERY}.lokr_w1": w1, f"{QUERY}.lokr_w2": w2}, path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, "alpha": 2}))
    found = read_lora(path, [QWEN]).layers[QUERY]
    assert isinstance(found, LoKrWeights)
    torch.testing.assert_close(delta(found), torch.kron(w1, w2) / 4)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("{", "not readable JSON"),
        ("[1]", "not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
        ('{"r": 0, "lora_alpha": 1}', "r is 0"),
        ('{"r": 4, "lora_alpha": "big"}', "lora_alpha is 'big'"),
        ('{"r": 4, "lora_alpha": 1e400}', "lora_alpha is inf"),
        ('{"r": 4, "lora_alpha": NaN}', "lora_alpha is nan"),
        ('{"r": 4, "lora_alpha": true}', "lora_alpha is True"),
        ('{"lora_alpha": 1, "alpha_pattern": [1]}', "alpha_pattern is not a table"),
        ('{"lora_alpha": 1, "alpha_pattern": {"(a+)+$": 1}}', "regular expression"),
        ('{"lora_alpha": 1, "alpha_pattern": {"a": null}}', "alpha_pattern is None"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(
    tmp_path: Path, settings: str, sentence: str
) -> None:
    path = tmp_path / "a.safetensors"
    write(path, "", {"lora_adapter_metadata": settings})
    with pytest.raises(CheckpointError, match=sentence) as caught:
        read_lora(path, [QWEN])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))
