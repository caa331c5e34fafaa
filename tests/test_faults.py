"""Faults of process, disk and checkpoint, tried one by one: docs/reliability.md says what each does to a run.

Those of data and of what comes from elsewhere are in test_bad_input.py.
"""

import contextlib
import ctypes
import functools
import json
import multiprocessing
import multiprocessing.util
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import ADAPTER, assert_same_run, assert_same_tensors, at_step, metrics, refused
from tiny import Tiny, run_stage

import qformer
from qformer.checkpoint import CHECKPOINT, list_checkpoints, read_adapter
from qformer.files import write_checksums
from qformer.run_folder import open_run

REPO = Path(__file__).resolve().parent.parent
KILLS = 20

# Every life of a run is a process of its own, forked from a server that has imported everything once.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch", "transformers", "datasets", "qformer.training", "qformer.build"])


def live(arguments: list[str], said: Path, before: Callable[[], None] | None) -> None:
    """One life of a stage-1 run, in a process of its own."""
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if before:
        before()
    run_stage(1, arguments)


@contextlib.contextmanager
def life(arguments: list[str], said: Path, before: Callable[[], None] | None = None) -> Iterator[BaseProcess]:
    process = FORKSERVER.Process(target=live, args=(arguments, said, before))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def whole_life(arguments: list[str], said: Path, before: Callable[[], None] | None = None) -> int | None:
    with life(arguments, said, before) as process:
        process.join(120)
        return process.exitcode


def read(said: Path) -> str:
    return " ".join(said.read_text().split())


def wait_for(what: Callable[[], bool], process: BaseProcess) -> None:
    deadline = time.monotonic() + 100
    while not what() and process.exitcode is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def last_step(run_dir: Path) -> int:
    """The step of the newest whole line of metrics."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))  # it is asked for a thousand times a second
        return max((int(step) for step in re.findall(rb'^{"step": (\d+),.*}$', file.read(), re.MULTILINE)), default=0)


def on_features(tiny: Tiny, run_dir: Path, *more: str) -> list[str]:
    return tiny.stage1(run_dir, *tiny.on_features(), "train.keep_checkpoints=1", *more)


# ---- the process dies ----


def test_sigkill_at_twenty_random_moments(tiny, tmp_path):
    """Bit for bit the run that nothing happened to: metrics, tensors and optimizer."""
    long = ["train.max_steps=200", "train.checkpoint_every_steps=3", "train.resume=auto"]
    assert whole_life(on_features(tiny, tmp_path / "whole", *long), tmp_path / "said") == 0, read(tmp_path / "said")
    run_dir, while_saving = tmp_path / "killed", 0
    again = [str(tmp_path / "whole/config.yaml"), f"run.dir={run_dir}"]  # quicker to parse
    for kill in range(KILLS):
        with life(again, tmp_path / "said") as process:
            if kill % 5:  # else while it starts
                goal = last_step(run_dir) + random.randint(1, 6)
                wait_for(functools.partial(lambda goal: last_step(run_dir) >= goal, goal), process)
                time.sleep(random.uniform(0, 0.03))
            else:
                time.sleep(random.uniform(0, 1))
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL, (last_step(run_dir), read(tmp_path / "said"))
        while_saving += bool(list(run_dir.glob("checkpoints/.*.partial")))
    print(f"{while_saving} of {KILLS} kills came while a checkpoint was written, the last at step {last_step(run_dir)}")
    assert 0 < last_step(run_dir) < 200
    assert whole_life(again, tmp_path / "said") == 0, read(tmp_path / "said")
    assert_same_run(tmp_path / "whole", run_dir)
    assert not list(run_dir.rglob("*.partial"))


def wait_in_validation(seconds: float, marker: Path) -> None:
    from qformer import validation

    original = validation.derive_seed

    def slow(*parts):
        marker.touch()
        time.sleep(seconds)
        return original(*parts)

    validation.derive_seed = slow


def test_sigterm_saves_within_its_deadline(tiny, tmp_path):
    """Even in the middle of a validation, and however often it is sent: as SLURM does, to a launcher and its processes."""
    long = ["train.max_steps=9", "train.validate_every_steps=4", "train.checkpoint_every_steps=100",
            f"data.validation=[{tiny.features}]", "train.validation_records=24"]  # fmt: skip
    assert whole_life(on_features(tiny, tmp_path / "whole", *long), tmp_path / "said") == 0, read(tmp_path / "said")
    run_dir, marker, deadline_s = tmp_path / "told", tmp_path / "marker", 10
    before = functools.partial(wait_in_validation, 1.0, marker)
    with life(on_features(tiny, run_dir, *long), tmp_path / "said", before) as process:
        wait_for(marker.exists, process)
        start = time.monotonic()
        for _ in range(3):
            os.kill(process.pid, signal.SIGTERM)
            time.sleep(0.1)
        process.join(deadline_s)
        assert process.exitcode == 0, read(tmp_path / "said")
        assert time.monotonic() - start < deadline_s
    assert [p.name for p in list_checkpoints(run_dir)] == ["step-4"]
    assert not any("validation_itc" in line for line in metrics(run_dir)), "it was left, to be done again"
    assert whole_life(on_features(tiny, run_dir, *long, "train.resume=auto"), tmp_path / "said") == 0
    assert_same_run(tmp_path / "whole", run_dir)
    assert sum("validation_itc" in line for line in metrics(run_dir)) == 3


def test_a_step_too_slow_for_the_deadline_is_warned_of(tiny, tmp_path, capsys):
    run_stage(1, on_features(tiny, tmp_path, "train.stop_within_s=0"))
    assert "may need more than train.stop_within_s=0; ask the scheduler" in " ".join(capsys.readouterr().out.split())


# ---- two runs in one folder ----


def start_workers_by(method: str) -> None:
    multiprocessing.set_start_method(method, force=True)


@pytest.mark.parametrize("workers", ["fork", "forkserver"])
def test_two_runs_in_one_folder_are_refused(tiny, tmp_path, workers):
    long = ["train.max_steps=100000", "train.checkpoint_every_steps=10", "data.workers=1"]
    arguments = on_features(tiny, tmp_path / "run", *long)
    before = functools.partial(start_workers_by, workers)
    with life(arguments, tmp_path / "said", before) as first:
        wait_for(lambda: len(list_checkpoints(tmp_path / "run")) > 0, first)
        os.kill(first.pid, signal.SIGSTOP)  # it holds the folder all the same
        assert whole_life([*arguments, "train.resume=auto"], tmp_path / "second") == 2
        said = read(tmp_path / "second")
        assert re.search(rf"error: run\.dir=\S+ is in use by process {first.pid} on \S+ since .*; wait for it", said)
        workers = psutil.Process(first.pid).children(recursive=True)
        assert workers
        for worker in workers:
            worker.suspend()  # it cannot notice that it is an orphan
        first.kill()
        first.join()
    step = list_checkpoints(tmp_path / "run")[-1].name.removeprefix("step-")
    again = [*arguments, "train.resume=auto", f"train.max_steps={step}"]
    assert whole_life(again, tmp_path / "third", before) == 0, read(tmp_path / "third")
    for worker in workers:
        worker.resume()
    psutil.wait_procs(workers, 20)
    assert not [worker for worker in workers if worker.is_running()], "a worker outlives its run"


# ---- the disk ----


def small_disk(folder: Path, size: int) -> bool:
    """Put a disk of `size` bytes on a folder, for this process alone to see; False where the system refuses."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER | CLONE_NEWNS
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return libc.mount(b"none", bytes(folder), b"tmpfs", 0, f"size={size}".encode()) == 0


def fill_the_disk(run_dir: Path, real: bool, full_at: int, room_at: int, out: Path) -> None:
    """A disk that is full from one step to another; without the right to mount one, a limit on the size of files."""
    run_dir.mkdir()
    is_disk = real and small_disk(run_dir, 8_000_000)
    print("on a disk of its own" if is_disk else "with a limit on the size of files")
    ballast, hard = run_dir / "ballast", resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def full() -> None:
        if not is_disk:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            return
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def room() -> None:
        print("while full:", *(p.name for p in (run_dir / "checkpoints").iterdir()))
        if is_disk:
            ballast.unlink()
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    patch = pytest.MonkeyPatch()
    at_step(patch, full_at, full)
    at_step(patch, room_at, room)

    def keep() -> None:  # what lies on a disk of its own is gone with the process
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(run_dir, out, ignore=shutil.ignore_patterns("ballast"))

    multiprocessing.util.Finalize(None, keep, exitpriority=10)


@pytest.mark.parametrize("real", [True, False])
def test_a_full_disk_costs_no_checkpoint_and_the_run_goes_on(tiny, tmp_path, real):
    long = ["train.max_steps=14", "train.checkpoint_every_steps=3"]
    assert whole_life(on_features(tiny, tmp_path / "whole", *long), tmp_path / "said") == 0
    before = functools.partial(fill_the_disk, tmp_path / "run", real, 5, 11, tmp_path / "kept")
    assert whole_life(on_features(tiny, tmp_path / "run", *long), tmp_path / "said", before) == 0, read(
        tmp_path / "said"
    )
    said = read(tmp_path / "said")
    if real and "on a disk of its own" not in said:
        pytest.skip("no right to mount a disk here; the limit on the size of files stands in for it")
    assert len(re.findall(r"step [69] cannot be saved in run\.dir=.*?; the newest checkpoint is step-3", said)) == 2
    assert ("No space left" if real else "File too large") in said
    assert "Training goes on" in said
    assert "while full: step-3 " in said
    assert_same_run(tmp_path / "whole", tmp_path / "kept")


def test_a_disk_that_stays_full_ends_the_run_in_words(tiny, tmp_path):
    long = ["train.max_steps=8", "train.checkpoint_every_steps=3"]
    assert whole_life(on_features(tiny, tmp_path / "whole", *long), tmp_path / "said") == 0
    before = functools.partial(fill_the_disk, tmp_path / "run", False, 5, 100, tmp_path / "kept")
    assert whole_life(on_features(tiny, tmp_path / "run", *long), tmp_path / "said", before) == 2
    assert re.search(
        r"error: step 8 cannot be saved in run\.dir=.*File too large.*the newest checkpoint is step-3\. Make room or repair",
        read(tmp_path / "said"),
    )
    assert not list((tmp_path / "run").rglob("*.partial"))
    assert whole_life(on_features(tiny, tmp_path / "run", *long, "train.resume=auto"), tmp_path / "said") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Without the rights of root, who may write anywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def forbidden() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())  # not in tmp_path, which only its owner may enter
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_folder_that_may_not_be_written_is_refused(forbidden):
    for run_dir in (forbidden, forbidden / "new"):
        with (
            nobody(),
            pytest.raises(ValueError, match=rf"run\.dir={run_dir} cannot be written \(Permission denied\); ch"),
        ):
            open_run(run_dir, None, torch.nn.Linear(1, 1), 1).__enter__()


def test_a_read_only_file_system_is_refused(tiny, capsys):
    said = refused(capsys, 1, on_features(tiny, Path("/proc/run")))  # nobody can make a folder there
    assert re.fullmatch(r"error: run\.dir=/proc/run cannot be written \(.+\); choose another, or make it wri.*", said)


# ---- checkpoints and adapters ----


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    run_stage(1, on_features(tiny, run_dir, "train.max_steps=6", "train.checkpoint_every_steps=3",
                             "train.keep_checkpoints=2"))  # fmt: skip
    return run_dir


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = random.randrange(len(content))
    content[place] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def resumed_from(run_dir: Path, resume: str) -> Path | None:
    with open_run(run_dir, resume, torch.nn.Linear(1, 1), 1) as found:
        return found


@pytest.mark.parametrize("name", CHECKPOINT)
def test_a_flipped_byte_in_a_checkpoint_is_passed_over(finished, tmp_path, name, caplog):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    older, newest = list_checkpoints(run_dir)
    assert resumed_from(run_dir, "auto") == newest
    flip_a_byte(newest / name)
    assert resumed_from(run_dir, "auto") == older
    assert f"{newest / name} is damaged: it is not what was written; going back to the checkpoint before" in caplog.text
    with pytest.raises(
        ValueError, match=f"{name} is damaged: it is not what was written; resume from another checkpoint"
    ):
        resumed_from(run_dir, str(newest))
    flip_a_byte(older / name)
    with pytest.raises(ValueError, match=r"no checkpoint in run\.dir=.* is whole"):
        resumed_from(run_dir, "auto")


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(finished, tiny, tmp_path):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    flip_a_byte(run_dir / "checkpoints/step-6/adapter.safetensors")
    run_stage(1, on_features(tiny, run_dir, "train.max_steps=6", "train.checkpoint_every_steps=3", "train.resume=auto"))
    assert metrics(run_dir) == metrics(finished)
    for name in (ADAPTER, "checkpoints/step-6/adapter.safetensors", "checkpoints/step-6/optimizer.safetensors"):
        assert_same_tensors(finished / name, run_dir / name)


def test_a_flipped_byte_in_an_adapter_is_refused(finished, tmp_path, caplog):
    adapter = shutil.copytree(finished / "adapter", tmp_path / "adapter")
    with (adapter / "config.yaml").open("a") as file:
        file.write("# my own\n")
    qformer.load(adapter, device="cpu")
    assert f"{adapter / 'config.yaml'} was changed since it was written" in caplog.text
    content = bytearray((adapter / "adapter.safetensors").read_bytes())
    content[-5] ^= 1
    (adapter / "adapter.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter\.safetensors is damaged: it is not what was written; copy it anew"):
        qformer.load(adapter, device="cpu")
    (adapter / "SHA256SUMS").unlink()
    read_adapter(adapter)
    assert "has no SHA256SUMS, so a damaged byte in it would not be noticed" in caplog.text


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
def test_an_older_format_is_refused(finished, tiny, tmp_path, capsys, name):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    folder = run_dir / "checkpoints/step-6"
    if name == "state.json":
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | {"format_version": "0"}))
    else:
        save_file(load_file(folder / name), folder / name, metadata={"format_version": "0"})
    write_checksums(folder, CHECKPOINT)
    said = refused(capsys, 1, on_features(tiny, run_dir, "train.max_steps=9", "train.resume=auto"))
    assert said.endswith(f"step-6/{name} has format version 0, this qformer reads 1; use the one that wrote it")


def test_a_changed_config_is_told_and_an_infinite_loss_stops_before_the_update(finished, tiny, tmp_path, capsys):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    more = ["train.max_steps=9", "train.resume=auto", "optim.lr=1e30", "train.log_every_steps=2"]
    with pytest.raises(SystemExit, match="2"):
        run_stage(1, on_features(tiny, run_dir, *more))
    told = capsys.readouterr()
    assert re.search(r"error: step \d: not finite: .*no update was made\. Records of this rank: signal", told.err)
    said = " ".join(told.out.split())
    assert re.search(r"its config has changed: train\.max_steps=9, was 6; optim\.lr=1e\+30, was 0\.001", said)
    assert list_checkpoints(run_dir)[-1].name == "step-6"


# ---- the table ----


def test_every_row_of_the_table_is_a_test():
    rows = [line for line in (REPO / "docs/reliability.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) > 25
    for row in rows[1:]:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        defined = "".join(path.read_text() for path in (REPO / "tests").glob("test_*.py"))
        assert [name for name in named if f"def {name}(" not in defined] == []
