"""Adapters leave for transformers and compute the same there: tiny random models of the real classes on both sides."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import IMAGE_SIDE, LM_VOCABULARY, shake
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Blip2ForImageTextRetrieval,
    Blip2VisionConfig,
    Blip2VisionModel,
)

from qformer.build import build_stage1, build_stage2
from qformer.checkpoint import save_adapter
from qformer.config import EncoderConfig, Stage1Config, Stage2Config, load_config, only_model, to_yaml
from qformer.encoders import Features, load_encoder
from qformer.inference import VisionLanguageModel, load
from qformer.interop import export as interop_export
from qformer.interop import vision
from qformer.interop.export import export
from qformer.interop.keys import BLIP2
from qformer.interop.parity import in_float32
from qformer.interop.vision import DoesNotFit, to_blip2_vision

SIDE = IMAGE_SIDE
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": 16, "layer_norm_eps": 1e-6,
}  # fmt: skip
PROCESSOR = {
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.25],
    "resample": 3,
    "size": {"height": SIDE, "width": SIDE},
}
SETTINGS = ["qformer.layers=3", "qformer.feature_norm_eps=1e-6"]  # the eps of the encoders above
CAPTIONS = ["llm.caption_max_new_tokens=6", "llm.caption_min_new_tokens=2"]


def picture(seed: int = 0, width: int = 45, height: int = 38) -> Image.Image:
    """Random pixels, of a size that has to be resized."""
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


# Frozen encoders, saved as users have them: the arguments of load_encoder


def of_transformers(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**VISION | changes)
    model = getattr(transformers, f"{name}Model")(config)
    shake(model)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return {"loader": "transformers", "id": str(folder)}


def of_timm(folder: Path, name: str, pool: str = "token") -> dict[str, Any]:
    import open_clip

    folder.mkdir(parents=True)
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    tower = {"image_size": 28, "timm_model_name": name, "timm_pool": pool, "timm_proj": "linear"}
    model_cfg = {"embed_dim": 16, "vision_cfg": tower, "text_cfg": text, "custom_text": True}
    preprocess_cfg = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "size": 28}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    shake(model)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return {"loader": "open_clip", "id": f"local-dir:{folder}"}


@pytest.fixture
def small_eva(monkeypatch):
    """timm's EVA-CLIP-g with the sizes of a toy: the name that EVA01-g-14 of open_clip builds."""

    def build(pretrained: bool = False, **kwargs: Any) -> Any:
        sizes = {"patch_size": 14, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 1.5, "img_size": 28}
        return timm.models.eva._create_eva("eva_giant_patch14_224", pretrained=pretrained, **kwargs | sizes)

    monkeypatch.setitem(timm.models._registry._model_entrypoints, "eva_giant_patch14_224", build)
    return "eva_giant_patch14_224"


def check_conversion(arguments: dict[str, Any], tolerance: float = 2e-6, **more: Any) -> None:
    encoder = load_encoder(EncoderConfig(**arguments | more))
    config, tensors = to_blip2_vision(encoder)
    theirs = Blip2VisionModel(Blip2VisionConfig(**config)).eval()
    shake(theirs.post_layernorm)
    norm = {f"post_layernorm.{name}": value for name, value in theirs.post_layernorm.state_dict().items()}
    theirs.load_state_dict(tensors | norm)
    side = encoder.input_transform.size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = theirs.post_layernorm(encoder(pixels).tokens)
        far = (theirs(pixels).last_hidden_state - ours).abs().max()
    assert far < tolerance, far
    assert ours.std() > 0.1


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ViT", {}),
        ("ViT", {"qkv_bias": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
        ("Dinov2", {"mlp_ratio": 2, "layerscale_value": 0.7}),
        ("Blip2Vision", {}),
    ],
)
@pytest.mark.parametrize("more", [{}, {"block": -1, "image_size": 48}])
def test_a_vision_transformer_of_transformers_is_converted(tmp_path, name, changes, more):
    check_conversion(of_transformers(tmp_path, name, **changes), **more)


def test_eva_of_open_clip_is_converted(tmp_path, small_eva):
    check_conversion(of_timm(tmp_path / "eva", small_eva))


def test_a_vision_transformer_of_timm_is_converted(tmp_path):
    check_conversion(of_timm(tmp_path / "vit", "test_vit"), image_size=48)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("CLIPVision", {}, "has a norm before its blocks"),
        ("SiglipVision", {}, "has no class token"),
        ("Dinov2WithRegisters", {"mlp_ratio": 2}, "has register tokens"),
        ("DINOv3ViT", {}, "has rotary positions"),
        ("Dinov2", {"use_swiglu_ffn": True}, "has no encoder.layer.0.mlp.fc1.weight, which Blip2VisionModel needs"),
    ],
)
def test_an_encoder_that_does_not_fit_says_why(tmp_path, name, changes, reason):
    encoder = load_encoder(EncoderConfig(**of_transformers(tmp_path, name, **changes)))
    with pytest.raises(DoesNotFit, match=f"^{re.escape(reason)}"):
        to_blip2_vision(encoder)


@pytest.mark.parametrize(
    ("name", "pool", "reason"),
    [("eva02_tiny_patch14_224", "token", "has rotary positions"), ("test_vit3", "map", "has no cls_token")],
)
def test_towers_of_timm_that_do_not_fit_say_why(tmp_path, name, pool, reason):
    encoder = load_encoder(EncoderConfig(**of_timm(tmp_path / "timm", name, pool), image_size=28))
    with pytest.raises(DoesNotFit, match=f"^{reason}"):
        to_blip2_vision(encoder)


# Whole models


def opt_without_room(folder: Path, tiny) -> str:
    """Tied embeddings with one row a token: `<image>` needs another."""
    config = transformers.AutoConfig.from_pretrained(tiny.opt)
    config.vocab_size = len(LM_VOCABULARY)
    torch.manual_seed(5)
    transformers.OPTForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny.opt).save_pretrained(folder)
    return str(folder)


def llama(folder: Path, tiny) -> str:
    """Untied, no row to spare, and a tokenizer with an image token, a pad token missing."""
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(LM_VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, bos_token_id=1, eos_token_id=1,
    ))  # fmt: skip
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny.opt, image_token="square")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).image_token == "square"
    return str(folder)


LLMS = {
    "opt": lambda folder, tiny: tiny.opt,
    "opt_without_room": opt_without_room,
    "llama": llama,
    "t5": lambda folder, tiny: tiny.t5,
}


def trained(folder: Path, tiny, stage: int, encoder: dict[str, Any], *more: str) -> VisionLanguageModel:
    """An adapter with random values everywhere, saved and loaded as a trained one."""
    choices = [f"encoder.{key}={value}" for key, value in encoder.items()]
    model: Any
    if stage == 1:
        config: Any = load_config(Stage1Config, tiny.stage1(folder, *choices, *SETTINGS, *more))
        model = build_stage1(only_model(config))
    else:
        config = load_config(Stage2Config, tiny.stage2(folder, *choices, *SETTINGS, *CAPTIONS, *more))
        model = build_stage2(only_model(config))
    shake(model.adapter, seed=7, by=0.2)
    save_adapter(folder / "adapter", model.adapter, to_yaml(config), "a card")
    return load(folder / "adapter", device="cpu")


def run_card(out: Path, monkeypatch, features: torch.Tensor | None = None) -> tuple[str, dict[str, Any]]:
    """Run the code of OUT/README.md, on given features in place of its random ones; what it printed, its variables."""
    (code, *_) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    code = re.sub(r"torch\.randn\(.*?\)", "given", code)
    picture().save(out / "picture.png")
    monkeypatch.chdir(out)
    printed, names = io.StringIO(), dict[str, Any](given=features)
    with contextlib.redirect_stdout(printed), torch.no_grad():
        exec(code, names)
    (out / "picture.png").unlink()
    return printed.getvalue().strip(), names


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return of_transformers(tmp_path_factory.mktemp("vit"), "ViT") | {"block": -2}


@pytest.mark.parametrize("name", LLMS)
def test_a_whole_model_says_in_transformers_what_it_says_here(tiny, vit, tmp_path, monkeypatch, name):
    ours = trained(tmp_path, tiny, 2, vit, f"llm.id={LLMS[name](tmp_path / 'llm', tiny)}")
    out = tmp_path / "out"
    report = export(ours.model, ours.config, out)
    assert report.architecture == "Blip2ForConditionalGeneration"
    assert "fits Blip2VisionModel" in report.why
    assert set(report.differences) == {"visual prompt", "logits"}
    assert max(report.differences.values()) < 1e-5
    assert not report.keys.dropped

    said, names = run_card(out, monkeypatch)
    assert said == ours.caption([picture()])[0]
    assert len(said) > 3
    processor, model = names["processor"], names["model"]

    questions = ["what colour is the square?", "red ?"]  # of different lengths: the shorter one is padded
    prompts = [ours.vqa_prompt.format(q) for q in questions]
    inputs = processor(images=[picture(), picture(1)], text=prompts, padding=True, return_tensors="pt")
    for settings in ({"num_beams": 1}, {"num_beams": 5, "length_penalty": -1.0}):
        ids = model.generate(**inputs, max_new_tokens=5, **settings)
        ids = ids if name == "t5" else ids[:, inputs["input_ids"].shape[1] :]
        said = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
        assert said == ours.answer([picture(), picture(1)], questions, max_new_tokens=5, **settings)

    # What vLLM asks of the folder.
    config = json.loads((out / "config.json").read_text())
    saved = load_file(out / "model.safetensors")
    kept = (
        "vision_model",
        "query_tokens",
        "qformer.layernorm",
        "qformer.encoder",
        "language_projection",
        "language_model",
    )
    assert all(key.startswith(kept) for key in saved)
    assert not [key for key in saved if re.search(r"layer\.\d\.(intermediate|output)\.", key)]
    assert config["architectures"] == ["Blip2ForConditionalGeneration"]
    assert config["text_config"]["architectures"] == [type(ours.model.llm.model).__name__]
    image_id = AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<image>")
    assert config["image_token_index"] == image_id < model.get_input_embeddings().num_embeddings
    assert model.get_input_embeddings().num_embeddings == config["text_config"]["vocab_size"]
    assert config["vision_config"]["num_hidden_layers"] == 2  # up to the tapped block of three
    assert (out / "preprocessor_config.json").is_file()
    assert processor.tokenizer.padding_side == ("right" if name == "t5" else "left")


def test_an_instructed_model_says_in_transformers_what_it_says_here(tiny, vit, tmp_path, monkeypatch):
    ours = trained(tmp_path, tiny, 2, vit, f"llm.id={tiny.t5}", "stage2.instructed=true", "llm.prompt=a photo of")
    report = export(ours.model, ours.config, tmp_path / "out", picture(3))
    assert report.architecture == "InstructBlipForConditionalGeneration"
    assert max(report.differences.values()) < 1e-5
    assert (tmp_path / "out" / "qformer_tokenizer" / "tokenizer_config.json").is_file()
    said, names = run_card(tmp_path / "out", monkeypatch)
    assert said == ours.caption([picture()])[0]
    prompt = ours.vqa_prompt.format("what colour is the square?")
    inputs = names["processor"](images=picture(), text=prompt, return_tensors="pt")
    ids = names["model"].generate(**inputs, max_new_tokens=5)
    said = names["processor"].batch_decode(ids, skip_special_tokens=True)[0].strip()
    settings = {"num_beams": 1, "max_new_tokens": 5}
    assert said == ours.answer([picture()], ["what colour is the square?"], **settings)[0]


def test_stage_1_ranks_in_transformers_as_it_does_here(tiny, vit, tmp_path, monkeypatch):
    ours = trained(tmp_path, tiny, 1, vit)
    out = tmp_path / "out"
    report = export(ours.model, ours.config, out)
    assert report.architecture == "Blip2ForImageTextRetrieval"
    assert max(report.differences.values()) < 1e-5
    assert {name.split(".")[0].split("_")[0] for name in report.keys.dropped} == {"lm", "temperature"}

    processor = AutoProcessor.from_pretrained(out, backend="pil")
    model = Blip2ForImageTextRetrieval.from_pretrained(out).eval()
    pictures, texts = [picture(i) for i in range(3)], ["a red square", "a photo of one blue dot on the left", "grey"]
    inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        similarity = model(**inputs).logits_per_image
        matching = model(**inputs, use_image_text_matching_head=True).logits_per_image
    expected = (ours.embed_image(pictures) @ ours.embed_text(texts).T).amax(1)
    assert (similarity - expected).abs().max() < 1e-5
    assert (matching.softmax(1)[:, 1] - ours.match(pictures, texts)).abs().max() < 1e-5
    assert similarity.std() > 1e-3
    printed, _ = run_card(out, monkeypatch)
    assert printed.startswith("tensor(")


@pytest.mark.parametrize("stage", [1, 2])
def test_out_and_in_and_out_again_is_the_same_bit_for_bit(tiny, vit, tmp_path, stage):
    from qformer.interop.blip2 import import_blip2

    ours = trained(tmp_path, tiny, stage, vit)
    out, again = tmp_path / "out", tmp_path / "again"
    dropped = export(ours.model, ours.config, out).keys.dropped
    imported = import_blip2(str(out))
    before = ours.model.adapter.state_dict()
    assert set(imported.tensors) == set(before)
    for name in before.keys() - dropped.keys():
        assert torch.equal(imported.tensors[name], before[name]), name

    save_adapter(tmp_path / "imported", _Held(imported.tensors), to_yaml(imported.config), "a card")
    back = load(tmp_path / "imported", device="cpu")
    export(back.model, back.config, again)
    first, second = load_file(out / "model.safetensors"), load_file(again / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    if stage == 2:
        settings = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 2}
        assert back.caption([picture()], "a photo of", **settings) == ours.caption(
            [picture()], "a photo of", **settings
        )


class _Held(torch.nn.Module):
    """Imported tensors where an adapter is expected."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.tensors


def test_half_precision_is_stored_as_it_is_and_compared_in_float32(tiny, tmp_path):
    vit = of_transformers(tmp_path / "vit", "ViT") | {"block": -1, "dtype": "float16"}
    ours = trained(tmp_path, tiny, 2, vit, f"llm.id={tiny.opt}", "llm.dtype=bfloat16")
    frozen = {name: value.clone() for name, value in ours.model.llm.model.state_dict().items()}
    report = export(ours.model, ours.config, tmp_path / "out")
    assert max(report.differences.values()) < 1e-5
    after = ours.model.llm.model.state_dict()
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, after[name]) for name, value in frozen.items())
    saved = load_file(tmp_path / "out" / "model.safetensors")
    kinds = {"vision_model.encoder": torch.float16, "language_model": torch.bfloat16, "qformer": torch.float32}
    for prefix, dtype in kinds.items():
        assert {value.dtype for name, value in saved.items() if name.startswith(prefix)} == {dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_in_float32_goes_back_when_something_fails():
    linear = torch.nn.Linear(2, 2).half()
    with contextlib.suppress(KeyError), in_float32(linear):
        assert linear.weight.dtype == torch.float32
        raise KeyError
    assert linear.weight.dtype == torch.float16


# The Q-Former alone


def parts(tmp_path: Path, tiny) -> dict[str, tuple[dict[str, Any], str]]:
    return {
        "open_clip": ({}, "has a norm before its blocks"),
        "siglip": (of_transformers(tmp_path / "siglip", "SiglipVision"), "has no class token"),
        "features": ({"loader": "features", "id": "''", "width": 24}, "is not there: the features are precomputed"),
    }


@pytest.mark.parametrize(
    ("name", "stage"),
    [("siglip", "2"), *((name, stage) for name in ("open_clip", "features") for stage in ("1", "2", "instructed"))],
)
def test_where_the_encoder_does_not_fit_the_qformer_leaves_alone(tiny, tmp_path, monkeypatch, name, stage):
    encoder, reason = parts(tmp_path, tiny)[name]
    more = ["stage2.instructed=true", "llm.prompt=a photo of"] if stage == "instructed" else []
    ours = trained(tmp_path, tiny, 1 if stage == "1" else 2, encoder, *more)
    out = tmp_path / "out"
    report = export(ours.model, ours.config, out)
    assert report.architecture == "Blip2QFormerModel"
    assert report.why.startswith("the Q-Former alone, because")
    assert reason in report.why
    assert set(report.differences) == ({"similarity", "matching logits"} if stage == "1" else {"visual prompt"})
    assert max(report.differences.values()) < 1e-5

    raw = torch.randn(1, 9, ours.model.encoder.width)
    _, names = run_card(out, monkeypatch, raw)
    adapter = ours.model.adapter
    with torch.no_grad():
        if stage == "1":
            queries = adapter.qformer.query_pass(adapter.project_images(raw, None)).output
            assert (names["image_embeds"] - adapter.image_projection(queries)).abs().max() < 1e-5
        else:
            expected = ours.model.visual_prompt(Features(raw, None), ["a photo of"])
            assert (names["visual_prompt"] - expected).abs().max() < 1e-5
            assert expected.std() > 0.1
    lines = (out / "README.md").read_text().split("```")[1].strip().splitlines()[1:]
    assert len([line for line in lines if line and "import" not in line]) <= 10


def test_a_language_model_that_does_not_fit_sends_the_qformer_alone(tiny, vit, tmp_path):
    config = transformers.AutoConfig.from_pretrained(tiny.opt)
    config.word_embed_proj_dim = 16  # as opt-350m
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "llm")
    AutoTokenizer.from_pretrained(tiny.opt).save_pretrained(tmp_path / "llm")
    ours = trained(tmp_path, tiny, 2, vit, f"llm.id={tmp_path / 'llm'}")
    report = export(ours.model, ours.config, tmp_path / "out")
    assert report.architecture == "Blip2QFormerModel"
    assert "has embeddings 16 wide" in report.why


# What must not happen


@pytest.fixture(scope="module")
def small(tiny, vit, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("small"), tiny, 2, vit)


def test_a_wrong_table_is_found_out_and_leaves_nothing_behind(small, tmp_path, monkeypatch):
    names = dict(vision.VIT.block_names)
    one, other = "layer_norm1.weight", "layer_norm2.weight"
    names[one], names[other] = names[other], names[one]
    monkeypatch.setitem(vision.FAMILIES, "vit", dataclasses.replace(vision.VIT, block_names=names))
    with pytest.raises(ValueError, match=r"was not written: Blip2ForC\w+ .* \(visual prompt by .*, logits by") as error:
        export(small.model, small.config, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())

    del names[one]
    with pytest.raises(DoesNotFit, match=r"has layers.0.layernorm_\w+.weight, for which Blip2VisionModel has no place"):
        to_blip2_vision(small.model.encoder)


def test_norms_that_differ_by_their_eps_are_found_out(tiny, tmp_path):
    """One eps serves all norms of a Blip2VisionModel; this T5 makes much of the difference."""
    vit = of_transformers(tmp_path / "vit", "ViT", layer_norm_eps=1e-12)
    ours = trained(tmp_path, tiny, 2, vit, f"llm.id={tiny.t5}", "qformer.feature_norm_eps=1e-3")
    with pytest.raises(
        ValueError, match=r"was not written.*set qformer.feature_norm_eps=1e-12 in the adapter's config"
    ):
        export(ours.model, ours.config, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_wrong_key_map_is_found_out_and_leaves_nothing_behind(small, tmp_path, monkeypatch):
    names = dict(BLIP2.block_names)
    names["attention.query"], names["attention.key"] = names["attention.key"], names["attention.query"]
    monkeypatch.setattr(interop_export, "BLIP2", dataclasses.replace(BLIP2, block_names=names))
    with pytest.raises(ValueError, match="was not written"):
        export(small.model, small.config, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused(small, tmp_path):
    (tmp_path / "keep").write_text("mine")
    with pytest.raises(ValueError, match="exists already; name a folder that does not"):
        export(small.model, small.config, tmp_path)
    assert (tmp_path / "keep").read_text() == "mine"


# The command


def run_export(*arguments: object) -> None:
    path = Path(__file__).parents[1] / "stages" / "export.py"
    spec = importlib.util.spec_from_file_location("export_stage", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(argument) for argument in arguments])


def test_the_command_exports_a_run_and_says_what_and_why(tiny, vit, tmp_path, capsys):
    trained(tmp_path / "run", tiny, 2, vit)
    picture().save(tmp_path / "one.png")
    run_export(tmp_path / "run", "--to", "transformers", tmp_path / "out", "--picture", tmp_path / "one.png")
    said = capsys.readouterr().out
    assert "Blip2ForConditionalGeneration: the whole model, because the encoder (transformers " in said
    assert re.search(r"largest difference .*: visual prompt \S+, logits \S+", said)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out")

    with pytest.raises(SystemExit) as stopped:
        run_export(tmp_path / "run", "--to", "transformers", tmp_path / "out")
    assert stopped.value.code == 2
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_export(tmp_path / "run", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("llm", ["opt", "t5"])
def test_visual_prompts_say_the_same_to_the_unmodified_language_model(tiny, tmp_path, monkeypatch, capsys, llm):
    ours = trained(tmp_path, tiny, 2, {}, f"llm.id={getattr(tiny, llm)}", "llm.prompt=a photo of")
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    for i, file in enumerate(files):
        picture(i).save(file)
    run_export(tmp_path, tmp_path / "out", "--visual-prompts", *files)
    assert "2 visual prompts for" in capsys.readouterr().out
    found = load_file(tmp_path / "out" / "visual_prompts.safetensors")
    assert set(found) == {str(file) for file in files}
    for i, file in enumerate(files):
        with torch.no_grad():
            expected = ours.model.visual_prompt(ours.encode([picture(i)]), [""])[0]
        assert torch.equal(found[str(file)], expected)
    rows = load_file(tmp_path / "out" / "prompt_embeds.safetensors")
    assert all(torch.equal(rows[name][: len(visual)], visual) for name, visual in found.items())
    said, _ = run_card(tmp_path / "out", monkeypatch)
    assert said.strip() == ours.caption([files[0]], num_beams=1, min_new_tokens=0)[0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert ('prompt_embeds": embeds' in card) == (llm == "opt")

    with pytest.raises(SystemExit):
        run_export(tmp_path, tmp_path / "twice", "--visual-prompts", files[0], files[0])
    assert "is named twice" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()
