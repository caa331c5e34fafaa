"""What the queries look at: probabilities and their gradients, grids of every kind of encoder, words, pictures of both."""

import importlib
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_clips import write_clip
from test_encoders import PICTURES, native
from test_qformer import IMAGE_MASK, TEXT_MASK, B, build, draw
from test_stages import stage_main
from tiny import FEATURE_WIDTH, IMAGE_SIDE, Tiny, run_stage
from torch import Tensor

import qformer
from qformer.attention import AttentionMaps
from qformer.attention.picture import overlay
from qformer.config import EncoderConfig
from qformer.encoders import FrozenEncoder, load_encoder
from qformer.inference import VisionLanguageModel
from qformer.language.words import word_losses
from qformer.layers import WatchedKV
from qformer.qformer import ImageMemory
from qformer.shapes import world
from qformer.text import words_of

MODELS = ("stage1", "opt", "t5", "instructed")
CAPTION = "a photo of one red square"
PROMPT = "a"
QUESTION = "what colour is the square ?"
HEADS, QUERIES = 2, 4
GRID = (2, 2)  # of the tiny encoder, behind its class token


@pytest.fixture(scope="module")
def models(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, VisionLanguageModel]:
    """A stage-1 model, and stage-2 ones: one row, an encoder-decoder, and an instructed Q-Former."""
    folder = tmp_path_factory.mktemp("watched")
    once = ["train.max_steps=1", "data.validation=[]", "qformer.layers=3", "qformer.init_std=0.3"]
    run_stage(1, tiny.stage1(folder / "stage1", *once))
    run_stage(2, tiny.stage2(folder / "opt", *once, f"llm.prompt={PROMPT}"))
    run_stage(2, tiny.stage2(folder / "t5", *once, f"llm.prompt={PROMPT}", f"llm.id={tiny.t5}"))
    run_stage(2, tiny.stage2(folder / "instructed", *once, f"llm.prompt={PROMPT}", "stage2.instructed=true"))
    return {name: qformer.load(folder / name, "cpu") for name in MODELS}


@pytest.fixture(scope="module")
def pictures(tiny: Tiny) -> list[str]:
    return [str(tiny.records.parent / f"{i:02d}.png") for i in range(3)]


# ---- the plain path that keeps its probabilities ----


@pytest.mark.parametrize("masked", [False, True])
def test_watched_queries_compute_what_they_compute_unwatched(masked: bool) -> None:
    qformer_, (features, ids) = build(), draw()
    images = qformer_.project_images(features, IMAGE_MASK if masked else None)
    for answer in (
        lambda memory: qformer_.query_pass(memory).output,
        lambda memory: qformer_.matching_pass([memory], ids, TEXT_MASK),
    ):
        watched = images.watched()
        torch.testing.assert_close(answer(watched), answer(images), rtol=1e-5, atol=1e-5)
        for layer in watched.layers:
            (look,) = layer.looks
            assert look.shape[0] == B
            torch.testing.assert_close(look.sum(-1), torch.ones(look.shape[:-1]))
            if masked:
                assert not look[~IMAGE_MASK[:, None, None].expand_as(look)].any()


def test_rows_that_share_an_image_are_watched_as_each_alone() -> None:
    qformer_, (features, ids) = build(), draw()
    together = qformer_.project_images(features[:1]).watched()
    output = qformer_.matching_pass([together._replace(times=B)], ids, TEXT_MASK)
    for row in range(B):
        alone = qformer_.project_images(features[:1]).watched()
        expected = qformer_.matching_pass([alone], ids[row : row + 1], TEXT_MASK[row : row + 1])
        torch.testing.assert_close(output[row : row + 1], expected, rtol=1e-5, atol=1e-5)
        look = together.layers[0].looks[0].unflatten(2, (B, -1))[:, :, row]
        torch.testing.assert_close(look, alone.layers[0].looks[0], rtol=1e-5, atol=1e-5)


# ---- grids ----

TIMM = {  # without weights: size, block, grid, tokens without a place
    "test_vit": (64, None, (4, 4), 1),
    "vit_small_patch16_dinov3": (64, None, (4, 4), 5),
    "test_efficientnet": (128, None, (4, 4), 0),
    "test_convnext": (128, None, (4, 4), 0),
    "swin_tiny_patch4_window7_224": (56, 1, (7, 7), 0),
}


def moved_most(encoder: FrozenEncoder) -> int:
    """Of the tokens that have a place, row by row, the one that a change in the top right corner of the image moves most."""
    assert encoder.grid is not None
    assert encoder.num_tokens is not None
    assert encoder.input_transform is not None
    (rows, columns), side = encoder.grid, encoder.input_transform.size
    plain = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    changed = plain.clone()
    changed[:, :, : side // rows, -side // columns :] += 3
    moved = (encoder(changed).tokens - encoder(plain).tokens).norm(dim=-1)[0]
    return int(moved[encoder.num_tokens - rows * columns :].argmax())


@pytest.mark.parametrize("case", PICTURES, ids=lambda build: build.__name__)
def test_a_corner_of_the_image_is_that_corner_of_the_grid_of_a_vit(case: Any, tmp_path: Path) -> None:
    encoder = load_encoder(EncoderConfig(**case(tmp_path).arguments))
    assert encoder.grid == (2, 2)
    assert moved_most(encoder) == 1  # neither its mirror image nor its transpose


@pytest.mark.parametrize("id", TIMM)
def test_a_corner_of_the_image_is_that_corner_of_the_grid_in_timm(id: str) -> None:
    size, block, grid, beside = TIMM[id]
    encoder = load_encoder(EncoderConfig("timm", id, image_size=size, block=block, random_weights=True))
    assert encoder.grid == grid
    assert encoder.num_tokens == grid[0] * grid[1] + beside
    row, column = divmod(moved_most(encoder), grid[1])
    assert row < grid[0] / 2 <= column  # neither its mirror image nor its transpose


# ---- what a loaded model shows ----


@pytest.mark.parametrize("name", MODELS)
def test_maps_lie_over_the_image_and_sum_to_one_with_what_has_no_place(models, pictures, name: str) -> None:
    for text in (None, CAPTION):
        look = models[name].attention(pictures[0], text)
        assert look.layers == [0, 2]
        assert look.maps.shape == (2, HEADS, QUERIES, *GRID)
        assert look.maps.dtype == torch.float32
        torch.testing.assert_close(look.maps.sum((-2, -1)) + look.beside, torch.ones(2, HEADS, QUERIES))
        assert (look.beside > 0).all()  # the class token's
        assert look.words == ([] if text is None else CAPTION.split())
        assert look.word_maps.shape == (len(look.words), 2, *GRID)
        assert (look.word_maps >= 0).all()
        assert look.of_queries(2, "max").shape == (QUERIES, *GRID)
        torch.testing.assert_close(look.of_queries(), look.maps.mean((0, 1)))
        assert look.of_words().shape == (len(look.words), *GRID)
        assert 0 < look.overlap() <= 1
    assert look.word_maps.flatten(1).any(1).all()  # something speaks for every word


class Moved(WatchedKV):
    """Keys and values whose attention has a number added to one of its probabilities."""

    def attend(self, query: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        return super().attend(query, mask, scale) + self.by.repeat(1, 1, query.shape[2] // QUERIES, 1) @ self.value


def scores(model: VisionLanguageModel, memory: ImageMemory) -> Tensor:
    """What words' maps are gradients of: the matches with all words and without each, or the words' log-probabilities."""
    stage, adapter = model.model, model.model.adapter
    if stage.name == "stage1":
        ids, mask = stage.tokenize([CAPTION])
        hidden = torch.eye(ids.shape[1], dtype=torch.bool)[1:-1]  # a token is a word between [CLS] and [SEP]
        rows = torch.cat([ids, ids.masked_fill(hidden, stage.tokenizer.mask_token_id)])
        logits = adapter.match([memory._replace(times=len(rows))], rows, mask.expand(len(rows), -1))
        return logits[:, 1] - logits[:, 0]
    output = adapter.qformer.query_pass(memory).output if stage.tokenizer is None else None
    if output is None:
        asked = stage.tokenizer([PROMPT], return_tensors="pt")
        output = adapter.qformer.matching_pass([memory], asked.input_ids, asked.attention_mask.bool())
    return -word_losses(stage.llm, adapter.language_projection(output), PROMPT, CAPTION)[1]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_words_map_has_the_gradient_that_differences_give(models, pictures, name: str) -> None:
    model, step = models[name], 0.003
    features = model.encode(pictures[0])
    look = model.attention(pictures[0], CAPTION)
    plain = model.model.adapter.qformer.project_images(*features, model.model.adapter.feature_norm)
    slopes = torch.zeros(len(scores(model, plain.watched())), *look.maps.shape[:3], features.tokens.shape[1])
    for layer, head, query, token in np.ndindex(*slopes.shape[1:]):
        ends = []
        for sign in (1, -1):
            kept = [Moved(*kv) for kv in plain.watched().layers]
            for kv in kept:
                kv.by = torch.zeros(1, HEADS, QUERIES, features.tokens.shape[1])
            kept[layer].by[0, head, query, token] = sign * step
            ends.append(scores(model, plain._replace(layers=kept)))
        slopes[:, layer, head, query, token] = (ends[0] - ends[1]) / (2 * step)
    speaks = slopes[:1] - slopes[1:] if name == "stage1" else slopes
    expected = (look.maps.flatten(3) * speaks[..., 1:].clamp(min=0)).mean((2, 3))
    torch.testing.assert_close(look.word_maps.flatten(2), expected, rtol=0.03, atol=0.01 * float(expected.max()))


@pytest.mark.parametrize("name", MODELS)
def test_several_images_have_maps_each(models, pictures, name: str) -> None:
    model = models[name]
    look = model.attention(pictures, CAPTION)
    assert look.maps.shape == (2, HEADS, QUERIES, 3, *GRID)
    assert look.word_maps.shape == (6, 2, 3, *GRID)
    assert look.of_queries().shape == (QUERIES, 3, *GRID)
    total = look.maps.sum((-2, -1)) + look.beside
    if name == "stage1":  # their tokens stand side by side: one row of queries looks at all
        torch.testing.assert_close(total.sum(-1), torch.ones(2, HEADS, QUERIES))
    else:  # each has a visual prompt of its own
        torch.testing.assert_close(total, torch.ones(2, HEADS, QUERIES, 3))
        alone = model.attention(pictures[1])
        torch.testing.assert_close(model.attention(pictures).maps[..., 1, :, :], alone.maps)
    frames = torch.stack([model.read(picture) for picture in pictures])
    torch.testing.assert_close(model.attention(frames, CAPTION).word_maps, look.word_maps)
    torch.testing.assert_close(model.attention([pictures], CAPTION).word_maps, look.word_maps)


def test_a_map_is_the_same_of_a_path_an_image_and_features(models, pictures) -> None:
    for model in models.values():
        look = model.attention(pictures[0], CAPTION)
        for same in (Image.open(pictures[0]), [pictures[0]], model.read(pictures[0]), model.encode(pictures[0])):
            torch.testing.assert_close(model.attention(same, CAPTION).word_maps, look.word_maps)


def test_an_answers_words_depend_on_its_question(models, pictures) -> None:
    for name in ("opt", "t5", "instructed"):
        look = models[name].attention(pictures[0], "red", question=QUESTION)
        assert look.words == ["red"]
        assert not torch.equal(look.word_maps, models[name].attention(pictures[0], "red").word_maps)


def test_nothing_is_left_behind_in_a_model_that_was_watched(models, pictures) -> None:
    for model in models.values():
        model.attention(pictures[0], CAPTION)
        assert all(parameter.grad is None for parameter in model.model.parameters())
        for parameter in model.model.parameters():
            parameter.requires_grad_(False)  # as of a model that is served
        assert model.attention(pictures[0], CAPTION).word_maps.any()


# ---- words ----


def test_pieces_are_joined_to_words_and_special_tokens_are_none(tiny: Tiny) -> None:
    from transformers import AutoTokenizer, BertTokenizer

    (Path(tiny.folder) / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nplay\n##ing\n##s\n,\ndog\n")
    bert = BertTokenizer(str(Path(tiny.folder) / "vocab.txt"))
    assert words_of(bert, bert("dog playing , plays cat").input_ids) == (
        ["dog", "playing", "plays", "UNK"],
        [-1, 0, 1, 1, -1, 2, 2, 3, -1],
    )
    opt = AutoTokenizer.from_pretrained(tiny.opt)
    assert words_of(opt, opt("a red\n").input_ids) == (["a", "red"], [-1, 0, 1, -1])
    assert words_of(opt, []) == ([], [])


def test_the_losses_of_words_add_up_to_that_of_the_text(models, pictures) -> None:
    for name in ("opt", "t5"):
        llm = models[name].model.llm
        prompt = torch.randn(1, QUERIES, llm.width, generator=torch.Generator().manual_seed(0))
        words, losses = word_losses(llm, prompt, "a photo of", "one red square")
        assert words == ["one", "red", "square"]
        end = llm.candidate_losses(prompt, "a photo of one red square", [""]).total[0]
        whole = llm.loss(prompt, ["a photo of"], ["one red square"]).total
        assert losses.shape == (3,)
        assert float(losses.sum()) < float(whole)  # which counts the end as well
        if not llm.is_encoder_decoder:
            torch.testing.assert_close(losses.sum() + end, whole)


# ---- features from disk, and mistakes ----


def on_features(tiny: Tiny, folder: Path, *more: str) -> VisionLanguageModel:
    once = ["train.max_steps=1", "data.validation=[]"]
    run_stage(1, tiny.stage1(folder, *once, *tiny.on_features(), *more))
    return qformer.load(folder, "cpu")


def test_features_with_a_known_grid_have_maps_and_others_are_refused_by_the_key(tiny: Tiny, tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.npy" for n in (6, 8, 5)]
    for file in files:
        np.save(file, np.random.default_rng(0).standard_normal((int(file.stem), FEATURE_WIDTH)).astype(np.float32))
    with_grid = on_features(tiny, tmp_path / "grid", "encoder.grid=[2,3]")
    look = with_grid.attention(str(files[0]), CAPTION)
    assert look.maps.shape == (1, HEADS, QUERIES, 2, 3)
    assert not look.beside.any()
    both = with_grid.attention([str(files[0]), str(files[1])])  # two tokens in front of the second one's places
    assert both.maps.shape == (1, HEADS, QUERIES, 2, 2, 3)
    torch.testing.assert_close((both.maps.sum((-2, -1)) + both.beside).sum(-1), torch.ones(1, HEADS, QUERIES))
    assert not both.beside[..., 0].any()
    assert both.beside[..., 1].all()
    with pytest.raises(ValueError, match=r"5 tokens of an image are fewer than the places of encoder\.grid=\[2, 3\]"):
        with_grid.attention(str(files[2]))
    with pytest.raises(ValueError, match=r"encoder\.grid=\[\]: .*\[rows, columns\]"):
        on_features(tiny, tmp_path / "none").attention(str(files[0]))


@pytest.mark.parametrize("grid", [[2], [0, 3], [2, 3, 1], [4, 4]])
def test_a_grid_that_cannot_be_is_refused(grid: list[int]) -> None:
    with pytest.raises(ValueError, match=r"encoder\.grid is .*expected \[rows, columns\]"):
        load_encoder(EncoderConfig("features", width=8, num_tokens=10, grid=grid))


def test_a_grid_beside_another_loader_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"encoder\.grid is \[2, 2\], but loader 'open_clip' does not read it"):
        load_encoder(EncoderConfig(**native(tmp_path).arguments, grid=[2, 2]))


def test_mistakes_name_what_to_give(models, pictures, monkeypatch) -> None:
    look = models["stage1"].attention(pictures[0])
    for wrong, message in [
        (lambda: look.of_queries(1), r"layer=1: expected one of \[0, 2\]"),
        (lambda: look.of_words(7), r"layer=7: expected one of \[0, 2\]"),
        (lambda: look.of_queries(0, "min"), "heads='min': expected one of mean, max"),
        (lambda: models["stage1"].attention(pictures[0], "red", question="?"), "question needs a stage-2 adapter"),
        (lambda: models["opt"].attention([]), r"row 0 \(from 0\) has no image"),
        (lambda: models["opt"].attention("absent.png"), r"absent\.png"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()
    monkeypatch.delitem(models["stage1"].model.adapter.weights, "itm")
    assert models["stage1"].attention(pictures[0]).maps.shape
    with pytest.raises(ValueError, match=r"stage1\.itm=0"):
        models["stage1"].attention(pictures[0], CAPTION)


# ---- the pointing game ----

COLOUR_NAMES, PLACES = ("red", "green", "blue", "yellow"), (3, 4)


def write_colours(folder: Path, count: int, seed: int) -> list[tuple[str, dict[str, int]]]:
    """Feature files with two colours at two of twelve places, and records that name both; where each of them is."""
    folder.mkdir()
    rng, planted, lines = np.random.default_rng(seed), [], []
    for i in range(count):
        tokens = 0.3 * rng.standard_normal((12, FEATURE_WIDTH)).astype(np.float32)
        colours, places = rng.permutation(4)[:2], rng.permutation(12)[:2]
        tokens[places, colours] += 4
        np.save(folder / f"{i}.npy", tokens)
        names = [COLOUR_NAMES[colour] for colour in colours]
        planted.append((str(folder / f"{i}.npy"), dict(zip(names, map(int, places), strict=True))))
        lines.append(json.dumps({"image": f"{i}.npy", "caption": f"a {names[0]} dot , one {names[1]} square"}))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    return planted


def test_the_map_of_a_colour_points_at_its_place_once_that_was_learnt(tiny: Tiny, tmp_path: Path) -> None:
    write_colours(tmp_path / "train", 256, seed=0)
    held_out = write_colours(tmp_path / "held_out", 40, seed=1)
    data = [*tiny.on_features(), f"data.train=[{tmp_path / 'train/records.jsonl'}]", "encoder.grid=[3,4]"]
    learns = [
        "train.max_steps=120",
        "stage1.itg=0",
        "optim.lr=3e-3",
        "train.micro_batch_size=32",
        "train.global_batch_size=32",
    ]
    learns += ["qformer.dropout=0", "qformer.init_std=0.1", "qformer.layers=3", "train.log_every_steps=50"]
    run_stage(1, tiny.stage1(tmp_path / "run", *data, *learns))
    model, hits = qformer.load(tmp_path / "run", "cpu"), []
    for file, places in held_out:
        look = model.attention(file, " , ".join(f"a {name} dot" for name in places))
        hits += [int(look.of_words()[look.words.index(name)].argmax()) == place for name, place in places.items()]
    assert len(hits) == 80
    assert sum(hits) / len(hits) > 0.6, "by chance it is 1 / 12"


def test_boxes_are_drawn_around_their_shapes_and_change_no_picture() -> None:
    rng, same = random.Random(4), random.Random(4)
    for _ in range(30):
        scene = world.draw_scene(rng, 1)
        assert world.draw_scene(same, 1) == scene
        image, [box] = world.render_with_boxes(scene, rng)
        assert image.tobytes() == world.render(scene, same).tobytes()
        pixels = np.asarray(image, np.float32)
        rows, columns = np.nonzero(np.abs(pixels - world.COLOURS[scene[0].colour]).max(-1) < 25)
        drawn = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert np.abs(np.array(drawn) - box).max() < 2.6, (scene, drawn, box)


class Pointer:
    """Stands for a model: its maps are brightest at the item whose word is asked for, or at another one."""

    def __init__(self, right: bool, of: list) -> None:
        self.right, self.of = right, {picture.image.tobytes(): picture for picture in of}
        self.model = type("Stage", (), {"name": "stage2"})

    def attention(self, image: Image.Image, text: str, question: str | None = None) -> AttentionMaps:
        picture, side = self.of[image.tobytes()], world.IMAGE_SIDE
        words, word_maps = text.split(), torch.zeros(len(text.split()), 2, side, side)
        for kind in ("colour", "shape"):
            for i, item in enumerate(picture.scene):
                if getattr(item, kind) in words:
                    left, top, right, bottom = picture.boxes[i if self.right else i - 1]
                    word_maps[words.index(getattr(item, kind)), :, int(top + bottom) // 2, int(left + right) // 2] = 1
        return AttentionMaps(torch.ones(2, 1, 3, side, side), torch.zeros(2, 1, 3), [0, 2], words, word_maps)


def test_the_pointing_game_counts_hits_misses_and_chance(monkeypatch, capsys, tmp_path: Path) -> None:
    pointing = importlib.import_module("pointing")  # of examples/shapes
    pictures = list(pointing.draw_pictures(60, "validation"))
    assert all(world.held_out(picture.scene) for picture in pictures)
    played = {right: pointing.play(Pointer(right, pictures), pictures) for right in (True, False)}
    maps = ("all layers", "layer 0", "layer 2", "attention alone")
    assert set(played[True]) == {
        (text, kind, m) for text in ("caption", "answer") for kind in pointing.KINDS for m in maps
    }
    for right, games in played.items():
        for (text, _, which), points in games.items():
            assert len(points) == 60 if text == "caption" else 20 < len(points) <= 60
            if which != "attention alone":
                assert all(point.hit is right and point.other is not right for point in points)
            assert all(0.01 < point.area < 0.15 for point in points)
    monkeypatch.setattr(qformer, "load", lambda adapter: Pointer(adapter == "right", pictures))
    pointing.main(["right", "wrong", "--pictures", "60", "--out", str(tmp_path / "rows.json")])
    rows = [row for row in json.loads((tmp_path / "rows.json").read_text()) if row["map"] == "all layers"]
    assert {(row["adapter"], row["hit"], row["another"]) for row in rows} == {("right", 100, 0), ("wrong", 0, 100)}
    assert all(3 < row["chance"] < 8 for row in rows)
    assert "all layers         100.0 +- 0.0" in capsys.readouterr().out


# ---- pictures, and the command ----


def test_an_overlay_is_bright_where_the_map_is_and_keeps_the_shape_of_the_image() -> None:
    heat = torch.zeros(3, 4)
    heat[0, 3] = 1
    for image in (Image.new("RGB", (400, 100), "#777777"), Image.new("L", (4, 3), 128), None):
        lit = np.asarray(overlay(image, heat, side=120).convert("L"), np.float32)
        assert lit.shape == ((30, 120) if image is not None and image.width == 400 else (90, 120))
        rows, columns = np.array_split(lit, 3, 0), np.array_split(lit, 4, 1)
        assert max(range(3), key=lambda i: rows[i].mean()) == 0
        assert max(range(4), key=lambda i: columns[i].mean()) == 3
    assert overlay(None, torch.rand(1, 100), side=120).size == (120, 30)  # a band, not a line
    assert overlay(None, torch.zeros(2, 2)).getextrema()  # nothing anywhere is no division by zero


@pytest.fixture
def look(models, monkeypatch) -> Any:
    """The command, with the models that are loaded already by their names."""
    import qformer.inference

    loaded = qformer.inference.load
    monkeypatch.setattr(qformer.inference, "load", lambda name, device: models.get(name) or loaded(name, device))
    return stage_main("look")


def test_the_command_draws_every_word_and_every_query(look, pictures, tmp_path: Path, capsys) -> None:
    out, maps = tmp_path / "map.png", tmp_path / "maps.npz"
    look(["stage1", pictures[0], CAPTION, "--out", str(out), "--maps", str(maps)])
    assert re.fullmatch(r"\S+map\.png: 6 words, 4 queries, overlap 0\.\d\d\n", capsys.readouterr().out)
    kept, expected = np.load(maps), np.asarray(Image.open(out))
    assert set(kept) == {"maps", "beside", "layers", "words", "word_maps"}
    assert kept["maps"].shape == (2, HEADS, QUERIES, *GRID)
    assert list(kept["words"]) == CAPTION.split()
    for more in (["--layer", "2"], ["--heads", "max"], ["--also", pictures[1]]):
        look(["stage1", pictures[0], CAPTION, "--out", str(out), *more])
        drawn = np.asarray(Image.open(out))
        assert drawn.shape[0] > expected.shape[0] if more[0] == "--also" else not np.array_equal(drawn, expected)
    for arguments in (["opt", pictures[0]], ["t5", pictures[0], "--question", QUESTION], ["stage1", pictures[0]]):
        look([*arguments, "--out", str(tmp_path / f"{arguments[0]}.jpg")])
        assert Image.open(tmp_path / f"{arguments[0]}.jpg").width >= 640


def test_the_command_draws_a_clip_frame_by_frame_and_features_without_an_image(look, tiny, tmp_path, capsys) -> None:
    frames = [Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), colour) for colour in ("red", "blue")]
    write_clip(tmp_path / "clip.mp4", frames)
    look(["opt", str(tmp_path / "clip.mp4"), "a red square", "--out", str(tmp_path / "clip.png")])
    on_features(tiny, tmp_path / "run", "encoder.grid=[1,3]")
    file = str(tiny.features.parent / "00.npy")
    look([str(tmp_path / "run"), file, CAPTION, "--device", "cpu", "--out", str(tmp_path / "features.png")])
    assert (tmp_path / "clip.png").is_file()
    assert (tmp_path / "features.png").is_file()


def test_mistakes_at_the_command_are_one_line(look, pictures, tmp_path, capsys) -> None:
    out = ["--out", str(tmp_path / "map.png")]
    for arguments, message in [
        (["stage1", "absent.png", *out], "no image absent.png"),
        (
            ["stage1", pictures[0], "--out", str(tmp_path / "map.gif")],
            "--out .*map.gif: expected a file that ends with",
        ),
        (["stage1", pictures[0], "--out", str(tmp_path / "no/map.png")], "in a folder that is there"),
        (["stage1", pictures[0], *out, "--maps", "maps.json"], r"--maps maps.json: expected .*\.npz"),
        (["stage1", pictures[0], *out, "--layer", "1"], r"layer=1: expected one of \[0, 2\]"),
        (["stage1", pictures[0], "red", *out, "--question", "what?"], "question needs a stage-2 adapter"),
        (["opt", str(tmp_path), *out], "no image"),
        (["opt", __file__, *out], "test_attention.py"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            look(arguments)
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(message, line), line
    assert not list(tmp_path.glob("*"))
