"""Collectives that are also right without a process group: every function works alone as a world of one rank."""

import os
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """Number of ranks W; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


class _GatherWithGradient(torch.autograd.Function):
    """all_gather whose backward sums the gradient of every rank's copy and returns this rank's rows."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:  # type: ignore[override]
        return _all_gather(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def _all_gather(rows: Tensor) -> Tensor:
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def gather(rows: Tensor, gradient: bool = False) -> Tensor:
    """Rows of all ranks in rank order: [B, ...] -> [W*B, ...]. Every rank must hold the same shape.

    With `gradient`, a rank's rows receive the summed gradient of all ranks' losses, so that after gradients are averaged
    W ranks of B have the gradient of one rank of W*B.
    """
    if world_size() == 1:
        return rows
    return _GatherWithGradient.apply(rows) if gradient else _all_gather(rows.detach())


def pad_to_longest(rows: Tensor, dim: int) -> Tensor:
    """Rows padded with zeros (False) along `dim` to the largest size that it has on any rank."""
    if world_size() == 1:
        return rows
    longest = torch.tensor(rows.shape[dim], device=rows.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    shape = list(rows.shape)
    shape[dim] = int(longest) - rows.shape[dim]
    return torch.cat([rows, rows.new_zeros(shape)], dim)


def fetch(rows: Tensor, index: Tensor) -> Tensor:
    """The rows of all ranks at `index` int64[K], counted as `gather` would lay them out, without gradient.

    Only the rows asked for are moved: K of them to each rank, however many ranks there are. Every rank must hold rows of
    the same shape and ask for as many.
    """
    if world_size() == 1:
        return rows.detach()[index]
    held = len(rows)
    wanted = gather(index).view(world_size(), -1).cpu()  # [W, K]: what each rank asks for
    is_mine = wanted // held == rank()
    sent = rows.detach()[(wanted[is_mine] % held).to(rows.device)]  # by asking rank, then in the order it asked
    source = wanted[rank()] // held
    order = source.argsort(stable=True)
    received = torch.empty(len(index), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    counts = torch.bincount(source, minlength=world_size())
    dist.all_to_all_single(received, sent.contiguous(), counts.tolist(), is_mine.sum(1).tolist())
    return received[order.argsort().to(rows.device)]


class _Exchange(torch.autograd.Function):
    """Block r of rank s becomes block s of rank r; its own inverse, so the backward is the same exchange."""

    @staticmethod
    def forward(ctx, blocks: Tensor) -> Tensor:  # type: ignore[override]
        received = torch.empty_like(blocks)
        dist.all_to_all_single(received, blocks)
        return received

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _Exchange.apply(gradient.contiguous())


def transpose_over_ranks(scores: Tensor) -> Tensor:
    """Scores of own rows against all ranks' columns -> of own columns against all ranks' rows: [B, W*B], with gradient.

    Together the ranks hold a square matrix by rows; what comes back is the same matrix by columns.
    """
    if world_size() == 1:
        return scores.T
    blocks = scores.unflatten(1, (world_size(), -1)).transpose(0, 1).contiguous()  # [W, B rows, B columns]
    return _Exchange.apply(blocks).permute(2, 0, 1).flatten(1)


def sum_over_ranks(value: Tensor) -> Tensor:
    """Elementwise sum of `value` over ranks, without gradient."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def any_rank(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether the flag is set on any rank."""
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def gather_objects(value: object) -> list:
    """One picklable Python object of every rank, in rank order; for results, never for tensors of a training step."""
    if world_size() == 1:
        return [value]
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, value)
    return parts


def lost_rank(error: RuntimeError) -> str | None:
    """One line where a collective failed since another rank died or kept this one waiting too long; else None."""
    said = str(error).splitlines()[0] if str(error) else ""
    if world_size() == 1 or not (isinstance(error, dist.DistError) or "gloo" in said):
        return None
    return (
        f"rank {rank()} of {world_size()} lost another rank, which died or did not answer within train.timeout_s "
        f"({said[:200]}); the first rank to fail names the reason. Go on with train.resume=auto"
    )


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
        found = os.environ.setdefault(f"FSDP_{key}", wanted)
        if found.lower() != wanted:
            raise ValueError(
                f"fsdp_{key.lower()}: {found} of the accelerate config is not supported; set it to {wanted}, as in "
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


def leave_group() -> None:
    """End the process group, where there still is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
