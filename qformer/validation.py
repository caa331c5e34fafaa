"""Numbers on held-out records while a run trains: losses, recall@1 both ways, a few texts."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from qformer.data import GlobalBatches, Order, RecordDataset, derive_seed, training_loader
from qformer.distributed import gather, gather_objects, sum_over_ranks
from qformer.metrics import recall_at_k
from qformer.models import Stage


@torch.no_grad()
def validate(
    model: Stage, validation: RecordDataset, accelerator: Accelerator, *, micro_batch_size: int, max_records: int,
    stop: object = (),
) -> dict[str, Any] | None:  # fmt: skip
    """Losses on held-out records; recall@1 both ways over all of them where there are embeddings, and a few texts.

    Every rank reads the same number of records (a broken one is replaced), in the same order at every validation.

    Args:
        max_records: over all ranks.
        stop: true as soon as this rank was told to stop; all ranks then return None after the same batch.
    """
    world = accelerator.num_processes
    count = max(1, min(max_records, len(validation)) // (micro_batch_size * world))
    batches = GlobalBatches(Order(len(validation), seed=0), world, accelerator.process_index, micro_batch_size)
    loader = iter(training_loader(validation, batches, 0))
    model.eval()
    totals: dict[str, float] = {}
    embeds: list[tuple[Tensor, Tensor, tuple[list[str], list[str]]]] = []
    captions: list[dict[str, str]] = []
    for i in range(count):
        prepared = model.prepare(next(loader).to(accelerator.device), derive_seed("validation", i))
        mine = torch.tensor([float(prepared.target_tokens), float(bool(stop))], device=accelerator.device)
        tokens, told_to_stop = sum_over_ranks(mine)
        if told_to_stop:
            model.train()
            return None
        with accelerator.autocast():
            output = model(prepared, tokens / world)
            captions += model.sample(prepared) if i == 0 else []
        for name, value in output.metrics.items():
            if name != "temperature":
                totals[name] = totals.get(name, 0.0) + float(value) / (count * world)
        if output.image_embeds is not None and output.text_embeds is not None:
            names = (prepared.batch.image_ids, prepared.batch.texts)
            embeds.append((gather(output.image_embeds), gather(output.text_embeds), names))
    model.train()
    means = sum_over_ranks(torch.tensor(list(totals.values()), device=accelerator.device)).tolist()
    results: dict[str, Any] = {f"validation_{name}": mean for name, mean in zip(totals, means, strict=True)}
    if embeds:
        gathered = [names for _, _, of_rank in embeds for names in gather_objects(of_rank)]
        ids, texts = ([name for names in gathered for name in names[i]] for i in (0, 1))
        results |= _recall(torch.cat([i for i, _, _ in embeds]), torch.cat([t for _, t, _ in embeds]), ids, texts)
    if captions:
        results["captions"] = captions
    return results


def _recall(image_embeds: Tensor, text_embeds: Tensor, image_ids: list[str], texts: list[str]) -> dict[str, float]:
    """Recall@1 in percent; an image that several captions share stands once, and equal captions are equally right."""
    first = {name: row for row, name in reversed(list(enumerate(image_ids)))}
    rows = sorted(first.values())
    column = {image_ids[row]: i for i, row in enumerate(rows)}
    best = [(image_embeds[r].float() @ text_embeds.float().T).amax(0) for r in rows]
    score = recall_at_k(torch.stack(best), torch.tensor([column[i] for i in image_ids]), ks=(1,), texts=texts)
    return {
        "validation_image_to_text_recall_1": score.image_to_text[1],
        "validation_text_to_image_recall_1": score.text_to_image[1],
    }


def describe_validation(results: dict[str, Any]) -> str:
    """One line of numbers, then one of each caption."""
    numbers = {k.removeprefix("validation_"): v for k, v in results.items() if isinstance(v, float)}
    lines = [", ".join(f"{k} {v:.3g}" for k, v in numbers.items())]
    return "\n".join(lines + [f"    {c['generated']!r} for {c['caption']!r}" for c in results.get("captions", [])])
