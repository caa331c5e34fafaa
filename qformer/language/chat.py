"""A tokenizer's own chat template around a visual prompt: where the user's words stand and where the answer begins."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from qformer.messages import one_line
from qformer.text import encode

IMAGE, ANSWER = "\ue000", "\ue001"  # of Unicode's private use area: no text and no template holds them


class Chat:
    """Conversations as token ids. The visual prompt stands at the beginning of the user's first turn.

    Attributes: `end_id`, the token that ends an assistant's turn (None = the template writes none).
    Raises: ValueError when the tokenizer has no chat template, or one that does not take plain turns.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        if not tokenizer.chat_template:
            raise ValueError(
                f"llm.chat=true: the tokenizer of llm.id={name!r} has no chat template; expected a model trained on "
                "conversations (its -Instruct, -chat or -it version), or set llm.chat=false"
            )
        question = [{"role": "user", "content": IMAGE}]
        start = self._render(question, opens_answer=True)
        whole = self._render([*question, {"role": "assistant", "content": ANSWER}], opens_answer=False)
        if start.count(IMAGE) != 1 or whole.count(ANSWER) != 1:
            raise ValueError(
                f"llm.chat=true: the chat template of llm.id={name!r} does not write each turn once; set llm.chat=false"
            )
        opening, closing = whole.split(ANSWER)
        # What stands before every answer belongs to the prompt, but for a space, which the answer's first token holds.
        opening = opening[len(start) :] if opening.startswith(start) else ""
        self._opening, self.seam = ("", " ") if opening == " " else (opening, "")
        closing_ids = encode(tokenizer, closing.lstrip(" "))
        self.end_id = closing_ids[0] if closing_ids and closing_ids[0] in tokenizer.all_special_ids else None
        if self.end_id is None and closing.strip() and closing_ids:
            self.end_id = closing_ids[0] if _is_added(tokenizer, closing_ids[0]) else None

    def split(self, turns: Sequence[str]) -> tuple[str, str]:
        """What stands before the visual prompt and what after it, up to where the answer begins.

        Args:
            turns: what user and assistant said in turn; the first and the last are the user's.
        """
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
        messages[0]["content"] = IMAGE + messages[0]["content"]
        before, _, after = self._render(messages, opens_answer=True).rpartition(IMAGE)
        return before, after + self._opening

    def _render(self, messages: list[dict[str, str]], opens_answer: bool) -> str:
        try:
            # Without thinking aloud and without today's date: neither belongs before a caption.
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=opens_answer, enable_thinking=False,
                date_string="26 Jul 2024",
            )  # fmt: skip
        except Exception as error:  # a template is a program of somebody else
            raise ValueError(
                f"llm.chat=true: the chat template of llm.id={self.name!r} does not take turns of user and assistant "
                f"({one_line(error)}); set llm.chat=false"
            ) from error
        return str(text)


def _is_added(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    return token_id in tokenizer.added_tokens_decoder
