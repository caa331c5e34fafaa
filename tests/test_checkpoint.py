"""What is kept of a run: bit for bit, whole or not at all, and refused in plain words where it does not fit."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qformer.checkpoint import (
    Transfer,
    list_checkpoints,
    load_checkpoint,
    load_strictly,
    read_adapter,
    require_disk_space,
    save_adapter,
    save_checkpoint,
    trainable_tensors,
    transfer,
)
from qformer.files import atomic_folder
from qformer.optim import build_optimizer


class Adapter(nn.Module):
    def __init__(self, width: int = 6, seed: int = 0, head: bool = True):
        super().__init__()
        torch.manual_seed(seed)
        self.qformer = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3))
        self.norm = nn.LayerNorm(3)
        self.temperature = nn.Parameter(torch.rand(()))
        if head:
            self.itm_head = nn.Linear(3, 2)

    def forward(self, x):
        return self.itm_head(self.norm(self.qformer(x))).square().sum() / self.temperature


def trained(seed: int = 0, steps: int = 3) -> tuple[Adapter, torch.optim.Optimizer]:
    adapter = Adapter(seed=seed)
    optimizer = build_optimizer(adapter, lr=0.1, betas=(0.9, 0.98), weight_decay=0.05, eps=1e-8)
    for _ in range(steps):
        step(adapter, optimizer)
    return adapter, optimizer


def step(adapter: Adapter, optimizer: torch.optim.Optimizer) -> None:
    adapter(torch.ones(2, 4)).backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def save(run_dir, number=3, keep=2, state=None):
    adapter, optimizer = trained(steps=number)
    return save_checkpoint(
        run_dir, number, adapter, optimizer, state=state or {"dropped": 1}, config="a: 1\n", keep=keep
    )


# ---- round trips ----


def test_checkpoint_round_trip_and_the_next_step_are_bit_identical(tmp_path):
    adapter, optimizer = trained()
    state = {"dropped": 2, "window": {"itc": 0.1 + 0.2, "count": 3.0}}
    folder = save_checkpoint(tmp_path, 3, adapter, optimizer, state=state, config="a: 1\n", keep=2)
    assert folder == tmp_path / "checkpoints" / "step-3"
    again, its_optimizer = trained(seed=9, steps=1)
    assert load_checkpoint(folder, again, its_optimizer) == {"format_version": "1", "step": 3, **state}
    assert_same(adapter, again)
    for _ in range(2):
        step(adapter, optimizer)
        step(again, its_optimizer)
    assert_same(adapter, again)
    assert (folder / "config.yaml").read_text() == "a: 1\n"


def test_a_checkpoint_before_the_first_step_has_no_moments(tmp_path):
    adapter, optimizer = trained(steps=0)
    folder = save_checkpoint(tmp_path, 0, adapter, optimizer, state={}, config="", keep=1)
    again, its_optimizer = trained(seed=9, steps=0)
    load_checkpoint(folder, again, its_optimizer)
    step(adapter, optimizer)
    step(again, its_optimizer)
    assert_same(adapter, again)


def test_adapter_round_trip(tmp_path):
    adapter = Adapter()
    save_adapter(tmp_path / "adapter", adapter, "a: 1\n", "# card\n")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "README.md", "SHA256SUMS", "adapter.safetensors", "config.yaml",
    ]  # fmt: skip
    again = Adapter(seed=1)
    load_strictly(again, read_adapter(tmp_path / "adapter"), "x")
    assert_same(adapter, again)


# ---- whole or not at all ----


def interrupted_write(folder):
    with atomic_folder(folder) as scratch:
        (scratch / "adapter.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt


def test_an_interrupted_write_leaves_nothing_visible(tmp_path):
    save(tmp_path, 3)
    before = (tmp_path / "checkpoints" / "step-3" / "adapter.safetensors").read_bytes()
    for folder in (tmp_path / "checkpoints" / "step-4", tmp_path / "checkpoints" / "step-3"):
        with pytest.raises(KeyboardInterrupt):
            interrupted_write(folder)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-3"]
    assert (tmp_path / "checkpoints" / "step-3" / "adapter.safetensors").read_bytes() == before


def test_what_a_kill_left_behind_is_no_checkpoint_and_is_written_over(tmp_path):
    scratch = tmp_path / "checkpoints" / ".step-3.partial"  # a killed process cannot tidy up
    scratch.mkdir(parents=True)
    (scratch / "stale").write_text("x")
    assert list_checkpoints(tmp_path) == []
    folder = save(tmp_path, 3)
    assert not (folder / "stale").exists()
    assert list_checkpoints(tmp_path) == [folder]
    assert not scratch.exists()


def test_a_step_saved_again_replaces_the_old(tmp_path):
    save(tmp_path, 3, state={"dropped": 1})
    folder = save(tmp_path, 3, state={"dropped": 5})
    assert json.loads((folder / "state.json").read_text())["dropped"] == 5


def test_only_the_newest_are_kept(tmp_path):
    for number in (8, 9, 10, 11):  # not in alphabetical order
        save(tmp_path, number, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-10", "step-11"]
    assert list_checkpoints(tmp_path / "nowhere") == []


# ---- strict ----


def test_strict_loading_names_what_is_missing_and_unknown():
    tensors = trainable_tensors(Adapter())
    tensors["language_projection.weight"] = tensors.pop("itm_head.weight")
    before = trainable_tensors(Adapter(seed=4))
    adapter = Adapter(seed=4)
    message = r"here does not fit this config: missing itm_head; unknown language_projection$"
    with pytest.raises(ValueError, match=message):
        load_strictly(adapter, tensors, "here")
    assert all(torch.equal(before[name], value) for name, value in adapter.state_dict().items())


def test_strict_loading_names_tensors_of_another_shape():
    with pytest.raises(ValueError, match=r"qformer\.0\.weight is \[5, 4\], the config wants \[6, 4\]"):
        load_strictly(Adapter(), trainable_tensors(Adapter(width=5)), "here")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    folder = save(tmp_path)
    other = Adapter(width=5)
    optimizer = build_optimizer(other, lr=0.1, betas=(0.9, 0.98), weight_decay=0.05, eps=1e-8)
    with pytest.raises(ValueError, match=r"step-3 does not fit this config: qformer\.0\.weight is \[6, 4\]"):
        load_checkpoint(folder, other, optimizer)


# ---- transfer ----


def test_transfer_reports_loaded_new_and_left_out():
    source, target = trainable_tensors(Adapter(seed=1)), Adapter(seed=2, head=False)
    target.language_projection = nn.Linear(3, 5)
    kept = target.language_projection.weight.detach().clone()
    found = transfer(target, source, "runs/s1/adapter")
    assert isinstance(found, Transfer)
    assert torch.equal(target.qformer[0].weight, source["qformer.0.weight"])
    assert torch.equal(target.language_projection.weight, kept)
    assert found.new == ["language_projection.weight", "language_projection.bias"]
    assert found.left_out == ["itm_head.weight", "itm_head.bias"]
    assert found.report("runs/s1/adapter") == (
        "7 tensors loaded from runs/s1/adapter; 2 new: language_projection; 2 left out: itm_head"
    )


def test_transfer_refuses_another_shape_and_nothing_in_common():
    with pytest.raises(ValueError, match=r"qformer\.0\.weight is \[5, 4\], the config wants \[6, 4\].*use the encoder"):
        transfer(Adapter(), trainable_tensors(Adapter(width=5)), "here")
    with pytest.raises(ValueError, match="here has no tensor in common"):
        transfer(Adapter(), {"other": torch.zeros(1)}, "here")


# ---- damaged, foreign, missing ----


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors"])
def test_a_truncated_file_is_one_line(tmp_path, name):
    folder = save(tmp_path)
    whole = (folder / name).read_bytes()
    for length in (0, 5, len(whole) - 1):
        (folder / name).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{name} cannot be read as safetensors .*damaged or incomplete") as found:
            load_checkpoint(folder, *trained())
        assert "\n" not in str(found.value)


def test_another_format_version_is_refused(tmp_path):
    for metadata in ({"format_version": "2"}, None):
        save_file(trainable_tensors(Adapter()), tmp_path / "adapter.safetensors", metadata=metadata)
        version = metadata["format_version"] if metadata else None
        with pytest.raises(ValueError, match=f"has format version {version}, this qformer reads 1"):
            read_adapter(tmp_path)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"is no adapter folder: it has no adapter\.safetensors; expected what a run"):
        read_adapter(tmp_path)
    with pytest.raises(ValueError, match=r"is no checkpoint: it has no state\.json; expected a folder run\.dir/check"):
        load_checkpoint(tmp_path / "step-7", *trained())


# ---- the disk ----


def test_a_full_disk_is_said_before_the_run(tmp_path, monkeypatch):
    adapter = Adapter()
    size = sum(p.numel() * p.element_size() for p in adapter.parameters())
    needed = size * (3 * 3 + 1)  # two kept, one being written, the adapter
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    require_disk_space(tmp_path, adapter, keep=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(ValueError, match=r"run\.dir=.* needs .* GB for 2 checkpoints.*lower train\.keep_checkpoints"):
        require_disk_space(tmp_path, adapter, keep=2)
    for number in (1, 2, 3):  # the estimate holds: what is written is not more, metadata aside
        save(tmp_path, number, keep=3)
    written = sum(p.stat().st_size for p in (tmp_path / "checkpoints").rglob("*.safetensors"))
    assert written <= 3 * (3 * size + 3000)
