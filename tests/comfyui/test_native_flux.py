"""What we write and draw, against ComfyUI's own loaders and sampler, on the embedded model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pack.engine import flow, media, seeds
from pack.engine.adapter_weights import LoRAWeights
from pack.engine.demo import draw
from pack.engine.demo.pictures import Picture
from pack.engine.jobs.generate import SamplingSettings, initial_noise, sample
from pack.engine.layer_names import published_layers
from pack.engine.lora_file import save_adapters
from pack.engine.lora_merge import merge_into
from pack.engine.lora_targets import select
from pack.engine.weights import open_checkpoint
from pack.tests.comfyui.conftest import ComfyUI
from pack.tests.engine.jobs import tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = Path(draw.__file__).parent / "model"
FLUX = draw.ARCHITECTURE
PICTURE = Picture("star", "red", "cream", "large", "center")
STEPS, SHIFT, GUIDANCE = 8, 3.0, 2.5


@dataclass(frozen=True)
class Outcome:
    """Results of both sides by name, and what ComfyUI said of the LoRA."""

    ours: dict[str, Tensor]
    native: dict[str, Tensor]
    num_adapters: int
    facts: dict[str, str]


def random_lora(path: Path, model: draw.TinyModel) -> dict[str, LoRAWeights]:
    shapes = tiny.layer_shapes(model.transformer)
    generator = seeds.generator(0, "test")
    weights = {
        name: LoRAWeights(
            torch.randn(4, shapes[name][1], generator=generator) * 0.1,
            torch.randn(shapes[name][0], 4, generator=generator) * 0.1,
            alpha=2.0,
        )
        for name in select(shapes, FLUX.layer_names)
    }
    save_adapters(path, weights, FLUX.layer_names, shapes, dtype=torch.float32, metadata={})
    return weights


@pytest.fixture(scope="module", params=["text", "control image"])
def outcome(
    request: pytest.FixtureRequest, comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Outcome]:
    folder = tmp_path_factory.mktemp("native")
    model = draw.load_model(FOLDER)
    weights = random_lora(folder / "lora.safetensors", model)
    pixels = media.to_tensor(PICTURE.draw())[None]
    [text] = FLUX.encode_text(model.text_encoders, [PICTURE.caption()], 512)
    conditions = {name: tensor[None] for name, tensor in text.items()}
    latents = model.autoencoder.encode(pixels)
    noise = initial_noise(FLUX, width=64, height=64, seed=3)
    inputs = {
        **conditions,
        # ComfyUI's pictures are [B, H, W, C] in 0..1, its latents not normalised.
        "pixels": (pixels.permute(0, 2, 3, 1) + 1) / 2,
        "latents": latents[:, :, 0] / 0.3611 + 0.1159,
        "noise": noise[:, :, 0],
        "sigmas": torch.tensor(flow.sampling_times(STEPS, SHIFT)),
    }
    if request.param == "control image":
        inputs["control"] = inputs["pixels"].clone()
        conditions["control_latents_0"] = latents
    paths = {
        "dit": str(FOLDER / draw.TRANSFORMER),
        "vae": str(FOLDER / draw.AUTOENCODER),
        "lora": str(folder / "lora.safetensors"),
    }
    owned = {name: tensor.contiguous() for name, tensor in inputs.items()}
    save_file(owned, folder / "in.safetensors", metadata={"paths": json.dumps(paths)})
    comfyui.run("native_flux.py", folder / "in.safetensors", folder / "out.safetensors")

    settings = SamplingSettings(STEPS, SHIFT, GUIDANCE)
    ours = {"encoded": latents, "decoded": model.autoencoder.decode(latents)}
    ours["base"] = sample(FLUX, model.transformer, noise, conditions, settings)
    layers = published_layers(FLUX.layer_names, model.transformer)
    inner = {name: layer.inner for name, layer in layers.items()}
    merge_into(model.transformer, inner, weights, multiplier=1.0)
    ours["tuned"] = sample(FLUX, model.transformer, noise, conditions, settings)
    yield Outcome(
        ours,
        load_file(folder / "out.safetensors"),
        len(weights),
        open_checkpoint(folder / "out.safetensors").metadata,
    )


def test_every_key_of_our_lora_is_matched(outcome: Outcome) -> None:
    assert json.loads(outcome.facts["unmatched"]) == []
    assert int(outcome.facts["patched"]) == outcome.num_adapters == 2 * 8 + 4 * 2


def test_the_autoencoder_encodes_and_decodes_alike(outcome: Outcome) -> None:
    encoded = (outcome.native["encoded"] - 0.1159) * 0.3611
    decoded = outcome.native["decoded"].permute(0, 3, 1, 2) * 2 - 1

    # Normalised latents have a standard deviation of 1, pixels a range of 2.
    assert (encoded - outcome.ours["encoded"][:, :, 0]).abs().max() < 1e-3
    assert (decoded - outcome.ours["decoded"]).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["base", "tuned"])
def test_the_same_noise_leads_to_the_same_latents(outcome: Outcome, name: str) -> None:
    native = (outcome.native[name] - 0.1159) * 0.3611
    ours = outcome.ours[name][:, :, 0]

    # Eight steps through six blocks in float32, summed in another order.
    assert (native - ours).abs().max() < 1e-3 * ours.std()


def test_the_lora_changes_what_is_drawn(outcome: Outcome) -> None:
    change = (outcome.ours["tuned"] - outcome.ours["base"]).abs().max()

    # Far beyond what the comparison above tolerates.
    assert change > 0.1 * outcome.ours["base"].std()
