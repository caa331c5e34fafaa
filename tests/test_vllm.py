"""vLLM itself serves what we hand on; it lives in an environment of its own, whose Python QFORMER_VLLM_PYTHON names.

QFORMER_VLLM_PYTHON=/path/to/vllm-venv/bin/python python -m pytest tests/test_vllm.py
"""

import os
import subprocess

import pytest

from qformer.interop.export import export
from tests.test_export import of_transformers, picture, trained
from tests.test_serving import REPO, example, running

PYTHON = os.environ.get("QFORMER_VLLM_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="QFORMER_VLLM_PYTHON names no Python that has vLLM")
OPT = REPO / "qformer" / "shapes" / "weights" / "opt"  # heads of 32; vLLM's CPU kernels take no narrower ones
MINUTES = 15 * 60


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def ours(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    vit = of_transformers(folder / "vit", "ViT")
    return trained(folder, tiny, 2, vit, f"llm.id={OPT}", "llm.prompt=the large", "llm.caption_max_new_tokens=8")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        picture(i).save(file)
    return files


@pytest.fixture(scope="module")
def lines(ours, pictures):
    texts = ours.caption(pictures, num_beams=1, min_new_tokens=0)
    assert len(set(texts)) > 1
    return [f"{file}: {text}" for file, text in zip(pictures, texts, strict=True)]


def test_its_engine_writes_of_an_export_what_ours_writes(ours, pictures, lines, tmp_path):
    export(ours.model, ours.config, tmp_path / "out")
    script = REPO / "examples" / "serving" / "vllm_engine.py"
    more = ["--prompt", "the large", "--max-tokens", "8", "--max-model-len", "128"]
    done = subprocess.run(
        [PYTHON, script, tmp_path / "out", *pictures, *more],
        env=environment(), capture_output=True, text=True, timeout=MINUTES,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.startswith(str(pictures[0].parent))] == lines


@pytest.fixture
def plain_server(tmp_path):
    """The language model alone behind HTTP; its address."""
    arguments = ["--model", OPT, "--served-model-name", "opt", "--enable-prompt-embeds", "--dtype", "float32"]
    command = [
        PYTHON,
        "-m",
        "vllm.entrypoints.openai.api_server",
        *arguments,
        "--enforce-eager",
        "--max-model-len",
        "128",
    ]
    with running(command, tmp_path / "server.log", environment(), MINUTES) as address:
        yield address


def test_its_server_of_the_plain_language_model_writes_to_our_client_what_ours_writes(
    ours, pictures, lines, plain_server, monkeypatch, capsys
):
    client = example("prompt_embeds")
    monkeypatch.setattr(client, "load", lambda path: ours)
    client.main(["runs/s2", *map(str, pictures), "--url", plain_server, "--model", "opt"])
    assert capsys.readouterr().out.splitlines() == lines
