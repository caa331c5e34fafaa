"""What the queries look at: probabilities and their gradients, grids of every kind of encoder, words, pictures of both."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_encoders import PICTURES, native
from test_qformer import IMAGE_MASK, TEXT_MASK, B, build, draw
from tiny import FEATURE_WIDTH, Tiny, run_stage
from torch import Tensor

import qformer
from qformer.config import EncoderConfig
from qformer.encoders import FrozenEncoder, load_encoder
from qformer.inference import VisionLanguageModel
from qformer.language.words import word_losses
from qformer.layers import WatchedKV
from qformer.qformer import ImageMemory
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
        without = torch.eye(ids.shape[1], dtype=torch.bool)[1:-1]  # a token is a word between [CLS] and [SEP]
        rows = torch.cat([mask, mask & ~without])
        logits = adapter.match([memory._replace(times=len(rows))], ids.expand(len(rows), -1), rows)
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


def test_mistakes_name_what_to_give(models, pictures) -> None:
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
