"""Every side of `reader.py`: one process that reads captioned pictures, shuffled, with its library's own means.

All decode by Pillow and use the same transform, so that what differs is how the bytes and captions get there.
"""

import itertools
import json
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from qformer.data import GlobalBatches, ImageTransform, RecordDataset, build_order, read_records, training_loader

BATCH = 64
BUFFER = 1000  # records that the peers shuffle among; ours shuffles all
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def build(folder: Path, task: dict[str, Any]) -> "Reading":
    kinds: dict[str, type[Reading]] = {"ours": Tars, "ours, in blocks": Blocks, "ours, files": Files}
    kinds |= {"datasets": Datasets, "datasets, Arrow": Arrow, "webdataset": WebDataset}
    return kinds[task["side"]](task)


class Reading:
    """Reads `pictures` at a time, decoded to pixels of `image_size` or, with `bytes`, as they are."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.task, self.pictures = task, task["pictures"]
        self.transform = ImageTransform(task["image_size"], *CLIP)
        self.stream = self.read()

    def read(self) -> Iterator[tuple[str, Any]]:
        """An endless stream of captions with their pixels or bytes."""
        raise NotImplementedError

    def endless(self, once: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """What a loader of the library gives, over and over; pixels in batches, as ours are."""
        again = itertools.chain.from_iterable(itertools.repeat(once))
        if self.task["bytes"]:
            yield from again
        while samples := list(itertools.islice(again, BATCH)):
            pixels = torch.stack([self.transform.apply(image) for _, image in samples])
            yield from zip([caption for caption, _ in samples], pixels, strict=True)

    def check(self) -> dict[str, Any]:
        """Every caption with a number of its picture, in the order of the captions."""
        found = sorted((caption, _number(image)) for caption, image in itertools.islice(self.read(), self.task["all"]))
        return {"captions": [caption for caption, _ in found], "pictures": [number for _, number in found]}

    def step(self, round: int) -> dict[str, float]:
        began = time.process_time()
        for _ in itertools.islice(self.stream, self.pictures):
            pass
        return {"core_s": time.process_time() - began}


def _number(image: Any) -> float:
    return float(zlib.crc32(image)) if isinstance(image, bytes) else float(image.double().mean())


class Tars(Reading):
    sources, block = ["{folder}/tars/*.tar"], 1

    def read(self) -> Iterator[tuple[str, Any]]:
        records = read_records([source.format(folder=self.task["folder"]) for source in self.sources])
        order = build_order(records.sizes, seed=0, block_records=self.block)
        if self.task["bytes"]:
            for position in itertools.count():
                record = records[order.draw(position).index]
                yield record.captions[0], record.image_bytes or Path(record.image).read_bytes()
        dataset = RecordDataset(records, self.transform, seed=0, augment=False, text="caption", cleaning="none")
        for batch in training_loader(dataset, GlobalBatches(order, 1, 0, BATCH), 0):
            yield from zip(batch.texts, batch.images, strict=True)


class Blocks(Tars):
    block = 32


class Files(Tars):
    sources = ["{folder}/records.jsonl"]


class Datasets(Reading):
    """Streaming through a shuffle buffer."""

    def read(self) -> Iterator[tuple[str, Any]]:
        import datasets

        rows = datasets.load_dataset("webdataset", data_files=f"{self.task['folder']}/tars/*.tar", split="train",
                                     streaming=True).shuffle(seed=0, buffer_size=BUFFER)  # fmt: skip
        rows = rows.cast_column("jpg", datasets.Image(decode=not self.task["bytes"]))
        return self.endless(_Rows(rows, "jpg", "txt"))


class Arrow(Reading):
    """Converted to Arrow first, then read in random order."""

    def read(self) -> Iterator[tuple[str, Any]]:
        import datasets

        rows = datasets.load_dataset("webdataset", data_files=f"{self.task['folder']}/tars/*.tar", split="train")
        rows = rows.shuffle(seed=0).cast_column("jpg", datasets.Image(decode=not self.task["bytes"]))
        return self.endless(_Rows(rows, "jpg", "txt"))


class _Rows:
    def __init__(self, rows: Any, image: str, caption: str) -> None:
        self.rows, self.image, self.caption = rows, image, caption

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for row in self.rows:
            image = row[self.image]
            yield row[self.caption], image["bytes"] if isinstance(image, dict) else image.convert("RGB")


class WebDataset(Reading):
    """Streaming through a shuffle buffer."""

    def read(self) -> Iterator[tuple[str, Any]]:
        import webdataset

        tars = sorted(str(path) for path in Path(self.task["folder"], "tars").iterdir())
        found = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(BUFFER)
        if self.task["bytes"]:
            return self.endless(found.map(lambda sample: (sample["txt"].decode(), sample["jpg"])))
        return self.endless(found.decode("pil").to_tuple("txt", "jpg"))


def write(folder: Path, n: int, size: tuple[int, int], tars: int) -> None:
    """`n` JPEG pictures of smooth noise with a caption each: as files with records.jsonl, and in tars."""
    import tarfile

    import numpy as np

    (folder / "pictures").mkdir()
    (folder / "tars").mkdir()
    lines = []
    for i in range(n):
        coarse = np.random.default_rng(i).integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
        name = folder / "pictures" / f"{i:06d}"
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(name.with_suffix(".jpg"), quality=90)
        name.with_suffix(".txt").write_text(f"picture {i:06d} of smooth noise")
        lines.append({"image": f"pictures/{i:06d}.jpg", "caption": f"picture {i:06d} of smooth noise"})
        with tarfile.open(folder / "tars" / f"{i * tars // n:03d}.tar", "a") as tar:
            for ending in (".jpg", ".txt"):
                tar.add(name.with_suffix(ending), name.name + ending)
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
