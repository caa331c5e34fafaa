"""Records of several images: read and checked, encoded once each, their visual prompts one after the other."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_instructed import INSTRUCTED
from test_models import build, run
from test_stages import refused, stage_main
from tiny import IMAGE_SIDE, TWO_RANKS, WORDS, Tiny, run_stage

import qformer
from qformer.build import build_dataset, build_stage2
from qformer.config import Stage2Config, load_config
from qformer.data import Draw, RecordDataset, Sample, collate, read_records
from qformer.encoders import Features

REPO = Path(__file__).resolve().parent.parent
QUESTION = "what colour is the square ?"


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def beside(tiny: Tiny, name: str, *rows: dict) -> str:
    """Records in the folder of the tiny pictures."""
    return str(write(Path(tiny.records).parent / f"{name}.jsonl", *rows))


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> str:
    run_dir = tmp_path_factory.mktemp("several")
    run_stage(2, tiny.stage2(run_dir, "train.max_steps=1", "data.validation=[]"))
    return str(run_dir / "adapter")


@pytest.fixture(scope="module")
def pictures(tiny) -> list[str]:
    return [str(Path(tiny.records).parent / f"{i:02d}.png") for i in range(4)]


def test_a_record_names_several_images_and_each_keeps_its_own_id(tiny):
    rows = [{"images": ["00.png", "01.png"], "question": QUESTION, "answers": ["red"], "question_id": 1}]
    rows += [{"image": "02.png", "question": QUESTION, "answers": ["red"], "question_id": 2}]
    records = read_records([beside(tiny, "pairs", *rows)])
    assert [Path(image.image).name for image in records[0].each_image()] == ["00.png", "01.png"]
    assert [image.image_id for image in records[0].each_image()] == ["00.png", "01.png"]
    assert records[0].image_id == "00.png 01.png"
    assert records[1].each_image() == [records[1]]
    assert list(records.first_of_each_picture().items()) == [("00.png", 0), ("01.png", 0), ("02.png", 1)]
    assert records.text(0) == records[0]


def test_images_inside_a_table_are_several_too(tiny, tmp_path, pictures):
    import datasets

    inside = [{"bytes": Path(picture).read_bytes(), "path": None} for picture in pictures]
    table = datasets.Dataset.from_dict({"images": [inside[:2], inside[2:3]], "caption": ["a", "b"]})
    table.cast_column("images", datasets.List(datasets.Image())).to_parquet(tmp_path / "embedded.parquet")
    records = read_records([str(tmp_path / "embedded.parquet")])
    assert [image.image_bytes for image in records[0].each_image()] == [Path(p).read_bytes() for p in pictures[:2]]
    assert records[1].image_bytes == Path(pictures[2]).read_bytes()
    assert records.text(0).each_image()[0].image_bytes is None
    assert len(records.first_of_each_picture()) == 3


def test_mistakes_in_the_fields_of_images_are_named(tiny):
    good = {"image": "00.png", "caption": "a"}
    for rows, problem in [
        ([good, {"images": ["00.png", "01.png"], "image": "00.png", "caption": "a"}], "record 1 .* more than one of image"),
        ([good, {"images": [], "caption": "a"}, {"images": ["00.png"], "caption": "a"}], r"record 1 .* has no 'image'"),
        ([{"images": ["00.png", ""], "caption": "a"}], r"record 0 .* empty entry in its 'images'"),
        ([{"images": ["00.png", "../x.png"], "caption": "a"}], "leaves its root"),
        ([{"images": [1, 2], "caption": "a"}], "field 'images' is .*; expected a list of paths or pictures"),
        ([{"picture": "00.png", "caption": "a"}], "no field 'image'"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=problem):
            read_records([beside(tiny, "wrong", *rows)])


def several(samples: list[Sample], *groups: tuple[int, ...]) -> list[Sample]:
    """Samples of several images each, out of samples of one."""
    made = []
    for group in groups:
        first = samples[group[0]]
        images, keys = tuple(samples[i].image for i in group), tuple(str(i) for i in group)
        made.append(first._replace(images=images if len(group) > 1 else (), image_keys=keys))
    return made


def test_each_different_image_stands_once_in_a_batch(tiny):
    _, samples = build(tiny, "opt")
    batch = collate(several(samples, (0, 1), (2,), (1, 0, 3)))
    assert batch.images.shape == (4, 3, IMAGE_SIDE, IMAGE_SIDE)
    assert batch.image_of.tolist() == [[0, 1, -1], [2, -1, -1], [1, 0, 3]]
    assert len(batch) == 3
    unkeyed = [sample._replace(image_keys=()) for sample in several(samples, (0, 1), (1, 0))]
    assert len(collate(unkeyed).images) == 4
    assert collate(samples[:3]).image_of is None


@pytest.mark.parametrize("more", [(), (INSTRUCTED,)])
@pytest.mark.parametrize("kind", ["opt", "t5"])
@torch.no_grad()
def test_a_row_of_two_images_among_others_is_that_row_alone(tiny, kind, more):
    model, samples = build(tiny, kind, "pictures", *more)
    model.eval()
    groups = [(0, 1), (2,), (3, 4, 5), (1,)]
    batch = collate(several(samples, *groups))
    features, prompts = model.encode(batch), ["a", QUESTION, "what ?", ""]
    together = model.visual_prompt(features, prompts, batch.image_of).double()
    model.llm.double()  # a T5 of weights this large makes 1e-4 of float32's last digit
    mask = model.visual_mask(batch.image_of)
    targets = ["red", "a green square", "blue dot", "one"]
    losses, texts = [], []
    for row, group in enumerate(groups):
        images = Features(model.encoder(collate(samples).images[list(group)]).tokens, None)
        alone = torch.cat([model.visual_prompt(images, [prompts[row]] * len(group), torch.arange(len(group)))[i]
                           for i in range(len(group))])[None]  # fmt: skip
        torch.testing.assert_close(together[row][mask[row]], alone[0].double(), atol=1e-6, rtol=0)
        alone = together[row][mask[row]][None]
        losses.append(model.llm.loss(alone, [prompts[row]], [targets[row]]).total)
        texts += model.llm.generate(alone, [prompts[row]], max_new_tokens=5, num_beams=3)
    loss = model.llm.loss(together, prompts, targets, visual_mask=mask)
    torch.testing.assert_close(loss.total, torch.stack(losses).sum(), rtol=1e-12, atol=0)
    assert model.llm.generate(together, prompts, max_new_tokens=5, num_beams=3, visual_mask=mask) == texts
    one = model.llm.loss(together[:1], prompts[:1], targets[:1], visual_mask=mask[:1]).total
    torch.testing.assert_close(one, losses[0], rtol=1e-12, atol=0)


def test_the_order_of_a_rows_images_is_the_order_of_their_visual_prompts(tiny):
    model, samples = build(tiny, "opt")
    batch = collate(several(samples, (0, 1), (1, 0)))
    with torch.no_grad():
        prompt = model.eval().visual_prompt(model.encode(batch), ["", ""], batch.image_of)
    half = prompt.shape[1] // 2
    assert torch.equal(prompt[0, :half], prompt[1, half:])
    assert not torch.equal(prompt[0, :half], prompt[1, :half])


@pytest.mark.parametrize("more", [(), (INSTRUCTED,)])
def test_gradient_reaches_everything_through_several_images(tiny, more):
    model, samples = build(tiny, "opt", "pictures", *more)
    run(model.train(), collate(several(samples, (0, 1), (2,), (0, 3)))).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.adapter.parameters() if p.requires_grad)
    model.sample(model.prepare(collate(several(samples, (0, 1), (2,))), 0))


def test_stage_2_trains_and_validates_on_several_images(tiny, tmp_path):
    rows = [{"images": [f"{i:02d}.png", f"{i + 1:02d}.png"][: 1 + i % 2], "caption": "a red square"} for i in range(8)]
    data = beside(tiny, "few", *rows)
    more = [f"data.train=[{data}]", f"data.validation=[{data}]", "train.validate_every_steps=1", "data.augment=false"]
    run_stage(2, tiny.stage2(tmp_path / "live", *more))
    stage_main("cache_features")([*tiny.stage2(tmp_path / "x", *more), f"data.features={tmp_path / 'cache'}"])
    run_stage(2, tiny.stage2(tmp_path / "cached", *more, f"data.features={tmp_path / 'cache'}"))
    losses = [
        [row["lm"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines() if "lm" in (row := json.loads(line))]
        for name in ("live", "cached")
    ]  # fmt: skip
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # the cache is bfloat16


def test_a_draw_augments_each_image_and_the_first_as_if_it_were_alone(tiny):
    rows = [{"images": ["00.png", "01.png"], "caption": "a"}, {"image": "00.png", "caption": "a"}]
    config = load_config(Stage2Config, tiny.stage2(tiny.folder / "x", f"data.train=[{beside(tiny, 'draw', *rows)}]"))
    data: RecordDataset = build_dataset(config.data, build_stage2(config).encoder, "train", 0)
    pair, single = data[Draw(0, 0, 3)], data[Draw(1, 0, 3)]
    assert torch.equal(pair.image, single.image)
    assert torch.equal(pair.images[0], pair.image)
    assert not torch.equal(pair.images[1], pair.image)
    assert single.images == pair.image_keys == ()


def test_stage_1_refuses_records_of_several_images_in_words(tiny, tmp_path, capsys):
    rows = [{"image": "00.png", "caption": "a"}, {"images": ["00.png", "01.png"], "caption": "a"}]
    error = refused("stage1", tiny.stage1(tmp_path, f"data.train=[{beside(tiny, 'refused', *rows)}]"), capsys)
    assert "record 1 (from 0) names several images; stage 1 learns what belongs to one image" in error


def test_python_takes_rows_of_images_and_encodes_each_once(adapter, pictures, monkeypatch):
    model = qformer.load(adapter, "cpu")
    a, b, c, _ = pictures
    encoded = []
    forward = model.model.encoder.forward
    monkeypatch.setattr(model.model.encoder, "forward", lambda x, *m: encoded.append(len(x)) or forward(x, *m))
    settings = {"num_beams": 2, "max_new_tokens": 4}
    answers = model.answer([[a, b], c, [b, a, c]], [QUESTION, "what ?", QUESTION], **settings)
    assert encoded == [3]
    assert answers == [
        model.answer([row], [question], **settings)[0]
        for row, question in (([a, b], QUESTION), (c, "what ?"), ((b, a, c), QUESTION))
    ]
    assert model.answer([[a, b]], ["what ?", QUESTION], **settings)[1] == answers[0]
    assert len(model.caption([[a, b], [c]], **settings)) == 2
    assert model.caption([[a]], **settings) == model.caption(a, **settings)
    with pytest.raises(ValueError, match=r"row 1 \(from 0\) has no image"):
        model.caption([[a], []])
    with pytest.raises(ValueError, match="2 images for 3 questions"):
        model.answer([[a, b], [c]], ["what ?"] * 3)


def test_more_images_than_the_language_model_has_positions_for_is_an_error_in_words(adapter, pictures):
    model = qformer.load(adapter, "cpu")  # 64 positions, 4 an image
    with pytest.raises(
        ValueError, match=r"take \d+ positions; the language model has 64 .*fewer images or fewer frames"
    ):
        model.answer([pictures * 5], [QUESTION])
    with pytest.raises(ValueError, match=r"prompt and target take \d+ .* fewer images"):
        model.model.llm.loss(torch.zeros(1, 80, model.model.llm.width), [""], ["a"])


def test_an_evaluation_asks_about_pairs_and_names_them(tiny, adapter, tmp_path):
    rows = [
        {"images": ["00.png", "01.png"], "question": QUESTION, "answers": ["red"], "question_id": 1},
        {"image": "02.png", "question": QUESTION, "answers": ["red"], "question_id": 2},
        {"images": ["01.png", "gone.png"], "question": QUESTION, "answers": ["red"], "question_id": 3},
        {"images": ["01.png", "00.png"], "question": QUESTION, "answers": ["red"], "question_id": 4},
    ]
    records = beside(tiny, "asked", *rows)
    arguments = [adapter, records, "--device", "cpu", "--num-beams", "1", "--json", str(tmp_path / "out.json")]
    stage_main("evaluate")([*arguments, "--answers", str(tmp_path / "answers.jsonl")])
    out = json.loads((tmp_path / "out.json").read_text())
    assert [row["question_id"] for row in out["results"]] == [1, 2, 4]
    assert out["dropped"] == 1
    assert [Path(name).name for name in out["results"][0]["image"]] == ["00.png", "01.png"]
    folder = Path(records).parent
    model = qformer.load(adapter, "cpu")
    expected = model.answer([[folder / "00.png", folder / "01.png"]], [QUESTION], num_beams=1)
    assert out["results"][0]["answer"] == expected[0]


def test_ask_also_puts_one_question_about_all_pictures(adapter, pictures, capsys):
    model = qformer.load(adapter, "cpu")
    stage_main("ask")([adapter, pictures[0], "what ?", "--also", pictures[1], "--device", "cpu", "--num-beams", "1"])
    together = capsys.readouterr().out.strip()
    assert together == model.answer([pictures[:2]], ["what ?"], num_beams=1)[0]


def test_two_processes_train_and_evaluate_on_several_images_as_one(tiny, tmp_path):
    sets = [["00.png", "01.png"], ["02.png"], ["03.png", "04.png", "05.png"], ["06.png"]]
    rows = [{"images": names, "caption": f"a {WORDS[4 + i % 4]} square"} for i, names in enumerate(sets * 4)]
    rows = [{**row, "question": QUESTION, "question_id": i, "answers": ["red"]} for i, row in enumerate(rows)]
    data = beside(tiny, "ranks", *rows)
    more = [
        f"data.train=[{data}]",
        "data.validation=[]",
        "data.augment=false",
        "qformer.dropout=0",
        "train.max_steps=2",
    ]
    run_stage(2, tiny.stage2(tmp_path / "one", *more))
    two = [str(REPO / "stages/stage2.py"), *tiny.stage2(tmp_path / "two", *more, "train.micro_batch_size=4")]
    asked = [str(tmp_path / "one/adapter"), data, "--device", "cpu", "--batch-size", "4", "--num-beams", "1", "--json"]
    scored = [str(REPO / "stages/evaluate.py"), *asked, str(tmp_path / "two.json")]
    for command in (two, scored):
        done = subprocess.run([*TWO_RANKS, *command], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    stage_main("evaluate")([*asked, str(tmp_path / "one.json")])
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "one.json").read_text())
    adapters = [load_file(tmp_path / name / "adapter/adapter.safetensors") for name in ("one", "two")]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, atol=1e-5, rtol=1e-4)


def test_stage_2_says_before_the_first_step_that_images_or_frames_do_not_fit(tiny, tmp_path, capsys):
    rows = [{"images": ["00.png"] * 20, "caption": "a"}, {"image": "00.png", "caption": "a"}]
    many = [f"data.train=[{beside(tiny, 'many', *rows)}]", "data.validation=[]"]
    error = refused("stage2", tiny.stage2(tmp_path / "many", *many), capsys)
    assert "qformer.queries=4 of 20 images, llm.prompt of" in error
    assert "the language model has 64" in error
    clips = [f"data.train=[{beside(tiny, 'clips', {'video': 'gone.mp4', 'caption': 'a'})}]", "data.validation=[]"]
    error = refused("stage2", tiny.stage2(tmp_path / "clips", *clips, "data.frames=30"), capsys)
    assert "of 30 images" in error
    assert "fewer frames" in error
