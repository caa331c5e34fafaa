"""Write what the sides share: tokenizers, a random language model, and the same weights by every library's names."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from sides.data import WORDS
from sides.ours import stage1_model, stage2_model
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from qformer.checkpoint import save_adapter
from qformer.config import to_yaml
from qformer.interop.blip2 import import_blip2
from qformer.interop.frozen import filled_adapter
from qformer.interop.keys import BLIP2, lavis

BERT_SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}  # where BERT has them
LLM_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "\n", "<image>"]
PUNCTUATION = ["Question", "Answer", ":", "?"]
PICTURE_SIZE = (640, 480)


class Prepared:
    def step(self, round: int) -> None:
        pass


def build(folder: Path, task: dict[str, Any]) -> Prepared:
    torch.manual_seed(0)
    kind = task["work"]
    if kind in ("stage1", "stage1_cached", "rerank", "folder"):
        write_bert_tokenizer(folder / "bert", task["vocab"])
    if kind == "stage1_cached":
        write_pictures(folder / "pictures", task["batch"])
    if kind in ("stage1", "stage1_cached", "rerank"):
        model = stage1_model(folder, task, weights=False)
        share(folder, model.adapter, "opt_proj")
    elif kind == "stage2":
        write_llm(folder / "llm", task["llm"])
        model = stage2_model(folder, task, weights=False)
        share(folder, model.adapter, f"{task['llm']['kind']}_proj")
    elif kind in ("vqa", "captioning"):
        write_llm_tokenizer(folder / "llm", task["llm"])
        write_whole(folder, Blip2ForConditionalGeneration, task, llm_config(task["llm"]), folder / "llm")
    elif kind == "folder":
        write_whole(folder, Blip2ForImageTextRetrieval, task, None, folder / "bert")
        write_pictures(folder / "pictures", task["pictures"])
    return Prepared()


def share(folder: Path, adapter: nn.Module, projection: str) -> None:
    """The adapter's tensors, shaken so that no norm or bias is a no-op, by all three libraries' names."""
    shake(adapter)
    own = {name: tensor.detach().contiguous() for name, tensor in adapter.state_dict().items()}
    save_file(own, folder / "ours.safetensors")
    save_file(lavis(projection).give(own)[0], folder / "lavis.safetensors")
    save_file(BLIP2.give(own)[0], folder / "transformers.safetensors")


def shake(module: nn.Module, by: float = 0.02) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name != "temperature":
                parameter.add_(by * torch.randn_like(parameter))


def write_bert_tokenizer(folder: Path, size: int) -> None:
    """A BERT tokenizer of `size` tokens that knows our words."""
    taken = set(BERT_SPECIAL.values())
    free = (i for i in range(size) if i not in taken)
    words = [*WORDS, *(f"[unused{i}]" for i in range(size - len(WORDS) - len(BERT_SPECIAL)))]
    vocabulary = BERT_SPECIAL | dict(zip(words, free, strict=True))
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, BERT_SPECIAL[t]) for t in ("[CLS]", "[SEP]")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip


def write_llm_tokenizer(folder: Path, llm: dict[str, Any]) -> None:
    """OPT puts </s> before a text, T5 after it."""
    vocabulary = {token: i for i, token in enumerate([*LLM_SPECIAL, *PUNCTUATION, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|<image>|\w+|[^\w\s]"), "removed", invert=True)
    template = "</s> $A" if llm["kind"] == "opt" else "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 2)])
    begins = {"bos_token": "</s>"} if llm["kind"] == "opt" else {}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", **begins
    ).save_pretrained(folder)


def llm_config(llm: dict[str, Any]) -> Any:
    """No dropout: the language model is frozen, and a peer that forgets to put it into eval mode is not to pay for it."""
    sizes = {key: value for key, value in llm.items() if key != "kind"}
    if llm["kind"] == "opt":
        ids = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
        return OPTConfig(**sizes, **ids, dropout=0.0, init_std=0.05)
    ids = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    # LAVIS runs every T5 with the exact gelu.
    return T5Config(**{"feed_forward_proj": "relu"} | sizes | ids, dropout_rate=0.0, dense_act_fn="gelu")


def write_llm(folder: Path, llm: dict[str, Any]) -> None:
    """A random language model and its tokenizer."""
    write_llm_tokenizer(folder, llm)
    (OPTForCausalLM if llm["kind"] == "opt" else T5ForConditionalGeneration)(llm_config(llm)).save_pretrained(folder)


def write_whole(folder: Path, kind: Any, task: dict[str, Any], text_config: Any, tokenizer: Path) -> None:
    """A whole BLIP-2 of transformers, and our adapter out of it, for which it is the place of the frozen parts."""
    model = kind(blip2_config(task, text_config)).eval()
    shake(model)
    model.save_pretrained(folder / "whole")
    side = task["vision"]["image_size"]
    BlipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder / "whole")
    PreTrainedTokenizerFast.from_pretrained(tokenizer).save_pretrained(folder / "whole")
    imported = import_blip2(str(folder / "whole"))
    (folder / "adapter").mkdir()
    save_adapter(folder / "adapter", filled_adapter(imported), to_yaml(imported.config), "a benchmark's")


def blip2_config(task: dict[str, Any], text_config: Any = None) -> Blip2Config:
    """transformers' config of the same sizes."""
    sizes = task["qformer"]
    vision = task.get("vision") or {
        "hidden_size": task["encoder_width"], "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
        "image_size": 28,
    }  # fmt: skip
    qformer = {
        "hidden_size": sizes["width"], "num_hidden_layers": sizes["layers"], "num_attention_heads": sizes["heads"],
        "intermediate_size": sizes["ffn_width"], "max_position_embeddings": sizes["max_text_positions"],
        "hidden_dropout_prob": sizes["dropout"], "attention_probs_dropout_prob": sizes["dropout"],
        "encoder_hidden_size": task["encoder_width"], "vocab_size": task["vocab"] + 1,
        "use_qformer_text_input": text_config is None,
    }  # fmt: skip
    text = {} if text_config is None else {"text_config": text_config.to_dict()}
    return Blip2Config(
        vision_config={**vision, "initializer_range": 0.02, "layer_norm_eps": 1e-5}, qformer_config=qformer, **text,
        num_query_tokens=sizes["queries"], image_text_hidden_size=sizes["contrastive_width"],
        image_token_index=None if text_config is None else LLM_SPECIAL.index("<image>"),
    )  # fmt: skip


def write_pictures(folder: Path, n: int) -> None:
    """Smooth noise as JPEG files, of the size that data sets have."""
    folder.mkdir()
    for i in range(n):
        coarse = torch.randint(0, 256, (30, 40, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(coarse.numpy()).resize(PICTURE_SIZE, Image.Resampling.BICUBIC).save(folder / f"{i:03d}.jpg")
