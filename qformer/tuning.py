"""What learns beside the Q-Former (`tune.*`), and which activations are computed again instead of kept.

What learns is shared with the adapter, so that DistributedDataParallel wraps it, the optimizer steps it and checkpoints
hold it; the models that it belongs to go on being used as they are.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qformer.card import stage_name
from qformer.config import ModelPart, RunPart
from qformer.encoders import FrozenEncoder
from qformer.lora import Lora, Shared, add_lora
from qformer.models import Stage
from qformer.sharding import block_stacks, shards_frozen

logger = logging.getLogger(__name__)

ENCODER, ENCODER_LORA, LLM_LORA = "encoder", "encoder_lora", "llm_lora"  # names in the adapter
EXTRA_TRAINABLE = {ENCODER: "tune.encoder=full", ENCODER_LORA: "tune.encoder=lora", LLM_LORA: "tune.llm=lora"}
PARTS = ("qformer", "encoder", "llm")


def require_tunable(config: ModelPart) -> None:
    """Refuse, before any weight is loaded, what cannot learn or be computed again.

    Raises: ValueError, one line for all that is wrong.
    """
    tune, has_llm = config.tune, "llm" in config.frozen()
    run = config if isinstance(config, RunPart) else RunPart()
    learns_encoder, no_llm = (
        tune.encoder != "no",
        f"{stage_name(config)} has no language model; remove it",
    )
    problems = [
        (tune.llm != "no" and not has_llm, f"tune.llm={tune.llm}: {no_llm}"),
        (learns_encoder and config.encoder.loader == "features",
         f"tune.encoder={tune.encoder}: encoder.loader=features has no weights to train; set it to no"),
        (learns_encoder and run.data.features is not None,
         f"tune.encoder={tune.encoder} with data.features: a cache holds what the encoder said before it learnt; set "
         "data.features=null"),
        (tune.encoder == "full" and config.encoder.dtype != "float32",
         f"tune.encoder=full with encoder.dtype={config.encoder.dtype}: what learns is kept in float32; set "
         "encoder.dtype=float32 and, for speed, train.mixed_precision=bf16"),
        ((learns_encoder or tune.llm != "no") and shards_frozen(),
         "tune.*: frozen models that learn cannot be sharded by FSDP2; launch with configs/accelerate/multi_gpu.yaml, or "
         "set tune.encoder=no and tune.llm=no"),
    ]  # fmt: skip
    for part in run.train.gradient_checkpointing:
        key = f"train.gradient_checkpointing: {part}"
        problems += [
            (part not in PARTS, f"{key!r} is not one of {', '.join(PARTS)}"),
            (part == "llm" and not has_llm, f"{key}: {no_llm}"),
            (part == "encoder" and not learns_encoder, f"{key}: a frozen encoder keeps no activations; remove it"),
        ]
    if wrong := [text for is_wrong, text in problems if is_wrong]:
        raise ValueError("; ".join(wrong))


def add_trainable(model: Stage, config: ModelPart) -> None:
    """Make learn what `tune.*` names, and compute again what `train.gradient_checkpointing` names.

    Raises: ValueError when LoRA's targets do not fit.
    """
    tune = config.tune
    lora: dict[str, Any] = {"rank": tune.lora_rank, "alpha": tune.lora_alpha, "targets": tune.lora_targets}
    learning: dict[str, Shared] = {}
    if tune.encoder != "no":
        encoder = model.encoder
        assert encoder.tower is not None
        if tune.encoder == "lora":
            learning[ENCODER_LORA] = add_lora(encoder.tower, _blocks(encoder), name=config.encoder.id, **lora)
        else:
            learning[ENCODER] = _unfreeze(encoder)
        encoder.learns = tune.encoder
    if tune.llm == "lora":
        llm = model.frozen()["llm"]
        learning[LLM_LORA] = add_lora(llm, _blocks(llm), name=config.frozen()["llm"].id, **lora)
    for name, shared in learning.items():
        model.adapter.add_module(name, shared)
        logger.info("%s: %.3g M parameters learn as well", name, sum(p.numel() for p in shared.parameters()) / 1e6)
    if isinstance(config, RunPart):
        checkpoint_activations(model, config.train.gradient_checkpointing)


def encoder_lr_scales(model: Stage, decay: float) -> dict[str, float]:
    """Factors on the learning rate of the encoder's parameters, by their names in the adapter: less the deeper they lie.

    The last block has `decay`, the one before it `decay` squared; what comes before the first block lies a block deeper,
    what comes behind the last one has 1. Empty where the encoder does not learn as a whole, or `decay` is 1.

    Source: LAVIS, Blip2Base.get_optimizer_params (after BEiT, arXiv 2106.08254).
    """
    if decay == 1 or ENCODER not in dict(model.adapter.named_children()):
        return {}
    learning = dict(model.adapter.get_submodule(ENCODER).named_parameters())
    depths = {id(p): depth for depth, block in enumerate(_blocks(model.encoder), 1) for p in block.parameters()}
    last = max(depths[id(p)] for p in learning.values() if id(p) in depths)
    scales, reached = {}, False  # the parameters of a tower stand in the order in which they are used
    for name, parameter in learning.items():
        reached |= id(parameter) in depths
        depth = depths.get(id(parameter), last + 1 if reached else 0)
        scales[f"{ENCODER}.{name}"] = decay ** (last + 1 - depth)
    return scales


def parts_beside(adapter: nn.Module) -> dict[str, Tensor]:
    """The tensors of an adapter that are not the Q-Former's and its projections'."""
    return {name: tensor for name, tensor in adapter.state_dict().items() if _part(name) in EXTRA_TRAINABLE}


def require_learnt_parts(adapter: nn.Module, tensors: dict[str, Tensor], source: str) -> set[str]:
    """The parts beside the Q-Former that an adapter to begin from has trained.

    Raises: ValueError when this one has no place for one of them: without it the rest would mean something else.
    """
    learnt = {_part(name) for name in tensors} & set(EXTRA_TRAINABLE)
    for name in sorted(learnt - dict(adapter.named_children()).keys()):
        raise ValueError(
            f"{source} was trained with {EXTRA_TRAINABLE[name]}, without which it is another model; set that here too"
        )
    return learnt


def _part(name: str) -> str:
    return name.partition(".")[0]


def merge_into_frozen(model: Stage) -> None:
    """Leave what has learnt beside the Q-Former in the models themselves, and only the Q-Former's in the adapter."""
    for name in EXTRA_TRAINABLE:
        if name in dict(model.adapter.named_children()):
            shared = model.adapter.get_submodule(name)
            if isinstance(shared, Lora):
                shared.merge()
            delattr(model.adapter, name)


def checkpoint_activations(model: Stage, parts: list[str]) -> None:
    """Keep only what enters each block of these parts, and compute the block again in the backward pass."""
    modules = {"qformer": model.adapter.get_submodule("qformer"), **model.frozen()}
    for part in parts:
        for block in _blocks(modules[part]):
            # The Q-Former alone draws random numbers, in dropout; the same have to be drawn again.
            block.forward = _checkpointed(block.forward, draws=part == "qformer")  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., Any], draws: bool) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs)

    return run


def _blocks(module: nn.Module) -> list[nn.Module]:
    return [block for _, blocks in block_stacks(module) for block in blocks]


def _unfreeze(encoder: FrozenEncoder) -> Shared:
    """All parameters that the tapped block's output depends on; a pooler or a last norm stays frozen."""
    tower, transform = encoder.tower, encoder.input_transform
    assert tower is not None
    assert transform is not None
    tower.requires_grad_(True)
    encoder.learns = "full"
    device = next(tower.parameters()).device
    with torch.enable_grad():
        encoder(torch.zeros(1, 3, transform.size, transform.size, device=device)).tokens.sum().backward()
    reached = {name: p for name, p in tower.named_parameters() if p.grad is not None}
    for name, parameter in tower.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(name in reached)
    return Shared(reached)
