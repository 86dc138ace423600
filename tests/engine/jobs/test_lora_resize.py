from __future__ import annotations

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
from pack.engine.errors import CheckpointError, ConfigError, NotFiniteError
from pack.engine.events import Progress
from pack.engine.jobs.lora_resize import run
from pack.engine.lora_file import read_lora, write_lora
from pack.engine.low_rank import RankChoice
from pack.tests.references import random_adapters, tiny_checkpoints
from pack.tests.references.random_adapters import Draw
from safetensors.torch import load_file
from torch import Tensor

NAMES = LAYER_NAMES["flux_kontext"]
LAYERS = (
    "double_blocks.0.img_attn.qkv",
    "double_blocks.1.img_attn.qkv",
    "double_blocks.0.txt_mlp.2",
    "single_blocks.0.linear1",
)


def with_spectrum(shape: tuple[int, int], singular: Tensor, seed: int = 0) -> LoRAWeights:
    """A LoRA that adds a matrix with these singular values; alpha is not its rank."""
    draw = Draw(seed)
    left, right = (torch.linalg.qr(draw(size, len(singular), std=1.0).double()).Q for size in shape)
    return LoRAWeights(
        down=right.mT.float(), up=(left * singular).float() * 4, alpha=len(singular) / 4
    )


def save(path: Path, layers: dict[str, AdapterWeights], **options) -> Path:
    settings = {"dtype": torch.float32, "metadata": {}} | options
    settings["metadata"] = {"ss_base_model_version": "flux_kontext"} | settings["metadata"]
    write_lora(path, layers, NAMES, **settings)
    return path


def layers_of(path: Path) -> dict[str, AdapterWeights]:
    return read_lora(path, [NAMES]).layers


def relative(exact: AdapterWeights, other: AdapterWeights) -> float:
    exact_weight = delta(exact, torch.float64)
    return float((exact_weight - delta(other, torch.float64)).norm() / exact_weight.norm())


SINGULAR = torch.logspace(0, -3, 12).double()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    layers = {
        name: with_spectrum((48, 32), SINGULAR ** (1 + index), seed=index)
        for index, name in enumerate(LAYERS)
    }
    return save(tmp_path / "source.safetensors", layers)


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_every_layer_becomes_the_best_of_its_rank(source: Path, tmp_path: Path, rank: int) -> None:
    output = tmp_path / "output.safetensors"
    run(source=source, output=output, ranks=RankChoice(rank=rank))
    before, after = layers_of(source), layers_of(output)
    assert list(after) == list(before)
    for index, name in enumerate(LAYERS):
        adapter = after[name]
        assert adapter.rank == rank and adapter.scale == 1
        singular = SINGULAR ** (1 + index)
        best = float(singular[rank:].norm() / singular.norm())
        # The layer itself was rounded to float32, twice.
        assert relative(before[name], adapter) == pytest.approx(best, rel=1e-4, abs=5e-7)


def test_a_rank_is_chosen_for_each_layer(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "output.safetensors"
    result = run(source=source, output=output, ranks=RankChoice(amount=0.99))
    after = layers_of(output)
    for index, name in enumerate(LAYERS):
        squares = (SINGULAR ** (1 + index)).square()
        parts = squares.cumsum(0) / squares.sum()
        assert after[name].rank == int((parts < 0.99).sum()) + 1
        assert relative(layers_of(source)[name], after[name]) <= 0.1
    assert result.picture is not None and result.picture.size == (960, 540)


def test_the_report_says_what_was_lost(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "output.safetensors"
    result = run(source=source, output=output, ranks=RankChoice(rank=2))
    before, after = layers_of(source), layers_of(output)
    errors = {name: relative(before[name], after[name]) for name in LAYERS}
    worst = max(errors, key=lambda name: errors[name])
    assert f"largest error of a layer: {100 * errors[worst]:.3g} %, {worst}" in result.report
    squares = {name: float(delta(before[name]).double().square().sum()) for name in LAYERS}
    total = sum(squares[name] * errors[name] ** 2 for name in LAYERS) / sum(squares.values())
    last = next(line for line in result.report.splitlines() if line.startswith("all "))
    assert last.split() == ["all", "4", "12", "2", f"{100 * total**0.5:.3g}", "%"]
    assert "double_blocks.0-1.img_attn.qkv" in result.report
    assert f"{source.stat().st_size / 1024:.1f} KiB -> {output.stat().st_size / 1024:.1f} KiB" in (
        result.report
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_of_no_higher_rank_keep_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    draw = Draw(0)
    layers: dict[str, AdapterWeights] = {
        name: random_adapters.lora(draw(48, 32, std=1.0), draw, 4) for name in LAYERS
    }
    source = save(tmp_path / "source.safetensors", layers, dtype=dtype)
    output = tmp_path / "output.safetensors"
    run(source=source, output=output, ranks=RankChoice(rank=4))
    before, after = load_file(source), load_file(output)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(before[key].dtype == after[key].dtype for key in before)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_other_kinds_become_loras(tmp_path: Path, kind: str) -> None:
    draw = Draw(1)
    make = getattr(random_adapters, kind)
    layers = {name: make(draw(64, 48, std=1.0), draw, 2) for name in LAYERS}
    metadata = {"ss_network_module": f"networks.{kind}", "ss_network_args": "{}"}
    source = save(tmp_path / "source.safetensors", layers, metadata=metadata)
    output = tmp_path / "output.safetensors"
    run(source=source, output=output, ranks=RankChoice(amount=1.0))
    after = layers_of(output)
    for name in LAYERS:
        assert isinstance(after[name], LoRAWeights)
        assert relative(layers[name], after[name]) < 2e-6
    header = read_lora(output, [NAMES]).metadata
    assert header["ss_network_module"] == "networks.lora" and "ss_network_args" not in header


def test_convolutions_keep_their_kernel(tmp_path: Path) -> None:
    names = LAYER_NAMES["wan"]
    draw = Draw(2)
    lora = random_adapters.lora(draw(32, 8, 1, 2, 2, std=1.0), draw, 6)
    source = tmp_path / "source.safetensors"
    write_lora(source, {"patch_embedding": lora}, names, dtype=torch.float32, metadata={})
    output = tmp_path / "output.safetensors"
    run(source=source, output=output, ranks=RankChoice(rank=3))
    after = read_lora(output, [names]).layers["patch_embedding"]
    assert after.rank == 3 and after.shape == (32, 8, 1, 2, 2)
    singular = torch.linalg.svdvals(delta(lora, torch.float64).flatten(1))
    best = float(singular[3:].norm() / singular.norm())
    assert relative(lora, after) == pytest.approx(best, rel=1e-4)


def test_biases_and_norms_stay_as_they_are(tmp_path: Path) -> None:
    draw = Draw(3)
    lora = random_adapters.lora(draw(48, 32, std=1.0), draw, 4)
    biased = type(lora)(**{**vars(lora), "bias_diff": draw(48, std=1.0)})
    norm = FullWeights(draw(16, std=1.0))
    names = LAYER_NAMES["wan"]
    layers = {"blocks.0.ffn.0": biased, "blocks.0.norm3": norm}
    source = tmp_path / "source.safetensors"
    write_lora(source, layers, names, dtype=torch.float32, metadata={})
    output = tmp_path / "output.safetensors"
    run(source=source, output=output, ranks=RankChoice(rank=2))
    after = read_lora(output, [names]).layers
    assert after["blocks.0.ffn.0"].rank == 2
    assert torch.equal(after["blocks.0.ffn.0"].bias_diff, biased.bias_diff)
    assert torch.equal(delta(after["blocks.0.norm3"]), norm.diff)


def test_spelling_and_type_are_those_of_the_source_or_as_asked(
    source: Path, tmp_path: Path
) -> None:
    kohya, output = tmp_path / "kohya.safetensors", tmp_path / "output.safetensors"
    ranks = RankChoice(rank=3)
    run(source=source, output=kohya, ranks=ranks, format="kohya", dtype="fp16")
    run(source=kohya, output=output, ranks=ranks)
    tensors = load_file(output)
    assert all(key.startswith("lora_unet_") for key in tensors)
    assert tensors["lora_unet_single_blocks_0_linear1.lora_down.weight"].dtype == torch.float16


def test_layers_of_text_encoders_are_resized_under_their_keys(tmp_path: Path) -> None:
    draw = Draw(4)
    weight = draw(24, 16, std=1.0)
    lora = random_adapters.lora(weight, draw, 5)
    stem = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    other = {
        f"{stem}.lora_down.weight": lora.down,
        f"{stem}.lora_up.weight": lora.up,
        f"{stem}.alpha": torch.tensor(lora.alpha),
    }
    layers: dict[str, AdapterWeights] = {LAYERS[0]: random_adapters.lora(weight, draw, 4)}
    source = save(tmp_path / "source.safetensors", layers, format="kohya", other=other)
    output = tmp_path / "output.safetensors"
    run(source=source, output=output, ranks=RankChoice(rank=2))
    found = load_file(output)
    after = LoRAWeights(
        found[f"{stem}.lora_down.weight"],
        found[f"{stem}.lora_up.weight"],
        found[f"{stem}.alpha"].item(),
    )
    singular = torch.linalg.svdvals(delta(lora, torch.float64))
    assert after.rank == 2
    assert relative(lora, after) == pytest.approx(
        float(singular[2:].norm() / singular.norm()), rel=1e-4
    )


def test_metadata_are_kept_but_for_ranks_and_hashes(tmp_path: Path) -> None:
    draw = Draw(0)
    lora = random_adapters.lora(draw(48, 32, std=1.0), draw, 4)
    metadata = {
        "ss_base_model_version": "flux_kontext",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_network_module": "networks.lora_flux",
        "ss_seed": "7",
    }
    source = save(tmp_path / "source.safetensors", {LAYERS[0]: lora}, metadata=metadata)
    output = tmp_path / "output.safetensors"
    run(source=source, output=output, ranks=RankChoice(rank=3))
    header = read_lora(output, [NAMES]).metadata
    assert header["ss_seed"] == "7" and header["ss_network_module"] == "networks.lora_flux"
    assert header["ss_network_dim"] == "3" and float(header["ss_network_alpha"]) == 3
    assert header["sshs_model_hash"] != read_lora(source, [NAMES]).metadata["sshs_model_hash"]


def test_progress_counts_layers(source: Path, tmp_path: Path) -> None:
    events: list = []
    run(
        source=source,
        output=tmp_path / "output.safetensors",
        ranks=RankChoice(rank=3),
        report=events.append,
    )
    steps = [event for event in events if isinstance(event, Progress)]
    assert [step.done for step in steps] == [0, 1, 2, 3, 4] and steps[-1].total == 4


def test_files_are_written_over_only_if_that_is_allowed_and_never_the_source(
    source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output.safetensors"
    ranks = RankChoice(rank=3)
    run(source=source, output=output, ranks=ranks)
    with pytest.raises(ConfigError, match="exists"):
        run(source=source, output=output, ranks=ranks)
    run(source=source, output=output, ranks=ranks, overwrite=True)
    before = source.read_bytes()
    with pytest.raises(ConfigError, match="one of those that are read"):
        run(source=source, output=source, ranks=ranks, overwrite=True)
    assert source.read_bytes() == before


def test_a_magnitude_is_refused_in_one_sentence(tmp_path: Path) -> None:
    draw = Draw(5)
    lora = random_adapters.lora(draw(48, 32, std=1.0), draw, 4)
    dora = type(lora)(**{**vars(lora), "magnitude": torch.ones(1, 32)})
    source = save(tmp_path / "source.safetensors", {LAYERS[0]: dora})
    output = tmp_path / "output.safetensors"
    with pytest.raises(CheckpointError, match="magnitude") as caught:
        run(source=source, output=output, ranks=RankChoice(rank=2))
    assert LAYERS[0] in str(caught.value) and "\n" not in str(caught.value)
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": "fp8"}, "choose bf16, fp16 or fp32"),
        ({"architecture": "flux"}, "'flux_kontext'"),
        ({"format": "a1111"}, "a1111"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    source: Path, tmp_path: Path, options: dict, sentence: str
) -> None:
    output = tmp_path / "output.safetensors"
    with pytest.raises(ConfigError, match=sentence):
        run(source=source, output=output, ranks=RankChoice(rank=2), **options)
    assert not output.exists()


def test_numbers_too_large_for_the_type_are_refused(tmp_path: Path) -> None:
    lora = with_spectrum((48, 32), torch.tensor([1e12, 1.0]).double())
    source = save(tmp_path / "source.safetensors", {LAYERS[0]: lora})
    with pytest.raises(NotFiniteError, match="infinite"):
        run(
            source=source,
            output=tmp_path / "output.safetensors",
            ranks=RankChoice(rank=1),
            dtype="fp16",
        )


STEM = "lora_te1_layer"
PLAIN = {
    f"{STEM}.lora_down.weight": torch.ones(2, 4),
    f"{STEM}.lora_up.weight": torch.ones(6, 2),
    f"{STEM}.alpha": torch.tensor(2),
}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({f"{STEM}.hada_w1_a": torch.ones(4, 2)}, "text encoder and no plain LoRA"),
        ({f"{STEM}.lora_down.weight": torch.ones(3, 4)}, "text encoder and no plain LoRA"),
        ({f"{STEM}.lora_down.weight": torch.ones(())}, "text encoder and no plain LoRA"),
        ({f"{STEM}.lora_down.weight": torch.ones(0, 4)}, "text encoder and no plain LoRA"),
        ({f"{STEM}.lora_up.weight": torch.ones(6)}, "text encoder and no plain LoRA"),
        ({f"{STEM}.alpha": torch.ones(3)}, "text encoder and no plain LoRA"),
        ({"lora_te1_b.alpha": torch.ones(())}, "text encoder and no plain LoRA"),
        ({f"{STEM}.alpha": torch.tensor(float("nan"))}, "is NaN or infinite"),
        ({f"{STEM}.lora_up.weight": torch.full((6, 2), float("inf"))}, "is NaN or infinite"),
    ],
)
def test_text_encoders_of_another_kind_are_refused(
    tmp_path: Path, change: dict[str, Tensor], sentence: str
) -> None:
    draw = Draw(0)
    lora = random_adapters.lora(draw(48, 32, std=1.0), draw, 4)
    source = save(tmp_path / "source.safetensors", {LAYERS[0]: lora}, other=PLAIN | change)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        run(source=source, output=tmp_path / "o.safetensors", ranks=RankChoice(rank=1))
    assert "\n" not in str(caught.value)


def test_a_whole_model_in_bf16_is_resized(tmp_path: Path) -> None:
    layers = random_adapters.lora_everywhere(tiny_checkpoints.flux())
    source = save(tmp_path / "source.safetensors", layers, dtype=torch.bfloat16)
    output = tmp_path / "output.safetensors"
    run(source=source, output=output, ranks=RankChoice(amount=0.9))
    after = layers_of(output)
    assert after.keys() == layers.keys()
    for name, adapter in layers.items():
        stored = converted(adapter, torch.bfloat16)
        # At most a tenth of the energy, and what rounding to bf16 adds.
        assert relative(stored, after[name]) <= 0.1**0.5 + 2**-8
