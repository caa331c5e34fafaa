"""An adapter as a model of lmms-eval: by the package itself where it is installed, else by the part of its interface used."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import run_stage

import qformer

REPO = Path(__file__).resolve().parent.parent
INSTALLED = importlib.util.find_spec("lmms_eval") is not None
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {records}}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function images.images_of
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answers[0]}}}}"
{more}
"""
IMAGES = """from PIL import Image
def images_of(doc):
    return [Image.open(doc["path"]).convert("RGB")]
def choices_of(doc):
    return ["red", "green", "blue"]
"""
GENERATION = "generation_kwargs: {until: ['\\n\\n'], max_new_tokens: 4, temperature: 0, do_sample: false}\n"
EXACT = "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"
ACCURACY = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\ndoc_to_choice: !function images.choices_of"


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("asked")
    run_stage(2, tiny.stage2(run_dir, "train.max_steps=1", "data.validation=[]"))
    return run_dir / "adapter"


@pytest.fixture
def plugin(monkeypatch) -> Any:
    """The module, beside what of lmms-eval it imports."""
    if not INSTALLED:

        class Interface:
            """Of lmms_eval.api.model.lmms 0.7: what its constructor leaves."""

            def __init__(self) -> None:
                self._rank, self._world_size, self.task_dict = 0, 1, {}

        @dataclasses.dataclass(frozen=True)
        class Manifest:
            model_id: str
            simple_class_path: str | None = None

        @dataclasses.dataclass
        class Result:
            text: Any

        modules: dict[str, dict[str, Any]] = {
            "lmms_eval": {},
            "lmms_eval.api": {},
            "lmms_eval.api.instance": {"GenerationResult": Result},
            "lmms_eval.api.model": {"lmms": Interface},
            "lmms_eval.models": {},
            "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
        }
        for name, values in modules.items():
            module = types.ModuleType(name)
            vars(module).update(values)
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "qformer.evaluation.lmms_eval", raising=False)
    yield importlib.import_module("qformer.evaluation.lmms_eval")
    sys.modules.pop("qformer.evaluation.lmms_eval", None)


@dataclasses.dataclass
class Request:
    """An Instance of lmms-eval, of which models read `args`."""

    args: tuple


def documents(tiny) -> list[dict]:
    lines = [json.loads(line) for line in Path(tiny.records).read_text().splitlines()[:5]]
    return [{**line, "path": str(Path(tiny.records).parent / line["image"])} for line in lines]


def requests(docs: list[dict], *settings: dict) -> list[Request]:
    texts = [f"<image>\nwhat is {colour} on the left ?" for colour in ("red", "green", "blue", "grey", "one")]
    return [
        Request((texts[i], settings[i % len(settings)], lambda doc: [doc["path"]], i, "t", "test"))
        for i in range(len(docs))
    ]


def test_the_entry_point_names_the_class(plugin):
    text = (REPO / "setup.cfg").read_text()
    assert "lmms_eval.models =\n    qformer = qformer.evaluation.lmms_eval:manifest\n" in text
    manifest = plugin.manifest()
    assert (manifest.model_id, manifest.simple_class_path) == ("qformer", "qformer.evaluation.lmms_eval.QFormer")
    assert plugin.QFormer.is_simple


def test_texts_are_those_of_the_adapter_in_the_order_of_the_requests(plugin, adapter, tiny):
    docs = documents(tiny)
    plain, until = {"max_new_tokens": 4, "temperature": 0, "do_sample": False}, {"max_new_tokens": 6, "until": "the"}
    expected = []
    model = qformer.load(adapter, device="cpu")
    for i, request in enumerate(requests(docs, plain)):
        text = request.args[0].removeprefix("<image>\n")
        settings = {"max_new_tokens": 6 if i % 2 else 4, "num_beams": 1}
        (answer,) = model.answer([docs[i]["path"]], [""], text, prompt="{}", **settings)
        expected.append(answer.split("the")[0].strip() if i % 2 else answer)
    assert len(set(expected)) > 1
    for batch_size in (1, 3):
        asked = plugin.QFormer(str(adapter), batch_size=batch_size, device="cpu")
        asked.task_dict = {"t": {"test": docs}}
        assert asked.generate_until(requests(docs, plain, until)) == expected
    asked = plugin.QFormer(str(adapter), prompt="Question: {} Short answer:", batch_size="4", device="cpu")
    asked.task_dict = {"t": {"test": docs}}
    answers = model.answer([d["path"] for d in docs], [r.args[0].removeprefix("<image>\n") for r in requests(docs, plain)],
                           prompt="Question: {} Short answer:", max_new_tokens=4, num_beams=1)  # fmt: skip
    assert asked.generate_until(requests(docs, plain)) == answers


def test_loglikelihood_is_the_rank_of_candidates_and_greedy_is_what_is_written(plugin, adapter, tiny):
    docs, model = documents(tiny), qformer.load(adapter, device="cpu")
    asked = plugin.QFormer(str(adapter), device="cpu")
    asked.task_dict = {"t": {"test": docs}}
    (greedy,) = model.answer([docs[1]["path"]], [""], "what ?", prompt="{}", max_new_tokens=9, num_beams=1)
    candidates = [" red", " green square", f" {greedy}"]
    choices = [Request(("what ?", c, lambda doc: [doc["path"]], 1, "t", "test")) for c in candidates]
    alone = [Request(("what ?", " red")), Request(("what ?", lambda doc: doc["answers"][0], lambda doc: [doc["path"]], 0,
                                                   "t", "test"))]  # fmt: skip
    outputs = [output.text for output in asked.loglikelihood([*choices, *alone])]
    (losses,) = model.rank([docs[1]["path"]], [""], [c.strip() for c in candidates], "what ?", prompt="{}")
    torch.testing.assert_close(torch.tensor([value for value, _ in outputs[:3]]), losses)
    (text,) = model.rank(None, [""], ["red"], "what ?", prompt="{}")
    (target,) = model.rank([docs[0]["path"]], [""], docs[0]["answers"][:1], "what ?", prompt="{}")
    assert [value for value, _ in outputs[3:]] == pytest.approx([text.item(), target.item()], abs=1e-4)
    assert [is_greedy for _, is_greedy in outputs[:2]] == [False, False]


def test_mistakes_name_what_to_give(plugin, adapter, tiny, tmp_path):
    with pytest.raises(ValueError, match="batch_size=auto: expected a number"):
        plugin.QFormer(str(adapter), batch_size="auto")
    run_stage(1, tiny.stage1(tmp_path, "train.max_steps=1", "data.validation=[]"))
    with pytest.raises(ValueError, match="this one is of stage1"):
        plugin.QFormer(str(tmp_path / "adapter"), device="cpu")
    with pytest.raises(NotImplementedError, match="one round"):
        plugin.QFormer(str(adapter), device="cpu").generate_until_multi_round([])


@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed: pip install lmms-eval")
def test_lmms_eval_runs_tasks_that_generate_and_that_choose(adapter, tiny, tmp_path, monkeypatch):
    import lmms_eval.evaluator
    import lmms_eval.tasks

    registered = [e for e in importlib.metadata.entry_points(group="lmms_eval.models") if e.name == "qformer"]
    assert registered, "install this repository anew: its entry point is not there"
    records = tmp_path / "records.json"
    records.write_text("".join(json.dumps(doc) + "\n" for doc in documents(tiny)))
    (tmp_path / "images.py").write_text(IMAGES)
    for name, kind, more in (
        ("tiny_vqa", "generate_until", GENERATION + EXACT),
        ("tiny_choice", "multiple_choice", ACCURACY),
    ):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, records=records, more=more))
    monkeypatch.chdir(tmp_path)
    results = lmms_eval.evaluator.simple_evaluate(
        model="qformer", model_args=f"adapter={adapter}", tasks=["tiny_vqa", "tiny_choice"], batch_size=2, device="cpu",
        task_manager=lmms_eval.tasks.TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0, cli_args=types.SimpleNamespace(process_with_media=False),
    )  # fmt: skip
    model = qformer.load(adapter, device="cpu")
    docs = documents(tiny)
    answers = [
        model.answer([d["path"]], [""], d["question"], prompt="{}", max_new_tokens=4, num_beams=1)[0] for d in docs
    ]
    losses = [model.rank([d["path"]], [""], ["red", "green", "blue"], d["question"], prompt="{}")[0] for d in docs]
    right = [
        ["red", "green", "blue"][int(loss.argmin())] == d["answers"][0] for loss, d in zip(losses, docs, strict=True)
    ]
    samples = results["samples"]["tiny_vqa"]
    assert [sample["resps"][0][0] for sample in samples] == answers
    assert results["results"]["tiny_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
