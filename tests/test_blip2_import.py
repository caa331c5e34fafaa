"""BLIP-2 and InstructBLIP of transformers come in to the digit: its own classes, tiny and random, against ours."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import BERT_VOCABULARY, LM_VOCABULARY, shake
from tokenizers import processors
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
    T5Config,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from qformer.build import build_stage2
from qformer.card import converted_card
from qformer.checkpoint import save_adapter
from qformer.config import LlmConfig, Stage2Config, Stage2Section, to_yaml
from qformer.config.schema import RunConfig, TrainConfig
from qformer.inference import VisionLanguageModel, load
from qformer.interop.blip2 import LAYOUTS, adapter_like, config_of, import_blip2
from qformer.interop.frozen import filled_adapter
from qformer.interop.keys import Imported
from qformer.models import TextTokens

SIDE, QUERIES, DEC = 28, 4, len(BERT_VOCABULARY)
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": 14, "layer_norm_eps": 1e-6, "initializer_range": 0.3,
}  # fmt: skip
QFORMER = {
    "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
    "max_position_embeddings": 20, "vocab_size": DEC + 1, "cross_attention_frequency": 2,
}  # fmt: skip
SIZES = {"vocab_size": len(LM_VOCABULARY) + 1, "pad_token_id": 0, "eos_token_id": 1}
DECODER = SIZES | {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip
T5 = SIZES | {
    "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0,
    "initializer_factor": 3.0,
}  # fmt: skip
LLMS = {
    "opt": OPTConfig(**DECODER, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32),
    "llama": LlamaConfig(**DECODER, intermediate_size=48, num_key_value_heads=1),
    "qwen": Qwen3Config(**DECODER, intermediate_size=48, num_key_value_heads=1, head_dim=16),
    "t5": T5Config(**T5),
    "flan_t5": T5Config(**T5, feed_forward_proj="gated-gelu", dense_act_fn="gelu"),
}
IMAGE_PROCESSOR = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
PROMPT, STOP = "what colour is the square ?", [1, LM_VOCABULARY["\n"]]
TEXTS = ["a red square on the left", "two blue dot", "the photo of a grey field"]


@dataclass(frozen=True)
class Arrived:
    """A model of transformers, the folder it was saved to, and what we made of that folder."""

    theirs: Any
    processor: Any
    folder: Path
    imported: Imported
    ours: VisionLanguageModel


def pictures(n: int = 2) -> list[Image.Image]:
    """Noise, oblong, so that resizing matters."""
    pixels = torch.randint(0, 256, (n, 40, 52, 3), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    return [Image.fromarray(p.numpy()) for p in pixels]


def write(folder: Path, model: Any, processor: Any, **options: Any) -> Any:
    shake(model)
    model.eval().save_pretrained(folder, **options)
    processor.save_pretrained(folder)
    return model


def arrive(folder: Path, model: Any, processor: Any) -> Arrived:
    model = write(folder / "theirs", model, processor)
    imported = import_blip2(str(folder / "theirs"))
    card = converted_card(imported.config, "transformers", "theirs", imported.report.lines("theirs"))
    save_adapter(folder / "adapter", filled_adapter(imported), to_yaml(imported.config), card)
    return Arrived(model, processor, folder / "theirs", imported, load(folder / "adapter", "cpu"))


def bert_tokenizer(tiny: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tiny.bert)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def llm_tokenizer(tiny: Any, kind: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tiny.t5 if "t5" in kind else tiny.opt)
    if kind == "qwen":  # adds nothing around a text
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    return tokenizer


def generator_of(tiny: Any, kind: str, instructed: bool = False) -> tuple[Any, Any]:
    parts = [IMAGE_PROCESSOR, llm_tokenizer(tiny, kind), *([bert_tokenizer(tiny)] if instructed else [])]
    processor = (InstructBlipProcessor if instructed else Blip2Processor)(*parts, num_query_tokens=QUERIES)
    config = (InstructBlipConfig if instructed else Blip2Config)(
        vision_config=VISION, qformer_config=QFORMER, text_config=LLMS[kind].to_dict(), num_query_tokens=QUERIES,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    torch.manual_seed(0)
    return (InstructBlipForConditionalGeneration if instructed else Blip2ForConditionalGeneration)(config), processor


@pytest.fixture(scope="module")
def retrieval(tiny, tmp_path_factory):
    processor = Blip2Processor(IMAGE_PROCESSOR, bert_tokenizer(tiny), num_query_tokens=QUERIES)
    torch.manual_seed(0)
    model = Blip2ForImageTextRetrieval(Blip2Config(
        vision_config=VISION, qformer_config=QFORMER | {"use_qformer_text_input": True}, num_query_tokens=QUERIES,
        image_text_hidden_size=24, image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    ))  # fmt: skip
    return arrive(tmp_path_factory.mktemp("retrieval"), model, processor)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape  # no broadcasting
    return (ours - theirs).abs().max().item()


def text_tokens() -> TextTokens:
    """Two texts of 6 and 4 tokens."""
    ids = torch.tensor([[2, 5, 9, 11, 6, 3], [2, 7, 8, 3, 0, 0]])
    return TextTokens(ids, ids != 0)


# Stage 1 and the Q-Former's attention patterns


@torch.no_grad()
def test_the_qformer_in_all_four_attention_patterns(retrieval):
    theirs, ours, text = retrieval.theirs, retrieval.ours.model.adapter.qformer, text_tokens()
    memory = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    images = ours.project_images(memory)
    queries = theirs.query_tokens.expand(2, -1, -1)

    def run(embeds: torch.Tensor, query_length: int, mask: torch.Tensor | None) -> torch.Tensor:
        seen = {"encoder_hidden_states": memory} if query_length else {}
        found = theirs.qformer(query_embeds=embeds, query_length=query_length, attention_mask=mask, **seen)
        return found.last_hidden_state

    alone = ours.query_pass(images)
    assert difference(alone.output, run(queries, QUERIES, None)) < 1e-5
    real, all_queries = text.mask, torch.ones(2, QUERIES, dtype=torch.bool)
    written = run(theirs.embeddings(text.ids), 0, real.long())
    assert difference(ours.text_pass(*text)[real], written[real]) < 1e-5
    joint = theirs.embeddings(text.ids, query_embeds=queries)
    matched = run(joint, QUERIES, torch.cat([all_queries, real], 1).long())
    assert difference(ours.matching_pass([images], *text), matched[:, :QUERIES]) < 1e-5
    mask = torch.ones(QUERIES + 6, QUERIES + 6).tril().bool()  # text after queries ...
    mask[:QUERIES, :QUERIES] = True  # ... and the queries see each other
    generated = run(joint, QUERIES, (mask & torch.cat([all_queries, real], 1)[:, None, None, :]))
    assert difference(ours.causal_pass(*text, alone)[real], generated[:, QUERIES:][real]) < 1e-5


@torch.no_grad()
def test_retrieval_gives_the_same_similarities_and_matching_logits(retrieval):
    images, ours = pictures(3), retrieval.ours
    inputs = retrieval.processor(images, TEXTS, return_tensors="pt", padding=True)
    itc = retrieval.theirs(**inputs).logits_per_image
    similarity = torch.einsum("iqe,te->iqt", ours.embed_image(images), ours.embed_text(TEXTS)).amax(1)
    assert difference(similarity, itc) < 1e-5
    assert itc.std() > 0.01
    itm = retrieval.theirs(**inputs, use_image_text_matching_head=True).logits_per_image
    adapter = ours.model.adapter
    logits = adapter.match([adapter.project_images(*ours.encode(images))], *ours.model.tokenize(TEXTS))
    assert difference(logits, itm) < 1e-5
    assert difference(ours.match(images, TEXTS), itm.softmax(1)[:, 1]) < 1e-5


def test_retrieval_has_no_language_head_and_no_temperature(retrieval):
    config, tensors, report = retrieval.imported
    lm = ["lm_transform.weight", "lm_transform.bias", "lm_norm.weight", "lm_norm.bias", "lm_bias"]
    words = "qformer.word_embeddings.weight"
    assert sorted(report.new) == sorted(["temperature", *lm])
    assert tensors["temperature"].item() == pytest.approx(0.07)
    assert len(tensors[words]) == len(tensors["lm_bias"]) == config.qformer.vocab_size == DEC + 1
    assert torch.equal(tensors[words], retrieval.theirs.embeddings.word_embeddings.weight)
    assert config.qformer.tokenizer == config.encoder.id == str(retrieval.folder)
    assert {"the frozen encoder stays in its checkpoint"} == set(report.dropped.values())


def test_a_logit_scale_becomes_the_temperature(retrieval, tmp_path):
    folder = copy_of(retrieval.folder, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"logit_scale": torch.tensor(3.0)}, folder / "model.safetensors", {"format": "pt"})
    imported = import_blip2(str(folder))
    assert imported.tensors["temperature"].item() == pytest.approx(0.0497871)
    assert "temperature" in imported.report.mapped
    assert "temperature" not in imported.report.new
    assert "logit_scale" not in imported.report.dropped


# Stage 2


def test_stage_2_with_a_language_model_of_choice_starts_from_an_imported_stage_1(retrieval, tiny):
    given = retrieval.imported.config
    start, llm = Stage2Section(init_from=str(retrieval.folder.parent / "adapter")), LlmConfig(id=tiny.opt)
    run = {"run": RunConfig("unused"), "train": TrainConfig(1, global_batch_size=1, micro_batch_size=1)}
    config = Stage2Config(encoder=given.encoder, qformer=given.qformer, llm=llm, stage2=start, **run)
    model = build_stage2(config)
    assert model.transferred.new == ["language_projection.weight", "language_projection.bias"]
    assert torch.equal(model.adapter.qformer.query_tokens, retrieval.theirs.query_tokens)
    assert torch.equal(model.adapter.feature_norm.bias, retrieval.theirs.vision_model.post_layernorm.bias)


def check_logits(arrived: Arrived) -> None:
    """The visual prompt, and the logits after it and a text prompt."""
    images, model, theirs = pictures(), arrived.ours.model, arrived.theirs
    inputs = arrived.processor(images, [PROMPT] * 2, return_tensors="pt")
    decoder = {"decoder_input_ids": torch.tensor([[0, 5, 6]] * 2)} if model.llm.is_encoder_decoder else {}
    instruction = {k: v for k, v in inputs.items() if k.startswith("qformer")}
    with torch.no_grad():
        expected = theirs.get_image_features(inputs["pixel_values"], **instruction).pooler_output
        visual_prompt = model.visual_prompt(arrived.ours.encode(images), [PROMPT] * 2)
        assert difference(visual_prompt, expected) < 1e-4
        text = model.llm.embed(inputs["input_ids"][:, QUERIES:])
        logits = model.llm.model(inputs_embeds=torch.cat([visual_prompt, text], 1), **decoder).logits
        their_logits = theirs(**inputs, **decoder).logits
    assert difference(logits, their_logits) < 1e-4
    assert difference(their_logits[0], their_logits[1]) > 0.1  # the pictures are seen


def check_generation(arrived: Arrived, num_beams: int) -> None:
    images = pictures()
    settings = {"num_beams": num_beams, "min_new_tokens": 6, "max_new_tokens": 9}
    expected = their_texts(arrived, images, **settings)
    print(expected)
    assert arrived.ours.caption(images, PROMPT, **settings) == expected
    assert max(len(text.split()) for text in expected) > 3


def their_texts(arrived: Arrived, images: list[Image.Image], **settings: Any) -> list[str]:
    inputs = arrived.processor(images, [PROMPT] * len(images), return_tensors="pt")
    ids = arrived.theirs.generate(**inputs, do_sample=False, eos_token_id=STOP, pad_token_id=0, **settings)
    start = 0 if arrived.theirs.config.text_config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return [text.strip() for text in arrived.processor.batch_decode(ids[:, start:], skip_special_tokens=True)]


@pytest.mark.parametrize("kind", LLMS)
def test_generation_with_any_language_model(tiny, tmp_path, kind):
    arrived = arrive(tmp_path, *generator_of(tiny, kind))
    check_logits(arrived)
    check_generation(arrived, num_beams=1)
    check_generation(arrived, num_beams=5)
    config = arrived.imported.config
    assert (config.encoder.block, config.encoder.id, config.llm.id) == (-1, *[str(arrived.folder)] * 2)
    assert config.qformer.feature_norm_eps == 1e-6
    assert config.llm.activation == ("gelu" if kind == "flan_t5" else None)
    assert not config.stage2.instructed
    assert arrived.imported.report.new == []


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_instructblip(tiny, tmp_path, kind):
    arrived = arrive(tmp_path, *generator_of(tiny, kind, instructed=True))
    check_logits(arrived)
    check_generation(arrived, num_beams=1)
    check_generation(arrived, num_beams=5)
    config = arrived.imported.config
    assert config.stage2.instructed
    assert config.qformer.tokenizer == str(arrived.folder / "qformer_tokenizer")
    assert arrived.imported.report.new == []


# What is read, and what is covered


def test_only_the_shards_of_the_adapter_are_read(tiny, tmp_path):
    model, processor = generator_of(tiny, "opt")
    write(tmp_path, model, processor, max_shard_size="12KB")
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    adapter = {file for name, file in places.items() if not name.startswith(("language_model.", "vision_model."))}
    norm = {file for name, file in places.items() if "post_layernorm" in name}
    frozen = set(places.values()) - adapter - norm
    assert frozen
    for file in frozen:
        (tmp_path / file).write_bytes(b"not to be opened")
    imported = import_blip2(str(tmp_path))
    assert torch.equal(imported.tensors["language_projection.bias"], model.language_projection.bias)
    (tmp_path / sorted(frozen)[0]).unlink()
    with pytest.raises(ValueError, match=f"lacks {sorted(frozen)[0]}, which its index names; download it again$"):
        import_blip2(str(tmp_path))


FULL_SIZE: dict[str, tuple[Any, Any, list[str]]] = {
    "generation": (Blip2ForConditionalGeneration, Blip2Config(), []),
    "retrieval": (
        Blip2ForImageTextRetrieval,
        Blip2Config(qformer_config={"use_qformer_text_input": True, "vocab_size": 30523}),
        ["temperature", "lm_bias", "lm_transform.weight", "lm_transform.bias", "lm_norm.weight", "lm_norm.bias"],
    ),
    "instructed": (InstructBlipForConditionalGeneration, InstructBlipConfig(), []),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_tensor_of_the_full_size_adapters_has_its_place(name):
    architecture, theirs, new = FULL_SIZE[name]
    with torch.device("meta"):
        state = architecture(theirs).state_dict()
    frozen = ("vision_model.embeddings.", "vision_model.encoder.", "language_model.")
    expected = {key for key in state if not key.startswith(frozen)}
    layout = LAYOUTS[theirs.model_type]
    own = adapter_like(config_of(theirs, "x/y", name == "retrieval"), theirs).state_dict()
    _, report = layout.take(own, state, "x/y", may_be_new=new)
    assert sorted(report.new) == sorted(new)
    assert {layout.theirs(ours) for ours in report.mapped} == expected
    assert set(report.dropped) == set(state) - expected
    assert len(report.mapped) == len(expected) == len(own) - len(new)  # no two of ours from one of theirs


# Bad input: one line each


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (config[section] if section else config)[name] = value
    (folder / "config.json").write_text(json.dumps(config))


def refused(source: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        import_blip2(str(source))
    assert "\n" not in str(error.value)


def test_what_is_no_checkpoint_is_refused(tiny, tmp_path):
    refused(tmp_path, "has no config.json; expected what save_pretrained")
    refused(tiny.opt, r"is a 'opt' \(OPTForCausalLM\), expected model_type 'blip-2' or 'instructblip'")
    refused(tmp_path / "nowhere", "does not exist; expected a folder")
    refused(f"{tiny.opt}/config.json", "is a file; expected a folder")
    refused("nobody/nothing", "no hub id that can be reached or is in the cache")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "its config.json cannot be read")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_query_tokens": QUERIES + 1}, r"fits: query_tokens is \[1, 4, 48\], expected \[1, 5, 48\]$"),
        ({"qformer_config__num_hidden_layers": 4}, r"fits: lacks qformer.encoder.layer.3.attention.*and \d+ more$"),
        ({"qformer_config__num_hidden_layers": 2}, r"fits: has the unknown qformer.encoder.layer.2.* and \d+ more$"),
        ({"qformer_config__hidden_act": "relu"}, "qformer_config.hidden_act is 'relu', but .* always has 'gelu'"),
        ({"qformer_config__layer_norm_eps": 1e-6}, "qformer_config.layer_norm_eps is 1e-06, but .* always has 1e-12"),
        ({"qformer_config__position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"num_query_tokens": "four"}, "its config.json cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused(retrieval, tmp_path, changes, message):
    folder = copy_of(retrieval.folder, tmp_path)
    edit_config(folder, **changes)
    refused(folder, message)


def test_damaged_weights_are_refused(retrieval, tmp_path):
    folder = copy_of(retrieval.folder, tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(folder, "cannot be read as safetensors .* damaged or incomplete")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "is no index of safetensors")
    (folder / "model.safetensors.index.json").unlink()
    weights.rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin is no file of PyTorch, or a damaged one; expected what save_pretrained")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "has no model.safetensors and no pytorch_model.bin; expected the weights in one of them")


def test_a_model_without_either_head_is_refused(retrieval, tmp_path):
    folder = copy_of(retrieval.folder, tmp_path)
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("itm_head")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, r"holds Blip2ForImageTextRetrieval, with neither language_projection nor itm_head")
