"""timm as a loader: six families with random weights, their tokens those of timm itself, errors, and both stages."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_doctor import examine
from tiny import Tiny, run_stage
from torch import Tensor

import qformer
from qformer.config import EncoderConfig, Stage1Config, load_config
from qformer.doctor.weights import find_weights
from qformer.encoders import FrozenEncoder, encoder_weights, load_encoder

VITS = {"test_vit": 32, "vit_small_patch16_dinov3": 32}
MAPS = {"test_resnet": 64, "test_efficientnet": 64, "test_convnext": 64, "swin_tiny_patch4_window7_224": 56}
IMAGENET = (0.485, 0.456, 0.406)


def load(id: str, side: int | None = None, **more: Any) -> FrozenEncoder:
    return load_encoder(EncoderConfig("timm", id, image_size=side, random_weights=True, **more))


def bare(id: str, side: int) -> Any:
    """The same random model, by timm alone."""
    size = {} if id in ("test_resnet", "test_efficientnet", "test_convnext") else {"img_size": side}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(id, **size).eval()


def pixels(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("block", [None, -2, -1, 0])
@pytest.mark.parametrize("id", VITS)
def test_a_vit_gives_prefix_and_patches_of_the_block_before_the_norm(id: str, block: int | None) -> None:
    side, outputs = VITS[id], []
    model, encoder = bare(id, side), load(id, side, block=block)
    model.blocks[-2 if block is None else block].register_forward_hook(lambda m, args, output: outputs.append(output))
    with torch.no_grad():
        model(pixels(side))
    torch.testing.assert_close(encoder(pixels(side)).tokens, outputs[0], rtol=1e-5, atol=1e-5)
    assert encoder.num_tokens == (side // 16) ** 2 + model.num_prefix_tokens
    assert len(encoder.tower.blocks) == len(model.blocks[: (-2 if block is None else block) % len(model.blocks) + 1])


@pytest.mark.parametrize("id", MAPS)
def test_a_feature_map_is_flattened_row_by_row(id: str) -> None:
    side = MAPS[id]
    model = bare(id, side)
    with torch.no_grad():
        maps = model.forward_intermediates(pixels(side), intermediates_only=True)
        last = model.forward_features(pixels(side)) if id == "test_efficientnet" else maps[-1]  # a wider one follows
    for block in (None, -1, -2, 0):
        encoder = load(id, side, block=block)
        tokens, expected = encoder(pixels(side)).tokens, last if block is None else maps[block]
        assert tokens.shape == (2, encoder.num_tokens, encoder.width)
        height, width = expected.shape[2:]
        torch.testing.assert_close(tokens.reshape(2, height, width, -1), expected.permute(0, 2, 3, 1))


def test_the_last_map_of_swin_is_its_last_stage_in_nhwc() -> None:
    outputs: list[Tensor] = []
    model = bare("swin_tiny_patch4_window7_224", 56)
    model.layers[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(pixels(56))
    tokens = load("swin_tiny_patch4_window7_224", 56)(pixels(56)).tokens
    torch.testing.assert_close(tokens, outputs[0].flatten(1, 2))


@pytest.mark.parametrize(("id", "side", "num_tokens"), [("test_efficientnet", 70, 9), ("test_convnext", 70, 4)])
def test_an_odd_size_has_the_grid_that_the_convnet_makes_of_it(id: str, side: int, num_tokens: int) -> None:
    encoder = load(id, side)
    assert encoder.num_tokens == num_tokens == encoder(pixels(side)).tokens.shape[1]


def test_the_input_transform_is_the_one_that_timm_resolves() -> None:
    transform = load("tf_efficientnet_lite0.in1k").input_transform
    values = timm.data.resolve_data_config({}, model=timm.create_model("tf_efficientnet_lite0.in1k"))
    assert transform is not None
    assert (3, transform.size, transform.size) == values["input_size"]
    assert (transform.mean, transform.std, transform.interpolation) == (values["mean"], values["std"], "bicubic")
    transform = load("test_vit", 48).input_transform
    assert transform is not None
    assert transform.size == 48


def test_a_local_file_is_read_strictly_whatever_its_form(tmp_path: Path) -> None:
    model = bare("test_resnet", 64)
    state = {
        name: tensor + 0.01 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.pth")
    model.load_state_dict(state)
    with torch.no_grad():
        expected = model.forward_features(pixels(64)).flatten(2).transpose(1, 2)
    for name in ("model.safetensors", "model.pth"):
        config = EncoderConfig("timm", "test_resnet", pretrained=str(tmp_path / name))
        torch.testing.assert_close(
            load_encoder(EncoderConfig(**(vars(config) | {"image_size": 64})))(pixels(64)).tokens, expected
        )
        assert find_weights(encoder_weights(config)).size_bytes == (tmp_path / name).stat().st_size
    save_file(
        {name: tensor for name, tensor in state.items() if name != "layer4.0.conv1.weight"},
        tmp_path / "cut.safetensors",
    )
    with pytest.raises(ValueError, match=r"encoder.id 'test_resnet' cannot be loaded by timm .*layer4.0.conv1.weight"):
        load_encoder(EncoderConfig("timm", "test_resnet", pretrained=str(tmp_path / "cut.safetensors")))


def test_weights_are_looked_for_under_the_tag() -> None:
    source = encoder_weights(EncoderConfig("timm", "vit_small_patch14_dinov2.lvd142m"))
    assert source is not None
    assert source.place == "timm/vit_small_patch14_dinov2.lvd142m"
    assert encoder_weights(EncoderConfig("timm", "vit_small_patch14_dinov2", pretrained="lvd142m")) == source


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"id": "resnet5O"}, "encoder.id 'resnet5O' is no model of timm; nearest are resnet50"),
        ({"id": "resnet50.a1_in1"}, "encoder.id 'resnet50.a1_in1': timm has no such weights; nearest are a1_in1k"),
        ({"id": "resnet50"}, "encoder.pretrained is missing for 'resnet50'; expected one of .*'a1_in1k'.* or a file"),
        (
            {"id": "resnet50", "pretrained": "a1"},
            "encoder.pretrained 'a1' is no tag of 'resnet50' and no file; nearest",
        ),
        ({"id": "resnet50.a1_in1k", "pretrained": "a2_in1k"}, "'a2_in1k' and encoder.id 'resnet50.a1_in1k' differ"),
        ({"id": "local-dir:/no/folder"}, "encoder.id 'local-dir:/no/folder': no such folder"),
        ({"id": "test_resnet", "block": 5, "random_weights": True}, "encoder.block is 5, expected -5 to 4"),
        (
            {"id": "test_vit", "image_size": 40, "random_weights": True},
            "encoder.id 'test_vit' cannot be loaded by timm",
        ),
        ({"id": "resnet50.a1_in1k"}, "encoder.id 'resnet50.a1_in1k' cannot be loaded by timm .*network"),
    ],
)
def test_mistakes_name_the_key_the_value_and_the_nearest(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_encoder(EncoderConfig("timm", **values))


def encoder_arguments(id: str, side: int) -> list[str]:
    return ["encoder.loader=timm", f"encoder.id={id}", f"encoder.image_size={side}", "encoder.random_weights=true"]


def test_a_convnet_trains_both_stages_and_is_examined(tiny: Tiny, tmp_path: Path) -> None:
    arguments = encoder_arguments("test_resnet", 64)
    run_stage(1, tiny.stage1(tmp_path / "s1", *arguments))
    run_stage(2, tiny.stage2(tmp_path / "s2", *arguments, f"stage2.init_from={tmp_path / 's1' / 'adapter'}"))
    assert qformer.load(tmp_path / "s2" / "adapter").model.encoder.num_tokens == 4
    findings, code = examine(tmp_path, *tiny.stage1(tmp_path / "run", *arguments))
    assert code == 0
    assert "4 tokens of 96" in findings["encoder"][1]
    assert "random weights" in findings["encoder"][1]


@pytest.mark.parametrize(("id", "how"), [("test_vit", "lora"), ("test_vit", "full"), ("test_resnet", "full")])
def test_an_encoder_of_timm_learns(id: str, how: str, tiny: Tiny, tmp_path: Path) -> None:
    from qformer.checkpoint import read_adapter

    arguments = [*encoder_arguments(id, 32 if id == "test_vit" else 64), f"tune.encoder={how}"]
    for steps in (1, 3):
        run_stage(1, tiny.stage1(tmp_path / str(steps), *arguments, f"train.max_steps={steps}"))
    part = "encoder_lora." if how == "lora" else "encoder."
    before, after = (read_adapter(tmp_path / str(steps) / "adapter") for steps in (1, 3))
    names = [name for name in after if name.startswith(part)]
    assert names
    assert any(not torch.equal(before[name], after[name]) for name in names)


def test_lora_on_a_convnet_is_refused_in_words(tiny: Tiny, tmp_path: Path) -> None:
    from qformer.build import build_stage1

    arguments = [*encoder_arguments("test_resnet", 64), "tune.encoder=lora"]
    with pytest.raises(ValueError, match="test_resnet has no linear layer in its blocks that LoRA can stand beside"):
        build_stage1(load_config(Stage1Config, tiny.stage1(tmp_path / "run", *arguments)))
