"""Counts what a rank receives from the others: every collective of torch.distributed, DDP's and FSDP's own included."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Bytes that this rank receives inside the block, by collective; a ring for `allreduce`, as NCCL's.

    What a rank has already is not counted: of a gather's result (W-1)/W, of an all-reduce twice that of its tensor.

        with Traffic() as traffic:
            step()
        traffic.received["allgather"], sum(traffic.received.values())
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if name.startswith("c10d::"):
            kind = name.removeprefix("c10d::").strip("_").removesuffix("_base")
            self.received[kind] += round(_received(kind, name, args))
        return function(*args, **(kwargs or {}))


def _received(kind: str, name: str, args: Any) -> float:
    share = (dist.get_world_size() - 1) / dist.get_world_size()
    if kind == "alltoall" and args[3]:  # rows from each rank
        own, rows = args[3][dist.get_rank()], len(args[0])
        return _size(args[0]) * (rows - own) / max(1, rows)
    if kind in ("alltoall", "allgather", "allgather_into_tensor_coalesced"):
        return _size(args[0]) * share
    if kind == "allreduce":
        return 2 * _size(args[0]) * share
    if kind == "reduce_scatter":
        return _size(args[1]) * share
    if kind == "broadcast":
        return _size(args[0]) * (dist.get_rank() > 0)
    if kind == "barrier":
        return 0
    raise NotImplementedError(f"{name}: say here how many bytes it moves")


def _size(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    assert isinstance(tensors, list | tuple), type(tensors)
    assert not isinstance(tensors, torch.Size)
    return sum(_size(t) for t in tensors)
