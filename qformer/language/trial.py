"""A model's habits found out by trial, on rows of noise: nothing is known of a kind by its name."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qformer.language.memory import SharedStart
from qformer.messages import one_line

if TYPE_CHECKING:
    from qformer.language.decoder_only import DecoderOnly
    from qformer.language.frozen import FrozenLanguageModel


def find_problem(llm: "FrozenLanguageModel", num_beams: int) -> str | None:
    """Why this model cannot be trained through, or cannot write from embeddings by `num_beams` beams; None = it can."""
    visual_prompt = noise(llm, 4)
    try:
        with torch.enable_grad():
            visual_prompt.requires_grad_()
            total = llm.loss(visual_prompt.expand(2, -1, -1), ["a", ""], ["a", "a a"]).total
            (gradient,) = torch.autograd.grad(total, visual_prompt, allow_unused=True)
        if gradient is None or not bool(gradient.any()):
            return "no gradient reaches a visual prompt in its place"
        if not llm.is_encoder_decoder and reads_ahead(llm):
            return "a token sees those after it, so that it would read its own target (a causal model is needed)"
        llm.generate(visual_prompt.detach().expand(2, -1, -1), ["a", ""], num_beams=num_beams, max_new_tokens=3)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model that was made for something else runs into
        return f"it cannot train on and write from embeddings ({one_line(error)})"
    return None


@torch.no_grad()
def heeds_mask(llm: "FrozenLanguageModel") -> bool:
    """Whether a row beside padding reads as it does alone.

    Not so where a state runs along the row, or positions are counted from its beginning.
    """
    row, pads = noise(llm, 4), noise(llm, 7)
    rows = [row, pads] if llm.is_encoder_decoder else [pads, row]
    real = [torch.full((1, part.shape[1]), part is row, device=row.device) for part in rows]
    alone = llm.next_logits(row, torch.ones(1, 4, dtype=torch.bool, device=row.device))
    try:
        return not _differ(alone, llm.next_logits(torch.cat(rows, 1), torch.cat(real, 1)))
    except (RuntimeError, ValueError, IndexError):  # it takes no padding at all
        return False


@torch.no_grad()
def keeps_rows(llm: "FrozenLanguageModel") -> bool:
    """Whether what the model keeps of a row gives texts after it the logits that they have behind the row itself."""
    row, targets = noise(llm, 4), [[1, 2, 3], [2]]
    real = torch.ones(1, 5, dtype=torch.bool, device=row.device)
    try:
        memory = llm.remember(row, real[:, :4])
        if memory is None:
            return False
        alone, both = llm.logits_after(memory, targets[:1]), llm.logits_after(memory, targets)
        pairs = [(alone, both[:1]), (llm.next_logits(row, real[:, :4]), both[:1, 0]), (both[:1, 0], both[1:, 0])]
        if not llm.is_encoder_decoder:
            one_more = torch.cat([row, llm.embed(torch.tensor([[1]], device=row.device))], 1)
            pairs.append((llm.next_logits(one_more, real), both[:1, 1]))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a memory of another kind, which is not for us to repeat
        return False
    return not any(_differ(*pair) for pair in pairs)


@torch.no_grad()
def shares_starts(llm: "DecoderOnly") -> bool:
    """Whether rows that go on from a start which was read once for all of them read as they do by themselves."""
    start, texts = noise(llm, 4), noise(llm, 5)
    embeds = torch.cat([torch.cat([texts[:, :2], start, texts[:, 2:3]], 1), torch.cat([start, texts[:, 2:]], 1)])
    mask = torch.ones(2, 7, dtype=torch.bool, device=start.device)
    mask[0, :2] = False
    try:
        shared = SharedStart.of(embeds, mask, 4)
        cache = None if shared is None else llm.read_alike(shared, embeds, mask)
        return cache is not None and not _differ(llm.next_logits(embeds, mask), llm.logits_behind(cache, embeds, mask))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a memory of another kind, which is not for us to spread
        return False


@torch.no_grad()
def reads_ahead(llm: "FrozenLanguageModel") -> bool:
    """Whether a position sees those after it."""
    row, last = noise(llm, 6), noise(llm, 7)[:, 6:]
    both = torch.cat([row, torch.cat([row[:, :5], last], 1)])
    inputs = llm.inputs_of(both, torch.ones(2, 6, dtype=torch.bool, device=row.device))
    logits = llm.model(**inputs, use_cache=False).logits
    return _differ(logits[:1, :5], logits[1:, :5])


@torch.no_grad()
def noise(llm: "FrozenLanguageModel", length: int) -> Tensor:
    """float[1, length, Dl] of the size of embeddings, the same at every call."""
    embeds = llm.embed(torch.arange(min(256, llm.vocab_size), device=llm.model.device))
    drawn = torch.randn(1, length, llm.width, generator=torch.Generator().manual_seed(length))
    return drawn.to(embeds) * embeds.float().std().to(embeds)


def _differ(first: Tensor, second: Tensor) -> bool:
    """Whether two rows of logits differ by more than the rounding of their dtype."""
    exact = first.dtype in (torch.float32, torch.float64)
    first, second = first.float(), second.float()
    return bool((first - second).abs().mean() > (1e-4 if exact else 5e-2) * first.std().clamp(min=1e-6))
