"""What the demo teaches: loomlings, creatures with one big eye, which the base cannot draw.

The pictures have the size, colours and places that the base model knows; the creature and its
name are new to it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .pictures import (
    BACKGROUNDS,
    COLOURS,
    RGB,
    Point,
    canvas,
    draw_shape,
    place,
    reduced,
    vary,
)

EYE_WHITE: RGB = (250, 250, 250)
PUPIL: RGB = (24, 22, 34)
# In units of the creature's radius, from its middle.
EYE: Point = (0.0, 0.0)
EYE_RADIUS = 0.52
PUPIL_RADIUS = 0.27
_BODY: tuple[tuple[str, Point, float], ...] = (
    ("circle", (0.0, 0.08), 0.84),
    ("triangle", (-0.52, -0.62), 0.4),
    ("triangle", (0.52, -0.62), 0.4),
    ("circle", (-0.45, 0.78), 0.24),
    ("circle", (0.45, 0.78), 0.24),
)


@dataclass(frozen=True)
class Loomling:
    """One creature; the fields are words of `pictures`."""

    colour: str
    background: str
    size: str = "large"
    position: str = "center"

    @property
    def caption(self) -> str:
        """The words that go with the picture."""
        return (
            f"a {self.size} {self.colour} loomling in the {self.position} "
            f"on a {self.background} background"
        )

    def draw(self, jitter: random.Random | None = None) -> Image.Image:
        """The picture, 64x64 pixels; without ``jitter`` it is the ideal one."""
        centre, radius = place(self.size, self.position, jitter)
        colour = vary(COLOURS[self.colour], jitter)
        image = canvas(vary(BACKGROUNDS[self.background], jitter))
        for part, (x, y), size in _BODY:
            middle = (centre[0] + x * radius, centre[1] + y * radius)
            draw_shape(image, part, middle, size * radius, colour, hole=colour)
        eye = (centre[0] + EYE[0] * radius, centre[1] + EYE[1] * radius)
        draw_shape(image, "circle", eye, EYE_RADIUS * radius, EYE_WHITE, hole=colour)
        draw_shape(image, "circle", eye, PUPIL_RADIUS * radius, PUPIL, hole=colour)
        return reduced(image)

    def eye(self) -> tuple[Point, float]:
        """Centre and radius in pixels of the eye in the ideal picture."""
        (x, y), radius = place(self.size, self.position, None)
        return (x + EYE[0] * radius, y + EYE[1] * radius), EYE_RADIUS * radius


TRAIN: tuple[Loomling, ...] = (
    Loomling("red", "gray"),
    Loomling("red", "black"),
    Loomling("red", "mint"),
    Loomling("orange", "navy"),
    Loomling("orange", "teal"),
    Loomling("orange", "cream"),
    Loomling("yellow", "teal"),
    Loomling("yellow", "brown"),
    Loomling("yellow", "black"),
    Loomling("green", "lavender"),
    Loomling("green", "cream"),
    Loomling("green", "black"),
    Loomling("blue", "cream"),
    Loomling("blue", "mint"),
    Loomling("blue", "gray"),
    Loomling("purple", "mint"),
    Loomling("purple", "black"),
    Loomling("purple", "cream"),
    Loomling("pink", "navy"),
    Loomling("pink", "black"),
)
# None of these pairs of colour and background is in the training set, but each word is.
HELD_OUT: tuple[Loomling, ...] = (
    Loomling("red", "cream"),
    Loomling("purple", "gray"),
    Loomling("yellow", "navy"),
    Loomling("pink", "teal"),
)


def write_dataset(folder: Path) -> None:
    """Write ``train`` and ``held_out`` with a PNG and a caption file per picture.

    Training pictures are jittered as the base model's are, held-out ones are ideal.
    """
    jitter = random.Random(0)
    for name, creatures, chance in (("train", TRAIN, jitter), ("held_out", HELD_OUT, None)):
        (folder / name).mkdir(parents=True)
        for number, creature in enumerate(creatures, start=1):
            stem = folder / name / f"loomling_{number:02d}"
            creature.draw(chance).save(stem.with_suffix(".png"), optimize=True)
            stem.with_suffix(".txt").write_bytes(f"{creature.caption}\n".encode())
