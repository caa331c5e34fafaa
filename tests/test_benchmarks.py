"""Every benchmark runs at toy size: all sides compute the same, and the figures are written. No figure is judged."""

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
BENCHMARKS = REPO / "benchmarks"
COMMANDS = [
    ["stage1_step", "--peer", "transformers"],
    ["stage2_step", "opt", "--peer", "transformers"],
    ["stage2_step", "t5", "--peer", "transformers"],
    ["vqa"],
    ["captioning"],
    ["rerank", "--peer", "transformers"],
    ["embed_folder"],
]
needs_lavis = pytest.mark.skipif(
    not (REPO / ".venv-lavis" / "complete").is_file(), reason="made by python benchmarks/lavis_environment.py"
)


@pytest.fixture
def benchmarks(monkeypatch):
    """Import as from the folder of the commands, and leave nothing behind."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture
def forked(benchmarks, monkeypatch):
    """Sides are forks of this process, which has imported torch already; otherwise as `sidebyside.Side`."""
    sidebyside = benchmarks("sidebyside")
    sides = {f"sides.{name}": benchmarks(f"sides.{name}") for name in ("prepare", "ours", "transformers", "matmul")}
    assert sides
    fork = multiprocessing.get_context("fork")
    real = sidebyside.Side

    open_pipes = []  # of the sides that live: a fork that kept them open would keep those alive

    class Forked(real):
        def __init__(self, module, folder, python=sys.executable):
            if python != sys.executable:
                super().__init__(module, folder, python)
                return
            self.module, self.log = module, folder / f"{module}.log"
            (read_requests, write_requests), (read_replies, write_replies) = os.pipe(), os.pipe()

            def work():
                os.dup2(os.open(self.log, os.O_CREAT | os.O_WRONLY), 2)
                for pipe in [*open_pipes, write_requests]:
                    os.close(pipe)
                with os.fdopen(read_requests) as requests, os.fdopen(write_replies, "w") as replies:
                    benchmarks("serving").serve(module, folder, requests, replies)

            self.process = fork.Process(target=work, daemon=True)
            self.process.start()
            os.close(read_requests)
            os.close(write_replies)
            open_pipes.append(write_requests)
            self.process.stdin, self.process.stdout = os.fdopen(write_requests, "w"), os.fdopen(read_replies)
            self.process.wait = self.process.join

        def close(self):
            if self.process.stdin.fileno() in open_pipes:
                open_pipes.remove(self.process.stdin.fileno())
            super().close()

    monkeypatch.setattr(sidebyside, "Side", Forked)
    return benchmarks


def check(path: Path, peers: set[str], measured: bool = True) -> dict:
    found = json.loads(path.read_text())
    assert found["name"]
    assert found["peer"] in peers
    assert found["peers"].keys() == peers
    assert found["shapes"]
    assert found["ratio"].keys() == {"median", "min", "max"}
    assert 0 < found["ratio"]["min"] <= found["ratio"]["median"] <= found["ratio"]["max"]
    for key in ("seconds", "peak_bytes"):
        assert found[key].keys() == {"ours", "peer"}
        assert all(value > 0 for value in found[key].values())
    shares = found["share_of_peak"]
    assert shares.keys() == {"ours", "peer"}
    assert all(share > 0 for share in shares.values()) if measured else set(shares.values()) == {None}
    return found


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c[:2]) if c[0] == "stage2_step" else c[0])
def test_a_command_checks_times_and_writes(forked, tmp_path, command):
    name, *options = command
    forked(name).main([*options, "--tiny", "--threads", "1", "--rounds", "2", "--json", str(tmp_path / "r.json")])
    found = check(tmp_path / "r.json", {"transformers"})
    assert found["difference"]["transformers"] <= 1e-4
    assert found["rounds"] == 2


@needs_lavis
def test_the_reference_computes_the_same(forked, tmp_path):
    options = ["--tiny", "--threads", "1", "--rounds", "1", "--json", str(tmp_path / "r.json")]
    forked("stage1_step").main(options)
    assert check(tmp_path / "r.json", {"lavis"})["difference"]["lavis"] <= 1e-4


def test_start_up_runs_as_a_command(tmp_path, benchmarks):
    benchmarks("startup").main(["--tiny", "--threads", "1", "--rounds", "1", "--json", str(tmp_path / "r.json")])
    found = check(tmp_path / "r.json", {"transformers"}, measured=False)
    assert found["imports"]["torch, qformer"] > 0


def test_the_cache_is_read_in_random_order(tmp_path, benchmarks):
    benchmarks("cache_reader").main(["--tiny", "--rounds", "2", "--json", str(tmp_path / "r.json")])
    found = json.loads((tmp_path / "r.json").read_text())
    assert {how: len(taken) for how, taken in found["seconds"].items()} == {"cold": 2, "warm": 2}
    assert found["bytes"] > 24 * 5 * 16 * 2


def test_what_a_card_is_measured_by_runs_on_the_cpu(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", "--json", str(tmp_path / "r.json")]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    results = {row["row"]: row["result"] for row in json.loads((tmp_path / "r.json").read_text())}
    assert results["resumed, bf16"] == results["one rank of torchrun"] == "adapters are equal to the bit"
    assert all("records/s" in results[f"{stage}, 8 records"] for stage in ("stage1", "stage2"))
    assert all("activations of 8 records" in results[f"{stage}, 8 records: doctor"] for stage in ("stage1", "stage2"))


@pytest.mark.parametrize("theirs", [1.1, float("nan")])
def test_numbers_that_differ_are_seen(benchmarks, theirs):
    difference = benchmarks("sidebyside").difference
    assert difference({"loss": [1.0]}, {"loss": [1.0]}, "peer") == 0
    assert difference({"loss": [1.0]}, {"loss": [theirs]}, "peer") > 0.09


@pytest.mark.parametrize("theirs", [{"said": ["blue"]}, {"said": ["red", "red"]}, {"loss": [1.0]}])
def test_what_cannot_be_the_same_is_refused(benchmarks, theirs):
    with pytest.raises(SystemExit, match="peer"):
        benchmarks("sidebyside").difference({"said": ["red"]}, theirs, "peer")
