"""The committed tiny model: it is of the published kind, small, and really draws."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from pack.engine import media
from pack.engine.demo import draw, measure
from pack.engine.demo.pictures import Picture, all_pictures
from pack.engine.weights import open_checkpoint

FOLDER = Path(draw.__file__).parent / "model"


@pytest.fixture(scope="module")
def model() -> draw.TinyModel:
    return draw.load_model(FOLDER)


def test_all_files_together_take_at_most_12_megabytes() -> None:
    demo = FOLDER.parent
    files = [path for path in demo.rglob("*") if path.is_file() and path.suffix != ".pyc"]

    assert sum(path.stat().st_size for path in files) <= 12e6


def test_the_transformer_has_the_published_names_and_sizes() -> None:
    checkpoint = open_checkpoint(FOLDER / draw.TRANSFORMER)

    assert checkpoint.shape("img_in.weight") == (128, 64)
    assert checkpoint.shape("double_blocks.1.img_attn.qkv.weight") == (384, 128)
    assert checkpoint.shape("single_blocks.3.linear1.weight") == (896, 128)
    assert checkpoint.shape("guidance_in.in_layer.weight") == (128, 256)


def test_the_autoencoder_file_has_the_taesd_layout() -> None:
    checkpoint = open_checkpoint(FOLDER / draw.AUTOENCODER)

    assert checkpoint.shape("taesd_encoder.0.weight") == (64, 3, 3, 3)
    assert checkpoint.shape("taesd_decoder.1.weight") == (64, 16, 3, 3)
    assert checkpoint.read("vae_scale").item() == pytest.approx(0.3611)
    assert checkpoint.read("vae_shift").item() == pytest.approx(0.1159)


def test_latents_have_zero_mean_and_unit_variance(model: draw.TinyModel) -> None:
    pictures = random.Random(0).sample(all_pictures(), 96)
    pixels = torch.stack([media.to_tensor(p.draw(random.Random(1))) for p in pictures])

    latents = model.autoencoder.encode(pixels)

    # Of all training pictures they have them exactly; these are a sample.
    assert latents.mean().abs() < 0.05
    assert latents.std() == pytest.approx(1, abs=0.05)


def test_it_draws_held_out_captions(model: draw.TinyModel) -> None:
    pictures = draw.held_out_pictures(16, seed=1)

    images = draw.draw(model, [picture.caption() for picture in pictures], seed=1)

    score = draw.score(images, pictures)
    # Of 100 captions 95 must be right; of 16 at 95 % fewer than 13 are right once in 150.
    assert score.colours >= 13 / 16
    assert score.backgrounds >= 13 / 16
    assert score.median_overlap >= 0.7


def test_it_changes_a_control_picture_as_the_caption_says(model: draw.TinyModel) -> None:
    before = Picture("star", "red", "cream", "large", "center")
    edits = {
        "make the star blue": Picture("star", "blue", "cream", "large", "center"),
        "change the background to navy": Picture("star", "red", "navy", "large", "center"),
    }

    images = draw.draw(model, list(edits), seed=0, controls=[before.draw()] * len(edits))

    # Where it is and how large is in the control picture alone; its outline gets rough.
    for image, after in zip(images, edits.values(), strict=True):
        assert measure.colour_name(image, after.background) == after.colour
        assert measure.background_name(image) == after.background
        assert measure.overlap(image, after) > 0.3


def test_the_same_seed_draws_the_same_picture_in_any_batch(model: draw.TinyModel) -> None:
    captions = ["a large red star in the center on a gray background", "a blue circle"]

    both = draw.draw(model, captions, seed=5)
    alone = draw.draw(model, captions[1:], seed=6)

    first, second = (media.to_tensor(image) for image in (both[1], alone[0]))
    # Sums of another batch size are rounded differently; one level of 255 is 0.008.
    assert (first - second).abs().max() < 0.02


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_tokenizers_name_a_class_that_transformers_4_and_5_know(name: str) -> None:
    settings = json.loads((FOLDER / name / "tokenizer_config.json").read_text("utf-8"))

    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_max_length"] == 24


def test_captions_are_read_as_in_training_whatever_the_library(model: draw.TinyModel) -> None:
    for encoder in (model.text_encoders.t5, model.text_encoders.clip):
        first, second = encoder.tokenizer(["a red star", "on a red star"]).input_ids
        # The first word is the same token at the start of a text as inside it.
        assert set(first) <= set(second)
