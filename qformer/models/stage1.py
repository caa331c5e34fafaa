"""Stage 1, representation learning: a Q-Former is aligned with text by three objectives, ITC, ITM and ITG.

Source: BLIP-2 (arXiv 2301.12597), section 3.2.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.data import Batch, RecordDataset, Records
from qformer.distributed import world_size
from qformer.encoders import Features, FrozenEncoder
from qformer.metrics.queries import describe_queries
from qformer.models.batch import TextTokens, tokenize
from qformer.models.contrast import Contrast, NegativeBank, contrast, text_keys
from qformer.models.gradcache import CachedStep, gradcache_step
from qformer.models.stage import Output, Prepared, Stage
from qformer.objectives import ITM_CHANCE, diversity_loss, itg_loss, itm_loss, next_token_labels
from qformer.qformer import ImageMemory, QFormer
from qformer.text import IGNORE_INDEX


class Embedded(NamedTuple):
    """A micro-batch after the query, text and causal passes; None where no objective asks for it."""

    images: ImageMemory
    queries: Tensor  # float[B, Q, D]
    words: Tensor  # float[B, T, D], word embeddings
    causal: Tensor | None  # float[B, T, D]
    image_embeds: Tensor | None  # float[B, Q, E]
    text_embeds: Tensor | None  # float[B, E]


class Stage1Adapter(nn.Module):
    """All that stage 1 trains: feature norm, Q-Former, the contrastive projections, the matching and language heads.

    An objective of weight 0 is not computed, and what only it would train does not learn.

    Args:
        encoder_width: Dv of the frozen features.
        contrastive_width: E of the embeddings.
        dec_id: id of [DEC], with which a text to be generated begins.
        temperature: start of the learned divisor of the similarities.
        itc, itm, itg: weights of BLIP-2's objectives; diversity: of one that keeps an image's queries apart.
        feature_norm_eps: of the LayerNorm on the features.
    """

    def __init__(
        self, qformer: QFormer, *, encoder_width: int, contrastive_width: int, dec_id: int,
        label_smoothing: float = 0.1, temperature: float = 0.07, itc: float = 1.0, itm: float = 1.0, itg: float = 1.0,
        diversity: float = 0.0, feature_norm_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        assert qformer.vocab_size is not None
        width = qformer.width
        self.dec_id, self.label_smoothing = dec_id, label_smoothing
        weights = {"itc": itc, "itm": itm, "itg": itg, "diversity": diversity}
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.feature_norm = nn.LayerNorm(encoder_width, eps=feature_norm_eps)
        self.qformer = qformer
        self.image_projection = nn.Linear(width, contrastive_width)
        self.text_projection = nn.Linear(width, contrastive_width)
        self.itm_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(temperature))
        self.lm_transform = nn.Linear(width, width)
        self.lm_norm = nn.LayerNorm(width, eps=1e-12)
        self.lm_bias = nn.Parameter(torch.zeros(qformer.vocab_size))
        nn.init.normal_(self.lm_transform.weight, std=0.02)
        nn.init.zeros_(self.lm_transform.bias)
        for untrained in self._untrained():
            untrained.requires_grad_(False)

    @property
    def contrasts(self) -> bool:
        """Whether rows are compared with each other: for ITC, and for the hard negatives of ITM."""
        return "itc" in self.weights or "itm" in self.weights

    def _untrained(self) -> list[nn.Module | nn.Parameter]:
        """What no objective of this adapter reaches; DistributedDataParallel must not wait for its gradient."""
        last, weights = self.qformer.layers[-1], self.weights
        parts: list[nn.Module | nn.Parameter | None] = []
        if "itc" not in weights:
            parts += [self.image_projection, self.text_projection, self.temperature]
        if "itm" not in weights:
            parts += [self.itm_head]
        if "itg" not in weights:
            parts += [self.lm_transform, self.lm_norm, self.lm_bias]
        if not weights.keys() & {"itc", "itg"}:  # the queries' output alone is read
            parts += [last.text_ffn]
        if weights.keys() == {"itg"}:  # reads the queries' keys and values alone
            parts += [last.query_ffn, last.cross_attention]
        return [part for part in parts if part is not None]

    def project_images(self, features: Tensor, mask: Tensor | None) -> ImageMemory:
        """Frozen features float[B, N, Dv], bool[B, N] | None -> cross-attention keys and values."""
        return self.qformer.project_images(features, mask, self.feature_norm)

    def embed_queries(self, query_output: Tensor) -> Tensor:
        """float[B, Q, D] -> float[B, Q, E] of unit length."""
        return F.normalize(self.image_projection(query_output).float(), dim=-1)

    def embed_text(self, text: TextTokens) -> Tensor:
        """float[B, E] of unit length, from [CLS] of the text pass."""
        return self._embed_cls(self.qformer.text_pass(text.ids, text.mask, first=True))

    def _embed_cls(self, cls_output: Tensor) -> Tensor:
        return F.normalize(self.text_projection(cls_output).float(), dim=-1)

    def match(self, images: Sequence[ImageMemory], text: Tensor, text_mask: Tensor) -> Tensor:
        """Logits of no match and match float[R, 2]: the head on every query's output, averaged.

        Args:
            images: what the R texts are matched with, group after group.
            text: int64[R, T] ids, or float[R, T, D] their word embeddings; text_mask: bool[R, T].
        """
        return self.itm_head(self.qformer.matching_pass(images, text, text_mask)).float().mean(1)

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """BERT's masked-LM head, tied to the word embeddings: float[..., D] -> float[..., V]."""
        assert self.qformer.word_embeddings is not None
        hidden = self.lm_norm(F.gelu(self.lm_transform(hidden)))
        return F.linear(hidden, self.qformer.word_embeddings.weight, self.lm_bias)

    def embed(self, features: Tensor, image_mask: Tensor | None, text: TextTokens) -> Embedded:
        """All that a micro-batch computes of itself alone, before its rows are compared with any other.

        Args:
            features: float[B, N, Dv], image_mask: bool[B, N] | None, text: ids and mask [B, T].
        """
        images = self.project_images(features, image_mask)
        queries = self.qformer.query_pass(images)
        words, decoded = self._embed_words(text.ids)
        cls_output = causal = image_embeds = text_embeds = None
        if self.weights.keys() >= {"itc", "itg"}:
            text_output, causal = self.qformer.text_and_causal_pass(words, decoded, text.mask, queries)
            cls_output = text_output[:, 0]
        else:
            if "itg" in self.weights:
                causal = self.qformer.causal_pass(decoded, text.mask, queries)
            if self.contrasts:
                with torch.set_grad_enabled("itc" in self.weights and torch.is_grad_enabled()):
                    cls_output = self.qformer.text_pass(words, text.mask, first=True)
        if cls_output is not None:
            with torch.set_grad_enabled("itc" in self.weights and torch.is_grad_enabled()):
                image_embeds, text_embeds = self.embed_queries(queries.output), self._embed_cls(cls_output)
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)
        return Embedded(images, queries.output, words, causal, image_embeds, text_embeds)

    def embed_for_contrast(self, features: Features, text: TextTokens, dropout_seed: int) -> tuple[Tensor, Tensor]:
        """float[B, Q, E], float[B, E] without gradient, but by the kernels and the draws of a pass that has one."""
        torch.manual_seed(dropout_seed)
        embedded = self.embed(features.tokens, features.mask, text)
        assert embedded.image_embeds is not None
        assert embedded.text_embeds is not None
        return embedded.image_embeds.detach(), embedded.text_embeds.detach()

    def forward(
        self, features: Features, text: TextTokens, *, keys: Tensor, targets_per_rank: Tensor, seed: int,
        cached: CachedStep | None = None,
    ) -> Output:  # fmt: skip
        """The objectives of one micro-batch.

        Args:
            features: tokens float[B, N, Dv] without gradient, mask bool[B, N] | None.
            text: ids int64[B, T] and mask bool[B, T] of the captions.
            keys: int64[B, 2], of each row's image and caption; rows that share one are no negatives of each other.
            targets_per_rank: ITG's normalizer float[], see `Stage.forward`.
            seed: of the negatives drawn; the same on all ranks.
            cached: of a contrastive batch of several micro-batches, compared before; None = compare this one.
        """
        if cached is not None:
            torch.manual_seed(cached.dropout_seed)
        embedded = self.embed(*features, text)
        losses, metrics = {}, {}
        if self.contrasts:
            compared, bank = self._compare(embedded, features, text, keys=keys, seed=seed, cached=cached)
        if "itc" in self.weights:
            losses["itc"], metrics["itc_accuracy"] = compared.itc, compared.accuracy
        if "itm" in self.weights:
            losses["itm"], metrics["itm_accuracy"] = self._itm(embedded, text.mask, compared, bank)
        if embedded.causal is not None:
            labels = next_token_labels(text.ids, text.mask)
            counted = labels != IGNORE_INDEX  # the head is the widest matrix of all: only where there is a label
            logits = self.lm_logits(embedded.causal[counted])
            losses["itg"] = itg_loss(logits, labels[counted], self.label_smoothing, targets_per_rank)
        if "diversity" in self.weights:
            losses["diversity"] = diversity_loss(embedded.queries)
        if "itc" in self.weights:
            metrics["temperature"] = self.temperature
        metrics |= describe_queries(embedded.queries)
        loss = torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()
        metrics = {name: value.detach() for name, value in {**losses, **metrics}.items()}
        embeds = (embedded.image_embeds, embedded.text_embeds)
        return Output(loss, metrics, *(None if x is None else x.detach() for x in embeds))

    def _compare(
        self, embedded: Embedded, features: Features, text: TextTokens, *, keys: Tensor, seed: int,
        cached: CachedStep | None,
    ) -> tuple[Contrast, NegativeBank | None]:  # fmt: skip
        """What comparing all rows yields, and where the negatives are; None = among these very rows."""
        assert embedded.image_embeds is not None
        assert embedded.text_embeds is not None
        embeds = (embedded.image_embeds, embedded.text_embeds, self.temperature)
        if cached is not None:
            return cached.contrast._replace(itc=cached.itc(*embeds)), cached.bank
        compared = contrast(*embeds, keys, label_smoothing=self.label_smoothing, noise_seed=seed)
        one_rank = world_size() == 1 or "itm" not in self.weights
        return compared, None if one_rank else NegativeBank.of([features], [text])

    def _embed_words(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Word embeddings float[B, T, D] of the texts, and of the same behind [DEC]: one look-up in the large table."""
        assert self.qformer.word_embeddings is not None
        dec = ids.new_full((1,), self.dec_id)
        words, dec_word = self.qformer.word_embeddings(torch.cat([ids.flatten(), dec])).split([ids.numel(), 1])
        words = words.unflatten(0, ids.shape)
        return words, torch.cat([dec_word.expand(len(ids), 1, -1), words[:, 1:]], 1)

    def _itm(
        self, embedded: Embedded, text_mask: Tensor, compared: Contrast, bank: NegativeBank | None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Loss and accuracy over 3B pairs: matched, (image, negative text), (negative image, text).

        Args:
            bank: where the negatives are; None = among these very rows, so that keys, values and words are there already.
        """
        negatives, words = compared.negatives, embedded.words
        if bank is None:
            images = embedded.images.select(negatives.image)
            other, other_mask = words[negatives.text], text_mask[negatives.text]
        else:  # projected here: only frozen features cross ranks
            assert self.qformer.word_embeddings is not None
            features, (ids, other_mask) = bank.fetch(negatives)
            images, other = self.project_images(*features), self.qformer.word_embeddings(ids)
        longer = other.shape[1] - words.shape[1]
        paired, paired_mask = F.pad(words, (0, 0, 0, longer)), F.pad(text_mask, (0, longer))
        logits = self.match(
            [embedded.images._replace(times=2), images],
            torch.cat([paired, other, paired]),
            torch.cat([paired_mask, other_mask, paired_mask]),
        )
        batch = len(words)
        matched = torch.arange(3 * batch, device=logits.device) < batch
        counted = torch.cat([torch.ones_like(negatives.has_text), negatives.has_text, negatives.has_image])
        correct = ((logits.argmax(1) == matched) & counted).sum()
        return itm_loss(logits, matched, counted, compared.pairs), correct / compared.pairs


@final
class Stage1(Stage[TextTokens]):
    """A frozen encoder and stage 1's adapter.

    The forward pass of a micro-batch:

    1. encode the images, without gradient (or read them from the feature cache): `image_features` float[B, N, Dv];
    2. `feature_norm`, and keys and values for every cross-attention layer, once an image;
    3. query pass, text pass and causal pass of the Q-Former: each row alone;
    4. ITC: similarities of all images and texts of all ranks; hard negatives are drawn from them;
    5. ITM: 3B pairs in one pass, over the keys and values of step 2;
    6. ITG: BERT's language head on the causal pass, where there is a next token;
    7. the weighted sum of the losses; `diversity`, if it has a weight, is that of step 3's queries.

    Args:
        tokenizer: BERT tokenizer with [DEC] as its `bos_token`.
        max_text_tokens: longest caption, [CLS] and [SEP] included.
        itc_batch_size: rows that are contrasted with each other in training; None = those that go forward at once.
    """

    name: Literal["stage1"] = "stage1"
    adapter: Stage1Adapter

    def __init__(
        self, encoder: FrozenEncoder, adapter: Stage1Adapter, tokenizer: Any, *, max_text_tokens: int,
        itc_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.adapter, self.tokenizer = encoder, adapter, tokenizer
        self.max_text_tokens, self.itc_batch_size = max_text_tokens, itc_batch_size
        encoder.output_dtype = None  # as computed: what crosses ranks is then half the bytes of float32

    def require_data(self, dataset: RecordDataset) -> None:
        if isinstance(dataset.records, Records):
            dataset.records.require_single(
                "stage 1 learns what belongs to one image (or clip): give each image its own record, or train stage 2"
            )

    def encode(self, batch: Batch) -> Features:
        """Frozen features of each row; the tokens of a clip's frames are side by side."""
        return super().encode(batch).side_by_side(batch.image_of)

    def tokenize(self, texts: list[str]) -> TextTokens:
        """Tokens of the texts, padded to the longest."""
        return tokenize(self.tokenizer, texts, next(self.adapter.parameters()).device, self.max_text_tokens)

    def prepare(self, batch: Batch, seed: int) -> Prepared[TextTokens]:
        """Tokenize the captions and count ITG's targets."""
        text = self.tokenize(batch.texts)
        return Prepared(batch, text, int(text.mask[:, 1:].sum()), seed)

    def contrasted_together(self, micro_batch_size: int) -> int:
        """Micro-batches of a rank that make one contrastive batch.

        Raises: ValueError when the contrastive batch is not a multiple of what goes forward at once.
        """
        at_once = micro_batch_size * world_size()
        wanted = self.itc_batch_size or at_once
        if wanted % at_once:
            raise ValueError(
                f"stage1.itc_batch_size={wanted} must be a multiple of train.micro_batch_size={micro_batch_size} "
                f"times {world_size()} processes"
            )
        return wanted // at_once

    def prepare_step(self, prepared: list[Prepared[TextTokens]]) -> list[Prepared[TextTokens]]:
        """The first of GradCache's two passes; where each micro-batch is a contrastive batch of its own, nothing."""
        together = self.contrasted_together(len(prepared[0].batch))
        if together == 1 or not self.adapter.contrasts:
            return prepared
        groups = [prepared[first : first + together] for first in range(0, len(prepared), together)]
        return [p for group in groups for p in self._compare_group(group)]

    def _compare_group(self, group: list[Prepared[TextTokens]]) -> list[Prepared[TextTokens]]:
        adapter = self.adapter
        seeds = torch.randint(2**62, (len(group),)).tolist()
        features = [self.encode(p.batch) for p in group]
        embeds = [
            adapter.embed_for_contrast(f, p.text, seed) for f, p, seed in zip(features, group, seeds, strict=True)
        ]
        steps = gradcache_step(
            features, [p.text for p in group], embeds, temperature=adapter.temperature,
            keys=torch.cat([self._keys(p) for p in group]), label_smoothing=adapter.label_smoothing,
            noise_seed=group[0].seed, dropout_seeds=seeds,
        )  # fmt: skip
        return [p._replace(cached=step) for p, step in zip(group, steps, strict=True)]

    def _keys(self, prepared: Prepared[TextTokens]) -> Tensor:
        keys = [text_keys(names) for names in (prepared.batch.image_ids, prepared.batch.texts)]
        return torch.stack(keys, 1).to(prepared.text.ids.device)

    def forward(
        self, prepared: Prepared[TextTokens], targets_per_rank: Tensor, adapter: nn.Module | None = None
    ) -> Output:  # fmt: skip
        batch, cached = prepared.batch, prepared.cached
        features = self.encode(batch) if cached is None else cached.features
        output: Output = (self.adapter if adapter is None else adapter)(
            features, prepared.text, keys=self._keys(prepared), targets_per_rank=targets_per_rank,
            seed=prepared.seed, cached=cached,
        )  # fmt: skip
        return output

    def chance_levels(self, micro_batch_size: int) -> dict[str, float]:
        vocabulary = self.adapter.qformer.vocab_size
        assert vocabulary is not None
        levels = {
            "itc": math.log(self._candidates(micro_batch_size)), "itm": ITM_CHANCE, "itg": math.log(vocabulary)
        }  # fmt: skip
        return {name: level for name, level in levels.items() if name in self.adapter.weights}

    def logged_constants(self, micro_batch_size: int) -> dict[str, float]:
        return {"itc_negatives": self._candidates(micro_batch_size) - 1} if self.adapter.contrasts else {}

    def _candidates(self, micro_batch_size: int) -> int:
        return micro_batch_size * world_size() * self.contrasted_together(micro_batch_size)
