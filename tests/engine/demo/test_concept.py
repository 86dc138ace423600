"""The demo's concept and its committed pictures."""

from __future__ import annotations

from pathlib import Path

from pack.engine.demo import concept
from pack.engine.demo.concept import HELD_OUT, TRAIN
from PIL import Image, ImageChops

DATASET = Path(concept.__file__).parent / "dataset"


def test_held_out_creatures_are_combinations_that_training_never_shows() -> None:
    seen = {(creature.colour, creature.background) for creature in TRAIN}

    assert len(seen) == len(TRAIN)
    assert not seen & {(creature.colour, creature.background) for creature in HELD_OUT}


def test_each_word_of_the_held_out_captions_is_in_a_training_caption() -> None:
    trained = {word for creature in TRAIN for word in creature.caption.split()}

    assert {word for creature in HELD_OUT for word in creature.caption.split()} <= trained


def test_the_generator_makes_the_committed_data_set(tmp_path: Path) -> None:
    concept.write_dataset(tmp_path)

    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert made == sorted(path.relative_to(DATASET) for path in DATASET.rglob("*.*"))
    assert len(made) == 2 * (len(TRAIN) + len(HELD_OUT))
    for path in made:
        if path.suffix == ".txt":
            assert (tmp_path / path).read_bytes() == (DATASET / path).read_bytes()
        else:
            with Image.open(tmp_path / path) as new, Image.open(DATASET / path) as committed:
                difference = ImageChops.difference(new, committed).getextrema()
                # Pillow versions may round a smoothed edge differently.
                assert max(high for _, high in difference) <= 2
