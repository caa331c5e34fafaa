"""The checks, in the order in which a run would meet the mistakes, the cheap ones first."""

import dataclasses
import json
import logging
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import nn

from qformer.build import build_dataset, build_encoder, build_tokenizer, read_split
from qformer.card import stage_name
from qformer.checkpoint import STATE, load_strictly, read_adapter, require_same_parts, run_bytes, transfer
from qformer.data import RecordDataset, Wording, clean_caption
from qformer.doctor.report import FAILED, OK, WARNING, Finding
from qformer.doctor.weights import Weights, existing, find_weights, parameter_bytes, resident_bytes
from qformer.encoders import FrozenEncoder, encoder_weights, outline_encoder
from qformer.interop.frozen import empty_adapter
from qformer.language import FrozenLanguageModel, outline_language_model
from qformer.launch import start_accelerator
from qformer.parts import WeightSource
from qformer.run_folder import resume_from

CUT_CAPTIONS = 0.01  # share of captions longer than the limit from which on it is worth a word
UNKNOWN_TOKENS = 0.01  # likewise of tokens that the tokenizer does not know
Verdict = tuple[str, str]


@dataclasses.dataclass
class Case:
    """A config, and what the checks learn for those after them; None where a check failed.

    Args:
        processes: how many the run will have.
        sample: records that are read of each split.
    """

    config: Any  # of a run of any stage
    processes: int = 1
    sample: int = 256
    first_step: int = 0
    accelerator: Accelerator | None = None
    free_bytes: int = 0  # of the device's memory, before anything is loaded
    encoder: FrozenEncoder | None = None  # without weights, as the next two
    llm: FrozenLanguageModel | None = None
    adapter: nn.Module | None = None
    tokenizer: Any = None
    captions: list[str] = dataclasses.field(default_factory=list)  # of the sample of data.train
    read_s: float = 0.0  # to read one record
    static_bytes: int = 0  # weights, gradients and moments

    @property
    def needs_tokenizer(self) -> bool:
        return "llm" not in self.config.frozen() or self.config.stage2.instructed

    @property
    def accumulation(self) -> int:
        train = self.config.train
        return max(1, train.global_batch_size // (train.micro_batch_size * self.processes))


def attempt(name: str, check: Callable[[Case], Verdict], case: Case) -> Finding:
    """Run one check; a mistake that the config's writer can mend makes it FAILED."""
    try:
        return Finding(name, *check(case))
    except (ValueError, OSError, FloatingPointError) as error:
        return Finding(name, FAILED, str(error))


def check_steps(case: Case) -> Verdict:
    train = case.config.train
    micro, world = train.micro_batch_size, case.processes
    if train.global_batch_size % (micro * world):
        return FAILED, (
            f"train.global_batch_size={train.global_batch_size} must be a multiple of train.micro_batch_size={micro} "
            f"times {world} processes"
        )
    made = f"{micro} a forward x {world} process{'es' * (world > 1)} x {case.accumulation} accumulated"
    return (
        OK,
        f"{stage_name(case.config)}: {train.max_steps} steps of {train.global_batch_size} records ({made})",
    )


def check_run_folder(case: Case) -> Verdict:
    run_dir, resume = Path(case.config.run.dir), case.config.train.resume
    with _warnings() as warned:  # of damaged checkpoints that are passed over
        checkpoint = resume_from(run_dir, resume)
    here = existing(run_dir)
    try:
        with tempfile.NamedTemporaryFile(dir=here, prefix=".doctor-"):
            pass
    except OSError as error:
        raise ValueError(f"run.dir={run_dir} cannot be written ({error.strerror}: {here}); choose another") from None
    if checkpoint:
        require_same_parts(case.config, checkpoint, case.config.frozen())
        case.first_step = json.loads((checkpoint / STATE).read_text())["step"]
        if case.first_step > case.config.train.max_steps:
            raise ValueError(f"{checkpoint} is past train.max_steps={case.config.train.max_steps}; raise it")
        return WARNING if warned else OK, "; ".join(
            [f"{run_dir} can be written; goes on from {checkpoint.name}", *warned]
        )
    return OK, f"{run_dir} can be written and holds no run"


def check_device(case: Case) -> Verdict:
    config = case.config
    accelerator = start_accelerator(config)
    if accelerator.num_processes > 1:
        raise ValueError("start the doctor as one process and tell it the number of the run's with --processes")
    case.accelerator, device = accelerator, accelerator.device
    precision = f"mixed precision {config.train.mixed_precision}"
    if device.type == "cuda":
        case.free_bytes, total = torch.cuda.mem_get_info(device)
        text = f"{torch.cuda.get_device_name(device)}, {size(case.free_bytes)} of {size(total)} free, {precision}"
        if config.train.mixed_precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return WARNING, f"{text}: this GPU has no bf16; set train.mixed_precision=fp16"
    else:
        case.free_bytes = psutil.virtual_memory().available
        text = f"{device.type} with {torch.get_num_threads()} threads, {size(case.free_bytes)} free, {precision}"
        if not config.train.cpu:
            return WARNING, f"no GPU is found: {text}; where that is meant, say so with train.cpu=true"
    return OK, text


def check_encoder(case: Case) -> Verdict:
    config = case.config
    if config.data.features is not None:
        if not Path(config.data.features).is_dir():
            raise ValueError(_missing_cache(case))
        case.encoder = build_encoder(config.encoder, config.data)
        return OK, f"features from data.features={config.data.features}: {_tokens(case.encoder)}"
    with _warnings() as warned:
        encoder = outline_encoder(config.encoder)
        source = encoder_weights(config.encoder)
        weights = None if source is None else find_weights(source)
    case.encoder = encoder
    return _model_verdict(f"{config.encoder.id}: {_tokens(encoder)}", encoder, weights, warned)


def check_language_model(case: Case) -> Verdict:
    config = case.config.llm
    with _warnings() as warned:
        llm = outline_language_model(config)
        weights = None if config.random_weights else find_weights(WeightSource("llm.id", config.id, config.revision))
    case.llm, facts = llm, llm.facts
    kind = "encoder-decoder" if llm.is_encoder_decoder else "decoder-only"
    end = "none" if facts.line_end_id is None else facts.line_end_id
    probed = f"tokenizer: BOS {facts.bos_ids or 'none'}, pad {facts.pad_id}, line end {end}"
    return _model_verdict(f"{config.id}: {kind}, {llm.width} wide; {probed}", llm, weights, warned)


def check_tokenizer(case: Case) -> Verdict:
    tokenizer = build_tokenizer(case.config.qformer)
    framed, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    if framed != [tokenizer.cls_token_id, *bare, tokenizer.sep_token_id] or not bare:
        raise ValueError(
            f"qformer.tokenizer={case.config.qformer.tokenizer!r} makes {tokenizer.convert_ids_to_tokens(framed)} of 'a'; "
            "expected [CLS] a [SEP]: name a BERT-shaped tokenizer"
        )
    case.tokenizer = tokenizer
    return OK, f"{case.config.qformer.tokenizer}: {len(tokenizer)} tokens with [DEC], frames a text as [CLS] ... [SEP]"


def check_beginning(case: Case) -> Verdict:
    """Where the trainable part begins: shapes of the adapter to start from, or the weights of BERT."""
    config = case.config
    assert case.encoder is not None
    case.adapter = adapter = empty_adapter(
        config,
        case.encoder.width,
        None if case.llm is None else case.llm.width,
        None if case.tokenizer is None else config.qformer.vocab_size or len(case.tokenizer),
    )
    parameters = sum(p.numel() for p in adapter.parameters())
    text = f"{parameters / 1e6:.3g} M trainable parameters"
    stage1 = config.stage == "stage1"
    init_from = config.stage1.init_from if stage1 else config.stage2.init_from
    if init_from is not None:
        require_same_parts(config, Path(init_from), ("encoder",), start=True)
        tensors = read_adapter(Path(init_from))
        with warnings.catch_warnings():  # that there is nothing to copy to
            warnings.simplefilter("ignore")
            if stage1:
                load_strictly(adapter, tensors, init_from)
                return OK, f"{text}, all from {init_from}"
            return OK, f"{text}; {transfer(adapter, tensors, init_from).report(init_from)}"
    if stage1 and config.qformer.init_from is not None:
        bert = find_weights(WeightSource("qformer.init_from", config.qformer.init_from))
        return OK, f"{text}, from {config.qformer.init_from} ({_fetched(bert)})"
    if not stage1:
        return WARNING, f"{text}; stage2.init_from is null: the Q-Former starts from nothing, without stage 1"
    return OK, f"{text}, drawn at random (qformer.init_from is null)"


def check_disk(case: Case) -> Verdict:
    assert case.adapter is not None
    run_dir, keep = Path(case.config.run.dir), case.config.train.keep_checkpoints
    needed, free = run_bytes(case.adapter, keep), shutil.disk_usage(existing(run_dir)).free
    text = f"run.dir needs {size(needed)} for {keep} checkpoints and the adapter, its disk has {size(free)} free"
    if free < needed:
        return FAILED, f"{text}; free some, lower train.keep_checkpoints or choose another run.dir"
    return (OK, text) if free > 2 * needed else (WARNING, f"{text}: that is tight")


def check_data(case: Case, split: str) -> Verdict:
    """Read the first records and some spread over all files as the run would, but whole images."""
    config = case.config
    records = read_split(config.data, split)
    count = min(case.sample, len(records))
    indices = sorted({*range(min(8, count)), *(i * len(records) // count for i in range(count))})
    if split == "train":
        wordings = [Wording(text) for text, _ in config.data.wordings()]
        case.captions = [text for i in indices for text in wordings[records.source_of(i)].texts(records[i])]
    if case.encoder is None:
        return WARNING, f"{len(records)} records; none was opened, because the encoder's input size is not known"
    made = build_dataset(config.data, case.encoder, split, config.train.seed)
    view = RecordDataset(
        records, made.transform, seed=config.train.seed, augment=False, text=made.wordings, in_order=True,
        features=made.features,
    )  # fmt: skip
    start = time.perf_counter()
    samples = [view[i] for i in indices]
    seconds = (time.perf_counter() - start) / len(samples)
    broken = [s for s in samples if s.image is None]
    if split == "train":
        case.read_s = seconds
    text = f"{len(view)} records; {len(samples)} read across them, {1 / seconds:.3g}/s in one process"
    if case.encoder.input_transform is None and len(broken) < len(samples):
        widths = {s.image.shape[1] for s in samples if s.image is not None} - {case.encoder.width}
        if widths:
            return FAILED, f"{text}; features are {widths.pop()} wide, encoder.width={case.encoder.width}: set it so"
    if not broken:
        return OK, f"{text}, none broken"
    share = len(broken) / len(samples)
    text += f"; {len(broken)} ({share:.1%}) cannot be read, the first: {broken[0].dropped[0]}"
    if share > config.data.max_dropped_fraction:
        most = f"data.max_dropped_fraction={config.data.max_dropped_fraction}"
        return FAILED, f"{text}; more than {most}, so the run would stop: check data.{split} and data.root"
    return WARNING, f"{text}; the run replaces broken records by others and counts them"


def check_captions(case: Case) -> Verdict:
    """Lengths against the limits, and what share of the words the Q-Former's tokenizer does not know."""
    texts = [text for caption in case.captions if (text := clean_caption(caption))]
    config, remarks, worst = case.config, [], OK
    kinds = dict.fromkeys(text for text, _ in config.data.wordings())
    if not texts:
        fields = {"caption": "'caption'", "vqa": "'answers'", "question": "'question'"}
        return (
            FAILED,
            f"none of the records read has a {' or '.join(kinds)}: expected a field {' or '.join(map(fields.__getitem__, kinds))}",
        )
    if config.stage == "stage1":
        ids = case.tokenizer(texts).input_ids
        limit, key, lengths = config.qformer.max_text_tokens, "qformer.max_text_tokens", [len(row) for row in ids]
        unknown = sum(row.count(case.tokenizer.unk_token_id) for row in ids) / sum(lengths)
        if unknown > UNKNOWN_TOKENS:
            worst = WARNING
            remarks.append(
                f"{unknown:.1%} of their tokens are unknown to qformer.tokenizer: take one of their language"
            )
    else:
        assert case.llm is not None
        limit, key = config.llm.max_target_tokens, "llm.max_target_tokens"
        lengths = [case.llm.count_target_tokens([config.llm.prompt], [t], max_target_tokens=10**6) for t in texts]
    cut = sum(n > limit for n in lengths) / len(lengths)
    if cut > CUT_CAPTIONS:
        worst = WARNING
        enough = sorted(lengths)[math.ceil(0.99 * len(lengths)) - 1]
        remarks.append(f"{cut:.1%} are longer than {key}={limit} and would be cut: {enough} holds 99 % of them")
    distinct = len(set(texts))
    if config.stage == "stage1" and distinct < 0.1 * len(texts):
        worst = WARNING
        remarks.append(
            "equal captions are no negatives of each other, so that contrast and matching learn from the rest"
        )
    shape = (
        f"{len(texts)} {'captions' if list(kinds) == ['caption'] else 'texts'} of {min(lengths)} to {max(lengths)} tokens, {sum(lengths) / len(lengths):.3g} on average, "
        f"{distinct} of them distinct"
    )
    return worst, "; ".join([shape, *(remarks or [f"{key}={limit} holds them"])])


def check_static_memory(case: Case) -> Verdict:
    """What is there before any image: frozen weights; trainable ones with gradient and two moments in float32."""
    assert case.encoder is not None
    assert case.adapter is not None
    copies = 4 if case.processes == 1 else 5  # across processes gradients are also held in buckets
    frozen, learning = parameter_bytes(case.encoder), copies * parameter_bytes(case.adapter)
    if case.config.tune.encoder == "full":
        frozen, learning = 0, learning + copies * 4 * sum(p.numel() for p in case.encoder.parameters())
    if case.llm is not None:
        frozen += resident_bytes(case.llm, case.config.llm.quantise)
    case.static_bytes = frozen + learning
    text = (
        f"{size(frozen)} frozen, {size(case.static_bytes - frozen)} trainable with gradients and moments; "
        f"{size(case.free_bytes)} free"
    )
    if case.static_bytes > case.free_bytes:
        return (
            FAILED,
            f"{text}: these models do not fit; set llm.dtype or encoder.dtype to bfloat16, or take smaller ones",
        )
    return OK, text


def size(n_bytes: float) -> str:
    """In decimal units, as disks are sold."""
    unit, name = (1e9, "GB") if n_bytes >= 1e8 else (1e6, "MB") if n_bytes >= 1e5 else (1e3, "kB")
    return f"{n_bytes / unit:.3g} {name}"


def _tokens(encoder: FrozenEncoder) -> str:
    return f"{encoder.num_tokens or 'a varying number of'} tokens of {encoder.width}"


def _model_verdict(text: str, model: nn.Module, weights: Weights | None, warned: list[str]) -> Verdict:
    parameters = sum(p.numel() for p in model.parameters())
    if parameters:
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        text += f"; {parameters / 1e6:.3g} M parameters, {size(parameter_bytes(model))} in {dtype}"
        text += "; random weights" if weights is None else f"; weights: {_fetched(weights)}"
    return (WARNING, "; ".join([text, *warned])) if warned else (OK, text)


def _fetched(weights: Weights) -> str:
    amount = size(weights.size_bytes) if weights.size_bytes else "of unknown size"
    return f"{weights.place}, {amount}" + (", to be fetched" if weights.to_fetch else "")


def _missing_cache(case: Case) -> str:
    """What to say where `data.features` is not there yet, with the room that it will take."""
    config, room = case.config, ""
    encoder = outline_encoder(config.encoder)
    if encoder.num_tokens is not None:
        pictures = len(build_dataset(dataclasses.replace(config.data, features=None), encoder, "train", 0))
        needed = 2 * pictures * encoder.num_tokens * encoder.width
        free = shutil.disk_usage(existing(Path(str(config.data.features)))).free
        room = f" (up to {size(needed)} for {pictures} records in bfloat16; {size(free)} free)"
    return (
        f"data.features={config.data.features} is not there; write it first with stages/cache_features.py and this "
        f"config{room}"
    )


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what our own code warns of."""
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    ours = logging.getLogger("qformer")
    ours.addHandler(handler)
    try:
        yield warned
    finally:
        ours.removeHandler(handler)
