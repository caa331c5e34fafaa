"""A loaded model over records: all ranks, workers that read images, one batch of images at a time, resumable."""

import datetime
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import PartialState
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qformer.data import BrokenRecord, Record
from qformer.data.loading import load_input, start_worker
from qformer.data.transforms import ImageTransform
from qformer.distributed import gather_objects
from qformer.evaluation.choosing import Chosen
from qformer.evaluation.outputs import OutputFile
from qformer.evaluation.task import WITH_IMAGE, Task
from qformer.inference import load
from qformer.launch import require_all_ranks

GATHER_TIMEOUT = datetime.timedelta(hours=6)  # a rank that is done waits for the slowest


NamedImages = list[tuple[str, Tensor]]  # a record's images, each under a name that equal ones share


class Images(Dataset[tuple[int, NamedImages | str]]):
    """The images of each of the `indices`, float[3, S, S] (a clip float[n, 3, S, S]) or features float[N, Dv]; a str is why
    one cannot be read.
    """

    def __init__(self, records: Chosen | list[Record], indices: Sequence[int], transform: ImageTransform | None):
        self.records, self.indices, self.transform = records, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, NamedImages | str]:
        index = self.indices[position]
        try:
            images = self.records[index].each_image()
            return index, [(image.image, load_input(image, self.transform, [None])[0]) for image in images]
        except BrokenRecord as broken:
            return index, str(broken)


def is_first_rank() -> bool:
    """Whether this process is the one that scores, prints and writes."""
    return PartialState().is_main_process


def start_ranks(device: str | None) -> PartialState:
    """This process among those that were launched, alone without a launcher.

    Raises: ValueError when several processes were launched that cannot find each other.
    """
    cpu = device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=GATHER_TIMEOUT)
    require_all_ranks(state.num_processes, "answer everything", "--device cpu")
    return state


def compute_outputs(
    adapter: str, task: Task, chosen: Chosen, *,
    mode: str, file: OutputFile | None, batch_size: int, workers: int, device: str | None, clips: dict[str, Any],
    generation: dict[str, Any],
) -> tuple[list[Any], list[str]]:  # fmt: skip
    """The output for each of the records, None where the image cannot be read, and why; the same on every rank.

    Args:
        file: where outputs are kept while they are computed, and those of an earlier try taken from.
        clips: arguments of `VisionLanguageModel.sample_clips`.

    Raises: ValueError when the adapter cannot be loaded, or the file was made of something else.
    """
    state, texts = start_ranks(device), chosen.texts
    outputs = file.load() if file else {}
    state.wait_for_everyone()  # all ranks read the same before one writes
    broken = {i: str(BrokenRecord(r.image, r.problem)) for i, r in enumerate(texts) if r.problem is not None}
    todo = [i for i in range(len(texts)) if i not in outputs and i not in broken]
    if todo:
        model = load(adapter, device=device or (str(state.device) if state.num_processes > 1 else None))
        model.sample_clips(**clips)
        mine = todo[state.process_index :: state.num_processes]
        if file:
            file.begin(state.process_index)
        batches = None
        if mode == WITH_IMAGE:
            batches = image_batches(chosen, mine, model.transform, batch_size=batch_size, workers=workers)
        total = -(-len(mine) // batch_size)
        hidden = not (state.is_main_process and sys.stderr.isatty())
        for batch in track(batches or _without(mine, batch_size), "answering", total, disable=hidden):
            images = _shared(batch) if batches else None
            asked = [i for i, image in batch if not isinstance(image, str)]
            broken |= {i: image for i, image in batch if isinstance(image, str)}
            if asked:
                assert task.ask is not None, "a task without `search` asks"
                answered = task.ask(model, [texts[i] for i in asked], images, mode, **generation)
                fresh = dict(zip(asked, answered, strict=True))
                outputs |= fresh
                if file:
                    file.append(fresh)
    for others, reasons in gather_objects((outputs, broken)):
        outputs |= others
        broken |= reasons
    if file and state.is_main_process:
        file.save(outputs)
    return [outputs.get(i) for i in range(len(texts))], [broken[i] for i in sorted(broken)]


def image_batches(
    records: Chosen | list[Record],
    indices: Sequence[int],
    transform: ImageTransform | None,
    *,
    batch_size: int,
    workers: int,
) -> DataLoader:
    """Batches of (index, image); a worker reads no further than one batch ahead."""
    workers = min(workers, -(-len(indices) // batch_size))
    return DataLoader(
        Images(records, indices, transform), batch_size, num_workers=workers, collate_fn=list,
        worker_init_fn=start_worker, prefetch_factor=1 if workers else None, generator=torch.Generator(),
    )  # fmt: skip


def _without(indices: Sequence[int], batch_size: int) -> Iterator[list[tuple[int, None]]]:
    for start in range(0, len(indices), batch_size):
        yield [(i, None) for i in indices[start : start + batch_size]]


def _shared(batch: list[tuple[int, NamedImages | str]]) -> list[list[Tensor]]:
    """The images that could be read; records of one file get one tensor, which is then encoded once."""
    first: dict[str, Tensor] = {}
    rows = [images for _, images in batch if not isinstance(images, str)]
    return [[first.setdefault(*named) for named in images] for images in rows]
