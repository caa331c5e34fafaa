"""Published files of a known data set to record files, one for each split.

python -m qformer.data.known coco downloads/dataset_coco.json --out data/coco
python -m qformer.data.known vqav2 downloads/vqa --images data/coco --out data/vqav2
python -m qformer.data.known cc3m data/cc3m --out data/cc3m   # tars of img2dataset

Files are taken as they were downloaded, folders are looked through, also the zips in them. Images
are named as their archives unpack, in --images; they need not be there yet. OUT/data.yaml is for a
stage: python stages/stage1.py configs/stage1.yaml data/coco/data.yaml
"""

import argparse
import sys
from pathlib import Path

from qformer.config.help import HelpFormatter
from qformer.data.known.sets import KNOWN, WEB
from qformer.data.known.writing import Written, write_known, write_web
from qformer.messages import nearest, print_error


def main(argv: list[str] | None = None) -> None:
    width = max(map(len, [*KNOWN, *WEB]))
    lines = [f"  {name:<{width}}  {known.what}" for name, known in KNOWN.items()]
    lines += [f"  {name:<{width}}  {what}: tars of img2dataset" for name, what in WEB.items()]
    parser = argparse.ArgumentParser(
        prog="python -m qformer.data.known", description=__doc__, formatter_class=HelpFormatter,
        epilog="\n".join(["data sets:", *lines]),
    )  # fmt: skip
    parser.add_argument("name", metavar="SET", help="one of the data sets below")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="its published files, or folders that hold them")
    parser.add_argument("--out", type=Path, required=True, help="folder for SPLIT.jsonl and data.yaml")
    parser.add_argument("--images", type=Path, help="folder where the images' archives are unpacked (OUT)")
    args = parser.parse_intermixed_args(argv)
    try:
        if args.name in WEB:
            _convert_web(args.name, args.paths, args.out, args.images)
        elif args.name in KNOWN:
            _report(args.out, write_known(args.name, args.paths, args.out, args.images))
        else:
            raise ValueError(f"{args.name!r} is no known data set; {nearest(args.name, [*KNOWN, *WEB])}; see --help")
    except (ValueError, OSError) as error:
        print_error(f"error: {error}")
        raise SystemExit(2) from None


def _convert_web(name: str, folders: list[str], out: Path, images: Path | None) -> None:
    if images is not None:
        raise ValueError(f"--images {images}: the images of {name} are in its tars; leave it out")
    for source, count in write_web(name, folders, out).items():
        print(f"{source}: {count} records; it is data.train in {out / 'data.yaml'}")


def _report(out: Path, written: Written) -> None:
    for split, count in written.counts.items():
        print(f"{out / f'{split}.jsonl'}: {count} records")
    if written.missing:
        print(
            f"warning: of {written.missing} records the image is not there, the first is {written.first_missing}; "
            "unpack them there, or name their folder with --images", file=sys.stderr,
        )  # fmt: skip


if __name__ == "__main__":
    main()
