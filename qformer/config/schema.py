"""The schema of every config: dataclasses, one a concern; every field carries its meaning and unit, which `--help` prints."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from qformer.config.data import DataConfig, prompt_problem
from qformer.config.fields import Problems
from qformer.config.fields import described as _doc

PRECISIONS = ("no", "bf16", "fp16")
DTYPES = ("float32", "bfloat16", "float16")
ENCODER_LOADERS = ("open_clip", "timm", "transformers", "features")  # keys of qformer.encoders.LOADERS


@dataclass
class RunConfig:
    """Where a run leaves what it makes, and who else hears of it."""

    dir: str = _doc(MISSING, "folder of this run: config, metrics, checkpoints, adapter")
    trackers: list[str] = _doc([], "accelerate trackers that mirror metrics.jsonl, e.g. [tensorboard, trackio, wandb]")


@dataclass
class TrainConfig:
    """How long and how a run trains, and when it saves, logs and validates."""

    max_steps: int = _doc(MISSING, "optimizer updates in all", at_least=1)
    seed: int = _doc(0, "seed of initial weights, order, augmentation and dropout", at_least=0)
    resume: str | None = _doc(None, "auto = go on from run.dir's newest checkpoint; or a folder; null = from the start")
    global_batch_size: int = _doc(MISSING, "records per step, over all processes and accumulation", at_least=1)
    micro_batch_size: int = _doc(MISSING, "records per process and forward pass", at_least=1)
    mixed_precision: str = _doc("no", "autocast of the trainable part; its master weights stay float32", PRECISIONS)
    cpu: bool = _doc(False, "train on the CPU even where there is a GPU")
    timeout_s: int = _doc(
        600, "seconds that processes wait for each other, in the slowest load and save as well", at_least=1
    )
    checkpoint_every_steps: int = _doc(1000, "steps between checkpoints", at_least=1)
    keep_checkpoints: int = _doc(2, "newest checkpoints that are kept", at_least=1)
    gradient_checkpointing: list[str] = _doc([], "parts computed twice to keep less in memory: qformer, encoder, llm")
    stop_within_s: float = _doc(30.0, "seconds that the scheduler leaves between SIGTERM and SIGKILL; only warned of")
    log_every_steps: int = _doc(10, "steps between lines of metrics.jsonl", at_least=1)
    validate_every_steps: int = _doc(1000, "steps between validations; one more at the end", at_least=1)
    validation_records: int = _doc(512, "records read in a validation", at_least=1)


@dataclass
class OptimConfig:
    """The optimizer, AdamW, and its learning rate: linear warm-up, then a cosine."""

    lr: float = _doc(1e-4, "peak learning rate")
    min_lr: float = _doc(1e-5, "learning rate at the end of the cosine", at_least=0)
    warmup_steps: int = _doc(2000, "steps of linear warm-up", at_least=0)
    warmup_lr: float = _doc(1e-6, "learning rate at step 0")
    weight_decay: float = _doc(0.05, "AdamW weight decay; none on biases, norms and the temperature", at_least=0)
    encoder_layer_decay: float = _doc(
        1.0, "factor on the learning rate for each block down the encoder (tune.encoder=full)", above=0, at_most=1
    )
    betas: list[float] = _doc([0.9, 0.98], "AdamW betas")
    clip_norm: float = _doc(1.0, "largest gradient norm; larger ones are scaled down to it", above=0)


@dataclass
class EncoderConfig:
    """The frozen encoder of images or other signals."""

    loader: str = _doc(MISSING, "which library loads it", ENCODER_LOADERS)
    id: str = _doc("", "name in open_clip or timm, local-dir:FOLDER or hf-hub:ID; hub id or folder of transformers")
    pretrained: str | None = _doc(None, "tag of the weights in open_clip or timm, or a file with them")
    revision: str | None = _doc(None, "revision of the hub id (transformers)")
    random_weights: bool = _doc(False, "build the architecture without its weights, for trials")
    block: int | None = _doc(
        None,
        "block whose output is read, before the final norm (-1 last; null = -2, as in the paper), or a convnet's feature "
        "map (null = the last)",
    )
    image_size: int | None = _doc(None, "side in pixels; null = the weights' own")
    dtype: str = _doc("float32", "dtype of the frozen weights", DTYPES)
    width: int | None = _doc(None, "width of precomputed features (loader features only)", at_least=1)
    num_tokens: int | None = _doc(None, "tokens of precomputed features, null if they vary (loader features only)")
    grid: list[int] = _doc(
        [], "[rows, columns] that the last tokens of precomputed features lie in, row by row (loader features only)"
    )

    def __post_init__(self) -> None:
        # Only timm has models that are no vision transformers; for all others null is written out.
        if self.block is None and self.loader not in (MISSING, "timm"):
            self.block = -2


@dataclass
class QFormerConfig:
    """The Q-Former between encoder and language model."""

    init_from: str | None = _doc(None, "BERT-shaped model (hub id or folder) to start from; null = random")
    tokenizer: str = _doc(
        "bert-base-uncased", "BERT tokenizer: hub id or folder; gains [DEC]; '' = none: no text is read"
    )
    vocab_size: int | None = _doc(None, "rows of the word embeddings, [DEC] included; null = one for every token")
    layers: int = _doc(12, "transformer layers", at_least=1)
    width: int = _doc(768, "hidden width D", at_least=1)
    heads: int = _doc(12, "attention heads H", at_least=1)
    ffn_width: int = _doc(3072, "width inside a feed-forward network", at_least=1)
    queries: int = _doc(32, "learned query tokens Q", at_least=1)
    cross_attention_frequency: int = _doc(2, "cross-attention to the image in layers 0, f, 2f, ...", at_least=1)
    dropout: float = _doc(0.1, "dropout probability of hidden states and attention", at_least=0, at_most=1)
    max_text_tokens: int = _doc(
        32, "tokens of a caption or other text that it reads, special ones included", at_least=3
    )
    max_text_positions: int = _doc(512, "learned text positions")
    init_std: float = _doc(0.02, "standard deviation of initial weights; narrow models learn sooner from more", above=0)
    contrastive_width: int = _doc(256, "width E of the contrastive projections", at_least=1)
    feature_norm_eps: float = _doc(
        1e-5, "eps of the LayerNorm on frozen features; transformers' checkpoints use 1e-6", above=0
    )


@dataclass
class Stage1Section:
    """The three objectives of stage 1."""

    init_from: str | None = _doc(None, "adapter folder of stage 1 to continue from; null = begin anew")
    itc: float = _doc(1.0, "weight of image-text contrast", at_least=0)
    itm: float = _doc(1.0, "weight of image-text matching", at_least=0)
    itg: float = _doc(1.0, "weight of image-grounded text generation", at_least=0)
    diversity: float = _doc(0.0, "weight of the squared cosine between an image's queries; 0 = BLIP-2", at_least=0)
    label_smoothing: float = _doc(0.1, "label smoothing of ITC and ITG")
    temperature: float = _doc(0.07, "start of the learned divisor of ITC similarities", at_least=0.001, at_most=0.5)
    itc_batch_size: int | None = _doc(
        None, "records contrasted with each other; null = one pass's (docs/large_batches.md)"
    )


@dataclass
class LlmConfig:
    """The frozen language model, and how it is asked."""

    id: str = _doc(MISSING, "hub id or folder of a causal or sequence-to-sequence language model of transformers")
    revision: str | None = _doc(None, "revision of the hub id")
    random_weights: bool = _doc(False, "build the architecture without its weights, for trials")
    dtype: str = _doc("float32", "dtype of the frozen weights", DTYPES)
    activation: str | None = _doc(None, "T5's dense_act_fn in place of its own; BLIP-2 had gelu (exact) for FlanT5")
    trust_remote_code: bool = _doc(False, "run the Python code that comes with the hub id")
    quantise: str = _doc("no", "frozen weights in fewer bits, by bitsandbytes; CUDA only", ("no", "8bit", "4bit"))
    max_target_tokens: int = _doc(32, "tokens of a caption that the loss covers")
    prompt: str = _doc("", "text before the caption in training; not in the loss")
    chat: bool = _doc(False, "prompts are a user's turns by the tokenizer's chat template, texts the assistant's")
    vqa_prompt: str = _doc(
        "", "prompt of questions with {} for the question; empty = BLIP-2's for this kind of model, in a chat {} alone"
    )
    num_beams: int = _doc(5, "beams in generation", at_least=1)
    vqa_length_penalty: float | None = _doc(None, "for answers; null = BLIP-2's: 0 decoder-only, -1 encoder-decoder")
    vqa_max_new_tokens: int = _doc(10, "longest answer")
    caption_max_new_tokens: int = _doc(30, "longest caption")
    caption_min_new_tokens: int = _doc(8, "shortest caption")


@dataclass
class TuneConfig:
    """What else learns, beside the Q-Former."""

    encoder: str = _doc("no", "what of the encoder learns as well, for fine-tuning", ("no", "lora", "full"))
    llm: str = _doc("no", "what of the language model learns as well", ("no", "lora"))
    lora_rank: int = _doc(8, "rank of each LoRA product", at_least=1)
    lora_alpha: int = _doc(16, "LoRA's products are scaled by alpha / rank")
    lora_targets: list[str] = _doc(
        [], "linear layers with a LoRA, by the ends of their names; empty = all of the blocks"
    )


@dataclass
class Stage2Section:
    """How stage 2 begins."""

    init_from: str | None = _doc(None, "adapter folder of stage 1; null = a Q-Former from nothing (the ablation)")
    init_share: float = _doc(
        1.0,
        "share of stage 1's matrices in init_from's start, the rest drawn anew; 1 = theirs as they are",
        at_least=0,
        at_most=1,
    )
    prompt_scale: float = _doc(
        1.0,
        "factor on the language projection's first weights; larger for language models with large embeddings",
        above=0,
    )
    instructed: bool = _doc(False, "the prompt also enters the Q-Former, beside the queries, as in InstructBLIP")


class _Part:
    def problems(self) -> Problems:
        """What no single field can know: rules between keys, each with its message."""
        return []


@dataclass
class RunPart(_Part):
    """What a run needs beside the model that it trains."""

    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def problems(self) -> Problems:
        train, optim = self.train, self.optim
        return [
            *super().problems(),
            (train.global_batch_size % train.micro_batch_size > 0,
             f"train.global_batch_size: {train.global_batch_size} must be a multiple of train.micro_batch_size "
             f"({train.micro_batch_size})"),
            (optim.warmup_steps > train.max_steps,
             f"optim.warmup_steps: {optim.warmup_steps} is outside 0 to train.max_steps ({train.max_steps})"),
            (optim.min_lr > optim.lr, f"optim.min_lr: {optim.min_lr} is outside 0 to optim.lr ({optim.lr})"),
            (len(optim.betas) != 2, f"optim.betas: {optim.betas} must hold two numbers"),
            *self.data.problems(),
        ]  # fmt: skip


@dataclass
class ModelPart(_Part):
    """What rebuilds a model, and all that an adapter folder keeps; `stage` names the entry of `build.STAGES`."""

    stage: str = MISSING
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)

    def frozen(self) -> dict[str, EncoderConfig | LlmConfig]:
        """The sections that name the frozen models."""
        return {"encoder": self.encoder}

    def problems(self) -> Problems:
        qformer, encoder = self.qformer, self.encoder
        return [
            *super().problems(),
            (qformer.width % qformer.heads > 0,
             f"qformer.width: {qformer.width} must be a multiple of qformer.heads ({qformer.heads})"),
            (qformer.max_text_tokens > qformer.max_text_positions,
             f"qformer.max_text_tokens: {qformer.max_text_tokens} is outside 3 to qformer.max_text_positions "
             f"({qformer.max_text_positions})"),
            (encoder.loader == "features" and encoder.width is None,
             "encoder.width: missing; encoder.loader=features needs the width of the features"),
            (encoder.loader != "features" and not encoder.id, "encoder.id: missing; it names the frozen encoder"),
        ]  # fmt: skip


@dataclass
class Stage1Part(ModelPart):
    """A Q-Former aligned with text."""

    stage: str = "stage1"
    stage1: Stage1Section = field(default_factory=Stage1Section)


@dataclass
class Stage2Part(ModelPart):
    """A Q-Former that prompts a language model."""

    stage: str = "stage2"
    llm: LlmConfig = field(default_factory=LlmConfig)
    stage2: Stage2Section = field(default_factory=Stage2Section)

    def frozen(self) -> dict[str, EncoderConfig | LlmConfig]:
        return {**super().frozen(), "llm": self.llm}

    def problems(self) -> Problems:
        problem = prompt_problem(self.llm.vqa_prompt)
        return [*super().problems(), (bool(problem), f"llm.vqa_prompt: {problem}")]


@dataclass
class Stage1Config(Stage1Part, RunPart):
    """Stage 1: representation learning (ITC, ITM, ITG) with a frozen image encoder."""

    def problems(self) -> Problems:
        itc, train, stage1 = self.stage1.itc_batch_size, self.train, self.stage1
        return [
            *super().problems(),
            (not self.qformer.tokenizer, "qformer.tokenizer: missing; stage 1 reads captions by it"),
            (any(text != "caption" or templates for text, templates in self.data.wordings()),
             "data.text, data.templates: stage 1 learns from captions alone; leave text=caption and no templates"),
            (stage1.itc + stage1.itm + stage1.itg <= 0, "stage1: one of itc, itm and itg must be above 0"),
            (itc is not None and self.tune.encoder != "no",
             f"tune.encoder={self.tune.encoder} with stage1.itc_batch_size: its two passes keep an encoder's features, which "
             "must be frozen; set one of them to no or null"),
            (itc is not None and (itc < 1 or itc % train.micro_batch_size > 0 or train.global_batch_size % itc > 0),
             f"stage1.itc_batch_size: {itc} must be a multiple of train.micro_batch_size ({train.micro_batch_size}) and "
             f"divide train.global_batch_size ({train.global_batch_size}); null = train.micro_batch_size x processes"),
        ]  # fmt: skip


@dataclass
class Stage2Config(Stage2Part, RunPart):
    """Stage 2: generative learning through a frozen language model."""

    def problems(self) -> Problems:
        missing = self.stage2.instructed and not self.qformer.tokenizer
        return [
            *super().problems(),
            (missing, "qformer.tokenizer: missing; stage2.instructed=true reads prompts by it"),
        ]
