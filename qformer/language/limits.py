"""What a language model has room for: positions, token ids, and the ids that end a text."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from qformer.text import TokenizerFacts

POSITIONS = ("max_position_embeddings", "max_seq_len", "max_{}_position_embeddings", "max_{}_positions")


class PromptTooLong(ValueError):
    """What stands before a text, and the text, need more positions than the language model has."""


class Limits:
    """Positions and ids of a model, for errors before they are an IndexError of it.

    Args:
        config: the model's text config.
        vocab_size: ids it embeds.
        name: hub id or folder, for messages.
    """

    def __init__(self, config: Any, vocab_size: int, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.config, self.vocab_size, self.tokenizer, self.name = config, vocab_size, tokenizer, name

    def stop_ids(self, facts: TokenizerFacts, chat_end: int | None, theirs: Any) -> list[int]:
        """Every id that ends a text: the tokenizer's EOS, a line end, the chat's end of turn, and `theirs`.

        Raises: ValueError when the model does not embed one of them, or there is none.
        """
        theirs = [theirs] if isinstance(theirs, int) else list(theirs or [])
        ids = [self.tokenizer.eos_token_id, facts.line_end_id, chat_end]
        ids = [i for i in ids if i is not None]
        for what, token_id in (("pad", facts.pad_id), *(("end", i) for i in ids)):
            if token_id >= self.vocab_size:
                raise ValueError(
                    f"llm.id={self.name!r}: the tokenizer's {what} token has id {token_id}, the model embeds ids below "
                    f"{self.vocab_size}; set that token to one of the model's vocabulary (a pad can be the EOS token) "
                    "and save the tokenizer in the model's folder"
                )
        ids = list(dict.fromkeys([*ids, *(i for i in theirs if 0 <= i < self.vocab_size)]))
        if not ids:
            raise ValueError(
                f"llm.id={self.name!r}: its tokenizer has neither an EOS token nor one token for a line end; expected "
                "one, or no text would ever end. Set tokenizer.eos_token, save it in the model's folder, and set llm.id "
                "to that folder"
            )
        return ids

    def require_embedded(self) -> None:
        """A word of the tokenizer that the model does not embed would end the run at the first text that holds it."""
        special = set(self.tokenizer.all_special_ids) | {
            i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        beyond = sorted(i for i in self.tokenizer.get_vocab().values() if i >= self.vocab_size and i not in special)
        if beyond:
            raise ValueError(
                f"llm.id={self.name!r}: its tokenizer has {len(beyond)} words that the model does not embed, the first "
                f"{self.tokenizer.convert_ids_to_tokens(beyond[0])!r} with id {beyond[0]}; the model embeds ids below "
                f"{self.vocab_size}. Save the model's own tokenizer in its folder, or resize the model's embeddings"
            )

    def require_ids(self, rows: list[list[int]]) -> None:
        """Raises: ValueError when a row holds an id that the model does not embed."""
        largest = max((i for row in rows for i in row), default=0)
        if largest >= self.vocab_size:
            raise ValueError(
                f"llm.id={self.name!r}: {self.tokenizer.convert_ids_to_tokens(largest)!r} is token {largest} of its "
                f"tokenizer, and the model embeds ids below {self.vocab_size}; take that word out of the texts, or set "
                "llm.id to a model that was saved with its own tokenizer"
            )

    def require_room(
        self, visual: list[int], before: list[list[int]], rows: list[tuple[list[int], list[int]]]
    ) -> None:  # fmt: skip
        """Raises: ValueError when rows need more positions or other token ids than the model has.

        Args:
            visual: positions of each row's visual prompt.
            before: ids in front of it; rows: ids that are read after it, and ids that are predicted.
        """
        self.require_ids([b + context + target for b, (context, target) in zip(before, rows, strict=True)])
        read = [n + len(b) + len(context) for n, b, (context, _) in zip(visual, before, rows, strict=True)]
        written = [len(target) for _, target in rows]
        if not self.config.is_encoder_decoder:
            read, written = [sum(pair) for pair in zip(read, written, strict=True)], [0]
        self.require_positions(max(read), max(written), "prompt and target take")

    def require_positions(self, read: int, written: int, what: str) -> None:
        """Raises: PromptTooLong when `read` positions before a text, and `written` of it, are more than the model has."""
        needs = [("encoder", "source", read), ("decoder", "target", written)]
        if not self.config.is_encoder_decoder:
            needs = [("decoder", "target", read + written)]
        for side, also, length in needs:
            names = [name.format(s) for name in POSITIONS for s in (side, also)]
            positions = next((p for name in names if isinstance(p := getattr(self.config, name, None), int)), length)
            if 0 < positions < length:
                raise PromptTooLong(
                    f"{what} {length} positions; the language model has {positions} (llm.id={self.name!r}): give it a "
                    "shorter text, fewer images or fewer frames"
                )
