"""Frozen models larger than a device, split over all ranks block by block (FSDP2); the adapter stays whole."""

import os
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from qformer.distributed import world_size


def take_over_sharding() -> None:
    """Take what the launcher asks of Accelerate about sharding upon us, before an Accelerator is made.

    Accelerate would shard the adapter, which is small; here it stays whole on every rank and is trained as under DDP,
    and `shard_blocks` splits the frozen models, which Accelerate never sees.

    Raises: ValueError for FSDP1, parameters offloaded or loaded by one rank only, and DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(
            "distributed_type DEEPSPEED: its engine updates weights inside the backward pass, before the check that the "
            "gradient is finite; launch with configs/accelerate/multi_gpu.yaml, or fsdp2.yaml for frozen models larger "
            "than a device (docs/scaling.md)"
        )
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    for key, wanted in (("VERSION", "2"), ("OFFLOAD_PARAMS", "false"), ("CPU_RAM_EFFICIENT_LOADING", "false")):
        value = os.environ.setdefault(f"FSDP_{key}", wanted)
        if value.lower() != wanted:
            raise ValueError(
                f"fsdp_{key.lower()}: {value} of the accelerate config is not supported; set it to {wanted}, as in "
                "configs/accelerate/fsdp2.yaml"
            )


def shards_frozen() -> bool:
    """Whether the launcher asked for FSDP2 and there is more than one rank."""
    return "FSDP_VERSION" in os.environ and world_size() > 1


def shard_blocks(model: nn.Module, device: torch.device) -> None:
    """Split the weights of a frozen model's blocks over all ranks; each block is gathered where it is computed (FSDP2).

    What stands outside the blocks (embeddings, head, last norm) stays whole on every rank: it is read outside of the
    model's forward as well. All ranks have to run the model equally often.
    """
    from torch.distributed.device_mesh import init_device_mesh  # here, since they take long to import
    from torch.distributed.fsdp import fully_shard

    # Nothing changes a block's output in place, which is what this warns of at every step.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (world_size(),))
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    for stack, blocks in list(block_stacks(model)):
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        outside = set(stack.parameters()) - {p for block in blocks for p in block.parameters()}
        fully_shard(stack, mesh=mesh, ignored_params=outside)  # the root, which fetches the next block in advance
    # Transformers' own mark: no rank stops generating before the others have.
    model._is_fsdp_managed_module = True  # type: ignore[assignment]


def block_stacks(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """The modules that hold a list of equal blocks, outermost only, and the blocks."""
    for child in module.children():
        blocks = list(child.children())
        is_list = isinstance(child, nn.ModuleList) or (isinstance(child, nn.Sequential) and len(blocks) > 1)
        if is_list and len({type(block) for block in blocks}) == 1 and any(True for _ in child.parameters()):
            yield module, blocks
        else:
            yield from block_stacks(child)
