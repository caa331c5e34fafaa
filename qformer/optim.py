"""What one update does with a gradient: the learning rate of a step, which parameters decay, the optimizer."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

FUSED_DEVICES = {"cuda", "cpu", "xpu", "mps"}


def lr_at(step: int, *, peak_lr: float, min_lr: float, warmup_steps: int, warmup_lr: float, max_steps: int) -> float:
    """Learning rate of the update about to happen: linear warm-up, then half a cosine, counted in updates.

    | step | learning rate |
    |---|---|
    | 0 | `warmup_lr` (`peak_lr` without warm-up) |
    | `warmup_steps` / 2 | (`warmup_lr` + `peak_lr`) / 2 |
    | `warmup_steps` | `peak_lr` |
    | halfway from there to `max_steps` | (`peak_lr` + `min_lr`) / 2 |
    | `max_steps` and later | `min_lr` |

    A pure function, where LAVIS steps the cosine once per epoch: nothing to save, nothing to restore on resume.

    Args:
        step: updates already made, so 0 for the first.
        warmup_lr: where the warm-up starts; at 0 the first update changes nothing.

    Raises:
        ValueError: `max_steps` is below 1.
        ValueError: `warmup_steps` lies outside 0..`max_steps`.
        ValueError: a learning rate is negative, or `peak_lr` is not the largest.

    Source: BLIP-2 paper, section 4.1 (warm-up and cosine).
    """
    assert step >= 0, step
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps}: expected at least 1 update")
    if not 0 <= warmup_steps <= max_steps:
        raise ValueError(f"warmup_steps={warmup_steps}: expected 0..{max_steps} (max_steps); shorten the warm-up")
    for name, lr in (("min_lr", min_lr), ("warmup_lr", warmup_lr)):
        if not 0 <= lr <= peak_lr:
            raise ValueError(f"{name}={lr}: expected 0..{peak_lr} (the peak learning rate); lower it or raise the peak")
    if step < warmup_steps:
        return warmup_lr + (peak_lr - warmup_lr) * step / warmup_steps
    if step >= max_steps:
        return min_lr
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return min_lr + (peak_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(
    module: nn.Module, weight_decay: float, lr_scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Split the trainable parameters into a group that decays and one that does not, for each scale of learning rate.

    Biases, norms and the temperature are exactly the parameters with fewer than two dimensions; they do not decay.
    Each group has `name` ("decay" or "no_decay"), `params`, `param_names` in the same order, `weight_decay` and, unless it
    is 1, `lr_scale`; names and order go into the optimizer's state, so that a resume can be checked against them.

    Args:
        lr_scales: factors on the learning rate, by parameter; 1 for those that are not named.

    Raises:
        ValueError: nothing in `module` is trainable.
    """
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(f"{type(module).__name__} has no trainable parameter: unfreeze the part that should learn")
    matrices = [name for name, parameter in trainable.items() if parameter.ndim >= 2]
    vectors = [name for name, parameter in trainable.items() if parameter.ndim < 2]
    scales = lr_scales or {}
    groups: list[dict[str, Any]] = [
        {"name": name, "params": [trainable[n] for n in of_scale], "param_names": of_scale, "weight_decay": decay}
        | ({} if scale == 1 else {"lr_scale": scale})
        for scale in sorted({1.0, *scales.values()}, reverse=True)
        for name, names, decay in (("decay", matrices, weight_decay), ("no_decay", vectors, 0.0))
        if (of_scale := [n for n in names if scales.get(n, 1.0) == scale])
    ]
    grouped = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert grouped == sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return groups


def build_optimizer(
    module: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float, eps: float,
    lr_scales: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:  # fmt: skip
    """AdamW over `parameter_groups`, fused where every trainable parameter lies on a device that has the fused kernel.

    Raises:
        ValueError: nothing in `module` is trainable.
    """
    groups = parameter_groups(module, weight_decay, lr_scales)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=devices <= FUSED_DEVICES)
