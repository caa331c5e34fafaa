"""Chats, ends, lengths, and what a loaded model takes: single images, run folders, devices."""

import re

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

import qformer
from qformer.language import DecoderOnly, PromptTooLong, load_language_model
from qformer.messages import one_line
from tests.test_language import EOS, LINE_END, VOCABULARY, V, build, build_model, build_tokenizer
from tests.tiny import run_stage

TEMPLATE = (
    "{% for m in messages %}{{ 'question : ' if m['role'] == 'user' else 'answer : ' }}{{ m['content'] }}{{ ' .' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'answer :' }}{% endif %}"
)


def chatting(template=TEMPLATE):
    tokenizer = build_tokenizer(bos=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["."]})
    tokenizer.chat_template = template
    return DecoderOnly(build_model("llama", V + 3), tokenizer, "chatty", chat=True)


def words(llm, ids):
    return " ".join(llm.tokenizer.convert_ids_to_tokens(ids))


def test_the_visual_prompt_stands_in_the_users_turn_and_the_target_is_the_assistants():
    llm = chatting()
    assert words(llm, llm._before("what is red")) == "question :"
    context, target = llm._row("what is red", "two", 32)
    assert words(llm, context) == "what is red . answer :"
    assert words(llm, target) == "two ."
    assert target[-1] == llm.chat.end_id
    assert llm.chat.end_id in llm._stop_ids


def test_turns_of_a_chat_stand_one_after_the_other_with_one_visual_prompt():
    llm = chatting()
    context, _ = llm._row(["what", "red", "is"], "two", 32)
    assert (
        words(llm, llm._before(["what", "red", "is"]) + context)
        == "question : what . answer : red . question : is . answer :"
    )
    with pytest.raises(ValueError, match=r"3 turns needs llm\.chat=true"):
        build("llama").generate(None, [["what", "red", "is"]])


def test_a_chat_in_a_batch_trains_and_answers_as_row_by_row():
    llm = chatting()
    visual_prompt = torch.randn(2, 4, llm.width, requires_grad=True)
    prompts, targets = [["what", "red", "is the blue circle"], "is"], ["two", "a red circle"]
    total = llm.loss(visual_prompt, prompts, targets).total
    total.backward()
    assert (visual_prompt.grad.abs().sum((1, 2)) > 0).all()
    rows = visual_prompt.detach().split(1)
    alone = [llm.loss(r, [p], [t]).total for r, p, t in zip(rows, prompts, targets, strict=True)]
    torch.testing.assert_close(total.detach(), sum(alone), rtol=1e-5, atol=1e-4)
    texts = llm.generate(visual_prompt, prompts, num_beams=2, max_new_tokens=5)
    assert texts == [llm.generate(r, [p], num_beams=2, max_new_tokens=5)[0] for r, p in zip(rows, prompts, strict=True)]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no') }}", "does not take turns"),
        ("x", "write each turn once"),
    ],
)
def test_a_template_that_is_missing_or_of_no_use_is_said_in_words(template, words):
    with pytest.raises(ValueError, match=rf"llm\.chat=true: .*llm\.id='chatty'.*{words}"):
        chatting(template)


def test_all_ids_that_end_a_text_count():
    model = build_model("llama")
    model.generation_config.eos_token_id = [EOS, VOCABULARY["red"], 10**6]
    llm = DecoderOnly(model, build_tokenizer(), "many ends")
    assert llm._stop_ids == [EOS, LINE_END, VOCABULARY["red"]]
    assert llm._text([VOCABULARY["blue"], VOCABULARY["red"], VOCABULARY["blue"]]) == "blue"


def test_lengths_and_ids_are_refused_in_one_line_and_never_an_index_error():
    llm = build("opt")
    llm._limits.config.max_position_embeddings = 12
    llm.require_lengths(4, "a photo of", 4)
    with pytest.raises(
        PromptTooLong, match=r"qformer\.queries=4, llm\.prompt of 4 tokens and .*=5 take 13 positions; .* has 12"
    ):
        llm.require_lengths(4, "a photo of", 5)
    with pytest.raises(PromptTooLong, match=r"prompt and target take 13"):
        llm.loss(torch.randn(1, 4, llm.width), ["a photo of"], ["a red circle left"])
    with pytest.raises(ValueError, match=r"1 words that the model does not embed, the first 'left' with id 21"):
        DecoderOnly(build_model("llama", len(VOCABULARY) - 1), build_tokenizer(), "small")


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_the_text_model_of_a_multimodal_checkpoint_is_taken_out(kind, tmp_path):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    small = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    if kind == "gemma3":
        text = Gemma3TextConfig(**sizes, num_key_value_heads=1, head_dim=16)
        vision = SiglipVisionConfig(**small, patch_size=14)
        whole = Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        )
    else:
        vision = CLIPVisionConfig(**small, patch_size=14)
        whole = LlavaForConditionalGeneration(LlavaConfig(text_config=LlamaConfig(**sizes), vision_config=vision))
    whole.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    llm = load_language_model(str(tmp_path))
    assert "Causal" in type(llm.model).__name__
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(llm.model(input_ids=ids).logits, whole.eval()(input_ids=ids).logits)
    llm.require_generation(2)
    assert load_language_model(str(tmp_path), random_weights=True).width == 32


def test_penalties_and_repeats_count_in_a_batch_as_alone():
    llm = build("llama")
    visual_prompt, prompts = torch.randn(2, 4, llm.width), ["a photo of a red circle", "a"]
    for settings in ({"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}):
        settings = {**settings, "num_beams": 1, "max_new_tokens": 8, "min_new_tokens": 8}
        texts = llm.generate(visual_prompt, prompts, **settings)
        alone = [llm.generate(v, [p], **settings)[0] for v, p in zip(visual_prompt.split(1), prompts, strict=True)]
        assert texts == alone
    assert all(len(set(text.split())) == len(text.split()) for text in texts)
    with pytest.raises(ValueError, match=r"prompts='abc' is one text; expected a list"):
        llm.generate(None, "abc")
    assert llm.generate(None, []) == []


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("asking")
    for stage in (1, 2):
        run_stage(stage, getattr(tiny, f"stage{stage}")(folder / f"s{stage}", "train.max_steps=1"))
    return folder, sorted(tiny.records.parent.glob("*.png"))


def test_a_run_folder_loads_and_what_cannot_be_had_is_one_line(trained, tiny):
    run = trained[0] / "s2"
    model = qformer.load(run, device="cpu")
    assert model.caption([]) == []
    assert model.answer([], []) == []
    for path, device, expected in (
        (run, "cuda:99", "device='cuda:99' cannot be used"),
        (run, "gpu", "device='gpu' cannot be used"),
        ("nobody/nothing", None, "nobody/nothing is neither a folder here nor a repository"),
        (run.parent, None, "is no adapter folder"),
    ):
        with pytest.raises(ValueError, match=expected) as caught:
            qformer.load(path, device)
        assert "\n" not in str(caught.value)


def test_a_single_image_and_question_are_taken_as_such(trained):
    folder, images = trained
    model = qformer.load(folder / "s2", device="cpu")
    settings = {"max_new_tokens": 4}
    expected = model.caption(images[:1], **settings)
    read, encoded = model.read(images[0]), model.encode(images[:1])
    for image in (str(images[0]), images[0], read, encoded):
        assert model.caption(image, **settings) == expected
    answer = model.answer(images[:1], ["what colour ?"], **settings)
    assert model.answer(str(images[0]), "what colour ?", **settings) == answer
    assert model.answer(encoded, "what colour ?", **settings) == answer
    assert len(model.caption(images[:2], ["a photo", "the"], num_beams=2, num_return=2, **settings)) == 4
    with pytest.raises(ValueError, match="1 prompts for 2 images"):
        model.caption(images[:2], ["a photo"])


def test_matching_takes_what_read_and_encode_returned(trained):
    folder, images = trained
    model = qformer.load(folder / "s1", device="cpu")
    expected, encoded = model.match(images[:2], ["a red square", "a dot"]), model.encode(images[:2])
    for given in (encoded, [model.read(i) for i in images[:2]]):
        torch.testing.assert_close(model.match(given, ["a red square", "a dot"]), expected)
        torch.testing.assert_close(model.embed_image(given), model.embed_image(images[:2]))
    torch.testing.assert_close(model.match(str(images[0]), "a red square"), expected[:1])
    assert (len(model.match([], [])), len(model.embed_image([])), len(model.embed_text([]))) == (0, 0, 0)


@pytest.mark.parametrize("prompt", ["Question: what?", "{} {}", "{q}", "{ {}"])
def test_a_prompt_without_its_one_place_is_refused(prompt, trained, tiny, capsys):
    folder, images = trained
    model = qformer.load(folder / "s2", device="cpu")
    with pytest.raises(ValueError, match=r"must hold \{\} once"):
        model.answer(images[0], "what?", prompt=prompt)
    with pytest.raises(SystemExit):
        run_stage(2, tiny.stage2(folder / "never", f"llm.vqa_prompt='{prompt}'"))
    assert "llm.vqa_prompt" in one_line(capsys.readouterr().err, 1000)


def test_a_prompt_keeps_its_end_and_history_is_cleaned_as_the_question(trained, monkeypatch):
    folder, images = trained
    model = qformer.load(folder / "s2", device="cpu")
    asked = []
    monkeypatch.setattr(model.model.llm, "generate", lambda _, prompts, **__: asked.extend(prompts) or [""])
    model.answer(images[0], 'What "colour"?', history=[('Is it "RED"{}?', "no")], prompt="user\n{}\nassistant\n")
    assert re.fullmatch(r"user\nis it red\{\}\?\nassistant\n no\n user\nwhat colour\?\nassistant\n", asked[0])
