"""Frozen parts out of a whole BLIP-2 or InstructBLIP of transformers: the same numbers, and nothing of the rest."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import IMAGE_SIDE, LM_VOCABULARY, WIDTH, Tiny, shake
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    PretrainedConfig,
)

from qformer.config import EncoderConfig
from qformer.encoders import load_encoder
from qformer.language import EncoderDecoder, load_language_model

ROWS = len(LM_VOCABULARY) + 6  # more rows than the tokenizer has tokens, as in OPT
VISION = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": IMAGE_SIDE, "patch_size": 16, "initializer_range": 0.1}  # fmt: skip
QFORMER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
           "vocab_size": 50}  # fmt: skip
T5 = {"model_type": "t5", "vocab_size": ROWS, "d_model": WIDTH, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2,
      "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {
    "opt": {"model_type": "opt", "vocab_size": ROWS, "hidden_size": WIDTH, "ffn_dim": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 64, "word_embed_proj_dim": WIDTH},
    "llama": {"model_type": "llama", "vocab_size": ROWS, "hidden_size": WIDTH, "intermediate_size": 48,
              "num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": False},
    "t5": T5,
    "untied_t5": {**T5, "tie_word_embeddings": False},
}  # fmt: skip
each_text = pytest.mark.parametrize("text", TEXT)


def save_whole(tiny: Tiny, folder: Path, text: str, config_class: type[PretrainedConfig] = Blip2Config) -> Any:
    """A whole checkpoint in `folder`, with a processor's files, as a user has it; returns the model."""
    model_class: Any = {
        Blip2Config: Blip2ForConditionalGeneration,
        InstructBlipConfig: InstructBlipForConditionalGeneration,
    }
    config = config_class(vision_config=VISION, qformer_config=QFORMER, text_config=TEXT[text], num_query_tokens=4)
    torch.manual_seed(0)
    whole = model_class[config_class](config).eval()
    if text == "untied_t5":  # transformers ties whatever it builds; a checkpoint with two matrices keeps two
        whole.language_model.lm_head.weight = nn.Parameter(torch.randn(ROWS, WIDTH))
    shake(whole)
    whole.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny.t5 if "t5" in text else tiny.opt)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    image_processor = {"image_processor_type": "BlipImageProcessor", "size": {"height": IMAGE_SIDE, "width": IMAGE_SIDE},
                       "image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3], "resample": 3}  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": image_processor}))
    return whole


@torch.no_grad()
@each_text
def test_the_language_model_is_the_whole_models_own(tiny, tmp_path, text, capfd, caplog):
    whole = save_whole(tiny, tmp_path, text)
    caplog.clear()
    lm = load_language_model(str(tmp_path))
    said = capfd.readouterr().err + caplog.text
    assert "UNEXPECTED" not in said, "the report on the other parts says nothing"
    assert "not sharded" not in said, "transformers checks its plan for several GPUs where its log is made quieter"
    inputs: dict[str, Any] = {"inputs_embeds": torch.randn(2, 5, WIDTH)}
    if isinstance(lm, EncoderDecoder):
        inputs["decoder_input_ids"] = torch.tensor([[0, 3], [0, 4]])
    assert torch.equal(lm.model(**inputs).logits, whole.language_model(**inputs).logits)
    assert lm.model.state_dict().keys() == whole.language_model.state_dict().keys()
    tied = lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight
    assert tied is (text in ("opt", "t5"))
    assert lm.vocab_size == ROWS
    assert lm.facts.bos_ids == ([] if "t5" in text else [LM_VOCABULARY["</s>"]])
    assert lm.generate(torch.randn(1, 4, WIDTH), ["a red square"], max_new_tokens=3)


@torch.no_grad()
@pytest.mark.parametrize("config_class", [Blip2Config, InstructBlipConfig])
def test_the_encoder_is_the_whole_models_own_before_its_last_norm(tiny, tmp_path, config_class, capfd):
    whole = save_whole(tiny, tmp_path, "opt", config_class)
    encoder = load_encoder(EncoderConfig("transformers", str(tmp_path), block=-1))
    assert "UNEXPECTED" not in capfd.readouterr().err
    pixels = torch.randn(2, 3, IMAGE_SIDE, IMAGE_SIDE)
    tokens = encoder(pixels).tokens
    expected = whole.vision_model(pixels).last_hidden_state
    assert torch.equal(whole.vision_model.post_layernorm(tokens), expected)
    assert (tokens - expected).abs().max() > 0.1
    given = encoder.input_transform
    assert given is not None
    assert (given.size, given.mean, given.std) == (IMAGE_SIDE, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert (tuple(processor.image_mean), processor.size["height"]) == (given.mean, given.size)


def test_the_other_parts_are_neither_needed_nor_read(tiny, tmp_path):
    save_whole(tiny, tmp_path, "opt")
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    for part, load in (
        ("vision_model", lambda: load_encoder(EncoderConfig("transformers", str(tmp_path)))),
        ("language_model", lambda: load_language_model(str(tmp_path))),
    ):
        stubs = {k: t if k.startswith(f"{part}.") else torch.zeros(1) for k, t in tensors.items()}
        save_file(stubs, weights, metadata={"format": "pt"})
        load()
        save_file({k: t for k, t in stubs.items() if k.startswith(f"{part}.")}, weights, metadata={"format": "pt"})
        load()


def test_a_part_that_is_missing_or_damaged_is_said(tiny, tmp_path):
    save_whole(tiny, tmp_path, "opt")
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    gone = ("vision_model.encoder.layers.1.mlp.fc1.bias", "language_model.model.decoder.layers.0.fc2.bias")
    save_file({k: t for k, t in tensors.items() if k not in gone}, weights, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"encoder.id '.*lack 1 tensors of Blip2VisionModel: encoder.layers.1.mlp.fc1.b"
    ):
        load_encoder(EncoderConfig("transformers", str(tmp_path)))
    with pytest.raises(
        ValueError, match=r"llm.id='.*lack 1 tensors of OPTForCausalLM: model.decoder.layers.0.fc2.bias"
    ):
        load_language_model(str(tmp_path))
    weights.write_bytes(weights.read_bytes()[:5000])
    for load, key in (
        (load_language_model, "llm.id"),
        (lambda f: load_encoder(EncoderConfig("transformers", f)), "encoder.id"),
    ):
        with pytest.raises(ValueError, match=rf"{key}.*[Hh]eader"):
            load(str(tmp_path))


def test_a_checkpoint_for_retrieval_has_an_encoder_and_no_language_model(tmp_path):
    config = Blip2Config(
        vision_config=VISION, qformer_config=QFORMER | {"use_qformer_text_input": True}, text_config=TEXT["opt"],
        image_text_hidden_size=16,
    )  # fmt: skip
    Blip2ForImageTextRetrieval(config).save_pretrained(tmp_path)
    assert load_encoder(EncoderConfig("transformers", str(tmp_path), block=-1)).width == WIDTH
    with pytest.raises(ValueError, match=r"llm.id="):
        load_language_model(str(tmp_path))


def test_the_start_of_the_decoder_comes_from_the_language_models_config(tiny, tmp_path):
    save_whole(tiny, tmp_path, "t5")
    (tmp_path / "generation_config.json").write_text("{}")
    assert load_language_model(str(tmp_path)).generate(torch.randn(1, 4, WIDTH), [""], max_new_tokens=2)


@torch.no_grad()
def test_activation_overrides_t5s_own_and_is_refused_elsewhere(tiny, tmp_path):
    whole = save_whole(tiny, tmp_path, "t5")
    inputs = {"inputs_embeds": 3 * torch.randn(2, 5, WIDTH), "decoder_input_ids": torch.tensor([[0, 3], [0, 4]])}
    own = whole.language_model(**inputs).logits
    for block in (*whole.language_model.encoder.block, *whole.language_model.decoder.block):
        block.layer[-1].DenseReluDense.act = nn.GELU()
    exact = whole.language_model(**inputs).logits
    assert torch.equal(load_language_model(str(tmp_path)).model(**inputs).logits, own)
    torch.testing.assert_close(load_language_model(str(tmp_path), activation="gelu").model(**inputs).logits, exact)
    assert (exact - own).abs().max() > 1e-5
    assert load_language_model(tiny.t5, activation="gelu", random_weights=True).model.config.dense_act_fn == "gelu"
    with pytest.raises(ValueError, match=r"llm.activation='gelu': llm.id='.*' is a opt, which has no dense_act_fn"):
        load_language_model(tiny.opt, activation="gelu")
    with pytest.raises(ValueError, match=r"llm.activation='gelo' is no activation of transformers; nearest are .*gelu"):
        load_language_model(tiny.t5, activation="gelo")


def test_random_weights_need_only_the_config_of_the_whole(tiny, tmp_path):
    save_whole(tiny, tmp_path, "untied_t5")
    (tmp_path / "model.safetensors").unlink()
    assert load_language_model(str(tmp_path), random_weights=True).width == WIDTH
    assert load_encoder(EncoderConfig("transformers", str(tmp_path), random_weights=True)).num_tokens == 5
