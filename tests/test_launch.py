"""A stage and its launcher, as real processes: one line for a mistake, and nothing that runs on when it should not."""

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from test_faults import last_step, life, on_features, read, wait_for
from test_ranks import free_port

from qformer.launch import configure_logging, reported_errors, stop_signals
from qformer.launcher import _end

REPO = Path(__file__).resolve().parent.parent
STAGE1 = REPO / "stages/stage1.py"
ENDLESS = ["train.max_steps=1000000", "train.checkpoint_every_steps=1000000"]
TWO = ["--multi_gpu", "--num_processes", "2"]


def launch(launcher: str, options: list[str], arguments: list[str], out: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", launcher, *options, str(STAGE1), *arguments]
    with out.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def wait_until(what: Callable[[], bool], out: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, out.read_text()[-3000:]
        time.sleep(0.05)


@pytest.mark.parametrize("options", [[], TWO, ["--config_file", str(REPO / "configs/accelerate/multi_gpu.yaml")]])
def test_a_mistake_under_the_launcher_is_one_line(options, tmp_path):
    """`accelerate launch`: 19 lines with one process, 48 with two, the last the launcher's; eight: see multi_gpu.yaml."""
    process = launch("qformer.launcher", options, [str(REPO / "configs/stage1.yaml"), "optim.lrr=1"], tmp_path / "out")
    assert process.wait(100) == 2
    expected = "config error: unknown key optim.lrr in optim.lrr=1; nearest is optim.lr"
    assert (tmp_path / "out").read_text().splitlines() == [expected]


def test_a_mistake_found_on_every_rank_is_one_line(tiny, tmp_path):
    more = ["train.global_batch_size=12", "train.micro_batch_size=4", "data.validation=[]"]
    options = [*TWO, "--main_process_port", str(free_port())]
    process = launch("qformer.launcher", options, on_features(tiny, tmp_path / "run", *more), tmp_path / "out")
    assert process.wait(100) == 2
    lines = (tmp_path / "out").read_text().splitlines()
    assert [line for line in lines if line.startswith("error:")] == lines[-1:]
    assert lines[-1].startswith("error: train.global_batch_size=12 must be a multiple of")


def test_accelerate_launch_quiet_ends_with_our_line(tmp_path):
    process = launch("accelerate.commands.launch", ["--quiet"], ["optim.lrr=1"], tmp_path / "out")
    assert process.wait(100) == 1
    assert (tmp_path / "out").read_text().splitlines()[-1].startswith("config error: unknown key optim.lrr")


def test_a_killed_process_is_named_by_the_launcher(capsys):
    with pytest.raises(SystemExit, match="137"):
        _end("rank 1", -9)
    assert capsys.readouterr().err.startswith("error: rank 1 was killed by SIGKILL; ")


def test_a_stage_whose_launcher_has_gone_saves_and_stops(tiny, tmp_path):
    """With one process accelerate passes no signal on: the training went on as an orphan."""
    process = launch("accelerate.commands.launch", [], on_features(tiny, tmp_path / "run", *ENDLESS), tmp_path / "out")
    try:
        wait_until(lambda: last_step(tmp_path / "run") > 2, tmp_path / "out")
        (stage,) = psutil.Process(process.pid).children()
        process.terminate()
        process.wait(20)
        psutil.wait_procs([stage], 30)
        assert not stage.is_running()
    finally:
        for one in [p for p in (process, locals().get("stage")) if p]:
            if psutil.pid_exists(one.pid):
                one.kill()
    assert (tmp_path / f"run/checkpoints/step-{last_step(tmp_path / 'run')}").is_dir()
    assert "and saved; go on with train.resume=auto" in read(tmp_path / "out")


def test_the_launcher_passes_sigterm_on_to_two_processes_and_waits(tiny, tmp_path):
    more = [*ENDLESS, "train.micro_batch_size=4"]
    options = [*TWO, "--main_process_port", str(free_port())]
    process = launch("qformer.launcher", options, on_features(tiny, tmp_path / "run", *more), tmp_path / "out")
    try:
        wait_until(lambda: last_step(tmp_path / "run") > 2, tmp_path / "out")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, read(tmp_path / "out")
    finally:
        process.kill()
    assert (tmp_path / f"run/checkpoints/step-{last_step(tmp_path / 'run')}").is_dir()
    assert "Traceback" not in read(tmp_path / "out")
    kept = [json.loads(line)["message"] for line in (tmp_path / "run/warnings.jsonl").read_text().splitlines()]
    assert kept[0] == "started"
    assert len(kept) == len(set(kept)), "the first of the two ranks keeps them"
    assert "SIGTERM: finishing this step" in " ".join(kept)
    assert "stopped at step" in kept[-1]


def test_a_stage_started_from_a_shell_outlives_it(tiny, tmp_path):
    """`nohup python stages/stage1.py &`, and the shell is closed."""
    arguments = shlex.join(on_features(tiny, tmp_path / "run", "train.max_steps=150"))
    script = f"nohup {sys.executable} {STAGE1} {arguments} > {tmp_path / 'out'} 2>&1 & wait"
    shell = subprocess.Popen(["sh", "-c", script], env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"})
    wait_until(lambda: last_step(tmp_path / "run") > 0, tmp_path / "out")
    assert last_step(tmp_path / "run") < 140
    shell.kill()
    shell.wait()
    wait_until((tmp_path / "run/adapter").is_dir, tmp_path / "out")
    assert last_step(tmp_path / "run") == 150


def test_a_parent_that_changes_is_a_stop_only_where_it_was_a_launcher(monkeypatch):
    for launched in (True, False):
        monkeypatch.setattr("qformer.launch.launched", lambda launched=launched: launched)
        with stop_signals() as stop, monkeypatch.context() as context:
            assert not stop
            context.setattr(os, "getppid", lambda: 1)
            assert bool(stop) is launched


def test_a_run_folder_that_vanishes_ends_the_run_with_one_line(tiny, tmp_path):
    """It went on, and the next checkpoint made the folder again."""
    run_dir = tmp_path / "run"
    long = ["train.max_steps=1000000", "train.checkpoint_every_steps=1000000"]
    with life(on_features(tiny, run_dir, *long), tmp_path / "said") as process:
        wait_for(lambda: last_step(run_dir) > 2, process)
        run_dir.rename(tmp_path / "elsewhere")
        process.join(30)
        assert process.exitcode == 2
    assert not run_dir.exists()
    last = (tmp_path / "said").read_text().splitlines()[-1]
    assert last.startswith(f"error: run.dir={run_dir} has vanished, removed or moved")
    assert "Traceback" not in read(tmp_path / "said")


def test_a_killed_data_worker_is_one_line(tiny, tmp_path):
    run_dir = tmp_path / "run"
    with life(on_features(tiny, run_dir, *ENDLESS, "data.workers=1"), tmp_path / "said") as process:
        wait_for(lambda: last_step(run_dir) > 2, process)
        workers = [p for p in psutil.Process(process.pid).children(recursive=True) if p.num_threads() > 0]
        for worker in workers:
            worker.kill()
        process.join(30)
        assert process.exitcode == 2, read(tmp_path / "said")
    assert "Traceback" not in read(tmp_path / "said")
    last = (tmp_path / "said").read_text().splitlines()[-1]
    assert last.startswith(
        "error: "
    )  # DataLoader worker (pid ...) is killed by signal; or EOFError, halfway through a tensor
    assert "a process that reads data died" in last


@pytest.mark.parametrize("message", [
    "DataLoader worker (pid 12) is killed by signal: Killed. ",
    "DataLoader worker (pid(s) 12, 13) exited unexpectedly",
    "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared "
    "memory. Please try to raise your shared memory limit.",
])  # fmt: skip
def test_every_word_of_a_lost_worker_is_one_line(message, capsys):
    with pytest.raises(SystemExit, match="2"), reported_errors():
        raise RuntimeError(message)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: DataLoader worker (pid")
    with pytest.raises(RuntimeError, match="a mistake of ours"), reported_errors():
        raise RuntimeError("a mistake of ours")


def test_messages_in_a_pipe_are_one_line_each(capsys):
    """They were cut into lines of 80 columns."""
    configure_logging(True)
    message = "records " * 40
    logging.getLogger("qformer.x").info(message)
    logging.getLogger("other").warning("of a library")
    first, second = capsys.readouterr().out.splitlines()
    assert first[9:] == f"INFO     {message}"
    assert second[9:] == "WARNING  of a library"


def test_a_worker_killed_while_it_hands_a_tensor_over_is_one_line(capsys):
    """Then torch says nothing of a worker: EOFError, or a connection refused or reset."""
    from multiprocessing.connection import Listener
    from multiprocessing.resource_sharer import DupFd, _resource_sharer

    shared = DupFd(1)
    shared._id = (Listener().address, shared._id[1])  # nobody answers there
    with pytest.raises(SystemExit, match="2"), reported_errors():
        shared.detach()
    _resource_sharer.stop()
    (line,) = capsys.readouterr().err.splitlines()
    assert "a process that reads data died" in line
