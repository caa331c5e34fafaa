"""Where other libraries keep the tensors of an adapter: one table each, read in both directions.

A table goes from our names to theirs. A module's name stands for its weight and bias; the tables of the blocks are
repeated for every layer. Source: the state dicts of BertForMaskedLM, of LAVIS's Blip2Qformer, Blip2OPT and Blip2T5, and
of transformers' Blip2 and InstructBlip classes.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

OUR_BLOCK = re.compile(r"qformer\.blocks\.(\d+)\.(.+)")


class Report(NamedTuple):
    """What came of a conversion: names of ours that were filled, new ones (kept as drawn), theirs that were dropped and why."""

    mapped: list[str]
    new: list[str]
    dropped: dict[str, str]

    def lines(self, source: str) -> list[str]:
        """Plain words, a line each."""
        found = [f"{len(self.mapped)} tensors mapped from {source}"]
        found += [f"{len(self.new)} new, as drawn: {', '.join(self.new)}"] if self.new else []
        why: dict[str, list[str]] = {}
        for name, reason in self.dropped.items():
            why.setdefault(reason, []).append(name)
        return found + [
            f"{len(names)} dropped ({reason}): {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
            for reason, names in why.items()
        ]


class Imported(NamedTuple):
    """Another library's checkpoint as one of our adapters: its config, its tensors by our names, and what became of each."""

    config: Any
    tensors: dict[str, Tensor]
    report: Report


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
        self, own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], source: str, may_be_new: Iterable[str] = ()
    ) -> tuple[dict[str, Tensor], Report]:
        """Their tensors under our names.

        Args:
            own: the adapter's state; only names and shapes are read, so it may be on the meta device.
            may_be_new: patterns of ours that the source may lack.

        Raises: ValueError naming what is missing, of another shape, or not known at all.
        """
        pairs = self.key_map(own)
        found = {ours: theirs[name] for ours, name in pairs.items() if name in theirs}
        new = [name for name in own if name not in found]
        missing = [pairs.get(n, n) for n in new if not any(re.fullmatch(p, n) for p in may_be_new)]
        left = [name for name in theirs if name not in set(pairs.values())]
        dropped = {n: why for n in left for p, why in self.dropped.items() if re.fullmatch(p, n)}
        unknown = [name for name in left if name not in dropped]
        wrong = [
            f"{pairs[n]} is {list(t.shape)}, expected {list(own[n].shape)}"
            for n, t in found.items()
            if t.shape != own[n].shape
        ]
        problems = [f"lacks {_some(missing)}"] if missing else []
        problems += [f"has the unknown {_some(unknown)}"] if unknown else []
        if problems + wrong:
            raise ValueError(f"{source} is no {self.library} checkpoint that fits: {'; '.join(problems + wrong[:3])}")
        return found, Report(list(found), new, dropped)

    def give(self, own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Report]:
        """Our tensors under their names; the report's `dropped` are ours that they have no place for."""
        pairs = self.key_map(own)
        without = {n: f"{self.library} has no place for it" for n in own if n not in pairs}
        return {theirs: own[ours] for ours, theirs in pairs.items()}, Report(list(pairs), [], without)


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


def _block(inner: str) -> dict[str, str]:
    return {
        **_attention("attention", "attention", inner),
        **_attention("cross_attention", "crossattention", inner),
        **_ffn("query_ffn", "_query"),
        **_ffn("text_ffn", ""),
    }


def _language_head(prefix: str) -> dict[str, str]:
    return {
        "lm_transform": f"{prefix}.transform.dense",
        "lm_norm": f"{prefix}.transform.LayerNorm",
        "lm_bias": f"{prefix}.bias",
    }


def _embeddings(words: str, norm: str) -> dict[str, str]:
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
    {**_embeddings("bert.embeddings", "bert.embeddings.LayerNorm"), **_language_head("cls.predictions")},
    "bert.encoder.layer.{}.",
    {**_attention("attention", "attention", "self"), **_ffn("text_ffn", "")},
    {
        **TIED,
        r"bert\.embeddings\.token_type_embeddings\..*": "the Q-Former has no token types",
        r"bert\.pooler\..*|cls\.seq_relationship\..*": "of BERT's next-sentence task",
    },
)


def lavis(language_projection: str = "opt_proj") -> Layout:
    """LAVIS, whose projection is called opt_proj, t5_proj, llm_proj or (vicuna) llm_proj."""
    return Layout(
        "LAVIS",
        {
            "qformer.query_tokens": "query_tokens",
            "feature_norm": "ln_vision",
            **_embeddings("Qformer.bert.embeddings", "Qformer.bert.embeddings.LayerNorm"),
            **_language_head("Qformer.cls.predictions"),
            "image_projection": "vision_proj",
            "text_projection": "text_proj",
            "itm_head": "itm_head",
            "temperature": "temp",
            "language_projection": language_projection,
        },
        "Qformer.bert.encoder.layer.{}.",
        _block("self"),
        {**TIED, r"(opt|t5|llm)_model\..*": "the frozen language model is that of llm.id"},
    )


def blip2(embeddings: str = "embeddings", norm: str = "qformer.layernorm") -> Layout:
    """transformers' Blip2 classes; InstructBlip keeps its embeddings inside the Q-Former."""
    return Layout(
        "transformers",
        {
            "qformer.query_tokens": "query_tokens",
            "feature_norm": "vision_model.post_layernorm",
            **_embeddings(embeddings, norm),
            "image_projection": "vision_projection",
            "text_projection": "text_projection",
            "itm_head": "itm_head",
            "language_projection": "language_projection",
        },
        "qformer.encoder.layer.{}.",
        _block("attention"),
        {
            r"vision_model\.(embeddings|encoder)\..*": "the frozen encoder stays in its checkpoint",
            r"language_model\..*": "the frozen language model stays in its checkpoint",
            r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\..*": "of a text side that generation does not use",
            r"logit_scale": "it becomes the temperature, exp(-logit_scale)",
            r".*\.position_ids": "a count from 0, no weight",
        },
    )


BLIP2, INSTRUCT_BLIP = blip2(), blip2("qformer.embeddings", "qformer.embeddings.layernorm")
