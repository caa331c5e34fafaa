"""Sizes of the benchmarks: those of BLIP-2 with BERT-base, and toy ones to see that everything runs."""

from typing import Any

Shapes = dict[str, Any]

BERT_BASE: Shapes = {"layers": 12, "width": 768, "heads": 12, "ffn_width": 3072, "queries": 32, "contrastive_width": 256,
                     "max_text_positions": 512, "dropout": 0.1}  # fmt: skip
TOY: Shapes = {"layers": 2, "width": 32, "heads": 2, "ffn_width": 48, "queries": 4, "contrastive_width": 16,
               "max_text_positions": 40, "dropout": 0.1}  # fmt: skip

OPT_125M: Shapes = {"kind": "opt", "vocab_size": 50272, "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12,
                    "num_attention_heads": 12, "word_embed_proj_dim": 768, "max_position_embeddings": 2048}  # fmt: skip
T5_SMALL: Shapes = {"kind": "t5", "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6,
                    "num_heads": 8}  # fmt: skip
TOY_LLMS: dict[str, Shapes] = {
    "opt": {"kind": "opt", "vocab_size": 700, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    "t5": {"kind": "t5", "vocab_size": 700, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2},
}  # fmt: skip

VIT_B: Shapes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                 "image_size": 224, "patch_size": 16}  # fmt: skip
TOY_VIT: Shapes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                   "image_size": 32, "patch_size": 16}  # fmt: skip


def on_features(tiny: bool) -> Shapes:
    """A batch of captioned pictures whose features (ViT-g/14: 257 of 1408) are given."""
    if tiny:
        return {"batch": 4, "words": [2, 6], "tokens": 5, "encoder_width": 24, "vocab": 800, "qformer": TOY,
                "max_text_tokens": 12}  # fmt: skip
    return {"batch": 16, "words": [5, 20], "tokens": 257, "encoder_width": 1408, "vocab": 30522, "qformer": BERT_BASE,
            "max_text_tokens": 32}  # fmt: skip


def on_cached(tiny: bool) -> Shapes:
    """The same behind an encoder of CLIP's ViT-L/14 (toy: ViT-S/32), which a cache runs in one of ten epochs."""
    sizes = {"encoder": "ViT-S-32", "tokens": 50, "encoder_width": 384} if tiny else {
        "encoder": "ViT-L-14", "tokens": 257, "encoder_width": 1024}  # fmt: skip
    vision = {"image_size": 224, "patch_size": 32, "num_hidden_layers": 12, "num_attention_heads": 6} if tiny else {
        "image_size": 224, "patch_size": 14, "num_hidden_layers": 24, "num_attention_heads": 16}  # fmt: skip
    return {**on_features(tiny), **sizes, "vision": vision, "batch": 10 if tiny else 20}


def language_model(kind: str, tiny: bool) -> Shapes:
    """OPT-125m or T5-small."""
    return TOY_LLMS[kind] if tiny else {"opt": OPT_125M, "t5": T5_SMALL}[kind]


def on_pictures(tiny: bool) -> Shapes:
    """ViT-B/16 at 224 pixels before the same Q-Former."""
    vision = TOY_VIT if tiny else VIT_B
    return {"vision": vision, "encoder_width": vision["hidden_size"], "vocab": 800 if tiny else 30522,
            "batch": 4 if tiny else 16, "qformer": TOY if tiny else BERT_BASE}  # fmt: skip
