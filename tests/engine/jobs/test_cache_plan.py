"""What images are for: trained, kept, measured, masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pack.engine import media
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.dataset import BatchReader, CachedData, load_item
from pack.engine.errors import ConfigError, DataError, EngineError
from pack.engine.events import Event, Message, silent
from pack.engine.jobs import cache
from pack.tests.engine.jobs import tiny
from PIL import Image
from safetensors.torch import load_file

FLUX = FluxKontext()


@pytest.fixture
def settings(model: Path, tmp_path: Path) -> dict[str, Any]:
    """Four images of one size."""
    return tiny.model_settings(model) | {
        "image_directory": tiny.write_images(tmp_path / "images", *[(48, 48)] * 4),
        "cache_directory": tmp_path / "cache",
        "resolution": (48, 48),
    }


def encode(settings: dict[str, Any], **changes: Any) -> tuple[CachedData, list[str]]:
    """The data, and what was said about them."""
    events: list[Event] = []
    data = cache.cached_data(tiny.config(settings, changes), FLUX, events.append)
    return data, [event.text for event in events if isinstance(event, Message)]


def names(data: CachedData) -> tuple[list[str], list[str]]:
    return (
        [item.latents.name[0] for item in data.train],
        [item.latents.name[0] for item in data.validation],
    )


def test_other_folders_are_cached_apart_from_files_of_the_same_name(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {
        "regularization_directory": tiny.write_images(tmp_path / "reg", (48, 48), (64, 32)),
        "validation_directory": tiny.write_images(tmp_path / "val", (32, 64)),
        "num_repeats": 5,
    }
    data, said = encode(settings)
    assert names(data) == (["0", "1", "2", "3", "0", "1"], ["0"])
    assert [item.is_regularization for item in data.train] == [False] * 4 + [True] * 2
    assert [item.repeats for item in data.train] == [5] * 4 + [1, 1]
    everything = [*data.train, *data.validation]
    assert len({path for item in everything for path in (item.latents, item.text)}) == 14
    assert said[0] == "1 of 7 images are only measured: 0.png"
    assert said[1].startswith("encoded 7 of 7 images and 7 of 7 captions")
    assert encode(settings)[1] == said[:1]

    beside, _ = encode(settings, cache_directory=None)
    folders = [item.latents.parent for item in (beside.train[0], beside.train[4])]
    folders.append(beside.validation[0].latents.parent)
    assert folders == [tmp_path / name / ".loom_cache" for name in ("images", "reg", "val")]


def test_the_cache_job_encodes_everything_that_a_training_needs(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {
        "regularization_directory": tiny.write_images(tmp_path / "reg", (48, 48)),
        "validation_directory": tiny.write_images(tmp_path / "val", (48, 48)),
        "trigger_word": "star",
        "preservation_class": "shape",
        "alpha_mask": True,
    }
    Image.new("RGBA", (48, 48)).save(settings["image_directory"] / "0.png")
    cache.run(tiny.config(settings), silent)
    without = dict.fromkeys(("vae", "text_encoder1", "text_encoder2"))
    data, _ = encode(settings, **without)
    assert len(data.train) == 5 and len(data.validation) == 1
    for changes in ({"trigger_word": "ring"}, {"alpha_mask": False}):
        with pytest.raises(ConfigError, match="are not in the cache; encode them first"):
            encode(settings, **without, **changes)


def test_a_share_of_the_images_is_measured_instead_of_trained(settings: dict[str, Any]) -> None:
    data, said = encode(settings, validation_split=0.25)
    trained, measured = names(data)
    assert sorted(trained + measured) == ["0", "1", "2", "3"] and len(measured) == 1
    assert said[0] == f"1 of 4 images are only measured: {measured[0]}.png"
    again, _ = encode(settings, validation_split=0.25)
    assert names(again) == (trained, measured)
    seeds = {tuple(names(encode(settings, validation_split=0.25, seed=s)[0])[1]) for s in range(9)}
    assert len(seeds) > 1


def test_one_image_cannot_be_shared(settings: dict[str, Any], tmp_path: Path) -> None:
    one = tiny.write_images(tmp_path / "one", (48, 48))
    with pytest.raises(ConfigError, match=r"validation_split = 0\.5: there is only one image"):
        encode(settings, image_directory=one, validation_split=0.5)


# Masks


def test_a_mask_is_cached_at_the_resolution_of_the_latents(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    masks = tiny.folder(tmp_path / "masks")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48), dtype=np.uint8)
    Image.fromarray(pixels).save(masks / "1.png")
    data, said = encode(settings, mask_directory=masks)
    assert said[0] == "3 of 4 images have no mask and are trained as a whole"
    stored = [load_item(item) for item in data.train]
    assert {item.shapes for item in data.train} == {data.train[0].shapes}  # they share batches
    for index in (0, 2, 3):
        assert torch.equal(stored[index]["mask"], torch.ones(1, 1, 6, 6))
    for row in range(6):
        for column in range(6):
            cell = pixels[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            found = stored[1]["mask"][0, 0, row, column].item()
            assert found == pytest.approx(cell.mean() / 255, abs=1e-6)


def test_a_mask_changes_nothing_else_of_an_image(settings: dict[str, Any], tmp_path: Path) -> None:
    masks = tiny.folder(tmp_path / "masks")
    Image.new("L", (24, 24)).save(masks / "0.png")
    plain, _ = encode(settings)
    before = [load_item(item) for item in plain.train]
    masked, _ = encode(settings, mask_directory=masks)
    for tensors, item in zip(before, masked.train, strict=True):
        found = load_item(item)
        assert found.keys() == tensors.keys() | {"mask"}
        assert torch.equal(found["latents"], tensors["latents"])
    assert (load_item(masked.train[0])["mask"] == 0).all()
    # And a mask that is not wanted any more is not there.
    assert [load_item(item).keys() for item in encode(settings)[0].train] == [
        tensors.keys() for tensors in before
    ]


def test_only_the_image_of_a_mask_that_changed_is_encoded_again(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    masks = tiny.folder(tmp_path / "masks")
    for name in ("0.png", "1.png"):
        Image.new("L", (48, 48), 200).save(masks / name)
    settings["mask_directory"] = masks
    first = [item.content for item in encode(settings)[0].train]
    Image.new("L", (48, 48), 100).save(masks / "1.png")
    Image.new("L", (48, 48), 100).save(masks / "2.png")
    data, said = encode(settings)
    assert "encoded 2 of 4 images and 0 of 4 captions" in said[-1]
    changed = [a != b for a, b in zip(first, [item.content for item in data.train], strict=True)]
    assert changed == [False, True, True, False]


def test_the_opacity_of_an_image_can_be_its_mask(settings: dict[str, Any]) -> None:
    path = settings["image_directory"] / "0.png"
    image = media.load_image(path).convert("RGBA")
    opacity = Image.new("L", image.size)
    opacity.paste(255, (0, 0, 48, 16))
    image.putalpha(opacity)
    image.save(path)
    data, said = encode(settings, alpha_mask=True)
    assert said[0] == "3 of 4 images have no mask and are trained as a whole"
    expected = torch.zeros(1, 1, 6, 6)
    expected[..., :2, :] = 1
    assert torch.equal(load_item(data.train[0])["mask"], expected)
    assert (load_item(data.train[1])["mask"] == 1).all()


def test_masks_come_with_batches_of_images_that_are_measured_too(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    masks = tiny.folder(tmp_path / "masks")
    Image.new("L", (48, 48), 100).save(masks / "0.png")
    settings |= {
        "mask_directory": masks,
        "regularization_directory": tiny.write_images(tmp_path / "reg", (48, 48)),
        "validation_directory": tiny.write_images(tmp_path / "val", (48, 48)),
    }
    data, _ = encode(settings)
    with BatchReader(data.validation, iter([(0, (0,))])) as reader:
        [(_, batch)] = reader
    assert batch["mask"].flatten().tolist() == pytest.approx([100 / 255] * 36)
    assert "mask" not in load_item(data.train[-1]) and data.train[-1].is_regularization


# Captions with the word of the class


def test_a_caption_with_the_trigger_gets_a_second_text(settings: dict[str, Any]) -> None:
    words = {"trigger_word": "star", "preservation_class": "shape"}
    (settings["image_directory"] / "3.txt").write_text("Star over a starfish")
    data, said = encode(settings, **words)
    assert said[0] == "2 of 4 captions do not contain 'star'; nothing is preserved for these"
    assert "encoded 4 of 4 images and 6 of 6 captions" in said[1]
    assert [item.class_text is not None for item in data.train] == [True, False, False, True]
    encoders = FLUX.load_text_encoders(
        settings["text_encoder1"], settings["text_encoder2"], None, None, dtype=None
    )
    for index, caption in ((0, "a red shape"), (3, "shape over a starfish")):
        [expected] = FLUX.encode_text(encoders, [caption], 512)
        stored = load_item(data.train[index])
        for name, tensor in expected.items():
            # Encoded together with others, in float32.
            torch.testing.assert_close(stored[f"class_{name}"], tensor, rtol=1e-4, atol=1e-5)
    path = data.train[0].class_text
    assert path and load_file(path).keys() == {"text_embeds", "pooled"}

    assert (
        "encoded 0 of 4 images and 2 of 6 captions"
        in encode(settings, **words | {"preservation_class": "thing"})[1][-1]
    )
    without, said = encode(settings)
    assert said == [] and [item.class_text for item in without.train] == [None] * 4


def test_the_content_of_an_item_follows_its_second_text(settings: dict[str, Any]) -> None:
    def contents(**words: str) -> list[str]:
        return [item.content for item in encode(settings, **words)[0].train]

    plain = contents()
    shape = contents(trigger_word="star", preservation_class="shape")
    thing = contents(trigger_word="star", preservation_class="thing")
    assert len({plain[0], shape[0], thing[0]}) == 3
    assert plain[1] == shape[1] == thing[1]  # whose caption has no star


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_directory": "images", "alpha_mask": True}, "mask_directory and alpha_mask both"),
        ({"validation_directory": "other", "validation_split": 0.1}, "both say what is measured"),
        ({"validation_directory": "images"}, "this is image_directory, too.*use validation_split"),
        ({"regularization_directory": "images"}, "this is image_directory, too; give another"),
        (
            {"regularization_directory": "other", "validation_directory": "other/../other"},
            "validation_directory = .*: this is regularization_directory, too",
        ),
        ({"trigger_word": "star"}, "preservation_class is missing"),
        ({"preservation_class": "shape"}, "trigger_word is missing"),
        ({"trigger_word": " ", "preservation_class": "shape"}, "trigger_word is missing"),
        ({"trigger_word": "Star", "preservation_class": "star"}, "is the trigger_word; give the"),
        ({"trigger_word": "ohwx", "preservation_class": "dog"}, "no caption contains it"),
        ({"alpha_mask": True}, "alpha_mask: no image in .* has an alpha channel"),
        ({"mask_directory": "other"}, "mask_directory = .*: no mask has the name of an image"),
        ({"mask_directory": "nothing"}, "mask_directory = .*does not exist"),
        ({"regularization_directory": "nothing"}, "regularization_directory = .*does not exist"),
        ({"validation_directory": "nothing"}, "validation_directory = .*does not exist"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_sentence(
    settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tiny.write_image(tmp_path / "other" / "unlike.png", (48, 48), "a caption")
    changes = {
        name: tmp_path / value if name.endswith("directory") else value
        for name, value in changes.items()
    }
    with pytest.raises(EngineError, match=message) as caught:
        cache.plan(tiny.config(settings, changes), FLUX)
    assert isinstance(caught.value, ConfigError | DataError)
    assert "\n" not in str(caught.value)


def test_blank_words_are_as_good_as_none(settings: dict[str, Any]) -> None:
    blank = {"trigger_word": " ", "preservation_class": ""}
    assert [item.class_text for item in encode(settings, **blank)[0].train] == [None] * 4


def test_a_long_list_of_measured_images_is_cut(settings: dict[str, Any], tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "val", *[(16, 16)] * 25)
    config = tiny.config(settings, validation_directory=tmp_path / "val")
    [note] = cache.plan(config, FLUX).notes
    assert note.startswith("25 of 29 images are only measured: 0.png, 1.png, 10.png")
    assert note.endswith(" and 5 more")
