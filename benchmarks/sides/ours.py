"""This project's side of every benchmark."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sides.data import Reranking, autocast, captions, features, pixels, prefixes, questions
from torch import Tensor

from qformer.build import build_stage1, build_stage2
from qformer.checkpoint import load_strictly
from qformer.config import EncoderConfig, Stage1Config, Stage2Config, load_config
from qformer.data import Batch, read_records
from qformer.data.cache import FeatureCache
from qformer.data.caching import CacheWriter
from qformer.data.transforms import ImageTransform
from qformer.encoders import load_encoder
from qformer.inference import load
from qformer.models import Output, Prepared, Stage1, Stage2
from qformer.optim import build_optimizer


def build(folder: Path, task: dict[str, Any]) -> Any:
    works = {"stage1": Stage1, "stage1_cached": Stage1Cached, "stage2": Stage2, "rerank": Rerank, "vqa": Vqa, "captioning": Captioning,
             "folder": Folder}  # fmt: skip
    return works[task["work"]](folder, task)


def stage1_model(folder: Path, task: dict[str, Any], weights: bool = True) -> Stage1:
    model = build_stage1(load_config(Stage1Config, _arguments(task, f"qformer.tokenizer={folder / 'bert'}")))
    if weights:
        load_strictly(model.adapter, load_file(folder / "ours.safetensors"), "prepared")
    return model.to(task["device"])


def stage2_model(folder: Path, task: dict[str, Any], weights: bool = True) -> Stage2:
    llm = [f"llm.id={folder / 'llm'}", f"llm.dtype={task['dtype']}"]
    model = build_stage2(load_config(Stage2Config, _arguments(task, *llm)))
    if weights:
        load_strictly(model.adapter, load_file(folder / "ours.safetensors"), "prepared")
    precision = "bf16" if task["dtype"] == "bfloat16" else "no"
    model.llm.use_training_kernels(torch.device(task["device"]), precision)  # as stages/stage2.py does
    return model.to(task["device"])


def _arguments(task: dict[str, Any], *more: str) -> list[str]:
    return [
        "run.dir=none", "data.train=[none]", "train.max_steps=1", "train.global_batch_size=1", "train.micro_batch_size=1",
        "optim.warmup_steps=0", "encoder.loader=features", f"encoder.width={task['encoder_width']}",
        f"qformer.max_text_tokens={task['max_text_tokens']}",
        *(f"qformer.{key}={value}" for key, value in task["qformer"].items()), *more,
    ]  # fmt: skip


class Training:
    """A step: forward, backward, optimizer."""

    def __init__(self, task: dict[str, Any], model: Any) -> None:
        self.task, self.model = task, model
        self.features, self.texts = features(task, task["batch"]), captions(task["batch"], task["words"])
        self.optimizer = build_optimizer(model.adapter, lr=1e-4, betas=(0.9, 0.98), weight_decay=0.05, eps=1e-8)
        self.model.train()

    def step(self, round: int) -> None:
        self.forward(len(self.texts), round).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def batch(self, n: int) -> Batch:
        empty: list[Any] = [None] * n
        return Batch(
            self.features[:n], None, self.texts[:n], [str(i) for i in range(n)], empty, empty, empty, empty, empty, []
        )

    def forward(self, n: int, round: int) -> Output:
        prepared = self.prepare(n, round)
        with autocast(self.task):
            return self.model(prepared, torch.tensor(float(prepared.target_tokens)))

    def prepare(self, n: int, round: int) -> Prepared:
        return self.model.prepare(self.batch(n), round)


class Stage1(Training):
    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        super().__init__(task, stage1_model(folder, task))

    def check(self) -> dict[str, Any]:
        """Two pictures: there is one negative of each, whoever draws."""
        self.model.eval()
        with torch.no_grad():
            found = self.forward(2, 0).metrics
        self.model.train()
        return {name: float(found[name]) for name in ("itc", "itm", "itg")}


class Stage1Cached(Stage1):
    """A step of ten epochs that write the feature cache in the first: a tenth of the batch is encoded, all of it read."""

    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        super().__init__(folder, task)
        self.folder, paths = folder, sorted((folder / "pictures").iterdir())
        self.encoder = load_encoder(EncoderConfig("open_clip", task["encoder"], random_weights=True))
        for name, some in (("all", paths), ("tenth", paths[: len(paths) // 10])):
            rows = [{"image": str(path), "image_id": path.stem, "caption": "a"} for path in some]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.cache = FeatureCache(self.write("all"))
        self.ids = [path.stem for path in paths]

    def write(self, records: str) -> Path:
        given = self.encoder.input_transform
        transform = ImageTransform(given.size, given.mean, given.std, given.interpolation)
        written = Path(tempfile.mkdtemp(dir=self.folder)) / "cache"
        sources = [str(self.folder / f"{records}.jsonl")]
        writer = CacheWriter(written, read_records(sources), sources, encoder={}, transform=transform, width=self.encoder.width,
                             num_tokens=self.encoder.num_tokens)  # fmt: skip
        writer.begin()
        for _ in writer.write(self.encoder, "cpu", batch_size=self.task["batch"], workers=0):
            pass
        writer.finish()
        return written

    def step(self, round: int) -> None:
        shutil.rmtree(self.write("tenth").parent)
        self.features = torch.stack([self.cache.read(image_id) for image_id in self.ids]).float()
        super().step(round)


class Stage2(Training):
    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        super().__init__(task, stage2_model(folder, task))

    def prepare(self, n: int, round: int) -> Prepared:
        texts = self.texts[:n]
        pairs = prefixes(texts) if self.model.llm.is_encoder_decoder else [("", text) for text in texts]
        prompts, targets = [prompt for prompt, _ in pairs], [target for _, target in pairs]
        counted = self.model.llm.count_target_tokens(prompts, targets, max_target_tokens=32)
        return Prepared(self.batch(n), (prompts, targets), counted, round)

    def check(self) -> dict[str, Any]:
        self.model.eval()
        loss = self.forward(len(self.texts), 0).loss
        loss.backward()
        found = {"loss": float(loss), "gradient": float(self.model.adapter.qformer.query_tokens.grad.norm())}
        self.optimizer.zero_grad()
        self.model.train()
        return found


class Rerank(Reranking):
    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        self.task, self.model = task, stage1_model(folder, task).eval()
        self.texts = captions(task["captions"], task["words"])

    @torch.no_grad()
    def score(self, first: int, n: int, texts: list[str]) -> Tensor:
        adapter, text = self.model.adapter, self.model.tokenize(texts)
        with autocast(self.task):
            images = adapter.project_images(features(self.task, n, first), None)
            rows = []
            for i in range(n):
                one = images.select(torch.tensor([i]))._replace(times=len(texts))
                rows.append(adapter.match([one], *text)[:, 1])
        return torch.stack(rows)


class Loaded:
    """An adapter as a user loads it."""

    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        self.task, self.model = task, load(folder / "adapter", task["device"])
        if task["dtype"] == "bfloat16":
            self.model.model.to(torch.bfloat16)


class Vqa(Loaded):
    """Several questions about each picture, a batch of pairs a call."""

    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        super().__init__(folder, task)
        pictures = list(pixels(task["pictures"], task["vision"]["image_size"]))
        asked = questions(task["pictures"] * task["questions"])
        self.pairs = [(pictures[i // task["questions"]], question) for i, question in enumerate(asked)]

    def check(self) -> dict[str, Any]:
        return {"answers": self.answer()}

    def step(self, round: int) -> None:
        self.answer()

    def answer(self) -> list[str]:
        said: list[str] = []
        for i in range(0, len(self.pairs), self.task["batch"]):
            pictures, asked = zip(*self.pairs[i : i + self.task["batch"]], strict=True)
            said += self.model.answer(pictures, asked, num_beams=5, max_new_tokens=10, length_penalty=0.0)
        return said


class Captioning(Loaded):
    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        super().__init__(folder, task)
        self.pictures = list(pixels(task["batch"], task["vision"]["image_size"]))

    def check(self) -> dict[str, Any]:
        return {"captions": self.caption()}

    def step(self, round: int) -> None:
        self.caption()

    def caption(self) -> list[str]:
        return self.model.caption(self.pictures, "", num_beams=5, max_new_tokens=30, length_penalty=1.0)


class Folder(Loaded):
    """Contrastive embeddings of a folder of pictures, decoding included."""

    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        super().__init__(folder, task)
        self.paths = sorted((folder / "pictures").iterdir())

    def check(self) -> dict[str, Any]:
        pictures = list(pixels(2, self.task["vision"]["image_size"]))
        return {"embeddings": self.model.embed_image(pictures).flatten().tolist()}

    def step(self, round: int) -> None:
        size = self.task["batch"]
        torch.cat([self.model.embed_image(self.paths[i : i + size]) for i in range(0, len(self.paths), size)])
