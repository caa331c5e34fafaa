"""The pointing game: does the map of a colour or shape word point at that shape?

    make demo                                                                    # leaves the adapters of both stages
    python examples/shapes/pointing.py runs/demo/stage1 runs/demo/opt            # some minutes on two cores

In every picture of two or three shapes one colour word and one shape word that fit a single shape are looked for. A map hits
where its maximum lies in that shape's box; chance is the share of the picture that the box covers. Beside it: how often the
maximum lies in the box of another shape, and how often that of attention alone (no gradient, the mean over queries and
heads of all layers) lies in the right one. Of stage 2 also the word as an answer to a question.
Source: the pointing game of excitation backprop (arXiv 1608.00507), section 4.1, with boxes and no margin.
"""

import argparse
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from qformer.environment import prepare_environment
from qformer.shapes import grammar, world

KINDS = ("colour", "shape")


class Picture(NamedTuple):
    """A scene with the boxes of its items, a caption of all of them, and a word of each kind with the item it fits alone."""

    scene: world.Scene
    image: Image.Image
    boxes: list[world.Box]
    caption: str
    wanted: dict[str, int]


class Pointed(NamedTuple):
    """Where a map's maximum lies: in the right box, in another one; and the share of the picture that the right one is."""

    hit: bool
    other: bool
    area: float


def draw_pictures(count: int, split: str, seed: int = 0) -> Iterator[Picture]:
    """Pictures of two or three shapes, with at least one colour and one shape that occur once."""
    rng = random.Random(f"{seed} pointing {split}")
    while count:
        scene = world.draw_split(rng, split == "validation", rng.choice((2, 3)))
        single = {
            kind: [
                i for i, item in enumerate(scene) if [getattr(o, kind) for o in scene].count(getattr(item, kind)) == 1
            ]
            for kind in KINDS
        }
        if all(single.values()):
            image, boxes = world.render_with_boxes(scene, rng)
            caption = " and ".join(grammar.FORMS[0](item) for item in rng.sample(scene, len(scene)))
            yield Picture(scene, image, boxes, caption, {kind: rng.choice(items) for kind, items in single.items()})
            count -= 1


def point(values, boxes: list[world.Box], right: int) -> Pointed:
    """Where the maximum of a map float[h, w] lies once it is enlarged to the picture."""
    from qformer.attention.picture import enlarged

    y, x = divmod(int(enlarged(values, (world.IMAGE_SIDE, world.IMAGE_SIDE)).argmax()), world.IMAGE_SIDE)
    inside = [left <= x + 0.5 <= right_side and top <= y + 0.5 <= bottom for left, top, right_side, bottom in boxes]
    left, top, right_side, bottom = boxes[right]
    area = (right_side - left) * (bottom - top) / world.IMAGE_SIDE**2
    return Pointed(inside[right], any(inside) and not inside[right], area)


def play(model, pictures: list[Picture]) -> dict[tuple[str, str, str], list[Pointed]]:
    """What is pointed at, by (text, kind of word, map): the maps are "layer 0", ..., "all layers" and "attention alone"."""
    played: dict[tuple[str, str, str], list[Pointed]] = {}
    for picture in pictures:
        texts: dict[str, tuple[str, str | None]] = {"caption": (picture.caption, None)}
        if model.model.name == "stage2":
            for kind, i in picture.wanted.items():
                if (question := question_of(picture.scene, i, kind)) is not None:
                    texts[f"answer, {kind}"] = (getattr(picture.scene[i], kind), question)
        for name, (text, question) in texts.items():
            look = model.attention(picture.image, text, question=question)
            maps = {"all layers": look.of_words()} | {f"layer {i}": look.of_words(i) for i in look.layers}
            alone = look.of_queries().mean(0)
            for kind, i in picture.wanted.items():
                if question is not None and not name.endswith(kind):
                    continue
                word = look.words.index(getattr(picture.scene[i], kind))
                row = {which: values[word] for which, values in maps.items()} | {"attention alone": alone}
                for which, values in row.items():
                    key = (name.partition(",")[0], kind, which)
                    played.setdefault(key, []).append(point(values, picture.boxes, i))
    return played


def question_of(scene: world.Scene, i: int, kind: str) -> str | None:
    """A question that this item's colour or shape answers; None where no word names the item alone."""
    other = "shape" if kind == "colour" else "colour"
    name = getattr(scene[i], other)
    if [getattr(item, other) for item in scene].count(name) > 1:
        return None
    return f"what colour is the {name}?" if kind == "colour" else f"what shape is {name}?"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="run or adapter folders of the Shapes world")
    parser.add_argument("--pictures", type=int, default=500, help="how many (500)")
    parser.add_argument(
        "--split", choices=["validation", "train"], default="validation", help="held-out scenes, or not"
    )
    parser.add_argument("--out", type=Path, help="write the shares as JSON too")
    args = parser.parse_args(argv)
    prepare_environment()
    import qformer

    pictures = list(draw_pictures(args.pictures, args.split))
    print(f"{'adapter':<20}{'text':<9}{'word':<8}{'map':<17}{'right shape':>15}{'another':>9}{'chance':>8}{'n':>6}")
    rows = []
    for adapter in args.adapters:
        for (text, kind, which), points in play(qformer.load(adapter), pictures).items():
            n = len(points)
            hit, other, chance = (100 * sum(values) / n for values in zip(*points, strict=True))
            error = math.sqrt(hit * (100 - hit) / n)
            rows.append({"adapter": adapter, "text": text, "word": kind, "map": which, "n": n})
            rows[-1] |= {"hit": hit, "standard_error": error, "another": other, "chance": chance}
            name = adapter if len(adapter) < 20 else f"…{adapter[-18:]}"
            print(
                f"{name:<20}{text:<9}{kind:<8}{which:<17}{hit:>7.1f} +- {error:.1f}{other:>11.1f}{chance:>8.1f}{n:>6}"
            )
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
