import logging
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
)
from transformers.cache_utils import DynamicLayer

from qformer.language import DecoderOnly, EncoderDecoder, FrozenLanguageModel, load_language_model
from qformer.language.memory import RoomyLayer, SharedStart
from qformer.language.visual import VisualRows
from qformer.text import (
    IGNORE_INDEX,
    PROMPTS,
    TokenizerFacts,
    encode,
    mask_context,
    pad_rows,
    probe_tokenizer,
    split_prompt,
)

PAD, EOS, UNK, BOS, LINE_END = range(5)
WORDS = [
    "a",
    "photo",
    "of",
    "question",
    "answer",
    ":",
    "what",
    "is",
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "two",
    "three",
    "the",
    "left",
]
VOCABULARY = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", "<s>", "\n", *WORDS])}
V = len(VOCABULARY) + 3  # models pad their vocabulary

FAMILIES = ["opt", "t5", "llama", "qwen3", "gemma3"]
VARIANTS = {
    "bos": {},
    "no_bos": {"bos": False},
    "no_pad": {"pad": False},
    "no_line_end": {"line_end": False},
}
PROMPT_ROWS = ["a photo of", "", "question : what is the red circle left of answer :"]
TARGET_ROWS = ["a red circle", "blue", "two green square left of a circle"]


def build_tokenizer(*, bos=True, eos=True, pad=True, line_end=True, append_eos=False):
    inner = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    pattern = Regex(r"\n|\w+|[^\w\s]") if line_end else Regex(r"\w+|[^\w\s]")
    inner.pre_tokenizer = pre_tokenizers.Split(pattern, "removed", invert=True)
    special = [("<s>", BOS)] * bos + [("</s>", EOS)] * append_eos
    inner.post_processor = processors.TemplateProcessing(
        single=" ".join(["<s>"] * bos + ["$A"] + ["</s>"] * append_eos), special_tokens=special
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>" if bos else None,
        eos_token="</s>" if eos else None,
        pad_token="<pad>" if pad else None,
    )


def build_model(family, vocab_size=V):
    torch.manual_seed(1)
    heads = {
        "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": vocab_size, "initializer_range": 0.3,
        "eos_token_id": EOS,
    }  # fmt: skip
    llama = {**heads, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16}
    match family:
        case "opt":  # embeddings narrower than the hidden states, as in OPT-350m
            model = OPTForCausalLM(OPTConfig(**heads, hidden_size=32, ffn_dim=48, word_embed_proj_dim=16, init_std=0.3))
        case "t5" | "t5_gated":
            sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
            model = T5ForConditionalGeneration(
                T5Config(
                    vocab_size=vocab_size, **sizes, decoder_start_token_id=PAD, initializer_factor=3.0,
                    feed_forward_proj="gated-gelu" if family == "t5_gated" else "relu",
                )
            )  # fmt: skip
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**llama))
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**llama))
        case "gemma3":
            model = Gemma3ForCausalLM(Gemma3TextConfig(**llama, sliding_window=64, final_logit_softcapping=5.0))
    return model


def build(family, vocab_size=V, **variant) -> FrozenLanguageModel:
    encoder_decoder = family.startswith("t5")
    variant = {"bos": not encoder_decoder, "append_eos": encoder_decoder, **variant}
    kind = EncoderDecoder if encoder_decoder else DecoderOnly
    return kind(build_model(family, vocab_size), build_tokenizer(**variant), f"tiny-{family}")


def visual_prompt_for(lm, rows=3, queries=4, requires_grad=False):
    torch.manual_seed(2)
    return torch.randn(rows, queries, lm.width).requires_grad_(requires_grad)


def count_read(lm):
    """A list that grows with every forward pass, by how many positions it reads."""
    read = []

    def count(_, args, given):
        embeds = given.get("inputs_embeds")
        read.append(given["input_ids"].numel() if embeds is None else embeds.shape[0] * embeds.shape[1])

    lm.model.register_forward_pre_hook(count, with_kwargs=True)
    return read


each_family = pytest.mark.parametrize("family", FAMILIES)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


# ---- text ----


def test_probe_finds_what_the_tokenizer_does():
    assert probe_tokenizer(build_tokenizer(), "x") == TokenizerFacts([BOS], None, PAD, LINE_END)
    assert probe_tokenizer(build_tokenizer(bos=False, append_eos=True), "x") == TokenizerFacts([], EOS, PAD, LINE_END)
    assert probe_tokenizer(build_tokenizer(pad=False), "x").pad_id == EOS
    assert probe_tokenizer(build_tokenizer(line_end=False), "x").line_end_id is None


def test_probe_refuses_a_tokenizer_that_cannot_pad():
    with pytest.raises(
        ValueError, match=r"llm\.id='x'.*pad_token=None and eos_token=None.*[Ss]et tokenizer\.pad_token"
    ):
        probe_tokenizer(build_tokenizer(pad=False, eos=False), "x")


def test_probe_refuses_an_empty_tokenizer():
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match=r"llm\.id='x'.*encodes 'a' to no token.*tokenizer\.json"):
        probe_tokenizer(empty, "x")


def test_probe_refuses_a_suffix_it_does_not_know():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s> <s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    with pytest.raises(ValueError, match=r"llm\.id='x'.*expected a prefix and at most one EOS"):
        probe_tokenizer(tokenizer, "x")


def test_split_prompt_encodes_prompt_and_target_as_one_text():
    tokenizer = build_tokenizer()
    whole = encode(tokenizer, "a photo of a red circle")
    assert split_prompt(tokenizer, "a photo of", "a red circle") == (whole[:3], whole[3:])
    assert split_prompt(tokenizer, "", "a red circle") == ([], whole[3:])


def test_split_prompt_gives_a_token_across_the_seam_to_the_target():
    bytes_of = models.BPE({"a": 0, ":": 1, " ": 2, ": ": 3}, [(":", " ")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bytes_of))
    assert split_prompt(tokenizer, "a:", "a") == ([0], [3, 0])


def test_rows_are_padded_and_masked():
    ids, mask = pad_rows([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    ids, mask = pad_rows([[5, 6], [8]], 0, left=True, width=3)
    assert ids.tolist() == [[0, 5, 6], [0, 0, 8]]
    assert mask.tolist() == [[False, True, True], [False, False, True]]
    assert mask_context([1, 2], [3]) == [IGNORE_INDEX, IGNORE_INDEX, 3]


def test_prompts_of_the_paper():
    assert PROMPTS["vqa_decoder_only"].format("what is it?") == "Question: what is it? Answer:"
    assert PROMPTS["vqa_encoder_decoder"].format("what is it?") == "Question: what is it? Short answer:"


# ---- the contract of every family ----


@each_family
def test_attributes_and_embeddings(family):
    lm = build(family)
    assert lm.width == (16 if family == "opt" else 32)
    assert lm.vocab_size == V
    assert lm.is_encoder_decoder == (family == "t5")
    assert lm.embed(torch.tensor([[5, 6, 7]])).shape == (1, 3, lm.width)


@each_family
def test_it_stays_in_eval_and_frozen(family):
    lm = build(family)
    holder = nn.Sequential(lm).train()
    assert holder.training
    assert not any(module.training for module in lm.modules())
    assert not any(parameter.requires_grad for parameter in lm.parameters())


@each_family
def test_gradient_reaches_the_visual_prompt_and_no_parameter(family):
    lm = build(family)
    visual_prompt = visual_prompt_for(lm, requires_grad=True)
    lm.loss(visual_prompt, PROMPT_ROWS, TARGET_ROWS).total.backward()
    assert (visual_prompt.grad.abs().sum((1, 2)) > 0).all()
    assert all(parameter.grad is None for parameter in lm.parameters())


@pytest.mark.parametrize(("family", "precision"), [("t5_gated", "no"), ("t5_gated", "bf16"), ("opt", "bf16")])
def test_kernels_for_training_compute_the_same_and_keep_less(family, precision):
    lm = build(family).double()
    visual_prompt, found, kept = visual_prompt_for(lm).double().requires_grad_(), [], []
    for _ in range(2):
        visual_prompt.grad, held = None, 0

        def count(tensor):
            nonlocal held
            held += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = lm.loss(visual_prompt, PROMPT_ROWS, TARGET_ROWS).total
        loss.backward()
        found.append((loss.detach(), visual_prompt.grad))
        kept.append(held)
        lm.use_training_kernels(torch.device("cpu"), precision)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    if family == "t5_gated":
        assert kept[1] < 0.9 * kept[0]


@each_family
@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_loss_is_that_of_transformers(family, prompt):
    lm, target = build(family), "a red circle"
    visual_prompt = visual_prompt_for(lm, rows=1)
    if family == "t5":
        context, target_ids = lm.tokenizer(prompt).input_ids, lm.tokenizer(target).input_ids
        embeds, labels = torch.cat([visual_prompt, lm.embed(torch.tensor([context]))], 1), target_ids
    else:
        context = lm.tokenizer(prompt).input_ids if prompt else []
        target_ids = encode(lm.tokenizer, target + "\n") if prompt else lm.tokenizer(target + "\n").input_ids
        embeds = torch.cat([visual_prompt, lm.embed(torch.tensor([context + target_ids]))], 1)
        labels = [IGNORE_INDEX] * (4 + len(context)) + target_ids
    expected = lm.model(inputs_embeds=embeds, labels=torch.tensor([labels])).loss * len(target_ids)
    loss = lm.loss(visual_prompt, [prompt], [target])
    torch.testing.assert_close(loss.total, expected, rtol=1e-4, atol=1e-4)
    assert loss.tokens == len(target_ids)


@each_family
@each_variant
@pytest.mark.parametrize("blind", [False, True])
def test_loss_of_a_batch_is_the_sum_of_its_rows(family, variant, blind):
    lm = build(family, **VARIANTS[variant])
    visual_prompt = None if blind else visual_prompt_for(lm)
    singles = [
        lm.loss(None if visual_prompt is None else visual_prompt[i : i + 1], [PROMPT_ROWS[i]], [TARGET_ROWS[i]])
        for i in range(3)
    ]
    total, tokens = lm.loss(visual_prompt, PROMPT_ROWS, TARGET_ROWS)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, torch.stack([single.total for single in singles]).sum(), rtol=1e-5, atol=1e-4)
    assert tokens == sum(single.tokens for single in singles)
    if not blind:
        assert tokens == lm.count_target_tokens(PROMPT_ROWS, TARGET_ROWS)


@pytest.mark.parametrize("family", ["opt", "llama", "qwen3", "gemma3"])
def test_a_model_that_takes_neither_positions_nor_logits_to_keep(family):
    lm = build(family)
    expected = lm.loss(visual_prompt_for(lm), PROMPT_ROWS, TARGET_ROWS)
    lm._forward_arguments = frozenset()
    torch.testing.assert_close(lm.loss(visual_prompt_for(lm), PROMPT_ROWS, TARGET_ROWS), expected)


@each_family
@each_variant
def test_a_long_target_is_cut(family, variant):
    lm = build(family, **VARIANTS[variant])
    prompts, targets = ["", "a photo of"], ["a red circle left of the blue square", "two"]
    for limit in (1, 3):
        visual_prompt, limited = visual_prompt_for(lm, rows=1), {"max_target_tokens": limit}
        tokens = [
            int(lm.loss(visual_prompt, [p], [t], **limited).tokens) for p, t in zip(prompts, targets, strict=True)
        ]
        assert tokens == [limit, min(limit, 2)]
        assert lm.count_target_tokens(prompts, targets, max_target_tokens=limit) == sum(tokens)


# ---- what is a target ----


def test_bos_is_a_target_only_without_a_prompt():
    lm = build("llama")
    red = VOCABULARY["red"]
    assert lm._row("", "red", 32) == ([], [BOS, red, LINE_END])
    assert lm._row("a", "red", 32) == ([BOS, VOCABULARY["a"]], [red, LINE_END])
    assert build("llama", bos=False)._row("", "red", 32) == ([], [red, LINE_END])
    assert build("llama", line_end=False)._row("a", "red", 32)[1] == [red, EOS]


def test_eos_ends_a_cut_target_of_an_encoder_decoder():
    lm = build("t5")
    assert lm._row("a", "red blue green", 3) == ([VOCABULARY["a"], EOS], [VOCABULARY["red"], VOCABULARY["blue"], EOS])


def test_a_missing_line_end_is_said(caplog):
    with caplog.at_level(logging.WARNING, "qformer.language"):
        build("llama", line_end=False)
    assert "tiny-llama" in caplog.text
    assert "EOS" in caplog.text


# ---- generation ----


@each_family
@each_variant
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_batch_generates_what_each_prompt_alone_gives(family, variant, num_beams):
    lm = build(family, **VARIANTS[variant])
    visual_prompt = visual_prompt_for(lm)
    settings = {"max_new_tokens": 8, "num_beams": num_beams, "min_new_tokens": 4}
    batch = lm.generate(visual_prompt, PROMPT_ROWS, **settings)
    assert batch == [lm.generate(visual_prompt[i : i + 1], [PROMPT_ROWS[i]], **settings)[0] for i in range(3)]
    blind = ["a photo of", "question : what is the red circle left of answer :"]
    batch = lm.generate(None, blind, **settings)
    assert batch == [lm.generate(None, [prompt], **settings)[0] for prompt in blind]


@pytest.mark.parametrize("family", ["opt", "llama", "qwen3", "gemma3"])
def test_a_row_is_read_once_for_all_its_beams(family, monkeypatch):
    """The same texts as when `generate` reads every row again for each of its beams; in double precision, no ties."""
    lm = build(family)
    lm.model.double()
    visual_prompt, prompts = visual_prompt_for(lm).double(), ["a photo of", "", "red"]
    search = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 3, "num_return": 2}
    lm.require_generation()  # so that what is tried once is not counted below
    read = count_read(lm)
    texts, ahead = lm.generate(visual_prompt, prompts, **search), sum(read)
    read.clear()
    monkeypatch.setattr(type(lm), "_read_ahead", lambda *_: {})
    assert lm.generate(visual_prompt, prompts, **search) == texts
    length = read[0] // 9
    assert sum(read) - ahead == (9 - 3) * (length - 1)


@pytest.mark.parametrize("family", ["opt", "llama", "qwen3"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_what_several_texts_begin_with_is_read_once(family, num_beams):
    """Two images, two texts behind each: in double precision, no ties."""
    lm = build(family)
    lm.model.double()
    images = visual_prompt_for(lm, rows=2).double()
    visual_prompt = images[[0, 1, 0, 1]]
    prompts = ["a photo of red", "a photo of the blue circle left of two", "a photo of", "a photo of three square"]
    search = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": num_beams}
    alone = [lm.generate(visual_prompt[i : i + 1], prompts[i : i + 1], **search)[0] for i in range(4)]
    lm.generate(visual_prompt, prompts, **search)  # so that what is tried once is not counted below
    read = count_read(lm)
    assert lm.generate(visual_prompt, prompts, **search) == alone
    start, longest = 4 + 3, 4 + 1 + 9  # 4 queries and "<s> a photo" before the shortest ends; then the longest text
    assert read == [2 * start, 4 * (longest - 1 - start), *[4 * num_beams] * 4]


def test_rows_without_anything_in_common_are_read_by_themselves():
    lm = build("opt")
    visual_prompt = visual_prompt_for(lm)
    embeds, mask = lm.start(VisualRows.of(visual_prompt, None, 3, lm.width), PROMPT_ROWS)
    assert SharedStart.of(embeds, mask, 4) is None
    assert SharedStart.of(embeds, mask, 0) is None


def test_starts_may_hold_several_images():
    """Rows of one and of two images, of which the first is the same: it is read once."""
    lm = build("opt")
    lm.model.double()
    images = visual_prompt_for(lm, rows=2).double()
    both = torch.cat([images[0], images[1]])
    visual_prompt, visual_mask = torch.stack([both, both]), torch.ones(2, 8, dtype=torch.bool)
    visual_mask[1, 4:] = False
    prompts, search = ["a photo of red", "what is the"], {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3}
    alone = [
        lm.generate(prompt[None], [text], **search)[0] for prompt, text in zip((both, images[0]), prompts, strict=True)
    ]
    read = count_read(lm)
    assert lm.generate(visual_prompt, prompts, visual_mask=visual_mask, **search) == alone
    assert read[-6] == 4


def test_keys_and_values_with_room_move_as_those_of_transformers():
    torch.manual_seed(0)
    ours, theirs = RoomyLayer(3), DynamicLayer()
    for i, length in enumerate((5, 1, 2, 2, 1)):  # six tokens, where room was made for three
        new = torch.randn(2, 6, 2, length, 4)
        if i == 0:  # beams of a row begin alike
            new = new[:, ::3].repeat_interleave(3, 1)
        for pair in zip(ours.update(*new), theirs.update(*new), strict=True):
            torch.testing.assert_close(*pair, rtol=0, atol=0)
        beams = torch.tensor([2, 0, 0, 5, 5, 3])
        ours.reorder_cache(beams)
        theirs.reorder_cache(beams)
        assert ours.get_seq_length() == theirs.get_seq_length()


@each_family
def test_greedy_generation_is_the_argmax_of_uncached_forwards(family):
    lm = build(family)
    visual_prompt = visual_prompt_for(lm, rows=1)
    embeds, _ = lm.start(VisualRows.of(visual_prompt, None, 1, lm.width), ["a photo of"])
    new_ids: list[int] = []
    while len(new_ids) < 6:
        if lm.is_encoder_decoder:
            logits = lm.model(inputs_embeds=embeds, decoder_input_ids=torch.tensor([[PAD, *new_ids]])).logits
        else:
            written = lm.embed(torch.tensor([new_ids], dtype=torch.long))
            logits = lm.model(inputs_embeds=torch.cat([embeds, written], 1)).logits
        new_ids.append(int(logits[0, -1].argmax()))
    assert lm.generate(visual_prompt, ["a photo of"], max_new_tokens=6, num_beams=1) == [lm._text(new_ids)]


@each_family
def test_only_new_ids_come_back(family, monkeypatch):
    lm = build(family)
    seen = []
    generate = type(lm.model).generate

    def spy(**settings):
        seen.append(generate(lm.model, **settings))
        return seen[-1]

    monkeypatch.setattr(lm.model, "generate", spy)
    lm.generate(visual_prompt_for(lm), PROMPT_ROWS, max_new_tokens=5, min_new_tokens=5, num_beams=1)
    ids = seen[0]
    assert ids.shape == (3, 5 + lm.is_encoder_decoder)
    assert lm.model.generation_config.eos_token_id == [EOS, LINE_END]
    assert lm.model.generation_config.to_diff_dict().keys().isdisjoint({"do_sample", "temperature", "top_p", "top_k"})
    assert not torch.isin(ids[:, 1:], torch.tensor([EOS, LINE_END])).any()


def test_text_stops_at_the_line_end():
    lm = build("llama")
    red, blue = VOCABULARY["red"], VOCABULARY["blue"]
    assert lm._text([red, blue, LINE_END, red]) == "red blue"
    assert lm._text([red, EOS, blue]) == "red"
    assert build("llama", line_end=False)._text([red, LINE_END, blue]) == "red"
    assert lm._text([LINE_END]) == ""


@each_family
def test_generation_settings_of_a_checkpoint_do_not_leak(family):
    lm = build(family)
    model = build_model(family)
    model.generation_config.update(
        do_sample=True, temperature=9.0, top_k=3, repetition_penalty=5.0, min_new_tokens=7, no_repeat_ngram_size=1
    )
    other = type(lm)(model, lm.tokenizer, "leaky")
    visual_prompt = visual_prompt_for(lm)
    for num_beams in (1, 3):
        settings = {"max_new_tokens": 8, "num_beams": num_beams}
        assert other.generate(visual_prompt, PROMPT_ROWS, **settings) == lm.generate(
            visual_prompt, PROMPT_ROWS, **settings
        )


@each_family
def test_sampling_follows_the_seed_and_returns_several(family):
    lm = build(family)
    visual_prompt = visual_prompt_for(lm)
    settings = {"do_sample": True, "num_beams": 1, "num_return": 2, "top_p": 1.0, "max_new_tokens": 8}
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(lm.generate(visual_prompt, PROMPT_ROWS, **settings))
    assert len(draws[0]) == 6
    assert draws[0] == draws[1] != draws[2]
    greedy = lm.generate(visual_prompt, PROMPT_ROWS, num_beams=1, max_new_tokens=8)
    assert lm.generate(visual_prompt, PROMPT_ROWS, do_sample=True, top_p=1e-4, num_beams=1, max_new_tokens=8) == greedy
    beams = lm.generate(visual_prompt, PROMPT_ROWS, num_beams=3, num_return=3, max_new_tokens=8)
    assert beams[::3] == lm.generate(visual_prompt, PROMPT_ROWS, num_beams=3, max_new_tokens=8)


def test_refusals_of_generation():
    lm = build("llama", bos=False)
    with pytest.raises(ValueError, match=r"num_return=3 with num_beams=2.*set num_beams to at least 3"):
        lm.generate(None, ["a"], num_beams=2, num_return=3)
    with pytest.raises(ValueError, match=r"prompts\[1\]='' without a visual prompt"):
        lm.generate(None, ["a", ""])


# ---- construction and loading ----


def test_refusals_of_construction():
    with pytest.raises(ValueError, match=r"llm\.id='x'.*is_encoder_decoder=True; DecoderOnly expects False"):
        DecoderOnly(build_model("t5"), build_tokenizer(), "x")
    model = build_model("llama")
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"llm\.id='x'.*neither an EOS token nor one token for a line end"):
        DecoderOnly(model, build_tokenizer(eos=False, line_end=False), "x")
    tokenizer = build_tokenizer(pad=False)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"llm\.id='x'.*pad token has id 22, the model embeds ids below 22"):
        DecoderOnly(build_model("llama", len(VOCABULARY)), tokenizer, "x")
    model = build_model("t5")
    model.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match=r"llm\.id='x'.*decoder_start_token_id=None"):
        EncoderDecoder(model, build_tokenizer(), "x")


@each_family
def test_a_folder_loads(family, tmp_path):
    lm = build(family)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    loaded = load_language_model(str(tmp_path))
    assert type(loaded) is type(lm)
    expected = lm.loss(visual_prompt_for(lm), PROMPT_ROWS, TARGET_ROWS)
    torch.testing.assert_close(loaded.loss(visual_prompt_for(lm), PROMPT_ROWS, TARGET_ROWS), expected)
    half = load_language_model(str(tmp_path), dtype="bfloat16")
    visual_prompt = visual_prompt_for(lm, requires_grad=True)
    loss = half.loss(visual_prompt, PROMPT_ROWS, TARGET_ROWS)
    assert half.embed(torch.tensor([[5]])).dtype == torch.bfloat16
    assert loss.total.dtype == torch.float32
    loss.total.backward()
    assert visual_prompt.grad.isfinite().all()


@each_family
def test_random_weights_need_no_weights_and_are_seeded(family, tmp_path):
    lm = build(family)
    lm.model.config.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    one, two = (load_language_model(str(tmp_path), random_weights=True).state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_refusals_of_loading(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for missing in ("nobody/no-such-model", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match=r"llm\.id='.*no.*': neither a folder here nor.*download it") as caught:
            load_language_model(missing)
        assert "\n" not in str(caught.value)
    build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the folder holds no language model.*llm\.random_weights=true"):
        load_language_model(str(tmp_path))
    build_model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the folder holds no language model.*model\.safetensors"):
        load_language_model(str(tmp_path))
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the folder holds no language model.*Unrecognized configuration class"):
        load_language_model(str(tmp_path), random_weights=True)
    with pytest.raises(ValueError, match=r"llm\.dtype='int3': expected one of float32, bfloat16, float16"):
        load_language_model(str(tmp_path), dtype="int3")


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_the_shapes_tokenizers_fit(family):
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "qformer/shapes/weights" / family)
    facts = probe_tokenizer(tokenizer, family)
    assert facts.line_end_id == encode(tokenizer, "\n")[0]
    assert (facts.bos_ids, facts.eos_id) == (([2], None) if family == "opt" else ([], 2))
