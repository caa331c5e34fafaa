"""`load_config`: YAML fragments merged left to right, then dotted overrides, over the schema; mistakes in one line.

This room knows no torch: a mistake in a config is reported before any weight is loaded.
"""

import dataclasses
import difflib
import re
import sys
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from qformer.config.packaged import config_names, find_config, locate_weights, portable
from qformer.config.schema import Stage1Config, Stage2Config


class ConfigError(ValueError):
    """A mistake in a config that its writer can mend; the message names the key and the fix."""


AT_LEAST_ONE = (
    "train.max_steps", "train.global_batch_size", "train.micro_batch_size", "train.checkpoint_every_steps",
    "train.keep_checkpoints", "train.log_every_steps", "train.validate_every_steps", "train.validation_records",
    "train.timeout_s", "data.shuffle_block_records", "data.max_words",
    "qformer.layers", "qformer.width", "qformer.heads", "qformer.ffn_width", "qformer.queries",
    "qformer.cross_attention_frequency", "qformer.contrastive_width", "llm.num_beams", "tune.lora_rank",
)  # fmt: skip
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
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
    except InterpolationResolutionError as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
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
    return portable(OmegaConf.to_yaml(OmegaConf.structured(config)))


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
        if "--print-config" not in arguments:
            _check_record_files(config)
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
        try:
            return locate_weights(OmegaConf.from_dotlist([argument]))
        except Exception:  # the YAML library raises its own classes
            raise ConfigError(f"{argument}: the value is not valid YAML; a list is written [a, b]") from None
    if not is_file:
        raise ConfigError(f"{argument!r} is neither a .yaml file nor key=value")
    path = find_config(argument)
    if not path.is_file():
        raise ConfigError(f"no config file {argument}{_nearest_file(path)}")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # the YAML library raises its own classes
        raise ConfigError(f"{argument} is not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(f"{argument} must hold keys and values at its top")
    return locate_weights(loaded)


def _nearest_file(path: Path) -> str:
    """The end of a message about a missing file: the nearest of its folder, or of the folders beside a missing one."""
    if path.parts[:1] == ("configs",):
        near = difflib.get_close_matches(str(path), config_names(), n=1)
    elif path.parent.is_dir():
        names = [p.name for p in path.parent.glob(f"*{path.suffix}")]
        near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, names, n=1)]
    else:
        near = difflib.get_close_matches(str(path), map(str, path.parent.parent.glob(f"*/*{path.suffix}")), n=1)
    return f"; nearest is {near[0]}" if near else ""


def _check_record_files(config: Stage1Config | Stage2Config) -> None:
    """Local record files must be there before any weight loads; what is not a file's path is left to the sources."""
    for key in ("train", "validation"):
        for source in getattr(config.data, key):
            path = Path(re.sub(r":\w+(\[.*\])?$", "", source)).expanduser()
            local = path.suffix in (".json", ".jsonl", ".parquet") and "://" not in source
            if local and not set(source) & set("{*?") and not path.exists() and not Path(source).expanduser().exists():
                raise ConfigError(f"data.{key}: there is no record file {source}{_nearest_file(path)}")


def _merge(merged: Any, fragment: Any, source: str, root: type) -> Any:
    known = _known_keys(root)
    for key in _leaves(OmegaConf.to_container(fragment)):
        if key not in known and not any(k.startswith(key + ".") for k in known):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown key {key} in {source}; nearest is {near}")
    try:
        return OmegaConf.merge(merged, _lists(fragment, root))
    except OmegaConfBaseException as error:
        key = next(
            (k for k in known if (error.full_key or "").startswith(k)), error.full_key or source.partition("=")[0]
        )
        kind = _field(root, key).type if key in known else "a section of keys"
        wanted = str(getattr(kind, "__name__", kind)) if not str(kind).startswith("list") else f"{kind}, written [a, b]"
        raise ConfigError(f"{key}: {OmegaConf.select(fragment, key)!r} in {source} is not {wanted}") from None


def _lists(fragment: Any, root: type) -> Any:
    """The fragment with [x] where a list of strings is wanted and x stands there, and [] where nothing does."""
    for key in _known_keys(root):
        kind = str(_field(root, key).type)
        if not kind.startswith("list") or OmegaConf.is_missing(fragment, key.split(".")[0]):
            continue
        section, _, name = key.partition(".")
        values = fragment.get(section)
        if not OmegaConf.is_dict(values) or name not in values or OmegaConf.is_missing(values, name):
            continue
        if values[name] is None or values[name] == "":
            values[name] = []
        elif kind == "list[str]" and isinstance(values[name], str):
            values[name] = [values[name]]
    return fragment


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
    """Choices and ranges, all problems in one message; a choice that YAML took for false becomes "no" again."""
    problems = []
    for key in _known_keys(type(config)):
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        choices = _field(type(config), key).metadata["choices"]
        if value == "False" and "no" in choices:
            setattr(getattr(config, section), name, value := "no")
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
    if not config.optim.clip_norm > 0:
        problems.append(f"optim.clip_norm: {config.optim.clip_norm} must be above 0")
    if not 0 <= config.data.max_dropped_fraction <= 1:
        problems.append(f"data.max_dropped_fraction: {config.data.max_dropped_fraction} is outside 0 to 1")
    if not config.data.train:
        problems.append("data.train: [] names no record file")
    weights = config.data.weights
    if weights and (len(weights) != len(config.data.train) or not all(weight > 0 for weight in weights)):
        problems.append(f"data.weights: {weights} must hold a number above 0 for each of data.train, or nothing")
    if config.data.max_pixels is not None and config.data.max_pixels < 1:
        problems.append(f"data.max_pixels: {config.data.max_pixels} must be at least 1")
    crop = config.data.crop_scale
    if len(crop) != 2 or not 0 < crop[0] <= crop[1] <= 1:
        problems.append(f"data.crop_scale: {crop} must be [smallest, largest] with 0 < smallest <= largest <= 1")
    if not 3 <= config.data.max_text_tokens <= qformer.max_text_positions:
        problems.append(
            f"data.max_text_tokens: {config.data.max_text_tokens} is outside 3 to qformer.max_text_positions "
            f"({qformer.max_text_positions})"
        )
    if isinstance(config, Stage2Config) and not 0 <= config.stage2.init_share <= 1:
        problems.append(f"stage2.init_share: {config.stage2.init_share} is outside 0 to 1")
    if isinstance(config, Stage2Config) and config.stage2.prompt_scale <= 0:
        problems.append(f"stage2.prompt_scale: {config.stage2.prompt_scale} must be above 0")
    if isinstance(config, Stage1Config) and not 0.001 <= config.stage1.temperature <= 0.5:
        problems.append(f"stage1.temperature: {config.stage1.temperature} is outside 0.001 to 0.5")
    itc = config.stage1.itc_batch_size if isinstance(config, Stage1Config) else None
    micro = max(1, train.micro_batch_size)
    if itc is not None and (itc < 1 or itc % micro or train.global_batch_size % itc):
        problems.append(
            f"stage1.itc_batch_size: {itc} must be a multiple of train.micro_batch_size ({micro}) and divide "
            f"train.global_batch_size ({train.global_batch_size}); null = train.micro_batch_size x processes"
        )
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
