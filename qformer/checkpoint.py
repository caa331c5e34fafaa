"""What is kept of a run: trainable tensors only, in safetensors, versioned, written whole or not at all.

An adapter folder holds `adapter.safetensors`, `config.yaml` and `README.md`; a checkpoint folder also the optimizer's
moments and `state.json`; both hold checksums, in which only the model card, meant to be edited, is left out. There is
no random state to keep: dropout, negatives, order and augmentation are functions of (seed, step, position), so a run
resumed at a step draws what the uninterrupted one draws.
"""

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qformer.config import ModelPart, read_section, read_values
from qformer.files import atomic_folder, changed_files, write_checksums
from qformer.lora import PEFT_CONFIG, PEFT_TENSORS, Lora, read_lora
from qformer.messages import one_line

logger = logging.getLogger(__name__)

FORMAT_VERSION = "1"
TENSORS, OPTIMIZER, STATE, CONFIG, CARD = (
    "adapter.safetensors",
    "optimizer.safetensors",
    "state.json",
    "config.yaml",
    "README.md",
)
CHECKPOINT = (TENSORS, OPTIMIZER, STATE, CONFIG)
ADAPTER_FILES = ["*.safetensors", "*.yaml", "*.md", "*.json", "SHA256SUMS", "llm_lora/*", "encoder_lora/*"]


class Transfer(NamedTuple):
    """What came of starting one adapter from another: names of tensors loaded, new (kept as drawn), and left out."""

    loaded: list[str]
    new: list[str]
    left_out: list[str]

    def report(self, source: str) -> str:
        """Plain words for the log; modules stand for their tensors where they are of one kind."""
        lines = [f"{len(self.loaded)} tensors loaded from {source}"]
        lines += [f"{len(names)} {what}: {', '.join(_modules(names))}" for what, names in
                  (("new", self.new), ("left out", self.left_out)) if names]  # fmt: skip
        return "; ".join(lines)


def trainable_tensors(adapter: nn.Module) -> dict[str, Tensor]:
    """The adapter's state on the CPU, by name."""
    return {name: value.detach().cpu().contiguous() for name, value in adapter.state_dict().items()}


def save_adapter(folder: Path, adapter: nn.Module, config: str, card: str) -> None:
    """Write an adapter folder: tensors, resolved config, model card, and a folder of PEFT's for each LoRA."""
    loras = {name: module for name, module in adapter.named_children() if isinstance(module, Lora)}
    tensors = {name: t for name, t in trainable_tensors(adapter).items() if name.split(".")[0] not in loras}
    with atomic_folder(folder) as scratch:
        _save_tensors(scratch / TENSORS, tensors)
        for name, lora in loras.items():
            lora.save_pretrained(scratch / name)
        (scratch / CONFIG).write_text(config)
        (scratch / CARD).write_text(card)
        write_checksums(scratch, (TENSORS, CONFIG, *_lora_files(scratch)))


def adapter_folder(path: str | Path, revision: str | None = None) -> Path:
    """The folder that `load` reads: itself, the adapter of a run's folder, or a snapshot of a hub id.

    Raises: ValueError when it is none of them.
    """
    folder = Path(path).expanduser()
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        patterns = [*ADAPTER_FILES, *(f"adapter/{name}" for name in ADAPTER_FILES)]
        try:
            folder = Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns))
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} is neither a folder here nor a repository of the hub that can be fetched ({one_line(error)}); "
                "expected what a run leaves in run.dir/adapter"
            ) from None
    if not (folder / TENSORS).is_file() and (folder / "adapter" / TENSORS).is_file():  # a run's folder
        folder = folder / "adapter"
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} is no adapter folder: it has no config.yaml; expected what a run leaves in run.dir/adapter"
        )
    return folder


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, those of its LoRAs among them.

    Raises: ValueError when the folder or file is missing, damaged, or of another format version.
    """
    path = folder / TENSORS
    if not path.is_file():
        raise ValueError(
            f"{folder} is no adapter folder: it has no {TENSORS}; expected what a run leaves in run.dir/adapter"
        )
    tensors, files = _load_tensors(path), _lora_files(folder)
    for name in changed_files(folder, (TENSORS, CONFIG, *files)):
        if name.endswith(".safetensors"):
            raise ValueError(
                f"{folder / name} is damaged: it is not what was written; copy it anew from where it was trained"
            )
        logger.warning("%s was changed since it was written: it is read as it is now", folder / name)
    for name in (file.split("/")[0] for file in files if file.endswith(PEFT_TENSORS)):
        tensors |= {f"{name}.{key}": tensor for key, tensor in read_lora(folder / name).items()}
    return tensors


def _lora_files(folder: Path) -> list[str]:
    """What says something in the PEFT folders within an adapter folder."""
    return sorted(p.relative_to(folder).as_posix() for n in (PEFT_CONFIG, PEFT_TENSORS) for p in folder.glob(f"*/{n}"))


def load_strictly(adapter: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load tensors into the adapter; every name and shape must fit.

    Raises: ValueError naming what is missing, unknown or of another shape.
    """
    shapes = {name: value.shape for name, value in adapter.state_dict().items()}
    missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    differing = [
        f"{name} is {list(tensors[name].shape)}, the config wants {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if missing or unknown or differing:
        problems = [f"missing {', '.join(_modules(missing))}"] if missing else []
        problems += [f"unknown {', '.join(_modules(unknown))}"] if unknown else []
        problems += differing[:3]
        raise ValueError(f"{source} does not fit this config: {'; '.join(problems)}")
    adapter.load_state_dict(tensors)


def transfer(adapter: nn.Module, tensors: dict[str, Tensor], source: str) -> Transfer:
    """Start the adapter from another stage's tensors: equal names are loaded, the rest is reported.

    Raises: ValueError when a tensor of the same name has another shape, or nothing fits at all.
    """
    state = adapter.state_dict()
    shared = [name for name in state if name in tensors]
    wrong = [name for name in shared if state[name].shape != tensors[name].shape]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{source} does not fit this config: {name} is {list(tensors[name].shape)}, the config wants "
            f"{list(state[name].shape)} ({len(wrong)} such); use the encoder.* and qformer.* that it was trained with"
        )
    if not shared:
        raise ValueError(f"{source} has no tensor in common with this model")
    adapter.load_state_dict({**state, **{name: tensors[name] for name in shared}})
    return Transfer(shared, [n for n in state if n not in tensors], [n for n in tensors if n not in state])


def save_checkpoint(
    run_dir: Path, step: int, adapter: nn.Module, optimizer: torch.optim.Optimizer, *, state: dict[str, Any],
    config: str, keep: int,
) -> Path:  # fmt: skip
    """Write `checkpoints/step-N` and delete all but the newest `keep`. `state` is JSON."""
    folder = run_dir / "checkpoints" / f"step-{step}"
    names: dict[Any, str] = {parameter: name for name, parameter in adapter.named_parameters()}
    moments = {
        f"{kind}/{names[parameter]}": value.detach().cpu().contiguous()
        for parameter, values in optimizer.state.items()
        for kind, value in values.items()
    }
    with atomic_folder(folder) as scratch:
        _save_tensors(scratch / TENSORS, trainable_tensors(adapter))
        _save_tensors(scratch / OPTIMIZER, moments)
        (scratch / STATE).write_text(json.dumps({"format_version": FORMAT_VERSION, "step": step, **state}))
        (scratch / CONFIG).write_text(config)
        write_checksums(scratch, CHECKPOINT)
    for old in list_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return folder


def load_checkpoint(folder: Path, adapter: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint back into adapter and optimizer and return its state.

    Raises: ValueError when it is damaged, of another version, or of another model.
    """
    if not (folder / STATE).is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no {STATE}; expected a folder run.dir/checkpoints/step-N")
    tensors, moments, state = _load_tensors(folder / TENSORS), _load_tensors(folder / OPTIMIZER), _load_state(folder)
    if corruption := find_corruption(folder):
        raise ValueError(f"{corruption}; resume from another checkpoint")
    load_strictly(adapter, tensors, str(folder))
    fused = bool(optimizer.defaults.get("fused"))  # the fused kernel counts its steps on the device
    for name, parameter in adapter.named_parameters():
        if not parameter.requires_grad:  # in no group of the optimizer, which may hold no state of it
            continue
        optimizer.state[parameter] = {
            kind: moments[f"{kind}/{name}"].to(parameter.device if fused or kind != "step" else "cpu")
            for kind in ("step", "exp_avg", "exp_avg_sq")
            if f"{kind}/{name}" in moments
        }
    return state


def find_corruption(folder: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, None if nothing is."""
    if not (folder / STATE).is_file():
        return f"{folder} is no checkpoint: it has no {STATE}; expected a folder run.dir/checkpoints/step-N"
    changed = changed_files(folder, CHECKPOINT)
    return f"{folder / changed[0]} is damaged: it is not what was written" if changed else None


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [p for p in (run_dir / "checkpoints").glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(folders, key=lambda p: int(p.name.removeprefix("step-")))


# What decides which features and which words an adapter was trained on.
IDENTITY = {
    "encoder": ("loader", "id", "pretrained", "revision", "block", "image_size", "random_weights"),
    "llm": ("id", "revision", "random_weights", "activation"),
}


def require_same_parts(config: ModelPart, folder: Path, sections: Iterable[str], *, start: bool = False) -> None:
    """Raise ValueError, naming both, when the adapter or checkpoint was trained with other frozen parts than the config's.

    Args:
        start: a new run starts from it, and an encoder that learns may do so at another image size, as BLIP-2's does.
    """
    trained = read_values(folder)
    for section in sections:
        if section not in trained:
            raise ValueError(
                f"{folder} is of another stage than this config: {trained['stage']}, this is {config.stage}"
            )
        part = config.frozen()[section]
        trained_part = read_section(folder, section, type(part))
        free = ("image_size",) if start and config.tune.encoder != "no" else ()
        for key in (key for key in IDENTITY[section] if key not in free):
            ours, theirs = getattr(part, key), getattr(trained_part, key)
            if ours != theirs:
                raise ValueError(
                    f"wrong adapter for this config: {folder} was trained with {section}.{key}={theirs}, "
                    f"this config has {section}.{key}={ours}"
                )


# What may differ between a run and its resumption without a word: none of it enters the trained tensors.
HARMLESS = (
    "run.", "data.workers", "data.validation", "data.max_dropped_fraction", "train.resume", "train.cpu",
    "train.checkpoint_", "train.keep_", "train.log_", "train.validat", "train.stop_", "train.gradient_checkpointing",
)  # fmt: skip


def changed_keys(config: ModelPart, folder: Path) -> list[str]:
    """What this config has otherwise than the one a checkpoint was trained with, a line each."""
    trained = read_values(folder)
    return [
        f"{section}.{key}={value}, was {trained[section][key]}"
        for section, keys in dataclasses.asdict(config).items()
        if isinstance(keys, dict)
        for key, value in keys.items()
        if not f"{section}.{key}".startswith(HARMLESS) and value != trained.get(section, {}).get(key, value)
    ]


def run_bytes(adapter: nn.Module, keep: int) -> int:
    """What the run's checkpoints and adapter take on disk at most."""
    adapter_bytes = sum(p.numel() * p.element_size() for p in adapter.parameters())
    return adapter_bytes * (3 * (keep + 1) + 1)  # weights and two moments each, one more while writing, the adapter


def require_disk_space(run_dir: Path, adapter: nn.Module, keep: int) -> None:
    """Raise ValueError now, not after hours, when the disk cannot hold the run's checkpoints and adapter."""
    needed = run_bytes(adapter, keep)
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise ValueError(
            f"run.dir={run_dir} needs {needed / 1e9:.2f} GB for {keep} checkpoints and the adapter, "
            f"but its disk has {free / 1e9:.2f} GB free; "
            "free some, lower train.keep_checkpoints or choose another run.dir"
        )


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "qformer", "format_version": FORMAT_VERSION})
    except SafetensorError as error:  # how safetensors says that the disk is full
        raise OSError(f"{path.name}: {error}") from None


def _load_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE).read_text())
        version = state["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / STATE} is damaged ({error}); resume from another checkpoint") from None
    _require_version(folder / STATE, version)
    return state


def _require_version(path: Path, version: str | None) -> None:
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, this qformer reads {FORMAT_VERSION}; use the one that wrote it"
        )


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}); it is damaged or incomplete") from None
    _require_version(path, metadata.get("format_version"))
    return load_file(path)


def _modules(names: list[str]) -> list[str]:
    """The modules that the tensors belong to, each once; layers of a kind stand together as *."""
    return list(
        dict.fromkeys(
            re.sub(r"\.\d+\.(\w+).*", r".*.\1", name.removesuffix(".weight").removesuffix(".bias")) for name in names
        )
    )
