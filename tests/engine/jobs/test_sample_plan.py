from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.config import Config
from pack.engine.errors import ConfigError, DataError
from pack.engine.events import Event, Message, Progress, silent
from pack.engine.jobs import sample_plan
from pack.engine.jobs.cache import Encoders
from pack.engine.jobs.picture import SamplingSettings
from pack.engine.jobs.sample_plan import encode_with, plan, prepare
from pack.tests.engine.jobs import tiny
from safetensors.torch import load_file

FLUX = FluxKontext()
EVERY = {"sample_every_n_steps": 2}
ENCODERS = {"vae": None, "text_encoder1": None, "text_encoder2": None}


@pytest.fixture
def settings(model: Path, tmp_path: Path) -> dict[str, Any]:
    images = tiny.folder(tmp_path / "images")
    place = {"image_directory": images, "resolution": (70, 50)}
    return tiny.model_settings(model) | place | EVERY


def config(settings: dict[str, Any], *lines: str, **changes: Any) -> Config:
    return tiny.config(settings, {"sample_lines": list(lines)}, changes)


def test_what_a_prompt_does_not_say_is_for_the_settings(settings: dict[str, Any]) -> None:
    found = plan(
        config(settings, "a", "b --w 32 --h 48 --d 7 --s 3 --g 1 --fs 2", seed=5), FLUX
    ).pictures
    # The resolution cut to multiples of 16.
    own = SamplingSettings(25, FLUX.timestep_shift(48 // 8, 64 // 8), 2.5)
    assert [(each.size, each.seed, each.sampling) for each in found] == [
        ((64, 48), 5, own),
        ((32, 48), 7, SamplingSettings(3, 2.0, 1.0)),
    ]
    [first, second] = plan(
        config(settings, "a", "b --w 32", infer_steps=4, flow_shift=3.0, embedded_cfg_scale=9.0),
        FLUX,
    ).pictures
    assert first.sampling == second.sampling == SamplingSettings(4, 3.0, 9.0)
    assert second.size == (32, 48) and second.seed == first.seed + 1


def test_prompts_come_from_lines_and_then_from_the_file(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"prompt": "c"}]))
    found = plan(config(settings, "a", "# no", "b", sample_prompts=path), FLUX).pictures
    assert [each.prompt.text for each in found] == ["a", "b", "c"]
    assert [each.seed for each in found] == [42, 43, 44]


def test_a_run_without_prompts_draws_nothing(settings: dict[str, Any]) -> None:
    nothing = config(settings, sample_every_n_steps=None)
    assert prepare(nothing, FLUX, silent).pictures == ()
    for changes in ({}, {"sample_every_n_steps": None, "sample_at_first": True}):
        with pytest.raises(ConfigError, match="nothing to draw.*give sample_prompts or sample_li"):
            plan(config(settings, "# only this", **changes), FLUX)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --w 50", "sample_lines, line 2: the picture has 50 48 pixels: both sides must be "),
        ("a --w 50", "multiples of 16; the nearest is 48 48"),
        ("a --x", "sample_lines, line 2: unknown option --x"),
    ],
)
def test_a_prompt_that_cannot_be_drawn_is_named(
    settings: dict[str, Any], line: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(config(settings, "fine", line), FLUX)
    assert message in str(caught.value)


def test_a_control_image_that_is_missing_or_none_is_named(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"nowhere\.png: the file cannot be read"):
        plan(config(settings, f"a --ci {tmp_path}/nowhere.png"), FLUX)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png: this is not an image"):
        prepare(config(settings, f"a --ci {tmp_path}/text.png"), FLUX, silent)


def progress(*arguments: Any, **changes: Any) -> list[tuple[str, int]]:
    """What `prepare` encodes."""
    events: list[Event] = []
    prepare(config(*arguments, **changes), FLUX, events.append)
    return [(event.task, event.total) for event in events if isinstance(event, Progress)]


def test_each_text_and_image_is_encoded_once(settings: dict[str, Any], tmp_path: Path) -> None:
    control = tiny.write_image(tmp_path / "control.png", (96, 64))
    line = f"a --ci {control}"
    texts, images = ("cache prompts", 2), ("cache control images", 1)
    assert progress(settings, line, "b", "a --d 9") == [images, texts, texts]
    # Neither place nor sampler matter, and the encoders are not needed any more.
    assert progress(settings | ENCODERS, "b --s 3", line) == []
    assert progress(settings, "c", line) == [("cache prompts", 1)]
    assert progress(settings, f"{line} --w 32") == [images]
    tiny.write_image(control, (64, 96))
    assert progress(settings, line) == [images]
    assert progress(settings, "a", text_max_length=8) == [("cache prompts", 1)]
    # The same file of the cache, but another encoder.
    assert progress(settings, "a", text_encoder_dtype="bf16") == [("cache prompts", 1)]
    assert progress(settings, "a") == [("cache prompts", 1)]


def test_what_is_encoded_is_what_the_model_is_given_when_generating(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    control = tiny.write_image(tmp_path / "control.png", (96, 48))
    chosen = config(settings, f"a red star --w 64 --h 32 --ci {control}")
    [picture] = prepare(chosen, FLUX, silent).pictures
    text = load_file(picture.caption.path)
    encoders = FLUX.load_text_encoders(
        settings["text_encoder1"], settings["text_encoder2"], None, None, dtype=None
    )
    [expected] = FLUX.encode_text(encoders, ["a red star"], 512)
    assert text.keys() == expected.keys()
    assert all(torch.equal(text[name], expected[name]) for name in text)
    # The control image keeps its shape 2:1 at the area 64 * 32.
    assert load_file(picture.controls[0].path)["latents"].shape == (16, 1, 32 // 8, 64 // 8)


def test_encoders_that_are_needed_and_missing_are_named(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    control = tiny.write_image(tmp_path / "control.png", (96, 64))
    chosen = config(settings | ENCODERS, "a", f"b --ci {control}")
    with pytest.raises(ConfigError) as caught:
        prepare(chosen, FLUX, silent)
    assert "2 sample prompts and 1 control images are not in the cache" in str(caught.value)
    assert "give vae, text_encoder1, text_encoder2" in str(caught.value)


def test_encoders_of_someone_else_serve_a_training_that_has_none(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    control = tiny.write_image(tmp_path / "control.png", (96, 64))
    encoders = Encoders(
        latent_facts={"vae": "other", "vae_dtype": None},
        text_facts={"text_encoder1": "other"},
        encode_image=lambda pixels: torch.full((16, 1, 4, 6), float(pixels.shape[-1])),
        encode_text=lambda texts, length: [{"text_embeds": torch.full((length, 2), len(texts[0]))}],
    )
    chosen = config(settings | ENCODERS, f"four --ci {control}")
    encode_with(chosen, FLUX, encoders, silent)
    [picture] = prepare(chosen, FLUX, silent).pictures
    assert load_file(picture.caption.path)["text_embeds"].unique().tolist() == [4]
    width = load_file(picture.controls[0].path)["latents"].unique().tolist()
    assert width == [64]  # 96 x 64 at the area 64 x 48 is 68 x 45
    # Encoders that are configured are others.
    assert progress(settings, "four") == [("cache prompts", 1)]


def test_nan_from_an_encoder_names_the_prompt(settings: dict[str, Any]) -> None:
    nan = {"text_embeds": torch.tensor([torch.nan])}
    encoders = Encoders({}, {}, lambda pixels: pixels, lambda texts, length: [nan])
    with pytest.raises(DataError, match="sample prompt 'a cat': the encoder gave NaN"):
        encode_with(config(settings, "a cat"), FLUX, encoders, silent)


def test_the_user_is_told_what_has_no_effect(settings: dict[str, Any]) -> None:
    events: list[Event] = []
    chosen = config(settings, "a", "b --n bad --l 4", sample_every_n_steps=None)
    prepare(chosen, FLUX, events.append)
    messages = [event for event in events if isinstance(event, Message)]
    assert [message.level for message in messages] == ["warning"] * 2
    assert messages[0].text.startswith("sample_lines, line 2: flux_kontext has no use for --l, ")
    assert messages[1].text.startswith("the sample prompts are drawn only on request")
    assert sample_plan.plan(config(settings, "a"), FLUX).stale_captions() == []
