"""Where other libraries keep the tensors of an adapter: one table each, read in both directions.

A table goes from our names to theirs. A module's name stands for its weight and bias; the tables of the blocks are
repeated for every layer. Source: the state dict of BertForMaskedLM.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

OUR_BLOCK = re.compile(r"qformer\.blocks\.(\d+)\.(.+)")


class Report(NamedTuple):
    """What came of a conversion.

    Args:
        mapped: names of ours that were filled.
        new: names of ours that are as drawn.
        dropped: names of theirs that have no place here -> why.
        notes: what else the user has to know, a line each.
    """

    mapped: list[str]
    new: list[str]
    dropped: dict[str, str]
    notes: tuple[str, ...] = ()

    def lines(self, source: str) -> list[str]:
        """Plain words, a line each."""
        lines = [f"{len(self.mapped)} tensors mapped from {source}"]
        lines += [f"{len(self.new)} new, as drawn: {', '.join(self.new)}"] if self.new else []
        why: dict[str, list[str]] = {}
        for name, reason in self.dropped.items():
            why.setdefault(reason, []).append(name)
        lines += [
            f"{len(names)} dropped ({reason}): {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
            for reason, names in why.items()
        ]
        return [*lines, *self.notes]


@dataclass(frozen=True)
class Layout:
    """The names of one library.

    Args:
        library: what the messages call it.
        names: our tensors and modules outside the blocks -> theirs.
        block: their prefix of layer {}.
        block_names: our tensors and modules inside a block -> theirs.
        dropped: pattern of their further tensors -> why we have no place for them.
    """

    library: str
    names: Mapping[str, str]
    block: str
    block_names: Mapping[str, str]
    dropped: Mapping[str, str]

    def theirs(self, ours: str) -> str | None:
        """Their name of our tensor; None if they have no place for it."""
        if block := OUR_BLOCK.fullmatch(ours):
            inside = _rename(block[2], self.block_names)
            return inside and self.block.format(block[1]) + inside
        return _rename(ours, self.names)

    def key_map(self, ours: Iterable[str]) -> dict[str, str]:
        """Our name -> theirs, for the tensors that they have a place for."""
        return {name: theirs for name in ours if (theirs := self.theirs(name))}

    def take(
        self, adapter: Mapping[str, Tensor], theirs: Mapping[str, Tensor], source: str, may_be_new: Iterable[str] = ()
    ) -> tuple[dict[str, Tensor], Report]:
        """Their tensors under our names.

        Args:
            adapter: the adapter's state; only names and shapes are read, so it may be on the meta device.
            may_be_new: patterns of ours that the source may lack.

        Raises: ValueError naming what is missing, of another shape, or not known at all.
        """
        pairs = self.key_map(adapter)
        tensors = {ours: theirs[name] for ours, name in pairs.items() if name in theirs}
        new = [name for name in adapter if name not in tensors]
        left = set(theirs) - set(pairs.values())
        dropped = {n: why for n in theirs if n in left for p, why in self.dropped.items() if re.fullmatch(p, n)}
        missing = [pairs.get(n, n) for n in new if not any(re.fullmatch(p, n) for p in may_be_new)]
        unknown = [name for name in theirs if name in left and name not in dropped]
        problems = [f"lacks {_some(missing)}"] if missing else []
        problems += [f"has the unknown {_some(unknown)}"] if unknown else []
        problems += _of_other_shape(adapter, tensors, pairs)[:3]
        if problems:
            raise ValueError(f"{source} is no {self.library} checkpoint that fits: {'; '.join(problems)}")
        return tensors, Report(list(tensors), new, dropped)

    def give(self, adapter: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Report]:
        """Our tensors under their names; the report's `dropped` are ours that they have no place for."""
        pairs = self.key_map(adapter)
        without = {n: f"{self.library} has no place for it" for n in adapter if n not in pairs}
        return {theirs: adapter[ours] for ours, theirs in pairs.items()}, Report(list(pairs), [], without)


def _of_other_shape(
    adapter: Mapping[str, Tensor], tensors: Mapping[str, Tensor], pairs: Mapping[str, str]
) -> list[str]:  # fmt: skip
    return [
        f"{pairs[name]} is {list(tensor.shape)}, expected {list(adapter[name].shape)}"
        for name, tensor in tensors.items()
        if tensor.shape != adapter[name].shape
    ]


def _rename(name: str, table: Mapping[str, str]) -> str | None:
    module, _, kind = name.rpartition(".")
    if name in table:
        return table[name]
    return f"{table[module]}.{kind}" if module in table and kind in ("weight", "bias") else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _attention(ours: str, theirs: str, inner: str) -> dict[str, str]:
    return {f"{ours}.{k}": f"{theirs}.{inner}.{k}" for k in ("query", "key", "value")} | {
        f"{ours}.dense": f"{theirs}.output.dense",
        f"{ours}.norm": f"{theirs}.output.LayerNorm",
    }


def _ffn(ours: str, suffix: str) -> dict[str, str]:
    return {
        f"{ours}.up": f"intermediate{suffix}.dense",
        f"{ours}.down": f"output{suffix}.dense",
        f"{ours}.norm": f"output{suffix}.LayerNorm",
    }


def block_names(inner: str) -> dict[str, str]:
    """Of a Q-Former block of LAVIS or transformers, whose attention module is called `inner`."""
    return {
        **_attention("attention", "attention", inner),
        **_attention("cross_attention", "crossattention", inner),
        **_ffn("query_ffn", "_query"),
        **_ffn("text_ffn", ""),
    }


def language_head_names(prefix: str) -> dict[str, str]:
    """Of BERT's language head."""
    return {
        "lm_transform": f"{prefix}.transform.dense",
        "lm_norm": f"{prefix}.transform.LayerNorm",
        "lm_bias": f"{prefix}.bias",
    }


def embeddings_names(words: str, norm: str) -> dict[str, str]:
    """Of the text embeddings inside module `words`, and their norm."""
    return {
        "qformer.word_embeddings": f"{words}.word_embeddings",
        "qformer.position_embeddings": f"{words}.position_embeddings",
        "qformer.embedding_norm": norm,
    }


TIED = {
    r".*cls\.predictions\.decoder\.weight": "tied to the word embeddings",
    r".*cls\.predictions\.decoder\.bias": "the same as cls.predictions.bias",
    r".*\.position_ids": "a count from 0, no weight",
}

BERT = Layout(
    "BERT",
    {**embeddings_names("bert.embeddings", "bert.embeddings.LayerNorm"), **language_head_names("cls.predictions")},
    "bert.encoder.layer.{}.",
    {**_attention("attention", "attention", "self"), **_ffn("text_ffn", "")},
    {
        **TIED,
        r"bert\.embeddings\.token_type_embeddings\..*": "the Q-Former has no token types",
        r"bert\.pooler\..*|cls\.seq_relationship\..*": "of BERT's next-sentence task",
    },
)
