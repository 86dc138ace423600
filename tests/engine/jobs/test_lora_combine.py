from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pack.engine.adapter_weights import (
    AdapterWeights,
    FullWeights,
    LoRAWeights,
    converted,
    delta,
)
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.errors import CheckpointError, ConfigError
from pack.engine.jobs.lora_combine import run
from pack.engine.lora_file import read_lora, write_lora
from pack.engine.low_rank import RankChoice
from pack.tests.references import random_adapters, tiny_checkpoints
from pack.tests.references.random_adapters import Draw
from safetensors.torch import load_file
from torch import Tensor

NAMES = LAYER_NAMES["flux_kontext"]
A, B, C = "double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.2", "single_blocks.0.linear2"


def save(path: Path, layers: dict[str, AdapterWeights], **options) -> Path:
    settings = {"dtype": torch.float32, "metadata": {}} | options
    settings["metadata"] = {"ss_base_model_version": "flux_kontext"} | settings["metadata"]
    write_lora(path, layers, NAMES, **settings)
    return path


def adapter_of(kind: str, seed: int, rank: int) -> AdapterWeights:
    draw = Draw(seed)
    weight = draw(48, 32, std=1.0)
    if kind == "full":
        return FullWeights(draw(48, 32, std=0.5))
    return getattr(random_adapters, kind)(weight, draw, rank)


def combine(tmp_path: Path, *sources: tuple[Path, float], **options):
    output = tmp_path / "output.safetensors"
    return run(sources=sources, output=output, **options), read_lora(output, [NAMES])


def relative(expected: Tensor, adapter: AdapterWeights) -> float:
    return float((expected - delta(adapter, torch.float64)).norm() / expected.norm())


def exactly(adapter: AdapterWeights) -> Tensor:
    return delta(adapter, torch.float64)


def test_layers_are_the_weighted_sums_of_those_that_have_them(tmp_path: Path) -> None:
    first = {A: adapter_of("lora", 0, 3), B: adapter_of("lora", 1, 2)}
    second = {A: adapter_of("lora", 2, 4), C: adapter_of("lora", 3, 5)}
    paths = [save(tmp_path / f"{n}.safetensors", x) for n, x in enumerate((first, second))]
    result, file = combine(tmp_path, (paths[0], 0.8), (paths[1], -0.3))
    expected = {
        A: 0.8 * exactly(first[A]) - 0.3 * exactly(second[A]),
        B: 0.8 * exactly(first[B]),
        C: -0.3 * exactly(second[C]),
    }
    assert file.layers.keys() == expected.keys()
    for name, change in expected.items():
        assert relative(change, file.layers[name]) < 1e-6
    assert [file.layers[name].rank for name in (A, B, C)] == [7, 2, 5]
    assert "0.8 x 0.safetensors: 2 layers, rank up to 3" in result.report
    assert "-0.3 x 1.safetensors: 2 layers, rank up to 5" in result.report


@pytest.mark.parametrize("format", ["comfyui", "kohya", "diffusers"])
@pytest.mark.parametrize("other", ["comfyui", "kohya", "diffusers"])
def test_spellings_are_mixed_and_the_first_is_kept(tmp_path: Path, format: str, other: str) -> None:
    state = tiny_checkpoints.flux()
    layers = random_adapters.lora_everywhere(state)
    chosen = {name: layers[name] for name in (A, B, C)}
    paths = [
        save(tmp_path / f"{n}.safetensors", chosen, format=spelling)
        for n, spelling in enumerate((format, other))
    ]
    _, file = combine(tmp_path, (paths[0], 1.0), (paths[1], 0.5))
    assert file.format == format
    for name in (A, B, C):
        assert relative(1.5 * exactly(chosen[name]), file.layers[name]) < 1e-6


@pytest.mark.parametrize("second", ["lora", "loha", "lokr", "full"])
@pytest.mark.parametrize("first", ["lora", "loha", "lokr", "full"])
def test_kinds_are_mixed(tmp_path: Path, first: str, second: str) -> None:
    kinds = [adapter_of(first, 0, 2), adapter_of(second, 1, 3)]
    paths = [save(tmp_path / f"{n}.safetensors", {A: kind}) for n, kind in enumerate(kinds)]
    _, file = combine(tmp_path, (paths[0], 1.0), (paths[1], 2.0))
    expected = exactly(kinds[0]) + 2 * exactly(kinds[1])
    assert relative(expected, file.layers[A]) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equal_weights_and_scales_keep_every_number(tmp_path: Path, dtype: torch.dtype) -> None:
    parts = [converted(adapter_of("lora", seed, 4), dtype) for seed in range(3)]
    paths = [
        save(tmp_path / f"{n}.safetensors", {A: part}, dtype=dtype) for n, part in enumerate(parts)
    ]
    result, file = combine(tmp_path, *((path, 1 / 3) for path in paths))
    assert isinstance(file.layers[A], LoRAWeights)
    assert torch.equal(file.layers[A].down, torch.cat([part.down for part in parts]))
    assert torch.equal(file.layers[A].up, torch.cat([part.up for part in parts], dim=1))
    assert file.layers[A].scale == pytest.approx(parts[0].scale / 3)
    assert "largest error of a layer: 0 %" in result.report


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.float16, torch.float16), torch.float16),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.bfloat16, torch.float32), torch.float32),
    ],
)
def test_the_type_holds_what_all_sources_hold(
    tmp_path: Path, types: tuple[torch.dtype, ...], expected: torch.dtype
) -> None:
    paths = [
        save(tmp_path / f"{n}.safetensors", {A: adapter_of("lora", n, 2)}, dtype=dtype)
        for n, dtype in enumerate(types)
    ]
    _, file = combine(tmp_path, *((path, 1.0) for path in paths))
    assert file.layers[A].up.dtype == expected


def test_a_lower_rank_is_the_best_and_its_error_is_told(tmp_path: Path) -> None:
    parts = [adapter_of("lora", seed, 4) for seed in range(3)]
    paths = [save(tmp_path / f"{n}.safetensors", {A: part}) for n, part in enumerate(parts)]
    result, file = combine(tmp_path, *((path, 1.0) for path in paths), ranks=RankChoice(rank=5))
    expected = sum(exactly(part) for part in parts)
    singular = torch.linalg.svdvals(expected)
    best = float(singular[5:].norm() / singular.norm())
    assert file.layers[A].rank == 5
    assert relative(expected, file.layers[A]) == pytest.approx(best, rel=1e-5)
    assert f"largest error of a layer: {100 * best:.3g} %, {A}" in result.report


def test_what_cancels_leaves_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {A: adapter_of("lora", 0, 3)})
    _, file = combine(tmp_path, (path, 1.0), (path, -1.0), ranks=RankChoice(amount=0.99))
    assert file.layers[A].rank == 1
    assert not exactly(file.layers[A]).any()


def test_differences_of_biases_and_norms_add_up(tmp_path: Path) -> None:
    names = LAYER_NAMES["wan"]
    lora = adapter_of("lora", 0, 3)
    biased = replace(lora, bias_diff=torch.arange(48.0))
    norm = FullWeights(torch.arange(16.0))
    path = tmp_path / "a.safetensors"
    layers = {"blocks.0.ffn.0": biased, "blocks.0.norm3": norm}
    write_lora(path, layers, names, dtype=torch.float32, metadata={})
    output = tmp_path / "output.safetensors"
    run(sources=[(path, 1.0), (path, 1.0)], output=output, ranks=RankChoice(rank=3))
    file = read_lora(output, [names])
    assert torch.equal(file.layers["blocks.0.ffn.0"].bias_diff, 2 * torch.arange(48.0))
    assert torch.equal(delta(file.layers["blocks.0.norm3"]), 2 * torch.arange(16.0))


def test_layers_of_text_encoders_add_up_under_their_keys(tmp_path: Path) -> None:
    stem = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    paths: list[Path] = []
    text: list[LoRAWeights] = []
    for seed in range(2):
        lora = adapter_of("lora", seed, 2 + seed)
        assert isinstance(lora, LoRAWeights)
        other = {f"{stem}.lora_down.weight": lora.down, f"{stem}.lora_up.weight": lora.up}
        other |= {f"{stem}.alpha": torch.tensor(lora.alpha)} if seed else {}
        text.append(lora if seed else replace(lora, alpha=float(lora.rank)))
        name = tmp_path / f"{seed}.safetensors"
        paths.append(save(name, {A: adapter_of("lora", 9, 2)}, other=other, format="kohya"))
    combine(tmp_path, (paths[0], 1.0), (paths[1], 0.5))
    found = load_file(tmp_path / "output.safetensors")
    up, down = found[f"{stem}.lora_up.weight"], found[f"{stem}.lora_down.weight"]
    sum_of_both = LoRAWeights(down, up, found[f"{stem}.alpha"].item())
    expected = exactly(text[0]) + 0.5 * exactly(text[1])
    assert relative(expected, sum_of_both) < 1e-6
    assert len(found) == 6


def test_metadata_name_what_was_combined(tmp_path: Path) -> None:
    paths = [
        save(tmp_path / f"{name}.safetensors", {A: adapter_of("lora", 0, 2)}, metadata=metadata)
        for name, metadata in (("a", {"ss_seed": "1"}), ("b", {"ss_seed": "2"}))
    ]
    _, file = combine(tmp_path, (paths[0], 1.0), (paths[1], 0.5))
    assert "ss_seed" not in file.metadata
    assert file.metadata["ss_base_model_version"] == "flux_kontext"
    assert file.metadata["ss_network_dim"] == "4"
    assert "1 x a.safetensors, 0.5 x b.safetensors" in file.metadata["lora_loom.operation"]


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_a_weight_that_means_nothing_is_refused(tmp_path: Path, weight: float) -> None:
    path = save(tmp_path / "a.safetensors", {A: adapter_of("lora", 0, 3)})
    with pytest.raises(ConfigError, match="a weight of"):
        combine(tmp_path, (path, weight))


def test_no_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no LoRA is given"):
        combine(tmp_path)


def test_loras_of_different_models_are_refused(tmp_path: Path) -> None:
    flux = save(tmp_path / "a.safetensors", {A: adapter_of("lora", 0, 3)})
    wan = tmp_path / "b.safetensors"
    layers = {"blocks.0.ffn.0": adapter_of("lora", 0, 3)}
    write_lora(wan, layers, LAYER_NAMES["wan"], dtype=torch.float32, metadata={})
    with pytest.raises(CheckpointError, match="is for wan, but .* is for flux_kontext") as caught:
        combine(tmp_path, (flux, 1.0), (wan, 1.0))
    assert "\n" not in str(caught.value)


def test_loras_of_different_sizes_are_refused(tmp_path: Path) -> None:
    draw = Draw(0)
    other = random_adapters.lora(draw(24, 32, std=1.0), draw, 2)
    paths = [
        save(tmp_path / f"{n}.safetensors", {A: adapter})
        for n, adapter in enumerate((adapter_of("lora", 0, 2), other))
    ]
    with pytest.raises(CheckpointError, match=r"\[24, 32\], but .* \[48, 32\]"):
        combine(tmp_path, *((path, 1.0) for path in paths))


def test_a_magnitude_is_refused(tmp_path: Path) -> None:
    dora = replace(adapter_of("lora", 0, 2), magnitude=torch.ones(1, 32))
    path = save(tmp_path / "a.safetensors", {A: dora})
    with pytest.raises(CheckpointError, match="magnitude"):
        combine(tmp_path, (path, 1.0))
