from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine import media
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.errors import ConfigError, DataError, EngineError
from pack.engine.events import Event, Finished, Message, Progress
from pack.engine.jobs import cache
from pack.engine.signals import Stopped
from pack.engine.weights import open_checkpoint, save_tensors
from pack.tests.engine.jobs import tiny
from PIL import Image
from safetensors.torch import load_file

FLUX = FluxKontext()


class Folder:
    """A data set of three images, and the job that encodes it."""

    def __init__(self, model: Path, place: Path) -> None:
        self.images = tiny.write_images(place / "images", (48, 48), (64, 32), (48, 64))
        self.cache = place / "cache"
        self.settings = tiny.model_settings(model) | {
            "image_directory": self.images,
            "cache_directory": self.cache,
            "resolution": (48, 48),
        }

    def encode(self, **changes: Any) -> list[Event]:
        events: list[Event] = []
        cache.run(tiny.config(self.settings, changes), events.append)
        return events

    def written(self, **changes: Any) -> set[str]:
        """Names of the images whose latents or text the job wrote, as "0.png" and "0.png text"."""
        before = self._files()
        self.encode(**changes)
        return {name for name, facts in self._files().items() if before.get(name) != facts}

    def file(self, name: str, kind: str = "latents") -> Path:
        config = tiny.config(self.settings)
        [entry] = [e for e in cache.plan(config, FLUX).entries if e.sample.image.name == name]
        return entry.text if kind == "text" else entry.latents

    def _files(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for path in self.cache.glob("*"):
            info = path.stat()
            image = f"{path.name.split('-')[0]}.png"
            name = f"{image} text" if path.stem.endswith("_text") else image
            found[name] = (info.st_ino, info.st_mtime_ns)
        return found


@pytest.fixture(scope="module")
def encoded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Encoded once; tests that change something take `folder`, a copy."""
    folder = Folder(model, tmp_path_factory.mktemp("data"))
    folder.encode()
    return folder


@pytest.fixture
def folder(encoded: Folder, model: Path, tmp_path: Path) -> Folder:
    shutil.copytree(encoded.cache, tmp_path / "cache")
    return Folder(model, tmp_path)


ALL = {"0.png", "1.png", "2.png"}
ALL_TEXT = {"0.png text", "1.png text", "2.png text"}


def test_the_first_run_encodes_all_and_the_second_nothing(model: Path, tmp_path: Path) -> None:
    folder = Folder(model, tmp_path)
    events = folder.encode()
    assert events == [
        *(Progress("cache images", done, 3, unit="image") for done in (1, 2, 3)),
        Progress("cache captions", 3, 3, unit="caption"),
        Message("encoded 3 of 3 images and 3 of 3 captions; the rest was current"),
        Finished("cache"),
    ]
    assert folder.written() == set()
    assert folder.encode() == [
        Message("encoded 0 of 3 images and 0 of 3 captions; the rest was current"),
        Finished("cache"),
    ]


def test_the_cache_is_beside_the_images_unless_it_has_a_place(model: Path, tmp_path: Path) -> None:
    folder = Folder(model, tmp_path)
    del folder.settings["cache_directory"]
    folder.encode()
    assert len(list((folder.images / ".loom_cache").iterdir())) == 6


def test_an_image_becomes_the_latents_of_its_bucket(encoded: Folder, model: Path) -> None:
    autoencoder = FLUX.load_autoencoder(tiny.model_settings(model)["vae"], dtype=torch.float32)
    # The buckets of 48 x 48 pixels are 16x144, 32x64, 48x48 and the same turned.
    for name, size in (("0.png", (48, 48)), ("1.png", (64, 32)), ("2.png", (48, 48))):
        image = media.resize_to_bucket(media.load_image(encoded.images / name), size)
        stored = load_file(encoded.file(name))
        assert stored.keys() == {"latents"}
        expected = autoencoder.encode(media.to_tensor(image)[None])[0]
        assert torch.equal(stored["latents"], expected)
        assert expected.shape == (16, 1, size[1] // 8, size[0] // 8)


def test_a_caption_becomes_what_the_text_encoders_say(encoded: Folder, model: Path) -> None:
    settings = tiny.model_settings(model)
    encoders = FLUX.load_text_encoders(
        settings["text_encoder1"], settings["text_encoder2"], None, None, dtype=None
    )
    for index, caption in enumerate(tiny.CAPTIONS):
        stored = load_file(encoded.file(f"{index}.png", "text"))
        [expected] = FLUX.encode_text(encoders, [caption], 512)
        assert stored.keys() == expected.keys()
        for name, tensor in expected.items():
            # Encoded together with others, in float32.
            torch.testing.assert_close(stored[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_changed_image_is_encoded_again_alone(folder: Folder) -> None:
    Image.new("RGB", (48, 48), "red").save(folder.images / "0.png")
    assert folder.written() == {"0.png"}


def test_a_changed_caption_is_encoded_again_alone(folder: Folder) -> None:
    (folder.images / "1.txt").write_text("another caption")
    assert folder.written() == {"1.png text"}


def test_an_image_that_is_only_touched_is_current(folder: Folder) -> None:
    os.utime(folder.images / "0.png", (1, 1))
    assert folder.written() == set()


def test_a_new_image_is_encoded_alone(folder: Folder) -> None:
    tiny.write_image(folder.images / "3.png", (48, 48), "new")
    assert folder.written() == {"3.png", "3.png text"}


def test_another_resolution_encodes_the_images_whose_size_changes(folder: Folder) -> None:
    # The buckets of 48 x 32 pixels are 16x80, 32x48 and the same turned: all three change.
    assert folder.written(resolution=(48, 32)) == ALL
    assert folder.written(resolution=(48, 48), bucket_no_upscale=True) == ALL
    # Of these only 1.png has kept its 64x32 pixels.
    assert folder.written(resolution=(64, 32), enable_bucket=False) == {"0.png", "2.png"}


def test_another_autoencoder_encodes_all_images_and_no_caption(
    folder: Folder, tmp_path: Path
) -> None:
    vae = folder.settings["vae"]
    same, other = tmp_path / "same.safetensors", tmp_path / "other.safetensors"
    shutil.copy(vae, same)
    changed = {name: t * 0.5 if "encoder.0" in name else t for name, t in load_file(vae).items()}
    save_tensors(other, changed, {})

    assert folder.written(vae=same) == set()
    assert folder.written(vae=other) == ALL
    assert folder.written(vae=other, vae_dtype="bf16") == ALL


def test_another_text_encoder_encodes_all_captions_and_no_image(
    folder: Folder, tmp_path: Path
) -> None:
    for setting in ("text_encoder1", "text_encoder2"):
        original = folder.settings[setting]
        changed = shutil.copytree(original, tmp_path / original.name)
        shutil.copytree(
            original.with_name(original.name.replace("text_encoder", "tokenizer")),
            tmp_path / original.name.replace("text_encoder", "tokenizer"),
        )
        assert folder.written(**{setting: changed}) == set()
        tensors = load_file(changed / "model.safetensors")
        save_tensors(changed / "model.safetensors", {n: t * 2 for n, t in tensors.items()}, {})
        assert folder.written(**{setting: changed}) == ALL_TEXT
        assert folder.written() == ALL_TEXT
    assert folder.written(text_max_length=16) == ALL_TEXT
    assert folder.written(text_max_length=16, text_encoder_dtype="bf16") == ALL_TEXT


def test_a_damaged_file_is_made_again(folder: Folder) -> None:
    for name, kind in (("0.png", "latents"), ("1.png", "text")):
        path = folder.file(name, kind)
        path.write_bytes(path.read_bytes()[:-4])
    folder.file("2.png").unlink()
    assert folder.written() == {"0.png", "1.png text", "2.png"}


def test_control_images_are_encoded_at_the_size_of_the_image(
    folder: Folder, model: Path, tmp_path: Path
) -> None:
    controls = tmp_path / "controls"
    for name in ("0.png", "1.png", "2_0.png", "2_1.png"):
        tiny.write_image(controls / name, (80, 60))
    assert folder.written(control_directory=controls) == ALL
    assert folder.written(control_directory=controls) == set()

    folder.settings["control_directory"] = controls
    stored = load_file(folder.file("1.png"))
    assert stored.keys() == {"latents", "control_latents_0"}
    autoencoder = FLUX.load_autoencoder(tiny.model_settings(model)["vae"], dtype=torch.float32)
    image = media.resize_to_bucket(media.load_image(controls / "1.png"), (64, 32))
    expected = autoencoder.encode(media.to_tensor(image)[None])[0]
    assert torch.equal(stored["control_latents_0"], expected)
    assert "control_latents_1" in load_file(folder.file("2.png"))

    tiny.write_image(controls / "2_1.png", (90, 60))
    assert folder.written() == {"2.png"}
    assert folder.written(control_directory=None) == ALL


def test_training_data_are_described_without_encoding(folder: Folder) -> None:
    events: list[Event] = []
    encoders = ("vae", "text_encoder1", "text_encoder2")
    config = tiny.config(folder.settings, dict.fromkeys(encoders), num_repeats=3)
    items = cache.cached_items(config, FLUX, events.append)
    assert events == []
    assert [item.latents for item in items] == [folder.file(f"{index}.png") for index in range(3)]
    assert {item.repeats for item in items} == {3}
    assert len({item.shapes for item in items}) == 2


def test_training_data_that_are_missing_are_encoded_if_that_is_possible(folder: Folder) -> None:
    (folder.images / "1.txt").write_text("another caption")
    (folder.file("2.png")).unlink()
    config = tiny.config(folder.settings)
    nothing = tiny.config(folder.settings, vae=None, text_encoder1=None)
    with pytest.raises(ConfigError) as caught:
        cache.cached_items(nothing, FLUX, lambda event: None)
    assert "1 of 3 images and 1 captions are not in the cache" in str(caught.value)
    assert "give vae, text_encoder1 so that" in str(caught.value)
    assert len(cache.cached_items(config, FLUX, lambda event: None)) == 3
    assert len(cache.cached_items(nothing, FLUX, lambda event: None)) == 3


def test_the_content_of_an_item_follows_image_and_caption(folder: Folder) -> None:
    def contents() -> list[str]:
        items = cache.cached_items(tiny.config(folder.settings), FLUX, lambda event: None)
        return [item.content for item in items]

    first = contents()
    (folder.images / "0.txt").write_text("another caption")
    Image.new("RGB", (64, 32), "red").save(folder.images / "1.png")
    second = contents()
    assert [a == b for a, b in zip(first, second, strict=True)] == [False, False, True]


def test_sizes_that_cannot_be_trained_are_refused(folder: Folder) -> None:
    with pytest.raises(ConfigError, match=r"must be multiples of 16; use \[48, 32\]"):
        folder.encode(resolution=(50, 40), enable_bucket=False)
    tiny.write_image(folder.images / "tiny.png", (40, 12), "small")
    with pytest.raises(DataError, match=r"tiny\.png: the image is 40x12 pixels, less than 16"):
        folder.encode(bucket_no_upscale=True)


def test_missing_settings_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        cache.run(tiny.config(), lambda event: None)
    for name in ("image_directory", "vae", "text_encoder1", "text_encoder2"):
        assert f"{name}:" in str(caught.value)


def test_an_image_that_cannot_be_decoded_is_named(folder: Folder) -> None:
    path = tiny.write_image(folder.images / "3.jpg", (640, 480), "cut off")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"3\.jpg: the image is damaged"):
        folder.encode()


def test_an_encoder_that_gives_nan_leaves_no_file(folder: Folder, tmp_path: Path) -> None:
    tensors = load_file(folder.settings["vae"])
    tensors["taesd_encoder.0.bias"][0] = float("nan")
    save_tensors(tmp_path / "nan.safetensors", tensors, {})
    folder.file("0.png").unlink()
    with pytest.raises(DataError, match=r"0\.png: the encoder gave NaN or infinite latents"):
        folder.encode(vae=tmp_path / "nan.safetensors")
    assert not folder.file("0.png").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_encoded_before_a_signal_stays(
    model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder = Folder(model, tmp_path)

    def stop_after_two(event: Event) -> None:
        if isinstance(event, Progress) and event.done == 2:
            signal.raise_signal(number)

    with pytest.raises(Stopped):
        cache.run(tiny.config(folder.settings), stop_after_two)
    assert len(list(folder.cache.iterdir())) == 2
    assert folder.written() == {"2.png", *ALL_TEXT}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on file sizes")
def test_a_full_disk_is_one_sentence(folder: Folder) -> None:
    folder.file("0.png").unlink()
    with tiny.file_size_limit(64), pytest.raises(EngineError) as caught:
        folder.encode()
    assert "0-" in str(caught.value) and "cannot be written" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert open_checkpoint(folder.file("1.png")).keys() == ["latents"]
    assert not list(folder.cache.glob(".*"))


# Encoders that someone else has loaded


def constant_encoders(name: str, calls: list[str]) -> cache.Encoders:
    def encode_image(pixels: torch.Tensor) -> torch.Tensor:
        calls.append("image")
        return pixels.mean().expand(16, 1, pixels.shape[-2] // 8, pixels.shape[-1] // 8)

    def encode_text(captions: list[str], max_length: int) -> list[dict[str, torch.Tensor]]:
        calls.extend(captions)
        return [{"text_embeds": torch.ones(max_length, 4), "pooled": torch.ones(4)}] * len(captions)

    latent_facts: cache.Facts = {"vae": name, "vae_dtype": None}
    text_facts: cache.Facts = {"text_encoder1": name, "text_encoder2": None}
    return cache.Encoders(latent_facts, text_facts, encode_image, encode_text)


def test_other_encoders_encode_once_and_training_takes_their_cache_as_it_is(
    model: Path, tmp_path: Path
) -> None:
    folder = Folder(model, tmp_path)
    without = {k: v for k, v in folder.settings.items() if not k.startswith(("vae", "text_enc"))}
    config, calls = tiny.config(without), list[str]()
    for _ in range(2):
        cache.run_with(config, FLUX, constant_encoders("first", calls), lambda event: None)
    assert len(calls) == 6
    items = cache.cached_items(config, FLUX, lambda event: None)
    assert load_file(items[0].text)["text_embeds"].shape == (512, 4)


def test_another_encoder_encodes_everything_anew(model: Path, tmp_path: Path) -> None:
    folder, calls = Folder(model, tmp_path), list[str]()
    for name in ("first", "second"):
        config = tiny.config(folder.settings)
        cache.run_with(config, FLUX, constant_encoders(name, calls), lambda event: None)
    assert len(calls) == 12
