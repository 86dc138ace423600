"""Whole trainings of every kind of network."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine import optimizers
from pack.engine.adapter_weights import LoHaWeights, LoKrWeights, LoRAWeights, delta
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.config_file import load_config
from pack.engine.errors import CheckpointError, ConfigError, EngineError
from pack.engine.events import Event, Message
from pack.engine.jobs.generate import load_with_loras
from pack.engine.jobs.outputs import RunFiles
from pack.engine.jobs.step import OptimizerStep
from pack.engine.lora_file import LoRAFile, read_lora, save_adapters
from pack.engine.loss_history import read_history
from pack.engine.training_state import read_progress
from pack.engine.weights import open_checkpoint
from pack.tests.engine.jobs import tiny
from pack.tests.engine.jobs.test_train import assert_same_run, run, run_and_stop
from safetensors.torch import load_file

FLUX = FluxKontext()
LAYER = "single_blocks.1.linear2"
NETWORKS: dict[str, dict[str, Any]] = {
    "lora plus": {"network_args": ["loraplus_lr_ratio=4"]},
    "dropout": {"network_dropout": 0.2, "network_args": ["rank_dropout=0.2", "module_dropout=0.2"]},
    "dora": {"network_args": ["dora_wd=True"]},
    "loha": {"network_module": "networks.loha", "network_args": ["rank_dropout=0.1"]},
    "lokr": {"network_module": "networks.lokr", "network_args": ["factor=8"]},
    "norms": {"scale_weight_norms": 0.5},
    "ranks": {"network_args": [r"rank_patterns={r'double_blocks\..*': (2, 1.0)}"]},
}
SLOW = {"gradient_checkpointing": True, "max_train_steps": 4}


def lora_of(folder: Path) -> LoRAFile:
    return read_lora(RunFiles(folder, "tiny").lora, [FLUX.layer_names])


def told(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Message)]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_trains_and_a_stopped_run_continues_to_the_same_bits(
    training: dict[str, Any], tmp_path: Path, name: str
) -> None:
    settings = training | SLOW | NETWORKS[name]
    run(settings, output_dir=tmp_path / "whole")
    run_and_stop(2, settings, output_dir=tmp_path / "parts")
    run(settings, output_dir=tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    kinds = {"loha": LoHaWeights, "lokr": LoKrWeights}
    layers = lora_of(tmp_path / "whole").layers
    assert len(layers) == 2 * 8 + 4 * 2
    assert {type(layer) for layer in layers.values()} == {kinds.get(name, LoRAWeights)}
    assert all(delta(layer).any() for layer in layers.values())


def test_the_up_side_has_its_own_rate_from_warm_up_to_the_end(
    training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, float]] = []
    update = OptimizerStep.update

    def look(take_step: OptimizerStep) -> torch.Tensor:
        seen.append(optimizers.learning_rates(take_step.optimizer))
        return update(take_step)

    monkeypatch.setattr(OptimizerStep, "update", look)
    run(
        training,
        output_dir=tmp_path,
        lr_scheduler="rex",
        lr_warmup_steps=2,
        max_train_steps=6,
        network_args=["loraplus_lr_ratio=4"],
    )
    assert len(seen) == 6 and all(rates.keys() == {"lora", "lora plus"} for rates in seen)
    assert all(rates["lora plus"] == pytest.approx(4 * rates["lora"]) for rates in seen)
    rates = [each["lora"] for each in seen]
    assert rates[0] < max(rates) == rates[2] > rates[3] > rates[5]


def test_only_the_layers_that_patterns_choose_are_trained(
    training: dict[str, Any], tmp_path: Path
) -> None:
    arguments = [r"include_patterns=[r'single_blocks\.[01]\.linear2', r'img_in']", "verbose=True"]
    events = run(training, output_dir=tmp_path, max_train_steps=1, network_args=arguments)
    assert set(lora_of(tmp_path).layers) == {
        "single_blocks.0.linear2",
        "single_blocks.1.linear2",
        "img_in",
    }
    [table] = [text for text in told(events) if "single_blocks.0.linear2" in text]
    assert "img_in" in table and "3 layers" in table


def test_a_pattern_that_matches_nothing_is_an_error_before_the_model_is_loaded(
    training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FluxKontext, "load_transformer", None)
    arguments = ["include_patterns=[r'single_blocks.0.linear3']"]
    with pytest.raises(ConfigError, match=r"single_blocks\.0\.linear"):
        run(training, output_dir=tmp_path, network_args=arguments)


def test_norms_are_limited_and_logged(training: dict[str, Any], tmp_path: Path) -> None:
    limit = 0.02
    run(training, output_dir=tmp_path, max_train_steps=3, scale_weight_norms=limit)
    state = load_file(RunFiles(tmp_path, "tiny").state)
    for name in lora_of(tmp_path).layers:
        product = state[f"lora.{name}.B"].double() @ state[f"lora.{name}.A"].double()
        assert product.norm() < limit * 1.00001
    steps = read_history(RunFiles(tmp_path, "tiny").history)
    for step in steps:
        assert step.max_norms is not None and step.max_norms[2] <= limit * 1.00001
    assert steps[-1].max_norms is not None and steps[-1].max_norms[0] > 0


@pytest.mark.parametrize("name", ["lora plus", "dora", "loha", "lokr"])
def test_a_finished_lora_can_be_trained_further(
    training: dict[str, Any], tmp_path: Path, name: str
) -> None:
    settings = training | {"save_precision": "fp32"} | NETWORKS[name]
    run(settings, output_dir=tmp_path / "first", max_train_steps=3)
    first = RunFiles(tmp_path / "first", "tiny").lora
    start = {"network_weights": first, "max_train_steps": 1, "learning_rate": 1e-9}
    run(settings, start, output_dir=tmp_path / "same")
    plain = {key: value for key, value in training.items() if key != "network_dim"}
    taken = {"save_precision": "fp32", "dim_from_weights": True}
    run(plain, start, taken, output_dir=tmp_path / "taken")
    before = lora_of(tmp_path / "first").layers
    for folder in ("same", "taken"):
        after = lora_of(tmp_path / folder).layers
        assert after.keys() == before.keys()
        for layer in after:
            # One step of 1e-9 for each of two factors, whose values are below 1.
            torch.testing.assert_close(delta(after[layer]), delta(before[layer]), atol=1e-6, rtol=0)
            assert after[layer].rank == before[layer].rank


def test_another_alpha_keeps_what_the_lora_does(training: dict[str, Any], tmp_path: Path) -> None:
    settings = training | {"save_precision": "fp32"}
    run(settings, output_dir=tmp_path / "first", max_train_steps=3, network_alpha=4.0)
    run(
        settings,
        output_dir=tmp_path / "second",
        max_train_steps=1,
        learning_rate=1e-9,
        network_alpha=1.0,
        network_weights=RunFiles(tmp_path / "first", "tiny").lora,
    )
    before, after = (lora_of(tmp_path / each).layers[LAYER] for each in ("first", "second"))
    assert isinstance(after, LoRAWeights) and after.alpha == 1
    torch.testing.assert_close(delta(after), delta(before), atol=1e-6, rtol=0)


@pytest.fixture
def other_lora(training: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    transformer = FLUX.load_transformer(training["dit"], dtype=torch.float32)
    shapes = tiny.layer_shapes(transformer)

    def make(*names: str, rank: int = 4, size: int = 0) -> Path:
        generator = torch.Generator().manual_seed(0)
        path = tmp_path / f"{len(names)}-{rank}.safetensors"
        layers = {
            name: LoRAWeights(
                torch.randn(rank, shapes[name][1] + size, generator=generator) * 0.1,
                torch.randn(shapes[name][0], rank, generator=generator) * 0.1,
                alpha=rank,
            )
            for name in names
        }
        sizes = {name: layer.shape for name, layer in layers.items()}
        save_adapters(path, layers, FLUX.layer_names, sizes, dtype=torch.float32, metadata={})
        return path

    return make


def test_what_does_not_go_on_from_a_file_is_one_sentence(
    training: dict[str, Any], tmp_path: Path, other_lora: Callable[..., Path]
) -> None:
    def refused(path: Path, **changes: Any) -> str:
        with pytest.raises(EngineError) as caught:
            run(training, output_dir=tmp_path, network_weights=path, **changes)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "LoRA of rank 8, but a LoRA of rank 4" in refused(other_lora(LAYER, rank=8))
    loha = {"network_module": "networks.loha"}
    assert "LoRA of rank 4, but a LoHa of rank 4" in refused(other_lora(LAYER), **loha)
    assert "img_in, which is not trained" in refused(other_lora("img_in"))
    assert LAYER in refused(other_lora(LAYER, size=1))
    assert "dim_from_weights" in refused(
        other_lora(LAYER), dim_from_weights=True, network_args=["include_patterns=['.*']"]
    )


def test_layers_that_a_file_does_not_have_begin_anew(
    training: dict[str, Any], tmp_path: Path, other_lora: Callable[..., Path]
) -> None:
    events = run(
        training, output_dir=tmp_path, max_train_steps=1, network_weights=other_lora(LAYER)
    )
    [sentence] = [text for text in told(events) if "begin anew" in text]
    assert "23 of the layers" in sentence


def test_base_weights_are_merged_before_the_training(
    training: dict[str, Any], tmp_path: Path, other_lora: Callable[..., Path]
) -> None:
    """As training on the merged model would: the LoRA alone does not contain them."""
    base = other_lora(LAYER, "img_in")
    settings = training | {"max_train_steps": 2, "mixed_precision": "no"}
    merged = settings | {"base_weights": [base], "base_weights_multiplier": [0.5]}
    events = run(merged, output_dir=tmp_path / "with")
    assert any(text.startswith(f"{base.name} is merged at 0.5") for text in told(events))
    run(settings, output_dir=tmp_path / "without")
    losses = [
        read_history(RunFiles(tmp_path / each, "tiny").history)[0].loss
        for each in ("with", "without")
    ]
    assert losses[0] != losses[1]

    generated = tiny.config(settings, lora_weight=[base], lora_multiplier=[0.5])
    transformer = load_with_loras(generated, FLUX, torch.device("cpu"))
    plain = load_with_loras(tiny.config(settings), FLUX, torch.device("cpu"))
    weights = (each.get_submodule("x_embedder").weight for each in (transformer, plain))
    changed = next(weights) - next(weights)
    expected = 0.5 * delta(read_lora(base, [FLUX.layer_names]).layers["img_in"])
    torch.testing.assert_close(changed, expected, atol=1e-6, rtol=1e-5)


def test_a_run_is_only_continued_with_the_same_network(
    training: dict[str, Any], tmp_path: Path, other_lora: Callable[..., Path]
) -> None:
    arguments = ["loraplus_lr_ratio=4", "verbose=True"]
    run(training, output_dir=tmp_path, max_train_steps=1, network_args=arguments)
    assert read_progress(RunFiles(tmp_path, "tiny").state).recipe["network_args"] == [
        "loraplus_lr_ratio=4.0"
    ]
    same = {"network_args": [" loraplus_lr_ratio = 4.0 "], "max_train_steps": 2, "resume": True}
    run(training, same, output_dir=tmp_path)
    for other in (
        {"network_args": ["loraplus_lr_ratio=8"]},
        {"network_args": arguments, "base_weights": [other_lora(LAYER)]},
    ):
        with pytest.raises(ConfigError, match=re.escape("made with other settings")):
            run(training, other, output_dir=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("name", "kind"), [("kohya", "lora"), ("diffusers", "lora"), ("diffusers", "lokr")]
)
def test_a_lora_is_written_in_the_format_that_is_asked_for(
    training: dict[str, Any], tmp_path: Path, name: str, kind: str
) -> None:
    training = training | {"network_module": f"networks.{kind}", "save_precision": "fp32"}
    run(training, output_dir=tmp_path, max_train_steps=2, save_format=name)
    run(training, output_dir=tmp_path / "usual", max_train_steps=2)
    prefix = {"kohya": "lora_unet_", "diffusers": "transformer."}[name]
    checkpoint = open_checkpoint(RunFiles(tmp_path, "tiny").lora)
    assert all(key.startswith(prefix) for key in checkpoint.keys())  # noqa: SIM118
    written, usual = lora_of(tmp_path).layers, lora_of(tmp_path / "usual").layers
    assert written.keys() == usual.keys()
    for layer in usual:
        torch.testing.assert_close(delta(written[layer]), delta(usual[layer]))
    run(training, output_dir=tmp_path, max_train_steps=3, save_format=name, resume=True)


def test_settings_that_do_not_go_together_are_refused_before_anything_is_read(
    tmp_path: Path,
) -> None:
    def refused(**changes: Any) -> str:
        settings = {"dit": tmp_path, "image_directory": tmp_path, "output_name": "tiny"}
        with pytest.raises(ConfigError) as caught:
            run(settings, output_dir=tmp_path / "out", **changes)
        return str(caught.value)

    loha = {"network_module": "networks.loha"}
    assert "network_dropout: LoHa does not have it" in refused(network_dropout=0.1, **loha)
    assert "dora_wd: LoHa" in refused(network_args=["dora_wd=True"], **loha)
    assert "factor is for LoKr only" in refused(network_args=["factor=8"])
    assert "needs network_weights" in refused(dim_from_weights=True)
    plus = {"network_args": ["loraplus_lr_ratio=4"]}
    assert "one learning rate for all" in refused(optimizer_type="Prodigy", **plus)
    dora = {"network_args": ["dora_wd=True"]}
    assert "save_format diffusers" in refused(save_format="diffusers", **dora)
    free = {"optimizer_type": "AdamWScheduleFree"}
    assert "scale_weight_norms does not go with" in refused(scale_weight_norms=1.0, **free)


def test_a_recipe_with_network_settings_reads_back(
    training: dict[str, Any], tmp_path: Path
) -> None:
    settings = training | NETWORKS["ranks"] | {"network_dropout": 0.1}
    run(settings, output_dir=tmp_path, max_train_steps=1)
    config = tiny.config(settings, output_dir=tmp_path, max_train_steps=1)
    assert load_config(RunFiles(tmp_path, "tiny").recipe, {}, {}) == config


def test_a_file_of_another_family_is_refused(training: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "wan.safetensors"
    key = "diffusion_model.blocks.0.self_attn.q"
    save_file(
        {f"{key}.lora_A.weight": torch.ones(2, 8), f"{key}.lora_B.weight": torch.ones(8, 2)}, path
    )
    with pytest.raises(CheckpointError) as caught:
        run(training, output_dir=tmp_path, network_weights=path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
