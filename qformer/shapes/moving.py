"""Clips of the Shapes world: in each one shape goes to another place, so that no single frame says which, or where to.

    python -m qformer.shapes.moving runs/moving

leaves `train.jsonl` and `test.jsonl` (held-out scenes), two questions a clip. The shape rests, goes within a sixth of the
clip, and rests again; when it goes differs from clip to clip. Writing needs PyAV (`pip install 'qformer[video]'`).
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qformer.shapes import world

FRAMES = 24
RATE = 12  # frames a second
CODEC, BITS_PER_SECOND = "mpeg4", 2_000_000  # in every build of FFmpeg
QUESTIONS = {"mover": "which shape moves?", "goal": "where does it go?"}


@dataclass(frozen=True)
class Motion:
    """A scene in which `mover` goes to the place `goal`, at the frame `start`."""

    scene: world.Scene
    mover: world.Item
    goal: str
    start: int

    def answer(self, question_type: str) -> str:
        """To a question of `QUESTIONS`."""
        return self.mover.shape if question_type == "mover" else self.goal

    def centre(self, frame: int) -> tuple[float, float]:
        """Where the mover is in a frame, in pixels."""
        share = min(1.0, max(0.0, (frame - self.start) / (FRAMES // 6)))
        (x, y), (goal_x, goal_y) = self.mover.xy, world.PLACES[self.goal]
        return x + share * (goal_x - x), y + share * (goal_y - y)


def draw_motion(rng: random.Random, validation: bool) -> Motion:
    """Draw two items of different shapes, of the training or the held-out scenes, one of which goes to a free place."""
    scene = world.draw_split(rng, validation, 2)
    while scene[0].shape == scene[1].shape:
        scene = world.draw_split(rng, validation, 2)
    free = [place for place in world.PLACES if all(item.place != place for item in scene)]
    return Motion(scene, rng.choice(scene), rng.choice(free), rng.randint(FRAMES // 6, FRAMES * 2 // 3))


def render_motion(motion: Motion, seed: int) -> list[Image.Image]:
    """The frames of a clip, alike but for what moves."""
    return [world.render(motion.scene, random.Random(seed), {motion.mover: motion.centre(n)}) for n in range(FRAMES)]


def write_clip(path: Path, frames: list[Image.Image]) -> None:
    """Write images of one size as a clip.

    Raises: ValueError when PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise ValueError("clips are written by PyAV, which is not installed: pip install 'qformer[video]'") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as clip:
        stream: Any = clip.add_stream(CODEC, rate=RATE)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.bit_rate = "yuv420p", BITS_PER_SECOND
        for frame in frames:
            clip.mux(stream.encode(av.VideoFrame.from_image(frame)))
        clip.mux(stream.encode())


def write_world(folder: Path, *, n_train: int, n_test: int, seed: int = 0) -> None:
    """Write so many clips of each split, all from one seed."""
    for split, count in (("train", n_train), ("test", n_test)):
        rng = random.Random(f"{seed} moving {split}")
        records: list[dict[str, Any]] = []
        for i in range(count):
            motion = draw_motion(rng, split == "test")
            name = f"{split}/{i:05d}.mp4"
            write_clip(folder / name, render_motion(motion, rng.getrandbits(32)))
            for question_type, question in QUESTIONS.items():
                records.append({
                    "video": name, "question": question, "answers": [motion.answer(question_type)],
                    "question_id": len(records), "question_type": question_type,
                })  # fmt: skip
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=2000, help="training clips")
    parser.add_argument("--test", type=int, default=200, help="held-out clips")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    write_world(args.folder, n_train=args.train, n_test=args.test, seed=args.seed)
    print(f"wrote {args.train} + {args.test} clips, two questions each, to {args.folder}")


if __name__ == "__main__":
    main()
