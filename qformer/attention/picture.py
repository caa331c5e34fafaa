"""Attention as a picture: the image lit up where a word or a query looks, and a sheet of all of them with their titles."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from qformer.attention.maps import AttentionMaps
from qformer.data import Record, load_image
from qformer.data.clips import load_frames
from qformer.data.records import is_clip
from qformer.data.transforms import ImageTransform

TILE, GAP, MARGIN, COLUMNS = 148, 12, 28, 8  # pixels; tiles side by side
PAPER, INK, FAINT, ACCENT, NOTHING = "#ffffff", "#1b1e23", "#6b7280", "#e4572e", "#c9ced6"
HEAT = np.array(
    [(8, 12, 38), (84, 28, 104), (188, 55, 84), (249, 142, 9), (252, 255, 190)], np.float32
)  # dark to bright


class Tile(NamedTuple):
    """A small picture over its label; `strength` in [0, 1] is a bar below, None = none."""

    picture: Image.Image
    label: str
    strength: float | None = None


def images_of(path: str, transform: ImageTransform | None) -> list[Image.Image | None]:
    """What maps of a file lie over: an image, a clip's frames, or None for a feature file.

    Raises: BrokenRecord (a ValueError) when it cannot be read.
    """
    if transform is None:
        return [None]
    if is_clip(path):
        record = Record(path, path, clip=True)
        return [*load_frames(record, transform.frames, transform.frame_policy, max_pixels=transform.max_pixels)]
    return [load_image(Record(path, path), transform.max_pixels)]


def overlay(image: Image.Image | None, heat: Tensor, top: float | None = None, side: int = TILE) -> Image.Image:
    """The image lit up where `heat` float[h, w] is high, dark elsewhere; at most `side` pixels wide and high.

    Args:
        image: None = there is none, the heat alone.
        top: what is brightest; None = the largest value.
    """
    top = float(heat.max()) if top is None else top
    high, wide = heat.shape
    blank = Image.new("RGB", (max(wide, -(-high // 4)), max(high, -(-wide // 4))), "#808080")  # a lone row is a band
    base = _fitted(blank if image is None else image, side)
    light = (enlarged(heat, base.size) / max(top, 1e-12)).clip(0, 1)[..., None]
    at = light * (len(HEAT) - 1)
    low = np.minimum(at.astype(int), len(HEAT) - 2)[..., 0]
    colour = HEAT[low] * (1 - (at - low[..., None])) + HEAT[low + 1] * (at - low[..., None])
    mixed = np.asarray(base, np.float32) * (0.3 + 0.7 * light) * 0.62 + colour * 0.38
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def enlarged(heat: Tensor, size: tuple[int, int]) -> np.ndarray:
    """`heat` float[h, w] over an image of `size` (width, height), bicubic: float32[height, width]."""
    return np.asarray(Image.fromarray(heat.float().numpy()).resize(size, Image.Resampling.BICUBIC))


def draw_attention(
    look: AttentionMaps, images: Sequence[Image.Image | None], title: str, *, layer: int | None = None,
    heads: str = "mean",
) -> Image.Image:  # fmt: skip
    """A sheet of what speaks for every word, and of where every query looks.

    Args:
        images: that `look` is of, as `images_of` has them.
        layer, heads: as of `AttentionMaps.of_queries`.

    Raises: ValueError when there is no such layer.
    """
    queries, words, several = look.of_queries(layer, heads), look.of_words(layer), len(images) > 1
    queries, words = (maps if several else maps.unsqueeze(-3) for maps in (queries, words))
    strengths = words.flatten(1).amax(1)
    layers = f"layer {layer}" if layer is not None else f"mean of layers {', '.join(map(str, look.layers))}"
    sections: list[tuple[str, list[Tile]]] = []
    for k, image in enumerate(None if image is None else _fitted(image) for image in images):
        which = f" in image {k + 1} of {len(images)}" if several else ""
        plain = [] if image is None else [Tile(image, "the image")]
        if look.words:
            tiles = [
                Tile(
                    overlay(image, maps[k], float(maps.max())), word, float(strength / strengths.max().clamp(min=1e-12))
                )
                for word, maps, strength in zip(look.words, words, strengths, strict=True)
            ]
            sections.append((f"What speaks for each word{which} ({layers}; bars: how strongly)", plain + tiles))
        tiles = [Tile(overlay(image, maps[k], float(maps.max())), f"query {q}") for q, maps in enumerate(queries)]
        overlap = f"overlap {look.overlap(layer, heads):.2f}: 1 = all look alike, 0 = no two share a place"
        heading = f"Where each of {len(queries)} queries looks{which} ({heads} of heads, {layers}; {overlap})"
        sections.append((heading, tiles if look.words else plain + tiles))
    return _sheet(title, sections)


def _fitted(image: Image.Image, side: int = TILE) -> Image.Image:
    """The image in RGB, `side` pixels at its longer side."""
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _sheet(title: str, sections: list[tuple[str, list[Tile]]]) -> Image.Image:
    """Sections of tiles one below the other, at most `COLUMNS` side by side."""
    large, middle = ImageFont.load_default(22), ImageFont.load_default(16)
    columns = min(COLUMNS, max(len(tiles) for _, tiles in sections))
    width = max(2 * MARGIN + columns * (TILE + GAP) - GAP, 640)
    lines = textwrap.wrap(title, (width - 2 * MARGIN) // 11)
    headings = [textwrap.wrap(heading, (width - 2 * MARGIN) // 8) for heading, _ in sections]
    rows = [
        [tiles[i : i + columns] for i in range(0, len(tiles), columns)] for _, tiles in sections
    ]  # of every section
    heights = [[max(tile.picture.height for tile in row) + 40 for row in section] for section in rows]
    text_height = 30 * len(lines) + sum(22 * len(heading) + 26 for heading in headings)
    sheet = Image.new("RGB", (width, 2 * MARGIN + text_height + sum(map(sum, heights))), PAPER)
    pen, y = ImageDraw.Draw(sheet), MARGIN
    for line in lines:
        pen.text((MARGIN, y), line, INK, large)
        y += 30
    for heading, section, section_heights in zip(headings, rows, heights, strict=True):
        y += 14
        for line in heading:
            pen.text((MARGIN, y), line, FAINT, middle)
            y += 22
        y += 8
        for row, height in zip(section, section_heights, strict=True):
            for column, tile in enumerate(row):
                _draw_tile(sheet, tile, (MARGIN + column * (TILE + GAP), y + height - 40))
            y += height
        y += 4
    return sheet


def _draw_tile(sheet: Image.Image, tile: Tile, at: tuple[int, int]) -> None:
    """The tile with the lower left corner of its picture at `at`, and its label below."""
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    x, y = at
    sheet.paste(tile.picture, (x, y - tile.picture.height))
    label = tile.label
    while len(label) > 1 and pen.textlength(label, font) > TILE:
        label = label[:-2].rstrip("…") + "…"
    pen.text((x, y + 10), label, INK, font)
    if tile.strength is not None:
        pen.rectangle((x, y + 3, x + TILE - 1, y + 6), NOTHING)
        pen.rectangle((x, y + 3, x + round((TILE - 1) * tile.strength), y + 6), ACCENT)
