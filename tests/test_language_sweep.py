"""Every kind of language model that transformers has, tiny and random: a batch gives what each row alone gives."""

import logging

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from qformer.language import DecoderOnly, EncoderDecoder
from qformer.language.visual import VisualRows
from tests.test_language import BOS, EOS, PAD, V, build_tokenizer

SIZES = {
    "vocab_size": V, "hidden_size": 32, "d_model": 32, "n_embd": 32, "embedding_size": 32, "intermediate_size": 48,
    "ffn_dim": 48, "d_ff": 48, "n_inner": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_hidden_layers": 2,
    "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2, "num_decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "kv_channels": 8, "d_kv": 8, "rotary_dim": 4,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 128,
    "moe_intermediate_size": 24, "n_positions": 128, "sliding_window": 16, "attention_window": 16, "state_size": 8,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "initializer_range": 0.3, "init_std": 0.3, "initializer_factor": 3.0,
    "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "decoder_start_token_id": PAD,
}  # fmt: skip
CAUSAL = [
    "llama", "opt", "gpt2", "gpt_neox", "gptj", "codegen", "phi", "stablelm", "olmo2", "qwen3", "starcoder2", "xglm", "biogpt",
    "bloom", "mpt", "falcon",  # ALiBi: distance counts padding
    "mistral", "qwen2", "gemma2", "gemma3_text", "phi3", "cohere2", "gpt_oss",  # windows
    "mixtral", "qwen3_moe", "granitemoe",  # experts
    "mamba", "mamba2", "lfm2", "jamba", "qwen3_next", "recurrent_gemma",  # states; caches that beams cannot repeat
    "minimax",  # reads its rows anew: its own cache errs
    "rwkv", "ctrl", "openai-gpt", "roc_bert",  # no embeddings in transformers' own `generate`
    "bart", "pegasus", "whisper", "trocr",  # decoders that count positions through padding
]  # fmt: skip
SEQ2SEQ = [
    "t5", "mt5", "umt5", "longt5", "switch_transformers", "bart", "mbart", "led", "m2m_100", "pegasus", "blenderbot",
    "prophetnet", "plbart",
]  # fmt: skip
ROW_BY_ROW = {"recurrent_gemma", "rwkv", "ctrl", "bart", "pegasus", "whisper", "trocr"}
REFUSED = {
    "bert": "a token sees those after it",  # without is_decoder it reads both ways
    "cpmant": "it cannot train on and write from embeddings",
    "xmod": "Input language unknown",  # wants a language to be set
}
OTHER_CACHE = ["moshi"]  # with its cache it writes other texts than by reading the row anew
WITHOUT = {"falcon": {"head_dim"}, "prophetnet": {"num_hidden_layers"}}  # sizes that follow from others
MORE = {"mamba2": {"num_heads": 8}, "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8}}
LONG = "a photo of a red circle left of the blue square what is two three the left of the"
PROMPTS, TARGETS = [LONG, "red", ""], ["a red circle", "blue", "two green square left of a circle"]


def build(kind, auto):
    known = CONFIG_MAPPING[kind]()
    decoder = {"is_decoder": True} if auto is AutoModelForCausalLM and kind not in REFUSED else {}
    sizes = {**SIZES, **decoder, **MORE.get(kind, {})}
    names = set(known.attribute_map)
    ids = {name for name in SIZES if name.endswith("token_id")}
    fitting = {
        k: v
        for k, v in sizes.items()
        if k not in names | WITHOUT.get(kind, set())
        and hasattr(known, k)
        and (k in ids or getattr(known, k) is not None)
    }
    config = CONFIG_MAPPING[kind](**{**fitting, **MORE.get(kind, {})})
    config.is_encoder_decoder = auto is AutoModelForSeq2SeqLM
    torch.manual_seed(0)
    model = auto.from_config(config).float()
    if auto is AutoModelForSeq2SeqLM:
        model.generation_config.decoder_start_token_id = PAD
        return EncoderDecoder(model, build_tokenizer(bos=False, append_eos=True), kind)
    return DecoderOnly(model, build_tokenizer(), kind)


@pytest.mark.parametrize(
    ("kind", "auto"),
    [(k, AutoModelForCausalLM) for k in [*CAUSAL, "gpt_neo"]]
    + [
        pytest.param(k, AutoModelForCausalLM, marks=pytest.mark.xfail(strict=True, reason="its own cache errs"))
        for k in OTHER_CACHE
    ]
    + [(k, AutoModelForSeq2SeqLM) for k in SEQ2SEQ],
)
def test_a_batch_gives_what_each_row_alone_gives(kind, auto, caplog, monkeypatch):
    llm = build(kind, auto)
    llm.require_generation(2)
    torch.manual_seed(2)
    visual_prompt = torch.randn(3, 4, llm.width, requires_grad=True)
    total = llm.loss(visual_prompt, PROMPTS, TARGETS).total
    total.backward()
    assert (visual_prompt.grad.abs().sum((1, 2)) > 0).all()
    rows = visual_prompt.detach().split(1)
    alone = sum(float(llm.loss(row, [p], [t]).total) for row, p, t in zip(rows, PROMPTS, TARGETS, strict=True))
    assert float(total.detach()) == pytest.approx(alone, rel=2e-3)
    for beams in (1, 3):
        settings = {"num_beams": beams, "max_new_tokens": 4, "min_new_tokens": 2}
        texts = llm.generate(visual_prompt, PROMPTS, **settings)
        assert texts == [llm.generate(row, [p], **settings)[0] for row, p in zip(rows, PROMPTS, strict=True)]
        asked = llm.generate(visual_prompt[:1].expand(3, -1, -1), PROMPTS, **settings)  # several texts behind one image
        assert asked == [llm.generate(rows[0], [p], **settings)[0] for p in PROMPTS]
        with monkeypatch.context() as patch:  # the same as with the cache that `generate` makes
            patch.setattr(type(llm), "_read_ahead", lambda *_: {})
            assert texts == llm.generate(visual_prompt, PROMPTS, **settings)
        if not llm.is_encoder_decoder:  # the same as without any cache
            rereads, llm._rereads = llm._rereads, True
            assert texts == llm.generate(visual_prompt, PROMPTS, **settings)
            llm._rereads = rereads
    if auto is AutoModelForCausalLM:
        assert caplog.text.count("row by row") == (kind in ROW_BY_ROW)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_serve_is_refused_in_words_before_training(kind):
    llm = build(kind, AutoModelForCausalLM)
    with pytest.raises(
        ValueError, match=rf"llm\.id='{kind}': .* does not serve behind a visual prompt: .*{REFUSED[kind]}"
    ):
        llm.require_generation(2)


def test_another_picture_changes_a_short_prompt_behind_a_long_one_as_it_does_alone():
    """A window of 16 and prompts of 1 and 18 tokens: the short one kept no picture where padding stood between."""
    llm = build("mistral", AutoModelForCausalLM)
    torch.manual_seed(3)
    first, other = torch.randn(2, 4, llm.width), torch.randn(2, 4, llm.width)
    inputs = [llm.start(VisualRows.of(v, None, 2, llm.width), [LONG, "red"]) for v in (first, other)]
    batch = [llm.next_logits(*given)[1] for given in inputs]
    last = [VisualRows.of(v[1:], None, 1, llm.width) for v in (first, other)]
    alone = [llm.next_logits(*llm.start(v, ["red"]))[0] for v in last]
    assert (alone[0] - alone[1]).abs().max() > 0.1
    torch.testing.assert_close(batch[0] - batch[1], alone[0] - alone[1], rtol=1e-3, atol=1e-3)


def test_a_search_without_a_cache_is_said_once(caplog):
    llm = build("jamba", AutoModelForCausalLM)
    with caplog.at_level(logging.WARNING, "qformer.language"):
        for _ in range(2):
            llm.generate(torch.randn(1, 4, llm.width), ["a"], num_beams=3, max_new_tokens=2)
    assert caplog.text.count("every token reads its row anew") == 1
