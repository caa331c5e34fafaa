"""Visual prompts of a batch whose rows have different numbers of images, and the rows that they and texts make."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from qformer.text import pad_rows


class VisualRows(NamedTuple):
    """What stands where the images are: `prompt` float[B, Q, Dl], None for text only; `mask` bool[B, Q], None where all
    is real; `lengths`, the positions of each row.
    """

    prompt: Tensor | None
    mask: Tensor | None
    lengths: list[int]

    @classmethod
    def of(cls, prompt: Tensor | None, mask: Tensor | None, rows: int, width: int) -> "VisualRows":
        """The visual prompts of so many rows for a language model of this width."""
        if prompt is None:
            return cls(None, None, [0] * rows)
        assert (prompt.shape[0], prompt.shape[2]) == (rows, width)
        if mask is None or bool(mask.all()):
            return cls(prompt, None, [prompt.shape[1]] * rows)
        assert mask.shape == prompt.shape[:2]
        return cls(prompt, mask, mask.sum(1).tolist())

    def row(self, i: int) -> "VisualRows":
        """Row i by itself, without what pads it."""
        if self.prompt is None:
            return VisualRows(None, None, [0])
        one = self.prompt[i : i + 1] if self.mask is None else self.prompt[i : i + 1, self.mask[i]]
        return VisualRows(one, None, [self.lengths[i]])

    def repeat(self, copies: int) -> "VisualRows":
        """One row, so many times."""
        if self.prompt is None:
            return VisualRows(None, None, [0] * copies)
        return VisualRows(self.prompt.expand(copies, -1, -1), None, self.lengths * copies)

    def join(
        self, embedding: nn.Embedding, pad_id: int, before: list[list[int]], ids: list[list[int]], *, pads_first: bool
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Rows [before][visual prompt][text] without a gap, as float[B, L, Dl], and their mask bool[B, L].

        pads_first=False  [v v a b]     pads_first=True  [v v a b]
                          [v v a .]                      [. v v a]
        """
        device = embedding.weight.device
        if self.prompt is None:
            ids = [b + text for b, text in zip(before, ids, strict=True)]
        text_ids, mask = (rows.to(device) for rows in pad_rows(ids, pad_id))
        embeds = embedding(text_ids)
        if self.prompt is not None:
            visual_mask = mask.new_ones(self.prompt.shape[:2]) if self.mask is None else self.mask.to(device)
            embeds, mask = torch.cat([self.prompt.to(embeds), embeds], 1), torch.cat([visual_mask, mask], 1)
            if any(before):
                first, first_mask = (rows.to(device) for rows in pad_rows(before, pad_id))
                embeds, mask = torch.cat([embedding(first), embeds], 1), torch.cat([first_mask, mask], 1)
        gapless = self.prompt is None or (self.mask is None and len({len(b) for b in before}) == 1)
        if not pads_first and gapless:
            return embeds, mask
        order = mask.int().argsort(dim=1, descending=not pads_first, stable=True)
        return embeds.take_along_dim(order[..., None], 1), mask.take_along_dim(order, 1)
