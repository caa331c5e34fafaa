"""What a language model thinks of each word of a text."""

from torch import Tensor

from qformer.language.frozen import UNCUT, FrozenLanguageModel, Prompt
from qformer.language.loss import loss_of_tokens
from qformer.language.visual import VisualRows
from qformer.text import words_of


def word_losses(
    llm: FrozenLanguageModel, visual_prompt: Tensor | None, prompt: Prompt, text: str
) -> tuple[list[str], Tensor]:  # fmt: skip
    """The words of a text and the loss of each, float32[W] in nats with its gradient: summed over the word's tokens.

    Args:
        visual_prompt: float[1, Q, Dl], or None for text only.

    Raises: ValueError as `FrozenLanguageModel.loss` does.
    """
    visual = VisualRows.of(visual_prompt, None, 1, llm.width)
    before, row = llm._before(prompt), llm._row(prompt, text, UNCUT)
    llm._limits.require_room(visual.lengths, [before], [row])
    losses = loss_of_tokens(*llm._logits_and_labels(visual, [before], [row]))[0]
    words, word_of = words_of(llm.tokenizer, row[1])
    total = losses.new_zeros(len(words) + 1).index_add(0, losses.new_tensor(word_of).long() % (len(words) + 1), losses)
    return words, total[:-1]
