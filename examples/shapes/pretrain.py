"""Builds the frozen parts of the Shapes world from a seed: `python examples/shapes/pretrain.py opt|t5|vit|tokenizers`.

The language models are pretrained on text only, the encoder contrastively on pictures with captions; none of them ever
sees a picture with a question. On one core of an AMD EPYC OPT takes half an hour, the ViT 40 minutes, T5 about two hours.
What is written is in the formats of the libraries that load it: transformers folders for OPT and T5, an open_clip folder
(`local-dir:`) for the ViT, a BERT vocabulary for the Q-Former's text side.
"""

import argparse
import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from texts import (
    BOS,
    COMPARISONS,
    LEVELS,
    PAD,
    PLACE_FIRST,
    SEQ2SEQ_LEVELS,
    UNK,
    WORD,
    Level,
    Pieces,
    document,
    encode,
    lm_vocabulary,
    merge,
    pad,
    seq2seq_pair,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qformer.optim import lr_at
from qformer.shapes import grammar, world

STEPS = {"opt": 3600, "t5": 5000, "vit": 2500}  # of the weights that ship
WEIGHTS = Path(world.__file__).parent / "weights"
# Running share of right answers; one text in 25 has no description, and T5's are harder than what it will be asked.
NEXT_LEVEL_AT = {"opt": 0.9, "t5": 0.8}


class Course(NamedTuple):
    """Further pretraining of T5: several words at one position, as visual prompts say them, and what it had not learnt."""

    steps: int
    levels: tuple[Level, ...]  # one drawn for each text
    plain: float = 0.3  # share of texts with one word a position
    lr: float = 7e-4


COURSES = (
    Course(900, SEQ2SEQ_LEVELS[-1:]),
    Course(1600, SEQ2SEQ_LEVELS[-1:]),
    Course(4000, (COMPARISONS, *SEQ2SEQ_LEVELS[-1:] * 2), lr=1e-3),
    Course(300, (*(PLACE_FIRST,) * 4, SEQ2SEQ_LEVELS[-1]), plain=1.0, lr=1e-3),
    Course(2000, (COMPARISONS, *SEQ2SEQ_LEVELS[-1:] * 2)),
)


# ---------------------------------------------------------------------------------------------------- tokenizers


def build_tokenizers(folder: Path) -> None:
    """Write the tokenizers: OPT's (begins with </s>), T5's (ends with </s>), BERT's (a word list)."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = lm_vocabulary()
    for name, template in (("opt", f"{BOS} $A"), ("t5", f"$A {BOS}")):
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[\w-]+|[^\w\s]"), "removed", invert=True)
        tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(BOS, vocabulary[BOS])]
        )
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=BOS if name == "opt" else None,
            eos_token=BOS,
            pad_token=PAD,
            unk_token=UNK,
        ).save_pretrained(folder / name)
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *grammar.vocabulary()])}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\w-]+|[^\w\s]"), "removed", invert=True)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    ).save_pretrained(folder / "bert")  # fmt: skip


# ---------------------------------------------------------------------------------------------------- language models


def build_language_model(kind: str) -> Any:
    from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

    model: Any
    tied: dict[str, Any] = {"tie_word_embeddings": True, "decoder_start_token_id": lm_vocabulary()[PAD]}
    ids = lm_vocabulary()
    size = math.ceil(len(ids) / 8) * 8
    if kind == "opt":
        model = OPTForCausalLM(
            OPTConfig(
                vocab_size=size, hidden_size=128, word_embed_proj_dim=128, ffn_dim=512, num_hidden_layers=4,
                num_attention_heads=4, max_position_embeddings=320, init_std=0.08, dropout=0.0, attention_dropout=0.0, layerdrop=0.0,
                pad_token_id=ids[PAD], bos_token_id=ids[BOS], eos_token_id=ids[BOS],
            )
        )  # fmt: skip
        _look_back_opt(model)
        return model
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=size, d_model=128, d_kv=32, d_ff=384, num_layers=4, num_decoder_layers=3, num_heads=8,
            dropout_rate=0.0, feed_forward_proj="gated-gelu", pad_token_id=ids[PAD],
            eos_token_id=ids[BOS], **tied,
        )
    )  # fmt: skip
    for stack, offsets in ((model.encoder, (-1, 1, -2, -3)), (model.decoder, (-1, -2, -3))):
        bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        for head, offset in enumerate(offsets):  # T5's buckets: words before count from 0, words after from half
            bias.data[-offset if offset < 0 else len(bias) // 2 + offset, head] = 8.0
    return model


@torch.no_grad()
def _look_back_opt(model: Any) -> None:
    """Let the heads of the first layer begin by looking 1, 2, 3 and 4 words back.

    Binding a word to its neighbour then needs no discovery: a small model on two cores learns it in a minute, and from
    plain random weights not within the hour. Positions are sinusoids in a quarter of the width of their own; a query is
    the position turned back by the head's distance.
    """
    attention = model.model.decoder.layers[0].self_attn
    width, n = attention.head_dim, attention.head_dim // 2
    positions, words = model.model.decoder.embed_positions.weight, model.model.decoder.embed_tokens.weight
    omega = 1.5 * (0.02 / 1.5) ** (torch.arange(n) / (n - 1))
    angle = torch.arange(len(positions))[:, None] * omega
    words[:, -width:] = 0
    positions.zero_()
    positions[:, -width:] = 0.15 * torch.cat([angle.sin(), angle.cos()], 1)
    for head in range(attention.num_heads):
        rows = slice(head * width, (head + 1) * width)
        cos, sin = (torch.diag(f((head + 1) * omega)) for f in (torch.cos, torch.sin))
        for projection, turn in (
            (attention.q_proj, torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])),
            (attention.k_proj, torch.eye(width)),
        ):
            projection.weight[rows] = 0
            projection.weight[rows, -width:] = 2.5 * turn


def language_batch(kind: str, rng: random.Random, ids: dict[str, int], *, size: int, level: Level):
    """(inputs of the model, labels, weights of the labels)"""
    if kind == "opt":
        texts = [encode(document(rng, level), ids) for _ in range(size)]
        input_ids = pad([t for t, _ in texts], ids[PAD])
        inputs = {"input_ids": input_ids[:, :-1], "attention_mask": (input_ids != ids[PAD])[:, :-1].long()}
        return inputs, input_ids[:, 1:], pad([w for _, w in texts], 0.0)[:, 1:]
    pairs = [seq2seq_pair(rng, level) for _ in range(size)]
    sources = pad([[ids[w] for w in WORD.findall(f"{text} {rest}")] + [ids[BOS]] for text, rest, _ in pairs], ids[PAD])
    inputs = {"input_ids": sources, "attention_mask": (sources != ids[PAD]).long()}
    decoder_ids, labels, weights = decoder_batch([pieces for *_, pieces in pairs], ids)
    return {**inputs, "decoder_input_ids": decoder_ids}, labels, weights


def decoder_batch(targets: list[Pieces], ids: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(inputs of T5's decoder, labels, weights of the labels)"""
    encoded = [encode([*pieces, (BOS, 0.5)], ids) for pieces in targets]
    labels = pad([t for t, _ in encoded], ids[PAD])
    start = torch.full((len(labels), 1), ids[PAD])
    return torch.cat([start, labels[:, :-1]], 1), labels, pad([w for _, w in encoded], 0.0)


def merged_batch(rng: random.Random, ids: dict[str, int], *, size: int, course: Course, embed: torch.nn.Module):
    """As `language_batch` for T5, but several words may stand at one position of the encoder: their embeddings add up.

    They are added as a sum, a mean, or between the two, under a little noise, as no visual prompt is a word to the digit.
    """
    pairs = [seq2seq_pair(rng, rng.choice(course.levels)) for _ in range(size)]
    texts = [[*merge(text, rng, course.plain), *([w] for w in WORD.findall(rest)), [BOS]] for text, rest, _ in pairs]
    words = torch.full((size, max(map(len, texts)), max(len(p) for t in texts for p in t)), ids[PAD])
    for i, text in enumerate(texts):
        for j, position in enumerate(text):
            words[i, j, : len(position)] = torch.tensor([ids[w] for w in position])
    there = words != ids[PAD]
    count = there.sum(2, keepdim=True).clamp(min=1)
    embeds = (embed(words) * there[..., None]).sum(2) / count ** (0.5 * torch.rand(size, 1, 1))
    embeds = embeds + 0.3 * torch.rand(size, 1, 1) * torch.randn_like(embeds)
    decoder_ids, labels, weights = decoder_batch([pieces for *_, pieces in pairs], ids)
    inputs = {"inputs_embeds": embeds, "attention_mask": there.any(2).long(), "decoder_input_ids": decoder_ids}
    return inputs, labels, weights


@torch.no_grad()
def caption_accuracy(model, kind: str, ids: dict[str, int], n: int = 560) -> dict[str, float]:
    """Share of held-out questions whose answer is the model's first choice given the caption, by type."""
    rng, right = random.Random(99), dict.fromkeys(grammar.QUESTION_TYPES, 0.0)
    for question_type in right:
        pairs: list[tuple[str, str]] = []
        while len(pairs) < n // len(right):
            scene = world.draw_split(rng, True)
            if qa := grammar.ask(scene, rng, question_type):
                pairs.append((f"{grammar.caption(scene, rng)} question: {qa[0]} answer:", qa[1]))
        for text, answer in pairs:
            asked, wanted = ([ids[w] for w in WORD.findall(t)] for t in (text, answer))
            if kind == "opt":
                logits = model(torch.tensor([[ids[BOS], *asked, *wanted]])).logits[0, -len(wanted) - 1 : -1]
            else:
                decoder = torch.tensor([[ids[PAD], *wanted[:-1]]])
                logits = model(input_ids=torch.tensor([[*asked, ids[BOS]]]), decoder_input_ids=decoder).logits[0]
            right[question_type] += logits.argmax(-1).tolist() == wanted
    return {t: round(100 * r / (n // len(right)), 1) for t, r in right.items()}


def pretrain_language_model(
    kind: str, steps: int, folder: Path, *, seed: int = 0, batch: int = 48, lr: float = 1.5e-3
) -> None:
    """Train on text for `steps` and write the model as fp16 into `folder`."""
    torch.manual_seed(seed)
    rng, ids = random.Random(seed), lm_vocabulary()
    model = build_language_model(kind)
    model.set_attn_implementation("eager")  # on CPUs in bfloat16 the fused kernel's gradient is far slower
    levels = LEVELS if kind == "opt" else SEQ2SEQ_LEVELS
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    start, level, right_share = time.time(), 0, 0.0
    for step in range(1, steps + 1):
        size = batch * (4 if kind == "t5" and level else 1)
        inputs, labels, weights = language_batch(kind, rng, ids, size=size, level=levels[level])
        right = _update(model, optimizer, (inputs, labels, weights), step, steps=steps, lr=lr, warmup=200)
        right_share += 0.02 * (right[weights == 1].float().mean().item() - right_share)
        if step % 50 == 0:
            print(f"{kind} step {step} {time.time() - start:.0f} s level {level} right {right_share:.3f}", flush=True)
        if right_share > NEXT_LEVEL_AT[kind] and level < len(levels) - 1:
            level, right_share = level + 1, 0.0
            print(f"{kind} step {step}: level {level}", flush=True)
        if step % 250 == 0 and level:
            by_type = caption_accuracy(model, kind, ids)
            progress = f"right {right_share:.3f} given the caption {sum(by_type.values()) / len(by_type):.1f} {by_type}"
            print(f"{kind} step {step} {time.time() - start:.0f} s level {level} {progress}", flush=True)
    model.half().save_pretrained(folder / kind)


def further_course(course: Course, folder: Path, seed: int, batch: int = 128) -> None:
    """Go on with the T5 in `folder` by one course.

    A visual prompt says several things at one position. A large language model can read that; this small one, from
    words alone, took items of such a prompt for a bag of words and could not tell which colour was where.
    """
    from transformers import T5ForConditionalGeneration

    torch.manual_seed(seed)
    rng, ids = random.Random(seed), lm_vocabulary()
    model = T5ForConditionalGeneration.from_pretrained(folder / "t5", dtype=torch.float32).train()
    model.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=course.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    right_share = 0.0
    for step in range(1, course.steps + 1):
        inputs, labels, weights = merged_batch(rng, ids, size=batch, course=course, embed=model.shared)
        right = _update(model, optimizer, (inputs, labels, weights), step, steps=course.steps, lr=course.lr, warmup=50)
        right_share += 0.02 * (right[weights == 1].float().mean().item() - right_share)
        if step % 50 == 0:
            print(f"t5, further course, step {step} right {right_share:.3f}", flush=True)
    print(f"t5, further course, given the caption {caption_accuracy(model.eval(), 't5', ids)}", flush=True)
    model.half().save_pretrained(folder / "t5")


def _update(
    model: Any, optimizer: torch.optim.Optimizer, batch: Any, step: int, *, steps: int, lr: float, warmup: int
) -> Tensor:
    """One step on (inputs, labels, weights); returns which labels were the first choice, bool."""
    inputs, labels, weights = batch
    for group in optimizer.param_groups:
        group["lr"] = lr_at(
            step - 1, peak_lr=lr, min_lr=lr / 50, warmup_steps=min(warmup, steps), warmup_lr=0.0, max_steps=steps
        )
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    loss = (losses * weights.flatten()).sum() / weights.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return logits.argmax(-1) == labels


# ---------------------------------------------------------------------------------------------------- the encoder

VIT = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 48, "vocab_size": 96, "width": 128, "heads": 4, "layers": 2},
}
ATTRIBUTES = {"size": list(world.SIZES), "colour": list(world.COLOURS), "shape": list(world.SHAPES)}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic", "size": 64}


def siblings(rng: random.Random) -> list[world.Scene]:
    """Training scenes that differ in one attribute of one item: a contrast that the other attributes cannot win."""
    attribute = rng.choice(("shape", "shape", "colour", "size", "place"))
    while True:
        first, *others = world.draw_split(rng, False)
        free = [place for place in world.PLACES if place not in {other.place for other in others}]
        values: list[str] = {**ATTRIBUTES, "place": free}[attribute]
        scenes: list[world.Scene] = [
            (replace(first, **{attribute: value}), *others) for value in rng.sample(values, min(4, len(values)))
        ]
        if not any(map(world.held_out, scenes)):
            return scenes


def pretrain_encoder(steps: int, folder: Path, *, seed: int = 0, batch: int = 128, lr: float = 1e-3) -> None:
    """Train a CLIP on rendered pictures with captions for `steps` and write it as an open_clip folder (fp16)."""
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP
    from safetensors.torch import save_file
    from torchvision.transforms.functional import normalize, pil_to_tensor

    torch.manual_seed(seed)
    rng, ids = random.Random(seed), lm_vocabulary()
    model, contrast = CLIP(**VIT), ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    start = time.time()
    end = len(ids)  # CLIP reads its text feature where the largest id stands
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(
                step - 1, peak_lr=lr, min_lr=lr / 50, warmup_steps=min(100, steps), warmup_lr=0.0, max_steps=steps
            )
        scenes = [scene for _ in range(batch) for scene in siblings(rng)][:batch]
        pictures = torch.stack([pil_to_tensor(world.render(s, rng)).float() / 255 for s in scenes])
        pictures = normalize(pictures, PREPROCESS["mean"], PREPROCESS["std"])
        texts = [[*encode([(grammar.caption(s, rng), 1.0)], ids)[0][:47], end] for s in scenes]
        # On CPUs in bfloat16 the gradient of the fused attention is far slower.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            image, text, scale = model(pictures, F.pad(pad(texts, 0), (0, 48 - max(map(len, texts)))))
        loss = contrast(image.float(), text.float(), scale)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if step % 50 == 0:
            right = ((image @ text.T).argmax(1) == torch.arange(batch)).float().mean()
            print(
                f"vit step {step} {time.time() - start:.0f} s loss {loss.item():.3f} accuracy {right:.2f}", flush=True
            )
    (folder / "vit").mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": VIT, "preprocess_cfg": PREPROCESS}
    (folder / "vit" / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "vit" / "open_clip_model.safetensors")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("tokenizers", "opt", "t5", "vit"))
    parser.add_argument(
        "--steps", type=int, help="updates; default: " + ", ".join(f"{k} {n}" for k, n in STEPS.items())
    )
    parser.add_argument("--batch", type=int, default=48, help="texts in an update")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args(argv)
    if args.what == "tokenizers":
        build_tokenizers(args.out)
        return
    steps = args.steps or STEPS[args.what]
    if args.what == "vit":
        pretrain_encoder(steps, args.out, seed=args.seed)
    else:
        pretrain_language_model(args.what, steps, args.out, seed=args.seed, batch=args.batch)
    if args.what == "t5":
        for i, course in enumerate(COURSES):
            fewer = course._replace(steps=math.ceil(course.steps * steps / STEPS["t5"]))
            further_course(fewer, args.out, args.seed + 7 + i)


if __name__ == "__main__":
    main()
