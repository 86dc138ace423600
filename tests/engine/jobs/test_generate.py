from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pack.engine import media, seeds
from pack.engine.adapter_weights import FullWeights, LoRAWeights
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.errors import CheckpointError, ConfigError, DataError
from pack.engine.events import Event, Finished, Progress, Saved
from pack.engine.jobs import generate
from pack.engine.jobs.generate import SamplingSettings, initial_noise, load_with_loras, sample
from pack.engine.lora_file import read_lora, save_adapters, write_lora
from pack.engine.lora_targets import select
from pack.engine.signals import Stopped
from pack.engine.weights import save_tensors
from pack.tests.engine.jobs import tiny
from PIL import Image
from torch import Tensor

FLUX = FluxKontext()
PROMPTS = ["a red star", "a blue ring", "a green heart"]


@pytest.fixture(scope="module")
def loras(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRAs with random weights that change pictures visibly."""
    folder = tmp_path_factory.mktemp("loras")
    transformer = FLUX.load_transformer(tiny.model_settings(model)["dit"], dtype=torch.float32)
    shapes = tiny.layer_shapes(transformer)
    paths = [folder / "first.safetensors", folder / "second.safetensors"]
    for seed, path in enumerate(paths):
        generator = seeds.generator(seed, "test")
        weights = {
            name: LoRAWeights(
                torch.randn(4, shapes[name][1], generator=generator) * 0.3,
                torch.randn(shapes[name][0], 4, generator=generator) * 0.3,
                alpha=2.0,
            )
            for name in select(shapes, FLUX.layer_names)
        }
        save_adapters(path, weights, FLUX.layer_names, shapes, dtype=torch.float32, metadata={})
    return paths


class Draw:
    """Runs the job and reads back what it wrote."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.settings = tiny.model_settings(model) | {"image_size": (48, 32), "infer_steps": 3}
        self.folder = folder
        self.count = 0
        self.events: list[Event] = []

    def paths(self, *prompts: str, **changes: Any) -> list[Path]:
        self.count += 1
        place = {"save_path": self.folder / f"{self.count}", "prompt": list(prompts)}
        return generate.run(tiny.config(self.settings, place, changes), self.events.append)

    def __call__(self, *prompts: str, **changes: Any) -> list[np.ndarray]:
        return [np.asarray(Image.open(path)) for path in self.paths(*prompts, **changes)]


@pytest.fixture
def draw(model: Path, tmp_path: Path) -> Draw:
    return Draw(model, tmp_path)


def difference(first: np.ndarray, second: np.ndarray) -> int:
    """The largest, in 256ths."""
    return int(np.abs(first.astype(int) - second.astype(int)).max())


def test_a_picture_is_the_same_alone_and_with_others(draw: Draw) -> None:
    together = draw(*PROMPTS)
    assert [picture.shape for picture in together] == [(32, 48, 3)] * 3
    for prompt, picture in zip(PROMPTS, together, strict=True):
        assert np.array_equal(draw(prompt)[0], picture)
    assert difference(together[0], together[1]) > 2


def test_the_seed_decides_the_picture(draw: Draw) -> None:
    [first], [again], [other] = draw("a", seed=1), draw("a", seed=1), draw("a", seed=2)
    assert np.array_equal(first, again)
    assert difference(first, other) > 20


@pytest.mark.parametrize(
    "change", [{"infer_steps": 4}, {"embedded_cfg_scale": 9.0}, {"flow_shift": 9.0}]
)
def test_settings_of_the_sampler_have_an_effect(draw: Draw, change: dict[str, Any]) -> None:
    assert not np.array_equal(draw("a")[0], draw("a", **change)[0])


def test_the_sampler_follows_the_models_velocity(model: Path) -> None:
    transformer = FLUX.load_transformer(tiny.model_settings(model)["dit"], dtype=torch.float32)
    generator = seeds.generator(0, "test")
    conditions = {
        "text_embeds": torch.randn(1, 8, 64, generator=generator),
        "pooled": torch.randn(1, 64, generator=generator),
    }
    noise = initial_noise(FLUX, width=48, height=32, seed=3)

    # Two Euler steps by hand; the shift 3 moves the middle time from 1/2 to 3/4.
    latents = noise
    with torch.no_grad():
        for t, following in ((1.0, 0.75), (0.75, 0.0)):
            given = conditions | {"guidance": torch.tensor([2.5])}
            velocity = FLUX.predict_velocity(transformer, latents, torch.tensor([t]), given)
            latents = latents + (following - t) * velocity
    found = sample(FLUX, transformer, noise, conditions, SamplingSettings(2, 3.0, 2.5))
    torch.testing.assert_close(found, latents)


def test_a_lora_changes_the_picture_by_its_multiplier(draw: Draw, loras: list[Path]) -> None:
    [plain] = draw("a")
    [none] = draw("a", lora_weight=loras[:1], lora_multiplier=[0.0])
    [half] = draw("a", lora_weight=loras[:1], lora_multiplier=[0.5])
    [full] = draw("a", lora_weight=loras[:1])
    assert np.array_equal(plain, none)
    assert difference(plain, full) > 20
    assert difference(half, plain) > 2 and difference(half, full) > 2


def test_two_loras_add_up_in_any_order(draw: Draw, loras: list[Path]) -> None:
    [first] = draw("a", lora_weight=loras[:1])
    [both] = draw("a", lora_weight=loras)
    [turned] = draw("a", lora_weight=loras[::-1])
    [undone] = draw("a", lora_weight=[*loras, loras[1]], lora_multiplier=[1.0, 1.0, -1.0])
    assert difference(both, first) > 20
    # The sums of the weights differ in the last bit; a picture has eight bits.
    assert difference(both, turned) <= 1
    assert difference(undone, first) <= 1


@pytest.mark.parametrize("multiplier", [1.0, -0.5])
def test_a_merged_lora_does_what_the_trained_adapters_did(
    model: Path, loras: list[Path], multiplier: float
) -> None:
    settings = tiny.model_settings(model)
    merged = tiny.config(settings, lora_weight=loras[:1], lora_multiplier=[multiplier])
    transformer = load_with_loras(merged, FLUX, torch.device("cpu"))

    injected = FLUX.load_transformer(settings["dit"], dtype=torch.float32)
    network = tiny.put_lora(injected, rank=4, alpha=2.0)
    network.load(read_lora(loras[0], [FLUX.layer_names]).layers)
    for adapter in network.adapters.values():
        adapter.scale *= multiplier

    def latents(module: torch.nn.Module) -> Tensor:
        conditions = {"text_embeds": torch.ones(1, 8, 64), "pooled": torch.ones(1, 64)}
        noise = initial_noise(FLUX, width=48, height=32, seed=0)
        return sample(FLUX, module, noise, conditions, SamplingSettings(2, 1.0, 1.0))

    # Float32 sums in another order, through six blocks twice.
    torch.testing.assert_close(latents(transformer), latents(injected), rtol=1e-4, atol=1e-4)


def test_layers_outside_of_the_blocks_and_norms_are_merged_too(model: Path, tmp_path: Path) -> None:
    """What others train may change any of them; the last layer has its halves swapped here."""
    settings = tiny.model_settings(model)
    plain = load_with_loras(tiny.config(settings), FLUX, torch.device("cpu"))
    before = FLUX.published_state_dict(plain)
    changes = {
        "final_layer.adaLN_modulation.1": "weight",
        "double_blocks.0.img_attn.norm.query_norm": "scale",
        "time_in.in_layer": "weight",
    }
    layers = {
        name: FullWeights(torch.randn_like(before[f"{name}.{weight}"]))
        for name, weight in changes.items()
    }
    path = tmp_path / "full.safetensors"
    write_lora(path, layers, FLUX.layer_names, dtype=torch.float32, metadata={})
    merged = tiny.config(settings, lora_weight=[path], lora_multiplier=[0.5])
    after = FLUX.published_state_dict(load_with_loras(merged, FLUX, torch.device("cpu")))
    for name, weight in changes.items():
        diff = layers[name].diff
        assert diff is not None
        expected = before[f"{name}.{weight}"] + 0.5 * diff
        torch.testing.assert_close(after[f"{name}.{weight}"], expected)


def test_a_control_image_changes_the_picture(draw: Draw, tmp_path: Path) -> None:
    controls = [tmp_path / "black.png", tmp_path / "white.png"]
    for path in controls:
        Image.new("RGB", (96, 64), path.stem).save(path)
    [plain] = draw("a")
    [black], [white] = (draw("a", control_image_path=[path]) for path in controls)
    [both] = draw("a", control_image_path=controls)
    pictures = [plain, black, white, both]
    # Rounding alone moves a value by one at most.
    assert all(difference(a, b) > 1 for i, a in enumerate(pictures) for b in pictures[:i])


def test_a_control_image_keeps_its_shape_at_the_area_of_the_picture(
    model: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (400, 100), "red").save(tmp_path / "wide.png")
    config = tiny.config(
        tiny.model_settings(model),
        image_size=(64, 64),
        control_image_path=[tmp_path / "wide.png"],
    )
    latents = generate._control_conditions(config, FLUX, torch.device("cpu"))
    assert latents["control_latents_0"].shape == (1, 16, 1, 32 // 8, 128 // 8)


def test_the_file_says_how_it_was_made(draw: Draw, loras: list[Path], tmp_path: Path) -> None:
    control = tmp_path / "control.png"
    Image.new("RGB", (32, 32)).save(control)
    [path] = draw.paths(
        "ein rötlicher Stern, 赤い星!",
        seed=7,
        lora_weight=loras,
        lora_multiplier=[0.5],
        control_image_path=[control],
    )
    assert path.name == "ein_rötlicher_Stern_赤い星_7_01.png"
    facts = json.loads(Image.open(path).info["lora_loom"])
    shift = facts.pop("flow_shift")
    assert shift == pytest.approx(FLUX.timestep_shift(4, 6))
    assert facts == {
        "prompt": "ein rötlicher Stern, 赤い星!",
        "seed": 7,
        "architecture": "flux_kontext",
        "model": "flux1-kontext-tiny.safetensors",
        "width": 48,
        "height": 32,
        "steps": 3,
        "sampler": "euler",
        "guidance": 2.5,
        "mixed_precision": "no",
        "loras": [
            {"file": "first.safetensors", "multiplier": 0.5},
            {"file": "second.safetensors", "multiplier": 1.0},
        ],
        "control_images": ["control.png"],
    }


def test_no_picture_replaces_another(draw: Draw, tmp_path: Path) -> None:
    first, second = draw.paths("a!", "a?", save_path=tmp_path / "all")
    [third] = draw.paths("a", save_path=tmp_path / "all", infer_steps=1)
    assert [path.name for path in (first, second, third)] == [
        "a_42_01.png",
        "a_42_02.png",
        "a_42_03.png",
    ]


def test_a_very_long_prompt_still_gives_a_file(draw: Draw) -> None:
    # Letters of four bytes; a file name may have 255.
    [path] = draw.paths("\U0001d4d0" * 300, infer_steps=1)
    assert path.exists()


def test_prompts_come_from_a_file(draw: Draw, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffa red star\n\n  # not this\n  a blue ring  \n", "utf-8")
    paths = draw.paths("first", from_file=prompts, infer_steps=1)
    found = [json.loads(Image.open(path).info["lora_loom"])["prompt"] for path in paths]
    assert found == ["first", "a red star", "a blue ring"]


def test_prompts_that_cannot_be_read_are_named(draw: Draw, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to generate"):
        draw.paths()
    with pytest.raises(DataError, match=r"nowhere\.txt: the prompts cannot be read"):
        draw.paths(from_file=tmp_path / "nowhere.txt")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: the prompts cannot be read"):
        draw.paths(from_file=tmp_path / "latin.txt")


@pytest.mark.parametrize(
    ("size", "nearest"), [((50, 32), "48 32"), ((1001, 1013), "1008 1008"), ((17, 16), "16 16")]
)
def test_a_size_that_the_model_cannot_draw_is_refused_with_the_nearest(
    draw: Draw, size: tuple[int, int], nearest: str
) -> None:
    with pytest.raises(ConfigError, match=f"multiples of 16; the nearest is {nearest}$"):
        draw.paths("a", image_size=size)


def test_missing_settings_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        generate.run(tiny.config(prompt=["a"]), lambda event: None)
    for name in ("dit", "vae", "text_encoder1", "text_encoder2", "save_path"):
        assert f"{name}:" in str(caught.value)


def test_a_file_that_is_no_lora_is_refused(draw: Draw, model: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a LoRA"):
        draw.paths("a", lora_weight=[tiny.model_settings(model)["vae"]])


def test_steps_are_told_with_their_time_from_the_second_on(draw: Draw) -> None:
    paths = draw.paths("a", "b", infer_steps=2)
    told = [event for event in draw.events if isinstance(event, Progress)]
    assert [(event.task, event.done, event.total) for event in told] == [
        ("generate", done, 4) for done in (1, 2, 3, 4)
    ]
    assert told[0].step_seconds is None and told[0].eta_seconds is None
    assert all(event.step_seconds for event in told[1:])
    assert told[-1].eta_seconds == 0
    assert draw.events[-3:] == [
        *(Saved(str(path), "image") for path in paths),
        Finished("generate"),
    ]


def stop_at(step: int, events: list[Event]) -> Any:
    def report(event: Event) -> None:
        events.append(event)
        if isinstance(event, Progress) and event.done == step:
            signal.raise_signal(signal.SIGTERM)

    return report


def test_pictures_that_are_finished_when_a_signal_comes_are_written(
    draw: Draw, tmp_path: Path
) -> None:
    whole = draw(*PROMPTS, infer_steps=2)
    events: list[Event] = []
    config = tiny.config(draw.settings, prompt=PROMPTS, infer_steps=2, save_path=tmp_path / "out")
    with pytest.raises(Stopped, match="stopped after 2 of 3 pictures"):
        generate.run(config, stop_at(5, events))
    assert events[-1] == Finished("generate", stopped=True)
    found = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in found] == ["a_blue_ring_42_01.png", "a_red_star_42_01.png"]
    for path, picture in zip(found, (whole[1], whole[0]), strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), picture)


def test_a_signal_before_the_first_picture_leaves_none(draw: Draw, tmp_path: Path) -> None:
    config = tiny.config(draw.settings, prompt=PROMPTS, save_path=tmp_path / "out")
    with pytest.raises(Stopped):
        generate.run(config, stop_at(2, []))
    assert not (tmp_path / "out").exists()


def test_latents_that_are_not_finite_give_no_picture(
    draw: Draw, loras: list[Path], tmp_path: Path
) -> None:
    tensors, metadata = tiny.contents(loras[0])
    huge = {name: t * 1e25 if "lora_" in name else t for name, t in tensors.items()}
    save_tensors(tmp_path / "huge.safetensors", huge, metadata)
    with pytest.raises(DataError, match="gave NaN or infinite latents for 'a', 'b'"):
        draw.paths("a", "b", lora_weight=[tmp_path / "huge.safetensors"])
    assert not list((tmp_path / "1").glob("*"))


def test_the_noise_is_what_comfyui_draws() -> None:
    noise = initial_noise(FLUX, width=64, height=32, seed=5)
    torch.manual_seed(5)
    assert torch.equal(noise, torch.randn(1, 16, 1, 4, 8))


def test_one_step_is_the_noise_minus_the_velocity_decoded(draw: Draw, model: Path) -> None:
    [path] = draw.paths("a", infer_steps=1)
    settings = tiny.model_settings(model)
    transformer = FLUX.load_transformer(settings["dit"], dtype=torch.float32)
    encoders = FLUX.load_text_encoders(
        settings["text_encoder1"], settings["text_encoder2"], None, None, dtype=None
    )
    [text] = FLUX.encode_text(encoders, ["a"], 512)
    given = {name: tensor[None] for name, tensor in text.items()}
    noise = initial_noise(FLUX, width=48, height=32, seed=42)
    with torch.no_grad():
        given["guidance"] = torch.tensor([2.5])
        velocity = FLUX.predict_velocity(transformer, noise, torch.ones(1), given)
    autoencoder = FLUX.load_autoencoder(settings["vae"], dtype=None)
    expected = media.to_image(autoencoder.decode(noise - velocity)[0])
    assert difference(np.asarray(Image.open(path)), np.asarray(expected)) <= 1
