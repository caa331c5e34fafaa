"""Scenes of the Shapes world and their pictures.

A scene is one to three items; an item has a size, a colour, a shape and a place. Two scenes with the same items are the
same scene whatever their picture's background, jitter or order. `held_out` splits scenes, not pictures, so a held-out
picture never shows a scene that anything was trained on.
"""

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIZES = {"small": 4.5, "large": 9.0}  # radius in pixels of a 64-pixel picture
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (170, 60, 200),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {  # centre in a 64-pixel picture: x to the right, y down
    "top-left": (15, 15),
    "top-right": (49, 15),
    "bottom-left": (15, 49),
    "bottom-right": (49, 49),
    "middle": (32, 32),
}
IMAGE_SIDE = 64
MAX_ITEMS = 3
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True, order=True)
class Item:
    """One coloured shape of a scene."""

    size: str
    colour: str
    shape: str
    place: str

    @property
    def xy(self) -> tuple[int, int]:
        return PLACES[self.place]


Scene = tuple[Item, ...]


def draw_scene(rng: random.Random, n_items: int | None = None) -> Scene:
    """Draw a scene of `n_items` items (1 to 3 when None) at different places, in random order."""
    n = n_items or rng.randint(1, MAX_ITEMS)
    return tuple(
        Item(rng.choice(list(SIZES)), rng.choice(list(COLOURS)), rng.choice(SHAPES), place)
        for place in rng.sample(list(PLACES), n)
    )


def held_out(scene: Scene) -> bool:
    """Whether this scene (regardless of order) is kept for evaluation: one in ten, by a hash of its items."""
    key = ";".join(f"{i.size} {i.colour} {i.shape} {i.place}" for i in sorted(scene))
    return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


def draw_split(rng: random.Random, validation: bool, n_items: int | None = None) -> Scene:
    """Draw a scene of the training split, or of the held-out one."""
    while held_out(scene := draw_scene(rng, n_items)) is not validation:
        pass
    return scene


Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of a 64-pixel picture


def render(
    scene: Scene, rng: random.Random, at: Mapping[Item, tuple[float, float]] | None = None
) -> Image.Image:  # fmt: skip
    """Draw the picture of a scene: 64 x 64 RGB with a graded background, jittered places, radii and colours.

    Args:
        at: centres of items that are on their way, instead of their places'.
    """
    return render_with_boxes(scene, rng, at)[0]


def render_with_boxes(
    scene: Scene, rng: random.Random, at: Mapping[Item, tuple[float, float]] | None = None
) -> tuple[Image.Image, list[Box]]:  # fmt: skip
    """`render`, and the box around each item of the scene."""
    at = at or {}
    up = 3  # supersampling
    side = IMAGE_SIDE * up
    low, high = (tuple(rng.randint(0, 90) for _ in range(3)) for _ in range(2))
    grade = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((side, side))
    picture = Image.composite(Image.new("RGB", (side, side), low), Image.new("RGB", (side, side), high), grade)
    pen = ImageDraw.Draw(picture)
    boxes = []
    for item in scene:
        x, y = (up * (c + rng.uniform(-3, 3)) for c in at.get(item, item.xy))
        r = up * SIZES[item.size] * rng.uniform(0.9, 1.1)
        fill = tuple(max(0, min(255, c + rng.randint(-15, 15))) for c in COLOURS[item.colour])
        if item.shape == "square":
            box = (x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r)
        elif item.shape == "triangle":
            box = (x - r, y - r, x + r, y + 0.9 * r)
        else:
            box = (x - r, y - r, x + r, y + r)
        boxes.append((box[0] / up, box[1] / up, box[2] / up, box[3] / up))
        if item.shape == "circle":
            pen.ellipse(box, fill=fill)
        elif item.shape == "square":
            pen.rectangle(box, fill=fill)
        elif item.shape == "triangle":
            pen.polygon([(x, y - r), (x - r, y + 0.9 * r), (x + r, y + 0.9 * r)], fill=fill)
        else:
            w = 0.33 * r
            pen.rectangle((x - r, y - w, x + r, y + w), fill=fill)
            pen.rectangle((x - w, y - r, x + w, y + r), fill=fill)
    return picture.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS), boxes
