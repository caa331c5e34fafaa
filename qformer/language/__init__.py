"""Frozen language models: text loss with gradient to a visual prompt, and generation from one.

Source: BLIP-2 (arXiv 2301.12597), section 3.3; LAVIS blip2_opt.py and blip2_t5.py. B batch, Q queries, T text tokens,
L positions of a joined row, Dl width of the language model, V vocabulary.
"""

from qformer.language.decoder_only import DecoderOnly
from qformer.language.encoder_decoder import EncoderDecoder
from qformer.language.frozen import FrozenLanguageModel, LanguageLoss
from qformer.language.limits import PromptTooLong
from qformer.language.loading import load_language_model
from qformer.language.outline import language_width, outline_language_model

__all__ = [
    "DecoderOnly", "EncoderDecoder", "FrozenLanguageModel", "LanguageLoss", "PromptTooLong", "language_width",
    "load_language_model", "outline_language_model",
]  # fmt: skip
