"""The house: which floor may look at which, no rooms for odds and ends, and an import that costs nothing."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "qformer"
FLOORS = [
    ["messages.py", "environment.py", "kernels.py", "text.py", "keys.py", "launcher.py"],
    ["config/", "files.py", "distributed.py", "layers.py", "parts.py", "lora.py"],
    ["encoders/", "language/", "qformer.py", "objectives.py", "data/", "metrics/", "optim.py", "log.py", "sharding.py"],
    ["models/", "checkpoint.py", "launch.py", "card.py", "report/"],
    ["validation.py", "run_folder.py", "tuning.py", "bert.py", "attention/"],
    ["training.py", "shapes/"],
    ["build.py"],
    ["inference.py", "interop/"],  # use build
    ["doctor/", "evaluation/", "conversation.py"],  # use inference, or interop
    ["capfilt/", "web/"],  # use evaluation's progress
]
MAX_LINES = 400
FILES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))


def room(file: str) -> str:
    """The file itself, or the folder it lies in."""
    return file.split("/")[0] + "/" if "/" in file else file


def floor(place: str) -> int:
    found = [i for i, places in enumerate(FLOORS) if place in places]
    assert len(found) == 1, f"{place} has no floor: put it in FLOORS and in the design"
    return found[0]


def imported(path: Path) -> set[str]:
    """Modules of qformer that a file imports, anywhere in it: "qformer.data.order"."""
    package = ["qformer", *path.relative_to(PACKAGE).parent.parts] if path.is_relative_to(PACKAGE) else []
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def rooms_used(path: Path) -> set[str]:
    rooms = set()
    for name in imported(path):
        if name.startswith("qformer."):
            first = name.split(".")[1]
            rooms |= {p for p in (f"{first}.py", f"{first}/") if (PACKAGE / p).exists()}
    return rooms


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_lower_floors(file):
    if file == "__init__.py":
        return
    own = room(file)
    for other in rooms_used(PACKAGE / file) - ({own} if own.endswith("/") else set()):
        assert floor(other) < floor(own), f"{file} (floor {floor(own)}) imports {other} (floor {floor(other)})"


def test_every_place_on_the_floors_exists():
    assert all((PACKAGE / place).exists() for places in FLOORS for place in places)


def test_the_map_in_the_docs_shows_these_floors():
    rows = re.findall(r"^\| (\d) \| (.*?) \|", (REPO / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert [re.findall(r"`([^`]+)`", places) for _, places in rows] == FLOORS
    assert [int(number) for number, _ in rows] == list(range(len(FLOORS)))


def test_the_package_never_imports_stages_and_stages_never_each_other():
    stages = sorted(p.stem for p in (REPO / "stages").glob("*.py"))
    for path in [*(PACKAGE / f for f in FILES), *(REPO / "stages").glob("*.py")]:
        for name in imported(path):
            assert name.split(".")[0] not in ("stages", *stages), f"{path.relative_to(REPO)} imports {name}"


def test_no_room_for_odds_and_ends():
    odd = {"utils", "util", "helpers", "helper", "common", "misc"}
    for folder in (PACKAGE, REPO / "stages", REPO / "tests"):
        assert not [p for p in folder.rglob("*") if p.stem in odd]


@pytest.mark.parametrize("file", FILES)
def test_no_room_is_too_large(file):
    assert len((PACKAGE / file).read_text().splitlines()) <= MAX_LINES, "split it by concept into a folder"


def test_no_tensor_arithmetic_and_no_long_main_in_stages():
    for path in (REPO / "stages").glob("[a-z]*.py"):
        tree = ast.parse(path.read_text())
        (main,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]
        assert main.end_lineno - main.lineno < 90, path.name
        assert not {"torch", "torch.nn"} & imported(path), path.name


def test_importing_qformer_costs_nothing():
    heavy = ("torch", "transformers", "numpy", "omegaconf", "PIL")
    code = f"import os, sys; before = dict(os.environ); import qformer; assert os.environ == before; print([m for m in {heavy} if m in sys.modules], len(qformer.__all__))"
    done = subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(REPO)!r}); {code}"],
                          capture_output=True, text=True, env=dict(os.environ), timeout=60)  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.split() == ["[]", "1"]


def test_public_names():
    import qformer

    assert len(qformer.__all__) <= 15
    assert callable(qformer.load)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        qformer.laod  # noqa: B018
