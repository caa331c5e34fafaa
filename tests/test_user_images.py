"""Images as users have them: a file and what PIL opened of it give the same pixels, and none is lost that is sound."""

from __future__ import annotations

import io
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from qformer.config import ConfigError, Stage1Config, load_config
from qformer.data import BrokenRecord, ImageTransform, Record, RecordDataset, load_features, load_image
from qformer.data.captions import clean_caption, clean_question

SHARED = Path(__file__).resolve().parents[2] / "shared/cases/img"
TRANSFORM = ImageTransform(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NEEDED = [
    "run.dir=runs/x", "data.train=[a.jsonl]", "encoder.loader=open_clip", "encoder.id=ViT-B-32",
    "train.max_steps=100", "train.global_batch_size=8", "train.micro_batch_size=8", "optim.warmup_steps=0",
]  # fmt: skip


def colours(width: int = 6, height: int = 4) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def record(content: bytes) -> Record:
    return Record("x", "x", image_bytes=content)


def saved(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels_of(image: Record | Image.Image) -> np.ndarray:
    return np.asarray(load_image(image))


def turned(tags: dict[int, object]) -> bytes:
    exif = Image.Exif()
    for tag, value in tags.items():
        exif[tag] = value
    return saved(colours(), exif=exif)


def transparent() -> list[bytes]:
    palette = colours().quantize(16)
    glass = colours().convert("RGBA")
    glass.putalpha(Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10))
    return [
        saved(palette, transparency=bytes(range(0, 160, 10))),
        saved(palette, transparency=3),
        saved(colours(), transparency=colours().getpixel((0, 0))),
        saved(colours().convert("L"), transparency=colours().convert("L").getpixel((0, 0))),
        saved(glass),
        saved(glass.convert("LA")),
        saved(glass, "WEBP", lossless=True),
        saved(Image.new("1", (6, 4), 1), transparency=1),
    ]


@pytest.mark.parametrize("content", [*(turned({0x0112: n}) for n in range(1, 9)), *transparent()])
def test_an_image_of_pil_gives_the_pixels_of_its_file(content):
    expected = load_image(record(content))
    loaded = Image.open(io.BytesIO(content))
    loaded.load()
    for image in (Image.open(io.BytesIO(content)), loaded, loaded.copy()):
        assert np.array_equal(pixels_of(image), np.asarray(expected))
        assert torch.equal(TRANSFORM.apply(image), TRANSFORM.apply(expected))
    assert np.array_equal(pixels_of(expected), np.asarray(expected)), "not turned once more"


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_every_mode_of_pil_is_read(mode):
    steps = {"La": ["LA"], "PA": ["P"], "RGBa": ["RGBA"]}.get(mode, [])
    image = Image.new("RGB", (4, 4), (255, 0, 0))
    for step in [*steps, mode]:
        image = image.convert(step)
    gray = mode in ("1", "L", "LA", "La")
    red, green, blue = pixels_of(image)[1, 2].astype(int)
    assert (red == green == blue) if gray else (red > 245 and green < 20 and blue < 20)


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("kind", ["I;16", "I"])
def test_integers_of_any_width_keep_their_contrast(bits, kind):
    levels = np.linspace(0, 2**bits - 1, 16).round().astype(np.uint16).reshape(4, 4)
    image = Image.fromarray(levels)
    pixels = pixels_of(image if kind == "I;16" else Image.fromarray(levels.astype(np.int32)))
    assert np.array_equal(pixels[..., 0], (levels * 255.0 / (2**bits - 1)).round())
    assert np.array_equal(pixels_of(record(saved(image))), pixels)
    assert np.array_equal(pixels_of(record(saved(image, "TIFF"))), pixels)


def test_black_stays_black():
    assert pixels_of(Image.new("I;16", (2, 2))).max() == 0


@pytest.mark.parametrize(
    "tags",
    [
        {0x0112: 6, 0x010F: 3.5},  # the maker as a number
        {0x0112: 6, 0x829A: "fast"},  # the exposure as text
        {0x0112: 6, 0xC4A5: b"\xff" * 9},
    ],
)
def test_odd_tags_beside_the_orientation_do_not_matter(tags, monkeypatch):
    monkeypatch.setattr(Image.Exif, "tobytes", lambda self, offset=8: (_ for _ in ()).throw(TypeError("odd tag")))
    image = colours()
    exif = {0x0112: 6, **{k: v for k, v in tags.items() if k != 0x0112}}
    monkeypatch.setattr(Image.Image, "getexif", lambda self: exif)
    assert np.array_equal(pixels_of(image), image.transpose(Image.Transpose.ROTATE_270))


@pytest.mark.parametrize("orientation", [0, 9, "six", None, b"", (), 1.5])
def test_an_orientation_that_is_none_leaves_the_image_as_it_is(orientation, monkeypatch):
    monkeypatch.setattr(Image.Image, "getexif", lambda self: {0x0112: orientation})
    assert np.array_equal(pixels_of(colours()), colours())


def test_tags_that_cannot_be_read_at_all_leave_the_image_as_it_is():
    for tags in (b"", b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"\xff" * 50):
        assert pixels_of(record(saved(colours(), "JPEG", exif=tags))).shape == (4, 6, 3)


def png_with(kind: bytes, data: bytes) -> bytes:
    content = saved(colours())
    chunk = len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    return content[:33] + chunk + content[33:]  # after the header


@pytest.mark.parametrize(
    ("kind", "head"),
    [(b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")],
)
def test_a_long_text_in_a_png_costs_nothing_but_itself(kind, head):
    content = png_with(kind, head + zlib.compress(b"x" * 3_000_000))
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(content)).load()
    assert np.array_equal(pixels_of(record(content)), colours())
    many = PngImagePlugin.PngInfo()
    for n in range(70):
        many.add_text(f"t{n}", "x" * 1_000_000)
    assert np.array_equal(pixels_of(record(saved(colours(), pnginfo=many))), colours())


def test_an_image_cut_short_is_broken_as_a_file_and_in_pil():
    whole = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)))
    for image in (record(whole[:-900]), Image.open(io.BytesIO(whole[:-900])), record(b"")):
        with pytest.raises(BrokenRecord):
            load_image(image)


def test_max_pixels_lifts_and_lowers_the_bound(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    content = saved(colours())
    for image in (record(content), colours()):
        with pytest.raises(BrokenRecord, match=r"6 x 4 = 24 pixels are more than 10; set data.max_pixels higher"):
            load_image(image)
        with pytest.raises(BrokenRecord, match="more than 23"):
            load_image(image, 23)
        assert load_image(image, 24).size == (6, 4)
    pixels = ImageTransform(8, (0.5,) * 3, (0.5,) * 3, max_pixels=24).apply(colours(), np.random.default_rng(0))
    assert pixels.shape == (3, 8, 8)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_threads_that_decode_side_by_side_keep_the_bound(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    small, large = saved(colours()), saved(Image.new("RGB", (20, 20)))

    def refused(n: int) -> bool:
        try:
            load_image(record(large if n % 2 else small))
        except BrokenRecord as broken:
            return "400 pixels are more than 100" in str(broken)
        return False

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(refused, range(4000))) == [n % 2 == 1 for n in range(4000)]
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared")
def test_the_images_that_failed_are_read():
    paths = sorted(SHARED.iterdir())
    assert len(paths) >= 8
    for path in paths:
        image = load_image(Record(str(path), path.name), 120_000_000)
        assert 30 < np.asarray(image.resize((8, 8))).mean() < 230, path.name
        if "exif" in path.name:
            assert image.height > image.width, path.name


# ---- features of another width ----


def test_features_of_another_width_are_a_broken_record_that_names_both(tmp_path):
    records = []
    for n, width in enumerate([64] * 5 + [32]):
        np.save(tmp_path / f"{n}.npy", np.ones((3, width), np.float32))
        records.append(Record(str(tmp_path / f"{n}.npy"), str(n), ("a dog",)))
    with pytest.raises(BrokenRecord, match=r"have width 32; expected encoder.width=64"):
        load_features(records[5].image, 64)
    dataset = RecordDataset(records, None, seed=0, augment=False, text="caption", in_order=True, width=64)
    assert [dataset[i].image is None for i in range(6)] == [False] * 5 + [True]
    assert "width 32" in dataset[5].dropped[0]


# ---- captions and keys ----


@pytest.mark.parametrize(
    ("text", "caption", "question"),
    [
        ("A 3.5 cm ruler.", "a 3.5 cm ruler", "a 3.5 cm ruler"),
        ("at 10:30. Go: 5.", "at 10:30 go 5", "at 10:30 go 5"),
        (".5 l, $.50 or 1.2.3", ".5 l, $.50 or 1.2.3", ".5 l, $.50 or 1.2.3"),
        ("The end.5 dogs...5 cats", "the end 5 dogs 5 cats", "the end5 dogs5 cats"),
        ("U.S.A. (2): yes!", "u s a 2 yes", "usa 2 yes"),
    ],
)
def test_cleaning_keeps_numbers(text, caption, question):
    assert (clean_caption(text), clean_question(text)) == (caption, question)


def test_cleaning_and_words_are_keys(tmp_path):
    colours().save(tmp_path / "a.png")
    records = [Record(str(tmp_path / "a.png"), "a", ("Two  Dogs, 1.5 m apart. Really!",))]

    def text(**options) -> str:
        return RecordDataset(records, TRANSFORM, seed=0, augment=False, text="caption", in_order=True, **options)[
            0
        ].text

    assert text() == "two dogs, 1.5 m apart really"
    assert text(cleaning="none") == "Two  Dogs, 1.5 m apart. Really!"
    assert (text(max_words=2), text(cleaning="none", max_words=2)) == ("two dogs,", "Two  Dogs,")
    data = load_config(Stage1Config, [*NEEDED, "data.cleaning=none", "data.max_words=7", "data.flip=false"]).data
    assert (data.cleaning, data.max_words, data.flip, data.max_pixels) == ("none", 7, False, None)
    for wrong in ("data.cleaning=clip", "data.max_words=0", "data.max_pixels=0"):
        with pytest.raises(ConfigError, match=wrong.split("=")[0]):
            load_config(Stage1Config, [*NEEDED, wrong])


def test_one_source_is_a_list_of_one_and_nothing_an_empty_list(tmp_path):
    (tmp_path / "x.yaml").write_text(json.dumps({"data": {"train": "b.jsonl", "validation": None}}))
    for arguments, train, validation in [
        (["data.train=x.jsonl", "data.validation=[y.jsonl]"], ["x.jsonl"], ["y.jsonl"]),
        (["data.validation=[y.jsonl]", "data.validation="], ["a.jsonl"], []),
        (["data.validation=[y.jsonl]", "data.weights="], ["a.jsonl"], ["y.jsonl"]),
        (["data.validation=[y.jsonl]", str(tmp_path / "x.yaml")], ["b.jsonl"], []),
    ]:
        data = load_config(Stage1Config, [*NEEDED, *arguments]).data
        assert (data.train, data.validation) == (train, validation)
    assert load_config(Stage1Config, [*NEEDED, "run.trackers=wandb"]).run.trackers == ["wandb"]
    with pytest.raises(ConfigError, match=r"data.train: \[\] names no record file"):
        load_config(Stage1Config, [*NEEDED, "data.train="])
