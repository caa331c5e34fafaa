"""LAVIS's side: its own Blip2Qformer, Blip2OPT and Blip2T5 as they are, with features in the place of the encoder.

Runs in `.venv-lavis` (see `lavis_environment.py`). What its constructors would fetch from a hub is given to them here.
"""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from sides.data import Reranking, autocast, captions, features, pixels, prefixes
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

TEXT_LENGTH_OF_RETRIEVAL = 35  # compute_sim_matrix pads to it


def build(folder: Path, task: dict[str, Any]) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=0, world_size=1)  # it gathers always
    return {"stage1": Stage1, "stage1_cached": Stage1Encoded, "stage2": Stage2, "rerank": Rerank}[task["work"]](
        folder, task
    )


def load_models() -> None:
    """Let `lavis.models.blip2_models` be imported alone: the packages' own __init__ files import all of LAVIS."""
    unused = {"iopath.common.download": ["download"], "iopath.common.file_io": ["file_lock", "g_pathmgr"],
              "fairscale.nn.checkpoint.checkpoint_activations": ["checkpoint_wrapper"]}  # fmt: skip
    for name, contents in unused.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        sys.modules[name].__dict__.update(dict.fromkeys(contents))
    spec = importlib.util.find_spec("lavis")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    for name, path in (("lavis", root), ("lavis.models", root / "models")):
        module: Any = types.ModuleType(name)
        module.__path__ = [str(path)]
        sys.modules[name] = module
    from lavis.models.base_model import BaseModel

    sys.modules["lavis.models"].BaseModel = BaseModel  # type: ignore[attr-defined]


def tokenizer(folder: Path) -> Any:
    special = {"bert": {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"},
               "llm": {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}}  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special[folder.name])


def model_of(kind: Any, folder: Path, task: dict[str, Any], **options: Any) -> Any:
    """A model of LAVIS's class `kind` with the shared weights."""
    from lavis.models.blip2_models.blip2 import LayerNorm
    from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel

    sizes = task["qformer"]

    class Sized(kind):
        @classmethod
        def init_tokenizer(cls) -> Any:
            if not (folder / "bert").is_dir():
                return None  # stage 2 does not use it
            found = tokenizer(folder / "bert")
            found.add_special_tokens({"bos_token": "[DEC]"})
            return found

        @classmethod
        def init_vision_encoder(cls, *args: Any) -> tuple[nn.Module, nn.Module]:
            encoder: Any = nn.Identity()
            encoder.num_features = task["encoder_width"]
            return encoder, LayerNorm(task["encoder_width"])

        @classmethod
        def init_Qformer(cls, num_query_token: int, vision_width: int, cross_attention_freq: int = 2) -> Any:
            config = BertConfig(
                vocab_size=task["vocab"], hidden_size=sizes["width"], num_hidden_layers=sizes["layers"],
                num_attention_heads=sizes["heads"], intermediate_size=sizes["ffn_width"],
                max_position_embeddings=sizes["max_text_positions"], hidden_dropout_prob=sizes["dropout"],
                attention_probs_dropout_prob=sizes["dropout"],
            )  # fmt: skip
            config.encoder_width, config.add_cross_attention = vision_width, True
            config.cross_attention_freq, config.query_length = cross_attention_freq, num_query_token
            return BertLMHeadModel(config=config), nn.Parameter(torch.zeros(1, num_query_token, sizes["width"]))

        def maybe_autocast(self, dtype: torch.dtype = torch.float16) -> Any:
            return autocast(task)

    model = Sized(num_query_token=sizes["queries"], max_txt_len=task["max_text_tokens"], **options)
    missing, unexpected = model.load_state_dict(load_file(folder / "lavis.safetensors"), strict=False)
    assert not unexpected, unexpected
    may_lack = ("opt_model.", "t5_model.", "Qformer.bert.embeddings.position_ids", "Qformer.cls.predictions.decoder.")
    assert all(name.startswith(may_lack) for name in missing), missing
    return model.to(task["device"])


class Training:
    """A step: forward, backward, optimizer (AdamW with PyTorch's defaults, as its runner's)."""

    def __init__(self, task: dict[str, Any], model: Any) -> None:
        self.task, self.model = task, model.train()
        self.features, self.texts = features(task, task["batch"]), captions(task["batch"], task["words"])
        trained = [p for p in self.model.parameters() if p.requires_grad]
        matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98))

    def step(self, round: int) -> None:
        with autocast(self.task):
            loss = self.model(self.samples(len(self.texts)))["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def samples(self, n: int) -> dict[str, Any]:
        return {"image": self.features[:n], "text_input": self.texts[:n]}


class Stage1(Training):
    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        load_models()
        from lavis.models.blip2_models.blip2_qformer import Blip2Qformer

        super().__init__(task, model_of(Blip2Qformer, folder, task, embed_dim=task["qformer"]["contrastive_width"]))

    def check(self) -> dict[str, Any]:
        self.model.eval()
        with torch.no_grad(), autocast(self.task):
            found = self.model(self.samples(2))
        self.model.train()
        return {"itc": float(found.loss_itc), "itm": float(found.loss_itm), "itg": float(found.loss_lm)}


class Stage1Encoded(Stage1):
    """A step that encodes its pictures with LAVIS's own CLIP ViT-L (random weights), as every epoch does."""

    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        super().__init__(folder, task)
        from lavis.models.clip_vit import VisionTransformer

        sizes = task["vision"]
        self.encoder = VisionTransformer(
            sizes["image_size"], sizes["patch_size"], task["encoder_width"], sizes["num_hidden_layers"],
            sizes["num_attention_heads"], False,
        ).eval()  # fmt: skip
        self.pixels = pixels(task["batch"], sizes["image_size"])

    def step(self, round: int) -> None:
        with torch.no_grad():
            self.features = self.encoder(self.pixels)
        super().step(round)


class Stage2(Training):
    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        load_models()
        from lavis.models.blip2_models import blip2_opt, blip2_t5

        place, kind = str(folder / "llm"), task["llm"]["kind"]
        given = types.SimpleNamespace(from_pretrained=lambda *args, **options: tokenizer(folder / "llm"))
        blip2_opt.AutoTokenizer = blip2_t5.T5TokenizerFast = given
        self.both_ways = kind == "t5"
        model = model_of(
            blip2_t5.Blip2T5 if self.both_ways else blip2_opt.Blip2OPT, folder, task, **{f"{kind}_model": place}
        )
        # Its constructors round the weights to half precision: load them anew in the dtype that all sides have.
        llm: Any = blip2_t5.T5ForConditionalGeneration if self.both_ways else blip2_opt.OPTForCausalLM
        frozen = llm.from_pretrained(place, torch_dtype=getattr(torch, task["dtype"])).requires_grad_(False)
        setattr(model, f"{kind}_model", frozen.to(task["device"]))
        super().__init__(task, model)

    def samples(self, n: int) -> dict[str, Any]:
        if not self.both_ways:
            return super().samples(n)
        pairs = prefixes(self.texts[:n])
        texts = {"text_input": [prefix for prefix, _ in pairs], "text_output": [target for _, target in pairs]}
        return {"image": self.features[:n], **texts}

    def check(self) -> dict[str, Any]:
        self.model.eval()
        with autocast(self.task):
            loss = self.model(self.samples(len(self.texts)))["loss"]
        loss.backward()
        found = {"loss": float(loss), "gradient": float(self.model.query_tokens.grad.norm())}
        self.optimizer.zero_grad()
        self.model.train()
        return found


class Rerank(Reranking):
    """The loop over pictures of compute_sim_matrix, with all captions as candidates."""

    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        load_models()
        from lavis.models.blip2_models.blip2_qformer import Blip2Qformer

        self.task, self.texts = task, captions(task["captions"], task["words"])
        self.model = model_of(Blip2Qformer, folder, task, embed_dim=task["qformer"]["contrastive_width"]).eval()

    @torch.no_grad()
    def score(self, first: int, n: int, texts: list[str]) -> Tensor:
        text = self.model.tokenizer(
            texts, padding="max_length", truncation=True, max_length=TEXT_LENGTH_OF_RETRIEVAL, return_tensors="pt"
        ).to(self.task["device"])
        with autocast(self.task):
            normed = self.model.ln_vision(features(self.task, n, first))
            rows = [
                self.model.compute_itm(row.repeat(len(texts), 1, 1), text.input_ids, text.attention_mask)
                for row in normed
            ]
        return torch.stack(rows)
