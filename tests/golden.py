"""What the reference implementation (LAVIS) computed with small random models, and those models as files on disk."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "golden"
LINE_END = 291


def golden(name: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and facts of one recording; without them the test is skipped."""
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"the reference's recording {path.name} is not there")
    return load_file(path), json.loads(path.with_suffix(".json").read_text())


def weights(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The recorded state dict, or the part of it below `prefix`."""
    prefix = f"param.{prefix}"
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def write_checkpoint(path: Path, tensors: dict[str, Tensor]) -> Path:
    """The recorded weights as LAVIS saves a fine-tuned model: without the language model."""
    kept = {name: t for name, t in weights(tensors).items() if not name.startswith(("opt_model.", "t5_model."))}
    torch.save({"model": kept, "epoch": 3}, path)
    return path


def write_bert_tokenizer(folder: Path) -> Path:
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate((FOLDER / "vocab_200.txt").read_text().splitlines())}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, words[t]) for t in ("[CLS]", "[SEP]")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_opt(folder: Path, tensors: dict[str, Tensor], facts: dict) -> Path:
    from transformers import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(OPTConfig(**facts["opt_config"]))
    model.load_state_dict(weights(tensors, "opt_model."))
    model.save_pretrained(folder)
    _write_tokenizer(folder, {"<pad>": 1, "</s>": 2, "<unk>": 3, "\n": LINE_END}, "</s> $A", bos=True)
    return folder


def write_t5(folder: Path, tensors: dict[str, Tensor], facts: dict) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(**facts["t5_config"]))
    model.load_state_dict(weights(tensors, "t5_model."))
    model.save_pretrained(folder)
    _write_tokenizer(folder, {"<pad>": 0, "</s>": 1, "<unk>": 2}, "$A </s>", bos=False)
    return folder


def words_of(ids: list[int], end: int) -> str:
    """What the language models' tokenizers make of generated ids up to the one that ends them."""
    kept = ids[: ids.index(end)] if end in ids else ids
    return " ".join(_word(i) for i in kept)


def run(stage: str, arguments: list[str]) -> None:
    """Run a stage in this process, through its `main`."""
    spec = importlib.util.spec_from_file_location(stage, Path(__file__).parents[1] / "stages" / f"{stage}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(arguments)


def _word(token_id: int) -> str:
    return f"w{token_id - 10}" if token_id >= 10 else f"x{token_id}"


def _write_tokenizer(folder: Path, special: dict[str, int], template: str, bos: bool) -> None:
    """Of the recording: "w5" has the id 15; ids that it never used get words of their own."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {_word(i): i for i in range(300) if i not in special.values()} | special
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("</s>", special["</s>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>" if bos else None, eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
    ).save_pretrained(folder)  # fmt: skip
