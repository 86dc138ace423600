"""Richer random drawings, which only the autoencoder sees.

The base model draws plain shapes, but its autoencoder must also carry what a LoRA may add:
outlines, eyes, stripes, dots, strokes and gradients.
"""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw

from .pictures import (
    BACKGROUNDS,
    COLOURS,
    OUTLINES,
    RGB,
    SIDE,
    canvas,
    draw_shape,
    reduced,
    scaled,
)

_PALETTE = (*COLOURS.values(), *BACKGROUNDS.values())


def draw_scene(chance: random.Random) -> Image.Image:
    """A picture of a few overlapping things, 64x64 pixels."""
    image = canvas(_colour(chance))
    if chance.random() < 0.3:
        _gradient(image, chance)
    for _ in range(chance.randint(1, 4)):
        chance.choice((_shape, _outlined, _face, _stripes, _dots, _strokes))(image, chance)
    return reduced(image)


def _colour(chance: random.Random) -> RGB:
    red, green, blue = chance.choice(_PALETTE)
    if chance.random() < 0.4:
        red, green, blue = (chance.randint(0, 255) for _ in range(3))
    return red, green, blue


def _place(chance: random.Random) -> tuple[tuple[float, float], float]:
    return (chance.uniform(6, SIDE - 6), chance.uniform(6, SIDE - 6)), chance.uniform(4, 26)


def _gradient(image: Image.Image, chance: random.Random) -> None:
    ramp = Image.linear_gradient("L").rotate(chance.choice((0, 90, 180, 270)))
    image.paste(Image.new("RGB", image.size, _colour(chance)), (0, 0), ramp.resize(image.size))


def _shape(image: Image.Image, chance: random.Random) -> None:
    centre, radius = _place(chance)
    draw_shape(image, chance.choice(list(OUTLINES)), centre, radius, _colour(chance), (0, 0, 0))


def _outlined(image: Image.Image, chance: random.Random) -> None:
    centre, radius = _place(chance)
    points = scaled(OUTLINES[chance.choice(list(OUTLINES))](), centre, radius)
    width = chance.randint(4, 10)
    draw = ImageDraw.Draw(image)
    draw.polygon(points, fill=_colour(chance))
    draw.line([*points, points[0]], fill=_colour(chance), width=width, joint="curve")


def _face(image: Image.Image, chance: random.Random) -> None:
    """Two eyes and sometimes a mouth, on whatever is below."""
    (x, y), radius = _place(chance)
    gap, size = radius * chance.uniform(0.3, 0.5), radius * chance.uniform(0.12, 0.3)
    white, dark = chance.choice(
        (((250, 250, 250), (20, 20, 24)), (_colour(chance), _colour(chance)))
    )
    for side in (-1, 1):
        eye = (x + side * gap, y)
        draw_shape(image, "circle", eye, size, white, white)
        draw_shape(image, "circle", (eye[0], eye[1] + size * 0.2), size * 0.55, dark, dark)
    if chance.random() < 0.6:
        draw = ImageDraw.Draw(image)
        box = scaled([(-0.4, 0.1), (0.4, 0.7)], (x, y), radius)
        draw.arc([box[0], box[1]], 20, 160, fill=dark, width=chance.randint(4, 9))


def _stripes(image: Image.Image, chance: random.Random) -> None:
    centre, radius = _place(chance)
    draw = ImageDraw.Draw(image)
    angle, colour = chance.uniform(0, math.pi), _colour(chance)
    across, along = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
    for index in range(-2, 3):
        offset = index * 0.45
        ends = [
            (across[0] * offset + along[0] * s, across[1] * offset + along[1] * s) for s in (-1, 1)
        ]
        draw.line(scaled(ends, centre, radius), fill=colour, width=chance.randint(5, 12))


def _dots(image: Image.Image, chance: random.Random) -> None:
    colour, size = _colour(chance), chance.uniform(1.2, 3.5)
    (x, y), radius = _place(chance)
    for _ in range(chance.randint(3, 9)):
        dot = (x + chance.uniform(-radius, radius), y + chance.uniform(-radius, radius))
        draw_shape(image, "circle", dot, size, colour, colour)


def _strokes(image: Image.Image, chance: random.Random) -> None:
    centre, radius = _place(chance)
    points = [(chance.uniform(-1, 1), chance.uniform(-1, 1)) for _ in range(chance.randint(2, 5))]
    draw = ImageDraw.Draw(image)
    width = chance.randint(4, 10)
    draw.line(scaled(points, centre, radius), fill=_colour(chance), width=width, joint="curve")
