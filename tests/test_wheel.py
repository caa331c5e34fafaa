"""What `pip install qformer` gives without the clone: stages as modules, configs by name, the weights of Shapes."""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import qformer
from qformer.config.packaged import config_names

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the sources: building would leave folders in them."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    for name in ("qformer", "stages", "configs"):
        shutil.copytree(REPO / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", "."]
    done = subprocess.run([*command, "."], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return next(source.glob("qformer-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder of installed packages with the wheel in it."""
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def python(installed: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


def test_the_wheel_holds_stages_and_configs_and_none_of_the_examples(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    expected = {f"qformer/{name}" for name in config_names()}
    expected |= {f"qformer/stages/{path.name}" for path in (REPO / "stages").glob("*.py")}
    expected |= {path.relative_to(REPO).as_posix() for path in (REPO / "qformer").rglob("*.py")}
    expected |= {path.relative_to(REPO).as_posix() for path in (REPO / "qformer/shapes/weights").rglob("*.*")}
    assert expected == {name for name in names if name.startswith("qformer/")}
    assert {name.split("/")[0] for name in names} == {"qformer", f"qformer-{qformer.__version__}.dist-info"}


@pytest.mark.parametrize("stage", sorted(p.stem for p in (REPO / "stages").glob("[a-z]*.py")))
def test_every_stage_runs_as_a_module_in_an_empty_folder(installed, tmp_path, stage):
    done = python(installed, tmp_path, "-m", f"qformer.stages.{stage}", "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout


def test_packaged_configs_are_found_by_name_in_an_empty_folder(installed, tmp_path):
    names = ["configs/stage1.yaml", "configs/encoder/eva_g.yaml", "configs/data/coco.yaml"]
    arguments = ["-m", "qformer.stages.stage1", "run.dir=runs/s1", "--print-config"]
    done = python(installed, tmp_path, *arguments, *names)
    assert done.returncode == 0, done.stderr
    assert "id: EVA01-g-14" in done.stdout
    near = python(installed, tmp_path, *arguments, "configs/encodr/eva_g.yaml")
    assert near.returncode == 2
    assert near.stderr == (
        "config error: no config file configs/encodr/eva_g.yaml; nearest is configs/encoder/eva_g.yaml\n"
    )


def test_a_file_here_comes_before_the_packages_own(installed, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "stage1.yaml").write_text("optim: {lrr: 1}")
    done = python(installed, tmp_path, "-m", "qformer.stages.stage1", "configs/stage1.yaml")
    assert "unknown key optim.lrr in configs/stage1.yaml" in done.stderr


def test_shapes_trains_in_an_empty_folder_and_its_adapter_loads_in_any(installed, tmp_path, monkeypatch):
    counts = ["--train", "8", "--validation", "4", "--questions", "4"]
    done = python(installed, tmp_path, "-m", "qformer.shapes.write", "runs/shapes", *counts)
    assert done.returncode == 0, done.stderr
    launch = ["-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "qformer.stages.stage1"]
    small = ["train.max_steps=2", "train.global_batch_size=4", "train.micro_batch_size=4", "optim.warmup_steps=1"]
    small += ["data.workers=0", "train.cpu=true", "run.dir=runs/s1"]
    done = python(installed, tmp_path, *launch, "configs/shapes/stage1.yaml", *small)
    assert done.returncode == 0, done.stderr
    adapter = tmp_path / "runs/s1/adapter"
    assert str(installed) not in (adapter / "config.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    model = qformer.load(adapter)
    assert model.config.qformer.tokenizer == str(REPO / "qformer/shapes/weights/bert")


# ---- the start of a stage ----

STAGES = sorted(p.stem for p in (REPO / "stages").glob("[a-z]*.py"))
WATCH = """
import importlib.abc, os, runpy, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "torch":
            print("torch with", os.environ.get("THP_MEM_ALLOC_ENABLE"))
            sys.exit(0)
sys.meta_path.insert(0, Watch())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def started(stage: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"} | {"COLUMNS": "300"}
    command = [sys.executable, "-c", WATCH, str(REPO / f"stages/{stage}.py"), *arguments]
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("stage", STAGES)
def test_help_comes_without_torch_in_lines_of_100_columns_and_with_an_example(stage):
    done = started(stage, "--help")
    assert done.returncode == 0, done.stderr
    assert "torch with" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert f"stages/{stage}.py " in done.stdout


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "report"])  # which may do without
def test_huge_pages_are_asked_for_before_torch_is_imported(stage, tmp_path):
    (tmp_path / "file").touch()
    arguments = {
        "ask": [str(tmp_path), str(tmp_path / "file")],
        "capfilt": [str(tmp_path / "file"), "--out", str(tmp_path / "out"), "--filter", str(tmp_path)],
        "convert": ["--from", "lavis", "x.pth", "--out", str(tmp_path / "out")],
        "evaluate": [str(tmp_path), str(tmp_path / "file")],
        "export": [str(tmp_path), str(tmp_path / "out"), "--to", "transformers"],
        "look": [str(tmp_path), str(tmp_path / "file")],
    }
    config = ["configs/shapes/stage2.yaml" if stage == "stage2" else "configs/shapes/stage1.yaml", "run.dir=x"]
    config += [f"data.train=[{tmp_path}]", "data.validation=[]", "data.features=null"]
    done = started(stage, *arguments.get(stage, config))
    assert "torch with 1" in done.stdout, done.stderr


ALLOCATE = """
import resource, sys
from qformer.environment import prepare_environment
prepare_environment()
import torch
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (3_000_000, 30_000_000, 300_000):
        blocks = [torch.zeros(size) for _ in range(3)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([step() for _ in range(5)][-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("own", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_memory_that_a_step_frees_is_kept_for_the_next_unless_the_user_says_otherwise(own):
    environment = {k: v for k, v in os.environ.items() if "MALLOC" not in k and k != "GLIBC_TUNABLES"}
    environment |= {"THP_MEM_ALLOC_ENABLE": "0", **own}  # pages of 4 KB: 100 MB are 25,000 of them
    done = subprocess.run([sys.executable, "-c", ALLOCATE], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 5000 if own else int(done.stdout) < 100
