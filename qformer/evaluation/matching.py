"""Every image and every caption of a collection embedded once, compared by ITC, and the best pairs matched by ITM.

Blocks of images and of texts are the same however many ranks there are, and an image's pairs are matched beside each
other alone: any number of ranks, and a pass that was stopped and goes on, compute the same bits. A rank keeps the features of
its own images on disk and matches those, so that no feature crosses ranks; an image's keys and values are made once for
all of its pairs.
"""

import contextlib
import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qformer.distributed import gather, gather_objects, pad_to_longest, rank, world_size
from qformer.encoders import Features
from qformer.evaluation.choosing import Chosen
from qformer.evaluation.collection import Collection, Ranked
from qformer.evaluation.parts import Parts
from qformer.evaluation.progress import Passing
from qformer.evaluation.retrieval import ITC, ITM, ITM_ITC, PRODUCT, RULES
from qformer.evaluation.running import image_batches, start_ranks
from qformer.inference import VisionLanguageModel, load
from qformer.metrics.retrieval import order_keys, read_keys
from qformer.models import Stage1
from qformer.models.batch import TextTokens
from qformer.objectives import similarity

AT_ONCE = 4  # times the batch size: pairs that are matched, and texts that are embedded, at a time
COMPARED = 1024  # texts that a block of images is compared with at a time
KEEP_EVERY_S = 60.0  # of matching: what a stop costs at most


class Block(NamedTuple):
    """The images of one block that could be read: their numbers int64[b], and float[b, Q, E]."""

    number: int
    images: Tensor
    embeds: Tensor


class Pairs(NamedTuple):
    """Pairs in ascending order of int64[P] image * U + text, and each one's logits of no match and match, float32[P, 2]."""

    ids: Tensor
    logits: Tensor


class Candidates(NamedTuple):
    """The best by similarity: keys of `order_keys`, int64[R, k] in descending order, of R rows with numbers int64[R]."""

    rows: Tensor
    keys: Tensor


def search(
    adapter: str, records: Chosen, collection: Collection, *, rule: str, candidates: int,
    folder: Path | None, made_of: dict[str, Any], batch_size: int, workers: int, device: str | None, clips: dict[str, Any],
) -> tuple[list[Any], list[str]] | None:  # fmt: skip
    """`Collection.outputs` by a rule, and why images could not be read.

    Args:
        records: of each image one.
        candidates: how many ITC leaves to ITM, each way.
        folder: where parts are kept, and those of an earlier try taken from; None = nowhere.
        made_of: what the parts depend on.
        clips: arguments of `VisionLanguageModel.sample_clips`.

    Returns: None on ranks but the first.

    Raises: ValueError when the adapter cannot be loaded or was not trained for the rule, the folder was made of something
        else, or the disk is too small.
    """
    state = start_ranks(device)
    model = load(adapter, device=device or (str(state.device) if state.num_processes > 1 else None))
    model.sample_clips(**clips)
    stage = _require_stage1(model, rule)
    with contextlib.ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qformer-retrieval-")))
        parts = Parts(place, _depends_on(made_of, collection, batch_size))
        state.wait_for_everyone()  # all ranks read the same before one writes
        parts.begin()
        state.wait_for_everyone()
        mine = Search(model, stage, collection, parts=parts, batch_size=batch_size)
        with torch.no_grad():
            return mine.run(records, rule=rule, k=candidates, workers=workers)


def _depends_on(made_of: dict[str, Any], collection: Collection, batch_size: int) -> dict[str, Any]:
    """What every part depends on; which pairs are matched may change, since parts say what they hold."""
    content = hashlib.blake2b(repr((collection.image_ids, collection.captions)).encode(errors="replace"), digest_size=8)
    kept = {key: value for key, value in made_of.items() if key != "candidates"}
    return kept | {"images and captions": content.hexdigest(), "batch size": batch_size, "logits": 2}


def _require_stage1(model: VisionLanguageModel, rule: str) -> Stage1:
    stage: Any = model.model
    if stage.name != "stage1":
        raise ValueError(
            f"retrieval takes an adapter of stage 1, which embeds and matches; this one is of {stage.name}"
        )
    for name in (ITC,) if rule == ITC else (ITC, ITM):
        if name not in stage.adapter.weights:
            why = "--rule itc does without" if name == ITM else "candidates are chosen by it"
            raise ValueError(f"this adapter was trained with stage1.{name}=0, and --rule {rule} needs it: {why}")
    return stage


class Search:
    """One rank's part of a search through a collection.

    Args:
        batch_size: images encoded at a time; `AT_ONCE` times as many texts or pairs.
    """

    def __init__(
        self, model: VisionLanguageModel, stage: Stage1, collection: Collection, *, parts: Parts, batch_size: int
    ) -> None:  # fmt: skip
        self.model, self.adapter, self.collection, self.parts = model, stage.adapter, collection, parts
        self.batch_size, self.device = batch_size, model.device
        self.tokens = stage.tokenize(collection.texts)
        self.text_of = torch.from_numpy(collection.text_of).to(model.device)
        self.image_of = torch.from_numpy(collection.image_of).to(model.device)

    def run(
        self, records: Chosen, *, rule: str, k: int, workers: int
    ) -> tuple[list[Any], list[str]] | None:  # fmt: skip
        """As `search`."""
        blocks, reasons = self.embed_images(records, workers, keep_features=rule != ITC)
        broken = {i: reason for of_rank in gather_objects(reasons) for i, reason in of_rank.items()}
        count = len(records)
        if len(broken) == count:
            raise ValueError(f"no image could be read, the first: {broken[min(broken)]}")
        sound = torch.tensor([i not in broken for i in range(count)], device=self.device)
        captions = sound[self.image_of].nonzero()[:, 0]
        mine, of_texts = self.compare(blocks, self.embed_texts(), captions, k)
        pairs = self.match(blocks, self.choose_pairs(mine, of_texts)) if rule != ITC else None
        of_images = Candidates(*map(_of_all_ranks, mine))
        every = None if pairs is None else Pairs(*map(_of_all_ranks, pairs))
        if rank() > 0:
            return None
        if every is not None:
            order = every.ids.argsort()
            every = Pairs(every.ids[order], every.logits[order])
        lists = {
            name: self.collection.outputs(
                self.order(of_images, every, name, of_images=True), self.order(of_texts, every, name, of_images=False)
            )
            for name in ((ITC,) if rule == ITC else RULES)
        }
        outputs = lists.pop(rule)
        for name, others in lists.items():
            for output, other in zip(outputs, others, strict=True):
                if output is not None and other is not None:
                    output.setdefault("by_rule", {})[name] = {key: other[key] for key in ("captions", "images")}
        return outputs, [broken[i] for i in sorted(broken)]

    def embed_images(
        self, records: Chosen, workers: int, *, keep_features: bool
    ) -> tuple[list[Block], dict[int, str]]:  # fmt: skip
        """This rank's blocks, and why images of them cannot be read, by number; their features go to the parts.

        Raises: ValueError when the disk will not hold the features.
        """
        count = len(records)
        ranges = [range(first, min(first + self.batch_size, count)) for first in range(0, count, self.batch_size)]
        blocks: list[Block] = []
        todo: list[int] = []
        for number in range(rank(), len(ranges), world_size()):
            part = self.parts.load(f"images-{number:05d}")
            lacks = keep_features and not self.parts.has(f"features-{number:05d}")
            if part is not None and not lacks and len(part["images"]) == len(ranges[number]):  # broken ones: try again
                blocks.append(Block(number, part["images"].to(self.device), part["embeds"].to(self.device)))
            else:
                todo.append(number)
        images = [i for number in todo for i in ranges[number]]
        batches = image_batches(records, images, self.model.transform, batch_size=self.batch_size, workers=workers)
        broken: dict[int, str] = {}
        with Passing("encoding images", len(images), shown=rank() == 0) as passing:
            for number, batch in zip(todo, batches, strict=True):
                broken |= {i: image for i, image in batch if isinstance(image, str)}
                sound = {i: [image for _, image in row] for i, row in batch if not isinstance(row, str)}
                if sound:
                    features = self.model.encode(list(sound.values()))
                    numbers = torch.tensor(list(sound), device=self.device)
                    blocks.append(Block(number, numbers, self.model.embed_image(features)))
                    self._keep(blocks[-1], features if keep_features else None, len(images) - passing.done)
                passing.advance(len(batch))
        return sorted(blocks, key=lambda block: block.number), broken

    def _keep(self, block: Block, features: Features | None, left: int) -> None:
        if features is not None:
            tokens, mask = features
            needed, free = left * tokens[0].nbytes, shutil.disk_usage(self.parts.folder).free
            if free < needed:
                raise ValueError(
                    f"{self.parts.folder}: the features of {left} images take {needed / 1e9:.3g} GB more, its disk has "
                    f"{free / 1e9:.3g} GB free; set TMPDIR or --answers to a larger one, or take --rule itc"
                )
            both = {"tokens": tokens} if mask is None else {"tokens": tokens, "mask": mask}
            self.parts.save(f"features-{block.number:05d}", both)
        self.parts.save(f"images-{block.number:05d}", {"images": block.images, "embeds": block.embeds})

    def embed_texts(self) -> Tensor:
        """float[U, E] of all ranks' texts."""
        size, count = AT_ONCE * self.batch_size, len(self.collection.texts)
        numbers = range(rank(), -(-count // size), world_size())
        embeds: dict[int, Tensor] = {}
        with Passing(
            "embedding texts", sum(min(size, count - n * size) for n in numbers), shown=rank() == 0
        ) as passing:
            for number in numbers:
                part = self.parts.load(f"texts-{number:05d}")
                if part is None:
                    rows = torch.arange(number * size, min((number + 1) * size, count), device=self.device)
                    part = {"texts": rows, "embeds": self.adapter.embed_text(self._text(rows))}
                    self.parts.save(f"texts-{number:05d}", part)
                embeds[number] = part["embeds"].to(self.device)
                passing.advance(len(part["embeds"]))
        width = self.adapter.text_projection.out_features
        rows = torch.tensor([n * size + i for n, e in embeds.items() for i in range(len(e))], dtype=torch.long)
        mine = torch.cat([torch.zeros(0, width, device=self.device), *embeds.values()])
        order = _of_all_ranks(rows.to(self.device)).argsort()
        return _of_all_ranks(mine)[order]

    def _text(self, rows: Tensor) -> TextTokens:
        mask = self.tokens.mask[rows]
        longest = int(mask.sum(1).max())
        return TextTokens(self.tokens.ids[rows, :longest], mask[:, :longest])

    def compare(
        self, blocks: list[Block], texts: Tensor, captions: Tensor, k: int
    ) -> tuple[Candidates, Candidates]:  # fmt: skip
        """The `k` captions most similar to each image of this rank, and the `k` images to each caption, of all ranks.

        Args:
            texts: float[U, E], captions: int64[T'], the numbers of the captions that take part.
        """
        text_of = self.text_of[captions]
        of_images: list[Tensor] = []
        of_texts = torch.zeros(len(captions), 0, dtype=torch.long, device=self.device)
        for block in blocks:
            near = torch.cat([similarity(block.embeds, some) for some in texts.split(COMPARED)], 1)
            right = self.image_of[captions] == block.images[:, None]
            of_images.append(_best(order_keys(near[:, text_of], right, captions), k))
            keys = order_keys(near.T[text_of], right.T, block.images)
            of_texts = _best(torch.cat([of_texts, keys], 1), k)
        rows = torch.cat([torch.zeros(0, dtype=torch.long, device=self.device), *(b.images for b in blocks)])
        none = torch.zeros(0, min(k, len(captions)), dtype=torch.long, device=self.device)
        mine = Candidates(rows, torch.cat([none, *of_images]))
        return mine, Candidates(captions, _best(_of_all_ranks(of_texts.T).T, k))

    def choose_pairs(self, of_images: Candidates, of_texts: Candidates) -> Tensor:
        """What is to be matched of this rank's images, each pair once: int64[P] image * U + text, ascending."""
        captions = read_keys(of_images.keys)[2]
        ids = [self._pair_ids(of_images.rows[:, None].expand_as(captions), captions).flatten()]
        images = read_keys(of_texts.keys)[2]
        mine = torch.isin(images, of_images.rows)
        ids.append(self._pair_ids(images, of_texts.rows[:, None].expand_as(images))[mine])
        return torch.cat(ids).unique()

    def _pair_ids(self, images: Tensor, captions: Tensor) -> Tensor:
        return images * len(self.collection.texts) + self.text_of[captions]

    def match(self, blocks: list[Block], wanted: Tensor) -> Pairs:
        """The logits of all `wanted` pairs; those of the parts are taken where an image's pairs are the same."""
        wanted = wanted.cpu()
        bounds = {i: self._bounds(wanted, i) for block in blocks for i in block.images.tolist()}
        logits = torch.full((len(wanted), 2), torch.nan)
        for image, there in self._matched_before():
            first, last = bounds.get(image, (0, 0))
            if torch.equal(wanted[first:last], there.ids):
                logits[first:last] = there.logits
        todo = {image for image, (first, _) in bounds.items() if logits[first].isnan().any()}
        fresh: list[int] = []
        kept_at = time.monotonic()
        total = sum(last - first for image, (first, last) in bounds.items() if image in todo)
        with Passing("matching pairs", total, shown=rank() == 0) as passing:
            for image, features in self._features(blocks, todo):
                first, last = bounds[image]
                logits[first:last] = self.match_image(
                    features, wanted[first:last] % len(self.collection.texts), passing
                )
                fresh.append(image)
                if time.monotonic() - kept_at > KEEP_EVERY_S:
                    self._keep_pairs(fresh, bounds, wanted, logits)
                    fresh, kept_at = [], time.monotonic()
        self._keep_pairs(fresh, bounds, wanted, logits)
        return Pairs(wanted.to(self.device), logits.to(self.device))

    def match_image(self, features: Features, texts: Tensor, passing: Passing) -> Tensor:
        """float32[n, 2], the logits of no match and match of one image's features with texts int64[n]."""
        memory = self.adapter.project_images(*features)
        logits = []
        for rows in texts.to(self.device).split(AT_ONCE * self.batch_size):
            logits.append(self.adapter.match([memory._replace(times=len(rows))], *self._text(rows)).cpu())
            passing.advance(len(rows))
        return torch.cat(logits)

    def _bounds(self, ids: Tensor, image: int) -> tuple[int, int]:
        """Where an image's pairs begin and end."""
        count = len(self.collection.texts)
        first, last = torch.searchsorted(ids, torch.tensor([image * count, (image + 1) * count])).tolist()
        return first, last

    def _features(self, blocks: list[Block], images: set[int]) -> Iterator[tuple[int, Features]]:
        """The features of some images, a block at a time in memory."""
        for block in blocks:
            numbers = block.images.tolist()
            if images.isdisjoint(numbers):
                continue
            part = self.parts.load(f"features-{block.number:05d}")
            assert part is not None, "a block's features are kept as it is embedded"
            for row, image in enumerate(numbers):
                if image in images:
                    mask = part["mask"][row : row + 1] if "mask" in part else None
                    yield image, self.model.encode(Features(part["tokens"][row : row + 1], mask))

    def _keep_pairs(
        self, images: list[int], bounds: dict[int, tuple[int, int]], wanted: Tensor, logits: Tensor
    ) -> None:  # fmt: skip
        if images:
            rows = torch.cat([torch.arange(*bounds[image]) for image in images])
            self.parts.save(f"pairs-{images[0]:07d}", {"ids": wanted[rows], "logits": logits[rows]})

    def _matched_before(self) -> Iterator[tuple[int, Pairs]]:
        for name in self.parts.names("pairs-"):
            part = self.parts.load(name)
            assert part is not None
            for image in (part["ids"] // len(self.collection.texts)).unique().tolist():
                first, last = self._bounds(part["ids"], image)
                yield image, Pairs(part["ids"][first:last], part["logits"][first:last])

    def order(self, candidates: Candidates, pairs: Pairs | None, rule: str, *, of_images: bool) -> Ranked:
        """Candidates in the order of their scores by a rule."""
        near, right, numbers = read_keys(candidates.keys)
        scores = near
        if rule != ITC:
            assert pairs is not None
            rows = candidates.rows[:, None].expand_as(numbers)
            ids = self._pair_ids(rows, numbers) if of_images else self._pair_ids(numbers, rows)
            no, yes = pairs.logits[torch.searchsorted(pairs.ids, ids)].unbind(-1)
            scores = {ITM: yes, ITM_ITC: yes + near, PRODUCT: yes - no + near / self.adapter.temperature}[rule]
        keys = order_keys(scores, right, numbers).sort(descending=True).values
        scores, _, numbers = read_keys(keys)
        order = candidates.rows.argsort()
        return Ranked(*(x[order].cpu().numpy() for x in (candidates.rows, numbers, scores)))


def _best(keys: Tensor, k: int) -> Tensor:
    """The `k` largest keys of each row int64[R, n], or all, in descending order."""
    return keys.topk(min(k, keys.shape[1])).values


def _of_all_ranks(rows: Tensor) -> Tensor:
    """The rows of all ranks, of which each may have another number, in rank order."""
    counts = gather_objects(len(rows))
    parts = gather(pad_to_longest(rows, 0)).chunk(world_size())
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
