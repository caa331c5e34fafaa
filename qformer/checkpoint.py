"""What is kept of a run: trainable tensors only, in safetensors, versioned, written whole or not at all.

An adapter folder holds `adapter.safetensors`, `config.yaml` and `README.md`; a checkpoint folder also the optimizer's
moments and `state.json`. There is no random state to keep: dropout, negatives, order and augmentation are functions of
(seed, step, position), so a run resumed at a step draws what the uninterrupted one draws.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qformer.config import Stage1Config, Stage2Config, read_config

FORMAT_VERSION = "1"
TENSORS, OPTIMIZER, STATE, CONFIG, CARD = (
    "adapter.safetensors",
    "optimizer.safetensors",
    "state.json",
    "config.yaml",
    "README.md",
)


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


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `folder` in one rename when the block ends, and vanishes if it fails."""
    scratch = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for path in (p for p in scratch.rglob("*") if p.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if folder.exists():  # a step saved again after a resume
            shutil.rmtree(folder)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def trainable_tensors(adapter: nn.Module) -> dict[str, Tensor]:
    """The adapter's state on the CPU, by name."""
    return {name: value.detach().cpu().contiguous() for name, value in adapter.state_dict().items()}


def save_adapter(folder: Path, adapter: nn.Module, config: str, card: str) -> None:
    """Write an adapter folder: tensors, resolved config, model card."""
    with written_whole(folder) as scratch:
        _save_tensors(scratch / TENSORS, trainable_tensors(adapter))
        (scratch / CONFIG).write_text(config)
        (scratch / CARD).write_text(card)


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder.

    Raises: ValueError when the folder or file is missing, damaged, or of another format version.
    """
    path = folder / TENSORS
    if not path.is_file():
        raise ValueError(
            f"{folder} is no adapter folder: it has no {TENSORS}; expected what a run leaves in run.dir/adapter"
        )
    return _load_tensors(path)


def load_strictly(adapter: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load tensors into the adapter; every name and shape must fit.

    Raises: ValueError naming what is missing, unknown or of another shape.
    """
    own = {name: value.shape for name, value in adapter.state_dict().items()}
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    differing = [
        f"{name} is {list(tensors[name].shape)}, the config wants {list(shape)}"
        for name, shape in own.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if missing or unknown or differing:
        found = [f"missing {', '.join(_modules(missing))}"] if missing else []
        found += [f"unknown {', '.join(_modules(unknown))}"] if unknown else []
        found += differing[:3]
        raise ValueError(f"{source} does not fit this config: {'; '.join(found)}")
    adapter.load_state_dict(tensors)


def transfer(adapter: nn.Module, tensors: dict[str, Tensor], source: str) -> Transfer:
    """Start the adapter from another stage's tensors: equal names are loaded, the rest is reported.

    Raises: ValueError when a tensor of the same name has another shape, or nothing fits at all.
    """
    own = adapter.state_dict()
    shared = [name for name in own if name in tensors]
    wrong = [name for name in shared if own[name].shape != tensors[name].shape]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{source} does not fit this config: {name} is {list(tensors[name].shape)}, the config wants "
            f"{list(own[name].shape)} ({len(wrong)} such); use the encoder.* and qformer.* that it was trained with"
        )
    if not shared:
        raise ValueError(f"{source} has no tensor in common with this model")
    adapter.load_state_dict({**own, **{name: tensors[name] for name in shared}})
    return Transfer(shared, [n for n in own if n not in tensors], [n for n in tensors if n not in own])


def save_checkpoint(
    run_dir: Path, step: int, adapter: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], config: str,
    keep: int,
) -> Path:  # fmt: skip
    """Write `checkpoints/step-N` and delete all but the newest `keep`. `state` is JSON."""
    folder = run_dir / "checkpoints" / f"step-{step}"
    names: dict[Any, str] = {parameter: name for name, parameter in adapter.named_parameters()}
    moments = {
        f"{kind}/{names[parameter]}": value.detach().cpu().contiguous()
        for parameter, values in optimizer.state.items()
        for kind, value in values.items()
    }
    with written_whole(folder) as scratch:
        _save_tensors(scratch / TENSORS, trainable_tensors(adapter))
        _save_tensors(scratch / OPTIMIZER, moments)
        (scratch / STATE).write_text(json.dumps({"format_version": FORMAT_VERSION, "step": step, **state}))
        (scratch / CONFIG).write_text(config)
    for old in list_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return folder


def load_checkpoint(folder: Path, adapter: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint back into adapter and optimizer and return its state.

    Raises: ValueError when it is damaged, of another version, or of another model.
    """
    if not (folder / STATE).is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no {STATE}; expected a folder run.dir/checkpoints/step-N")
    load_strictly(adapter, _load_tensors(folder / TENSORS), str(folder))
    moments = _load_tensors(folder / OPTIMIZER)
    fused = bool(optimizer.defaults.get("fused"))  # the fused kernel counts its steps on the device
    for name, parameter in adapter.named_parameters():
        optimizer.state[parameter] = {
            kind: moments[f"{kind}/{name}"].to(parameter.device if fused or kind != "step" else "cpu")
            for kind in ("step", "exp_avg", "exp_avg_sq")
            if f"{kind}/{name}" in moments
        }
    try:
        return json.loads((folder / STATE).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / STATE} is damaged ({error}); resume from another checkpoint") from None


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in (run_dir / "checkpoints").glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


# What decides which features and which words an adapter was trained on.
IDENTITY = {
    "encoder": ("loader", "id", "pretrained", "revision", "block", "image_size", "random_weights"),
    "llm": ("id", "revision", "random_weights", "activation"),
}


def require_same_parts(config: Stage1Config | Stage2Config, folder: Path, sections: tuple[str, ...]) -> None:
    """Raise ValueError, naming both, when the adapter or checkpoint was trained with other frozen parts than the config's."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no adapter or checkpoint folder: it has no {CONFIG}")
    trained = read_config(folder / CONFIG)
    for section in sections:
        if type(trained) is not type(config) and section == "llm":
            raise ValueError(f"{folder} is of another stage than this config")
        for key in IDENTITY[section]:
            ours, theirs = getattr(getattr(config, section), key), getattr(getattr(trained, section), key)
            if ours != theirs:
                raise ValueError(
                    f"wrong adapter for this config: {folder} was trained with {section}.{key}={theirs}, "
                    f"this config has {section}.{key}={ours}"
                )


def require_disk_space(run_dir: Path, adapter: nn.Module, keep: int) -> None:
    """Raise ValueError now, not after hours, when the disk cannot hold the run's checkpoints and adapter."""
    adapter_bytes = sum(p.numel() * p.element_size() for p in adapter.parameters())
    needed = adapter_bytes * (3 * (keep + 1) + 1)  # weights and two moments each, one more while writing, the adapter
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise ValueError(
            f"run.dir={run_dir} needs {needed / 1e9:.2f} GB for {keep} checkpoints and the adapter, "
            f"but its disk has {free / 1e9:.2f} GB free; "
            "free some, lower train.keep_checkpoints or choose another run.dir"
        )


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "qformer", "format_version": FORMAT_VERSION})


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}); it is damaged or incomplete") from None
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {metadata.get('format_version')}, this qformer reads {FORMAT_VERSION}"
        )
    return load_file(path)


def _modules(names: list[str]) -> list[str]:
    """The modules that the tensors belong to, each once; layers of a kind stand together as *."""
    return list(
        dict.fromkeys(
            re.sub(r"\.\d+\.(\w+).*", r".*.\1", name.removesuffix(".weight").removesuffix(".bias")) for name in names
        )
    )
