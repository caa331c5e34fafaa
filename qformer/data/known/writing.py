"""Record files from published files, and tars of img2dataset checked and named."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qformer.data.known.captions import Row
from qformer.data.known.sets import read_known
from qformer.files import atomic_file

NO_SPLIT = "records"  # the name of the file of records that have no split


@dataclass
class Written:
    """What was written: records by the name of their file, and those whose image is not where they say."""

    counts: Counter[str] = field(default_factory=Counter)
    missing: int = 0
    first_missing: str = ""


def write_known(name: str, paths: Sequence[str | Path], out: Path, images: Path | None = None) -> Written:
    """Write the records of a known set as OUT/SPLIT.jsonl, one record in memory at a time, and OUT/data.yaml.

    A file is there whole or not at all.

    Args:
        paths: as `read_known` takes them.
        images: where the images' archives are unpacked; None = `out`. In a folder that is not in `out`, records name
            images by their whole path.

    Raises: ValueError as `read_known`; when there are no records.
    """
    images = out if images is None else images.expanduser()
    prefix = os.path.relpath(images, out)
    prefix = "" if prefix == "." else os.path.abspath(images) if prefix.startswith(os.pardir) else prefix
    rows, written = read_known(name, paths), Written()
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        files = {}
        for row in rows:
            split = row.get("split") or NO_SPLIT
            if split not in files:
                files[split] = stack.enter_context(
                    stack.enter_context(atomic_file(out / f"{split}.jsonl")).open("w", encoding="utf-8")
                )
            placed = _place(row, prefix)
            _note_missing(placed, out, written)
            files[split].write(json.dumps(placed, ensure_ascii=False) + "\n")
            written.counts[split] += 1
        if not files:
            raise ValueError(f"{name}: {', '.join(map(str, paths))} holds no records")
    _write_config(out, {split: str(out / f"{split}.jsonl") for split in written.counts})
    return written


def _place(row: Row, prefix: str) -> Row:
    """The record of a row: images below the prefix, and no empty fields."""
    placed = {key: value for key, value in row.items() if value not in (None, [], ())}
    for key in ("image", "video"):
        if key in placed:
            placed[key] = os.path.join(prefix, placed[key])
    if "images" in placed:
        placed["images"] = [os.path.join(prefix, image) for image in placed["images"]]
    return placed


def _note_missing(row: Row, out: Path, written: Written) -> None:
    names = row.get("images") or [row.get("image") or row["video"]]
    missing = [path for path in (out / name for name in names) if not path.is_file()]
    if missing:
        written.first_missing = written.first_missing or str(missing[0])
        written.missing += 1


def _write_config(out: Path, files: dict[str, str]) -> None:
    """OUT/data.yaml, which a stage takes as it takes configs/data/coco.yaml."""
    train = [files[split] for split in ("train", "restval", NO_SPLIT) if split in files]
    validation = [files[split] for split in ("val", "validate", "dev") if split in files][:1]
    if train:
        lines = ["data:", f"  train: {json.dumps(train)}"]
        lines += [f"  validation: {json.dumps(validation)}"] if validation else []
        with atomic_file(out / "data.yaml") as scratch:
            scratch.write_text("\n".join(lines) + "\n")


def write_web(name: str, folders: Sequence[str | Path], out: Path) -> Counter[str]:
    """Write OUT/data.yaml with the tars of img2dataset, and count their records by folder.

    Raises: ValueError as `web_source`.
    """
    sources = [web_source(name, folder) for folder in folders]
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / "data.yaml") as scratch:
        scratch.write_text(f"data:\n  train: {json.dumps([source for source, _ in sources])}\n")
    return Counter({source: count for source, count in sources})


def web_source(name: str, folder: str | Path) -> tuple[str, int]:
    """What names the tars of an img2dataset folder in `data.train`, and how many records its statistics count.

    Raises: ValueError when there are no tars, a number is missing among them, or one was not finished.
    """
    folder = Path(folder).expanduser()
    numbers = sorted(path.stem for path in folder.glob("*.tar") if path.stem.isdigit())
    if not numbers:
        raise ValueError(
            f"{name}: there is no 00000.tar in {folder}; expected the output of img2dataset "
            "--output_format webdataset, run on the published list of addresses"
        )
    expected = [f"{number:0{len(numbers[0])}d}" for number in range(int(numbers[0]), int(numbers[-1]) + 1)]
    lacking = [f"{number}.tar" for number in expected if number not in set(numbers)]
    lacking += [f"{number}_stats.json" for number in numbers if not (folder / f"{number}_stats.json").is_file()]
    if lacking:
        others = f" and {len(lacking) - 1} other files" if len(lacking) > 1 else ""
        raise ValueError(f"{name}: {folder} lacks {lacking[0]}{others}; it is not finished: run img2dataset again")
    count = sum(json.loads((folder / f"{number}_stats.json").read_text())["successes"] for number in numbers)
    span = numbers[0] if len(numbers) == 1 else f"{{{numbers[0]}..{numbers[-1]}}}"
    return str(folder / f"{span}.tar"), count
