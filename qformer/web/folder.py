"""A folder of one's pictures, embedded once and searched by words."""

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qformer.data import BrokenRecord, Record, load_image
from qformer.data.tars import PICTURES
from qformer.evaluation.progress import Passing
from qformer.evaluation.running import image_batches
from qformer.files import atomic_file
from qformer.inference import VisionLanguageModel
from qformer.objectives import similarity

SAVE_EVERY_S = 60
BATCH = 32
THUMBNAIL = 512  # longest side in pixels


@dataclass(frozen=True)
class Hit:
    """A picture of the folder: its name there, its cosine with the text, and a small copy."""

    name: str
    cosine: float
    thumbnail: Image.Image


class PictureFolder:
    """The images in a folder and those below it, by relative name; links that lead out of it are left out.

    Args:
        cache: folder where embeddings are kept from one start to the next.

    Raises: ValueError when it is no folder or holds no image.
    """

    def __init__(self, folder: Path, cache: Path):
        if not folder.is_dir():
            raise ValueError(f"--folder {folder}: no such folder; expected one with pictures")
        self.folder, self.cache = folder.resolve(), cache
        self.names = list_pictures(self.folder)
        if not self.names:
            raise ValueError(f"--folder {folder} holds no image; expected {', '.join(PICTURES)}")
        self.embedded: dict[str, tuple[list[str], Tensor]] = {}  # by the adapter's name

    def embed(self, name: str, model: VisionLanguageModel, workers: int = 2) -> int:
        """Embed what the cache does not hold yet by an adapter of stage 1; returns how many cannot be read.

        Raises: ValueError when none can be read.
        """
        path = self.cache / f"{_digest(self.folder, model)}.safetensors"
        there = _load(path)
        stamps = {picture: _stamp(self.folder / picture) for picture in self.names}
        embeds = {key: there[stamp] for key, stamp in stamps.items() if stamp in there}
        todo = [picture for picture in self.names if picture not in embeds]
        records = [Record(str(self.folder / picture), picture) for picture in todo]
        batches = image_batches(
            records, range(len(todo)), model.transform, batch_size=BATCH, workers=workers if len(todo) > BATCH else 0
        )
        saved_at = time.monotonic()
        with Passing(f"embedding {self.folder}", len(todo), shown=bool(todo)) as passing:
            for batch in batches:
                sound = {i: row[0][1] for i, row in batch if not isinstance(row, str)}
                if sound:
                    rows = model.embed_image(list(sound.values())).cpu()
                    embeds |= {todo[i]: row for i, row in zip(sound, rows, strict=True)}
                if time.monotonic() - saved_at > SAVE_EVERY_S:
                    _save(path, embeds, stamps)
                    saved_at = time.monotonic()
                passing.advance(len(batch))
        if not embeds:
            raise ValueError(f"--folder {self.folder}: none of its {len(self.names)} images can be read")
        if todo:
            _save(path, embeds, stamps)
        self.embedded[name] = list(embeds), torch.stack(list(embeds.values()))
        return len(self.names) - len(embeds)

    def search(self, name: str, model: VisionLanguageModel, text: str, *, count: int) -> list[Hit]:
        """The `count` pictures most similar to a text, the best first; one that has gone since is left out."""
        names, embeds = self.embedded[name]
        scores = similarity(embeds, model.embed_text(text).cpu())[:, 0]
        hits = []
        for score, row in zip(*(values.tolist() for values in scores.topk(min(count, len(names)))), strict=True):
            try:
                image = load_image(Record(str(_inside(self.folder, names[row])), names[row]))
            except BrokenRecord:
                continue
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            hits.append(Hit(names[row], score, image))
        return hits


def list_pictures(folder: Path) -> list[str]:
    """Names of the images in a folder and below it, relative to it, in their order; nothing that a link leads out to."""
    names = []
    for place, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for file in sorted(files):
            path = Path(place, file)
            if path.suffix.lower()[1:] in PICTURES and not file.startswith(".") and _is_inside(folder, path):
                names.append(path.relative_to(folder).as_posix())
    return names


def _is_inside(folder: Path, path: Path) -> bool:
    real = path.resolve()
    return real.is_relative_to(folder) and real.is_file()


def _inside(folder: Path, name: str) -> Path:
    """The path of a picture.

    Raises: BrokenRecord when it has become a link that leads out of the folder.
    """
    if not _is_inside(folder, folder / name):
        raise BrokenRecord(name, "it is no longer in the folder")
    return folder / name


def _stamp(path: Path) -> str:
    """Another one for another file, or for the same one after it was changed."""
    status = path.stat()
    return f"{path}:{status.st_size}:{status.st_mtime_ns}"


def _digest(folder: Path, model: VisionLanguageModel) -> str:
    """Another one for another folder, adapter or encoder."""
    digest = hashlib.sha256(f"{folder}\n{model.config.encoder}\n{model.transform}".encode())
    for key, tensor in sorted(model.model.adapter.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:24]


def _load(path: Path) -> dict[str, Tensor]:
    """Embeddings by the stamps of their files; none where the cache holds none, or is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            stamps = json.loads(file.metadata()["stamps"])
            return dict(zip(stamps, file.get_tensor("embeds"), strict=True))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return {}


def _save(path: Path, embeds: dict[str, Tensor], stamps: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as scratch:
        rows = torch.stack(list(embeds.values())).contiguous()
        save_file({"embeds": rows}, scratch, {"stamps": json.dumps([stamps[name] for name in embeds])})
