"""ask.py and evaluate.py as a user meets them: a long conversation, and mistakes that cost one line and no answers."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import run_stage

REPO = Path(__file__).resolve().parent.parent


def stage_main(name: str) -> Callable[[list[str]], None]:
    spec = importlib.util.spec_from_file_location(name, REPO / f"stages/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("asked")
    run_stage(2, tiny.stage2(run_dir, "train.max_steps=1", "data.validation=[]"))
    return run_dir / "adapter"


def picture_of(tiny) -> Path:
    return Path(tiny.records).parent / json.loads(Path(tiny.records).read_text().splitlines()[0])["image"]


def refused(name: str, arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        stage_main(name)(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_conversation_outlives_the_positions_of_its_language_model(adapter, tiny, capsys, monkeypatch):
    asked = iter(["w120 w121 ?"] * 12 + [""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(asked))
    stage_main("ask")([str(adapter), str(picture_of(tiny))])
    assert len(capsys.readouterr().out.splitlines()) == 13, "a caption and twelve answers"


def test_a_question_longer_than_the_language_model_is_one_line(adapter, tiny, capsys):
    said = refused("ask", [str(adapter), str(picture_of(tiny)), "w120 " * 80], capsys)
    assert "the language model has 64" in said


def test_evaluate_tells_mistakes_before_it_answers(adapter, tiny, tmp_path, capsys):
    record = {"image": "none.png", "question": "w120 ?", "answers": ["w121"]}
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps(record) + "\n")
    arguments = [str(adapter), str(questions)]
    assert str(tmp_path) in refused("evaluate", [*arguments, "--json", str(tmp_path)], capsys)
    assert "--batch-size and --limit must be at least 1" in refused(
        "evaluate", [*arguments, "--batch-size", "0"], capsys
    )
    assert "none.png" in refused("evaluate", arguments, capsys)
