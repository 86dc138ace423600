from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pack.engine.adapter_weights import FullWeights, LoRAWeights, delta
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.errors import CheckpointError, ConfigError
from pack.engine.events import Progress
from pack.engine.jobs.lora_extract import ExtractSettings, run
from pack.engine.jobs.tool_result import ToolResult
from pack.engine.lora_file import LoRAFile, read_lora
from pack.engine.low_rank import RankChoice
from pack.tests.references import tiny_checkpoints
from pack.tests.references.checkpoint_layouts import as_diffusers, save_split
from pack.tests.references.random_adapters import Draw
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
LAYERS = (
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.img_mod.lin",
    "double_blocks.0.txt_mlp.2",
    "single_blocks.0.linear1",
    "final_layer.adaLN_modulation.1",
)
RANKS = {name: 1 + 2 * index for index, name in enumerate(LAYERS)}
FP32 = ExtractSettings(dtype="fp32", device="cpu")


def low_rank_change(shape: torch.Size, rank: int, draw: Draw) -> Tensor:
    """A matrix whose singular values are all 0.5."""
    left, right = (torch.linalg.qr(draw(size, rank, std=1.0)).Q for size in shape)
    return 0.5 * left @ right.T


@pytest.fixture
def base() -> State:
    return tiny_checkpoints.flux()


@pytest.fixture
def changes(base: State) -> State:
    draw = Draw(1)
    return {
        name: low_rank_change(base[f"{name}.weight"].shape, RANKS[name], draw) for name in LAYERS
    }


def tuned_of(base: State, changes: State) -> State:
    return base | {f"{n}.weight": base[f"{n}.weight"] + change for n, change in changes.items()}


def save(path: Path, state: State) -> Path:
    save_file(state, path)
    return path


def extract(
    tmp_path: Path,
    tuned: State | Path,
    base: State | Path,
    ranks: RankChoice | None = None,
    settings: ExtractSettings = FP32,
    **options,
) -> tuple[ToolResult, LoRAFile]:
    paths = [
        each if isinstance(each, Path) else save(tmp_path / f"{name}.safetensors", each)
        for name, each in (("tuned", tuned), ("base", base))
    ]
    output = tmp_path / "output.safetensors"
    result = run(
        tuned=paths[0],
        base=paths[1],
        output=output,
        ranks=ranks or RankChoice(amount=0.9999),
        settings=settings,
        **options,
    )
    return result, read_lora(output, LAYER_NAMES.values())


def relative(expected: Tensor, adapter) -> float:
    return float((expected - delta(adapter)).norm() / expected.norm())


def check_recovered(file: LoRAFile, changes: State, tolerance: float) -> None:
    assert file.names.family == "flux_kontext"
    assert file.layers.keys() == changes.keys()
    for name, change in changes.items():
        assert file.layers[name].rank == RANKS[name], name
        assert relative(change, file.layers[name]) < tolerance, name


def test_a_change_of_low_rank_is_found_with_its_rank(
    tmp_path: Path, base: State, changes: State
) -> None:
    result, file = extract(tmp_path, tuned_of(base, changes), base)
    # Weights near 0.1 are rounded to 2^-28, entries of the changes are near 0.005.
    check_recovered(file, changes, 1e-5)
    assert "5 extracted" in result.report
    assert all(adapter.scale == 1 for adapter in file.layers.values())


def as_split(folder: Path, state: State) -> Path:
    return save_split(folder, state)


def as_pipeline(folder: Path, state: State) -> Path:
    save_split(folder / "transformer", as_diffusers(state, LAYER_NAMES["flux_kontext"]))
    return folder


def as_comfyui(folder: Path, state: State) -> Path:
    folder.mkdir()
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in state.items()}
    return save(folder / "model.safetensors", prefixed | {"vae.decoder.x": torch.ones(2)})


@pytest.mark.parametrize("base_layout", [as_split, as_pipeline, as_comfyui])
@pytest.mark.parametrize("tuned_layout", [as_split, as_pipeline, as_comfyui])
def test_layouts_are_mixed(
    tmp_path: Path,
    base: State,
    changes: State,
    tuned_layout: Callable[[Path, State], Path],
    base_layout: Callable[[Path, State], Path],
) -> None:
    tuned = tuned_layout(tmp_path / "tuned", tuned_of(base, changes))
    _, file = extract(tmp_path, tuned, base_layout(tmp_path / "base", base))
    check_recovered(file, changes, 1e-5)


def test_models_in_bf16_give_the_change_to_their_rounding(
    tmp_path: Path, base: State, changes: State
) -> None:
    base = {key: tensor.bfloat16() for key, tensor in base.items()}
    tuned = {
        key: tensor.bfloat16()
        for key, tensor in tuned_of({k: t.float() for k, t in base.items()}, changes).items()
    }
    result, file = extract(tmp_path, tuned, base, RankChoice(rank=9), ExtractSettings(device="cpu"))
    for name, change in changes.items():
        difference = tuned[f"{name}.weight"].float() - base[f"{name}.weight"].float()
        singular = torch.linalg.svdvals(difference.double().flatten(1))
        best = float(singular[9:].norm() / singular.norm())
        found = relative(difference, file.layers[name])
        # The factors are rounded to bf16, which adds at most 2^-9 for each side.
        assert best <= found <= best + 2**-8, name
        assert file.layers[name].up.dtype == torch.bfloat16
        # Rounding is noise of full rank, most of which is left out.
        noise = float((difference - change).norm() / change.norm())
        assert relative(change, file.layers[name]) < noise + 2**-8
    assert "rank" in result.report


def test_types_are_mixed(tmp_path: Path, base: State, changes: State) -> None:
    stored = {key: tensor.half() for key, tensor in base.items()}
    tuned = tuned_of({key: tensor.float() for key, tensor in stored.items()}, changes)
    _, file = extract(tmp_path, tuned, stored)
    check_recovered(file, changes, 1e-5)


def test_the_reported_errors_are_those_of_what_is_written(tmp_path: Path, base: State) -> None:
    draw = Draw(2)
    name = "single_blocks.0.linear2"
    change = draw(*base[f"{name}.weight"].shape, std=0.01)
    settings = ExtractSettings(device="cpu")
    result, file = extract(
        tmp_path, tuned_of(base, {name: change}), base, RankChoice(rank=6), settings
    )
    line = next(line for line in result.report.splitlines() if line.startswith("largest error"))
    told = float(line.split(": ")[1].split(" %")[0]) / 100
    assert told == pytest.approx(relative(change, file.layers[name]), rel=5e-3)
    assert result.picture is not None


def test_patterns_choose_among_all_layers(tmp_path: Path, base: State, changes: State) -> None:
    tuned = tuned_of(base, changes)
    settings = ExtractSettings(dtype="fp32", device="cpu", exclude=(r".*(mod|modulation).*",))
    _, file = extract(tmp_path, tuned, base, settings=settings)
    assert file.layers.keys() == {LAYERS[0], LAYERS[2], LAYERS[3]}
    settings = ExtractSettings(dtype="fp32", device="cpu", include=(r"double_blocks\..*",))
    _, file = extract(tmp_path, tuned, base, settings=settings, overwrite=True)
    assert file.layers.keys() == set(LAYERS[:3])


def test_small_differences_are_left_out_and_counted(
    tmp_path: Path, base: State, changes: State
) -> None:
    changes[LAYERS[0]] *= 1e-3
    settings = ExtractSettings(dtype="fp32", device="cpu", min_difference=1e-3)
    result, file = extract(tmp_path, tuned_of(base, changes), base, settings=settings)
    assert file.layers.keys() == set(LAYERS[1:])
    assert "1 weights differ by no more than min_difference" in result.report


def with_changed_rest(base: State, changes: State) -> State:
    tuned = tuned_of(base, changes)
    tuned[f"{LAYERS[0]}.bias"] = base[f"{LAYERS[0]}.bias"] + 0.5
    tuned["img_in.bias"] = base["img_in.bias"] + 0.25
    key = "double_blocks.0.img_attn.norm.query_norm.scale"
    tuned[key] = base[key] + 2
    return tuned


def test_differences_of_biases_and_norms_are_named(
    tmp_path: Path, base: State, changes: State
) -> None:
    result, file = extract(tmp_path, with_changed_rest(base, changes), base)
    assert "3 biases, norms and other parameters differ, by up to 2" in result.report
    assert "not in the LoRA" in result.report
    check_recovered(file, changes, 1e-5)


def test_differences_of_biases_and_norms_are_taken_if_wanted(
    tmp_path: Path, base: State, changes: State
) -> None:
    settings = ExtractSettings(dtype="fp32", device="cpu", full_rest=True)
    _, file = extract(tmp_path, with_changed_rest(base, changes), base, settings=settings)
    norm = file.layers["double_blocks.0.img_attn.norm.query_norm"]
    assert isinstance(norm, FullWeights)
    torch.testing.assert_close(delta(norm), torch.full((128,), 2.0))
    both = file.layers[LAYERS[0]]
    assert isinstance(both, LoRAWeights)
    assert relative(changes[LAYERS[0]], both) < 1e-5
    torch.testing.assert_close(both.bias_diff, torch.full((384,), 0.5), atol=1e-6, rtol=0)
    only_bias = file.layers["img_in"]
    assert only_bias.shape is None
    torch.testing.assert_close(only_bias.bias_diff, torch.full((128,), 0.25), atol=1e-6, rtol=0)


def test_modulation_of_wan_is_no_low_rank_layer(tmp_path: Path) -> None:
    base = tiny_checkpoints.wan()
    tuned = dict(base)
    tuned["blocks.0.modulation"] = base["blocks.0.modulation"] + 0.5
    tuned["patch_embedding.weight"] = base["patch_embedding.weight"] + 0.5
    settings = ExtractSettings(dtype="fp32", device="cpu", full_rest=True)
    _, file = extract(tmp_path, tuned, base, settings=settings)
    embedding = file.layers["patch_embedding"]
    assert isinstance(embedding, LoRAWeights)
    assert embedding.rank == 1 and embedding.shape == base["patch_embedding.weight"].shape
    change = torch.full(embedding.shape, 0.5)
    assert relative(change, embedding) < 1e-5
    torch.testing.assert_close(
        delta(file.layers["blocks.0.modulation"]).flatten(),
        torch.full_like(base["blocks.0.modulation"], 0.5).flatten(),
        atol=1e-6,
        rtol=0,
    )


def test_clamping_costs_accuracy_which_the_report_shows(
    tmp_path: Path, base: State, changes: State
) -> None:
    tuned = tuned_of(base, changes)
    ranks = RankChoice(rank=9)
    plain, _ = extract(tmp_path, tuned, base, ranks)
    settings = ExtractSettings(dtype="fp32", device="cpu", clamp_quantile=0.9)
    clamped, file = extract(tmp_path, tuned, base, ranks, settings, overwrite=True)
    lora = file.layers[LAYERS[3]]
    assert isinstance(lora, LoRAWeights)
    numbers = torch.cat([lora.up.flatten(), lora.down.flatten()]).abs()
    at_limit = int((numbers == numbers.max()).sum())
    assert at_limit == len(numbers) - round(0.9 * len(numbers)) + 1
    errors = [result.report.splitlines()[-2] for result in (plain, clamped)]
    assert "largest error of a layer" in errors[0] and errors[0] != errors[1]


def test_the_same_models_give_the_same_file(tmp_path: Path, base: State, changes: State) -> None:
    tuned = tuned_of(base, changes)
    _, first = extract(tmp_path, tuned, base, RankChoice(rank=2))
    _, second = extract(tmp_path, tuned, base, RankChoice(rank=2), overwrite=True)
    for name, adapter in first.layers.items():
        assert torch.equal(adapter.up, second.layers[name].up)


def test_the_file_says_what_it_is_of(tmp_path: Path, base: State, changes: State) -> None:
    events: list = []
    _, file = extract(
        tmp_path, tuned_of(base, changes), base, RankChoice(rank=2), report=events.append
    )
    assert file.metadata["ss_base_model_version"] == "flux_kontext"
    assert file.metadata["ss_network_module"] == "networks.lora"
    assert file.metadata["modelspec.title"] == "output"
    assert "tuned.safetensors - base.safetensors" in file.metadata["lora_loom.operation"]
    steps = [event for event in events if isinstance(event, Progress)]
    assert steps[-1].done == steps[-1].total == sum(t.dim() > 1 for t in base.values())


def test_quantized_models_are_told_of(tmp_path: Path, base: State, changes: State) -> None:
    tuned = tuned_of(base, changes)
    key = f"{LAYERS[3]}.weight"
    scale = tuned[key].abs().max() / 448
    quantized = tuned | {
        key: (tuned[key] / scale).to(torch.float8_e4m3fn),
        key.removesuffix("weight") + "scale_weight": scale[None],
    }
    result, file = extract(tmp_path, quantized, base, RankChoice(rank=9))
    assert "tuned.safetensors is quantized" in result.report
    # e4m3 is off by up to 1/16; most of that is left out with the other 119 singular values.
    assert relative(changes[LAYERS[3]], file.layers[LAYERS[3]]) < 0.5
    assert relative(changes[LAYERS[0]], file.layers[LAYERS[0]]) < 1e-5


def drop(key: str) -> Callable[[State], State]:
    return lambda state: {k: t for k, t in state.items() if k != key}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s | {"img_in.weight": torch.ones(128, 96)}, "img_in.weight has the shape"),
        (drop("txt_in.weight"), "there is no txt_in.weight"),
        (lambda s: tiny_checkpoints.wan(), "this is a model of wan, but .* of flux_kontext"),
        (lambda s: {"taesd_encoder.0.weight": torch.ones(1)}, "TAESD"),
        (dict, "nothing that would be in the LoRA differs"),
    ],
)
def test_models_that_do_not_belong_together_are_refused_in_one_sentence(
    tmp_path: Path, base: State, change: Callable[[State], State], sentence: str
) -> None:
    with pytest.raises(CheckpointError, match=sentence) as caught:
        extract(tmp_path, change(base), base)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "output.safetensors").exists()


def test_a_layer_of_another_size_can_be_excluded(
    tmp_path: Path, base: State, changes: State
) -> None:
    tuned = tuned_of(base, changes) | {"img_in.weight": torch.ones(128, 96)}
    settings = ExtractSettings(dtype="fp32", device="cpu", exclude=("img_in",))
    _, file = extract(tmp_path, tuned, base, settings=settings)
    check_recovered(file, changes, 1e-5)


def test_a_model_is_never_written_over(tmp_path: Path, base: State, changes: State) -> None:
    tuned = save(tmp_path / "output.safetensors", tuned_of(base, changes))
    with pytest.raises(ConfigError, match="one of those that are read"):
        extract(tmp_path, tuned, base, overwrite=True)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ExtractSettings(min_difference=-1), "min_difference = -1"),
        (lambda: ExtractSettings(min_difference=float("nan")), "min_difference = nan"),
        (lambda: ExtractSettings(clamp_quantile=0), "clamp_quantile = 0"),
        (lambda: ExtractSettings(clamp_quantile=1.5), "clamp_quantile = 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_what_needs_all_singular_values_is_refused(tmp_path: Path, base: State) -> None:
    with pytest.raises(ConfigError, match="choose energy, frobenius or ratio"):
        extract(tmp_path, base, base, RankChoice(method="cumulative", amount=0.5))


def test_patterns_without_a_layer_are_refused(tmp_path: Path, base: State) -> None:
    settings = ExtractSettings(dtype="fp32", device="cpu", include=("double_block",))
    with pytest.raises(ConfigError, match="matches none"):
        extract(tmp_path, base, base, settings=settings)
