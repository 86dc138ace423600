"""What is shown on the node while a training draws."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pack.engine.architectures import ARCHITECTURES
from pack.engine.config import Config, ModelConfig
from pack.engine.events import Event, Message, Progress, Saved
from pack.engine.latent_file import save_latents
from PIL import Image
from torch import Tensor

NODE = "7:3"
FAMILY = ARCHITECTURES["flux_kontext"]
RED = torch.tensor([1.0, 0.0, 0.0])


class Vae:
    """Every latent pixel is 8 x 8 red ones."""

    def decode(self, raw_NCHW: Tensor) -> Tensor:
        batch, _, height, width = raw_NCHW.shape
        return RED.expand(batch, 8 * height, 8 * width, 3)


class FullVae:
    """There is no memory for it."""

    def decode(self, raw_NCHW: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("full")


class Shown(list[Any]):
    """ComfyUI's progress bar: what it was moved to, and the pictures beside that."""

    freed = 0

    def bar(self, total: int, node_id: str) -> Any:
        def update(done: int, _total: None, preview: tuple[str, Image.Image, int]) -> None:
            assert node_id == NODE and preview[0] == "JPEG"
            self.append((done, total, preview[1]))

        return SimpleNamespace(update_absolute=update)

    def free(self) -> None:
        self.freed += 1


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]) -> Shown:
    class Format:
        latent_rgb_factors = [[1.0, 0.0, 0.0]] * 16
        latent_rgb_factors_bias = None

        def process_in(self, latents: Tensor) -> Tensor:
            return latents

    shown = Shown()
    monkeypatch.setattr(sys.modules["comfy.utils"], "ProgressBar", shown.bar, raising=False)
    monkeypatch.setattr(load("live_samples"), "free_memory", shown.free)
    monkeypatch.setitem(load("native")._LATENT_FORMATS, "flux_kontext", Format)
    return shown


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    path = tmp_path / "cats-step00000100-00.latent"
    save_latents(path, torch.ones(1, 16, 4, 6))
    return path


def reporter(
    load: Callable[[str], Any], vae: Any = None, *, own_vae: bool = False
) -> tuple[Any, list[Event]]:
    """A `LiveSamples`, and the events that it passed on."""
    passed: list[Event] = []
    config = Config(model=ModelConfig(vae=Path("/ae.safetensors") if own_vae else None))
    return load("live_samples").LiveSamples(passed.append, NODE, config, FAMILY, vae), passed


def test_all_events_are_passed_on(load: Callable[[str], Any], shown: Shown, latents: Path) -> None:
    live, passed = reporter(load)
    events = [
        Message("hello"),
        Progress("train", 3, 10),
        Saved("/x/cats.safetensors", "lora", 3),
        Saved(str(latents), "latents", 100),
    ]
    for event in events:
        live(event)
    assert passed == events and len(shown) == 1


def test_a_sample_is_decoded_shown_and_written(
    load: Callable[[str], Any], shown: Shown, latents: Path
) -> None:
    live, _ = reporter(load, Vae())
    live(Progress("train", 100, 400))
    live(Saved(str(latents), "latents", 100))
    [(done, total, image)] = shown
    assert (done, total) == (100, 400)
    assert image.size == (48, 32) and image.getcolors() == [(48 * 32, (255, 0, 0))]
    with Image.open(latents.with_suffix(".png")) as written:
        assert written.size == image.size and written.tobytes() == image.tobytes()
    assert shown.freed == 1  # what the VAE took is the training's again


@pytest.mark.parametrize("vae", [None, FullVae()])
def test_without_a_vae_or_memory_for_it_an_approximation_is_shown(
    load: Callable[[str], Any], shown: Shown, latents: Path, vae: Any
) -> None:
    live, _ = reporter(load, vae)
    live(Saved(str(latents), "latents", 100))
    [(_, _, image)] = shown
    assert image.size == (512, 341)  # 6 x 4, large enough to be seen
    red, green, blue = image.getpixel((256, 170))
    assert red == 255 and green == blue == 128
    assert not latents.with_suffix(".png").exists()


def test_a_training_that_decodes_itself_is_waited_for(
    load: Callable[[str], Any], shown: Shown, latents: Path
) -> None:
    live, _ = reporter(load, Vae(), own_vae=True)
    live(Saved(str(latents), "latents", 100))
    assert shown == []
    picture = latents.with_suffix(".png")
    Image.new("RGB", (5, 7), "blue").save(picture)
    live(Saved(str(picture), "image", 100))
    [(_, _, image)] = shown
    assert image.size == (5, 7) and image.getpixel((0, 0)) == (0, 0, 255)


def test_previews_of_the_end_are_not_samples(
    load: Callable[[str], Any], shown: Shown, latents: Path
) -> None:
    live, _ = reporter(load, Vae())
    live(Saved(str(latents), "latents"))
    assert shown == [] and not latents.with_suffix(".png").exists()


def test_a_disk_that_is_full_ends_no_training(
    load: Callable[[str], Any],
    shown: Shown,
    latents: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    latents.with_suffix(".png").mkdir()  # nothing can be written there
    live, _ = reporter(load, Vae())
    live(Saved(str(latents), "latents", 100))
    assert len(shown) == 1
    assert "cats-step00000100-00.png cannot be written" in caplog.text


def test_a_sample_that_is_gone_already_is_not_shown(
    load: Callable[[str], Any], shown: Shown, tmp_path: Path
) -> None:
    live, _ = reporter(load, Vae())
    live(Saved(str(tmp_path / "gone.latent"), "latents", 100))
    assert shown == []
