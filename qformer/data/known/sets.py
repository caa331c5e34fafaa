"""The known data sets by name: which published files each is made of, and the function that gives its records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from qformer.data.known import captions, questions
from qformer.data.known.captions import Row
from qformer.data.known.formats import recognise
from qformer.data.known.reading import File, look_for, text_lines
from qformer.messages import nearest

# Image and text pairs of the web: published as addresses, downloaded by img2dataset, whose tars are read as they are.
WEB = {
    "cc3m": "Conceptual Captions 3M",
    "cc12m": "Conceptual Captions 12M",
    "sbu": "SBU captions",
    "laion": "LAION-400M, -115M or any other list of addresses and captions",
}
Files = Mapping[str, Sequence[File]]  # by format


@dataclass(frozen=True)
class KnownSet:
    """A published data set.

    Args:
        what: in a line.
        files: names of its files by format, with * and ?, as published.
        needs: formats without which there is nothing to read; of several tuples one suffices.
        site: where the files are.
        rows: from files by format to rows of the schema.
    """

    what: str
    files: Mapping[str, tuple[str, ...]]
    needs: tuple[tuple[str, ...], ...]
    site: str
    rows: Callable[[Files], Iterator[Row]]


def read_known(name: str, paths: Sequence[str | Path]) -> Iterator[Row]:
    """The rows of a known set from its published files: dicts in the schema of `qformer.data`, one at a time.

    Args:
        name: one of `KNOWN`.
        paths: its files, under any name, or folders that hold them (or their zips) as they were downloaded.

    Raises: ValueError when there is no such set, a file is missing, or one is not of this set.
    """
    if name in WEB:
        raise ValueError(f"{name}: its tars are a source of records by themselves; web_source checks and names them")
    if name not in KNOWN:
        raise ValueError(f"{name!r} is no known data set; {nearest(name, KNOWN)}; all are {', '.join(KNOWN)}")
    return _checked(name, _sort(name, paths))


def _checked(name: str, files: Files) -> Iterator[Row]:
    try:
        yield from KNOWN[name].rows(files)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        names = ", ".join(str(file) for group in files.values() for file in group)
        raise ValueError(f"{name}: {names} is not as published: {what}; download it from {KNOWN[name].site}") from error


def _sort(name: str, paths: Sequence[str | Path]) -> Files:
    """The files by their format: those of a folder by name, those that are named by content."""
    known, files = KNOWN[name], dict[str, list[File]]()
    for path in map(Path, paths):
        path = path.expanduser()
        if not path.exists():
            raise ValueError(f"{name}: there is no {path}; expected {_describe(name)}")
        if path.is_dir():
            for kind, patterns in known.files.items():
                files.setdefault(kind, []).extend(look_for(patterns, path))
        else:
            files.setdefault(_format_of(name, path), []).append(path)
    there = {kind for kind, group in files.items() if group}
    if not any(there.issuperset(needed) for needed in known.needs):
        _refuse_missing(name, paths, there)
    return files


def _format_of(name: str, path: Path) -> str:
    known = KNOWN[name]
    for kind, patterns in known.files.items():
        if any(path.match(pattern) for pattern in patterns):
            return kind
    form = recognise(path) if path.suffix == ".json" else None
    if form in known.files:
        return str(form)
    what = f"has the form of {form}" if form else "is of no known form"
    raise ValueError(f"{name}: {path} {what}; expected {_describe(name)}")


def _refuse_missing(name: str, paths: Sequence[str | Path], there: set[str]) -> NoReturn:
    known = KNOWN[name]
    needed = min(known.needs, key=lambda formats: len(set(formats) - there))
    missing = [" or ".join(known.files[kind]) for kind in needed if kind not in there]
    where = ", ".join(map(str, paths)) or "nothing"
    raise ValueError(f"{name}: {' and '.join(missing)} is missing ({where} was named); it is at {known.site}")


def _describe(name: str) -> str:
    known = KNOWN[name]
    alternatives = (" and ".join(" or ".join(known.files[kind]) for kind in formats) for formats in known.needs)
    return f"{', or '.join(alternatives)} from {known.site}"


def _each(kind: str, read: Callable[[File], Iterator[Row]]) -> Callable[[Files], Iterator[Row]]:
    """The rows of every file of a format, one file after the other."""
    return lambda files: (row for file in files.get(kind, ()) for row in read(file))


def _captions(files: Files) -> Iterator[Row]:
    if files.get("karpathy"):  # its images are those of the published files
        yield from _each("karpathy", captions.karpathy)(files)
    else:
        yield from _each("coco_captions", captions.coco_captions)(files)


def _flickr(files: Files) -> Iterator[Row]:
    yield from _each("karpathy", captions.karpathy)(files)
    splits: dict[str, str] = {}
    for file in files.get("splits", ()):
        split = next(split for split in ("train", "dev", "test") if split in file.name.lower())
        splits |= dict.fromkeys(text_lines(file), split)
    for file in files.get("tokens", ()):
        yield from captions.flickr_tokens(file, splits)


def _vqa(files: Files) -> Iterator[Row]:
    for file in files["vqa_questions"]:
        answers = _of_split(file, files.get("vqa_annotations", ()))
        if not answers and captions.split_in(file.name) in ("train", "val"):  # of test splits only the server has them
            mate = file.name.replace("OpenEnded_", "").replace("questions", "annotations")
            raise ValueError(f"{file} has no answers: {mate} is missing; name it too, or the folder that holds both")
        yield from questions.vqa(file, answers)


def _of_split(file: File, annotations: Sequence[File]) -> list[File]:
    """The annotation files of the split that a question file's name tells; all where the names tell nothing."""
    split = captions.split_in(file.name)
    return [a for a in annotations if split is None or captions.split_in(a.name) in (split, None)]


def _genome(files: Files) -> Iterator[Row]:
    images = captions.vg_images(files["vg_images"][0])
    for file in files.get("vg_regions", ()):
        yield from captions.vg_regions(file, images)
    for file in files.get("vg_questions", ()):
        yield from questions.vg_questions(file, images)


def _msrvtt(files: Files) -> Iterator[Row]:
    yield from _each("msrvtt", captions.msrvtt)(files)
    yield from _each("jsfusion", captions.msrvtt_1k)(files)


def _msvd(files: Files) -> Iterator[Row]:
    mapping = files["mapping"][0]
    for file in files.get("descriptions", ()):
        yield from captions.msvd(file, mapping)
    names = captions.msvd_names(mapping)
    for file in files.get("video_questions", ()):
        yield from questions.video_questions(file, names)


_COCO = "https://cocodataset.org/#download"
_KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
_GENOME = "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html"
_MSVD = "https://www.cs.utexas.edu/users/ml/clamp/videoDescription/"
_VIDEO_QA = "https://github.com/xudejing/video-question-answering"
_QA_FILES = ("train_qa.json", "val_qa.json", "test_qa.json")
_IMAGES = {"vg_images": ("image_data.json",)}
_MAPPING = {"mapping": ("youtube_mapping.txt",)}

KNOWN: dict[str, KnownSet] = {
    "coco": KnownSet(
        "COCO captions, Karpathy's split, or without his file the published one",
        {"karpathy": ("dataset_coco.json",), "coco_captions": ("captions_*20??.json",)},
        (("karpathy",), ("coco_captions",)), f"{_KARPATHY} or {_COCO}", _captions,
    ),
    "nocaps": KnownSet(
        "NoCaps, validation", {"coco_captions": ("nocaps_val_*captions.json",)}, (("coco_captions",),),
        "https://nocaps.org/download", _captions,
    ),
    "flickr8k": KnownSet(
        "Flickr8k, Karpathy's split or the published one",
        {"karpathy": ("dataset_flickr8k.json",), "tokens": ("Flickr8k.token.txt",), "splits": ("Flickr_8k.*Images.txt",)},
        (("karpathy",), ("tokens", "splits")), _KARPATHY, _flickr,
    ),
    "flickr30k": KnownSet(
        "Flickr30k, Karpathy's split", {"karpathy": ("dataset_flickr30k.json",), "tokens": ("results_*.token",)},
        (("karpathy",), ("tokens",)), _KARPATHY, _flickr,
    ),
    "vg": KnownSet(
        "Visual Genome, the phrases of the regions", _IMAGES | {"vg_regions": ("region_descriptions.json",)},
        (("vg_images", "vg_regions"),), _GENOME, _genome,
    ),
    "vg_vqa": KnownSet(
        "Visual Genome, questions", _IMAGES | {"vg_questions": ("question_answers.json",)},
        (("vg_images", "vg_questions"),), _GENOME, _genome,
    ),
    "vqav2": KnownSet(
        "VQA v2",
        {"vqa_questions": ("v2_OpenEnded_*_questions.json",), "vqa_annotations": ("v2_mscoco_*_annotations.json",)},
        (("vqa_questions",),), "https://visualqa.org/download.html", _vqa,
    ),
    "okvqa": KnownSet(
        "OK-VQA",
        {"vqa_questions": ("OpenEnded_*_questions.json",), "vqa_annotations": ("mscoco_*_annotations.json",)},
        (("vqa_questions",),), "https://okvqa.allenai.org/download.html", _vqa,
    ),
    "aokvqa": KnownSet(
        "A-OKVQA, direct answers", {"aokvqa": ("aokvqa_v1p0_*.json",)}, (("aokvqa",),),
        "https://github.com/allenai/aokvqa", _each("aokvqa", questions.aokvqa),
    ),
    "aokvqa_choice": KnownSet(
        "A-OKVQA, multiple choice", {"aokvqa": ("aokvqa_v1p0_*.json",)}, (("aokvqa",),),
        "https://github.com/allenai/aokvqa", _each("aokvqa", lambda file: questions.aokvqa(file, choices=True)),
    ),
    "gqa": KnownSet(
        "GQA, balanced", {"gqa": ("*_balanced_questions.json",)}, (("gqa",),),
        "https://cs.stanford.edu/people/dorarad/gqa/download.html", _each("gqa", questions.gqa),
    ),
    "vizwiz": KnownSet(
        "VizWiz", {"vizwiz": ("train.json", "val.json", "test.json")}, (("vizwiz",),),
        "https://vizwiz.org/tasks-and-datasets/vqa/", _each("vizwiz", questions.vizwiz),
    ),
    "textvqa": KnownSet(
        "TextVQA", {"textvqa": ("TextVQA_0.5.1_*.json",)}, (("textvqa",),),
        "https://textvqa.org/dataset/", _each("textvqa", questions.textvqa),
    ),
    "pope": KnownSet(
        "POPE: is there a ... in the image?", {"pope": ("*pope_*.json",)}, (("pope",),),
        "https://github.com/RUCAIBox/POPE", _each("pope", questions.pope),
    ),
    "scienceqa": KnownSet(
        "ScienceQA, the questions with an image", {"scienceqa": ("problems.json",)}, (("scienceqa",),),
        "https://github.com/lupantech/ScienceQA", _each("scienceqa", questions.scienceqa),
    ),
    "nlvr2": KnownSet(
        "NLVR2: two images, a statement", {"nlvr2": ("train.json", "dev.json", "test1.json")}, (("nlvr2",),),
        "https://github.com/lil-lab/nlvr/tree/master/nlvr2", _each("nlvr2", questions.nlvr2),
    ),
    "msrvtt": KnownSet(
        "MSR-VTT, captions of clips; for retrieval the 1000 clips of 1k-A",
        {"msrvtt": ("*_videodatainfo.json",), "jsfusion": ("MSRVTT_JSFUSION_test.csv",)}, (("msrvtt",), ("jsfusion",)),
        "http://ms-multimedia-challenge.com/2017/dataset", _msrvtt,
    ),
    "msrvtt_qa": KnownSet(
        "MSRVTT-QA", {"video_questions": _QA_FILES}, (("video_questions",),), _VIDEO_QA,
        _each("video_questions", questions.video_questions),
    ),
    "msvd": KnownSet(
        "MSVD, captions of clips", _MAPPING | {"descriptions": ("AllVideoDescriptions.txt",)},
        (("descriptions", "mapping"),), _MSVD, _msvd,
    ),
    "msvd_qa": KnownSet(
        "MSVD-QA", _MAPPING | {"video_questions": _QA_FILES}, (("video_questions", "mapping"),), _VIDEO_QA, _msvd
    ),
}  # fmt: skip
