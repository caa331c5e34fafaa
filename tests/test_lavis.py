"""The reference's checkpoints, converted by the stage that users run, give the reference's numbers."""

import pytest
import torch
from golden import golden, run, words_of, write_bert_tokenizer, write_checkpoint, write_opt, write_t5
from PIL import Image
from tiny import TRAINING, run_stage
from torch.testing import assert_close

import qformer
from qformer.build import build_stage2
from qformer.checkpoint import read_adapter
from qformer.config import Stage2Config, load_config
from qformer.encoders import Features
from qformer.interop.keys import lavis
from qformer.models import TextTokens, contrast
from qformer.models.contrast import text_keys
from qformer.objectives import itc_loss, itg_loss, itm_loss, next_token_labels, similarity
from qformer.text import IGNORE_INDEX

HEADS = ["qformer.heads=4", "--encoder-heads", "4"]  # 16 and 12 columns a head: no tensor tells


def close(found, expected, atol=1e-4):
    assert_close(found, expected, rtol=0, atol=atol)


class Stage1:
    """The converted stage 1, and the recording as our passes take it."""

    def __init__(self, folder):
        self.out, self.recorded, self.facts = folder / "adapter", *golden("lavis_stage1")
        checkpoint = write_checkpoint(folder / "stage1.pth", self.recorded)
        self.bert = write_bert_tokenizer(folder / "bert")
        run(
            "convert",
            ["--from", "lavis", str(checkpoint), "--out", str(self.out), *HEADS, f"qformer.tokenizer={self.bert}"],
        )
        self.loaded = qformer.load(self.out, device="cpu")
        self.model, self.adapter = self.loaded.model, self.loaded.model.adapter
        self.text = TextTokens(self.recorded["in.input_ids"], self.recorded["in.attention_mask"].bool())

    @torch.no_grad()
    def passes(self):
        images = self.adapter.project_images(self.recorded["out.vit"], None)
        return images, self.adapter.qformer.query_pass(images)

    def __getitem__(self, name):
        return self.recorded[name]


class Stage2:
    """A converted stage 2 with the recorded language model in a folder of its own."""

    def __init__(self, folder, name, write_llm):
        self.out, self.recorded, self.facts = folder / "adapter", *golden(name)
        checkpoint, llm = (
            write_checkpoint(folder / "stage2.pth", self.recorded),
            write_llm(folder / "llm", self.recorded, self.facts),
        )
        run("convert", ["--from", "lavis", str(checkpoint), "--out", str(self.out), *HEADS, f"llm.id={llm}"])
        self.loaded = qformer.load(self.out, device="cpu")
        self.model, self.llm = self.loaded.model, self.loaded.model.llm

    @torch.no_grad()
    def visual_prompt(self):
        return self.model.visual_prompt(self.model.encoder(self["in.image"]), [""] * 4)

    def __getitem__(self, name):
        return self.recorded[name]


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    return Stage1(tmp_path_factory.mktemp("stage1"))


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    return Stage2(tmp_path_factory.mktemp("opt"), "lavis_opt", write_opt)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return Stage2(tmp_path_factory.mktemp("t5"), "lavis_t5", write_t5)


@torch.no_grad()
def test_stage1_tokens_and_features(stage1):
    text = stage1.model.tokenize(stage1.facts["captions"])
    assert text.ids.equal(stage1["in.input_ids"][:, :12])  # the reference pads to max_txt_len, ours to the longest
    assert stage1.adapter.dec_id == stage1.facts["special_ids"]["bos[DEC]"]
    tokens = stage1.model.encoder(stage1["in.image"]).tokens
    close(tokens, stage1["out.vit"])
    close(stage1.adapter.feature_norm(tokens), stage1["out.image_embeds"])
    _, queries = stage1.passes()
    close(queries.output, stage1["out.query_output"])
    real = stage1.text.mask
    close(stage1.adapter.qformer.text_pass(*stage1.text)[real], stage1["out.text_output"][real])


@torch.no_grad()
def test_stage1_contrast(stage1):
    adapter, (_, queries) = stage1.adapter, stage1.passes()
    image_embeds, text_embeds = adapter.embed_queries(queries.output), adapter.embed_text(stage1.text)
    close(image_embeds, stage1["out.image_feats"], 1e-5)
    close(text_embeds, stage1["out.text_feat"], 1e-5)
    i2t = similarity(image_embeds, text_embeds) / adapter.temperature
    close(i2t, stage1["out.sim_i2t"], 1e-5)
    close(i2t.T, stage1["out.sim_t2i"], 1e-5)
    itc = (itc_loss(i2t, torch.eye(4).bool(), 0.1) + itc_loss(i2t.T, torch.eye(4).bool(), 0.1)) / 2
    close(itc, stage1["out.loss_itc"], 1e-5)


@torch.no_grad()
def test_stage1_matching(stage1):
    images, _ = stage1.passes()
    own, texts = torch.arange(4), stage1["in.neg_text_idx"]
    pairs = images.select(torch.cat([own, stage1["in.neg_image_idx"], own]))
    text = TextTokens(*(torch.cat([t, t, t[texts]]) for t in stage1.text))
    logits = stage1.adapter.match([pairs], *text)
    close(logits, stage1["out.itm_logits"], 1e-5)
    close(itm_loss(logits, stage1["in.itm_labels"].bool(), torch.ones(12), 12), stage1["out.loss_itm"], 1e-5)
    every_image, every_text = own.repeat_interleave(4), own.repeat(4)
    logits = stage1.adapter.match([images.select(every_image)], *(t[every_text] for t in stage1.text))
    close(logits.view(4, 4, 2), stage1["out.itm_logits_all_pairs"], 1e-5)
    close(logits.view(4, 4, 2)[..., 1], stage1["out.compute_itm_all_pairs"], 1e-5)


@torch.no_grad()
def test_stage1_generation_loss(stage1):
    _, queries = stage1.passes()
    ids = torch.cat([torch.full((4, 1), stage1.adapter.dec_id), stage1.text.ids[:, 1:]], 1)
    hidden = stage1.adapter.qformer.causal_pass(ids, stage1.text.mask, queries)
    logits, labels = stage1.adapter.lm_logits(hidden), next_token_labels(*stage1.text)
    real = stage1.text.mask
    close(hidden[real], stage1["out.lm_hidden"][real])
    close(logits[real], stage1["out.lm_logits"][real])
    counted = labels != IGNORE_INDEX
    close(itg_loss(logits[counted], labels[counted], 0.1, counted.sum()), stage1["out.loss_lm"])


def test_stage1_loss_and_gradients_of_a_training_step(stage1, monkeypatch):
    """With the one difference taken away: the reference sends no gradient into the candidates of ITC, ours does."""
    scored = []

    def score(image_embeds, text_embeds):
        scored[:] = image_embeds, text_embeds
        return similarity(image_embeds, text_embeds.detach())

    def score_back(scores):
        return (similarity(scored[0].detach(), scored[1]) / stage1.adapter.temperature).T

    monkeypatch.setattr(contrast, "similarity", score)
    monkeypatch.setattr(contrast, "transpose_over_ranks", score_back)
    loss, found = _training_step(stage1, monkeypatch)
    close(loss, stage1["out.loss"])
    compared = lavis().key_map(found)
    assert len(compared) == len(found)
    for ours, theirs in compared.items():
        assert_close(found[ours], stage1[f"grad.{theirs}"], rtol=1e-4, atol=1e-4, msg=lambda m, n=ours: f"{n}: {m}")


def test_on_purpose_gradient_also_reaches_the_candidates_of_itc_where_the_reference_stops_it(stage1, monkeypatch):
    loss, found = _training_step(stage1, monkeypatch)
    close(loss, stage1["out.loss"])
    name = "text_projection.weight"
    assert (found[name] - stage1[f"grad.{lavis().theirs(name)}"]).abs().max() > 0.01
    close(found["lm_bias"], stage1["grad.Qformer.cls.predictions.bias"])  # of another loss: the same


def test_stage1_extracts_features_as_the_reference_does(stage1):
    pictures, captions = list(stage1["in.image"]), stage1.facts["captions"]
    loaded, adapter = stage1.loaded, stage1.adapter
    close(loaded.embed_image(pictures), stage1["out.extract_image.image_embeds_proj"], 1e-5)
    close(loaded.embed_text(captions), stage1["out.extract_text.text_embeds_proj"][:, 0], 1e-5)
    expected = stage1["out.itm_logits_all_pairs"].diagonal().T.softmax(1)[:, 1]
    close(loaded.match(pictures, captions), expected, 1e-5)
    with torch.no_grad():
        text, (images, queries) = stage1.model.tokenize(captions), stage1.passes()
        close(queries.output, stage1["out.extract_image.image_embeds"])
        close(adapter.qformer.text_pass(*text)[text.mask], stage1["out.extract_text.text_embeds"][text.mask])
        multimodal = adapter.qformer.matching_pass([images], *text)
        close(multimodal, stage1["out.extract_multimodal.multimodal_embeds"])


@torch.no_grad()
def test_stage1_speaks_by_its_own_head(stage1):
    _, queries = stage1.passes()
    ids, steps = stage1["out.greedy_ids_no_stop"], stage1["out.greedy_step_logits"].shape[1]
    said = ids[:, :1]
    for step in range(steps):
        hidden = stage1.adapter.qformer.causal_pass(said, torch.ones_like(said).bool(), queries)
        logits = stage1.adapter.lm_logits(hidden[:, -1])
        close(logits, stage1["out.greedy_step_logits"][:, step])
        said = torch.cat([said, logits.argmax(1, keepdim=True)], 1)
    assert said.equal(ids)


def test_on_purpose_captions_of_one_picture_share_the_target_where_the_reference_counts_one(stage1):
    similarities = stage1["out.sim_i2t"]
    same = text_keys(["a", "b", "c", "a"])[:, None] == text_keys(["a", "b", "c", "a"])[None]
    ours, theirs = itc_loss(similarities, same, 0.1), itc_loss(similarities, torch.eye(4).bool(), 0.1)
    assert (ours - theirs).abs() > 0.1


def test_on_purpose_the_temperature_is_held_where_the_reference_lets_it_go(stage1):
    before = stage1.adapter.temperature.detach().clone()
    with torch.no_grad():
        stage1.adapter.temperature.fill_(2.0)
    stage1.adapter(
        Features(stage1["out.vit"], None),
        stage1.text,
        keys=torch.arange(4)[:, None],
        targets_per_rank=torch.tensor(1.0),
        seed=0,
    )
    assert stage1.adapter.temperature.item() == 0.5
    with torch.no_grad():
        stage1.adapter.temperature.copy_(before)


def mean(loss):
    return loss.total / loss.tokens


@torch.no_grad()
def test_opt_losses_and_logits(opt):
    assert not opt.llm.is_encoder_decoder
    visual_prompt, captions = opt.visual_prompt(), opt.facts["captions"]
    close(visual_prompt, opt["out.llm_inputs"])
    close(mean(opt.llm.loss(visual_prompt, [""] * 4, captions)), opt["out.loss"])
    prompted = opt.llm.loss(visual_prompt, ["w111 w112"] * 4, captions)
    close(mean(prompted), opt["out.loss_with_prompt"])
    inputs = torch.cat([visual_prompt, opt.llm.embed(opt["in.input_ids"])], 1)
    mask = torch.cat([torch.ones(4, 8, dtype=torch.long), opt["in.attention_mask"]], 1)
    logits = opt.llm.model(inputs_embeds=inputs, attention_mask=mask).logits
    close(logits[mask.bool()], opt["out.logits"][mask.bool()])
    _speaks_step_by_step(opt, visual_prompt)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("prompt", ["", "w111 w112"])
def test_opt_generates_the_references_ids(opt, prompt, num_beams):
    ids = opt.facts["lavis_generate"][f"prompt={prompt!r} beams={num_beams}"]["new_ids"]
    said = opt.llm.generate(opt.visual_prompt(), [prompt] * 4, num_beams=num_beams, max_new_tokens=10)
    assert said == [words_of(row, opt.facts["eos_for_generate"]) for row in ids]


@torch.no_grad()
def test_t5_loss_and_logits(t5):
    assert t5.llm.is_encoder_decoder
    assert t5.loaded.config.llm.activation == "gelu"  # as the reference runs every T5
    visual_prompt, captions = t5.visual_prompt(), t5.facts["captions"]
    close(visual_prompt, t5["out.llm_inputs"])
    close(mean(t5.llm.loss(visual_prompt, t5.facts["text_input"], captions)), t5["out.loss"])
    mask = torch.cat([torch.ones(4, 8, dtype=torch.long), t5["in.attention_mask"]], 1)
    inputs = torch.cat([visual_prompt, t5.llm.embed(t5["in.input_ids"])], 1)
    labels = t5["in.output_ids"].masked_fill(t5["in.output_mask"] == 0, IGNORE_INDEX)
    found = t5.llm.model(inputs_embeds=inputs, attention_mask=mask, labels=labels)
    real = t5["in.output_mask"].bool()
    close(found.encoder_last_hidden_state[mask.bool()], t5["out.encoder_last_hidden_state"][mask.bool()])
    close(found.logits[real], t5["out.logits"][real])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_t5_generates_the_references_ids(t5, num_beams, monkeypatch):
    end = t5.facts["eos_for_generate"]  # so that rows end early; the tokenizer's own never comes
    monkeypatch.setattr(t5.llm, "_stop_ids", [end])
    monkeypatch.setitem(t5.llm._special_ids, "eos_token_id", [end])
    ids = t5.facts["lavis_generate"][f"prompt='w120 w121' beams={num_beams}"]["new_ids"]
    said = t5.llm.generate(t5.visual_prompt(), ["w120 w121"] * 4, num_beams=num_beams, max_new_tokens=10)
    assert said == [words_of(row[1:], end) for row in ids]


def test_ask_runs_on_an_imported_stage_2(opt, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    Image.effect_noise((30, 30), 90).convert("RGB").save(picture)
    run("ask", [str(opt.out), str(picture), "w120 w121 ?"])
    assert capsys.readouterr().out.strip() == opt.loaded.answer([str(picture)], ["w120 w121 ?"])[0]


def test_stage_2_with_another_language_model_starts_from_an_imported_stage_1(stage1, tiny, tmp_path):
    sizes = ["layers=4", "width=64", "heads=4", "ffn_width=128", "queries=8"]
    arguments = [
        f"run.dir={tmp_path / 'run'}", f"data.train=[{tiny.records}]", *TRAINING, "train.max_steps=1", f"llm.id={tiny.t5}",
        "encoder.loader=transformers", f"encoder.id={stage1.out / 'encoder'}", "encoder.block=-1",
        *(f"qformer.{size}" for size in sizes), f"stage2.init_from={stage1.out}",
    ]  # fmt: skip
    model = build_stage2(load_config(Stage2Config, arguments))
    transferred = model.transferred
    assert transferred is not None
    assert [n.rpartition(".")[0] for n in transferred.new] == ["language_projection"] * 2
    close(model.adapter.qformer.query_tokens.detach(), stage1["param.query_tokens"], 0)
    run_stage(2, arguments)
    assert len(read_adapter(tmp_path / "run" / "adapter")) == len(model.adapter.state_dict())


def test_stage_1_continues_from_an_imported_stage_1(stage1, tiny, tmp_path):
    config = stage1.out / "config.yaml"  # of the import; data, run and training are this run's
    run_stage(1, [
        str(config), f"run.dir={tmp_path / 'run'}", f"data.train=[{tiny.records}]", *TRAINING, "train.max_steps=1",
        f"stage1.init_from={stage1.out}", "optim.warmup_lr=0",
    ])  # fmt: skip
    before, after = read_adapter(stage1.out), read_adapter(tmp_path / "run" / "adapter")
    assert all(before[name].allclose(after[name], atol=2e-3) for name in before)  # a step of lr 1e-3 at most


def _training_step(stage1, monkeypatch):
    """Loss of the recorded batch and negatives, and its gradient by our names."""
    drawn = [(stage1[f"in.neg_{kind}_idx"], torch.ones(4, dtype=torch.bool)) for kind in ("text", "image")]
    monkeypatch.setattr(contrast, "draw_hard_negatives", lambda *_: drawn.pop(0))
    targets = stage1.text.mask[:, 1:].sum().float()
    stage1.adapter.zero_grad()
    output = stage1.adapter(
        Features(stage1["out.vit"], None), stage1.text, keys=torch.arange(4)[:, None], targets_per_rank=targets, seed=0
    )
    output.loss.backward()
    return output.loss.detach(), {name: parameter.grad for name, parameter in stage1.adapter.named_parameters()}


@torch.no_grad()
def _speaks_step_by_step(opt, visual_prompt):
    ids, steps = opt["out.greedy_ids_no_stop"], opt["out.greedy_step_logits"]
    inputs = torch.cat([visual_prompt, opt.llm.embed(ids[:, :-1])], 1)
    logits = opt.llm.model(inputs_embeds=inputs).logits[:, visual_prompt.shape[1] :]
    close(logits, steps)
    assert logits.argmax(2).equal(ids[:, 1:])
