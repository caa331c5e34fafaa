"""From config to objects: the only place that reads both the config and the classes."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qformer.bert import initialise_from_bert, load_tokenizer
from qformer.checkpoint import IDENTITY, load_strictly, read_adapter, require_same_parts, transfer
from qformer.config import (
    DataConfig,
    EncoderConfig,
    LlmConfig,
    ModelPart,
    QFormerConfig,
    RunPart,
    Stage1Config,
    Stage1Part,
    Stage2Config,
    Stage2Part,
)
from qformer.data import (
    CacheWriter,
    FeatureCache,
    ImageTransform,
    Manifest,
    RecordDataset,
    Records,
    Wording,
    differences,
    read_records,
)
from qformer.encoders import FrozenEncoder, PrecomputedFeatures, load_encoder
from qformer.language import FrozenLanguageModel, load_language_model
from qformer.models import Stage, Stage1, Stage1Adapter, Stage2, Stage2Adapter
from qformer.qformer import QFormer
from qformer.tuning import LLM_LORA, add_trainable, parts_beside, require_learnt_parts, require_tunable

logger = logging.getLogger(__name__)

COVERAGE_RECORDS = 4096  # looked up in a feature cache before training; the rest is when it is read


def build_encoder(config: EncoderConfig, data: DataConfig | None = None) -> FrozenEncoder:
    """The frozen encoder that `encoder.*` names, or its stand-in where `data.features` holds what it would say.

    Raises: ValueError when the cache is of another encoder, or cannot be read.
    """
    if data is not None and data.features is not None:
        manifest = FeatureCache(data.features).manifest
        _require_cache_of(config, data, manifest)
        return PrecomputedFeatures(manifest.features["width"], manifest.features["num_tokens"])
    return load_encoder(config)


def build_language_model(config: LlmConfig) -> FrozenLanguageModel:
    """The frozen language model that `llm.*` names."""
    return load_language_model(
        config.id,
        revision=config.revision,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        random_weights=config.random_weights,
        activation=config.activation,
        quantise=config.quantise,
        chat=config.chat,
    )


def build_tokenizer(config: QFormerConfig) -> Any:
    """The BERT tokenizer of the Q-Former's text side; raises as `load_tokenizer` does."""
    return load_tokenizer(config.tokenizer, config.vocab_size)


def build_qformer(
    config: QFormerConfig, encoder_width: int, vocab_size: int | None, *, recompute_ffn: bool = True
) -> QFormer:  # fmt: skip
    """The Q-Former of `qformer.*`, with random weights; without a text side if `vocab_size` is None."""
    return QFormer(
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        ffn_width=config.ffn_width,
        queries=config.queries,
        encoder_width=encoder_width,
        cross_attention_frequency=config.cross_attention_frequency,
        dropout=config.dropout,
        vocab_size=None if vocab_size is None else config.vocab_size or vocab_size,
        max_text_positions=config.max_text_positions,
        init_std=config.init_std,
        recompute_ffn=recompute_ffn,
    )


def build_stage(config: ModelPart) -> Stage:
    """The model that a config names by its `stage`.

    A run's config gives a model ready to train: drawn from `train.seed`, or started from what its stage's `init_from`
    names. The part that rebuilds a model gives one whose trained tensors the caller puts in.

    Raises: ValueError when a frozen part cannot be loaded, or the adapter to begin from does not fit.
    """
    return STAGES[config.stage][1](config)


def build_stage1(config: Stage1Part) -> Stage1:
    """Stage 1's model, its adapter from `stage1.init_from`, or drawn from `train.seed` and, if named, `qformer.init_from`.

    Raises: ValueError when the adapter to continue from was of another encoder or size; as `add_trainable` does.
    """
    require_tunable(config)
    run = config if isinstance(config, RunPart) else None
    tensors, source = _read_init_from(config, config.stage1.init_from)
    encoder = build_encoder(config.encoder, run.data if run else None)
    tokenizer = build_tokenizer(config.qformer)
    torch.manual_seed(run.train.seed if run else 0)
    qformer, stage1 = config.qformer, config.stage1
    adapter = Stage1Adapter(
        build_qformer(qformer, encoder.width, len(tokenizer)),
        encoder_width=encoder.width, contrastive_width=qformer.contrastive_width, dec_id=tokenizer.bos_token_id,
        label_smoothing=stage1.label_smoothing, temperature=stage1.temperature,
        itc=stage1.itc, itm=stage1.itm, itg=stage1.itg, diversity=stage1.diversity,
        feature_norm_eps=qformer.feature_norm_eps,
    )  # fmt: skip
    model = Stage1(
        encoder, adapter, tokenizer, max_text_tokens=qformer.max_text_tokens, itc_batch_size=stage1.itc_batch_size
    )
    add_trainable(model, config)
    if tensors is not None:
        require_learnt_parts(adapter, tensors, source)
        load_strictly(adapter, {**parts_beside(adapter), **tensors}, source)
    elif run and qformer.init_from:
        initialise_from_bert(adapter, qformer.init_from)
    return model


def build_stage2(config: Stage2Part) -> Stage2:
    """Stage 2's model; what stage 1's adapter (`stage2.init_from`) gave it is logged.

    Raises: ValueError when that adapter was of another encoder or size; as `add_trainable` does.
    """
    require_tunable(config)
    run, stage2 = config if isinstance(config, RunPart) else None, config.stage2
    tensors, source = _read_init_from(config, stage2.init_from)  # mistakes first: a language model takes long to load
    tokenizer = build_tokenizer(config.qformer) if stage2.instructed else None
    encoder = build_encoder(config.encoder, run.data if run else None)
    llm = build_language_model(config.llm)
    if run:  # now, and not thousands of steps on
        llm.require_lengths(config.qformer.queries, config.llm.prompt, config.llm.max_target_tokens)
        llm.require_generation(config.llm.num_beams)
    torch.manual_seed(run.train.seed if run else 0)
    vocabulary = None if tokenizer is None else len(tokenizer)
    qformer = build_qformer(config.qformer, encoder.width, vocabulary, recompute_ffn=False)
    adapter = Stage2Adapter(
        qformer, encoder_width=encoder.width, llm_width=llm.width, feature_norm_eps=config.qformer.feature_norm_eps
    )
    with torch.no_grad():
        adapter.language_projection.weight.mul_(stage2.prompt_scale)
    model = Stage2(
        encoder, adapter, llm, prompt=config.llm.prompt, vqa_prompt=config.llm.vqa_prompt, max_target_tokens=config.llm.max_target_tokens,
        sample_max_new_tokens=config.llm.caption_max_new_tokens, tokenizer=tokenizer,
    )  # fmt: skip
    add_trainable(model, config)
    if tensors is None:
        if run:
            logger.warning("stage2.init_from is null: the Q-Former starts from nothing, without stage 1")
        return model
    if require_learnt_parts(adapter, tensors, source) & {LLM_LORA}:
        require_same_parts(config, Path(source), ("llm",))
    share = stage2.init_share
    mixed = qformer.named_parameters() if share < 1 else ()  # otherwise nothing is held twice
    fresh = {name: p.detach().clone() for name, p in mixed if p.ndim > 1}
    model.transferred = transfer(adapter, tensors, source)
    logger.info(model.transferred.report(source))
    shrink_and_perturb(qformer, fresh, share)
    return model


# Every stage by name: the config of a run, and what builds its model.
STAGES: dict[str, tuple[type[ModelPart], Callable[[Any], Stage]]] = {
    Stage1.name: (Stage1Config, build_stage1),
    Stage2.name: (Stage2Config, build_stage2),
}


def _read_init_from(config: ModelPart, folder: str | None) -> tuple[dict[str, torch.Tensor] | None, str]:
    """The tensors that a run begins with, and where they are from; none for a model that is only rebuilt."""
    if folder is None or not isinstance(config, RunPart):
        return None, ""
    require_same_parts(config, Path(folder), ("encoder",), start=True)
    return read_adapter(Path(folder)), folder


@torch.no_grad()
def shrink_and_perturb(qformer: QFormer, fresh: dict[str, torch.Tensor], share: float) -> None:
    """Keep a share of the trained matrices and fill up with the freshly drawn ones named; norms and biases stay.

    What one task taught a small model in a few steps can make it learn the next one slower than a fresh model would.
    Source: Ash and Adams (arXiv 1910.08475), shrink and perturb.
    """
    for name, matrix in fresh.items():
        qformer.get_parameter(name).lerp_(matrix, 1 - share)


def read_split(config: DataConfig, split: str, sources: list[str] | None = None) -> Records:
    """The records of `data.train` or `data.validation`, with image_ids that are unique across both.

    Raises: ValueError as `read_records` does.
    """
    names = sources or getattr(config, split)
    return read_records(names, config.root, key=f"data.{split}", beside=[*config.train, *config.validation])


def build_dataset(
    config: DataConfig, encoder: FrozenEncoder, split: str, seed: int, *, sources: list[str] | None = None,
    vqa_prompt: str = "{}",
) -> RecordDataset:  # fmt: skip
    """The records of `data.train` or `data.validation` in words, with the encoder's own input transform.

    Args:
        sources: other records in their place.
        vqa_prompt: of questions without a template, {} in their place: `Stage.vqa_prompt`.

    Raises: ValueError when records cannot be read, or `data.features` was written without them.
    """
    records = read_split(config, split, sources)
    features = FeatureCache(config.features) if config.features else None
    if features is not None:
        _require_covered(records, features, split)
    wordings = config.wordings() if split == "train" else [(config.text, config.templates)] * len(records.sizes)
    return RecordDataset(
        records,
        build_transform(encoder, config),
        seed=seed,
        augment=config.augment and split == "train",
        text=[
            Wording(
                text,
                tuple(templates or ([vqa_prompt] if text == "vqa" else [])),
                config.answer,
                config.cleaning,
                max_words=config.max_words,
            )
            for text, templates in wordings
        ],
        features=features,
        width=encoder.width if config.features is None else None,
    )


def build_transform(encoder: FrozenEncoder, config: DataConfig | None = None) -> ImageTransform | None:
    """The input transform that belongs to the encoder's weights; None for precomputed features."""
    weights = encoder.input_transform
    if weights is None:
        return None
    data = config or DataConfig()
    low, high = data.crop_scale
    return ImageTransform(
        weights.size,
        weights.mean,
        weights.std,
        weights.interpolation,
        crop_scale=(low, high),
        flip=data.flip,
        max_pixels=data.max_pixels,
        frames=data.frames,
        frame_policy=data.frame_policy,
    )


def build_cache_writer(config: Any, *, dtype: str, crops: int, shard_bytes: float) -> tuple[CacheWriter, FrozenEncoder]:
    """What writes `data.features` for the records of `data.train` and `data.validation`, and the encoder it asks.

    Raises: ValueError when `data.features` is not set or holds a cache of something else, or as `CacheWriter` does.
    """
    data = config.data
    if data.features is None:
        raise ValueError("data.features is missing: the folder that the cache is written to")
    sources = [*data.train, *data.validation]
    records = read_records(sources, root=data.root, key="data.train")
    encoder = build_encoder(config.encoder)
    encoder.output_dtype = None
    writer = CacheWriter(
        data.features,
        records,
        sources,
        encoder=_identity(config.encoder),
        transform=build_transform(encoder, data),
        width=encoder.width,
        num_tokens=encoder.num_tokens,
        dtype=dtype,
        crops=crops,
        seed=config.train.seed,
        shard_bytes=shard_bytes,
    )
    return writer, encoder


def _identity(config: EncoderConfig) -> dict[str, Any]:
    return {key: getattr(config, key) for key in (*IDENTITY["encoder"], "dtype")}


def _require_cache_of(config: EncoderConfig, data: DataConfig, manifest: Manifest) -> None:
    """Raise ValueError with every difference, a line each, between a cache's manifest and the config."""
    encoder = _identity(config)
    if (
        manifest.transform and config.image_size == manifest.transform["size"]
    ):  # null and the weights' own size are the same
        encoder["image_size"] = manifest.encoder["image_size"]
    sizes = {"width": config.width, "num_tokens": config.num_tokens} if config.loader == "features" else {}
    expected = {"encoder": encoder, "features": {k: v for k, v in sizes.items() if v is not None}}
    lines = differences(vars(manifest), expected)
    if data.augment and manifest.transform and not manifest.crops["count"]:
        lines.append("data.augment: the cache has no random crops; set it to false, or write the cache with --crops")
    elif data.augment and manifest.transform and manifest.crops["scale"] != data.crop_scale:
        lines.append(f"data.crop_scale: the cache has {manifest.crops['scale']}, expected {data.crop_scale}")
    if manifest.transform and "frames" in manifest.transform:  # it holds clips
        clips = {name: getattr(data, name) for name in ("frames", "frame_policy")}
        lines += [f"data.{line}" for line in differences(manifest.transform, clips)]
    if lines:
        raise ValueError(f"data.features={data.features} does not fit this config:\n  " + "\n  ".join(lines))


def _require_covered(records: Records, features: FeatureCache, split: str) -> None:
    """Raise ValueError when the cache was written without some of a few thousand records, evenly spread."""
    rows = range(0, len(records), max(1, len(records) // COVERAGE_RECORDS))
    ids = {features.id_of(image) for i in rows for image in records[i].each_image()}
    unknown = sorted(i for i in ids if i not in features and i not in features.broken)
    if unknown:
        raise ValueError(
            f"data.{split}: {len(unknown)} of {len(ids)} images looked up are not in data.features={features.folder}, "
            f"the first: {unknown[0]}; image_ids are relative to data.root, or to the folder that all of data.train and "
            "data.validation lie in: set data.root to what it was then, or write a cache of these records"
        )
