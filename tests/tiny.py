"""Tiny models of the real classes and a few records, on disk as users have them: loaded by the real loaders."""

import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

TEXT = "a the one two red green blue yellow square dot on of left right middle grey field photo what is colour ? :"
WORDS = TEXT.split()
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (240, 220, 50)}
PLACES = {"left": 4, "middle": 11, "right": 18}
TWO_RANKS = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip
IMAGE_SIDE, WIDTH, FEATURE_WIDTH = 32, 32, 24
LM_VOCABULARY = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", "\n", *WORDS])}
BERT_VOCABULARY = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}

QFORMER = [
    "qformer.layers=2", "qformer.width=32", "qformer.heads=2", "qformer.ffn_width=48", "qformer.queries=4",
    "qformer.max_text_positions=24", "qformer.contrastive_width=16", "qformer.dropout=0.1",
]  # fmt: skip
TRAINING = [
    "train.max_steps=3", "train.global_batch_size=8", "train.micro_batch_size=8", "train.log_every_steps=1",
    "train.checkpoint_every_steps=100", "train.validate_every_steps=100", "train.validation_records=8",
    "train.cpu=true", "optim.warmup_steps=1", "optim.lr=1e-3", "data.workers=0", "qformer.max_text_tokens=16",
]  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """Where everything lies, and the command lines of both stages over it; later arguments win."""

    folder: Path
    encoder: str  # open_clip ViT: 5 tokens of 32 at 32 px
    opt: str
    t5: str
    bert: str  # tokenizer and masked language model
    records: Path  # 24 pictures
    validation: Path  # 8 pictures
    features: Path  # 24 feature files of 24 columns, 3 to 7 rows

    def stage1(self, run_dir: Path, *more: str) -> list[str]:
        return ["stage=stage1", *self._data(run_dir), *QFORMER, *TRAINING, *more]

    def stage2(self, run_dir: Path, *more: str) -> list[str]:
        llm = [f"llm.id={self.opt}", "llm.caption_max_new_tokens=3"]
        return ["stage=stage2", *self._data(run_dir), *QFORMER, *TRAINING, *llm, *more]

    def on_features(self) -> list[str]:
        """Arguments that put the feature files in the pictures' place."""
        return [
            "encoder.loader=features", "encoder.id=''", f"encoder.width={FEATURE_WIDTH}",
            f"data.train=[{self.features}]", "data.validation=[]",
        ]  # fmt: skip

    def _data(self, run_dir: Path) -> list[str]:
        return [
            f"run.dir={run_dir}", "encoder.loader=open_clip", f"encoder.id={self.encoder}",
            f"qformer.tokenizer={self.bert}", f"data.train=[{self.records}]", f"data.validation=[{self.validation}]",
        ]  # fmt: skip


def build_tiny(folder: Path) -> Tiny:
    """Write everything into `folder`."""
    return Tiny(
        folder,
        build_encoder(folder / "vit"),
        build_opt(folder / "opt"),
        build_t5(folder / "t5"),
        build_bert(folder / "bert"),
        write_records(folder / "train", 24),
        write_records(folder / "validation", 8, seed=1),
        write_feature_records(folder / "features", 24),
    )


def shake(model: nn.Module, seed: int = 2, by: float = 0.1) -> None:
    """Random values everywhere, so that no norm or bias is a no-op."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def build_encoder(folder: Path, seed: int = 0) -> str:
    """An open_clip vision transformer in a folder; returns its `encoder.id`."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": IMAGE_SIDE, "layers": 2, "width": WIDTH, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
    }
    preprocess_cfg = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "size": IMAGE_SIDE}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    shake(model, seed)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def build_opt(folder: Path) -> str:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(1)
    OPTForCausalLM(OPTConfig(
        vocab_size=len(LM_VOCABULARY) + 2, hidden_size=WIDTH, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=WIDTH, init_std=0.2, dropout=0.1,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )).save_pretrained(folder)  # fmt: skip
    _lm_tokenizer("</s> $A", bos=True).save_pretrained(folder)
    return str(folder)


def build_t5(folder: Path) -> str:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(1)
    T5ForConditionalGeneration(T5Config(
        vocab_size=len(LM_VOCABULARY) + 2, d_model=WIDTH, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.1, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0,
        initializer_factor=3.0,
    )).save_pretrained(folder)  # fmt: skip
    _lm_tokenizer("$A </s>", bos=False).save_pretrained(folder)
    return str(folder)


def build_bert(folder: Path) -> str:
    """A BERT of the sizes of `QFORMER`, with its tokenizer."""
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(BERT_VOCABULARY, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, BERT_VOCABULARY[t]) for t in ("[CLS]", "[SEP]")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(3)
    bert = BertForMaskedLM(BertConfig(
        vocab_size=len(BERT_VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=40,
    ))  # fmt: skip
    shake(bert)
    bert.save_pretrained(folder)
    return str(folder)


def _lm_tokenizer(template: str, bos: bool):
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(LM_VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("</s>", LM_VOCABULARY["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>" if bos else None, eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip


def draw_scene(rng: random.Random) -> tuple[Image.Image, list[str]]:
    """A picture of a coloured dot, and two captions of it, of different lengths."""
    colour, place = rng.choice(list(COLOURS)), rng.choice(list(PLACES))
    grey = rng.randint(0, 120)
    picture = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), (grey, grey, grey))
    picture.paste(COLOURS[colour], (PLACES[place], 11, PLACES[place] + 10, 21))
    return picture, [f"a {colour} square", f"a photo of one {colour} square on the {place} of a grey field"]


def write_records(folder: Path, n: int, seed: int = 0) -> Path:
    """`n` pictures with two captions, a question and its answer each; the last two have the same `image_id`."""
    folder.mkdir(parents=True)
    rng, lines = random.Random(seed), []
    for i in range(n):
        picture, captions = draw_scene(rng)
        picture.save(folder / f"{i:02d}.png")
        record = {"image": f"{i:02d}.png", "caption": captions, "image_id": f"picture {min(i, n - 2)}"}
        lines.append({**record, "question": "what colour is the square?", "answers": [captions[0].split()[1]]})
    return _write_lines(folder / "records.jsonl", lines)


def write_feature_records(folder: Path, n: int) -> Path:
    """`n` records whose "picture" is a feature file float[3 to 7, FEATURE_WIDTH]."""
    folder.mkdir(parents=True)
    rng, lines = random.Random(5), []
    for i in range(n):
        array = np.random.default_rng(i).standard_normal((rng.randint(3, 7), FEATURE_WIDTH)).astype(np.float32)
        np.save(folder / f"{i:02d}.npy", array)
        lines.append({"image": f"{i:02d}.npy", "caption": draw_scene(rng)[1], "image_id": f"signal {i}"})
    return _write_lines(folder / "records.jsonl", lines)


def _write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run_stage(stage: int, arguments: list[str]) -> None:
    """Run a stage in this process, through its `main`."""
    import importlib.util

    path = Path(__file__).parents[1] / "stages" / f"stage{stage}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(arguments)


def exit_codes(ranks: list[Any]) -> list[int | None]:
    """Start processes that are ranks of one group and wait for them; one that hangs fails the test."""
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 200
    for process in ranks:
        process.join(max(0, deadline - time.monotonic()))
    alive = [process for process in ranks if process.is_alive()]
    for process in alive:
        process.kill()
        process.join()
    assert not alive, "the ranks wait for each other"
    return [process.exitcode for process in ranks]
