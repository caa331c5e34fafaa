"""W ranks of B have the loss and the gradient of one rank of W*B: real gloo processes against this one."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import shake
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from qformer.distributed import (
    fetch,
    gather,
    gather_objects,
    pad_to_longest,
    rank,
    sum_over_ranks,
    transpose_over_ranks,
    world_size,
)
from qformer.encoders import Features
from qformer.models import Output, Stage1Adapter, TextTokens
from qformer.qformer import QFormer

RECORDS, N, ENCODER_WIDTH, VOCABULARY = 8, 6, 24, 40
PICTURES = torch.tensor([0, 1, 2, 1, 4, 5, 0, 7])  # two pairs of the same picture, on different ranks
CAPTION_TOKENS = [9, 4, 3, 3, 5, 7, 2, 8]  # the longest caption of a rank differs between ranks
FEATURE_LENGTHS = [6, 2, 3, 3, 4, 2, 1, 5]


def build_adapter() -> Stage1Adapter:
    torch.manual_seed(0)
    qformer = QFormer(
        width=32, layers=3, heads=2, ffn_width=48, queries=4, encoder_width=ENCODER_WIDTH, dropout=0.0,
        vocab_size=VOCABULARY, max_text_positions=12,
    )  # fmt: skip
    adapter = Stage1Adapter(qformer, encoder_width=ENCODER_WIDTH, contrastive_width=16, dec_id=VOCABULARY - 1)
    shake(adapter, by=0.1)
    return adapter


def draw_records(masked: bool) -> dict[str, Any]:
    torch.manual_seed(3)
    mask = torch.arange(N) < torch.tensor(FEATURE_LENGTHS)[:, None]
    text_mask = torch.arange(max(CAPTION_TOKENS)) < torch.tensor(CAPTION_TOKENS)[:, None]
    return {
        "features": torch.randn(RECORDS, N, ENCODER_WIDTH) * (mask[..., None] if masked else 1),
        "mask": mask if masked else None,
        "ids": torch.randint(1, VOCABULARY - 1, text_mask.shape) * text_mask,
        "text_mask": text_mask,
    }


def losses_and_gradient(masked: bool, ranks: int, wrap) -> dict[str, Tensor]:
    """Forward and backward of this rank's share, padded to its own longest only, as `collate` does."""
    adapter, records = build_adapter(), draw_records(masked)
    mine = slice(rank() * RECORDS // ranks, (rank() + 1) * RECORDS // ranks)
    longest, widest = records["text_mask"][mine].sum(1).max(), N
    if masked:
        widest = records["mask"][mine].sum(1).max()
    text = TextTokens(records["ids"][mine, :longest], records["text_mask"][mine, :longest])
    image_mask = records["mask"][mine, :widest] if masked else None
    targets_per_rank = sum_over_ranks(text.mask[:, 1:].sum()).float() / ranks
    wrapped = wrap(adapter)  # must outlive the backward pass: it averages the gradient
    output: Output = wrapped(
        Features(records["features"][mine, :widest], image_mask), text, keys=PICTURES[mine, None],
        targets_per_rank=targets_per_rank, seed=17,
    )  # fmt: skip
    output.loss.backward()
    means = {name: sum_over_ranks(value) / ranks for name, value in output.metrics.items()}
    return means | {f"gradient {name}": p.grad for name, p in adapter.named_parameters()}


def check_collectives(ranks: int) -> None:
    me = rank()
    assert world_size() == ranks
    own = torch.tensor([[me, 1.0], [me, 2.0]], requires_grad=True)
    together = gather(own, gradient=True)
    assert together[:, 0].tolist() == [r for r in range(ranks) for _ in range(2)]
    weight = torch.arange(2.0 * ranks)[:, None] * (me + 1)  # every rank looks at every row, each in its own way
    (together * weight).sum().backward()
    factor = ranks * (ranks + 1) / 2
    assert own.grad[:, 0].tolist() == [2 * me * factor, (2 * me + 1) * factor]
    assert not gather(own).requires_grad
    ragged = pad_to_longest(torch.full((1, me + 1), 7.0), 1)
    assert ragged.tolist() == [[7.0] * (me + 1) + [0.0] * (ranks - 1 - me)]
    flags = pad_to_longest(torch.ones(1, me + 1, dtype=torch.bool), 1)
    assert (flags.dtype, flags.shape[1], int(flags.sum())) == (torch.bool, ranks, me + 1)
    check_fetch(ranks)
    check_transpose(ranks)
    assert sum_over_ranks(torch.tensor([1.0, me])).tolist() == [ranks, ranks * (ranks - 1) / 2]
    assert gather_objects(f"r{me}") == [f"r{r}" for r in range(ranks)]


def check_fetch(ranks: int) -> None:
    """Any rows of any rank, in the order asked for, some twice, from some ranks none."""
    held = 3
    everything = torch.arange(ranks * held * 4.0).view(ranks * held, 2, 2)
    own = everything[rank() * held : (rank() + 1) * held].clone().requires_grad_()
    for draw in range(4):
        generator = torch.Generator().manual_seed(10 * draw + rank())
        index = torch.randint(0 if draw % 2 else held, ranks * held, (5,), generator=generator)
        found = fetch(own, index)
        assert found.equal(everything[index])
        assert not found.requires_grad
        assert fetch(everything[rank() * held :][:held].to(torch.bfloat16), index).equal(found.to(torch.bfloat16))


def check_transpose(ranks: int) -> None:
    whole = torch.arange(float((2 * ranks) ** 2)).view(2 * ranks, -1)  # two rows and two columns a rank
    mine = slice(2 * rank(), 2 * rank() + 2)
    rows = whole[mine].clone().requires_grad_()
    columns = transpose_over_ranks(rows)
    assert columns.equal(whole.T[mine])
    weight = torch.arange(1.0, whole.numel() + 1).view_as(whole)
    (columns * weight[mine]).sum().backward()
    assert rows.grad.equal(weight.T[mine])


def work(me: int, ranks: int, folder: str) -> None:
    """What each process does; its results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=me, world_size=ranks)
    check_collectives(ranks)
    found = {str(masked): losses_and_gradient(masked, ranks, DistributedDataParallel) for masked in (False, True)}
    torch.save(found, Path(folder) / f"{me}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_of_b_are_one_rank_of_all(ranks, tmp_path):
    context = multiprocessing.get_context("forkserver")  # imports torch once for all of them
    context.set_forkserver_preload(["torch", "qformer.models"])
    processes = [context.Process(target=work, args=(me, ranks, str(tmp_path))) for me in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive, "the ranks wait for each other"
    assert [process.exitcode for process in processes] == [0] * ranks

    for masked in (False, True):
        expected = losses_and_gradient(masked, 1, lambda adapter: adapter)
        for me in range(ranks):
            found = torch.load(tmp_path / f"{me}.pt", weights_only=True)[str(masked)]
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                scale = max(1.0, value.abs().max().item())
                assert (found[name] - value).abs().max() / scale < 2e-5, (masked, name, found[name], value)
        assert expected["gradient temperature"].abs() > 1e-3
        assert expected["itm_accuracy"] > 0


def test_everything_is_right_alone():
    """Without a process group a world of one rank, and nothing is copied or detached needlessly."""
    rows = torch.ones(2, 3, requires_grad=True)
    assert (rank(), world_size()) == (0, 1)
    assert gather(rows, gradient=True) is rows
    assert pad_to_longest(rows, 1) is rows
    assert fetch(rows, torch.tensor([1, 0, 1])).shape == (3, 3)
    assert transpose_over_ranks(rows).equal(rows.T)
    assert sum_over_ranks(rows).equal(torch.ones(2, 3))
    assert not sum_over_ranks(rows).requires_grad
    assert gather_objects("a") == ["a"]
