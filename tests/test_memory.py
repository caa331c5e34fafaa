"""The memory benchmark runs at toy size, and its figures are of the right kind; no figure is judged."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def memory(monkeypatch):
    """benchmarks/memory.py, imported as from its folder, and nothing left behind."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("memory")
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(BENCHMARKS)):
            del sys.modules[name]


def test_what_fits_a_card_is_computed(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "LLMS", dict(list(memory.LLMS.items())[:1]))
    memory.main(["cards", "--tiny", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 2 + 2 * 3
    plain, lean = (r for r in rows if r["stage"] == "1")
    assert lean["bytes_a_record"] < plain["bytes_a_record"]
    assert lean["fixed_bytes"] == plain["fixed_bytes"]
    whole, eight, four = (
        r["fixed_bytes"] for r in rows if r["llm"].startswith("OPT") and not r["gradient_checkpointing"]
    )
    assert whole > eight > four


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's peak is read from /proc")
def test_steps_and_loading_are_measured(memory, tmp_path):
    memory.main(["loading", "--tiny", "--json", str(tmp_path / "rows.json")])
    assert [set(row) for row in json.loads((tmp_path / "rows.json").read_text())] == [
        {"model", "weight_bytes", "own_bytes", "peak_bytes"}
    ] * 3
    memory.main(["steps", "--tiny", "--micro", "2", "--json", str(tmp_path / "rows.json")])
    assert all(row["peak_bytes"] > 0 for row in json.loads((tmp_path / "rows.json").read_text()))
