"""The interface of a training stage: what `fit`, `validate`, `tuning` and the doctor call, and all that they call."""

from abc import ABC, abstractmethod
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from qformer.data import Batch, RecordDataset
from qformer.encoders import Features, FrozenEncoder
from qformer.models.gradcache import CachedStep

Text = TypeVar("Text")


class Prepared(NamedTuple, Generic[Text]):
    """A micro-batch ready for `Stage.forward`.

    Args:
        text: what the stage reads of the batch's texts.
        target_tokens: tokens that the generative loss covers, 0 where there is none.
        seed: of what is drawn for this micro-batch; the same on all ranks.
        cached: what the first of GradCache's two passes left; None where one pass is enough.
    """

    batch: Batch
    text: Text
    target_tokens: int
    seed: int
    cached: CachedStep | None = None


class Output(NamedTuple):
    """What a forward pass returns: the loss to descend, numbers to log, and embeddings for retrieval, where there are."""

    loss: Tensor
    metrics: dict[str, Tensor]
    image_embeds: Tensor | None = None  # float[B, Q, E]
    text_embeds: Tensor | None = None  # float[B, E]


class Stage(nn.Module, ABC, Generic[Text]):
    """Frozen models and an adapter between them that learns by one objective.

    `adapter` holds all that learns, all that DistributedDataParallel wraps and all that is saved. Frozen parts stay
    outside of it: they are neither broadcast nor stored, and keep themselves in eval.

    A new objective is a new final class, its section of the config, and one line in `build.STAGES`.
    """

    name: str
    vqa_prompt: str = "{}"  # of a question, {} in its place
    encoder: FrozenEncoder
    adapter: nn.Module

    def frozen(self) -> dict[str, nn.Module]:
        """The frozen models by the names of their config sections."""
        return {"encoder": self.encoder}

    def require_data(self, dataset: RecordDataset) -> None:
        """Raises: ValueError when this stage cannot train on the records of a run."""

    def encode(self, batch: Batch) -> Features:
        """Frozen features of the batch's images, each once."""
        return self.encoder(batch.images, batch.image_mask)

    def use_training_kernels(self, device: torch.device, mixed_precision: str) -> None:
        """Choose what computes the frozen models while the adapter trains; called once, before they move to `device`."""

    @abstractmethod
    def prepare(self, batch: Batch, seed: int) -> Prepared[Text]:
        """Tokenize a batch's texts, choose its targets and count them."""

    def prepare_step(self, prepared: list[Prepared[Text]]) -> list[Prepared[Text]]:
        """Look at all micro-batches of a step before the first goes forward; stage 1 compares them with each other."""
        return prepared

    @abstractmethod
    def forward(
        self, prepared: Prepared[Text], targets_per_rank: Tensor, adapter: nn.Module | None = None
    ) -> Output:  # fmt: skip
        """The loss of one micro-batch.

        Args:
            targets_per_rank: float[], target tokens of the step over all ranks and micro-batches, divided by their number:
                the generative loss's normalizer, so that every token of the step weighs the same.
            adapter: this stage's adapter in the wrapper that synchronises its gradient; None = bare.
        """

    def chance_levels(self, micro_batch_size: int) -> dict[str, float]:
        """What each loss is for a model that has learnt nothing, in nats; empty where that is not known."""
        return {}

    def logged_constants(self, micro_batch_size: int) -> dict[str, float]:
        """Numbers that stand in every line of the log beside the chance levels."""
        return {}

    def sample(self, prepared: Prepared[Text], count: int = 4) -> list[dict[str, str]]:
        """Texts of the first few rows to look at in validation, each beside its caption; empty where none are made."""
        return []
