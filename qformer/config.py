"""The schema of every config, and `load_config`: YAML fragments merged left to right, then dotted overrides.

Every field carries its meaning and unit; `--help` prints them. This file knows no torch: a mistake in a config is
reported before any weight is loaded.
"""

import dataclasses
import difflib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """A mistake in a config that its writer can mend; the message names the key and the fix."""


def _doc(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    metadata = {"help": text, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


AT_LEAST_ONE = (
    "train.max_steps", "train.global_batch_size", "train.micro_batch_size", "train.checkpoint_every_steps",
    "train.keep_checkpoints", "train.log_every_steps", "train.validate_every_steps", "train.validation_records",
    "qformer.layers", "qformer.width", "qformer.heads", "qformer.ffn_width", "qformer.queries",
    "qformer.cross_attention_frequency", "qformer.contrastive_width", "llm.num_beams",
)  # fmt: skip
PRECISIONS = ("no", "bf16", "fp16")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class RunConfig:
    dir: str = _doc(MISSING, "folder of this run: config, metrics, checkpoints, adapter")
    trackers: list[str] = _doc([], "accelerate trackers that mirror metrics.jsonl, e.g. [tensorboard, wandb]")


@dataclass
class TrainConfig:
    max_steps: int = _doc(MISSING, "optimizer updates in all")
    seed: int = _doc(0, "seed of initial weights, order, augmentation and dropout")
    resume: str | None = _doc(
        None, "auto = go on from run.dir's newest checkpoint; a checkpoint folder; null = from the start"
    )
    global_batch_size: int = _doc(MISSING, "records per step, over all processes and accumulation")
    micro_batch_size: int = _doc(MISSING, "records per process and forward pass")
    mixed_precision: str = _doc("no", "autocast of the trainable part; its master weights stay float32", PRECISIONS)
    cpu: bool = _doc(False, "train on the CPU even where there is a GPU")
    checkpoint_every_steps: int = _doc(1000, "steps between checkpoints")
    keep_checkpoints: int = _doc(2, "newest checkpoints that are kept")
    log_every_steps: int = _doc(10, "steps between lines of metrics.jsonl")
    validate_every_steps: int = _doc(1000, "steps between validations; one more at the end")
    validation_records: int = _doc(512, "records read in a validation")


@dataclass
class OptimConfig:
    lr: float = _doc(1e-4, "peak learning rate")
    min_lr: float = _doc(1e-5, "learning rate at the end of the cosine")
    warmup_steps: int = _doc(2000, "steps of linear warm-up")
    warmup_lr: float = _doc(1e-6, "learning rate at step 0")
    weight_decay: float = _doc(0.05, "AdamW weight decay; none on biases, norms and the temperature")
    betas: list[float] = _doc([0.9, 0.98], "AdamW betas")
    clip_norm: float = _doc(1.0, "largest gradient norm; larger ones are scaled down to it")


@dataclass
class DataConfig:
    train: list[str] = _doc(MISSING, "record files (.jsonl, .json, .parquet) or ids of `datasets`")
    validation: list[str] = _doc([], "held-out records, same forms; empty = no validation")
    root: str | None = _doc(None, "folder that relative image paths start from; null = the record file's own")
    features: str | None = _doc(
        None, "feature cache of stages/cache_features.py, read in the encoder's place; null = encode every picture"
    )
    workers: int = _doc(2, "processes that read and decode")
    augment: bool = _doc(True, "random resized crop and flip of training pictures")
    crop_scale: list[float] = _doc([0.5, 1.0], "share of the picture's area that a random crop keeps")
    max_text_tokens: int = _doc(32, "tokens of a caption, special ones included")


@dataclass
class EncoderConfig:
    loader: str = _doc(MISSING, "which library loads it", ("open_clip", "transformers", "features"))
    id: str = _doc("", "open_clip name or local-dir:FOLDER; hub id or folder of transformers")
    pretrained: str | None = _doc(None, "open_clip pretrained tag")
    revision: str | None = _doc(None, "revision of the hub id")
    random_weights: bool = _doc(False, "build the architecture without its weights, for trials")
    block: int = _doc(-2, "block whose output is read, before the final norm (-1 last, -2 second last as in the paper)")
    image_size: int | None = _doc(None, "side in pixels; null = the weights' own")
    dtype: str = _doc("float32", "dtype of the frozen weights", DTYPES)
    width: int | None = _doc(None, "width of precomputed features (loader features only)")
    num_tokens: int | None = _doc(None, "tokens of precomputed features, null if they vary (loader features only)")


@dataclass
class QFormerConfig:
    init_from: str | None = _doc(
        None, "BERT-shaped masked language model (hub id or folder) to start from; null = random"
    )
    tokenizer: str = _doc("bert-base-uncased", "BERT tokenizer: hub id or folder; gains [DEC]")
    layers: int = _doc(12, "transformer layers")
    width: int = _doc(768, "hidden width D")
    heads: int = _doc(12, "attention heads H")
    ffn_width: int = _doc(3072, "width inside a feed-forward network")
    queries: int = _doc(32, "learned query tokens Q")
    cross_attention_frequency: int = _doc(2, "cross-attention to the image in layers 0, f, 2f, ...")
    dropout: float = _doc(0.1, "dropout probability of hidden states and attention")
    max_text_positions: int = _doc(512, "learned text positions")
    init_std: float = _doc(0.02, "standard deviation of initial weights; narrow models learn sooner from more")
    contrastive_width: int = _doc(256, "width E of the contrastive projections")
    feature_norm_eps: float = _doc(1e-5, "eps of the LayerNorm on frozen features; transformers' checkpoints use 1e-6")


@dataclass
class Stage1Section:
    init_from: str | None = _doc(None, "adapter folder of stage 1 to continue from; null = begin anew")
    itc: float = _doc(1.0, "weight of image-text contrast")
    itm: float = _doc(1.0, "weight of image-text matching")
    itg: float = _doc(1.0, "weight of image-grounded text generation")
    label_smoothing: float = _doc(0.1, "label smoothing of ITC and ITG")
    temperature: float = _doc(0.07, "start of the learned divisor of ITC similarities")


@dataclass
class LlmConfig:
    id: str = _doc(MISSING, "hub id or folder of a causal or sequence-to-sequence language model of transformers")
    revision: str | None = _doc(None, "revision of the hub id")
    random_weights: bool = _doc(False, "build the architecture without its weights, for trials")
    dtype: str = _doc("float32", "dtype of the frozen weights", DTYPES)
    activation: str | None = _doc(
        None,
        "T5's dense_act_fn in place of its own; BLIP-2's adapters for FlanT5 were trained with gelu (the exact one)",
    )
    trust_remote_code: bool = _doc(False, "run the Python code that comes with the hub id")
    max_target_tokens: int = _doc(32, "tokens of a caption that the loss covers")
    prompt: str = _doc("", "text before the caption in training; not in the loss")
    vqa_prompt: str = _doc("", "prompt of questions with {} for the question; empty = BLIP-2's for this kind of model")
    num_beams: int = _doc(5, "beams in generation")
    vqa_length_penalty: float | None = _doc(
        None, "length penalty for answers; null = BLIP-2's: 0 decoder-only, -1 encoder-decoder"
    )
    vqa_max_new_tokens: int = _doc(10, "longest answer")
    caption_max_new_tokens: int = _doc(30, "longest caption")
    caption_min_new_tokens: int = _doc(8, "shortest caption")


@dataclass
class Stage2Section:
    init_from: str | None = _doc(None, "adapter folder of stage 1; null = a Q-Former from nothing (the ablation)")
    instructed: bool = _doc(False, "the prompt also enters the Q-Former, beside the queries, as in InstructBLIP")


@dataclass
class Stage1Config:
    """Stage 1: representation learning (ITC, ITM, ITG) with a frozen image encoder."""

    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    stage1: Stage1Section = field(default_factory=Stage1Section)


@dataclass
class Stage2Config:
    """Stage 2: generative learning through a frozen language model."""

    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)
    stage2: Stage2Section = field(default_factory=Stage2Section)


Root = TypeVar("Root", Stage1Config, Stage2Config)


def load_config(root: type[Root], arguments: list[str]) -> Root:
    """Merge YAML files and `key.path=value` overrides, left to right, over the schema's defaults.

    Returns: a plain dataclass; every value has the type its schema names and none is missing.
    Raises: ConfigError for a missing file, bad YAML, an unknown key (with the nearest one), a wrong type, a value that
        is not among the choices, a value out of range, or a missing value. All missing values are named at once.
    """
    merged = OmegaConf.structured(root)
    for argument in arguments:
        merged = _merge(merged, _fragment(argument), argument, root)
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        described = "; ".join(f"{key} ({_field(root, key).metadata['help']})" for key in missing)
        raise ConfigError(f"missing value{'s' * (len(missing) > 1)}: {described}. Set in a YAML file or as key=value")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, root)
    _check(config)
    return config


def from_dict(values: dict[str, Any]) -> Stage1Config | Stage2Config:
    """The config that `to_dict` wrote, as its own root: stage 2 where there is a language model.

    Raises: ConfigError as `load_config` does.
    """
    root: Any = Stage2Config if "llm" in values else Stage1Config
    merged = _merge(OmegaConf.structured(root), OmegaConf.create(values), "config.yaml", root)
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise ConfigError(f"config.yaml lacks {', '.join(missing)}")
    config: Any = OmegaConf.to_object(merged)
    _check(config)
    return config


def read_config(path: Path) -> Stage1Config | Stage2Config:
    """Read the resolved `config.yaml` of a run or adapter folder."""
    return from_dict(OmegaConf.to_container(_fragment(str(path))))  # type: ignore[arg-type]


def to_yaml(config: Stage1Config | Stage2Config) -> str:
    """The resolved config as YAML; alone it reproduces the run."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def parse_arguments(root: type[Root], doc: str, argv: list[str] | None) -> Root:
    """Read a stage's command line; `--help` prints usage and schema, `--print-config` the resolved config.

    A mistake is one line on standard error and exit code 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(f"{doc.strip()}\n\nusage: CONFIG.yaml ... key.path=value ... [--print-config]\n\n{describe_schema(root)}")
        raise SystemExit(0 if arguments else 2)
    try:
        config = load_config(root, [a for a in arguments if a != "--print-config"])
    except ConfigError as error:
        print(f"config error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if "--print-config" in arguments:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def describe_schema(root: type) -> str:
    """Every key with its default and meaning, one line each."""
    lines = []
    for section in dataclasses.fields(root):
        for key in dataclasses.fields(section.type):  # type: ignore[arg-type]
            default = key.default_factory() if callable(key.default_factory) else key.default
            shown = "required" if default == MISSING else "null" if default is None else default
            choices = f" [{', '.join(key.metadata['choices'])}]" if key.metadata["choices"] else ""
            lines.append(f"  {section.name + '.' + key.name:<36} {shown!s:<20} {key.metadata['help']}{choices}")
    return "\n".join(lines)


def _fragment(argument: str) -> Any:
    if argument.startswith("-"):
        raise ConfigError(f"unknown option {argument}; options are --help and --print-config")
    is_file = argument.endswith((".yaml", ".yml"))
    if not is_file and "=" in argument:
        return OmegaConf.from_dotlist([argument])
    if not is_file:
        raise ConfigError(f"{argument!r} is neither a .yaml file nor key=value")
    path = Path(argument)
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        )
        raise ConfigError(f"no config file {argument}" + (f"; nearest is {path.parent / near[0]}" if near else ""))
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # the YAML library raises its own classes
        raise ConfigError(f"{argument} is not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(f"{argument} must hold keys and values at its top")
    return loaded


def _merge(merged: Any, fragment: Any, source: str, root: type) -> Any:
    known = _known_keys(root)
    for key in _leaves(OmegaConf.to_container(fragment)):
        if key not in known and not any(k.startswith(key + ".") for k in known):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown key {key} in {source}; nearest is {near}")
    try:
        return OmegaConf.merge(merged, fragment)
    except OmegaConfBaseException as error:
        key = next((k for k in known if (error.full_key or "").startswith(k)), error.full_key or source)
        kind = _field(root, key).type if key in known else "a section of keys"
        wanted = str(getattr(kind, "__name__", kind)) if not str(kind).startswith("list") else f"{kind}, written [a, b]"
        raise ConfigError(f"{key}: {OmegaConf.select(fragment, key)!r} in {source} is not {wanted}") from None


def _leaves(values: Any, prefix: str = "") -> list[str]:
    if not isinstance(values, dict):
        return [prefix]
    return [leaf for k, v in values.items() for leaf in _leaves(v, f"{prefix}.{k}" if prefix else str(k))]


def _known_keys(root: type) -> list[str]:
    return [f"{s.name}.{k.name}" for s in dataclasses.fields(root) for k in dataclasses.fields(s.type)]  # type: ignore[arg-type]


def _field(root: type, key: str) -> dataclasses.Field:
    section, name = key.split(".")[:2]
    kind: Any = next(f.type for f in dataclasses.fields(root) if f.name == section)
    return next(f for f in dataclasses.fields(kind) if f.name == name)


def _check(config: Stage1Config | Stage2Config) -> None:
    """Choices and ranges, all problems in one message."""
    problems = []
    for key in _known_keys(type(config)):
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        choices = _field(type(config), key).metadata["choices"]
        if choices and value not in choices:
            problems.append(f"{key}: {value!r} is not one of {', '.join(choices)}")
    train, qformer = config.train, config.qformer
    for key in AT_LEAST_ONE:
        section, name = key.split(".")
        if hasattr(config, section) and (value := getattr(getattr(config, section), name)) < 1:
            problems.append(f"{key}: {value} must be at least 1")
    if train.seed < 0:
        problems.append(f"train.seed: {train.seed} must be 0 or more")
    if not 0 <= config.optim.min_lr <= config.optim.lr:
        problems.append(f"optim.min_lr: {config.optim.min_lr} is outside 0 to optim.lr ({config.optim.lr})")
    if not config.data.train:
        problems.append("data.train: [] names no record file")
    crop = config.data.crop_scale
    if len(crop) != 2 or not 0 < crop[0] <= crop[1] <= 1:
        problems.append(f"data.crop_scale: {crop} must be [smallest, largest] with 0 < smallest <= largest <= 1")
    if not 3 <= config.data.max_text_tokens <= qformer.max_text_positions:
        problems.append(
            f"data.max_text_tokens: {config.data.max_text_tokens} is outside 3 to qformer.max_text_positions "
            f"({qformer.max_text_positions})"
        )
    if isinstance(config, Stage1Config) and not 0.001 <= config.stage1.temperature <= 0.5:
        problems.append(f"stage1.temperature: {config.stage1.temperature} is outside 0.001 to 0.5")
    if train.micro_batch_size > 0 and train.global_batch_size % train.micro_batch_size:
        problems.append(
            f"train.global_batch_size: {train.global_batch_size} must be a multiple of "
            f"train.micro_batch_size ({train.micro_batch_size})"
        )
    if not 0 <= config.optim.warmup_steps <= train.max_steps:
        problems.append(
            f"optim.warmup_steps: {config.optim.warmup_steps} is outside 0 to train.max_steps ({train.max_steps})"
        )
    if qformer.feature_norm_eps <= 0:
        problems.append(f"qformer.feature_norm_eps: {qformer.feature_norm_eps} must be above 0")
    if qformer.width % qformer.heads:
        problems.append(f"qformer.width: {qformer.width} must be a multiple of qformer.heads ({qformer.heads})")
    if len(config.optim.betas) != 2:
        problems.append(f"optim.betas: {config.optim.betas} must hold two numbers")
    if config.encoder.loader == "features" and config.encoder.width is None:
        problems.append("encoder.width: missing; encoder.loader=features needs the width of the features")
    if config.encoder.loader != "features" and not config.encoder.id:
        problems.append("encoder.id: missing; it names the frozen encoder")
    if problems:
        raise ConfigError("; ".join(problems))
