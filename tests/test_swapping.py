"""Any encoder and any language model by YAML alone: each is loaded, trained a step in both stages, and answers."""

import pytest
import test_encoders
import test_language
from PIL import Image
from tiny import Tiny, run_stage

import qformer

ENCODERS = {
    "open_clip": test_encoders.native,
    "timm in open_clip": test_encoders.timm_vit,
    "CLIP": test_encoders.clip,
    "SigLIP 2": test_encoders.siglip,
    "DINOv2": test_encoders.dinov2,
}


def write_yaml(path, section, **values):
    lines = [f"  {key}: {'null' if value is None else value}" for key, value in values.items()]
    path.write_text("\n".join([f"{section}:", *lines]) + "\n")
    return str(path)


def write_language_model(folder, family):
    """A tiny model of the family with its tokenizer, as a transformers folder; only OPT's and Llama's have a BOS."""
    test_language.build_model(family).save_pretrained(folder)
    test_language.build_tokenizer(bos=family in ("opt", "llama"), append_eos=family == "t5").save_pretrained(folder)
    return str(folder)


def ask(adapter, picture):
    model = qformer.load(adapter)
    said = model.answer([picture], ["what is the red circle?", "what is left?"], num_beams=2, max_new_tokens=3)
    assert len(said) == 2
    assert all(isinstance(answer, str) for answer in said)
    return model


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_by_yaml(name, tiny: Tiny, tmp_path):
    folder = tmp_path / "encoder"
    folder.mkdir()
    case = ENCODERS[name](folder)
    values = {k: case.arguments[k] for k in ("loader", "id", "image_size") if k in case.arguments}
    encoder = write_yaml(tmp_path / "encoder.yaml", "encoder", **values)
    steps = ("train.max_steps=1",)
    run_stage(1, tiny.stage1(tmp_path / "s1", encoder, *steps))
    run_stage(2, tiny.stage2(tmp_path / "s2", encoder, *steps, f"stage2.init_from={tmp_path / 's1' / 'adapter'}"))
    picture = Image.new("RGB", (50, 40), "red")
    assert ask(tmp_path / "s2" / "adapter", picture).model.encoder.width == case.width
    aligned = qformer.load(tmp_path / "s1" / "adapter")
    assert aligned.embed_image([picture]).shape[0] == 1
    assert 0 <= float(aligned.match([picture], ["a red circle"])[0]) <= 1


@pytest.mark.parametrize("family", test_language.FAMILIES)
def test_language_model_by_yaml(family, tiny: Tiny, tmp_path):
    llm = write_yaml(tmp_path / "llm.yaml", "llm", id=write_language_model(tmp_path / "llm", family))
    arguments = [a for a in tiny.stage2(tmp_path / "s2", "train.max_steps=1") if not a.startswith("llm.id=")]
    run_stage(2, [*arguments, llm])
    ask(tmp_path / "s2" / "adapter", Image.new("RGB", (32, 32), "blue"))
