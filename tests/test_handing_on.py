"""What a checkpoint lacks, what does not fit it, and what must not leave or arrive without a word."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_blip2_import import arrive, bert_tokenizer, copy_of, generator_of, pictures, retrieval
from test_export import of_transformers, picture, run_card, trained
from tiny import BERT_VOCABULARY, WIDTH, build_bert
from transformers import AutoTokenizer, SiglipVisionConfig

from qformer.bert import DEC, NoTokenizer, load_tokenizer
from qformer.build import build_tokenizer
from qformer.checkpoint import read_adapter
from qformer.config import QFormerConfig
from qformer.inference import load, read_model_part
from qformer.interop.blip2 import import_blip2
from qformer.interop.export import export

__all__ = ["retrieval"]  # a fixture
ROWS = len(BERT_VOCABULARY) + 1  # of the checkpoint, [DEC] included
WORDS = "qformer.word_embeddings.weight"


def convert(capsys, source: Path | str, out: Path, *arguments: str) -> list[str]:
    """The lines that convert.py prints, or the one line of its refusal."""
    path = Path(__file__).parents[1] / "stages" / "convert.py"
    spec = importlib.util.spec_from_file_location("convert_stage", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    capsys.readouterr()
    try:
        module.main(["--from", "transformers", str(source), "--out", str(out), *arguments])
    except SystemExit:
        assert not out.exists()
        (line,) = capsys.readouterr().err.strip().splitlines()
        return [line]
    return capsys.readouterr().out.splitlines()


def without_tokenizer(folder: Path) -> Path:
    for path in (*folder.glob("token*"), *folder.glob("processor_config.json"), *folder.glob("special_tokens*")):
        path.unlink()
    return folder


# ---- a checkpoint without a tokenizer ----


def test_a_checkpoint_without_a_tokenizer_is_converted_with_none_and_leaves_without_a_processor(
    retrieval, tmp_path, capsys, monkeypatch
):
    folder, out = without_tokenizer(copy_of(retrieval.folder, tmp_path)), tmp_path / "out"
    lines = convert(capsys, folder, tmp_path / "adapter")
    assert any(f"has no tokenizer for its {ROWS} word embeddings, and none is named" in line for line in lines)
    config = read_model_part(tmp_path / "adapter")
    assert (config.qformer.tokenizer, config.qformer.vocab_size) == ("", ROWS)
    ours = load(tmp_path / "adapter", "cpu")
    assert torch.equal(ours.embed_image(pictures()), retrieval.ours.embed_image(pictures()))
    with pytest.raises(ValueError, match=r"qformer.tokenizer is empty, so no text can be read"):
        ours.embed_text(["a dot"])

    report = export(ours.model, ours.config, out)
    assert report.architecture == "Blip2ForImageTextRetrieval"
    assert max(report.differences.values()) < 1e-5
    assert any(line.startswith("without a processor: qformer.tokenizer is empty") for line in report.lines())
    assert not list(out.glob("token*")) + list(out.glob("processor_config.json"))
    theirs, leaving = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert theirs.keys() == leaving.keys()
    assert all(torch.equal(theirs[name], leaving[name]) for name in theirs)
    printed, _ = run_card(out, monkeypatch)
    assert printed.startswith("tensor(")


def test_an_instructed_checkpoint_without_the_tokenizer_of_its_qformer_leaves_too(tiny, tmp_path, capsys, monkeypatch):
    arrived = arrive(tmp_path, *generator_of(tiny, "t5", instructed=True))
    without_tokenizer(arrived.folder / "qformer_tokenizer")
    lines = convert(capsys, arrived.folder, tmp_path / "again")
    assert any(f"has no tokenizer for its {ROWS} word embeddings" in line for line in lines)
    ours = load(tmp_path / "again", "cpu")
    assert isinstance(ours.model.tokenizer, NoTokenizer)
    report = export(ours.model, ours.config, tmp_path / "out")
    assert report.architecture == "InstructBlipForConditionalGeneration"
    assert max(report.differences.values()) < 1e-4
    assert isinstance(ours.model.tokenizer, NoTokenizer)
    _, names = run_card(tmp_path / "out", monkeypatch)
    assert names["visual_prompt"].shape == (1, 4, 32)


def test_a_tokenizer_that_the_checkpoint_lacks_is_named_and_has_to_fit(retrieval, tiny, tmp_path, capsys):
    folder = without_tokenizer(copy_of(retrieval.folder, tmp_path))
    (line,) = convert(capsys, folder, tmp_path / "adapter", f"qformer.tokenizer={tiny.opt}")
    assert "no cls_token" in line
    bert = AutoTokenizer.from_pretrained(tiny.bert)
    bert.add_tokens(["one", "more"])
    bert.add_tokens(["purple", "tall"])
    bert.save_pretrained(tmp_path / "larger")
    (line,) = convert(capsys, folder, tmp_path / "adapter", f"qformer.tokenizer={tmp_path / 'larger'}")
    assert f"does not fit the {ROWS} word embeddings of" in line
    convert(capsys, folder, tmp_path / "adapter", f"qformer.tokenizer={tiny.bert}")
    ours = load(tmp_path / "adapter", "cpu")
    assert torch.equal(ours.embed_text(["a red dot"]), retrieval.ours.embed_text(["a red dot"]))


def test_a_tokenizer_whose_size_contradicts_the_embeddings_is_not_named(retrieval, tiny, tmp_path, capsys):
    folder = copy_of(retrieval.folder, tmp_path)
    other = AutoTokenizer.from_pretrained(folder)
    other.add_tokens([f"word{i}" for i in range(40)])
    other.save_pretrained(folder)
    lines = convert(capsys, folder, tmp_path / "adapter")
    assert any(f"tokenizer of the checkpoint does not fit its {ROWS} word embeddings" in line for line in lines)
    assert read_model_part(tmp_path / "adapter").qformer.tokenizer == ""


def test_training_does_not_begin_without_a_tokenizer(tiny, tmp_path):
    from qformer.config import ConfigError, Stage1Config, load_config

    with pytest.raises(ConfigError, match=r"qformer.tokenizer: missing; stage 1 reads captions by it"):
        load_config(Stage1Config, tiny.stage1(tmp_path, "qformer.tokenizer=''"))


def test_a_language_model_that_came_without_its_tokenizer_is_reported(tiny, tmp_path, capsys):
    model, processor = generator_of(tiny, "opt")
    model.save_pretrained(tmp_path / "theirs")
    processor.image_processor.save_pretrained(tmp_path / "theirs")
    lines = convert(capsys, tmp_path / "theirs", tmp_path / "adapter")
    assert any("no tokenizer of its language model, without which it cannot be asked" in line for line in lines)


# ---- one reader of qformer.tokenizer ----


def test_a_folder_inside_a_repository_of_the_hub_is_read_by_all(tiny, tmp_path, monkeypatch, capsys, retrieval):
    commit = "0" * 40
    cached = tmp_path / "hub" / "models--someone--blip" / "snapshots" / commit / "qformer_tokenizer"
    build_bert(cached)
    refs = cached.parents[2] / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    name = "someone/blip/qformer_tokenizer"
    assert len(build_tokenizer(QFormerConfig(tokenizer=name))) == ROWS
    folder = without_tokenizer(copy_of(retrieval.folder, tmp_path))
    convert(capsys, folder, tmp_path / "adapter", f"qformer.tokenizer={name}")
    assert load(tmp_path / "adapter", "cpu").config.qformer.tokenizer == name


def test_a_token_without_a_row_is_left_out_of_the_tokenizer(tiny, tmp_path):
    tokenizer = bert_tokenizer(tiny)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == ROWS + 1
    fitting = load_tokenizer(str(tmp_path), ROWS)
    assert max(fitting("a red <image> dot").input_ids) < ROWS
    assert fitting.bos_token_id == ROWS - 1


# ---- what must not leave, or arrive, without a word ----


def test_theirs_to_ours_to_theirs_has_no_row_more(retrieval, tmp_path):
    out = tmp_path / "out"
    ours = load(retrieval.folder.parent / "adapter", "cpu")
    export(ours.model, ours.config, out)
    name = "embeddings.word_embeddings.weight"
    theirs, again = (load_file(folder / "model.safetensors")[name] for folder in (retrieval.folder, out))
    assert torch.equal(theirs, again)


def test_a_row_that_dec_needs_is_reported_on_the_way_in_and_out(retrieval, tiny, tmp_path, capsys):
    folder = copy_of(retrieval.folder, tmp_path)
    name = "embeddings.word_embeddings.weight"
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: tensors[name][:-1].clone()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["qformer_config"]["vocab_size"] = ROWS - 1
    (folder / "config.json").write_text(json.dumps(config))
    without_tokenizer(folder)
    AutoTokenizer.from_pretrained(tiny.bert).save_pretrained(folder)
    lines = convert(capsys, folder, tmp_path / "adapter")
    assert any(f"{WORDS} row {ROWS - 1}, of {DEC}" in line for line in lines)
    assert len(read_adapter(tmp_path / "adapter")[WORDS]) == ROWS
    ours = load(tmp_path / "adapter", "cpu")
    report = export(ours.model, ours.config, tmp_path / "out")
    assert any(line.startswith(f"1 of the {ROWS} word embeddings are not") for line in report.lines())
    assert any(line.endswith(DEC) for line in report.lines())


@pytest.mark.parametrize(("tune", "names"), [
    (["tune.llm=lora", "tune.encoder=lora"], {"llm_lora", "encoder_lora"}),
    (["tune.encoder=full"], {"encoder.safetensors"}),
])  # fmt: skip
def test_what_learnt_beside_a_qformer_that_leaves_alone_is_copied(tiny, tmp_path, tune, names):
    encoder = of_transformers(tmp_path / "siglip", "SiglipVision")
    ours = trained(tmp_path, tiny, 2, encoder, *tune)
    tensors = {name: tensor.clone() for name, tensor in ours.model.adapter.state_dict().items()}
    report = export(ours.model, ours.config, tmp_path / "out")
    assert report.architecture == "Blip2QFormerModel"
    card = (tmp_path / "out" / "README.md").read_text()
    for name in names:
        assert f"{name}: " in "\n".join(report.lines())
        assert name in card
        part = tmp_path / "out" / name
        held = load_file(part / "adapter_model.safetensors" if part.is_dir() else part)
        prefix = name.removesuffix(".safetensors")
        assert {f"{prefix}.{key}" for key in held} == {key for key in tensors if key.startswith(f"{prefix}.")}
        assert all(torch.equal(value, tensors[f"{prefix}.{key}"]) for key, value in held.items())


def test_a_whole_model_has_its_lora_merged_and_not_beside_it(tiny, tmp_path):
    ours = trained(tmp_path, tiny, 2, of_transformers(tmp_path / "vit", "ViT"), "tune.llm=lora")
    report = export(ours.model, ours.config, tmp_path / "out")
    assert report.architecture == "Blip2ForConditionalGeneration"
    assert not (tmp_path / "out" / "llm_lora").exists()


def test_visual_prompts_take_the_lora_of_their_language_model_along(tiny, tmp_path):
    from qformer.interop.visual_prompts import write_visual_prompts

    ours = trained(tmp_path, tiny, 2, {}, "tune.llm=lora")
    write_visual_prompts(ours.model, ours.config, [("one", ours.encode([picture()]))], prompt="", out=tmp_path / "out")
    assert (tmp_path / "out" / "llm_lora" / "adapter_config.json").is_file()
    assert "`llm_lora`" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_of_a_whole_model_tells_pil_from_torchvision(tiny, tmp_path):
    ours = trained(tmp_path, tiny, 2, of_transformers(tmp_path / "vit", "ViT"))
    export(ours.model, ours.config, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "torchvision processor" in card
    assert "up to 8/255" in card


# ---- what does not fit is refused where it arrives ----


def test_a_blip2_on_siglip_is_refused_on_arrival(retrieval, tmp_path, capsys):
    folder = copy_of(retrieval.folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] = SiglipVisionConfig(hidden_size=32, num_hidden_layers=2).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    (line,) = convert(capsys, folder, tmp_path / "adapter")
    assert "its vision_config is a 'siglip_vision_model', expected 'blip_2_vision_model'" in line


def test_frozen_parts_named_in_the_checkpoints_place_are_checked(tiny, tmp_path, capsys):
    arrived = arrive(tmp_path, *generator_of(tiny, "opt"))
    out = tmp_path / "again"
    (line,) = convert(capsys, arrived.folder, out, "llm.id=facebok/opt-2.7b")
    assert line.startswith("error: llm.id='facebok/opt-2.7b': its config cannot be reached (")
    wide = tmp_path / "wide"
    from transformers import OPTConfig

    OPTConfig(hidden_size=48, word_embed_proj_dim=48).save_pretrained(wide)
    (line,) = convert(capsys, arrived.folder, out, f"llm.id={wide}")
    assert "is 48 wide, but" in line
    assert f"projects to {WIDTH} columns; name the language model that it was trained with" in line
    (line,) = convert(capsys, arrived.folder, out, f"encoder.id={tmp_path / 'nowhere'}")
    assert "no such folder; expected one with a config.json" in line


def test_arguments_override_what_transformers_says(retrieval, tmp_path, capsys):
    (line,) = convert(capsys, retrieval.folder, tmp_path / "out", "qformer.ffn_width=32")
    assert "is no transformers checkpoint that fits" in line
    assert "expected [32, 48]" in line
    convert(capsys, retrieval.folder, tmp_path / "out", "qformer.max_text_tokens=11", "encoder.num_tokens=3")
    config = read_model_part(tmp_path / "out")
    assert (config.qformer.max_text_tokens, config.encoder.num_tokens) == (11, 3)
    assert len(read_adapter(tmp_path / "out")) == len(retrieval.imported.tensors)


def test_errors_of_other_libraries_end_where_a_sentence_ends(tmp_path, capsys):
    (line,) = convert(capsys, "nobody/nothing", tmp_path / "out")
    (reason,) = [line[line.index("(") + 1 : line.rindex(")")]]
    assert len(reason) <= 200
    assert reason.endswith((".", "...")) or len(reason) < 160


# ---- pickles ----


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made by a checkpoint",)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_pickle_of_transformers_is_read_as_tensors_alone(retrieval, tmp_path, monkeypatch, sharded):
    monkeypatch.chdir(tmp_path)
    folder = copy_of(retrieval.folder, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = "pytorch_model-00001-of-00001.bin" if sharded else "pytorch_model.bin"
    torch.save(tensors, folder / file)
    if sharded:
        index = {"weight_map": dict.fromkeys(tensors, file)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    imported = import_blip2(str(folder))
    assert all(torch.equal(value, imported.tensors[name]) for name, value in retrieval.imported.tensors.items())
    torch.save({"query_tokens": Code()}, folder / file)
    with pytest.raises(ValueError, match=r"is a pickle that calls code \(posix.mkdir\), .* it was not run"):
        import_blip2(str(folder))
    assert not (tmp_path / "made by a checkpoint").exists()
