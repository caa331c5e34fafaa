"""The losses against torch's own, the negatives against their distribution, and what each loss is at chance."""

import math

import pytest
import torch
import torch.nn.functional as F

from qformer.metrics.queries import effective_rank
from qformer.objectives import (
    ITM_CHANCE,
    diversity_loss,
    draw_hard_negatives,
    itc_loss,
    itg_loss,
    itm_loss,
    next_token_labels,
    similarity,
)
from qformer.text import IGNORE_INDEX


def same_pictures(*ids: int) -> torch.Tensor:
    picture = torch.tensor(ids)
    return picture[:, None] == picture[None, :]


# ---- ITC ----


def test_similarity_is_the_cosine_of_the_best_query():
    torch.manual_seed(0)
    images, texts = F.normalize(torch.randn(3, 4, 8), dim=-1), F.normalize(torch.randn(5, 8), dim=-1)
    for i in range(3):
        for j in range(5):
            best = max(float(query @ texts[j]) for query in images[i])
            assert similarity(images, texts)[i, j].item() == pytest.approx(best, abs=1e-6)
    assert similarity(images.bfloat16(), texts.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("candidates", [4, 12])
def test_itc_is_cross_entropy_where_all_pictures_differ(smoothing, candidates):
    torch.manual_seed(0)
    rows = slice(candidates - 4, candidates)  # as on the last rank of several
    similarities, same = torch.randn(4, candidates) * 3, torch.eye(candidates, dtype=torch.bool)[rows]
    expected = F.cross_entropy(similarities, torch.arange(candidates)[rows], label_smoothing=smoothing)
    torch.testing.assert_close(itc_loss(similarities, same, smoothing), expected)


def test_itc_shares_the_target_between_captions_of_the_same_picture():
    torch.manual_seed(0)
    similarities, same = torch.randn(3, 3), same_pictures(7, 8, 7)
    log_p = F.log_softmax(similarities, 1)
    rows = [-(log_p[0, 0] + log_p[0, 2]) / 2, -log_p[1, 1], -(log_p[2, 0] + log_p[2, 2]) / 2]
    torch.testing.assert_close(itc_loss(similarities, same, 0.0), torch.stack(rows).mean())
    # no pull apart: equal similarity to both captions of a picture is the optimum of their row
    pulled = torch.tensor([[5.0, -5.0, 5.0]], requires_grad=True)
    itc_loss(pulled, same[:1], 0.0).backward()
    assert pulled.grad.abs().max() < 1e-4


# ---- hard negatives ----


def test_negatives_are_never_of_the_same_picture():
    same = same_pictures(1, 2, 1, 3, 2, 1)
    similarities = torch.where(same, 100.0, -100.0)  # the same picture is by far the likeliest
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        drawn, has_any = draw_hard_negatives(similarities, same, torch.rand(6, 6, generator=generator))
        assert not same[torch.arange(6), drawn].any()
        assert has_any.all()


def test_negatives_follow_the_softmax():
    row = torch.tensor([0.0, 2.0, 1.0, -1.0, 0.5, 9.0])
    same = torch.tensor([False] * 5 + [True])
    draws = 20_000
    noise = torch.rand(draws, 6, generator=torch.Generator().manual_seed(0))
    drawn, _ = draw_hard_negatives(row.expand(draws, -1), same.expand(draws, -1), noise)
    observed = torch.bincount(drawn, minlength=6).float()
    expected = draws * torch.softmax(row[:5], 0)
    assert observed[5] == 0
    assert ((observed[:5] - expected) ** 2 / expected).sum() < 18.5  # chi-square, 4 degrees of freedom: p = 0.001


def test_negatives_are_a_function_of_the_noise_even_at_its_edges():
    same = same_pictures(1, 2, 3)
    for value in (0.0, 1 - 2**-24):
        drawn, _ = draw_hard_negatives(torch.zeros(3, 3), same, torch.full((3, 3), value))
        assert not same[torch.arange(3), drawn].any()
    similarities, noise = torch.randn(3, 3), torch.rand(3, 3)
    first, again = (draw_hard_negatives(similarities, same, noise)[0] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("ids", [(1,), (4, 4)], ids=["batch of one", "one picture"])
def test_no_negative_is_no_pair_and_no_infinity(ids):
    same = same_pictures(*ids)
    n = len(ids)
    drawn, has_any = draw_hard_negatives(torch.randn(n, n), same, torch.rand(n, n))
    assert not has_any.any()
    assert drawn.max() < n  # still an index
    logits = torch.randn(3 * n, 2, requires_grad=True)
    matched = torch.arange(3 * n) < n
    counted = torch.cat([torch.ones(n, dtype=torch.bool), has_any, has_any])
    loss = itm_loss(logits, matched, counted, counted.sum())
    torch.testing.assert_close(loss, F.cross_entropy(logits[:n], torch.ones(n, dtype=torch.long)))
    loss.backward()
    assert logits.grad[n:].abs().max() == 0


# ---- ITM and ITG ----


def test_itm_is_cross_entropy_over_the_pairs_that_count():
    torch.manual_seed(0)
    logits, matched = torch.randn(6, 2), torch.tensor([1, 1, 0, 0, 0, 0], dtype=torch.bool)
    counted = torch.tensor([1, 1, 1, 0, 1, 0], dtype=torch.bool)
    expected = F.cross_entropy(logits[counted], matched[counted].long())
    torch.testing.assert_close(itm_loss(logits, matched, counted, counted.sum()), expected)


def test_next_token_labels():
    ids = torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
    none = IGNORE_INDEX
    assert next_token_labels(ids, mask).tolist() == [[7, 8, 3, none], [9, 3, none, none]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_itg_is_cross_entropy(smoothing):
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 11), torch.randint(0, 11, (9,))
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(itg_loss(logits, labels, smoothing, 9.0), expected)
    halves = itg_loss(logits[:3], labels[:3], smoothing, 9.0) + itg_loss(logits[3:], labels[3:], smoothing, 9.0)
    torch.testing.assert_close(halves, expected)  # every token weighs the same, however they are split
    assert itg_loss(logits.bfloat16(), labels, smoothing, 9.0).dtype == torch.float32


# ---- chance ----


def test_chance_levels():
    assert itc_loss(torch.zeros(4, 12), torch.eye(12, dtype=torch.bool)[:4], 0.1).item() == pytest.approx(math.log(12))
    assert itg_loss(torch.zeros(5, 40), torch.arange(5), 0.1, 5.0).item() == pytest.approx(math.log(40))
    prior = torch.tensor([2 / 3, 1 / 3]).log().expand(12, 2)  # one pair in three matches
    found = itm_loss(prior, torch.arange(12) < 4, torch.ones(12, dtype=torch.bool), 12.0).item()
    assert found == pytest.approx(ITM_CHANCE) == pytest.approx(0.6365, abs=1e-4)


def test_diversity_is_the_mean_squared_cosine_of_two_queries():
    queries = torch.tensor([[[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]], [[1.0, 0.0], [5.0, 0.0], [-2.0, 0.0]]])
    torch.testing.assert_close(diversity_loss(queries[:1]), torch.tensor((0 + 0.5 + 0.5) / 3))
    torch.testing.assert_close(diversity_loss(queries), torch.tensor((1 / 3 + 1) / 2))
    assert diversity_loss(torch.randn(2, 1, 4)) == 0, "one query has no other"


def test_effective_rank_counts_the_directions_of_the_queries():
    same, apart = torch.ones(1, 4, 8), torch.eye(8)[None, :4]
    torch.testing.assert_close(effective_rank(same), torch.tensor(1.0), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(effective_rank(apart), torch.tensor(4.0))
    assert effective_rank(apart * math.nan).isnan(), "and no error: the losses' own check stops the run"
    torch.testing.assert_close(effective_rank(torch.cat([same, apart])), torch.tensor(2.5), rtol=1e-2, atol=1e-2)
