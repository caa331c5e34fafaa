"""The contract of every loader: each has a tiny case here, and what `width` says without weights is what comes out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_encoders import clip, native
from torch import Tensor, nn

from qformer.config import ENCODER_LOADERS, EncoderConfig
from qformer.encoders import LOADERS, FrozenEncoder, InputTransform, encoder_weights, encoder_width, outline_encoder
from qformer.encoders import load_encoder as load
from qformer.parts import WeightSource

WIDTH = 12  # of precomputed features


def of_open_clip(folder: Path) -> dict[str, Any]:
    return {"id": native(folder).arguments["id"]}


def of_transformers(folder: Path) -> dict[str, Any]:
    return {"id": clip(folder).arguments["id"]}


def of_timm(folder: Path) -> dict[str, Any]:
    import timm

    torch.manual_seed(7)
    model = timm.create_model("test_vit", img_size=32)
    torch.save(model.state_dict(), folder / "weights.pth")
    return {"id": "test_vit", "pretrained": str(folder / "weights.pth"), "image_size": 32}


def of_features(folder: Path) -> dict[str, Any]:
    return {"width": WIDTH, "num_tokens": 5}


CASES = {"open_clip": of_open_clip, "timm": of_timm, "transformers": of_transformers, "features": of_features}
# A key that the loader does not read, and an id that it does not know.
UNREAD = {
    "open_clip": {"revision": "main"},
    "timm": {"revision": "main"},
    "transformers": {"pretrained": "x"},
    "features": {"image_size": 32},
}


@pytest.fixture(scope="module", params=sorted(LOADERS))
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EncoderConfig:
    return EncoderConfig(request.param, **CASES[request.param](tmp_path_factory.mktemp(request.param)))


def changed(config: EncoderConfig, **values: Any) -> EncoderConfig:
    return EncoderConfig(**(vars(config) | values))


def inputs(encoder: FrozenEncoder) -> Tensor:
    transform = encoder.input_transform
    shape = (2, 5, WIDTH) if transform is None else (2, 3, transform.size, transform.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_the_schema_and_the_loaders_have_the_same_names_and_each_has_a_case() -> None:
    assert tuple(LOADERS) == ENCODER_LOADERS
    assert set(CASES) == set(UNREAD) == set(LOADERS)


def test_frozen_in_eval_mode_and_without_gradient(config: EncoderConfig) -> None:
    encoder = load(config)
    nn.ModuleList([encoder]).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    tokens = encoder(inputs(encoder).requires_grad_()).tokens
    assert not tokens.requires_grad
    assert torch.equal(tokens, encoder(inputs(encoder)).tokens)


def test_what_comes_out_is_what_was_announced_with_and_without_weights(config: EncoderConfig) -> None:
    encoder, outlined = load(config), outline_encoder(config)
    features = encoder(inputs(encoder))
    assert features.mask is None
    assert features.tokens.shape == (2, encoder.num_tokens, encoder.width)
    assert (outlined.width, outlined.num_tokens) == (encoder.width, encoder.num_tokens)
    assert encoder_width(config) == encoder.width
    assert outlined.input_transform == encoder.input_transform
    assert {parameter.device.type for parameter in outlined.parameters()} <= {"meta"}


def test_tokens_are_float32_from_weights_of_another_dtype(config: EncoderConfig) -> None:
    encoder = load(changed(config, dtype="bfloat16"))
    assert {parameter.dtype for parameter in encoder.parameters()} <= {torch.bfloat16}
    assert encoder(inputs(encoder)).tokens.dtype == torch.float32


def test_the_input_transform_is_that_of_the_weights(config: EncoderConfig) -> None:
    transform = load(config).input_transform
    assert (transform is None) == (config.loader == "features")
    if transform is not None:
        assert isinstance(transform, InputTransform)
        assert transform.size == 32
        assert len(transform.mean) == len(transform.std) == 3
        assert transform.interpolation in ("bilinear", "bicubic")


def test_random_weights_are_others_and_leave_the_generator_alone(config: EncoderConfig) -> None:
    if config.loader == "features":
        assert encoder_weights(config) is None
        return
    before = torch.get_rng_state()
    trained, first, again = load(config), *(load(changed(config, random_weights=True)) for _ in range(2))
    assert torch.equal(first(inputs(first)).tokens, again(inputs(first)).tokens)
    assert not torch.equal(first(inputs(first)).tokens, trained(inputs(first)).tokens)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(encoder_weights(config), WeightSource)
    assert Path(encoder_weights(config).place).exists()
    assert encoder_weights(changed(config, random_weights=True)) is None


def test_mistakes_name_the_key_and_the_loader(config: EncoderConfig) -> None:
    (key, value), *_ = UNREAD[config.loader].items()
    message = rf"encoder\.{key} is {value!r}, but loader '{config.loader}' does not read it"
    with pytest.raises(ValueError, match=message):
        load(changed(config, **{key: value}))
    with pytest.raises(ValueError, match=r"encoder\.dtype='fp16': expected one of float32"):
        load(changed(config, dtype="fp16"))
    if config.loader != "features":
        with pytest.raises(ValueError, match=r"encoder\.id .*no-such-model"):
            load(changed(config, id="no-such-model", pretrained=None))
        with pytest.raises(ValueError, match=r"encoder\.block is 99, expected -\d+ to \d+"):
            load(changed(config, block=99))


def test_a_block_left_out_is_the_papers_where_only_transformers_are_read() -> None:
    assert [EncoderConfig(loader).block for loader in ENCODER_LOADERS] == [-2, None, -2, -2]
    assert json.loads(json.dumps(vars(EncoderConfig("timm", block=-2))))["block"] == -2
