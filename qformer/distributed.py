"""Collectives that are also right without a process group: every function works alone as a world of one rank."""

import os

import torch
import torch.distributed as dist
from torch import Tensor

from qformer.messages import one_line


def world_size() -> int:
    """Number of ranks W; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device_of_rank() -> str | None:
    """The accelerator of this process among those that a launcher started on this machine; None = there is no such."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    number = os.environ.get("LOCAL_RANK")
    return None if accelerator is None or number is None else f"{accelerator.type}:{number}"


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


def gather_objects(value: object) -> list:
    """One picklable Python object of every rank, in rank order; for results, never for tensors of a training step."""
    if world_size() == 1:
        return [value]
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, value)
    return parts


def lost_rank(error: RuntimeError) -> str | None:
    """One line where a collective failed since another rank died or kept this one waiting too long; else None."""
    message = one_line(error)
    if world_size() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return None
    return (
        f"rank {rank()} of {world_size()} lost another rank, which died or did not answer within train.timeout_s "
        f"({message}); the first rank to fail names the reason. Go on with train.resume=auto"
    )


def leave_group() -> None:
    """End the process group, where there still is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
