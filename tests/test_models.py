"""Both stages as models: what learns and what does not, padding, single records, and every loss finite."""

import dataclasses
import hashlib
import itertools
import logging

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import FEATURE_WIDTH, Tiny, shake
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM, OPTConfig, OPTForCausalLM

from qformer.bert import initialise_from_bert
from qformer.build import build_dataset, build_stage1, build_stage2
from qformer.config import Stage1Config, Stage2Config, load_config
from qformer.data import Batch, Draw, collate
from qformer.models import Output, Stage1, Stage2, split_prefix
from qformer.models.contrast import text_keys
from qformer.objectives import draw_hard_negatives

Model = Stage1 | Stage2
KINDS = ["stage1", "opt", "t5"]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_input = pytest.mark.parametrize("inputs", ["pictures", "features"])


def build(tiny: Tiny, kind: str, inputs: str = "pictures", *more: str) -> tuple[Model, list]:
    """A model with shaken weights, and its 24 training samples, in order of the epoch."""
    more = (*(tiny.on_features() if inputs == "features" else ()), "qformer.dropout=0", *more)
    model: Model
    if kind == "stage1":
        config = load_config(Stage1Config, tiny.stage1(tiny.folder, *more))
        model = build_stage1(config)
    else:
        config = load_config(Stage2Config, tiny.stage2(tiny.folder, f"llm.id={getattr(tiny, kind)}", *more))
        model = build_stage2(config)
    shake(model.adapter, by=0.05)
    dataset = build_dataset(config.data, model.encoder, "train", seed=0)
    return model, [dataset[Draw(i, 0, i)] for i in range(len(dataset))]


def run(model: Model, batch: Batch, noise_seed: int = 1) -> Output:
    prepared = model.prepare(batch, noise_seed)
    return model(prepared, torch.tensor(float(prepared.target_tokens)))


def digest(module: nn.Module) -> str:
    parts = [name.encode() + value.numpy().tobytes() for name, value in sorted(module.state_dict().items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


# ---- what learns ----


@each_input
@each_kind
def test_gradient_reaches_every_trainable_parameter_and_no_frozen_one(tiny, kind, inputs):
    model, samples = build(tiny, kind, inputs)
    run(model.train(), collate(samples[:6])).loss.backward()
    without = [name for name, p in model.adapter.named_parameters() if p.grad is None]
    assert without == [], "an unused parameter makes DistributedDataParallel wait for ever"
    zero = [
        name for name, p in model.adapter.named_parameters()
        if p.grad.abs().max() == 0 and not name.endswith("key.bias")  # adds the same to every score of a softmax
    ]  # fmt: skip
    assert zero == []
    frozen = [p for name, p in model.named_parameters() if not name.startswith("adapter.")]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert all(p.requires_grad for p in model.adapter.parameters())
    if inputs == "pictures" or kind != "stage1":
        assert frozen


def test_gradient_reaches_everything_even_without_a_negative(tiny):
    model, samples = build(tiny, "stage1")
    run(model.train(), collate([samples[0], samples[0]])).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.adapter.parameters())


@each_kind
def test_frozen_parts_stay_in_eval(tiny, kind):
    model, _ = build(tiny, kind)
    frozen = [model.encoder] + ([model.llm] if isinstance(model, Stage2) else [])
    for mode in (True, False, True):
        model.train(mode)
        assert not any(module.training for part in frozen for module in part.modules())
        assert all(module.training is mode for module in model.adapter.modules())


@each_kind
def test_frozen_parts_are_the_same_bytes_after_training(tiny, kind):
    model, samples = build(tiny, kind)
    frozen = [model.encoder] + ([model.llm] if isinstance(model, Stage2) else [])
    before, adapter_before = [digest(part) for part in frozen], digest(model.adapter)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)  # even one that is given everything
    for i in range(3):
        run(model, collate(samples[4 * i : 4 * i + 4]), i).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [digest(part) for part in frozen] == before
    assert digest(model.adapter) != adapter_before


@each_kind
def test_a_few_steps_on_one_batch_lower_the_loss(tiny, kind):
    model, samples = build(tiny, kind)
    model.train()
    batch = collate(samples[:6])
    optimizer = torch.optim.AdamW(model.adapter.parameters(), lr=3e-4)
    losses = []
    for _ in range(15):
        output = run(model, batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0] - 0.1, losses


# ---- batches ----


@each_input
@each_kind
def test_a_batch_of_one_has_a_finite_loss(tiny, kind, inputs):
    model, samples = build(tiny, kind, inputs)
    output = run(model, collate(samples[3:4]))
    assert output.loss.isfinite()
    assert all(value.isfinite() for value in output.metrics.values())
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.adapter.parameters())


@each_kind
def test_padding_of_features_never_changes_loss_or_gradient(tiny, kind):
    model, samples = build(tiny, kind, "features")
    model.double().eval()  # more tokens are read by another order of products
    batch = collate(samples[:5])
    assert batch.image_mask is not None
    assert len(set(batch.image_mask.sum(1).tolist())) > 1
    garbage = torch.randn(5, 3, FEATURE_WIDTH) * 100
    images = torch.where(batch.image_mask[..., None], batch.images, 77.0)
    padded = dataclasses.replace(
        batch,
        images=torch.cat([images, garbage], 1),
        image_mask=torch.cat([batch.image_mask, torch.zeros(5, 3, dtype=torch.bool)], 1),
    )
    gradients = []
    for given in (batch, padded):
        model.zero_grad()
        output = run(model, given)
        output.loss.backward()
        gradients.append({"loss": output.loss.detach(), **{n: p.grad for n, p in model.adapter.named_parameters()}})
    for name, value in gradients[0].items():
        differs = (gradients[1][name] - value).abs().max() / max(1.0, value.abs().max().item())
        assert differs < 1e-6, name


def test_padding_of_captions_never_changes_a_text_embedding_or_a_match(tiny):
    model, samples = build(tiny, "stage1")
    assert isinstance(model, Stage1)
    model.eval()
    batch = collate(samples[:4])
    texts = ["a red square", "a photo of one blue square on the left of a grey field", "a square", "a green square"]
    memory = model.adapter.project_images(*model.encoder(batch.images, batch.image_mask))
    together, scores = (
        model.adapter.embed_text(model.tokenize(texts)),
        model.adapter.match([memory], *model.tokenize(texts)),
    )
    for i, text in enumerate(texts):
        torch.testing.assert_close(together[i], model.adapter.embed_text(model.tokenize([text]))[0], atol=1e-5, rtol=0)
        alone = model.adapter.match([memory.select(torch.tensor([i]))], *model.tokenize([text]))
        torch.testing.assert_close(scores[i], alone[0], atol=1e-5, rtol=1e-5)
    assert together.norm(dim=1).allclose(torch.ones(4))


@each_kind
def test_tokens_weigh_the_same_however_the_batch_is_split(tiny, kind):
    """The generative loss of two halves, over the targets of both, is that of the whole."""
    model, samples = build(tiny, kind, "pictures")
    model.eval()
    name = "itg" if kind == "stage1" else "lm"
    prepared = [model.prepare(collate(part), 1) for part in (samples[:6], samples[:2], samples[2:6])]
    assert prepared[0].target_tokens == prepared[1].target_tokens + prepared[2].target_tokens
    total = torch.tensor(float(prepared[0].target_tokens))
    whole, *halves = (model(p, total).metrics[name] for p in prepared)
    torch.testing.assert_close(halves[0] + halves[1], whole)


# ---- stage 1 ----


def test_stage1_metrics_and_embeddings(tiny):
    model, samples = build(tiny, "stage1")
    output = run(model, collate(samples[:5]))
    names = {"itc", "itm", "itg", "itc_accuracy", "itm_accuracy", "temperature", "query_output_cosine"}
    names |= {"query_effective_rank"}
    assert set(output.metrics) == names
    assert not any(value.requires_grad for value in output.metrics.values())
    assert output.image_embeds.shape == (5, 4, 16)
    assert output.text_embeds.shape == (5, 16)
    expected = sum(output.metrics[name] for name in ("itc", "itm", "itg"))
    torch.testing.assert_close(output.loss.detach(), expected)


def test_stage1_weights_of_the_losses(tiny):
    model, samples = build(tiny, "stage1", "pictures", "stage1.itc=0.5", "stage1.itm=0", "stage1.itg=2")
    output = run(model, collate(samples[:5]))
    torch.testing.assert_close(output.loss.detach(), 0.5 * output.metrics["itc"] + 2 * output.metrics["itg"])
    output.loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.adapter.parameters())


WEIGHTS = [c for n in (1, 2, 3) for c in itertools.combinations(("itc", "itm", "itg"), n)]
WEIGHTS += [(*c, "diversity") for c in WEIGHTS]


@pytest.mark.parametrize("active", WEIGHTS, ids="+".join)
def test_an_objective_of_weight_0_is_not_computed_and_trains_nothing(tiny, active):
    off = [f"stage1.{name}=0" for name in ("itc", "itm", "itg") if name not in active]
    on = ["stage1.diversity=0.5"] if "diversity" in active else []
    model, samples = build(tiny, "stage1", "pictures", *off, *on)
    assert set(model.chance_levels(6)) == set(active) - {"diversity"}
    output = run(model.train(), collate(samples[:6]))
    assert {name for name in output.metrics if name in ("itc", "itm", "itg", "diversity")} == set(active)
    assert (output.image_embeds is None) == (active[0] == "itg")
    output.loss.backward()
    for name, p in model.adapter.named_parameters():
        assert (p.grad is not None) == p.requires_grad, f"{name}: DistributedDataParallel would wait for ever"


def test_products_fall_with_every_objective_that_is_off(tiny):
    """Counted by PyTorch, forward and backward: ITM over 3B pairs is the dearest, its pass is gone with its weight."""

    def products(*off: str) -> int:
        model, samples = build(tiny, "stage1", "pictures", *(f"stage1.{name}=0" for name in off))
        with FlopCounterMode(display=False) as counter:
            run(model.train(), collate(samples[:6])).loss.backward()
        return counter.get_total_flops()

    whole = products()
    without = {name: whole - products(name) for name in ("itc", "itm", "itg")}
    assert without["itm"] > 0.4 * whole
    assert without["itg"] > 0.05 * whole
    assert products("itm", "itg") < 0.4 * whole
    assert without["itc"] > 0, "the gradient of the text pass; its values still choose ITM's negatives"


@torch.no_grad()
def test_stage1_losses_are_those_of_the_paper_pair_by_pair(tiny):
    """ITC, ITM and ITG once more, slowly: every pair and every token alone, without padding."""
    model, samples = build(tiny, "stage1", "features")
    assert isinstance(model, Stage1)
    adapter, n = model.eval().adapter, 5
    batch = collate(samples[:n])
    output = run(model, batch, noise_seed=3)
    images = [adapter.project_images(sample.image[None], None) for sample in samples[:n]]
    texts = [model.tokenize([sample.text]) for sample in samples[:n]]
    assert len({text.ids.shape[1] for text in texts}) > 1

    queries = torch.cat([adapter.embed_queries(adapter.qformer.query_pass(image).output) for image in images])
    captions = torch.cat([adapter.embed_text(text) for text in texts])
    logits = torch.stack([(query @ captions.T).amax(0) for query in queries]) / adapter.temperature
    smoothed = [F.cross_entropy(x, torch.arange(n), label_smoothing=0.1) for x in (logits, logits.T)]
    torch.testing.assert_close(output.metrics["itc"], sum(smoothed) / 2)

    noise = torch.stack([torch.rand(2, n, generator=torch.Generator().manual_seed(3 + i)) for i in range(n)], 1)
    same = torch.eye(n, dtype=torch.bool)
    negative_image, _ = draw_hard_negatives(logits.T, same, noise[0])
    negative_text, _ = draw_hard_negatives(logits, same, noise[1])
    pairs = [(i, i, 1) for i in range(n)]
    pairs += [(int(negative_image[i]), i, 0) for i in range(n)] + [(i, int(negative_text[i]), 0) for i in range(n)]
    found = torch.cat([adapter.match([images[i]], *texts[t]) for i, t, _ in pairs])
    torch.testing.assert_close(output.metrics["itm"], F.cross_entropy(found, torch.tensor([m for *_, m in pairs])))

    token_losses = []
    for image, text in zip(images, texts, strict=True):
        decoded = text.ids.clone()
        decoded[0, 0] = model.tokenizer.convert_tokens_to_ids("[DEC]")
        hidden = adapter.qformer.causal_pass(decoded, text.mask, adapter.qformer.query_pass(image))
        token_losses.append(
            F.cross_entropy(adapter.lm_logits(hidden[0, :-1]), text.ids[0, 1:], label_smoothing=0.1, reduction="none")
        )
    torch.testing.assert_close(output.metrics["itg"], torch.cat(token_losses).mean())


def test_stage1_same_noise_seed_same_loss(tiny):
    model, samples = build(tiny, "stage1")
    model.eval()
    losses = [run(model, collate(samples[:8]), seed).metrics["itm"].item() for seed in (1, 1, 2, 3, 4)]
    assert losses[0] == losses[1]
    assert len(set(losses)) > 1


def test_stage1_texts_begin_and_end_as_bert_does(tiny):
    model, _ = build(tiny, "stage1", "pictures", "data.max_text_tokens=6")
    assert isinstance(model, Stage1)
    tokens = model.tokenize(["a red square", "a photo of one red square on the left"])
    tokenizer = model.tokenizer
    assert (tokens.ids[:, 0] == tokenizer.cls_token_id).all()
    assert tokens.ids.shape == (2, 6)
    assert tokens.ids[1, -1] == tokenizer.sep_token_id, "a cut caption still ends"
    assert tokens.mask.sum(1).tolist() == [5, 6]
    assert tokenizer.bos_token == "[DEC]"
    assert model.adapter.dec_id == len(tokenizer) - 1
    assert model.adapter.qformer.vocab_size == len(tokenizer)


def test_temperature_stays_within_its_bounds(tiny):
    model, samples = build(tiny, "stage1")
    for value, kept in ((5.0, 0.5), (-1.0, 0.001)):
        with torch.no_grad():
            model.adapter.temperature.fill_(value)
        output = run(model, collate(samples[:3]))
        assert output.loss.isfinite()
        assert output.metrics["temperature"].item() == pytest.approx(kept)


def test_keys_are_equal_where_the_ids_are():
    ids = text_keys(["a", "b", "a", "", "é"])
    assert ids.dtype == torch.int64
    assert (ids[:, None] == ids).sum(1).tolist() == [2, 1, 2, 1, 1]
    assert torch.equal(ids, text_keys(["a", "b", "a", "", "é"]))


# ---- stage 2 ----


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_stage2_loss_is_the_language_models_own(tiny, kind):
    model, samples = build(tiny, kind)
    assert isinstance(model, Stage2)
    batch = collate(samples[:5])
    prepared = model.prepare(batch, 1)
    prompts, targets = prepared.text
    prompt = model.visual_prompt(model.encoder(batch.images), prompts)
    assert prompt.shape == (5, 4, model.llm.width)
    expected = model.llm.loss(prompt, prompts, targets)
    torch.testing.assert_close(run(model, batch).loss, expected.total / expected.tokens)
    assert prepared.target_tokens == expected.tokens


def test_stage2_reads_the_picture(tiny):
    model, samples = build(tiny, "opt")
    batch = collate(samples[:4])
    swapped = dataclasses.replace(batch, images=batch.images.flip(0))
    assert abs(run(model, batch).loss.item() - run(model, swapped).loss.item()) > 1e-6


def test_decoder_only_predicts_the_whole_caption_after_the_prompt(tiny):
    model, samples = build(tiny, "opt", "pictures", "llm.prompt=a photo of")
    batch = collate(samples[:3])
    prompts, targets = model.prepare(batch, 1).text
    assert prompts == ["a photo of"] * 3
    assert targets == batch.texts


def test_encoder_decoder_splits_the_caption_the_same_way_each_time(tiny):
    model, samples = build(tiny, "t5")
    batch = collate(samples[:8])
    prompts, targets = model.prepare(batch, 1).text
    assert [f"{p} {t}".strip() for p, t in zip(prompts, targets, strict=True)] == batch.texts
    assert model.prepare(batch, 1).text == (prompts, targets)
    assert any(model.prepare(batch, seed).text != (prompts, targets) for seed in range(2, 6))


def test_split_prefix_stays_between_the_first_word_and_the_middle():
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    for n in range(2, len(words) + 1):
        cuts = set()
        for seed in range(200):
            prefix, rest = split_prefix(" ".join(words[:n]), seed)
            assert prefix.split() + rest.split() == words[:n]
            cuts.add(len(prefix.split()))
        assert cuts == set(range(1, max(1, n // 2) + 1))
    assert split_prefix("one", 3) == ("", "one")
    assert split_prefix("", 3) == ("", "")


# ---- BERT ----


def test_bert_starts_the_qformer(tiny):
    config = load_config(Stage1Config, tiny.stage1(tiny.folder, f"qformer.init_from={tiny.bert}"))
    adapter, bert = build_stage1(config).adapter, AutoModelForMaskedLM.from_pretrained(tiny.bert).state_dict()
    rows = len(bert["cls.predictions.bias"])
    assert adapter.qformer.vocab_size == rows + 1  # [DEC]
    assert torch.equal(adapter.qformer.word_embeddings.weight[:rows], bert["bert.embeddings.word_embeddings.weight"])
    assert torch.equal(adapter.lm_bias[:rows], bert["cls.predictions.bias"])
    assert torch.equal(
        adapter.qformer.position_embeddings.weight, bert["bert.embeddings.position_embeddings.weight"][:24]
    )
    for i, block in enumerate(adapter.qformer.blocks):
        layer = f"bert.encoder.layer.{i}"
        assert torch.equal(block.attention.value.weight, bert[f"{layer}.attention.self.value.weight"])
        assert torch.equal(block.query_ffn.down.weight, bert[f"{layer}.output.dense.weight"])
        assert torch.equal(block.text_ffn.down.weight, bert[f"{layer}.output.dense.weight"])


@torch.no_grad()
def test_text_side_started_from_bert_is_bert_without_token_types(tiny):
    config = load_config(Stage1Config, tiny.stage1(tiny.folder, f"qformer.init_from={tiny.bert}"))
    model = build_stage1(config).eval()
    bert = AutoModelForMaskedLM.from_pretrained(tiny.bert).eval()
    bert.bert.embeddings.token_type_embeddings.weight.zero_()
    tokens = model.tokenize(["a red square on the left", "a square"])
    expected = bert(input_ids=tokens.ids, attention_mask=tokens.mask.long()).logits[tokens.mask]
    found = model.adapter.lm_logits(model.adapter.qformer.text_pass(tokens.ids, tokens.mask))[tokens.mask]
    torch.testing.assert_close(found[:, : expected.shape[1]], expected, atol=1e-5, rtol=0)


def test_a_bert_without_a_language_modelling_head_is_taken_and_says_what_is_drawn(tiny, tmp_path, caplog, monkeypatch):
    AutoModelForMaskedLM.from_pretrained(tiny.bert).bert.save_pretrained(tmp_path / "encoder")
    model = build_stage1(load_config(Stage1Config, tiny.stage1(tiny.folder)))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # its reports are heard here too
    caplog.clear()
    with caplog.at_level("INFO"):
        initialise_from_bert(model.adapter, str(tmp_path / "encoder"))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1, said  # and transformers reports nothing beside it
    assert "cls.predictions.transform.dense.weight" in said[0]
    assert "start at random" in said[0]
    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "encoder" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lack 1 tensors of BertForMaskedLM: bert\.encoder\.layer\.1\.output\.dense\.weight"
    ):
        initialise_from_bert(model.adapter, str(tmp_path / "encoder"))


def test_a_bert_of_other_sizes_or_none_is_refused(tiny, tmp_path):
    wider = load_config(Stage1Config, tiny.stage1(tiny.folder, "qformer.width=64"))
    with pytest.raises(ValueError, match=r"qformer\.init_from=.*the config wants \[.*64\]; set qformer\.width"):
        initialise_from_bert(build_stage1(wider).adapter, tiny.bert)
    deeper = load_config(Stage1Config, tiny.stage1(tiny.folder, "qformer.layers=3"))
    with pytest.raises(ValueError, match=r"has no bert\.encoder\.layer\.2.*not BERT-shaped or has fewer layers"):
        initialise_from_bert(build_stage1(deeper).adapter, tiny.bert)
    with pytest.raises(ValueError, match=r"qformer\.init_from='.*nothing' cannot be loaded"):
        initialise_from_bert(build_stage1(deeper).adapter, str(tmp_path / "nothing"))
    OPTForCausalLM(
        OPTConfig(vocab_size=9, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "opt")
    with pytest.raises(ValueError, match=r"qformer\.init_from=.*cannot be loaded"):
        initialise_from_bert(build_stage1(deeper).adapter, str(tmp_path / "opt"))
