"""transformers' side of every benchmark: its Blip2 classes, and what a user writes around them.

Where features are given they take the place of its encoder. It has no stage 1: ITC and ITM are written by hand on the
modules of Blip2ForImageTextRetrieval, which has neither a causal mode nor a language head for ITG, so it does less.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from sides.data import QUESTION, Reranking, autocast, captions, draw_negatives, features, pixels, prefixes, questions
from sides.prepare import blip2_config, llm_config
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    BlipImageProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

NO_GRADIENT = -100


def build(folder: Path, task: dict[str, Any]) -> Any:
    works = {"stage1": Stage1, "stage2": Stage2, "rerank": Rerank, "vqa": Vqa, "captioning": Captioning,
             "folder": Folder}  # fmt: skip
    return works[task["work"]](folder, task)


class Given(nn.Module):
    """Features in the place of pictures; the trainable norm stays."""

    def __init__(self, post_layernorm: nn.Module) -> None:
        super().__init__()
        self.post_layernorm = post_layernorm

    def forward(self, pixel_values: Tensor, **options: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.post_layernorm(pixel_values))


def on_features(kind: Any, folder: Path, task: dict[str, Any], text_config: Any = None) -> Any:
    """A model of random frozen parts with the shared weights in the trainable ones."""
    model = kind(blip2_config(task, text_config))
    model.vision_model = Given(model.vision_model.post_layernorm)
    missing, unexpected = model.load_state_dict(load_file(folder / "transformers.safetensors"), strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith("language_model.") for name in missing), missing
    return model


class Training:
    """A step: forward, backward, optimizer (fused, as its Trainer's)."""

    def __init__(self, task: dict[str, Any], model: Any) -> None:
        self.task, self.model = task, model.to(task["device"]).train()
        self.features, self.texts = features(task, task["batch"]), captions(task["batch"], task["words"])
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.98), weight_decay=0.05, fused=True)

    def step(self, round: int) -> None:
        self.loss(self.forward(len(self.texts))).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, output: Any) -> Tensor:
        return output.loss


class Stage1(Training):
    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        model = on_features(Blip2ForImageTextRetrieval, folder, task)
        self.temperature = torch.tensor(0.07, device=task["device"])
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
        super().__init__(task, model)

    def check(self) -> dict[str, Any]:
        self.model.eval()
        with torch.no_grad():
            found = {name: float(loss) for name, loss in self.forward(2).items()}
        self.model.train()
        return found

    def loss(self, output: dict[str, Tensor]) -> Tensor:
        return output["itc"] + output["itm"]

    def forward(self, n: int) -> dict[str, Tensor]:
        text = self.tokenizer(
            self.texts[:n], padding=True, truncation=True, max_length=self.task["max_text_tokens"], return_tensors="pt"
        ).to(self.task["device"])
        with autocast(self.task):
            model, ids, seen = self.model, text.input_ids, text.attention_mask
            normed = model.vision_model(self.features[:n]).last_hidden_state
            queries = model.query_tokens.expand(n, -1, -1)
            query_output = model.qformer(query_embeds=queries, encoder_hidden_states=normed).last_hidden_state
            words = model.embeddings(input_ids=ids)
            text_output = model.qformer(query_embeds=words, query_length=0, attention_mask=seen).last_hidden_state
            images = F.normalize(model.vision_projection(query_output).float(), dim=-1)
            texts = F.normalize(model.text_projection(text_output[:, 0]).float(), dim=-1)
            similarities = (images @ texts.T).amax(1) / self.temperature
            own = torch.arange(n, device=ids.device)
            itc = sum(F.cross_entropy(s, own, label_smoothing=0.1) for s in (similarities, similarities.T)) / 2
            with torch.no_grad():
                image, text_index = draw_negatives(similarities.T), draw_negatives(similarities)
            ids, seen = torch.cat([ids, ids, ids[text_index]]), torch.cat([seen, seen, seen[text_index]])
            logits = matching_logits(model, torch.cat([normed, normed[image], normed]), ids, seen)
            itm = F.cross_entropy(logits.float(), (torch.arange(3 * n, device=ids.device) < n).long())
        return {"itc": itc, "itm": itm}


def matching_logits(model: Any, normed: Tensor, ids: Tensor, seen: Tensor) -> Tensor:
    """What Blip2ForImageTextRetrieval.forward does after its encoder: float[B, 2]."""
    queries = model.query_tokens.expand(len(ids), -1, -1)
    n_queries = queries.shape[1]
    output = model.qformer(
        query_embeds=model.embeddings(input_ids=ids, query_embeds=queries), query_length=n_queries,
        attention_mask=torch.cat([seen.new_ones(len(ids), n_queries), seen], 1), encoder_hidden_states=normed,
        encoder_attention_mask=seen.new_ones(normed.shape[:2]),
    ).last_hidden_state  # fmt: skip
    return model.itm_head(output[:, :n_queries]).mean(1)


class Stage2(Training):
    """Its own forward, with the placeholders of its processor before the text."""

    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        config = llm_config(task["llm"])
        model = on_features(Blip2ForConditionalGeneration, folder, task, config)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model.language_model = auto.from_pretrained(folder / "llm", dtype=getattr(torch, task["dtype"]))
        model.language_model.requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
        self.both_ways = config.is_encoder_decoder
        super().__init__(task, model)

    def check(self) -> dict[str, Any]:
        self.model.eval()
        loss = self.forward(len(self.texts)).loss
        loss.backward()
        found = {"loss": float(loss), "gradient": float(self.model.query_tokens.grad.norm())}
        self.optimizer.zero_grad()
        self.model.train()
        return found

    def forward(self, n: int) -> Any:
        texts = self.texts[:n]
        if self.both_ways:
            pairs = prefixes(texts)
            read = self.encode([prefix for prefix, _ in pairs])
            written = self.encode([target for _, target in pairs])
            labels = written.input_ids.masked_fill(written.attention_mask == 0, NO_GRADIENT)
            ids, mask = self.with_images(read)
        else:
            written = self.encode([text + "\n" for text in texts])
            ids, mask = self.with_images(written)
            labels = ids.masked_fill((mask == 0) | (ids == self.model.config.image_token_id), NO_GRADIENT)
        with autocast(self.task):
            return self.model(pixel_values=self.features[:n], input_ids=ids, attention_mask=mask, labels=labels)

    def encode(self, texts: list[str]) -> Any:
        options = {"padding": True, "truncation": True, "max_length": 32, "return_tensors": "pt"}
        return self.tokenizer(texts, **options).to(self.task["device"])

    def with_images(self, text: Any) -> tuple[Tensor, Tensor]:
        return with_images(self.model, text.input_ids, text.attention_mask)


def with_images(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Placeholders for the visual prompt before ids and mask int64[B, T]."""
    places = ids.new_full((len(ids), model.config.num_query_tokens), model.config.image_token_id)
    return torch.cat([places, ids], 1), torch.cat([torch.ones_like(places), mask], 1)


class Rerank(Reranking):
    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        self.task, self.texts = task, captions(task["captions"], task["words"])
        self.model = on_features(Blip2ForImageTextRetrieval, folder, task).to(task["device"]).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "bert")

    @torch.no_grad()
    def score(self, first: int, n: int, texts: list[str]) -> Tensor:
        text = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.task["device"])
        with autocast(self.task):
            normed = self.model.vision_model(features(self.task, n, first)).last_hidden_state
            rows = [
                matching_logits(self.model, row.expand(len(texts), -1, -1), text.input_ids, text.attention_mask)[:, 1]
                for row in normed
            ]
        return torch.stack(rows)


class Loaded:
    """A whole checkpoint as a user loads it."""

    kind: Any = Blip2ForConditionalGeneration

    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        dtype = getattr(torch, task["dtype"])
        self.task, self.model = task, self.kind.from_pretrained(folder / "whole", dtype=dtype).to(task["device"]).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "whole", padding_side="left")

    def generate(self, pictures: Tensor, prompts: list[str], **options: Any) -> list[str]:
        text = self.tokenizer(prompts, padding=True, return_tensors="pt").to(self.task["device"])
        ids, mask = with_images(self.model, text.input_ids, text.attention_mask)
        new_ids = self.model.generate(
            pixel_values=pictures.to(self.model.dtype), input_ids=ids, attention_mask=mask, num_beams=5,
            eos_token_id=[2, 4], **options,
        )  # fmt: skip
        said = self.tokenizer.batch_decode(new_ids[:, ids.shape[1] :], skip_special_tokens=True)
        return [text.split("\n")[0].strip() for text in said]


class Vqa(Loaded):
    """Every pair of a picture and a question as a row of its own: it has no other way."""

    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        super().__init__(folder, task)
        self.pictures = pixels(task["pictures"], task["vision"]["image_size"]).repeat_interleave(task["questions"], 0)
        self.prompts = [QUESTION.format(q) for q in questions(task["pictures"] * task["questions"])]

    def check(self) -> dict[str, Any]:
        return {"answers": self.answer()}

    def step(self, round: int) -> None:
        self.answer()

    def answer(self) -> list[str]:
        said: list[str] = []
        for i in range(0, len(self.prompts), self.task["batch"]):
            rows = slice(i, i + self.task["batch"])
            said += self.generate(self.pictures[rows], self.prompts[rows], max_new_tokens=10, length_penalty=0.0)
        return said


class Captioning(Loaded):
    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        super().__init__(folder, task)
        self.pictures = pixels(task["batch"], task["vision"]["image_size"])

    def check(self) -> dict[str, Any]:
        return {"captions": self.caption()}

    def step(self, round: int) -> None:
        self.caption()

    def caption(self) -> list[str]:
        return self.generate(self.pictures, [""] * len(self.pictures), max_new_tokens=30, length_penalty=1.0)


class Folder(Loaded):
    kind = Blip2ForImageTextRetrieval

    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        super().__init__(folder, task)
        self.processor = BlipImageProcessor.from_pretrained(folder / "whole")
        self.paths = sorted((folder / "pictures").iterdir())

    def check(self) -> dict[str, Any]:
        pictures = pixels(2, self.task["vision"]["image_size"])
        return {"embeddings": self.embed(pictures).flatten().tolist()}

    def step(self, round: int) -> None:
        size, found = self.task["batch"], []
        for i in range(0, len(self.paths), size):
            pictures = [Image.open(path).convert("RGB") for path in self.paths[i : i + size]]
            found.append(self.embed(self.processor(pictures, return_tensors="pt").pixel_values))
        torch.cat(found)

    @torch.no_grad()
    def embed(self, pictures: Tensor) -> Tensor:
        model = self.model
        normed = model.vision_model(pictures.to(self.task["device"], model.vision_model.dtype)).last_hidden_state
        queries = model.query_tokens.expand(len(normed), -1, -1)
        output = model.qformer(query_embeds=queries, encoder_hidden_states=normed).last_hidden_state
        return F.normalize(model.vision_projection(output.to(model.vision_projection.weight.dtype)), dim=-1)
