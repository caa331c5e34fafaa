"""LoRA by peft, put into a model in place: the model is used as before, and what learns lies in a folder of PEFT's."""

import difflib
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

PEFT_TENSORS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Shared(nn.Module):
    """Parameters of another module under their names there, to be wrapped, optimised and saved with something else."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for step in path:
                if step not in dict(module.named_children()):
                    module.add_module(step, nn.Module())
                module = module.get_submodule(step)
            module.register_parameter(leaf, parameter)


class Lora(Shared):
    """The matrices of a LoRA, shared with the model that they were put into, under the names of PEFT's files."""

    def __init__(self, peft_model: Any) -> None:
        matrices = {n: p for n, p in peft_model.named_parameters() if ".lora_" in n}
        super().__init__({name.replace(".default.", "."): p for name, p in matrices.items()})
        self._peft_model = (peft_model,)  # in a tuple, so that the whole model is no child of this one

    def save_pretrained(self, folder: Path) -> None:
        """Write PEFT's folder; `PeftModel.from_pretrained(the bare model, folder)` reads it."""
        (model,) = self._peft_model
        model.save_pretrained(str(folder), save_embedding_layers=False)

    def merge(self) -> None:
        """Add the matrices to the weights they stand beside; the model is then as plain as it was."""
        (model,) = self._peft_model
        model.merge_and_unload(safe_merge=True)


def add_lora(
    model: nn.Module, blocks: list[nn.Module], *, name: str, rank: int, alpha: int, targets: list[str]
) -> Lora:
    """Put a LoRA beside linear layers of a frozen model, in place; its matrices learn in float32.

    Without dropout, since frozen models are always in eval mode, and drawn from torch's generator.

    Args:
        model: itself, not what holds it, so that the folder fits the model wherever else it is used.
        blocks: where linear layers are looked for: neither embeddings nor a head, whatever peft's "all-linear" would take.
        name: hub id or folder of the model, for PEFT's config and messages.
        rank: of each product; it is scaled by alpha / rank.
        targets: linear layers, by the ends of their names ("q_proj"); empty = all of the blocks.

    Raises: ValueError when a target is no linear layer of the blocks.
    """
    from peft import LoraConfig, get_peft_model

    linear = _linear_layers(model, blocks)
    for target in targets:
        if not any(_ends_with(layer, target) for layer in linear):
            kinds = sorted({".".join(layer.split(".")[-2:]) for layer in linear} | {n.split(".")[-1] for n in linear})
            near = difflib.get_close_matches(target, kinds, n=3, cutoff=0.0)
            raise ValueError(
                f"tune.lora_targets: {target!r} ends the name of no linear layer in the blocks of {name}; "
                f"nearest: {', '.join(near) or 'none, it has no linear layer that LoRA can stand beside'}"
            )
    chosen = [layer for layer in linear if not targets or any(_ends_with(layer, t) for t in targets)]
    if not chosen:
        raise ValueError(f"{name} has no linear layer in its blocks that LoRA can stand beside; set tune.* to no")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen, lora_dropout=0.0, bias="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what peft asks transformers
        peft_model: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    peft_model.peft_config["default"].base_model_name_or_path = name
    peft_model.eval()
    return Lora(peft_model)


def _linear_layers(model: nn.Module, blocks: list[nn.Module]) -> list[str]:
    """Names of the linear layers in the blocks, but for those in attention that reads their weights behind their backs."""
    from transformers.pytorch_utils import Conv1D

    inside = {id(module) for block in blocks for module in block.modules()}
    hidden = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) in inside and id(module) not in hidden
    ]


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def read_lora(folder: Path) -> dict[str, Tensor]:
    """The matrices of a PEFT folder, under the names they have in `Lora`."""
    from safetensors.torch import load_file

    return load_file(folder / PEFT_TENSORS)
