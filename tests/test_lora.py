"""What learns beside the Q-Former is trained, kept, resumed and handed on; what is not asked for stays as it was."""

import hashlib
import json
import multiprocessing
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_export import of_transformers
from tiny import Tiny, run_stage, shake
from torch import Tensor, nn

import qformer
from qformer import language, tuning
from qformer.build import build_stage1, build_stage2
from qformer.checkpoint import read_adapter, save_adapter, trainable_tensors
from qformer.config import Stage1Config, Stage2Config, load_config, to_yaml
from qformer.data import Batch
from qformer.interop.export import export

QUIET = ["data.validation=[]", "data.augment=false"]
CASES = {
    "lora of both": (2, ["tune.llm=lora", "tune.encoder=lora"], {"llm_lora", "encoder_lora"}),
    "lora of t5": (2, ["llm.id={t5}", "tune.llm=lora", "tune.lora_targets=[q,EncDecAttention.v]"], {"llm_lora"}),
    "whole encoder": (1, ["tune.encoder=full"], {"encoder"}),
}


def arguments(tiny: Tiny, stage: int, run_dir: Path, *more: str) -> list[str]:
    return getattr(tiny, f"stage{stage}")(run_dir, *QUIET, *(m.format(t5=tiny.t5) for m in more))


def build(tiny: Tiny, stage: int, run_dir: Path, *more: str):
    """A model whose matrices are all random, as if trained, and its config."""
    given = arguments(tiny, stage, run_dir, *more)
    if stage == 1:
        config = load_config(Stage1Config, given)
        model = build_stage1(config)
    else:
        config = load_config(Stage2Config, given)
        model = build_stage2(config)
    shake(model.adapter, seed=5, by=0.05)
    return model, config


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(n.encode() + t.numpy().tobytes() for n, t in sorted(tensors.items()))).hexdigest()


def frozen(model: nn.Module) -> str:
    """A digest of all that should stay as it is."""
    return digest({n: p.detach() for n, p in model.named_parameters() if not p.requires_grad})


@pytest.fixture(scope="module", params=CASES)
def run(request, tiny, tmp_path_factory):
    """A run of four steps, and what it should have trained."""
    stage, more, parts = CASES[request.param]
    folder = tmp_path_factory.mktemp("tuned") / "run"
    more = [*more, "train.max_steps=4", "train.checkpoint_every_steps=2", "train.gradient_checkpointing=[qformer]"]
    run_stage(stage, arguments(tiny, stage, folder, *more))
    return stage, more, parts, folder


def test_what_learns_is_trained_and_loads_again(run, tiny, tmp_path):
    stage, more, parts, folder = run
    start, _ = build(tiny, stage, tmp_path, *more)
    model = qformer.load(folder / "adapter", device="cpu").model
    assert frozen(model) == frozen(start), "a frozen weight has changed"
    assert {n for n, _ in model.adapter.named_children()} & set(tuning.EXTRA_TRAINABLE) == parts
    last = load_file(folder / "checkpoints/step-4/adapter.safetensors")
    assert digest(trainable_tensors(model.adapter)) == digest(last)
    first = load_file(folder / "checkpoints/step-2/adapter.safetensors")
    for part in parts:
        inside = [name for name in last if name.startswith(part + ".")]
        # for a key bias adds the same to all scores, and LayerNorm takes away what is the same everywhere
        still = [n for n in inside if torch.equal(first[n], last[n]) and not n.endswith("bias")]
        assert inside
        assert still == []
        assert metrics(folder)[0][f"gradient_norm_{part.removesuffix('_lora') if 'encoder' in part else part}"] > 0
    loras = {p for p in parts if p.endswith("_lora")}
    assert {p.name for p in (folder / "adapter").iterdir() if p.is_dir()} == loras
    assert not [n for n in load_file(folder / "adapter/adapter.safetensors") if n.split(".")[0] in loras]


def test_a_resumed_run_is_the_uninterrupted_one(run, tiny, tmp_path):
    stage, more, _, folder = run
    shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/step-4")
    shutil.rmtree(tmp_path / "again/adapter")
    run_stage(stage, arguments(tiny, stage, tmp_path / "again", *more, "train.resume=auto"))
    assert digest(read_adapter(tmp_path / "again/adapter")) == digest(read_adapter(folder / "adapter"))
    moments = "checkpoints/step-4/optimizer.safetensors"
    assert digest(load_file(tmp_path / "again" / moments)) == digest(load_file(folder / moments))


def test_a_damaged_lora_is_found_out(tiny, tmp_path):
    model, config = build(tiny, 2, tmp_path, "tune.llm=lora")
    save_adapter(tmp_path / "adapter", model.adapter, to_yaml(config), "")
    file = tmp_path / "adapter/llm_lora/adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"llm_lora/adapter_model.safetensors is damaged"):
        qformer.load(tmp_path / "adapter", device="cpu")


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_peft_puts_the_lora_on_the_bare_model(tiny, tmp_path, kind):
    from peft import PeftModel

    model, config = build(tiny, 2, tmp_path, f"llm.id={getattr(tiny, kind)}", "tune.llm=lora")
    save_adapter(tmp_path / "adapter", model.adapter, to_yaml(config), "")
    llm = qformer.load(tmp_path / "adapter", device="cpu").model.llm
    bare = language.load_language_model(getattr(tiny, kind))
    ids = torch.tensor([[7, 8, 9, 1]])
    given = {"input_ids": ids} | ({"decoder_input_ids": ids} if kind == "t5" else {})
    with torch.no_grad():
        ours, without = llm.model(**given).logits, bare.model(**given).logits
        theirs = PeftModel.from_pretrained(bare.model, str(tmp_path / "adapter/llm_lora"))(**given).logits
    assert torch.equal(ours, theirs)
    assert (ours - without).abs().max() > 1e-3


@pytest.mark.parametrize(("stage", "tune"), [(1, "tune.encoder=lora"), (2, "tune.llm=lora"), (2, "tune.encoder=full")])
def test_an_export_has_it_merged(tiny, tmp_path, stage, tune):
    """`export` compares with transformers on the merged weights; these have to say what the LoRA said."""
    vit = of_transformers(tmp_path / "vit", "ViT") | {"block": -2}
    encoder = [f"encoder.{key}={value}" for key, value in vit.items()]
    model, config = build(
        tiny,
        stage,
        tmp_path,
        *encoder,
        tune,
        "qformer.feature_norm_eps=1e-12",
        "llm.prompt=a" if stage == 2 else "qformer.dropout=0",
    )
    side = model.encoder.input_transform.size
    pixels = torch.randn(1, 3, side, side)
    before = _says(model, pixels)
    report = export(model, config, tmp_path / "out")
    assert "fits Blip2VisionModel" in report.why
    assert not set(dict(model.adapter.named_children())) & set(tuning.EXTRA_TRAINABLE)
    assert torch.allclose(before, _says(model, pixels), atol=1e-4)


@torch.no_grad()
def _says(model, pixels: Tensor) -> Tensor:
    model.eval()
    features = model.encoder(pixels)
    if not hasattr(model, "llm"):
        return features.tokens
    return model.llm.loss(model.visual_prompt(features, [""]), [""], ["a red square"]).total


# ---- gradient checkpointing ----


def _step(model, stage: int) -> tuple[float, dict[str, Tensor], int]:
    """Loss, gradient and the bytes that the forward pass keeps, without parameters."""
    torch.manual_seed(0)
    images, texts = torch.randn(4, 3, 32, 32), ["a red square", "one dot", "a blue dot on the left", "a photo"]
    batch = Batch(images, None, texts, ["0", "1", "2", "3"], [], [], [], [], [], [])
    known, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor: Tensor) -> Tensor:
        if (at := tensor.untyped_storage().data_ptr()) not in known:
            saved[at] = tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    prepared = model.prepare(batch, 0)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        output = model(prepared, torch.tensor(float(prepared.target_tokens)))
    output.loss.backward()
    gradient = {n: p.grad.clone() for n, p in model.adapter.named_parameters() if p.grad is not None}
    model.adapter.zero_grad()
    return float(output.loss.detach()), gradient, sum(saved.values())


@pytest.mark.parametrize(
    ("stage", "part", "more"),
    [
        (1, "qformer", []),
        (2, "llm", []),
        (2, "llm", ["llm.id={t5}", "tune.llm=lora"]),
        (1, "encoder", ["tune.encoder=full"]),
        (2, "encoder", ["tune.encoder=lora"]),
    ],
)
def test_computing_blocks_again_changes_nothing_but_memory(tiny, tmp_path, stage, part, more):
    model, _ = build(tiny, stage, tmp_path, *more, "qformer.dropout=0.2")
    loss, gradient, kept = _step(model, stage)
    again = _step(model, stage)
    assert again[0] == loss, "the test itself does not repeat"
    assert again[2] == kept
    tuning.checkpoint_activations(model, [part])
    lean_loss, lean_gradient, lean = _step(model, stage)
    assert lean_loss == loss
    assert [n for n in gradient if not torch.equal(gradient[n], lean_gradient[n])] == []
    assert gradient.keys() == lean_gradient.keys()
    assert lean < (0.97 if part == "encoder" else 0.7) * kept


# ---- several processes ----


def be_rank(me: int, port: int, runs: list[tuple[int, list[str]]]) -> None:
    os.environ.update(RANK=str(me), LOCAL_RANK=str(me), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    for stage, given in runs:
        run_stage(stage, given)


def test_two_ranks_have_the_gradient_of_one(tiny, tmp_path):
    """An encoder that learns is learnt from other ranks' negatives as well; a LoRA is averaged though DDP never runs it."""
    more = {1: ["tune.encoder=full"], 2: ["tune.encoder=lora", "tune.llm=lora"]}
    for stage, given in more.items():
        given += ["qformer.dropout=0", "data.workers=0"]
        run_stage(stage, arguments(tiny, stage, tmp_path / f"one{stage}", *given))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = [(s, arguments(tiny, s, tmp_path / f"two{s}", *m, "train.micro_batch_size=4")) for s, m in more.items()]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "qformer.training", "qformer.build"])
    processes = [context.Process(target=be_rank, args=(me, port, runs)) for me in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(150)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    for stage in (1, 2):
        one, two = metrics(tmp_path / f"one{stage}"), metrics(tmp_path / f"two{stage}")
        assert len(one) == len(two) == 3
        names = [n for n in one[0] if n.startswith("gradient_norm") or n in ("itc", "itm", "itg", "lm")]
        assert "gradient_norm_encoder" in names
        for a, b in zip(one, two, strict=True):
            assert {n: b[n] for n in names} == pytest.approx({n: a[n] for n in names}, rel=2e-3)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("stage", "more", "said"),
    [
        (2, ["tune.llm=lora", "tune.lora_targets=[qproj]"], r"'qproj' .* nearest: q_proj"),
        (2, ["tune.encoder=lora", "tune.lora_targets=[out_proj]"], r"'out_proj' ends the name of no linear layer"),
        (2, ["tune.encoder=full", "encoder.dtype=bfloat16"], r"set encoder.dtype=float32"),
        (2, ["tune.encoder=lora", "data.features=cache"], r"set data.features=null"),
        (1, ["tune.llm=lora"], r"stage 1 has no language model"),
        (1, ["tune.encoder=lora", "train.micro_batch_size=4", "stage1.itc_batch_size=8"], r"must be frozen"),
        (1, ["train.gradient_checkpointing=[llm]"], r"stage 1 has no language model"),
        (2, ["train.gradient_checkpointing=[encoder]"], r"a frozen encoder keeps no activations"),
        (2, ["train.gradient_checkpointing=[qfomer]"], r"not one of qformer, encoder, llm"),
        (2, ["llm.quantise=4bit"], r"llm.quantise=4bit needs a CUDA GPU"),
        (2, ["llm.quantise=8bit", "llm.random_weights=true", "tune.llm=lora"], r"only weights that are read"),
    ],
)
def test_refusals(tiny, tmp_path, monkeypatch, stage, more, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=said) as error:
        build(tiny, stage, tmp_path, *more)
    assert "\n" not in str(error.value)


def test_an_adapter_with_a_lora_is_not_begun_from_without_it(tiny, tmp_path):
    model, config = build(tiny, 2, tmp_path, "tune.encoder=full")
    save_adapter(tmp_path / "adapter", model.adapter, to_yaml(config), "")
    begin = f"stage2.init_from={tmp_path / 'adapter'}"
    with pytest.raises(ValueError, match=r"was trained with tune.encoder=full, .* set that here too"):
        build_stage2(load_config(Stage2Config, arguments(tiny, 2, tmp_path, begin)))
    config = load_config(Stage2Config, arguments(tiny, 2, tmp_path, begin, "tune.encoder=full", "tune.llm=lora"))
    begun = build_stage2(config)
    assert {name.split(".")[0] for name in begun.transferred.new} == {"llm_lora"}
    assert torch.equal(begun.encoder(torch.ones(1, 3, 32, 32)).tokens, model.encoder(torch.ones(1, 3, 32, 32)).tokens)


def test_the_encoder_learns_less_the_deeper_it_is(tiny, tmp_path):
    """Adam's first step is as long as the learning rate, so that a weight's first change shows its own."""
    more = ["tune.encoder=full", "optim.encoder_layer_decay=0.5", "optim.warmup_steps=0", "optim.weight_decay=0"]
    more += ["train.max_steps=1", "data.validation=[]", "optim.lr=1e-3", "encoder.block=-1"]
    model = build_stage1(load_config(Stage1Config, arguments(tiny, 1, tmp_path, *more)))
    before = {name: p.detach().clone() for name, p in model.adapter.named_parameters()}
    run_stage(1, arguments(tiny, 1, tmp_path / "run", *more))
    after = read_adapter(tmp_path / "run" / "adapter")
    moved = {name: (after[name] - before[name]).abs().max().item() for name in after if name.startswith("encoder.")}
    scales = tuning.encoder_lr_scales(model, 0.5)
    assert moved.keys() == scales.keys()
    assert len(set(scales.values())) > 2
    for name, scale in scales.items():
        assert moved[name] == pytest.approx(1e-3 * scale, rel=0.1), name


def test_an_encoder_that_learns_may_begin_at_a_larger_size(tiny, tmp_path, capsys):
    """BLIP-2 learns at 224 px and is fine-tuned at 364."""
    run_stage(1, tiny.stage1(tmp_path / "s1", "train.max_steps=1", "data.validation=[]"))
    recipe = Path(__file__).resolve().parent.parent / "configs" / "finetune_retrieval.yaml"
    arguments = [
        *tiny.stage1(tmp_path / "run"), str(recipe), "data.validation=[]", "encoder.image_size=48", "optim.warmup_steps=0",
        "train.max_steps=1", "train.global_batch_size=8", "train.micro_batch_size=8", "train.mixed_precision=no",
        f"stage1.init_from={tmp_path / 's1' / 'adapter'}",
    ]  # fmt: skip
    run_stage(1, arguments)
    before, after = (qformer.load(tmp_path / name, "cpu").model for name in ("s1", "run"))
    moved = dict(after.encoder.named_parameters())
    same = [name for name, weight in before.encoder.named_parameters() if torch.equal(weight, moved[name])]
    assert len(same) < len(moved) / 2
    assert not torch.equal(before.adapter.qformer.query_tokens, after.adapter.qformer.query_tokens)
    with pytest.raises(SystemExit):
        run_stage(1, [*arguments, "tune.encoder=no", "train.gradient_checkpointing=[]"])
    assert "encoder.image_size=None, this config has encoder.image_size=48" in capsys.readouterr().err


def test_quantisation_is_told_to_transformers(tiny, monkeypatch):
    """No GPU is needed to see what would be asked for: 4 bits, on this process's own device."""
    asked = {}

    def load(*args, **options):
        asked.update(options)
        raise ValueError("enough")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(language.loading.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(language.loading, "BitsAndBytesConfig", lambda **settings: settings)
    monkeypatch.setattr(language.loading, "load_frozen", load)
    with pytest.raises(ValueError, match="enough"):
        language.load_language_model(tiny.opt, dtype="bfloat16", quantise="4bit")
    assert asked["device_map"] == {"": 3}
    assert asked["quantization_config"]["load_in_4bit"]
    assert asked["quantization_config"]["bnb_4bit_compute_dtype"] == torch.bfloat16
