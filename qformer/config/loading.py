"""`load_config`: YAML fragments merged left to right, then dotted overrides, over the schema; mistakes in one line.

This room knows no torch: a mistake in a config is reported before any weight is loaded.
"""

import dataclasses
import difflib
import re
import sys
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from qformer.config.help import describe_schema, entry_kind
from qformer.config.packaged import config_names, find_config, locate_weights, portable
from qformer.config.schema import ModelPart, RunPart
from qformer.messages import nearest, print_error


class ConfigError(ValueError):
    """A mistake in a config that its writer can fix; the message names the key and the fix."""


MOVED = {"data.max_text_tokens": "qformer.max_text_tokens"}  # keys that stand elsewhere since; both are read
Part = TypeVar("Part", bound=ModelPart)
Section = TypeVar("Section")


def load_config(root: type[Part], arguments: list[str], needed: tuple[str, ...] | None = None) -> Part:
    """Merge YAML files and `key.path=value` overrides, left to right, over the schema's defaults.

    Args:
        needed: the sections that will be read; others may lack values. None = all.

    Returns: a plain dataclass; every value has the type its schema names and none is missing.
    Raises: ConfigError for a missing file, bad YAML, an unknown key (with the nearest one), a wrong type, a value that
        is not among the choices, a value out of range, a missing value, or a config of another stage. All missing values
        are named at once.
    """
    merged = OmegaConf.structured(root)
    for argument in arguments:
        merged = _merge(merged, read_fragment(argument), argument, root)
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
    except InterpolationResolutionError as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    missing = [re.sub(r"\[\d+\]", "", key) for key in missing if needed is None or key.partition(".")[0] in needed]
    if missing:
        missing = list(dict.fromkeys(missing))
        described = "; ".join(f"{key} ({_field(root, key).metadata['help']})" for key in missing)
        raise ConfigError(f"missing value{'s' * (len(missing) > 1)}: {described}. Set in a YAML file or as key=value")
    return _to_dataclass(root, merged, needed)


def named_stage(arguments: list[str]) -> str | None:
    """The `stage` that YAML files and overrides name; None where none does.

    Raises: ConfigError for a missing file or bad YAML.
    """
    return next((str(f.stage) for f in map(read_fragment, reversed(arguments)) if f.get("stage") is not None), None)


def model_part(root: type) -> type[ModelPart]:
    """The class of what rebuilds the model, of a stage's whole config."""
    return next(c for c in root.__mro__ if issubclass(c, ModelPart) and not issubclass(c, RunPart))


def read_values(folder: Path) -> dict[str, Any]:
    """The `config.yaml` of a run, checkpoint or adapter folder, as nested dictionaries.

    Folders from before version 0.2 name no stage: their stage is the one whose section they have.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is no adapter, checkpoint or run folder: it has no config.yaml")
    values = cast(dict[str, Any], OmegaConf.to_container(_moved(read_fragment(str(path)))))
    return values if "stage" in values else {"stage": "stage2" if "stage2" in values else "stage1", **values}


def read_section(folder: Path, name: str, schema: type[Section]) -> Section:
    """One section of a folder's `config.yaml`; keys that it lacks have the schema's default."""
    values = read_values(folder).get(name) or {}
    known = {f.name for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
    return cast(
        Section,
        OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(schema), {k: v for k, v in values.items() if k in known})
        ),
    )


def read_config(folder: Path, root: type[Part]) -> Part:
    """The `config.yaml` of a folder as `root`; of a run folder's, a model part takes what it knows.

    Raises: ConfigError as `load_config` does.
    """
    values = {key: value for key, value in read_values(folder).items() if key in {"stage", *_sections(root)}}
    return from_values(root, values, str(folder / "config.yaml"))


def from_values(root: type[Part], values: dict[str, Any], source: str) -> Part:
    """A config of nested dictionaries; `source` names them in errors.

    Raises: ConfigError as `load_config` does.
    """
    merged = _merge(OmegaConf.structured(root), OmegaConf.create(values), source, root)
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise ConfigError(f"{source} lacks {', '.join(missing)}")
    return _to_dataclass(root, merged)


def to_yaml(config: ModelPart) -> str:
    """The resolved config as YAML; that of a run alone reproduces it."""
    return portable(OmegaConf.to_yaml(OmegaConf.structured(config)))


def only_model(config: ModelPart) -> ModelPart:
    """The part of a run's config that rebuilds its model: what an adapter folder keeps."""
    root = model_part(type(config))
    return root(**{f.name: getattr(config, f.name) for f in dataclasses.fields(root)})


def parse_arguments(root: type[Part], doc: str, argv: list[str] | None) -> Part:
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
        print_error(f"config error: {error}")
        raise SystemExit(2) from None
    if "--print-config" in arguments:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def read_fragment(argument: str) -> Any:
    """The values of a YAML file, found by name, or of one `key.path=value`.

    Raises: ConfigError for another argument, a missing file or bad YAML.
    """
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


def _check_record_files(config: Any) -> None:
    """Local record files must be there before any weight loads; what is not a file's path is left to the sources."""
    for key in ("train", "validation"):
        for source in getattr(config.data, key):
            path = Path(re.sub(r":\w+(\[.*\])?$", "", source)).expanduser()
            local = path.suffix in (".json", ".jsonl", ".parquet") and "://" not in source
            if local and not set(source) & set("{*?") and not path.exists() and not Path(source).expanduser().exists():
                raise ConfigError(f"data.{key}: there is no record file {source}{_nearest_file(path)}")


def _merge(merged: Any, fragment: Any, source: str, root: type) -> Any:
    if (stage := fragment.get("stage")) not in (None, merged.stage) and merged.stage != MISSING:
        raise ConfigError(f"{source} is of stage={stage}, this is {merged.stage}: launch stages/{stage}.py with it")
    fragment = _moved(fragment)
    known = [*_known_keys(root), "stage"]
    for key in _leaves(OmegaConf.to_container(fragment)):
        if key not in known and not any(k.startswith(key + ".") for k in known):
            raise ConfigError(f"unknown key {key} in {source}; {nearest(key, known)}")
    try:
        return OmegaConf.merge(merged, _lists(_name_sources(fragment), root))
    except OmegaConfBaseException as error:
        place = error.full_key or source.partition("=")[0]
        key = next((k for k in known if place.startswith(k) or (k.count(".") > 1 and k.endswith(f".{place}"))), place)
        section, name, *below = key.split(".") if "." in key else (key, None)
        value = fragment.get(section) if name is None else fragment[section][name]
        if below:  # of one of a list's entries
            value = [entry[below[0]] for entry in value if below[0] in entry]
        kind = _field(root, key).type if "." in key and key in known else "a section of keys"
        wanted = str(getattr(kind, "__name__", kind)) if not str(kind).startswith("list") else f"{kind}, written [a, b]"
        raise ConfigError(f"{key}: {value!r} in {source} is not {wanted}") from None


def _name_sources(fragment: Any) -> Any:
    """The fragment with `data.train` as its `data.sources` name it, so that records are always named there."""
    data = fragment.get("data")
    sources = data.get("sources") if OmegaConf.is_dict(data) else None
    if OmegaConf.is_list(sources) and sources and "train" not in data:
        if not all(OmegaConf.is_dict(source) and source.get("records") for source in sources):
            raise ConfigError("data.sources: each entry must name its records: [{records: a.jsonl, text: vqa}]")
        data["train"] = [source["records"] for source in sources]
        for source in (s for s in sources if isinstance(s.get("templates"), str)):
            source["templates"] = [source["templates"]]
    return fragment


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


def _moved(fragment: Any) -> Any:
    """The fragment with every key of `MOVED` where it stands now."""
    for before, now in MOVED.items():
        section, name = before.split(".")
        if OmegaConf.is_dict(fragment.get(section)) and (value := fragment[section].get(name)) is not None:
            fragment = OmegaConf.merge(fragment, OmegaConf.from_dotlist([f"{now}={value}"]))
            del fragment[section][name]
            if not fragment[section]:
                del fragment[section]
    return fragment


def _leaves(values: Any, prefix: str = "") -> list[str]:
    if isinstance(values, list) and any(isinstance(entry, dict) for entry in values):
        return [leaf for entry in values for leaf in _leaves(entry, prefix)]
    if not isinstance(values, dict):
        return [prefix]
    return [leaf for k, v in values.items() for leaf in _leaves(v, f"{prefix}.{k}" if prefix else str(k))]


def _sections(root: type) -> dict[str, Any]:
    """The dataclass of every section, by name."""
    return {f.name: f.type for f in dataclasses.fields(root) if dataclasses.is_dataclass(f.type)}


def _known_keys(root: type) -> list[str]:
    """Every key; those of a list's entries stand after the list, as `data.sources.records`."""
    keys = []
    for name, section in _sections(root).items():
        for field in dataclasses.fields(section):
            inner = entry_kind(field)
            below = [f"{field.name}.{key.name}" for key in dataclasses.fields(inner)] if inner else []
            keys += [f"{name}.{key}" for key in (field.name, *below)]
    return keys


def _field(root: type, key: str) -> dataclasses.Field:
    section, name, *below = key.split(".")
    field = next(f for f in dataclasses.fields(_sections(root)[section]) if f.name == name)
    return next(f for f in dataclasses.fields(entry_kind(field)) if f.name == below[0]) if below else field


def _to_dataclass(root: type[Part], merged: Any, needed: tuple[str, ...] | None = None) -> Part:
    """Merged values as plain dataclasses, after every check; values that nobody needs may be missing."""
    sections = {}
    problems = []
    for name, kind in _sections(root).items():
        sections[name], wrong = _section(name, kind, merged[name])
        problems += wrong
    config = root(stage=merged.stage, **sections)
    if needed is None and not problems:
        problems = [message for wrong, message in config.problems() if wrong]
    if problems:
        raise ConfigError("; ".join(problems))
    return config


def _section(name: str, kind: Any, merged: Any) -> tuple[Any, list[str]]:
    """The dataclass of merged values, and what is wrong with them; those that are missing are left out."""
    values, problems = {}, []
    for field in (f for f in dataclasses.fields(kind) if not OmegaConf.is_missing(merged, f.name)):
        key, value = f"{name}.{field.name}", merged[field.name]
        if inner := entry_kind(field):
            entries = [_section(key, inner, entry) for entry in value]
            values[field.name] = [entry for entry, _ in entries]
            problems += [problem for _, wrong in entries for problem in wrong]
            continue
        value = OmegaConf.to_container(value) if OmegaConf.is_list(value) else value
        values[field.name], problem = check_value(key, value, field)
        problems += [problem] if problem else []
    return kind(**values), problems


def check_value(key: str, value: Any, field: dataclasses.Field) -> tuple[Any, str | None]:
    """The value of a key, and what is wrong with it; a choice that YAML took for false becomes "no" again."""
    choices, least, above, most = (field.metadata.get(k) for k in ("choices", "at_least", "above", "at_most"))
    if value == "False" and choices and "no" in choices:
        value = "no"
    if choices and value not in choices and not (value is None and field.default is None):
        return value, f"{key}: {value!r} is not one of {', '.join(choices)}"
    if value is None or not isinstance(value, int | float):
        return value, None
    if least is not None and most is not None and not least <= value <= most:
        return value, f"{key}: {value} is outside {least} to {most}"
    if least is not None and value < least:
        return value, f"{key}: {value} must be at least {least}"
    if above is not None and value <= above:
        return value, f"{key}: {value} must be above {above}"
    return value, None
