"""The contract of every frozen encoder, on tiny random models of the real classes, and the errors of `load_encoder`."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from qformer.config import EncoderConfig
from qformer.encoders import CLIP_MEAN, FrozenEncoder, InputTransform, PrecomputedFeatures, load_encoder

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
TEXT = VISION | {"vocab_size": 50, "max_position_embeddings": 8, "num_hidden_layers": 1}
OPT = {"vocab_size": 50, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
       "word_embed_proj_dim": 32}  # fmt: skip
PROCESSOR = {
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.1, 0.2, 0.3],
    "resample": 2,
    "size": {"shortest_edge": 40},
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
}


@dataclass
class Case:
    """One saved model: how to load it, its uncut tower with its blocks, and what the encoder must say of itself."""

    arguments: dict[str, Any]
    tower: nn.Module
    blocks: nn.ModuleList
    width: int
    num_tokens: int
    size: int

    def load(self, seed: int = 0, **changes: Any) -> FrozenEncoder:
        return load_encoder(EncoderConfig(**(self.arguments | changes)), seed)

    def pixels(self) -> torch.Tensor:
        return torch.randn(2, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))

    def hooked(self, block: int, pixels: torch.Tensor, **arguments: Any) -> torch.Tensor:
        outputs: list[Any] = []
        with (
            torch.no_grad(),
            self.blocks[block].register_forward_hook(lambda module, args, output: outputs.append(output)),
        ):
            self.tower.eval()(pixels, **arguments)
        return outputs[0] if isinstance(outputs[0], torch.Tensor) else outputs[0][0]


def shake(model: nn.Module) -> None:
    """Random values everywhere, so that no norm, bias, layer scale or position embedding is a no-op."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def open_clip_case(folder: Path, vision: dict[str, Any], **expected: Any) -> Case:
    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": vision,
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
        "custom_text": True,
    }
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "interpolation": "bilinear"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}))
    name = f"local-dir:{folder}"
    model = open_clip.create_model(name, pretrained_text=False)
    shake(model)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    # timm's towers are born, and saved, at the size in their name.
    force = expected["size"] if "timm_model_name" in vision else None
    model = open_clip.create_model(name, pretrained_text=False, force_image_size=force)
    blocks = model.visual.trunk.blocks if force else model.visual.transformer.resblocks
    return Case({"loader": "open_clip", "id": name, "image_size": force}, model.visual, blocks, **expected)


def native(folder: Path) -> Case:
    vision = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16}
    return open_clip_case(folder, vision, width=32, num_tokens=5, size=32)


def timm_vit(folder: Path) -> Case:
    vision = {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    return open_clip_case(folder, vision, width=64, num_tokens=5, size=32)


def timm_registers(folder: Path) -> Case:
    vision = {"image_size": 32, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"}
    return open_clip_case(folder, vision, width=96, num_tokens=5, size=32)


def timm_eva(folder: Path) -> Case:
    vision = {"image_size": 28, "timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None}
    return open_clip_case(folder, vision, width=192, num_tokens=5, size=28)


def transformers_case(folder: Path, saved: Any, tower: Any, blocks: Any, num_tokens: int) -> Case:
    shake(saved)
    saved.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return Case({"loader": "transformers", "id": str(folder)}, tower, blocks, 32, num_tokens, 32)


def clip(folder: Path) -> Case:
    model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=VISION, text_config=TEXT))
    return transformers_case(folder, model, model.vision_model, model.vision_model.encoder.layers, 5)


def clip_vision(folder: Path) -> Case:
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    return transformers_case(folder, model, model, model.encoder.layers, 5)


def siglip(folder: Path) -> Case:
    model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=VISION, text_config=TEXT))
    return transformers_case(folder, model, model.vision_model, model.vision_model.encoder.layers, 4)


def dinov2(folder: Path) -> Case:
    model = transformers.Dinov2Model(transformers.Dinov2Config(**VISION))
    return transformers_case(folder, model, model, model.encoder.layer, 5)


def dinov2_registers(folder: Path) -> Case:
    config = transformers.Dinov2WithRegistersConfig(**VISION, num_register_tokens=3)
    model = transformers.Dinov2WithRegistersModel(config)
    return transformers_case(folder, model, model, model.encoder.layer, 8)


def dinov3(folder: Path) -> Case:
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VISION, num_register_tokens=2))
    return transformers_case(folder, model, model, model.model.layer, 7)


def vit(folder: Path) -> Case:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))
    return transformers_case(folder, model, model.vit, model.vit.layers, 5)


def blip2_vision(folder: Path) -> Case:
    model = transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**VISION))
    return transformers_case(folder, model, model, model.encoder.layers, 5)


def blip2(folder: Path) -> Case:
    """A whole BLIP-2: of it, the vision model."""
    model = transformers.Blip2ForConditionalGeneration(
        transformers.Blip2Config(vision_config=VISION, qformer_config=TEXT, text_config={**OPT, "model_type": "opt"})
    )
    return transformers_case(folder, model, model.vision_model, model.vision_model.encoder.layers, 5)


def instruct_blip(folder: Path) -> Case:
    model = transformers.InstructBlipForConditionalGeneration(
        transformers.InstructBlipConfig(
            vision_config=VISION, qformer_config=TEXT, text_config={**OPT, "model_type": "opt"}
        )
    )
    return transformers_case(folder, model, model.vision_model, model.vision_model.encoder.layers, 5)


PICTURES: list[Callable[[Path], Case]] = [
    *(native, timm_vit, timm_registers, timm_eva),
    *(clip, clip_vision, siglip, dinov2, dinov2_registers, dinov3, vit, blip2_vision, blip2, instruct_blip),
]


@pytest.fixture(scope="module", params=PICTURES, ids=lambda build: build.__name__)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return request.param(tmp_path_factory.mktemp(request.param.__name__))


@pytest.fixture
def clip_case(tmp_path: Path) -> Case:
    return clip(tmp_path)


@pytest.mark.parametrize("block", [-2, -1, 0])
def test_tokens_are_the_output_of_the_named_block(case: Case, block: int) -> None:
    features = case.load(block=block)(case.pixels())
    assert features.mask is None
    torch.testing.assert_close(features.tokens, case.hooked(block, case.pixels()), rtol=1e-5, atol=1e-5)


def test_says_what_it_returns(case: Case) -> None:
    encoder = case.load()
    features = encoder(case.pixels())
    assert features.tokens.shape == (2, case.num_tokens, case.width) == (2, encoder.num_tokens, encoder.width)
    assert encoder.input_transform == InputTransform(case.size, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), "bilinear")


def test_is_frozen_and_deterministic(case: Case) -> None:
    encoder = case.load()
    nn.ModuleList([encoder]).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    tokens = encoder(case.pixels().requires_grad_()).tokens
    assert not tokens.requires_grad
    assert torch.equal(tokens, encoder(case.pixels()).tokens)


def test_later_blocks_and_the_text_tower_are_gone(case: Case) -> None:
    # ViT is saved as a classifier, without the pooler of its bare model.
    cut = sum(parameter.numel() for name, parameter in case.load(block=0).named_parameters() if "pooler" not in name)
    whole = sum(parameter.numel() for parameter in case.tower.parameters())
    later = sum(parameter.numel() for parameter in case.blocks[1:].parameters())
    assert cut <= whole - later


def test_weights_and_tokens_have_their_dtypes(case: Case) -> None:
    encoder = case.load(dtype="bfloat16")
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    tokens = encoder(case.pixels()).tokens
    assert tokens.dtype == torch.float32
    encoder.output_dtype = None
    assert encoder(case.pixels()).tokens.dtype == torch.bfloat16


def test_autocast_changes_nothing(case: Case) -> None:
    encoder = case.load()
    plain = encoder(case.pixels()).tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder(case.pixels()).tokens, plain)


def test_random_weights_follow_the_seed_and_leave_the_generator_alone(case: Case) -> None:
    before = torch.get_rng_state()
    first, again, other = (case.load(random_weights=True, seed=seed)(case.pixels()).tokens for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_image_size_interpolates(case: Case) -> None:
    side = case.size * 3 // 2
    encoder = case.load(image_size=side)
    pixels = torch.randn(1, 3, side, side)
    prefix = case.num_tokens - 4
    assert encoder.input_transform is not None
    assert encoder.input_transform.size == side
    assert encoder(pixels).tokens.shape == (1, 9 + prefix, case.width) == (1, encoder.num_tokens, encoder.width)
    with pytest.raises(ValueError, match=rf"expected \[B, 3, {side}, {side}\]"):
        encoder(case.pixels())


def test_a_block_out_of_range_names_the_number_of_blocks(case: Case) -> None:
    with pytest.raises(ValueError, match=rf"encoder.block is 99.*{len(case.blocks)} blocks"):
        case.load(block=99)


def test_interpolated_positions_are_those_of_the_library(clip_case: Case) -> None:
    pixels = torch.randn(1, 3, 48, 48)
    expected = clip_case.hooked(-2, pixels, interpolate_pos_encoding=True)
    torch.testing.assert_close(clip_case.load(image_size=48)(pixels).tokens, expected)


def test_quick_gelu_follows_the_tag() -> None:
    encoder = load_encoder(EncoderConfig("open_clip", "ViT-B-32", pretrained="openai", random_weights=True, block=0))
    assert any(type(module).__name__ == "QuickGELU" for module in encoder.modules())


def test_features_pass_through_with_their_mask() -> None:
    features = torch.randn(2, 5, 8, requires_grad=True)
    mask = torch.ones(2, 5, dtype=torch.bool)
    encoder = load_encoder(EncoderConfig("features", "", width=8)).train()
    assert isinstance(encoder, PrecomputedFeatures)
    assert (encoder.width, encoder.num_tokens, encoder.input_transform) == (8, None, None)
    returned = encoder(features, mask)
    assert torch.equal(returned.tokens, features)
    assert not returned.tokens.requires_grad
    assert returned.mask is mask
    assert encoder(features).mask is None
    assert encoder(features.half()).tokens.dtype == torch.float32
    assert not encoder.training


def test_features_of_another_shape_are_refused() -> None:
    encoder = PrecomputedFeatures(8, num_tokens=5)
    with pytest.raises(ValueError, match=r"\[2, 4, 8\], expected \[B, 5, 8\]; set encoder.width"):
        encoder(torch.zeros(2, 4, 8))
    with pytest.raises(ValueError, match=r"mask of the features is torch.int64"):
        encoder(torch.zeros(2, 5, 8), torch.ones(2, 5, dtype=torch.int64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loader": "openclip", "id": "x"}, "encoder.loader 'openclip' is unknown; nearest is open_clip"),
        ({"loader": "features", "id": ""}, "encoder.width is missing"),
        ({"loader": "features", "id": "", "width": 8, "revision": "main"}, "encoder.revision is 'main'"),
        (
            {"loader": "features", "id": "", "width": 8, "dtype": "fp16"},
            "encoder.dtype='fp16': expected one of float32, bfloat16, float16",
        ),
        ({"loader": "open_clip", "id": "ViT-L14"}, "encoder.id 'ViT-L14' is no model.*nearest are ViT-L-14"),
        ({"loader": "open_clip", "id": "ViT-L-14"}, "encoder.pretrained is missing.*'openai'"),
        ({"loader": "open_clip", "id": "ViT-L-14", "pretrained": "opena"}, "no tag of 'ViT-L-14'.*nearest are openai"),
        ({"loader": "open_clip", "id": "RN50", "random_weights": True}, "encoder.id names a ModifiedResNet"),
        ({"loader": "open_clip", "id": "local-dir:/no/folder"}, "encoder.id 'local-dir:/no/folder': no such folder"),
        ({"loader": "open_clip", "id": "local-dir:/", "pretrained": "x"}, "encoder.pretrained is 'x'.*remove it"),
        ({"loader": "transformers", "id": "/no/folder"}, "encoder.id '/no/folder': no such folder"),
        ({"loader": "transformers", "id": "no-one/nothing"}, "encoder.id 'no-one/nothing' cannot.*network"),
        ({"loader": "transformers", "id": "x", "pretrained": "y"}, "encoder.pretrained is 'y'.*remove it"),
    ],
)
def test_errors_name_the_key_the_value_and_the_fix(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_encoder(EncoderConfig(**arguments))


def test_unreachable_open_clip_weights_name_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: Any, **kwargs: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", no_network)
    with pytest.raises(ValueError, match=r"encoder.id 'ViT-B-32' cannot be loaded.*network"):
        load_encoder(EncoderConfig("open_clip", "ViT-B-32", pretrained="openai"))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    case = native(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"encoder.id 'local-dir:.*cannot be loaded"):
        case.load()


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    case = dinov2(tmp_path)
    weights = {key: value for key, value in case.tower.state_dict().items() if "layer.0.norm1" not in key}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack 2 tensors of Dinov2Model"):
        case.load()


def test_naflex_and_foreign_families_are_refused(tmp_path: Path) -> None:
    transformers.Siglip2VisionConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="NaFlex SigLIP 2; use a fixed-size one"):
        load_encoder(EncoderConfig("transformers", str(tmp_path), random_weights=True))
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoder.id names a 'bert', expected one of .*'dinov2'"):
        load_encoder(EncoderConfig("transformers", str(tmp_path), random_weights=True))


def test_a_missing_processor_is_said_aloud(clip_case: Case, caplog: pytest.LogCaptureFixture) -> None:
    (Path(clip_case.arguments["id"]) / "preprocessor_config.json").unlink()
    with caplog.at_level(logging.WARNING, logger="qformer.encoders"):
        transform = clip_case.load().input_transform
    assert transform is not None
    assert (transform.size, transform.mean, transform.interpolation) == (32, CLIP_MEAN, "bicubic")
    assert "those of CLIP are used" in caplog.text


def test_import_is_light() -> None:
    heavy = "import qformer.encoders, sys; sys.exit(bool({'open_clip', 'timm', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", heavy]).returncode == 0
