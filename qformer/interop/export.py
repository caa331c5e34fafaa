"""Our models as folders of transformers: whole where the encoder fits Blip2VisionModel, else the Q-Former alone.

Every export is loaded again by transformers and compared with ours before it is kept.
Source: Blip2 and InstructBlip of transformers 5 (models, processors); what vLLM asks of such a folder.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AddedToken,
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from qformer.bert import DEC, IMAGE, lacks_dec
from qformer.checkpoint import trainable_tensors
from qformer.encoders import FrozenEncoder
from qformer.files import atomic_folder
from qformer.interop import cards
from qformer.interop.cards import CARD, REST, ExportReport
from qformer.interop.chat_template import chat_template
from qformer.interop.keys import BLIP2, INSTRUCT_BLIP
from qformer.interop.parity import (
    TOLERANCE,
    Model,
    difference,
    ids_for_no_tokenizer,
    run_ours,
    run_qformer,
    run_whole,
)
from qformer.interop.vision import Converted, DoesNotFit, to_blip2_vision
from qformer.keys import Report
from qformer.language import FrozenLanguageModel
from qformer.lora import Lora
from qformer.tuning import ENCODER, LLM_LORA, merge_into_frozen

RESAMPLE = {"bilinear": 2, "bicubic": 3}  # PIL's numbers

CHAT = (
    "llm.chat=true: here the visual prompt stands inside the chat template, and transformers' processor and vLLM put it "
    "before all text; the same texts come from embeddings that are sent whole, see --visual-prompts"
)

Config = Any  # Stage1Part or Stage2Part, by its `stage`


class _Classes(NamedTuple):
    model: Any
    processor: Any
    config: Any
    vision: Any
    qformer: Any


_BLIP2 = (Blip2Processor, Blip2Config, Blip2VisionConfig, Blip2QFormerConfig)
RETRIEVAL = _Classes(Blip2ForImageTextRetrieval, *_BLIP2)
GENERATION = _Classes(Blip2ForConditionalGeneration, *_BLIP2)
INSTRUCTED = _Classes(
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipConfig,
    InstructBlipVisionConfig,
    InstructBlipQFormerConfig,
)


def export(model: Model, config: Config, out: Path, image: Image.Image | None = None) -> ExportReport:
    """Write a model as a folder of transformers, load it there and compare; nothing is left where outputs differ.

    Weights are stored in the dtype they have here, LoRAs merged into them (and so into `model`). The comparison holds both models at once, in float32.

    Args:
        model: on the CPU.
        config: the one that `model` was built from.
        image: what the comparison looks at; None = random pixels.

    Raises: ValueError when `out` exists, or an output differs by more than TOLERANCE.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; name a folder that does not, or remove it")
    side = 1 if model.encoder.input_transform is None else model.encoder.input_transform.size
    if image is None:
        pixels = torch.randint(256, (side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        image = Image.fromarray(pixels.numpy())
    encoder = f"the encoder ({config.encoder.loader} {config.encoder.id}".rstrip() + ")"
    with atomic_folder(out) as folder, ids_for_no_tokenizer(model) as without_tokenizer:
        learnt = _write_learnt(model, folder)
        merge_into_frozen(model)
        try:
            converted: Converted | None = _fitting(model, encoder)
            why = f"the whole model, because {encoder} up to block {config.encoder.block} fits Blip2VisionModel"
        except DoesNotFit as reason:
            converted, why = None, f"the Q-Former alone, because {reason}"
        if converted:
            for path in learnt:  # merged
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            architecture, keys = _write_whole(model, config, converted, folder, without_tokenizer=without_tokenizer)
        else:
            architecture, keys = _write_qformer(model, config, folder, without_tokenizer)
            keys = keys._replace(notes=tuple(f"{path.name}: {note}" for path, note in learnt.items()))
        keys = keys._replace(notes=(*keys.notes, *_notes_on_tokens(model, config, without_tokenizer)))
        if converted and model.name == "stage2" and model.llm.chat is not None:
            keys = keys._replace(notes=(*keys.notes, CHAT))
        features, ours = run_ours(model, image)
        theirs = run_whole(model, folder, image) if converted else run_qformer(model, folder, features)
        differences = {name: difference(ours[name], value) for name, value in theirs.items()}
        if not all(value <= TOLERANCE for value in differences.values()):  # a NaN fails too
            far = ", ".join(f"{name} by {value:.1e}" for name, value in differences.items())
            hint = ""
            if converted and (eps := converted.config["layer_norm_eps"]) != config.qformer.feature_norm_eps:
                hint = (
                    f"; transformers has one eps for all norms of an encoder: set qformer.feature_norm_eps={eps} in the "
                    f"adapter's config.yaml (now {config.qformer.feature_norm_eps}), see that it does as well, and export that"
                )
            raise ValueError(
                f"{out} was not written: {architecture} of transformers differs from this adapter ({far}), expected at "
                f"most {TOLERANCE}{hint}"
            )
        report = ExportReport(architecture, why, keys, differences)
        if not converted:
            card = cards.of_qformer(config, report, model.encoder.width)
        elif without_tokenizer:
            card = cards.of_untokenized(config, report)
        else:
            card = cards.of_whole(config, report, model.name == "stage2" and model.llm.is_encoder_decoder)
        (folder / CARD).write_text(card)
    return report


def _write_learnt(model: Model, folder: Path) -> dict[Path, str]:
    """Write what learnt beside the Q-Former, for where the models that it belongs to do not leave; what each path holds."""
    learnt: dict[Path, str] = {}
    for name, module in model.adapter.named_children():
        if isinstance(module, Lora):
            of = "language model" if name == LLM_LORA else "encoder"
            module.save_pretrained(folder / name)
            learnt[folder / name] = (
                f"the LoRA that the {of} learnt with this Q-Former, which means little without it; "
                f'peft: PeftModel.from_pretrained({of.replace(" ", "_")}, "{name}")'
            )
        elif name == ENCODER:
            path = folder / f"{name}.safetensors"
            save_file(trainable_tensors(module), path)
            learnt[path] = "the weights that the encoder learnt with this Q-Former, by the names of its own library"
    return learnt


def _notes_on_tokens(model: Model, config: Config, without_tokenizer: bool) -> list[str]:
    rows, name = model.adapter.qformer.vocab_size, config.qformer.tokenizer
    if rows is None:
        return []
    if without_tokenizer:
        return [
            "without a processor: qformer.tokenizer is empty, so the text side leaves as weights that read token ids"
        ]
    added = [DEC] if lacks_dec(name) else []
    added += [IMAGE] if IMAGE in model.tokenizer.get_vocab() else []
    return [f"{len(added)} of the {rows} word embeddings are not {name}'s: {', '.join(added)}"] if added else []


def _fitting(model: Model, encoder: str) -> Converted:
    if model.name == "stage2":
        text, llm = model.llm.model.config, model.llm
        if llm.is_encoder_decoder and text.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise DoesNotFit(f"transformers' Blip2 takes the language model {llm.name} for a decoder-only one")
        if llm.width != text.hidden_size:
            raise DoesNotFit(
                f"the language model {llm.name} has embeddings {llm.width} wide, and transformers' Blip2 projects to "
                f"the width of its layers, {text.hidden_size}"
            )
    try:
        return to_blip2_vision(model.encoder)
    except DoesNotFit as reason:
        raise DoesNotFit(f"{encoder} {reason}") from None


def _write_whole(
    model: Model, config: Config, converted: Converted, folder: Path, *, without_tokenizer: bool
) -> tuple[str, Report]:
    """Model and processor; the target is built without memory and takes our tensors over, so that none is held twice."""
    stage2 = model if model.name == "stage2" else None
    instructed = stage2 is not None and stage2.tokenizer is not None
    classes = INSTRUCTED if instructed else GENERATION if stage2 else RETRIEVAL
    queries, image_processor = config.qformer.queries, _image_processor(model.encoder)
    sizes = _qformer_sizes(model, config) | ({} if instructed else {"use_qformer_text_input": stage2 is None})
    values = {
        "num_query_tokens": queries,
        "vision_config": classes.vision(**converted.config),
        "qformer_config": classes.qformer(**sizes),
    }
    tensors, report = (INSTRUCT_BLIP if instructed else BLIP2).give(trainable_tensors(model.adapter))
    tensors |= {f"vision_model.{name}": tensor for name, tensor in converted.tensors.items()}
    parts = [image_processor]
    if stage2:
        tokenizers = [_llm_tokenizer(stage2.llm, folder)]
        if stage2.llm.chat is None:
            tokenizers[0].chat_template = chat_template(stage2.llm, config.llm.prompt, stage2.vqa_prompt)
        tokenizers[0].add_tokens([AddedToken(IMAGE, normalized=False, special=True)], special_tokens=True)
        parts += [*tokenizers, *([copy.deepcopy(stage2.tokenizer)] if instructed else [])]
        image_id = tokenizers[0].convert_tokens_to_ids(IMAGE)
        values |= {"image_token_index": image_id, "text_config": _text_config(stage2.llm, image_id)}
        tensors |= {f"language_model.{name}": t for name, t in _language_tensors(stage2.llm, image_id).items()}
    else:
        parts += [copy.deepcopy(model.tokenizer)]
        values["image_text_hidden_size"] = config.qformer.contrastive_width
    with torch.device("meta"):
        target = classes.model(classes.config(**values))
    if model.name == "stage1" and "logit_scale" in target.state_dict():
        tensors["logit_scale"] = -model.adapter.temperature.detach().cpu().log()
    target.load_state_dict(tensors, assign=True)
    if stage2:
        target.generation_config = copy.deepcopy(stage2.llm.model.generation_config)
    target.save_pretrained(folder)
    if not without_tokenizer:
        more = {"num_query_tokens": queries} if stage2 else {}
        classes.processor(*parts, **more).save_pretrained(folder)
    elif stage2:
        tokenizers[0].save_pretrained(folder)
    image_processor.save_pretrained(folder)  # where other programs look for it
    if stage2:  # not the dtype of the first tensor, which is the queries'
        target.config.dtype = str(stage2.llm.model.dtype).removeprefix("torch.")
        target.config.save_pretrained(folder)
    elif not without_tokenizer:  # the processor added <image>, for which there is no embedding and no use
        model.tokenizer.save_pretrained(folder)
    return classes.model.__name__, report


def _write_qformer(model: Model, config: Config, folder: Path, without_tokenizer: bool) -> tuple[str, Report]:
    """The Q-Former as Blip2QFormerModel; what Blip2's classes keep beside it goes into REST by their names."""
    tensors, report = BLIP2.give(trainable_tensors(model.adapter))
    rest = {n.removeprefix("vision_model."): t for n, t in tensors.items() if not n.startswith("qformer.")}
    sizes = _qformer_sizes(model, config) | {"use_qformer_text_input": model.adapter.qformer.vocab_size is not None}
    with torch.device("meta"):
        target = Blip2QFormerModel(Blip2QFormerConfig(**sizes))
    inside = {n.removeprefix("qformer."): t for n, t in tensors.items() if n.startswith("qformer.")}
    target.load_state_dict(inside, assign=True)
    target.save_pretrained(folder)
    save_file(rest, folder / REST, metadata={"post_layernorm_eps": str(model.adapter.feature_norm.eps)})
    if model.adapter.qformer.vocab_size is not None and not without_tokenizer:
        model.tokenizer.save_pretrained(folder)
    return Blip2QFormerModel.__name__, report


def _qformer_sizes(model: Model, config: Config) -> dict[str, Any]:
    ours = config.qformer
    text = {} if (words := model.adapter.qformer.vocab_size) is None else {"vocab_size": words}
    return text | {
        "hidden_size": ours.width,
        "num_hidden_layers": ours.layers,
        "num_attention_heads": ours.heads,
        "intermediate_size": ours.ffn_width,
        "hidden_dropout_prob": ours.dropout,
        "attention_probs_dropout_prob": ours.dropout,
        "max_position_embeddings": ours.max_text_positions,
        "cross_attention_frequency": ours.cross_attention_frequency,
        "encoder_hidden_size": model.encoder.width,
    }


def _image_processor(encoder: FrozenEncoder) -> Any:
    transform = encoder.input_transform
    assert transform is not None
    return BlipImageProcessorPil(
        size={"height": transform.size, "width": transform.size},
        image_mean=list(transform.mean),
        image_std=list(transform.std),
        resample=RESAMPLE[transform.interpolation],
    )


def _llm_tokenizer(llm: FrozenLanguageModel, scratch: Path) -> Any:
    """The language model's tokenizer, by way of its files, made to pad and to take `<image>` from Blip2Processor."""
    llm.tokenizer.save_pretrained(scratch)
    path = scratch / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for place in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        place.pop("image_token", None)  # of a multimodal family (Gemma 3): the processor stumbles over it
    path.write_text(json.dumps(settings))
    pad = {} if llm.tokenizer.pad_token else {"pad_token": llm.tokenizer.eos_token}
    return AutoTokenizer.from_pretrained(scratch, padding_side="right" if llm.is_encoder_decoder else "left", **pad)


def _text_config(llm: FrozenLanguageModel, image_id: int) -> Any:
    """The language model's config with what ends our texts: transformers' Blip2 generates by it."""
    text: Any = copy.deepcopy(llm.model.config)
    ends = llm.model.generation_config.eos_token_id
    text.architectures = [type(llm.model).__name__]
    text.vocab_size = max(llm.vocab_size, image_id + 1)
    text.eos_token_id = ends[0] if len(ends) == 1 else ends
    text.pad_token_id = llm.facts.pad_id
    if llm.is_encoder_decoder:
        text.decoder_start_token_id = llm.model.generation_config.decoder_start_token_id
    return text


def _language_tensors(llm: FrozenLanguageModel, image_id: int) -> dict[str, Tensor]:
    """The language model's tensors, with embedding rows up to that of `<image>`.

    A new row is the mean of the others: its logit, their mean, is never the largest, so that it is never generated.
    """
    state = {name: tensor.detach().cpu() for name, tensor in llm.model.state_dict().items()}
    added = image_id + 1 - llm.vocab_size
    if added <= 0:
        return state
    ends = [llm.model.get_input_embeddings(), llm.model.get_output_embeddings()]
    grows = {id(p) for module in ends if module is not None for p in module.parameters()}
    grown: dict[int, Tensor] = {}  # a tied head stays tied
    for name, parameter in llm.model.named_parameters(remove_duplicate=False):
        if id(parameter) in grows:
            rows = state[name].float().mean(0, keepdim=True).to(parameter.dtype).repeat_interleave(added, 0)
            state[name] = grown.setdefault(id(parameter), torch.cat([state[name], rows]))
    return state
