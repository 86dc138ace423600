from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.errors import CheckpointError
from pack.engine.model_difference import Parameter, difference, open_model
from pack.tests.references import tiny_checkpoints
from pack.tests.references.checkpoint_layouts import as_diffusers, save_split
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
BUILDERS: dict[str, Callable[..., State]] = {
    "flux_kontext": tiny_checkpoints.flux,
    "wan": tiny_checkpoints.wan,
    "qwen_image": tiny_checkpoints.qwen_image,
    "hunyuan_video": tiny_checkpoints.hunyuan_video,
}


def published(key: str) -> Parameter:
    layer, _, leaf = key.rpartition(".")
    if leaf == "modulation":
        return Parameter(key, "weight")
    return Parameter(layer, "bias" if leaf == "bias" else "weight")


def save_one(folder: Path, state: State, family: str) -> Path:
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def save_with_prefix(folder: Path, state: State, family: str) -> Path:
    return save_one(folder, {f"model.diffusion_model.{k}": t for k, t in state.items()}, family)


def save_parts(folder: Path, state: State, family: str) -> Path:
    return save_split(folder, state)


def save_diffusers(folder: Path, state: State, family: str) -> Path:
    save_split(folder / "transformer", as_diffusers(state, LAYER_NAMES[family]))
    return folder


LAYOUTS = {
    "one file": save_one,
    "with prefix": save_with_prefix,
    "split": save_parts,
    "diffusers": save_diffusers,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", BUILDERS)
def test_every_tensor_is_read_as_its_makers_published_it(
    tmp_path: Path, family: str, layout: str
) -> None:
    state = BUILDERS[family]()
    path = LAYOUTS[layout](tmp_path, state, family)
    model = open_model(path, LAYER_NAMES, family)
    assert set(model.parameters()) == {published(key) for key in state}
    assert model.left_over() == []
    for key, tensor in state.items():
        parameter = published(key)
        assert model.shape(parameter) == tensor.shape
        assert torch.equal(model.read(parameter), tensor.float()), key


def test_tensors_that_are_of_no_layer_are_left_over(tmp_path: Path) -> None:
    state = tiny_checkpoints.flux() | {"vae.decoder.conv_in.weight": torch.ones(2)}
    model = open_model(save_one(tmp_path, state, ""), LAYER_NAMES, "auto")
    assert model.stored.names.family == "flux_kontext"
    assert model.left_over() == ["vae.decoder.conv_in.weight"]


LAYER = Parameter("double_blocks.0.img_attn.proj", "weight")


def two_models(tmp_path: Path, change: Callable[[Tensor], Tensor], base_type: torch.dtype):
    state = tiny_checkpoints.flux()
    paths = [tmp_path / "tuned", tmp_path / "base"]
    for path in paths:
        path.mkdir()
    tuned = state | {str(LAYER): change(state[str(LAYER)].bfloat16())}
    files = [
        save_one(paths[0], tuned, ""),
        save_one(paths[1], {k: t.to(base_type) for k, t in state.items()}, ""),
    ]
    return *(open_model(file, LAYER_NAMES, "auto") for file in files), state[str(LAYER)]


def test_types_are_mixed_in_float32(tmp_path: Path) -> None:
    tuned, base, weight = two_models(tmp_path, lambda w: w + 1, torch.float16)
    expected = (weight.bfloat16() + 1).float() - weight.half().float()
    change, largest = difference(tuned, base, LAYER)
    assert torch.equal(change, expected)
    assert largest == expected.abs().max()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w[:64], r"has the shape \[64, 128\], but in .* it has \[128, 128\]"),
        (lambda w: w * float("nan"), "is NaN or infinite here or in"),
        (lambda w: torch.where(w == w.max(), -float("inf"), w), "is NaN or infinite here or in"),
    ],
)
def test_what_cannot_be_subtracted_is_refused_in_one_sentence(
    tmp_path: Path, change: Callable[[Tensor], Tensor], sentence: str
) -> None:
    tuned, base, _ = two_models(tmp_path, change, torch.float32)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        difference(tuned, base, LAYER)
    assert "\n" not in str(caught.value)
