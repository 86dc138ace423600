"""Procedural pictures with captions: what the embedded tiny model knows.

One shape of one colour, size and position on a plain background, 64x64 pixels. Combinations are
either for training or held out, decided by a hash, so that a held-out caption names a picture
that was never seen although each of its words was.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

SIDE = 64
# Drawn larger and reduced, which smooths the edges.
_OVERSAMPLING = 4

RGB = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, RGB] = {
    "red": (214, 38, 42),
    "orange": (242, 138, 28),
    "yellow": (246, 214, 48),
    "green": (46, 158, 68),
    "blue": (40, 88, 210),
    "purple": (132, 56, 180),
    "pink": (244, 136, 184),
    "white": (245, 245, 245),
}
BACKGROUNDS: dict[str, RGB] = {
    "black": (22, 22, 26),
    "gray": (128, 130, 134),
    "cream": (248, 236, 206),
    "teal": (24, 128, 132),
    "navy": (26, 36, 84),
    "brown": (112, 72, 44),
    "mint": (176, 230, 200),
    "lavender": (198, 186, 236),
}
SIZES: dict[str, float] = {"small": 10.0, "medium": 16.0, "large": 23.0}  # radius in pixels
POSITIONS: dict[str, tuple[int, int]] = {
    "center": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}


def _regular(num_points: int, *, inner: float = 1.0, turn: float = -90.0) -> list[Point]:
    """Corners on the unit circle; with ``inner`` below 1 every second one is drawn in."""
    corners = num_points * (2 if inner < 1 else 1)
    points: list[Point] = []
    for index in range(corners):
        radius = inner if inner < 1 and index % 2 else 1.0
        angle = math.radians(turn + 360 * index / corners)
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


def _heart() -> list[Point]:
    points: list[Point] = []
    for index in range(60):
        s = 2 * math.pi * index / 60
        x = 16 * math.sin(s) ** 3
        y = 13 * math.cos(s) - 5 * math.cos(2 * s) - 2 * math.cos(3 * s) - math.cos(4 * s)
        points.append((x / 17, -(y + 2.5) / 17))
    return points


def _cross() -> list[Point]:
    a, b = 0.33, 0.95
    quarter = [(a, -b), (a, -a), (b, -a)]
    points: list[Point] = []
    for turn in range(4):
        cosine, sine = round(math.cos(turn * math.pi / 2)), round(math.sin(turn * math.pi / 2))
        points += [(x * cosine - y * sine, x * sine + y * cosine) for x, y in quarter]
    return points


OUTLINES: dict[str, Callable[[], list[Point]]] = {
    "circle": lambda: _regular(72),
    "square": lambda: [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": lambda: [(0.0, -0.95), (0.95, 0.8), (-0.95, 0.8)],
    "star": lambda: _regular(5, inner=0.45),
    "diamond": lambda: [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)],
    "heart": _heart,
    "cross": _cross,
    "ring": lambda: _regular(72),
}
_RING_HOLE = 0.55

_TEMPLATES = (
    "a {size} {colour} {shape} in the {position} on a {background} background",
    "a {size} {colour} {shape} on a {background} background, {position}",
    "{background} background, a {size} {colour} {shape} in the {position}",
)
# Captions that leave things open, as people write them; then any of the fitting pictures is right.
_SHORT_TEMPLATES = (
    "a {colour} {shape}",
    "a {size} {colour} {shape}",
    "a {colour} {shape} on a {background} background",
    "a {colour} {shape} in the {position}",
    "a {shape} on a {background} background, {position}",
)

_INSTRUCTIONS = {
    "shape": "turn the {shape} into a {value}",
    "colour": "make the {shape} {value}",
    "background": "change the background to {value}",
    "size": "make the {shape} {value}",
    "position": "move the {shape} to the {value}",
}


@dataclass(frozen=True)
class Picture:
    """What a picture shows; every field is a key of the tables above."""

    shape: str
    colour: str
    background: str
    size: str
    position: str

    def caption(self, template: int = 0) -> str:
        """The description in words; ``template`` chooses among a few word orders."""
        return self._say(_TEMPLATES[template])

    def any_caption(self, chance: random.Random) -> str:
        """A caption in any word order; one in eight is short and leaves something open."""
        templates = _SHORT_TEMPLATES if chance.random() < 1 / 8 else _TEMPLATES
        return self._say(chance.choice(templates))

    def _say(self, template: str) -> str:
        return template.format(**self.__dict__).replace("a orange", "an orange")

    @property
    def held_out(self) -> bool:
        """Whether the base model has never been trained on this combination (one in ten)."""
        digest = hashlib.sha256("/".join(self.__dict__.values()).encode()).digest()
        return digest[0] % 10 == 0

    def draw(self, jitter: random.Random | None = None) -> Image.Image:
        """The picture; without ``jitter`` it is the ideal one."""
        centre, radius = place(self.size, self.position, jitter)
        background = vary(BACKGROUNDS[self.background], jitter)
        colour = vary(COLOURS[self.colour], jitter)
        image = canvas(background)
        draw_shape(image, self.shape, centre, radius, colour, hole=background)
        return reduced(image)

    def mask(self) -> Image.Image:
        """The ideal shape's area, 255 inside, mode L."""
        centre, radius = place(self.size, self.position, None)
        image = canvas((0, 0, 0))
        draw_shape(image, self.shape, centre, radius, (255, 255, 255), hole=(0, 0, 0))
        return reduced(image).convert("L")


def place(size: str, position: str, jitter: random.Random | None) -> tuple[Point, float]:
    """Centre and radius in pixels; ``jitter`` moves by up to 1 px and scales by up to 4 %."""
    radius = SIZES[size]
    free = SIDE / 2 - radius - 2
    x, y = (SIDE / 2 + direction * free for direction in POSITIONS[position])
    if jitter:
        radius *= jitter.uniform(0.96, 1.04)
        x, y = x + jitter.uniform(-1, 1), y + jitter.uniform(-1, 1)
    return (x, y), radius


def canvas(colour: RGB) -> Image.Image:
    """An empty picture at drawing size."""
    return Image.new("RGB", (SIDE * _OVERSAMPLING, SIDE * _OVERSAMPLING), colour)


def reduced(image: Image.Image) -> Image.Image:
    """A drawing at its final size."""
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def scaled(points: list[Point], centre: Point, radius: float) -> list[Point]:
    """Outline points around the origin -> drawing coordinates; ``centre``, ``radius`` in pixels."""
    return [
        ((centre[0] + x * radius) * _OVERSAMPLING, (centre[1] + y * radius) * _OVERSAMPLING)
        for x, y in points
    ]


def draw_shape(
    image: Image.Image, shape: str, centre: Point, radius: float, colour: RGB, hole: RGB
) -> None:
    """Fill one shape; ``hole`` is the colour inside a ring."""
    draw = ImageDraw.Draw(image)
    outline = OUTLINES[shape]()
    draw.polygon(scaled(outline, centre, radius), fill=colour)
    if shape == "ring":
        draw.polygon(scaled(outline, centre, radius * _RING_HOLE), fill=hole)


def all_pictures() -> list[Picture]:
    """Every combination, in a fixed order."""
    tables = (OUTLINES, COLOURS, BACKGROUNDS, SIZES, POSITIONS)
    pictures = (Picture(*words) for words in itertools.product(*tables))
    return [picture for picture in pictures if _visible(picture)]


def edit(picture: Picture, chance: random.Random) -> tuple[Picture, str] | None:
    """A changed picture and the instruction that leads to it from ``picture``.

    None when the change is one that must not be learned (held out, or hard to see).
    """
    kind = chance.choice(list(_INSTRUCTIONS))
    table = {
        "shape": OUTLINES,
        "colour": COLOURS,
        "background": BACKGROUNDS,
        "size": SIZES,
        "position": POSITIONS,
    }[kind]
    value = chance.choice([word for word in table if word != getattr(picture, kind)])
    changed = replace(picture, **{kind: value})
    if changed.held_out or not _visible(changed):
        return None
    return changed, _INSTRUCTIONS[kind].format(shape=picture.shape, value=value)


def vary(colour: RGB, jitter: random.Random | None) -> RGB:
    """A colour moved by up to 5 of 255 per channel, or as it is without ``jitter``."""
    if jitter is None:
        return colour
    red, green, blue = (max(0, min(255, value + jitter.randint(-5, 5))) for value in colour)
    return red, green, blue


def _visible(picture: Picture) -> bool:
    return math.dist(COLOURS[picture.colour], BACKGROUNDS[picture.background]) > 90
