from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine import media
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.dataset import CachedItem
from pack.engine.errors import DataError
from pack.engine.events import Event, Message, Progress, Saved
from pack.engine.jobs import generate, previews, train
from pack.engine.jobs.outputs import RunFiles
from pack.engine.signals import Stopped
from pack.tests.engine.jobs import tiny
from safetensors.torch import load_file

FLUX = FluxKontext()
FEW = {"max_train_steps": 2, "preview_images": 2, "infer_steps": 3}


def run(*settings: dict[str, Any], **changes: Any) -> list[Event]:
    events: list[Event] = []
    train.run(tiny.config(*settings, changes), events.append)
    return events


def item(name: str, side: int) -> CachedItem:
    return CachedItem(Path(name), Path(name), (("latents", (16, 1, side, side)),), 1, name)


def test_the_captions_are_of_the_most_common_shape_and_spread_over_it() -> None:
    items = [item(str(index), 8) for index in range(9)] + [item("other", 4)] * 3
    assert [one.latents.name for one in previews.chosen(items, 3)] == ["0", "3", "6"]
    assert len(previews.chosen(items, 20)) == 9


def test_previews_are_what_generate_draws_with_the_lora(
    training: dict[str, Any], tmp_path: Path
) -> None:
    """The same captions, seed, steps and guidance, but merged and read from files."""
    settings = training | FEW | {"output_dir": tmp_path, "save_precision": "fp32"}
    events = run(settings, learning_rate=1e-2)
    files = RunFiles(tmp_path, "tiny")
    saved = [event.path for event in events if isinstance(event, Saved) and event.step is None]
    assert saved == [str(files.preview_latents), str(files.preview(0)), str(files.preview(1))]

    images = sorted(training["image_directory"].glob("*.png"))
    items = train.cache.cached_items(tiny.config(settings), FLUX, lambda event: None)
    for index, one in enumerate(previews.chosen(items, 2)):
        name = one.latents.name.split("-")[0]
        [image] = [path for path in images if path.stem == name]
        height, width = load_file(one.latents)["latents"].shape[-2:]
        drawn = generate.run(
            tiny.config(
                settings,
                prompt=[image.with_suffix(".txt").read_text().strip()],
                lora_weight=[files.lora],
                image_size=(width * 8, height * 8),
                seed=settings.get("seed", 42) + index,
                save_path=tmp_path / "drawn",
            ),
            lambda event: None,
        )
        first, second = (
            media.to_tensor(media.load_image(path)) for path in (files.preview(index), drawn[0])
        )
        # One is the sum of two products, the other one product: they round differently.
        assert (first - second).abs().max() <= 2.5 * 2 / 255


def test_the_latents_are_those_that_a_vae_decodes(training: dict[str, Any], tmp_path: Path) -> None:
    run(training, FEW, output_dir=tmp_path)
    files = RunFiles(tmp_path, "tiny")
    raw = previews.read_latents(files)
    assert raw is not None and raw.ndim == 4 and raw.shape[:2] == (2, 16)
    autoencoder = FLUX.load_autoencoder(training["vae"], dtype=torch.float32)
    image = media.to_image(autoencoder.decode(FLUX.normalize_latents(raw[:1])[:, :, None])[0])
    stored = media.load_image(files.preview(0))
    difference = media.to_tensor(image) - media.to_tensor(stored)
    assert difference.abs().max() <= 1.01 * 2 / 255


def test_drawing_changes_no_bit_of_the_training(training: dict[str, Any], tmp_path: Path) -> None:
    run(training, output_dir=tmp_path / "without", max_train_steps=2)
    run(training, FEW, output_dir=tmp_path / "with")
    first, second = (RunFiles(tmp_path / name, "tiny") for name in ("without", "with"))
    tiny.assert_same_file(first.lora, second.lora)
    tiny.assert_same_file(first.state, second.state)


def test_a_finished_run_draws_previews_that_are_missing_and_nothing_else(
    training: dict[str, Any], tmp_path: Path
) -> None:
    run(training, output_dir=tmp_path, max_train_steps=2)
    files = RunFiles(tmp_path, "tiny")
    before = files.lora.stat().st_mtime_ns
    settings = training | FEW | {"output_dir": tmp_path, "resume": True}
    assert not train.is_finished(tiny.config(settings))
    events = run(settings)
    assert files.preview(1).exists() and files.lora.stat().st_mtime_ns == before
    assert not [e for e in events if isinstance(e, Progress) and e.task == "train"]
    assert train.is_finished(tiny.config(settings))


def test_a_signal_ends_the_drawing_and_the_lora_is_kept(
    training: dict[str, Any], tmp_path: Path
) -> None:
    def report(event: Event) -> None:
        if isinstance(event, Progress) and event.task == "preview":
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped, match="the LoRA is finished and saved"):
        train.run(tiny.config(training, FEW, output_dir=tmp_path), report)
    files = RunFiles(tmp_path, "tiny")
    assert files.lora.exists() and not files.preview_latents.exists()


def test_nan_in_a_preview_is_told_and_not_written(
    training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(*arguments: Any) -> torch.Tensor:
        return torch.full_like(arguments[2], torch.nan)

    monkeypatch.setattr(previews, "sample", sample)
    events = run(training, FEW, output_dir=tmp_path)
    assert Message("the previews came out as NaN and are left out", "warning") in events
    assert not RunFiles(tmp_path, "tiny").preview_latents.exists()


def test_damaged_previews_are_named(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, "tiny")
    assert previews.read_latents(files) is None
    files.preview_latents.write_bytes(b"half a file")
    with pytest.raises(DataError, match=r"tiny\.previews\.latent: the latents are damaged"):
        previews.read_latents(files)


def test_another_number_of_previews_is_drawn_again(
    training: dict[str, Any], tmp_path: Path
) -> None:
    settings = training | FEW | {"output_dir": tmp_path, "resume": True}
    run(settings)
    assert train.is_finished(tiny.config(settings))
    fewer = tiny.config(settings, preview_images=1)
    assert not train.is_finished(fewer)
    train.run(fewer, lambda event: None)
    latents = previews.read_latents(RunFiles(tmp_path, "tiny"))
    assert latents is not None and latents.shape[0] == 1 and train.is_finished(fewer)


def test_previews_do_not_outlive_the_state_that_drew_them(
    training: dict[str, Any], tmp_path: Path
) -> None:
    """A run that goes on and is stopped shows no pictures of what it was before."""
    run(training, FEW, output_dir=tmp_path)
    more = tiny.config(training, FEW, output_dir=tmp_path, resume=True, max_train_steps=4)

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.task == "preview":
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        train.run(more, stop)
    files = RunFiles(tmp_path, "tiny")
    assert previews.read_latents(files) is None and not files.preview(0).exists()
    assert not train.is_finished(more)
