"""What every test has in common: no network, one thread, a cache of its own, and no trace of a stage's main()."""

import atexit
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

# Before torch and datasets are imported, here and in the processes that tests start.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="qformer-tests-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Tiny frozen models, tokenizers and records on disk; see tiny.py."""
    from tiny import build_tiny

    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _leave_no_trace():
    """A stage configures logging, and accelerate the environment and one state a process: put all back."""
    root, ours = logging.getLogger(), logging.getLogger("qformer")
    before, environment = (list(root.handlers), root.level, ours.level), dict(os.environ)
    yield
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    root.handlers[:], root.level = before[0], before[1]
    ours.setLevel(before[2])
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
