"""The schema of every config: dataclasses, one a concern; every field carries its meaning and unit, which `--help` prints."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


def _doc(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    metadata = {"help": text, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


PRECISIONS = ("no", "bf16", "fp16")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class RunConfig:
    dir: str = _doc(MISSING, "folder of this run: config, metrics, checkpoints, adapter")
    trackers: list[str] = _doc([], "accelerate trackers that mirror metrics.jsonl, e.g. [tensorboard, wandb]")


@dataclass
class TrainConfig:
    max_steps: int = _doc(MISSING, "optimizer updates in all")
    seed: int = _doc(0, "seed of initial weights, order, augmentation and dropout")
    resume: str | None = _doc(None, "auto = go on from run.dir's newest checkpoint; or a folder; null = from the start")
    global_batch_size: int = _doc(MISSING, "records per step, over all processes and accumulation")
    micro_batch_size: int = _doc(MISSING, "records per process and forward pass")
    mixed_precision: str = _doc("no", "autocast of the trainable part; its master weights stay float32", PRECISIONS)
    cpu: bool = _doc(False, "train on the CPU even where there is a GPU")
    timeout_s: int = _doc(600, "seconds that processes wait for each other, in the slowest load and save as well")
    checkpoint_every_steps: int = _doc(1000, "steps between checkpoints")
    keep_checkpoints: int = _doc(2, "newest checkpoints that are kept")
    gradient_checkpointing: list[str] = _doc([], "parts computed twice to keep less in memory: qformer, encoder, llm")
    stop_within_s: float = _doc(30.0, "seconds that the scheduler leaves between SIGTERM and SIGKILL; only warned of")
    log_every_steps: int = _doc(10, "steps between lines of metrics.jsonl")
    validate_every_steps: int = _doc(1000, "steps between validations; one more at the end")
    validation_records: int = _doc(512, "records read in a validation")


@dataclass
class OptimConfig:
    lr: float = _doc(1e-4, "peak learning rate")
    min_lr: float = _doc(1e-5, "learning rate at the end of the cosine")
    warmup_steps: int = _doc(2000, "steps of linear warm-up")
    warmup_lr: float = _doc(1e-6, "learning rate at step 0")
    weight_decay: float = _doc(0.05, "AdamW weight decay; none on biases, norms and the temperature")
    betas: list[float] = _doc([0.9, 0.98], "AdamW betas")
    clip_norm: float = _doc(1.0, "largest gradient norm; larger ones are scaled down to it")


@dataclass
class DataConfig:
    train: list[str] = _doc(MISSING, "record files, image folders, WebDataset tars or hub ids (docs/data.md)")
    weights: list[float] = _doc([], "share of each of data.train in what is drawn; empty = every record once an epoch")
    validation: list[str] = _doc([], "held-out records, same forms; empty = no validation")
    root: str | None = _doc(None, "folder that relative image paths start from; null = the record file's own")
    features: str | None = _doc(None, "feature cache (docs/feature_cache.md) in the encoder's place; null = none")
    shuffle_block_records: int = _doc(1, "neighbours that stay together and in order in training; 1 = shuffle all")
    workers: int = _doc(2, "processes that read and decode")
    augment: bool = _doc(True, "random resized crop and flip of training images")
    flip: bool = _doc(True, "data.augment mirrors every second image; false where captions say left and right")
    crop_scale: list[float] = _doc([0.5, 1.0], "share of the image's area that a random crop keeps")
    max_pixels: int | None = _doc(
        None, "pixels of the largest image that is read, larger ones are broken records; null = PIL's bound, 89478485"
    )
    cleaning: str = _doc(
        "blip", "captions as BLIP-2 writes them: small letters, no points; or as they are", ("blip", "none")
    )
    max_words: int = _doc(50, "words of a caption that are kept")
    max_text_tokens: int = _doc(32, "tokens of a caption, special ones included")
    max_dropped_fraction: float = _doc(0.1, "share of broken records at which a run stops; they are replaced below it")


@dataclass
class EncoderConfig:
    loader: str = _doc(MISSING, "which library loads it", ("open_clip", "transformers", "features"))
    id: str = _doc("", "open_clip name or local-dir:FOLDER; hub id or folder of transformers")
    pretrained: str | None = _doc(None, "open_clip pretrained tag")
    revision: str | None = _doc(None, "revision of the hub id")
    random_weights: bool = _doc(False, "build the architecture without its weights, for trials")
    block: int = _doc(-2, "block whose output is read, before the final norm (-1 last, -2 second last as in the paper)")
    image_size: int | None = _doc(None, "side in pixels; null = the weights' own")
    dtype: str = _doc("float32", "dtype of the frozen weights", DTYPES)
    width: int | None = _doc(None, "width of precomputed features (loader features only)")
    num_tokens: int | None = _doc(None, "tokens of precomputed features, null if they vary (loader features only)")


@dataclass
class QFormerConfig:
    init_from: str | None = _doc(None, "BERT-shaped model (hub id or folder) to start from; null = random")
    tokenizer: str = _doc("bert-base-uncased", "BERT tokenizer: hub id or folder; gains [DEC]")
    layers: int = _doc(12, "transformer layers")
    width: int = _doc(768, "hidden width D")
    heads: int = _doc(12, "attention heads H")
    ffn_width: int = _doc(3072, "width inside a feed-forward network")
    queries: int = _doc(32, "learned query tokens Q")
    cross_attention_frequency: int = _doc(2, "cross-attention to the image in layers 0, f, 2f, ...")
    dropout: float = _doc(0.1, "dropout probability of hidden states and attention")
    max_text_positions: int = _doc(512, "learned text positions")
    init_std: float = _doc(0.02, "standard deviation of initial weights; narrow models learn sooner from more")
    contrastive_width: int = _doc(256, "width E of the contrastive projections")
    feature_norm_eps: float = _doc(1e-5, "eps of the LayerNorm on frozen features; transformers' checkpoints use 1e-6")


@dataclass
class Stage1Section:
    init_from: str | None = _doc(None, "adapter folder of stage 1 to continue from; null = begin anew")
    itc: float = _doc(1.0, "weight of image-text contrast")
    itm: float = _doc(1.0, "weight of image-text matching")
    itg: float = _doc(1.0, "weight of image-grounded text generation")
    label_smoothing: float = _doc(0.1, "label smoothing of ITC and ITG")
    temperature: float = _doc(0.07, "start of the learned divisor of ITC similarities")
    itc_batch_size: int | None = _doc(
        None, "records contrasted with each other; null = one pass's (docs/large_batches.md)"
    )


@dataclass
class LlmConfig:
    id: str = _doc(MISSING, "hub id or folder of a causal or sequence-to-sequence language model of transformers")
    revision: str | None = _doc(None, "revision of the hub id")
    random_weights: bool = _doc(False, "build the architecture without its weights, for trials")
    dtype: str = _doc("float32", "dtype of the frozen weights", DTYPES)
    activation: str | None = _doc(None, "T5's dense_act_fn in place of its own; BLIP-2 had gelu (exact) for FlanT5")
    trust_remote_code: bool = _doc(False, "run the Python code that comes with the hub id")
    quantise: str = _doc("no", "frozen weights in fewer bits, by bitsandbytes; CUDA only", ("no", "8bit", "4bit"))
    max_target_tokens: int = _doc(32, "tokens of a caption that the loss covers")
    prompt: str = _doc("", "text before the caption in training; not in the loss")
    vqa_prompt: str = _doc("", "prompt of questions with {} for the question; empty = BLIP-2's for this kind of model")
    num_beams: int = _doc(5, "beams in generation")
    vqa_length_penalty: float | None = _doc(None, "for answers; null = BLIP-2's: 0 decoder-only, -1 encoder-decoder")
    vqa_max_new_tokens: int = _doc(10, "longest answer")
    caption_max_new_tokens: int = _doc(30, "longest caption")
    caption_min_new_tokens: int = _doc(8, "shortest caption")


@dataclass
class TuneConfig:
    encoder: str = _doc("no", "what of the encoder learns as well, for fine-tuning", ("no", "lora", "full"))
    llm: str = _doc("no", "what of the language model learns as well", ("no", "lora"))
    lora_rank: int = _doc(8, "rank of each LoRA product")
    lora_alpha: int = _doc(16, "LoRA's products are scaled by alpha / rank")
    lora_targets: list[str] = _doc(
        [], "linear layers with a LoRA, by the ends of their names; empty = all of the blocks"
    )


@dataclass
class Stage2Section:
    init_from: str | None = _doc(None, "adapter folder of stage 1; null = a Q-Former from nothing (the ablation)")
    init_share: float = _doc(
        1.0, "share of stage 1's matrices in init_from's start, the rest drawn anew; 1 = theirs as they are"
    )
    prompt_scale: float = _doc(
        1.0, "factor on the language projection's first weights; larger for language models with large embeddings"
    )
    instructed: bool = _doc(False, "the prompt also enters the Q-Former, beside the queries, as in InstructBLIP")


@dataclass
class Stage1Config:
    """Stage 1: representation learning (ITC, ITM, ITG) with a frozen image encoder."""

    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    stage1: Stage1Section = field(default_factory=Stage1Section)
    tune: TuneConfig = field(default_factory=TuneConfig)


@dataclass
class Stage2Config:
    """Stage 2: generative learning through a frozen language model."""

    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)
    stage2: Stage2Section = field(default_factory=Stage2Section)
    tune: TuneConfig = field(default_factory=TuneConfig)
