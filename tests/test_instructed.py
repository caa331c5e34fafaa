"""Stage 2 whose prompt also enters the Q-Former, as in InstructBLIP: training, transfer from stage 1, and questions."""

import pytest
import torch
from safetensors.torch import load_file
from test_models import build, run
from tiny import Tiny, run_stage, shake

import qformer
from qformer.build import build_stage1, build_stage2, build_tokenizer
from qformer.checkpoint import save_adapter
from qformer.config import Stage1Config, Stage2Config, load_config, to_yaml
from qformer.data import collate
from qformer.inference import VisionLanguageModel
from qformer.models import Stage2, stage2

INSTRUCTED = "stage2.instructed=true"
SHORT, LONG = "what colour ?", "what is the colour of the square on the left of the grey field ?"


def instructed(tiny: Tiny, kind: str = "opt", *more: str) -> tuple[Stage2, list]:
    model, samples = build(tiny, kind, "pictures", INSTRUCTED, *more)
    assert isinstance(model, Stage2)
    return model.eval(), samples


@torch.no_grad()
def test_the_prompt_enters_the_qformer_and_its_padding_does_not(tiny):
    model, samples = instructed(tiny)
    features = model.encoder(collate(samples[:1]).images)
    both = model.visual_prompt(features, [SHORT, LONG], torch.tensor([0, 0]))
    alone = torch.cat([model.visual_prompt(features, [prompt]) for prompt in (SHORT, LONG)])
    torch.testing.assert_close(both, alone, atol=1e-6, rtol=0)
    assert (alone[0] - alone[1]).abs().max() > 1e-2


@torch.no_grad()
def test_the_qformer_reads_what_its_own_tokenizer_makes_of_the_prompt(tiny):
    model, samples = instructed(tiny)
    features = model.encoder(collate(samples[:2]).images)
    ids = torch.tensor([model.tokenizer.convert_tokens_to_ids(["[CLS]", "what", "colour", "?", "[SEP]"])] * 2)
    adapter = model.adapter
    images = adapter.qformer.project_images(adapter.feature_norm(features.tokens))
    expected = adapter.language_projection(adapter.qformer.matching_pass([images], ids, torch.ones_like(ids).bool()))
    assert torch.equal(model.visual_prompt(features, [SHORT, SHORT]), expected)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_in_training_it_reads_the_prompt_and_an_encoder_decoders_prefix(tiny, kind, monkeypatch):
    model, samples = instructed(tiny, kind, "llm.prompt=a photo of")
    read, tokenize = [], stage2.tokenize
    monkeypatch.setattr(stage2, "tokenize", lambda *a, **k: read.extend(a[1]) or tokenize(*a, **k))
    batch = collate(samples[:4])
    run(model, batch)
    prompts, targets = model.prepare(batch, 1).text
    assert read == prompts
    whole = [f"{p} {t}" for p, t in zip(prompts, targets, strict=True)]
    assert whole == [f"a photo of {text}" for text in batch.texts]
    assert (prompts == ["a photo of"] * 4) is (kind == "opt")


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_gradient_reaches_everything_that_learns(tiny, kind):
    model, samples = instructed(tiny, kind)
    run(model.train(), collate(samples[:4])).loss.backward()
    without = {name for name, p in model.adapter.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    idle = {name for name in without if not name.endswith("key.bias")}  # adds the same to every score of a softmax
    frozen = {name for name, p in model.adapter.named_parameters() if not p.requires_grad}
    assert idle == frozen, "DistributedDataParallel waits for ever for the gradient of an unused parameter"
    assert {name.rsplit(".", 2)[0] for name in frozen} == {"qformer.blocks.1.text_ffn"}


@torch.no_grad()
def test_one_picture_under_several_questions_is_encoded_and_projected_once(tiny, monkeypatch):
    config = load_config(Stage2Config, tiny.stage2(tiny.folder, INSTRUCTED, "llm.num_beams=1"))
    model = build_stage2(config)
    shake(model.adapter, by=0.2)
    asked = VisionLanguageModel(model.eval(), config)
    pictures = sorted(str(p) for p in tiny.records.parent.glob("*.png"))[:2]
    questions = [SHORT, LONG, "what is it ?"]
    seen, project, generate, prompts = [], model.adapter.qformer.project_images, model.llm.generate, []

    def count(features, mask, norm, once):
        seen.append(len(features))
        return project(features, mask, norm, once)

    def keep(visual_prompt, *a, **k):
        prompts.append(visual_prompt)
        return generate(visual_prompt, *a, **k)

    monkeypatch.setattr(model.adapter.qformer, "project_images", count)
    monkeypatch.setattr(model.llm, "generate", keep)
    one_by_one = [asked.answer([pictures[0]], [q])[0] for q in questions]
    together = asked.answer(pictures[:1], questions)
    swapped = asked.answer([pictures[1], pictures[0], pictures[1]], [questions[1], questions[0], questions[1]])
    assert seen == [1, 1, 1, 1, 2]
    assert together == one_by_one
    assert swapped[0] == swapped[2]
    torch.testing.assert_close(prompts[3], torch.cat(prompts[:3]), atol=1e-5, rtol=0)
    torch.testing.assert_close(prompts[4][1], prompts[0][0], atol=1e-5, rtol=0)
    assert (prompts[4][0] - prompts[1][0]).abs().max() > 1e-4, "another picture"
    assert len(asked.caption(pictures)) == 2


def test_it_starts_from_stage1_with_its_text_side_trains_and_answers(tiny, tmp_path, caplog, capsys):
    config = load_config(Stage1Config, tiny.stage1(tmp_path / "s1"))
    first = build_stage1(config).adapter
    save_adapter(tmp_path / "s1" / "adapter", first, to_yaml(config), "")
    start = [f"stage2.init_from={tmp_path / 's1' / 'adapter'}", "train.max_steps=2", "train.validate_every_steps=2"]
    arguments = tiny.stage2(tmp_path / "s2", INSTRUCTED, *start, "optim.weight_decay=0.5")
    transferred = build_stage2(load_config(Stage2Config, arguments)).transferred
    assert transferred is not None
    assert {n for n in transferred.loaded if "text_ffn" in n or "embeddings" in n} == {
        n for n in first.state_dict() if "text_ffn" in n or "embeddings" in n
    }
    assert transferred.new == ["language_projection.weight", "language_projection.bias"]
    assert all(not name.startswith(("qformer.", "feature_norm.")) for name in transferred.left_out)

    run_stage(2, arguments)
    saved = load_file(tmp_path / "s2" / "adapter" / "adapter.safetensors")
    words = "qformer.word_embeddings.weight"
    assert not torch.equal(saved[words], first.state_dict()[words]), "it learns"
    unread = "qformer.blocks.1.text_ffn.up.weight"
    assert torch.equal(saved[unread], first.state_dict()[unread]), "nobody reads it, nothing changes it"
    loaded = qformer.load(tmp_path / "s2" / "adapter", device="cpu")
    assert {n: t.shape for n, t in loaded.model.adapter.state_dict().items()} == {n: t.shape for n, t in saved.items()}
    picture = str(next(tiny.records.parent.glob("*.png")))
    assert len(loaded.answer([picture], [SHORT, LONG])) == 2
    assert len(loaded.caption([picture])) == 1


def test_a_plain_adapter_does_not_pass_for_an_instructed_one(tiny, tmp_path):
    config = load_config(Stage2Config, tiny.stage2(tmp_path))
    model = build_stage2(config)
    assert model.tokenizer is None
    assert not any("text_ffn" in n or "embeddings" in n for n in model.adapter.state_dict())
    save_adapter(
        tmp_path / "adapter", model.adapter, to_yaml(config).replace("instructed: false", "instructed: true"), ""
    )
    with pytest.raises(ValueError, match=r"does not fit this config: missing .*text_ffn"):
        qformer.load(tmp_path / "adapter", device="cpu")


def test_a_prompt_longer_than_the_positions_is_said(tiny):
    model, samples = instructed(tiny)
    features = model.encoder(collate(samples[:1]).images)
    with pytest.raises(ValueError, match=r"text of 42 tokens is longer than qformer.max_text_positions=24; shorten it"):
        model.visual_prompt(features, ["a red square on " * 10])


@pytest.mark.parametrize("stage", [1, 2])
def test_the_feature_norm_has_the_eps_of_the_config(tiny, stage):
    if stage == 1:
        adapter = build_stage1(
            load_config(Stage1Config, tiny.stage1(tiny.folder, "qformer.feature_norm_eps=1e-6"))
        ).adapter
    else:
        config = load_config(Stage2Config, tiny.stage2(tiny.folder, "qformer.feature_norm_eps=1e-6"))
        adapter = build_stage2(config).adapter
    assert adapter.feature_norm.eps == 1e-6
    with pytest.raises(ValueError, match=r"qformer.feature_norm_eps: 0.0 must be above 0"):
        load_config(Stage1Config, tiny.stage1(tiny.folder, "qformer.feature_norm_eps=0"))


def test_a_tokenizer_inside_a_repository(tiny, monkeypatch):
    from transformers import AutoTokenizer

    asked, real = [], AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: asked.append((a, k)) or real(tiny.bert))
    config = load_config(Stage1Config, tiny.stage1(tiny.folder, "qformer.tokenizer=some/instruct/qformer_tokenizer"))
    assert build_tokenizer(config.qformer).bos_token == "[DEC]"
    assert asked == [(("some/instruct",), {"subfolder": "qformer_tokenizer"})]
