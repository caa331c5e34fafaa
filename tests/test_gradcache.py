"""A contrastive batch of many micro-batches, in two passes, has the loss and the gradient of one large micro-batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ranks import run_ranks, said
from tiny import Tiny, run_stage, shake
from torch import Tensor

from qformer.build import build_dataset, build_stage1
from qformer.checkpoint import read_adapter
from qformer.config import ConfigError, Stage1Config, load_config
from qformer.data import GlobalBatches, Order, training_loader
from qformer.distributed import sum_over_ranks
from qformer.encoders import Features
from qformer.launch import start_accelerator
from qformer.models import Stage1, Stage1Adapter
from qformer.models.contrast import NegativeBank, Negatives, contrast, draw_noise
from qformer.training import _forward_backward

GLOBAL_BATCH = 8
WHOLE = [f"stage1.itc_batch_size={GLOBAL_BATCH}"]
CASES = ["pictures", "features"]


@pytest.fixture(scope="module")
def arguments(tiny: Tiny, tmp_path_factory) -> dict[str, list[str]]:
    """Command lines over eight records of five pictures, so that a picture stands in several micro-batches."""
    folder, found = tmp_path_factory.mktemp("gradcache"), {}
    for case in CASES:
        source = tiny.features if case == "features" else tiny.records
        lines = [json.loads(line) for line in source.read_text().splitlines()][:GLOBAL_BATCH]
        lines = [
            {**line, "image": str(source.parent / line["image"]), "image_id": f"{i % 5}"}
            for i, line in enumerate(lines)
        ]
        records = folder / f"{case}.jsonl"
        records.write_text("".join(json.dumps(line) + "\n" for line in lines))
        more = [f"data.train=[{records}]", "data.validation=[]", "data.augment=false", "qformer.dropout=0"]
        found[case] = tiny.stage1(folder / "none", *(tiny.on_features() if case == "features" else []), *more)
    return found


def begin(arguments: list[str], micro: int, ranks: int = 1, me: int = 0) -> tuple[Stage1, list[Any], Any]:
    """A model in training, a step's micro-batches of this rank, and the accelerator."""
    config = load_config(Stage1Config, [*arguments, f"train.micro_batch_size={micro}"])
    accelerator = start_accelerator(config)
    model = build_stage1(config)
    shake(model.adapter, by=0.2)  # by less, embeddings are so alike that their differences are mostly rounding
    batches = GlobalBatches(Order(GLOBAL_BATCH, seed=0), ranks, me, micro)
    loader = iter(training_loader(build_dataset(config.data, model.encoder, "train", 0), batches, 0))
    model.train()
    return model, [model.prepare(next(loader), 5 + i) for i in range(GLOBAL_BATCH // ranks // micro)], accelerator


def one_step(arguments: list[str], micro: int, ranks: int = 1, me: int = 0) -> dict[str, Tensor]:
    """Metrics, norm and gradients of a step of the loop, over all ranks."""
    model, prepared, accelerator = begin(arguments, micro, ranks, me)
    adapter = model.adapter
    wrapped = accelerator.prepare_model(adapter)
    metrics, norm = _forward_backward(model, wrapped, prepared, accelerator=accelerator, clip_norm=1e9)
    means = {name: sum_over_ranks(torch.tensor(value)) / ranks for name, value in metrics.items()}
    gradients = {f"gradient {name}": p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    lengths = {len({p.text.ids.shape[1] for p in prepared}), len({p.batch.images.shape[1] for p in prepared})}
    return {**means, "norm": torch.tensor(norm), **gradients, "ragged": torch.tensor(max(lengths) > 1)}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest of all values' differences, each relative to its largest entry where that is more than 1e-2."""
    assert found.keys() == expected.keys()
    assert len(expected) > 40
    names = [name for name in expected if name != "ragged"]
    return max(float((found[n] - expected[n]).abs().max() / expected[n].abs().max().clamp(min=1e-2)) for n in names)


def work(me: int, ranks: int, folder: Path, arguments: dict[str, list[str]]) -> None:
    found = {case: one_step([*arguments[case], *WHOLE], 2, ranks, me) for case in CASES}
    torch.save(found, folder / f"{me}.pt")


@pytest.fixture(scope="module")
def at_once(arguments) -> dict[str, dict[str, Tensor]]:
    """The eight records in one forward pass."""
    return {case: one_step(arguments[case], GLOBAL_BATCH) for case in CASES}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro", [1, 4])
def test_two_passes_are_one_large_batch(arguments, at_once, case, micro):
    found = one_step([*arguments[case], *WHOLE], micro)
    assert difference(found, at_once[case]) < 1e-5
    assert found["ragged"] or micro == 4
    assert found["gradient temperature"].abs() > 1e-3
    alone = one_step(arguments[case], micro)  # accumulated as ever: another loss, so this could fail
    assert micro == 1 or difference(alone, at_once[case]) > 1e-2


def test_two_passes_on_two_ranks_are_one_large_batch(arguments, at_once, tmp_path):
    assert run_ranks(work, 2, tmp_path, arguments) == [0, 0], said(tmp_path)
    for me in (0, 1):
        found = torch.load(tmp_path / f"{me}.pt", weights_only=True)
        for case in CASES:
            assert difference(found[case], at_once[case]) < 1e-5, case


@pytest.mark.parametrize(("precision", "limit"), [("'no'", 1e-6), ("bf16", 2e-2)], ids=["float32", "bf16"])
def test_dropout_repeats_in_the_second_pass(arguments, precision, limit, monkeypatch):
    """Bit for bit, in kernels and draws; so the gradient is that of one graph over all micro-batches."""
    more = [*WHOLE, "qformer.dropout=0.3", f"train.mixed_precision={precision}"]
    model, prepared, accelerator = begin([*arguments["features"], *more], 2)
    adapter, embedded, embed = model.adapter, [], Stage1Adapter.embed
    monkeypatch.setattr(Stage1Adapter, "embed", lambda *a: embedded.append(embed(*a)) or embedded[-1])
    torch.manual_seed(4)
    _forward_backward(model, model.adapter, prepared, accelerator=accelerator, clip_norm=1e9)
    found = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    assert found["temperature"].abs() > 1e-3
    assert len(embedded) == 2 * len(prepared)
    for first, second in zip(embedded, embedded[len(prepared) :], strict=False):
        assert first.image_embeds.equal(second.image_embeds)
        assert first.text_embeds.equal(second.text_embeds)

    adapter.zero_grad()
    torch.manual_seed(4)
    with accelerator.autocast():
        shares = [p.cached for p in model.prepare_step(prepared)]
    embedded.clear()
    targets, rest = torch.tensor(sum(p.target_tokens for p in prepared) / len(prepared)), torch.zeros(())
    with accelerator.autocast():
        for p, share in zip(prepared, shares, strict=True):
            output = adapter(
                share.features, p.text, keys=torch.zeros(2, 1), targets_per_rank=targets, seed=0, cached=share
            )
            itc = share.itc(embedded[-1].image_embeds, embedded[-1].text_embeds, adapter.temperature)
            rest = rest + (output.loss - itc) / len(prepared)  # nothing of ITC's gradient is left in it
        images, texts = (torch.cat([e[i] for e in embedded]) for i in (-2, -1))
        picture = torch.cat([model._keys(p) for p in prepared])
        whole = contrast(
            images, texts, adapter.temperature, picture, label_smoothing=adapter.label_smoothing, noise_seed=5
        )
    (whole.itc + rest).backward()
    expected = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    assert expected.keys() == found.keys()
    errors, norms = ([x.norm() for x in xs] for xs in ([expected[n] - found[n] for n in found], found.values()))
    assert torch.stack(errors).norm() < limit * torch.stack(norms).norm()
    assert all(error < 50 * limit * max(norm, 1e-2) for error, norm in zip(errors, norms, strict=True))


def test_scores_are_float32_under_autocast():
    images, texts = (torch.nn.functional.normalize(torch.randn(*size, 8), dim=-1) for size in ((4, 2), (4,)))
    arguments = (images, texts, torch.tensor(0.07), torch.arange(4)[:, None])
    more = {"label_smoothing": 0.1, "noise_seed": 3}
    with torch.autocast("cpu", torch.bfloat16):
        found = contrast(*arguments, **more)
    assert found.itc.equal(contrast(*arguments, **more).itc)


def test_a_row_s_noise_is_the_same_however_rows_are_split(monkeypatch):
    """Two ranks of two micro-batches of two: rank 0 holds the records 0 1 4 5, rank 1 the others."""
    whole = draw_noise(8, 1, 7)
    monkeypatch.setattr("qformer.models.contrast.world_size", lambda: 2)
    rows = [0, 1, 4, 5, 2, 3, 6, 7]
    for me in (0, 1):
        monkeypatch.setattr("qformer.models.contrast.rank", lambda me=me: me)
        assert draw_noise(4, 2, 7).equal(whole[:, rows[4 * me : 4 * me + 4]][..., rows])


def test_a_pool_is_as_long_as_its_longest():
    lengths, torch_of = (2, 4), lambda n: torch.full((2, n, 3), float(n))
    features = [Features(torch_of(n), torch.ones(2, n, dtype=torch.bool)) for n in lengths]
    texts = [(torch.full((2, n), n), torch.ones(2, n, dtype=torch.bool)) for n in (5, 3)]
    pool, rows = NegativeBank.of(features, texts), torch.tensor([3, 0])
    found, (ids, mask) = pool.fetch(Negatives(rows, rows > 0, rows, rows > 0))
    assert found.tokens[..., 0].tolist() == [[4] * 4, [2, 2, 0, 0]]
    assert found.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert ids.tolist() == [[3, 3, 3, 0, 0], [5] * 5]
    assert mask.equal(ids > 0)
    alone = NegativeBank.of([Features(features[0].tokens, None)], texts[:1])
    assert alone.tokens is features[0].tokens
    assert alone.mask is None


def test_a_run_is_that_of_the_large_micro_batch(arguments, tmp_path):
    """Three updates through `fit`; what is logged says how many negatives there were."""
    found = {}
    for name, more in {"once": [], "twice": [*WHOLE, "train.micro_batch_size=2"]}.items():
        run_stage(1, [*arguments["features"], f"run.dir={tmp_path / name}", *more])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found[name] = [json.loads(line) for line in lines], read_adapter(tmp_path / name / "adapter")
    for once, twice in zip(found["once"][0], found["twice"][0], strict=True):
        assert once["itc_negatives"] == twice["itc_negatives"] == GLOBAL_BATCH - 1
        for key in ("itc", "itm", "itg", "itc_accuracy", "itm_accuracy", "gradient_norm", "itc_chance"):
            assert twice[key] == pytest.approx(once[key], rel=1e-4), key
    assert len(found["twice"][0]) == 3


def test_an_itc_batch_that_does_not_fit_is_refused(arguments):
    for size, micro in ((3, 2), (6, 2), (0, 2), (16, 2)):
        with pytest.raises(ConfigError, match=rf"stage1\.itc_batch_size: {size} must be a multiple of .* and divide"):
            load_config(
                Stage1Config,
                [*arguments["pictures"], f"stage1.itc_batch_size={size}", f"train.micro_batch_size={micro}"],
            )


def test_an_itc_batch_that_does_not_fit_the_processes_is_refused(arguments, monkeypatch):
    model = build_stage1(
        load_config(Stage1Config, [*arguments["pictures"], "stage1.itc_batch_size=4", "train.micro_batch_size=2"])
    )
    assert model.contrasted_together(2) == 2
    assert model.contrasted_together(4) == 1
    monkeypatch.setattr("qformer.models.stage1.world_size", lambda: 4)
    with pytest.raises(ValueError, match=r"itc_batch_size=4 must be a multiple of train\.micro_batch_size=2 times 4 "):
        model.contrasted_together(2)
