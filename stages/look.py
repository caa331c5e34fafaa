"""Show what a trained adapter's queries look at, and where the image speaks for each word.

python stages/look.py runs/s1/adapter photo.jpg "a red car in front of a house" --out map.png
python stages/look.py runs/s2/adapter photo.jpg --out map.png                # the caption it writes
python stages/look.py runs/s2/adapter photo.jpg --question "what colour is the car?" --out map.png
python stages/look.py runs/s1/adapter photo.jpg --layer 8 --heads max --out map.png --maps maps.npz

Of stage 1 the text is matched with the image; of stage 2 it is a caption or an answer as the
language model writes it.
How the maps are made, and how far they can be trusted: docs/attention.md.
"""

import argparse
from pathlib import Path
from typing import Any

from qformer.config.help import HelpFormatter
from qformer.environment import prepare_environment


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("adapter", help="a run folder or its adapter folder, or a hub id")
    parser.add_argument(
        "picture", help="an image or a clip (or a feature file, if encoder.grid says how its tokens lie)"
    )
    parser.add_argument("text", nargs="?", help="whose words are looked for (of stage 2: what the model writes)")
    parser.add_argument("--also", action="append", default=[], help="one more image beside it; may come again")
    parser.add_argument("--question", help="of stage 2: the text is an answer to it")
    parser.add_argument("--out", type=Path, default=Path("map.png"), help="the picture to write")
    parser.add_argument("--maps", type=Path, help="write the numbers too, as a .npz file")
    parser.add_argument(
        "--layer", type=int, help="one layer of the Q-Former, from 0 (default: the mean of all that look)"
    )
    parser.add_argument("--heads", choices=["mean", "max"], default="mean", help="over the heads of a query")
    parser.add_argument("--device", help="where to run, e.g. cpu or cuda:1 (default: an accelerator if there is one)")
    args = parser.parse_args(argv)
    # Only now what imports torch.
    prepare_environment()
    from qformer.attention.picture import draw_attention, images_of
    from qformer.files import atomic_file
    from qformer.inference import load
    from qformer.launch import reported_errors, require_images

    with reported_errors():
        pictures = [args.picture, *args.also]
        require_images(pictures)
        for option, path, kinds in (("--out", args.out, (".png", ".jpg", ".webp")), ("--maps", args.maps, (".npz",))):
            if path is not None and (path.suffix.lower() not in kinds or not path.parent.is_dir()):
                raise ValueError(
                    f"{option} {path}: expected a file that ends with {' or '.join(kinds)} in a folder that is there"
                )
        model = load(args.adapter, args.device)
        text, title = _text_and_title(model, pictures, args.text, args.question)
        look = model.attention(pictures, text, question=args.question)
        images = [image for picture in pictures for image in images_of(picture, model.transform)]
        sheet = draw_attention(look, images, title, layer=args.layer, heads=args.heads)
        with atomic_file(args.out) as scratch, scratch.open("wb") as file:
            sheet.save(file, args.out.suffix[1:].replace("jpg", "jpeg"), quality=92)
        if args.maps is not None:
            look.save(args.maps)
        overlap = look.overlap(args.layer, args.heads)
        print(f"{args.out}: {len(look.words)} words, {len(look.of_queries())} queries, overlap {overlap:.2f}")


def _text_and_title(model: Any, pictures: list[str], text: str | None, question: str | None) -> tuple[str | None, str]:
    """What is looked for, written by the model where it is not named, and a line about it."""
    name = Path(pictures[0]).name + (f" and {len(pictures) - 1} more" if len(pictures) > 1 else "")
    if model.model.name == "stage1":
        if text is None or question is not None:
            return text, name  # a question is refused where the maps are made
        return text, f'{name}: "{text}" matches with probability {float(model.match([pictures], text)[0]):.2f}'
    if question is None:
        text = text or model.caption([pictures])[0]
        return text, f'{name}: "{text}"'
    text = text or model.answer([pictures], question)[0]
    return text, f'{name}: "{question}" "{text}"'


if __name__ == "__main__":
    main()
