"""Converting LAVIS checkpoints: the released files' layouts in full size, encoders inside, and what is refused."""

import json
import os
import pickle

import pytest
import torch
from golden import run
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor

from qformer.checkpoint import read_adapter
from qformer.config import Stage1Part, Stage2Part
from qformer.inference import read_model_part
from qformer.interop.lavis import import_lavis, import_tensors

# The layouts of the released files, written down from their key lists and not from our tables.
BERT_BASE = {"layers": 12, "width": 768, "ffn": 3072, "queries": 32, "encoder": 1408, "words": 30523, "positions": 512,
             "contrastive": 256}  # fmt: skip
TOY = {
    "layers": 2,
    "width": 64,
    "ffn": 96,
    "queries": 4,
    "encoder": 24,
    "words": 12,
    "positions": 20,
    "contrastive": 16,
}


def linear(name: str, out: int, into: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [out, into], f"{name}.bias": [out]}


def norm(name: str, width: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [width], f"{name}.bias": [width]}


def layout(
    s: dict[str, int], text: bool, heads: bool, projection: tuple[str, int] | None = None
) -> dict[str, list[int]]:
    """Names and shapes of a LAVIS file: stage 1 has text and heads, stage 2 a projection, InstructBLIP also text."""
    d, bert = s["width"], "Qformer.bert"
    found = {"query_tokens": [1, s["queries"], d], **norm("ln_vision", s["encoder"])}
    found |= {f"{bert}.embeddings.position_ids": [1, s["positions"]], **norm(f"{bert}.embeddings.LayerNorm", d)}
    if text:
        found |= {f"{bert}.embeddings.word_embeddings.weight": [s["words"], d]}
        found |= {f"{bert}.embeddings.position_embeddings.weight": [s["positions"], d]}
    for i in range(s["layers"]):
        layer = f"{bert}.encoder.layer.{i}"
        for attention, memory in (("attention", d), ("crossattention", s["encoder"])):
            if attention == "attention" or i % 2 == 0:
                found |= linear(f"{layer}.{attention}.self.query", d, d)
                found |= linear(f"{layer}.{attention}.self.key", d, memory)
                found |= linear(f"{layer}.{attention}.self.value", d, memory)
                found |= linear(f"{layer}.{attention}.output.dense", d, d)
                found |= norm(f"{layer}.{attention}.output.LayerNorm", d)
        for suffix in ("_query", "") if text else ("_query",):
            found |= linear(f"{layer}.intermediate{suffix}.dense", s["ffn"], d)
            found |= linear(f"{layer}.output{suffix}.dense", d, s["ffn"])
            found |= norm(f"{layer}.output{suffix}.LayerNorm", d)
    if heads:
        head = "Qformer.cls.predictions"
        found |= {"temp": [], f"{head}.bias": [s["words"]], **linear(f"{head}.decoder", s["words"], d)}
        found |= {**linear(f"{head}.transform.dense", d, d), **norm(f"{head}.transform.LayerNorm", d)}
        found |= {**linear("vision_proj", s["contrastive"], d), **linear("text_proj", s["contrastive"], d)}
        found |= linear("itm_head", 2, d)
    if projection:
        found |= linear(*projection, d)
    return found


def encoder_layout(width: int, depth: int, ffn: int, patch: int, tokens: int) -> dict[str, list[int]]:
    found = {"cls_token": [1, 1, width], "pos_embed": [1, tokens, width]}
    found |= {"patch_embed.proj.weight": [width, 3, patch, patch], "patch_embed.proj.bias": [width]}
    for i in range(depth):
        block = f"blocks.{i}"
        found |= {**norm(f"{block}.norm1", width), **norm(f"{block}.norm2", width)}
        found |= {f"{block}.attn.q_bias": [width], f"{block}.attn.v_bias": [width]}
        found |= {f"{block}.attn.qkv.weight": [3 * width, width], **linear(f"{block}.attn.proj", width, width)}
        found |= {**linear(f"{block}.mlp.fc1", ffn, width), **linear(f"{block}.mlp.fc2", width, ffn)}
    return found


def drawn(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    head = "Qformer.cls.predictions"
    if f"{head}.bias" in tensors:
        tensors[f"{head}.decoder.bias"] = tensors[f"{head}.bias"]
        tensors[f"{head}.decoder.weight"] = tensors["Qformer.bert.embeddings.word_embeddings.weight"]
        tensors["temp"] = torch.tensor(0.05)
    return tensors


def weightless(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """One zero behind every shape."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def tokenizer_folder(folder, words: int) -> str:
    """A BERT-shaped tokenizer of so many tokens, [DEC] not among them."""
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(words - len(special)))])}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")),
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def llm_folder(folder, kind: str, width: int) -> str:
    """A language model's config, without its weights."""
    from transformers import OPTConfig, T5Config

    config = T5Config(d_model=width) if kind == "t5" else OPTConfig(hidden_size=width, word_embed_proj_dim=width)
    config.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def toy(tmp_path):
    """A stage-1 checkpoint of toy size and the arguments that fit it."""
    path = tmp_path / "stage1.pth"
    torch.save({"model": drawn(layout(TOY, text=True, heads=True))}, path)
    words = tokenizer_folder(tmp_path / "words", TOY["words"] - 1)
    return path, ["encoder.loader=features", f"encoder.width={TOY['encoder']}", f"qformer.tokenizer={words}"]


def convert(path, out, *arguments) -> None:
    run("convert", ["--from", "lavis", str(path), "--out", str(out), *arguments])


def refused(capsys, path, out, *arguments) -> str:
    """The one line of a refusal, after which nothing is left."""
    with pytest.raises(SystemExit) as stopped:
        convert(path, out, *arguments)
    assert stopped.value.code == 2
    assert not out.exists()
    assert not list(out.parent.glob(".*partial"))
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("file", "text", "heads", "projection"),
    [
        ("blip2_pretrained.pth", True, True, None),
        ("blip2_pretrained_opt2.7b.pth", False, False, ("opt_proj", 2560)),
        ("blip2_pretrained_flant5xl.pth", False, False, ("t5_proj", 2048)),
        ("instruct_blip_vicuna7b_trimmed.pth", True, False, ("llm_proj", 4096)),
    ],
)
def test_the_released_files_are_covered_to_the_last_key(tmp_path, file, text, heads, projection):
    theirs = weightless(layout(BERT_BASE, text, heads, projection))
    arguments = ["encoder.loader=open_clip", "encoder.id=EVA01-g-14", "encoder.pretrained=laion400m_s11b_b41k"]
    if text:
        arguments += [f"qformer.tokenizer={tokenizer_folder(tmp_path / 'words', BERT_BASE['words'] - 1)}"]
    if projection:
        kind = "t5" if projection[0] == "t5_proj" else "decoder"
        arguments += [f"llm.id={llm_folder(tmp_path / 'llm', kind, projection[1])}"]
    config, tensors, report = import_tensors(theirs, file, arguments)
    assert report.new == []
    assert all(name.endswith(("position_ids", "decoder.weight", "decoder.bias")) for name in report.dropped)
    assert len(report.mapped) + len(report.dropped) == len(theirs)
    assert sum(map(Tensor.numel, tensors.values())) == sum(theirs[n].numel() for n in theirs if n not in report.dropped)
    q = config.qformer
    assert [q.layers, q.width, q.heads, q.ffn_width, q.queries] == [12, 768, 12, 3072, 32]
    assert [q.cross_attention_frequency, q.max_text_positions, q.contrastive_width] == [2, 512, 256]
    if projection:
        assert isinstance(config, Stage2Part)
        assert config.stage2.instructed == text
        assert config.llm.activation == ("gelu" if projection[0] == "t5_proj" else None)
    else:
        assert isinstance(config, Stage1Part)


def test_convert_writes_an_adapter_of_the_same_tensors(toy, tmp_path, capsys):
    path, arguments = toy
    convert(path, tmp_path / "out", *arguments)
    theirs = torch.load(path, weights_only=True)["model"]
    tensors = read_adapter(tmp_path / "out")
    assert tensors["temperature"] == theirs["temp"]
    assert tensors["qformer.blocks.1.text_ffn.up.weight"].equal(
        theirs["Qformer.bert.encoder.layer.1.intermediate.dense.weight"]
    )
    assert read_model_part(tmp_path / "out").qformer.queries == TOY["queries"]
    said = capsys.readouterr().out
    assert f"{len(tensors)} tensors mapped" in said
    assert "tied to the word embeddings" in said
    assert "adapter of stage 1" in said
    assert "peak memory" in said
    assert "converted from lavis" in (tmp_path / "out" / "README.md").read_text()


def test_a_plain_dictionary_and_safetensors_are_read_too(toy, tmp_path):
    path, arguments = toy
    theirs = torch.load(path, weights_only=True)["model"]
    torch.save(theirs, tmp_path / "plain.pth")
    torch.save(theirs, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file({n: t.clone() for n, t in theirs.items()}, tmp_path / "plain.safetensors")
    expected = import_lavis(path, arguments).tensors
    for other in ("plain.pth", "old.pth", "plain.safetensors"):
        found = import_lavis(tmp_path / other, arguments).tensors
        assert found.keys() == expected.keys()
        assert all(found[name].equal(expected[name]) for name in found)


def test_half_precision_becomes_float32(toy, tmp_path):
    path, arguments = toy
    halves = {n: t.half() for n, t in torch.load(path, weights_only=True)["model"].items()}
    torch.save({"model": halves}, tmp_path / "half.pth")
    assert all(t.dtype == torch.float32 for t in import_lavis(tmp_path / "half.pth", arguments).tensors.values())


def test_an_instructed_file_is_known_by_its_words(toy, tmp_path):
    _, arguments = toy
    theirs = drawn(layout(TOY, text=True, heads=False, projection=("t5_proj", 48)))
    llm = llm_folder(tmp_path / "llm", "t5", 48)
    config, tensors, _ = import_tensors(theirs, "t5 instructed", [*arguments, f"llm.id={llm}"])
    assert isinstance(config, Stage2Part)
    assert config.stage2.instructed
    assert "qformer.word_embeddings.weight" in tensors


def test_an_encoder_inside_becomes_a_folder_of_transformers(toy, tmp_path):
    from transformers import Blip2VisionModel

    path, arguments = toy
    eva = drawn(encoder_layout(width=24, depth=2, ffn=40, patch=4, tokens=10))
    theirs = torch.load(path, weights_only=True)["model"]
    torch.save({"model": theirs | {f"visual_encoder.{n}": t for n, t in eva.items()}}, tmp_path / "tuned.pth")
    out = tmp_path / "out"
    convert(tmp_path / "tuned.pth", out, "--encoder-heads", "3", arguments[2])
    encoder = read_model_part(out).encoder
    assert (encoder.loader, encoder.id, encoder.block) == ("transformers", str(out / "encoder"), -1)
    model = Blip2VisionModel.from_pretrained(out / "encoder")
    assert (model.config.num_attention_heads, model.config.image_size, model.config.patch_size) == (3, 12, 4)
    state = model.state_dict()
    assert len(state) == len(eva)  # one bias in the place of two in each of the two blocks, but the norm's two
    assert state["post_layernorm.weight"].equal(theirs["ln_vision.weight"])
    for ours, name in {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
        "encoder.layers.0.layer_norm1.weight": "blocks.0.norm1.weight",
        "encoder.layers.1.layer_norm2.bias": "blocks.1.norm2.bias",
        "encoder.layers.1.self_attn.qkv.weight": "blocks.1.attn.qkv.weight",
        "encoder.layers.0.self_attn.projection.bias": "blocks.0.attn.proj.bias",
        "encoder.layers.0.mlp.fc1.weight": "blocks.0.mlp.fc1.weight",
        "encoder.layers.1.mlp.fc2.bias": "blocks.1.mlp.fc2.bias",
    }.items():
        assert state[ours].equal(eva[name])
    bias = model.encoder.layers[1].self_attn.qkv.bias
    assert bias.tolist() == [*eva["blocks.1.attn.q_bias"].tolist(), *[0.0] * 24, *eva["blocks.1.attn.v_bias"].tolist()]
    preparation = json.loads((out / "encoder" / "preprocessor_config.json").read_text())
    assert preparation["size"] == {"height": 12, "width": 12}
    assert preparation["image_mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])


def test_an_encoder_that_is_not_eva_leaves_nothing_behind(toy, tmp_path, capsys):
    path, arguments = toy
    clip = {"visual_encoder.class_embedding": torch.zeros(24), "visual_encoder.ln_pre.weight": torch.zeros(24)}
    torch.save({"model": torch.load(path, weights_only=True)["model"] | clip}, tmp_path / "clip.pth")
    line = refused(capsys, tmp_path / "clip.pth", tmp_path / "out", arguments[2])
    assert "not EVA's ViT" in line
    line = refused(capsys, tmp_path / "clip.pth", tmp_path / "out", arguments[2], "encoder.id=ViT-L-14")
    assert "holds its own (visual_encoder.*); leave it out" in line


class Code:
    def __reduce__(self):
        return os.mkdir, ("made by a checkpoint",)


def test_refusals_of_files(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, arguments = toy
    out = tmp_path / "out"
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:-500])
    torch.save({"model": {"query_tokens": Code()}}, tmp_path / "code.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Code(), protocol=2))  # as PyTorch writes them
    (tmp_path / "text.pth").write_text("<html>404</html>")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 30)
    torch.save({"model": {"layer.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    for name, words in {
        "cut.pth": "is damaged or incomplete",
        "cut.safetensors": "is damaged or incomplete",
        "code.pth": "a pickle that calls code (posix.mkdir), not one of tensors alone; it was not run",
        "bare.pth": "a pickle that calls code",
        "text.pth": "is no file of PyTorch",
        "other.pth": "is no checkpoint of BLIP-2: it holds layer.weight ...; expected a LAVIS checkpoint",
        "list.pth": "holds no dictionary of tensors",
        "absent.pth": "does not exist; expected the file of a LAVIS checkpoint",
        "words": "is a folder; expected the file of a LAVIS checkpoint",
    }.items():
        line = refused(capsys, tmp_path / name, out, *arguments)
        assert line.startswith(f"error: {tmp_path / name}")
        assert words in line
    assert not (tmp_path / "made by a checkpoint").exists()


def test_refusals_of_what_does_not_fit(toy, tmp_path, capsys):
    path, (loader, width, words) = toy
    out, theirs = tmp_path / "out", torch.load(path, weights_only=True)["model"]
    line = refused(capsys, path, out, loader, "encoder.width=32", words)
    assert "is 32 wide, but" in line
    assert "trained on 24 columns (ln_vision)" in line
    line = refused(capsys, path, out, loader, width, f"qformer.tokenizer={tokenizer_folder(tmp_path / 'more', 20)}")
    assert "has 21 tokens with [DEC]" in line
    assert "12 word embeddings" in line
    assert "qformer.queries=5, but" in refused(capsys, path, out, loader, width, words, "qformer.queries=5")
    assert "qformer.heads (5)" in refused(capsys, path, out, loader, width, words, "qformer.heads=5")
    line = refused(capsys, path, out, loader, width, words, "llm.id=facebook/opt-2.7b")
    assert "is of stage 1 (without a language projection): unknown key llm.id" in line
    assert "missing value: encoder.loader" in refused(capsys, path, out, words)

    stage2 = tmp_path / "stage2.pth"
    torch.save({"model": drawn(layout(TOY, text=False, heads=False, projection=("opt_proj", 48)))}, stage2)
    line = refused(capsys, stage2, out, loader, width, f"llm.id={llm_folder(tmp_path / 'llm', 'decoder', 40)}")
    assert "is 40 wide, but" in line
    assert "projects to 48 columns (opt_proj)" in line
    assert "is of stage 2 (opt_proj): missing value: llm.id" in refused(capsys, stage2, out, loader, width)

    for name, change, words_of_line in [
        ("untied", {"Qformer.cls.predictions.decoder.bias": torch.zeros(12)}, "but they are one tensor"),
        ("strange", {"Qformer.bert.pooler.weight": torch.zeros(1)}, "has the unknown Qformer.bert.pooler.weight"),
        ("misshapen", {"itm_head.weight": torch.zeros(3, 64)}, "itm_head.weight is [3, 64], expected [2, 64]"),
    ]:
        torch.save({"model": theirs | change}, tmp_path / f"{name}.pth")
        assert words_of_line in refused(capsys, tmp_path / f"{name}.pth", out, loader, width, words)
    torch.save({"model": {n: t for n, t in theirs.items() if n != "itm_head.bias"}}, tmp_path / "lacking.pth")
    assert "lacks itm_head.bias" in refused(capsys, tmp_path / "lacking.pth", out, loader, width, words)


def test_an_existing_folder_is_kept(toy, tmp_path, capsys):
    path, arguments = toy
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        convert(path, tmp_path / "out", *arguments)
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("convert", ["--from", "laivs", str(path), "--out", str(tmp_path / "new")])
    assert "--from laivs: expected lavis or transformers" in capsys.readouterr().err


def test_help_helps(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("convert", ["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--from FORMAT SOURCE" in said
    assert "configs/encoder/eva_g.yaml" in said
