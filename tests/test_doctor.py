"""The doctor: a sound config passes, every mistake is named by the check it belongs to, and nothing is left behind."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import psutil
import pytest
import torch
from PIL import Image
from test_stages import stage_main
from tiny import Tiny, run_stage, write_records

from qformer.config import LlmConfig, Stage1Config, load_config
from qformer.doctor.checks import Case, check_device
from qformer.doctor.trial import Step, Trial, _activations, _of_memory, _of_time
from qformer.doctor.weights import find_weights, parameter_bytes, resident_bytes
from qformer.encoders import outline_encoder
from qformer.language import outline_language_model
from qformer.models import stage1
from qformer.parts import WEIGHT_FILES, WeightSource

REPO = Path(__file__).resolve().parent.parent


def examine(tmp_path: Path, *arguments: str) -> tuple[dict[str, tuple[str, str]], int]:
    """What stages/doctor.py writes as JSON, by check, and its exit code."""
    file = tmp_path / "doctor" / "findings.json"
    code = 0
    try:
        stage_main("doctor")([*arguments, "--json", str(file), "--sample", "24"])
    except SystemExit as stopped:
        code = stopped.code
    written = json.loads(file.read_text())
    assert written["ok"] is (code == 0)
    return {f["check"]: (f["status"], f["text"]) for f in written["findings"]}, code


def failed(found: dict[str, tuple[str, str]]) -> list[str]:
    return [check for check, (status, _) in found.items() if status == "FAILED"]


# ---- sound configs ----


def test_a_sound_stage1_is_all_ok_and_the_run_folder_untouched(tiny, tmp_path, capsys):
    run_dir = tmp_path / "run"
    found, code = examine(tmp_path, *tiny.stage1(run_dir, "train.validate_every_steps=2"))
    assert code == 0
    assert {status for check, (status, _) in found.items() if check != "time"} == {"ok"}  # without workers: as it falls
    assert list(found) == [
        "steps", "run folder", "device", "encoder", "tokenizer", "data", "captions", "validation", "trainable part",
        "disk", "models in memory", "step", "memory", "time",
    ]  # fmt: skip
    assert found["steps"][1] == "stage 1: 3 steps of 8 records (8 a forward x 1 process x 1 accumulated)"
    assert "5 tokens of 32" in found["encoder"][1]
    assert "24 records; 24 read" in found["data"][1]
    assert "48 captions of 5 to 15 tokens" in found["captions"][1]
    assert "8 records forward and back" in found["step"][1]
    assert "(chance 2.08)" in found["step"][1]
    assert "activations of 8 records (measured)" in found["memory"][1]
    assert "for 3 steps" in found["time"][1]
    assert "for 2 validations" in found["time"][1]
    assert not run_dir.exists()
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "all is well" or found["time"][0] == "warning"
    assert [line.split()[0] for line in said if line.startswith(" s")] == ["steps", "step"]


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_sound_stage2_is_known_by_its_llm(tiny, tmp_path, kind):
    found, code = examine(tmp_path, *tiny.stage2(tmp_path / "run", f"llm.id={getattr(tiny, kind)}"))
    assert code == 0
    assert found["steps"][1].startswith("stage 2")
    assert "tokenizer" not in found
    expected = "decoder-only, 32 wide; tokenizer: BOS [1], pad 0, line end 3" if kind == "opt" else "encoder-decoder"
    assert expected in found["language model"][1]
    assert "llm.max_target_tokens=32 holds them" in found["captions"][1]
    assert found["trainable part"][0] == "warning"
    assert "without stage 1" in found["trainable part"][1]
    assert found["step"][1].startswith("8 records forward and back")


def test_features_need_no_weights(tiny, tmp_path):
    found, code = examine(tmp_path, *tiny.stage1(tmp_path / "run", *tiny.on_features()))
    assert code == 0
    assert "a varying number of tokens of 24" in found["encoder"][1]
    assert "8 records forward and back" in found["step"][1]
    found, _ = examine(tmp_path, *tiny.stage1(tmp_path / "run", *tiny.on_features(), "encoder.width=23"), "--quick")
    assert found["data"][0] == "FAILED"
    assert "features are 24 wide, encoder.width=23" in found["data"][1]


def test_cached_features_stand_in_for_the_encoder(tiny, tmp_path):
    records = write_records(tmp_path / "pictures", 12)
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    records.write_text("".join(json.dumps({"image": r["image"], "caption": r["caption"]}) + "\n" for r in lines))
    cached = [f"data.train=[{records}]", "data.validation=[]", "data.augment=false", "data.max_text_tokens=16"]
    arguments = tiny.stage1(tmp_path / "run", f"data.features={tmp_path / 'cache'}", *cached)
    stage_main("cache_features")(arguments)
    found, code = examine(tmp_path, *arguments)
    assert code == 0
    assert f"features from data.features={tmp_path / 'cache'}: 5 tokens of 32" in found["encoder"][1]
    assert found["data"][0] == "ok"
    assert found["step"][1].startswith("8 records forward and back")
    found, _ = examine(tmp_path, *arguments, "encoder.block=-1", "--quick")
    assert found["encoder"][0] == "FAILED"
    assert "does not fit this config" in found["encoder"][1]


def test_a_run_that_goes_on_and_what_it_started_from(tiny, tmp_path):
    run_dir = tmp_path / "run"
    run_stage(1, tiny.stage1(run_dir, "train.max_steps=2", "data.validation=[]"))
    before = sorted(run_dir.rglob("*"))
    found, _ = examine(tmp_path, *tiny.stage1(run_dir), "--quick")
    assert found["run folder"][0] == "FAILED"
    assert "already holds a run (step-2); go on with train.resume=auto" in found["run folder"][1]

    found, code = examine(tmp_path, *tiny.stage1(run_dir, "train.resume=auto", "train.max_steps=7"))
    assert code == 0
    assert "goes on from step-2" in found["run folder"][1]
    assert "for 5 steps" in found["time"][1]
    assert sorted(run_dir.rglob("*")) == before

    init_from = f"stage2.init_from={run_dir / 'adapter'}"
    found, code = examine(tmp_path, *tiny.stage2(tmp_path / "s2", init_from), "--quick")
    assert code == 0
    assert "tensors loaded from" in found["trainable part"][1]
    assert "step" not in found, "--quick"
    found, code = examine(tmp_path, *tiny.stage2(tmp_path / "s2", init_from, "encoder.block=-1"))
    assert failed(found) == ["trainable part"]
    assert "encoder.block=-2" in found["trainable part"][1]
    assert found["step"] == ("warning", "not tried, for these failed: disk, models in memory, trainable part")
    found, _ = examine(tmp_path, *tiny.stage2(tmp_path / "s2", init_from, "qformer.queries=6"), "--quick")
    assert "qformer.query_tokens is [1, 4, 32], the config wants [1, 6, 32]" in found["trainable part"][1]


# ---- one mistake each ----


@pytest.fixture(scope="module")
def broken(tiny: Tiny, tmp_path_factory) -> Path:
    """Folders with something wrong in them."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "file").write_text("")
    for name, source, lost in (("vit", tiny.encoder.removeprefix("local-dir:"), "open_clip_model.safetensors"),
                               ("opt", tiny.opt, "model.safetensors")):  # fmt: skip
        shutil.copytree(source, folder / name)
        (folder / name / lost).unlink()
    for name, count in (("one", 1), ("many", 6)):
        write_records(folder / name, 24)
        for path in sorted((folder / name).glob("*.png"))[:count]:
            path.write_bytes(path.read_bytes()[:60])
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "strange.jsonl").write_text(json.dumps({"image": "a.png", "caption": "ein rotes Quadrat"}) + "\n")
    return folder


@pytest.mark.parametrize(
    ("check", "mistake", "said"),
    [
        ("config", "train.max_stps=3", "unknown key train.max_stps in train.max_stps=3; nearest is train.max_steps"),
        ("run folder", "run.dir={broken}/file/run", "cannot be written (Not a directory: {broken}/file); choose another"),
        ("run folder", "train.resume={broken}", "is no checkpoint"),
        ("device", "train.mixed_precision=fp16", "fp16 needs a GPU"),
        ("encoder", "encoder.id=local-dir:{broken}/none", "no such folder"),
        ("encoder", "encoder.id=local-dir:{broken}/vit", "the folder has no weights; expected one of model.safetensors"),
        ("encoder", "encoder.id=ViT-B-33", "nearest are ViT-B-32"),
        ("encoder", "encoder.id=ViT-B-32", "encoder.pretrained is missing for 'ViT-B-32'"),
        ("encoder", "data.features={broken}/cache", "write it first with stages/cache_features.py and this config (up to "
         "7.68 kB for 24 records in bfloat16"),
        ("tokenizer", "qformer.tokenizer={tiny.opt}", "has no cls_token"),
        ("tokenizer", "qformer.tokenizer={broken}/none", "cannot be loaded"),
        ("data", "data.train=[{broken}/none.jsonl]", "data.train: there is no record file"),
        ("data", "data.train=[{broken}/many/records.jsonl]", "6 (25.0%) cannot be read, the first: {broken}/many/00.png"),
        ("validation", "data.validation=[{broken}/none.jsonl]", "data.validation: there is no record file"),
        ("trainable part", "stage1.init_from={broken}", "is no adapter"),
        ("trainable part", "qformer.init_from={broken}/vit", "has no weights"),
    ],
)  # fmt: skip
def test_a_mistake_fails_its_own_check(tiny, broken, tmp_path, check, mistake, said):
    fill = {"broken": broken, "tiny": tiny}
    found, code = examine(tmp_path, *tiny.stage1(tmp_path / "run", mistake.format(**fill)), "--quick")
    assert code == 2
    assert failed(found) == [check]
    assert said.format(**fill) in found[check][1]


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("llm.id=nobody/nothing", "neither a folder here nor a language model that can be fetched"),
        ("llm.id={broken}/opt", "llm.id='{broken}/opt': the folder has no weights"),
    ],
)
def test_a_language_model_that_cannot_be_had(tiny, broken, tmp_path, mistake, said):
    found, code = examine(tmp_path, *tiny.stage2(tmp_path / "run", mistake.format(broken=broken)))
    assert (code, failed(found)) == (2, ["language model"])
    assert said.format(broken=broken) in found["language model"][1]
    assert found["captions"] == ("warning", "not checked, for it needs: language model") or "opt" in mistake
    assert found["step"][0] == "warning"


@pytest.mark.parametrize(
    ("check", "mistake", "said"),
    [
        ("data", "data.train=[{broken}/one/records.jsonl]", "1 (4.2%) cannot be read"),
        ("captions", "qformer.max_text_tokens=13", "50.0% are longer than qformer.max_text_tokens=13 and would be cut: 15 holds"),
        ("captions", "data.train=[{broken}/strange.jsonl]", "60.0% of their tokens are unknown to qformer.tokenizer"),
        ("device", "train.cpu=false", "no GPU is found"),
    ],
)  # fmt: skip
def test_a_doubt_is_a_warning(tiny, broken, tmp_path, check, mistake, said, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    found, code = examine(tmp_path, *tiny.stage1(tmp_path / "run", mistake.format(broken=broken)), "--quick")
    assert code == 0
    assert found[check][0] == "warning"
    assert said in found[check][1]


def test_processes_that_do_not_divide_the_batch(tiny, tmp_path):
    found, _ = examine(tmp_path, *tiny.stage1(tmp_path / "run"), "--quick", "--processes", "3")
    assert "train.global_batch_size=8 must be a multiple of train.micro_batch_size=8 times 3" in found["steps"][1]
    found, _ = examine(
        tmp_path, *tiny.stage1(tmp_path / "run", "train.micro_batch_size=2"), "--quick", "--processes", "2"
    )
    assert "2 a forward x 2 processes x 2 accumulated" in found["steps"][1]


def test_a_full_disk(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    found, _ = examine(tmp_path, *tiny.stage1(tmp_path / "run"), "--quick")
    assert failed(found) == ["disk"]
    assert "lower train.keep_checkpoints" in found["disk"][1]


def test_a_loss_that_is_not_finite(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(stage1, "itm_loss", lambda logits, *more: logits.sum() * math.inf)
    found, code = examine(tmp_path, *tiny.stage1(tmp_path / "run"))
    assert (code, failed(found)) == (2, ["step"])
    assert "a loss is not finite" in found["step"][1]


def test_models_that_do_not_fit_are_not_loaded_and_batches_that_do_not_fit_not_tried(tiny, tmp_path, monkeypatch):
    sizes = {}
    for free in (100_000, 10**10):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        found, code = examine(tmp_path, *tiny.stage1(tmp_path / "run"))
        sizes[free] = found
    assert failed(sizes[100_000]) == ["models in memory"]
    assert "do not fit" in sizes[100_000]["models in memory"][1]
    assert "step" not in failed(sizes[100_000])
    assert code == 0

    # room for the models and about five records
    static, activations = [float(n) for n in _megabytes(sizes[10**10]["memory"][1])[1:]]
    free = int(1e6 * (static + activations * 0.7))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    found, code = examine(tmp_path, *tiny.stage1(tmp_path / "run"))
    assert (code, failed(found)) == (2, ["memory"])
    assert "4 records forward and back" in found["step"][1]
    assert "the full 8 records were not tried" in found["step"][1]
    assert "(scaled from steps of 4): it does not fit; set train.micro_batch_size=" in found["memory"][1]


def _megabytes(text: str) -> list[str]:
    """The total, the static and the activation megabytes of a finding about memory."""
    words = text.split()
    return [words[i - 1] for i, word in enumerate(words) if word == "MB"]


# ---- estimates ----


@pytest.mark.parametrize("precision", [[], ["train.mixed_precision=bf16"]])
def test_activations_of_a_larger_batch_are_foretold(tiny, tmp_path, precision):
    config = load_config(Stage1Config, tiny.stage1(tmp_path / "run", *precision))
    case = Case(config)
    check_device(case)
    trial = Trial(case)
    small, large = [trial.step(2), trial.step(4)], trial.step(16)
    assert _activations(small, 16) == pytest.approx(large.activation_bytes, rel=0.2)
    assert large.activation_bytes > 2 * small[1].activation_bytes


def test_a_step_of_the_trial_is_not_counted_as_memory_of_the_parameters(tiny, tmp_path):
    """Weights are counted once, with the models: without a batch nothing would be left."""
    config = load_config(Stage1Config, tiny.stage1(tmp_path / "run", "qformer.ffn_width=4096"))
    case = Case(config)
    check_device(case)
    trial = Trial(case)
    weights = parameter_bytes(trial.model.adapter.qformer.layers[0].text_ffn)
    assert weights > 1e6
    one, two = trial.step(1), trial.step(2)
    assert 2 * one.activation_bytes - two.activation_bytes < 0.3 * weights


def fake_case(*more: str, **values) -> Case:
    given = ["run.dir=x", "train.max_steps=101", "train.global_batch_size=64", "train.micro_batch_size=8",
             "data.train=[x]", "encoder.loader=features", "encoder.width=4", "optim.warmup_steps=0", *more]  # fmt: skip
    return Case(load_config(Stage1Config, given), **values)


def test_time_to_finish_is_steps_times_micro_batches_plus_validations():
    step = Step(8, 0.5, 0.1, 0, {}, 1.0)
    case = fake_case("data.validation=[x]", "train.validate_every_steps=50", "train.validation_records=80", processes=2,
                     first_step=1)  # fmt: skip
    found = _of_time(case, step)
    # 100 steps of 4 micro-batches on each of two processes; 3 validations of 40 records each
    assert found.status == "ok"
    assert found.text.startswith("0:03:22 for 100 steps of 2 s (32 records/s, 2 processes, their communication not")
    assert "0:00:02 of it for 3 validations" in found.text

    found = _of_time(fake_case("data.workers=2", read_s=0.2), step)  # 64 records: 6.4 s to read, 4 s to compute
    assert found.status == "warning"
    assert found.text.startswith("0:10:46 for 101 steps of 6.4 s")
    assert "reading takes 6.4 s a step, computing 4 s" in found.text


def test_memory_names_the_largest_batch_that_fits():
    small = [Step(2, 1, 1, 30, {}, 1), Step(4, 1, 1, 50, {}, 1)]  # 10 and 10 a record
    case = fake_case(static_bytes=100, free_bytes=170)
    found = _of_memory(case, small, _activations(small, 8), measured=False)
    assert found.status == "FAILED"
    assert "set train.micro_batch_size=5 or less" in found.text
    assert _of_memory(fake_case(static_bytes=100, free_bytes=195), small, 90, measured=False).status == "warning"
    assert _of_memory(fake_case(static_bytes=100, free_bytes=300), small, 90, measured=False).status == "ok"


def test_an_outline_takes_no_memory_and_has_the_sizes_of_the_model(tiny, tmp_path):
    config = load_config(Stage1Config, tiny.stage1(tmp_path / "run", "encoder.dtype=bfloat16")).encoder
    outline, real = outline_encoder(config), build_real(config)
    assert {p.device.type for p in outline.parameters()} == {"meta"}
    assert parameter_bytes(outline) == parameter_bytes(real)
    config.id, config.random_weights = "EVA01-g-14", True
    start = time.monotonic()
    assert parameter_bytes(outline_encoder(config)) == pytest.approx(1.97e9, rel=0.01)  # a billion of two bytes
    assert time.monotonic() - start < 30


def build_real(config):
    from qformer.build import build_encoder

    return build_encoder(config)


# ---- weights of the hub ----


def test_weights_in_the_cache_on_the_hub_or_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--some--model/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--model/refs").mkdir()
    (tmp_path / "models--some--model/refs/main").write_text("abc")
    (snapshot / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
    )
    (snapshot / "1.safetensors").write_bytes(b"1" * 100)
    with pytest.raises(
        ValueError, match=r"llm\.id='some/model': its weights are not in the cache and the hub cannot be"
    ):
        find_weights(WeightSource("llm.id", "some/model"))
    (snapshot / "2.safetensors").write_bytes(b"2" * 50)
    assert find_weights(WeightSource("llm.id", "some/model")) == ("some/model in the cache", 150, False)

    files = [SimpleNamespace(filename=name, file_size=n, will_download=True) for name, n in
             (("model.safetensors.index.json", 1), ("1.safetensors", 100), ("2.safetensors", 50), ("x.bin", 7))]  # fmt: skip
    monkeypatch.setattr("qformer.doctor.weights.snapshot_download", lambda *a, **k: files)
    assert find_weights(WeightSource("llm.id", "other/model")) == ("other/model on the hub", 150, True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=149))
    with pytest.raises(ValueError, match="set HF_HOME to a larger disk"):
        find_weights(WeightSource("llm.id", "other/model"))
    files[:] = files[3:]
    with pytest.raises(ValueError, match="the repository has no weights"):
        find_weights(WeightSource("llm.id", "other/model"))


def test_a_folder_that_lacks_a_shard(tmp_path):
    (tmp_path / WEIGHT_FILES[1]).write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    (tmp_path / "1.safetensors").write_bytes(b"1")
    with pytest.raises(ValueError, match=r"lacks 2\.safetensors \(1 of 2 files\)"):
        find_weights(WeightSource("llm.id", str(tmp_path)))


def test_a_quantised_language_model_is_counted_as_one(tiny):
    llm = outline_language_model(LlmConfig(id=str(tiny.opt)))
    inside = llm.model.model  # without the head
    matrices = sum(m.weight.numel() for m in inside.modules() if isinstance(m, torch.nn.Linear))
    whole = resident_bytes(llm, "no")
    assert whole == parameter_bytes(llm)
    assert whole - resident_bytes(llm, "8bit") == matrices * (4 - 1)
    assert whole - resident_bytes(llm, "4bit") == pytest.approx(matrices * (4 - 0.5625), abs=20)


def test_a_mistake_in_the_config_is_said_before_torch_is_imported():
    code = (
        "import sys, contextlib; from stages import doctor\n"
        "with contextlib.suppress(SystemExit): doctor.main(['configs/shapes/stage1.yaml', 'train.max_stepz=3'])\n"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True)
    assert "train.max_stepz" in run.stdout
    assert run.stdout.splitlines()[-1] == "False"
