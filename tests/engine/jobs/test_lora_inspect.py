"""Tests of what is said of a LoRA file, for files of every kind, format and family."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pack.engine.adapter_weights import AdapterWeights, FullWeights, LoRAWeights, merged
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.errors import CheckpointError, ConfigError
from pack.engine.events import Event, Progress
from pack.engine.jobs import lora_inspect
from pack.engine.lora_file import write_lora
from pack.tests.references import random_adapters, tiny_checkpoints
from safetensors.torch import load_file, save_file
from torch import Tensor

FLUX = LAYER_NAMES["flux_kontext"]
MODELS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "flux_kontext": lambda: tiny_checkpoints.flux(depth=2, single=3),
    "wan": tiny_checkpoints.wan,
    "qwen_image": tiny_checkpoints.qwen_image,
    "hunyuan_video": tiny_checkpoints.hunyuan_video,
}


def lora(seed: int = 0, *, rank: int = 2, alpha: float = 4.0) -> LoRAWeights:
    generator = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(*s, generator=generator) for s in ((rank, 8), (21, rank)))
    return LoRAWeights(down, up, alpha)


def few_layers() -> dict[str, AdapterWeights]:
    return {
        "single_blocks.10.linear1": lora(1),
        "double_blocks.3.txt_attn.qkv": lora(2),
        "single_blocks.9.linear1": lora(3),
        "double_blocks.3.img_attn.qkv": lora(4),
    }


def write(path: Path, layers: dict[str, AdapterWeights], **metadata: str) -> Path:
    said = {"ss_base_model_version": "flux_kontext"} | metadata
    write_lora(path, layers, FLUX, dtype=torch.float32, metadata=said)
    return path


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("flux_kontext", kind) for kind in random_adapters.KINDS),
        *((family, kind) for family in list(MODELS)[1:] for kind in ("lora", "full")),
    ],
)
def test_every_kind_of_every_family_is_described(family: str, kind: str, tmp_path: Path) -> None:
    state = MODELS[family]()
    adapters = random_adapters.KINDS[kind](state)
    known = {name: each for name, each in adapters.items() if "adaLN" not in name}
    known = {name: each for name, each in known.items() if not name.startswith("norm_out")}
    path = tmp_path / "x.safetensors"
    write_lora(path, known, LAYER_NAMES[family], dtype=torch.float32, metadata={})
    result = lora_inspect.run(source=path, architecture=family)
    assert f"comfyui format for {family}" in result.report
    assert result.picture is not None and result.path is None
    record = json.loads(lora_inspect.run(source=path, architecture=family, as_json=True).report)
    assert {each["name"] for each in record["layers"]} == set(known)
    assert all(each["norm"] > 0 and not each["problems"] for each in record["layers"])
    assert sum(each["num_values"] for each in record["layers"]) > 0


@pytest.mark.parametrize("spelling", ["comfyui", "kohya", "diffusers"])
def test_the_norm_of_a_file_does_not_depend_on_its_spelling(spelling: str, tmp_path: Path) -> None:
    path = tmp_path / f"{spelling}.safetensors"
    metadata = {"ss_base_model_version": "flux_kontext"}
    write_lora(path, few_layers(), FLUX, format=spelling, dtype=torch.float32, metadata=metadata)
    result = lora_inspect.run(source=path, as_json=True)
    record = json.loads(result.report)
    expected = torch.cat([torch.mm(x.up, x.down) * x.scale for x in map(lora, (1, 2, 3, 4))])
    assert record["format"] == spelling
    assert record["total"]["norm"] == pytest.approx(float(expected.norm()), rel=1e-5)


def test_layers_are_in_the_order_of_the_model(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", few_layers() | {"txt_in": lora(), "img_in": lora()})
    record = json.loads(lora_inspect.run(source=path, as_json=True).report)
    assert [each["name"] for each in record["layers"]] == [
        "img_in",
        "txt_in",
        "double_blocks.3.img_attn.qkv",
        "double_blocks.3.txt_attn.qkv",
        "single_blocks.9.linear1",
        "single_blocks.10.linear1",
    ]


def test_the_report_says_what_people_want_to_know(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.safetensors",
        few_layers(),
        ss_output_name="cat",
        ss_steps="300",
        ss_learning_rate="0.0001",
    )
    text = lora_inspect.run(source=path).report
    for part in ("4 rank 2; scale (alpha / rank) 2", "alpha 4", "232 numbers in float32"):
        assert part in text
    for fact in (r"title +cat", r"steps +300", r"learning rate +0\.0001"):
        assert re.search(fact, text)
    assert re.search(r"double_blocks\.3 +2 ", text)
    assert re.search(r"single_blocks\.\*\.linear1 +2 ", text)
    assert "effective rank" in text and "of weight" not in text
    # Each table is aligned: its numbers end where its headings do.
    table = next(part for part in text.split("\n\n") if part.startswith("block "))
    assert len({len(line) for line in table.splitlines()}) == 1


def test_verbose_shows_every_layer_and_all_metadata(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", few_layers(), my_own_note="a\x1b[2Jb")
    short, long = (lora_inspect.run(source=path, verbose=v).report for v in (False, True))
    assert long.startswith(short)
    rest = long.removeprefix(short)
    assert re.search(r"single_blocks\.9\.linear1 +LoRA +21 x 8 +2 +4\.00 .* float32", rest)
    assert "my_own_note = a [2Jb" in rest and "my_own_note" not in short


def test_different_ranks_and_alphas_are_counted(tmp_path: Path) -> None:
    layers = few_layers() | {"double_blocks.0.img_mlp.0": lora(rank=5, alpha=2.5)}
    text = lora_inspect.run(source=write(tmp_path / "x.safetensors", layers)).report
    assert "4 rank 2, 1 rank 5" in text and "alpha 4 (4), 2.5 (1)" in text


# The model


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_changes_are_compared_with_the_weights_of_the_model(kind: str, tmp_path: Path) -> None:
    state = MODELS["flux_kontext"]()
    save_file(state, tmp_path / "model.safetensors")
    adapters = random_adapters.KINDS[kind](state)
    adapters = {name: each for name, each in adapters.items() if "final_layer" not in name}
    path = write(tmp_path / "x.safetensors", adapters)
    result = lora_inspect.run(source=path, dit=tmp_path / "model.safetensors", as_json=True)
    for layer in json.loads(result.report)["layers"]:
        name = layer["name"]
        weight = state.get(f"{name}.weight", state.get(f"{name}.scale"))
        assert weight is not None
        change = merged(weight, adapters[name]).double() - weight.double()
        # A magnitude is found by a difference of weights in float32.
        expected = float(change.norm() / weight.double().norm())
        assert layer["relative_norm"] == pytest.approx(expected, rel=1e-4)
    text = lora_inspect.run(source=path, dit=tmp_path / "model.safetensors").report
    assert "of the norm of the weights they are for" in text and "of weight" in text


def test_a_lora_for_another_model_is_refused(tmp_path: Path) -> None:
    save_file(tiny_checkpoints.flux(depth=1, single=1), tmp_path / "model.safetensors")
    path = write(tmp_path / "x.safetensors", few_layers())
    with pytest.raises(CheckpointError, match="that this model does not have"):
        lora_inspect.run(source=path, dit=tmp_path / "model.safetensors")


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    state = tiny_checkpoints.flux()
    name = "double_blocks.0.img_attn.proj"
    state[f"{name}.weight"][3, 2] = math.nan
    save_file(state, tmp_path / "model.safetensors")
    adapter = random_adapters.lora(torch.ones(128, 128), random_adapters.Draw(0), 2)
    zeros = LoRAWeights(adapter.down, torch.ones_like(adapter.up), alpha=1.0)
    path = write(tmp_path / "x.safetensors", {name: zeros})
    with pytest.raises(CheckpointError, match=f"model.safetensors: {name} has values"):
        lora_inspect.run(source=path, dit=tmp_path / "model.safetensors")


# What is wrong with a file


def raw(path: Path, **changes: Tensor) -> Path:
    """A file of four layers, which no writer of ours would write."""
    found: dict[str, Tensor] = {}
    for name, each in few_layers().items():
        assert isinstance(each, LoRAWeights)
        stem = f"lora_unet_{name.replace('.', '_')}"
        found[f"{stem}.lora_down.weight"] = each.down.half()
        found[f"{stem}.lora_up.weight"] = each.up.half()
        found[f"{stem}.alpha"] = torch.tensor(each.alpha)
    for key, tensor in changes.items():
        found[f"lora_unet_{key.replace('__', '.')}"] = tensor
    save_file(found, path, {"ss_base_model_version": "flux_kontext"})
    return path


UP = "single_blocks_9_linear1__lora_up__weight"


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({UP: torch.full((21, 2), math.nan).half()}, "has values that are NaN or infinite"),
        ({UP: torch.full((21, 2), 65504.0).half()}, "has values at the limit"),
        ({UP: torch.zeros(21, 2).half()}, "single_blocks.9.linear1 does nothing"),
        (
            {"single_blocks_9_linear1__alpha": torch.tensor(0.0)},
            "single_blocks.9.linear1 does nothing, because alpha is 0",
        ),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Tensor], warning: str, tmp_path: Path) -> None:
    sound = lora_inspect.run(source=raw(tmp_path / "sound.safetensors"))
    assert "warning" not in sound.report
    path = raw(tmp_path / "x.safetensors", **changes)
    result = lora_inspect.run(source=path)
    assert f"- warning: single_blocks.9.linear1 {warning.split('linear1 ')[-1]}" in result.report
    record = json.loads(lora_inspect.run(source=path, as_json=True).report)
    broken = [each["name"] for each in record["layers"] if each["problems"]]
    assert broken == ["single_blocks.9.linear1"]


def test_many_layers_with_one_problem_are_one_line(tmp_path: Path) -> None:
    names = [f"single_blocks.{n}.linear1" for n in range(30)]
    untrained = {name: LoRAWeights(torch.ones(2, 8), torch.zeros(21, 2), 1.0) for name in names}
    text = lora_inspect.run(source=write(tmp_path / "x.safetensors", untrained)).report
    (line,) = [line for line in text.splitlines() if "warning" in line]
    assert line == (
        "- warning: single_blocks.0.linear1, single_blocks.1.linear1, single_blocks.2.linear1 "
        "and 27 more do nothing"
    )


def test_text_encoders_are_mentioned(tmp_path: Path) -> None:
    key = "te1_text_model_encoder_layers_0_mlp_fc1__lora_{}__weight"
    changes = {key.format("down"): torch.ones(2, 4), key.format("up"): torch.ones(4, 2)}
    path = raw(tmp_path / "x.safetensors")
    content = {f"lora_{k.replace('__', '.')}": tensor for k, tensor in changes.items()}
    save_file(load_file(path) | content, path, {"ss_base_model_version": "flux_kontext"})
    assert "2 keys of text encoders" in lora_inspect.run(source=path).report
    record = json.loads(lora_inspect.run(source=path, as_json=True).report)
    assert record["other_keys"] == sorted(content)


def test_differences_of_biases_alone_are_shown(tmp_path: Path) -> None:
    layers = {"double_blocks.0.img_attn.qkv": FullWeights(None, torch.tensor([3.0, 4.0]))}
    result = lora_inspect.run(source=write(tmp_path / "x.safetensors", layers), verbose=True)
    assert re.search(r"img_attn\.qkv +full difference +bias +- +- +5\.00 +-", result.report)
    assert result.picture is not None and np.asarray(result.picture).std() > 0


def test_what_is_no_lora_is_refused(tmp_path: Path) -> None:
    save_file(tiny_checkpoints.flux(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError):
        lora_inspect.run(source=tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="'flux' is unknown"):
        lora_inspect.run(
            source=write(tmp_path / "x.safetensors", few_layers()), architecture="flux"
        )


def test_progress_is_reported_layer_by_layer(tmp_path: Path) -> None:
    events: list[Event] = []
    path = write(tmp_path / "x.safetensors", few_layers())
    lora_inspect.run(source=path, report=events.append)
    assert [each.done for each in events if isinstance(each, Progress)] == [0, 1, 2, 3, 4]
