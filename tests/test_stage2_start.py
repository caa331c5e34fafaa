"""How stage 2 starts from stage 1: all of its weights, or a share of them and the rest drawn anew."""

import pytest
import torch

from qformer.build import build_stage1, build_stage2
from qformer.checkpoint import read_adapter, save_adapter
from qformer.config import ConfigError, Stage1Config, Stage2Config, load_config, only_model, to_yaml


@pytest.fixture(scope="module")
def aligned(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage1") / "adapter"
    config = load_config(Stage1Config, tiny.stage1(folder))
    adapter = build_stage1(config).adapter
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter))
    save_adapter(folder, adapter, to_yaml(config), "")
    return folder


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_matrices_is_kept_and_the_rest_is_drawn(tiny, tmp_path, aligned, share):
    config = load_config(
        Stage2Config, tiny.stage2(tmp_path, f"stage2.init_from={aligned}", f"stage2.init_share={share}")
    )
    found = build_stage2(config).adapter.state_dict()
    fresh = build_stage2(only_model(config)).adapter.state_dict()
    trained = read_adapter(aligned)
    shared = [name for name in found if name in trained and name.startswith("qformer.")]
    assert {trained[name].ndim for name in shared} >= {1, 2, 3}
    for name in shared:
        kept = share if trained[name].ndim > 1 else 1.0
        expected = kept * trained[name] + (1 - kept) * fresh[name]
        torch.testing.assert_close(found[name], expected, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(found["feature_norm.weight"], trained["feature_norm.weight"])


def test_visual_prompts_begin_as_large_as_told(tiny, tmp_path):
    weights = []
    for scale in (1, 16):
        config = load_config(Stage2Config, tiny.stage2(tmp_path, f"stage2.prompt_scale={scale}"))
        weights.append(build_stage2(config).adapter.language_projection.weight)
    assert torch.equal(16 * weights[0], weights[1])
    with pytest.raises(ConfigError, match=r"stage2\.prompt_scale: 0\.0 must be above 0"):
        load_config(Stage2Config, tiny.stage2(tmp_path, "stage2.prompt_scale=0"))


def test_a_share_is_a_share(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"stage2\.init_share: 1\.5 is outside 0 to 1"):
        load_config(Stage2Config, tiny.stage2(tmp_path, "stage2.init_share=1.5"))
