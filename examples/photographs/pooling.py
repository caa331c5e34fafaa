"""Bridges without a Q-Former, for comparison: average pooling to a few tokens, or all tokens, and an MLP.

python examples/photographs/pooling.py train examples/photographs/stage2.yaml pooled.tokens=16 run.dir=runs/photographs/pooled
python examples/photographs/pooling.py evaluate runs/photographs/pooled/adapter DEV.tar --task caption

`train` and `evaluate` are stages/stage2.py and stages/evaluate.py, which know one more stage: what is between the frozen models
is another adapter, all else is stage 2.

Sources: adaptive average pooling and an MLP of two layers, DeCo (arXiv 2405.20985); the MLP on all tokens (pooled.tokens=null),
LLaVA-1.5 (arXiv 2310.03744).
"""

import math
import sys
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from qformer import build
from qformer.build import build_dataset, build_encoder, build_language_model
from qformer.config import RunPart, Stage2Config, Stage2Part, parse_arguments
from qformer.environment import prepare_environment
from qformer.launch import configure_logging, reported_errors, start_accelerator
from qformer.models import Stage2
from qformer.stages import evaluate
from qformer.training import fit

USAGE = "usage: pooling.py train CONFIG.yaml key=value ... | pooling.py evaluate ADAPTER RECORDS ..."


@dataclass
class PooledSection:
    """What takes the Q-Former's place."""

    tokens: int | None = field(
        default=16,
        metadata={"help": "tokens the language model reads, a square; null = all", "choices": (), "at_least": 1},
    )


@dataclass
class PooledPart(Stage2Part):
    stage: str = "pooled"
    pooled: PooledSection = field(default_factory=PooledSection)


@dataclass
class PooledConfig(PooledPart, Stage2Config):
    """Stage 2 with pooling and an MLP in the Q-Former's place."""


class PoolingAdapter(nn.Module):
    """Feature norm, average pooling over the grid of tokens, and an MLP to the language model's width.

    Args:
        encoder_width, llm_width: Dv of the frozen features, Dl of the language model.
        tokens: that the language model reads; None = as many as the encoder gives.
    """

    def __init__(self, encoder_width: int, llm_width: int, tokens: int | None) -> None:
        super().__init__()
        self.tokens = tokens
        self.feature_norm = nn.LayerNorm(encoder_width)
        self.language_projection = nn.Sequential(
            nn.Linear(encoder_width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width)
        )

    def forward(
        self, features: Tensor, image_mask: Tensor | None, text: None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Frozen features float[B, N, Dv] -> visual prompt float[R, Q, Dl], and what the MLP reads float[R, Q, Dv].

        Args:
            rows: int64[R], the image of each row; None = 0 .. B-1.
        """
        if image_mask is not None:
            raise ValueError("pooled: the encoder's tokens must be a square grid, the same for every image")
        normed = self.feature_norm(features.to(self.feature_norm.weight.dtype))
        pooled = normed if self.tokens is None else pool(normed, self.tokens)
        visual_prompt = self.language_projection(pooled)
        return (visual_prompt, pooled.detach()) if rows is None else (visual_prompt[rows], pooled.detach()[rows])


def pool(features: Tensor, tokens: int) -> Tensor:
    """float[B, N, D], a square grid row by row -> float[B, tokens, D], the means of a coarser square grid.

    Raises: ValueError when either is no square.
    """
    side, coarse = math.isqrt(features.shape[1]), math.isqrt(tokens)
    if side**2 != features.shape[1] or coarse**2 != tokens:
        raise ValueError(f"pooled.tokens: {tokens} of {features.shape[1]} tokens; both must be squares, as 16 of 81")
    grid = features.transpose(1, 2).unflatten(2, (side, side))
    return adaptive_avg_pool2d(grid, coarse).flatten(2).transpose(1, 2)


def build_pooled(config: PooledPart) -> Stage2:
    """Stage 2's model with a `PoolingAdapter`."""
    run = config if isinstance(config, RunPart) else None
    encoder, llm = build_encoder(config.encoder, run.data if run else None), build_language_model(config.llm)
    torch.manual_seed(run.train.seed if run else 0)
    adapter: Any = PoolingAdapter(encoder.width, llm.width, config.pooled.tokens)
    return Stage2(
        encoder, adapter, llm, prompt=config.llm.prompt, vqa_prompt=config.llm.vqa_prompt,
        max_target_tokens=config.llm.max_target_tokens, sample_max_new_tokens=config.llm.caption_max_new_tokens,
    )  # fmt: skip


build.STAGES["pooled"] = (PooledConfig, build_pooled)


def train(argv: list[str]) -> None:
    """As stages/stage2.py."""
    config = parse_arguments(PooledConfig, cast(str, __doc__), argv)
    prepare_environment()
    with reported_errors():
        accelerator = start_accelerator(config)
        configure_logging(accelerator.is_main_process)
        model, data = build_pooled(config), config.data
        datasets = [
            build_dataset(data, model.encoder, split, config.train.seed, vqa_prompt=model.vqa_prompt)
            if records
            else None
            for split, records in (("train", data.train), ("validation", data.validation))
        ]
        assert datasets[0] is not None
        fit(model, datasets[0], datasets[1], config=config, accelerator=accelerator)


def main(argv: list[str] | None = None) -> None:
    verb, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if verb not in ("train", "evaluate"):
        print(f"{cast(str, __doc__).strip()}\n\n{USAGE}")
        raise SystemExit(0 if verb in ("-h", "--help") else 2)
    train(rest) if verb == "train" else evaluate.main(rest)


if __name__ == "__main__":
    main()
