"""From config to objects: the only place that reads both the config and the classes."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from qformer.checkpoint import IDENTITY, Transfer, load_strictly, read_adapter, require_same_parts, transfer
from qformer.config import DataConfig, EncoderConfig, LlmConfig, QFormerConfig, Stage1Config, Stage2Config
from qformer.data import (
    CacheWriter,
    FeatureCache,
    ImageTransform,
    Manifest,
    RecordDataset,
    Records,
    differences,
    read_records,
)
from qformer.encoders import FrozenEncoder, PrecomputedFeatures, load_encoder
from qformer.language import FrozenLanguageModel, load_language_model
from qformer.models import Stage1Adapter, Stage1Model, Stage2Adapter, Stage2Model
from qformer.qformer import QFormer
from qformer.tuning import LLM_LORA, add_trainable, parts_beside, require_learnt_parts, require_tunable

logger = logging.getLogger(__name__)

DEC = "[DEC]"
COVERAGE_RECORDS = 4096  # looked up in a feature cache before training; the rest is when it is read


def build_encoder(config: EncoderConfig, data: DataConfig | None = None) -> FrozenEncoder:
    """The frozen encoder that `encoder.*` names, or its stand-in where `data.features` holds what it would say.

    Raises: ValueError when the cache is of another encoder, or cannot be read.
    """
    if data is not None and data.features is not None:
        found = FeatureCache(data.features).manifest
        _require_cache_of(config, data, found)
        return PrecomputedFeatures(found.features["width"], found.features["num_tokens"])
    return load_encoder(
        config.loader,
        config.id,
        pretrained=config.pretrained,
        revision=config.revision,
        block=config.block,
        image_size=config.image_size,
        dtype=config.dtype,
        width=config.width,
        num_tokens=config.num_tokens,
        random_weights=config.random_weights,
    )


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
    )


def build_tokenizer(config: QFormerConfig) -> Any:
    """The BERT tokenizer of the Q-Former's text side, with [DEC] added as its `bos_token`.

    Raises: ValueError when it cannot be loaded or has no [CLS], [SEP] or padding.
    """
    name, subfolder = config.tokenizer, ""
    if (
        not Path(name).is_dir() and name.count("/") == 2
    ):  # a folder inside a repository of the hub, as InstructBLIP has it
        name, _, subfolder = name.rpartition("/")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"qformer.tokenizer={config.tokenizer!r} cannot be loaded ({' '.join(str(error).split())[:160]}); "
            "give a folder, or a hub id that can be reached"
        ) from None
    for token in ("cls_token", "sep_token", "pad_token"):
        if getattr(tokenizer, token) is None:
            raise ValueError(
                f"qformer.tokenizer={config.tokenizer!r} has no {token}; a BERT-shaped tokenizer is needed"
            )
    tokenizer.add_special_tokens({"bos_token": DEC})
    return tokenizer


def build_qformer(config: QFormerConfig, encoder_width: int, vocab_size: int | None) -> QFormer:
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
        vocab_size=vocab_size,
        max_text_positions=config.max_text_positions,
        init_std=config.init_std,
    )


def build_stage1(config: Stage1Config, initialise: bool = True) -> Stage1Model:
    """Stage 1's model, its adapter from `stage1.init_from`, or drawn from `train.seed` and, if named, `qformer.init_from`.

    Args:
        initialise: False where trained tensors are put in right after.

    Raises: ValueError when the adapter to continue from was trained with another encoder, or does not fit; as
        `require_tunable` and `add_trainable` do.
    """
    require_tunable(config)
    init_from = Path(config.stage1.init_from) if initialise and config.stage1.init_from else None
    tensors = None
    if init_from:
        require_same_parts(config, init_from, ("encoder",))
        tensors = read_adapter(init_from)
    encoder = build_encoder(config.encoder, config.data)
    tokenizer = build_tokenizer(config.qformer)
    torch.manual_seed(config.train.seed)
    adapter = Stage1Adapter(
        build_qformer(config.qformer, encoder.width, len(tokenizer)),
        encoder.width,
        config.qformer.contrastive_width,
        tokenizer.bos_token_id,
        config.stage1.label_smoothing,
        config.stage1.temperature,
        config.stage1.itc,
        config.stage1.itm,
        config.stage1.itg,
        config.qformer.feature_norm_eps,
    )
    model = Stage1Model(encoder, adapter, tokenizer, config.data.max_text_tokens, config.stage1.itc_batch_size)
    add_trainable(model, config)
    if tensors is not None:
        require_learnt_parts(adapter, tensors, str(init_from))
        load_strictly(adapter, {**parts_beside(adapter), **tensors}, str(init_from))
    elif initialise and config.qformer.init_from:
        from qformer.interop.bert import initialise_from_bert

        initialise_from_bert(adapter, config.qformer.init_from)
    return model


def build_stage2(config: Stage2Config, initialise: bool = True) -> tuple[Stage2Model, Transfer | None]:
    """Stage 2's model, and the report of what stage 1's adapter (`stage2.init_from`) gave it.

    Raises: ValueError when that adapter was trained with another encoder, or does not fit; as `require_tunable` and
        `add_trainable` do.
    """
    require_tunable(config)
    init_from = Path(config.stage2.init_from) if initialise and config.stage2.init_from else None
    tensors = None
    if init_from:  # mistakes first: a language model takes long to load
        require_same_parts(config, init_from, ("encoder",))
        tensors = read_adapter(init_from)
    tokenizer = build_tokenizer(config.qformer) if config.stage2.instructed else None
    encoder = build_encoder(config.encoder, config.data)
    llm = build_language_model(config.llm)
    torch.manual_seed(config.train.seed)
    qformer = build_qformer(config.qformer, encoder.width, None if tokenizer is None else len(tokenizer))
    adapter = Stage2Adapter(qformer, encoder.width, llm.width, config.qformer.feature_norm_eps)
    with torch.no_grad():
        adapter.language_projection.weight.mul_(config.stage2.prompt_scale)
    model = Stage2Model(encoder, adapter, llm, config.llm.prompt, config.llm.max_target_tokens, tokenizer)
    add_trainable(model, config)
    if tensors is None:
        return model, None
    assert init_from is not None
    if require_learnt_parts(adapter, tensors, str(init_from)) & {LLM_LORA}:
        require_same_parts(config, init_from, ("llm",))
    share = config.stage2.init_share
    mixed = qformer.named_parameters() if share < 1 else ()  # otherwise nothing is held twice
    fresh = {name: p.detach().clone() for name, p in mixed if p.ndim > 1}
    report = transfer(adapter, tensors, str(init_from))
    soften(qformer, fresh, share)
    return model, report


@torch.no_grad()
def soften(qformer: QFormer, fresh: dict[str, torch.Tensor], share: float) -> None:
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
    config: DataConfig, encoder: FrozenEncoder, split: str, seed: int, sources: list[str] | None = None
) -> RecordDataset:
    """Captioned records of `data.train` or `data.validation`, with the encoder's own input transform.

    Raises: ValueError when records cannot be read, or `data.features` was written without them.
    """
    records = read_split(config, split, sources)
    features = FeatureCache(config.features) if config.features else None
    if features is not None:
        _require_covered(records, features, split)
    return RecordDataset(
        records,
        build_transform(encoder, config),
        seed=seed,
        augment=config.augment and split == "train",
        text="caption",
        cleaning=config.cleaning,
        max_words=config.max_words,
        features=features,
        width=encoder.width if config.features is None else None,
    )


def build_transform(encoder: FrozenEncoder, config: DataConfig) -> ImageTransform | None:
    """The input transform that belongs to the encoder's weights; None for precomputed features."""
    given = encoder.input_transform
    if given is None:
        return None
    low, high = config.crop_scale
    return ImageTransform(
        given.size,
        given.mean,
        given.std,
        given.interpolation,
        crop_scale=(low, high),
        flip=config.flip,
        max_pixels=config.max_pixels,
    )


def build_cache_writer(
    config: Stage1Config | Stage2Config, *, dtype: str, crops: int, shard_bytes: float
) -> tuple[CacheWriter, FrozenEncoder]:
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
        _identity(config.encoder),
        build_transform(encoder, data),
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


def _require_cache_of(config: EncoderConfig, data: DataConfig, found: Manifest) -> None:
    """Raise ValueError with every difference, a line each, between a cache's manifest and the config."""
    encoder = _identity(config)
    if found.transform and config.image_size == found.transform["size"]:  # null and the weights' own size are the same
        encoder["image_size"] = found.encoder["image_size"]
    given = {"width": config.width, "num_tokens": config.num_tokens} if config.loader == "features" else {}
    expected = {"encoder": encoder, "features": {k: v for k, v in given.items() if v is not None}}
    lines = differences(vars(found), expected)
    if data.augment and found.transform and not found.crops["count"]:
        lines.append("data.augment: the cache has no random crops; set it to false, or write the cache with --crops")
    elif data.augment and found.transform and found.crops["scale"] != data.crop_scale:
        lines.append(f"data.crop_scale: the cache has {found.crops['scale']}, expected {data.crop_scale}")
    if lines:
        raise ValueError(f"data.features={data.features} does not fit this config:\n  " + "\n  ".join(lines))


def _require_covered(records: Records, features: FeatureCache, split: str) -> None:
    """Raise ValueError when the cache was written without some of a few thousand records, evenly spread."""
    rows = range(0, len(records), max(1, len(records) // COVERAGE_RECORDS))
    ids = {features.id_of(records[i]) for i in rows}
    unknown = sorted(i for i in ids if i not in features and i not in features.broken)
    if unknown:
        raise ValueError(
            f"data.{split}: {len(unknown)} of {len(ids)} pictures looked at are not in data.features={features.folder}, "
            f"the first: {unknown[0]}; image_ids are relative to data.root, or to the folder that all of data.train and "
            "data.validation lie in: set data.root to what it was then, or write a cache of these records"
        )
