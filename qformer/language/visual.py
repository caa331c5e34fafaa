"""Visual prompts of a batch whose rows have different numbers of images."""

from typing import NamedTuple

from torch import Tensor


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
