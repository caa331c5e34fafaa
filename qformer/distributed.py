"""Collectives that are also right without a process group: every function works alone as a world of one rank."""

import torch
import torch.distributed as dist
from torch import Tensor


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


def gather_padded(rows: Tensor, dim: int, value: float | bool = 0) -> Tensor:
    """`gather` of rows whose size along `dim` differs between ranks: padded with `value` to the largest."""
    if world_size() == 1:
        return rows
    longest = torch.tensor(rows.shape[dim], device=rows.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    shape = list(rows.shape)
    shape[dim] = int(longest) - rows.shape[dim]
    return gather(torch.cat([rows, rows.new_full(shape, value)], dim))


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
