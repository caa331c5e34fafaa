"""The README.md of an export: what it is, how near it came to ours, and a few lines of code that run it."""

from typing import Any, NamedTuple

from qformer.card import card
from qformer.config import Stage2Part
from qformer.keys import Report
from qformer.text import PROMPTS

CARD, REST = "README.md", "projection.safetensors"
VISUAL_PROMPTS, PROMPT_EMBEDS = "visual_prompts.safetensors", "prompt_embeds.safetensors"

GENERATION = """
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(".", backend="pil")  # resizes as ours does, see above
model = AutoModelForImageTextToText.from_pretrained(".")
inputs = processor(images=Image.open("picture.png"), text="{prompt}", return_tensors="pt")
ids = model.generate(**inputs, num_beams={beams}, max_new_tokens={tokens}, min_new_tokens={at_least}){without_prompt}
print(processor.batch_decode(ids, skip_special_tokens=True)[0].strip())
"""

RETRIEVAL = """
from PIL import Image
from transformers import AutoProcessor, Blip2ForImageTextRetrieval

processor = AutoProcessor.from_pretrained(".", backend="pil")  # resizes as ours does, see above
model = Blip2ForImageTextRetrieval.from_pretrained(".").eval()
inputs = processor(images=Image.open("picture.png"), text="a photo of a cat", return_tensors="pt")
print(model(**inputs).logits_per_image)  # cosine similarity
print(model(**inputs, use_image_text_matching_head=True).logits_per_image.softmax(1))  # no match, match
"""

UNTOKENIZED = """
import torch
from PIL import Image
from transformers import AutoImageProcessor, {auto}

processor = AutoImageProcessor.from_pretrained(".", backend="pil")  # resizes as ours does, see above
model = {auto}.from_pretrained(".").eval()
pixel_values = processor(images=Image.open("picture.png"), return_tensors="pt").pixel_values
ids = torch.tensor([[0, 1, 2]])  # of the tokenizer that the Q-Former was trained with, which is not here
{run}
"""
UNTOKENIZED_STAGE1 = (
    "print(model(pixel_values=pixel_values, input_ids=ids, attention_mask=torch.ones_like(ids)).logits_per_image)"
)
UNTOKENIZED_STAGE2 = """visual_prompt = model.get_image_features(
    pixel_values, qformer_input_ids=ids, qformer_attention_mask=torch.ones_like(ids)
).pooler_output"""
PROCESSOR = (
    'images: `backend="pil"` resizes as ours does; transformers\' torchvision processor, the default where torchvision is '
    "installed, differs from it by up to 8/255 a pixel on photographs"
)

QFORMER = """
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

qformer, rest = AutoModel.from_pretrained(".").eval(), load_file("{rest}")
features = torch.randn(1, 9, {width})  # yours: float[B, N, {width}], {features}
features = F.layer_norm(features, features.shape[2:], rest["post_layernorm.weight"], rest["post_layernorm.bias"], {eps})
queries = rest["query_tokens"].expand(len(features), -1, -1){read}
hidden = qformer(query_embeds={embeds}, query_length={queries}, encoder_hidden_states=features).last_hidden_state
{name} = F.linear(hidden[:, :{queries}], rest["{projection}.weight"], rest["{projection}.bias"])
"""
READ = """
ids = AutoTokenizer.from_pretrained(".")("{prompt}", return_tensors="pt").input_ids
words = rest["embeddings.word_embeddings.weight"][ids] + rest["embeddings.position_embeddings.weight"][: ids.shape[1]]"""

EMBEDDED = """
import torch
from safetensors.torch import load_file
from transformers import {auto}, AutoTokenizer

llm, tokenizer = {auto}.from_pretrained("{llm}"), AutoTokenizer.from_pretrained("{llm}")
prompt_embeds = load_file("{file}")["{image}"].to(llm.dtype)
ids = llm.generate(inputs_embeds=prompt_embeds[None], max_new_tokens={tokens})
print(tokenizer.decode(ids[0], skip_special_tokens=True))
"""
LORA = (
    " The language model learnt too: it is asked with the LoRA in `llm_lora` "
    '(`PeftModel.from_pretrained(llm, "llm_lora")`, vLLM: `--lora-modules`).'
)
SERVER = """
A server of the language model that takes prompt embeddings (vLLM: `--enable-prompt-embeds`) is sent the same tensor:

```python
import base64, io

buffer = io.BytesIO()
torch.save(prompt_embeds, buffer)
embeds = base64.b64encode(buffer.getvalue()).decode()
client.completions.create(
    model="{llm}", prompt=None, max_tokens={tokens}, temperature=0, stop="\\n", extra_body={{"prompt_embeds": embeds}}
)
```
"""


class ExportReport(NamedTuple):
    """What was written: transformers' class, why this one, what became of our tensors, and how far its outputs are off."""

    architecture: str
    why: str
    keys: Report
    differences: dict[str, float]

    @property
    def far(self) -> str:
        """The differences in words."""
        return ", ".join(f"{name} {value:.1e}" for name, value in self.differences.items())

    def lines(self) -> list[str]:
        """Plain words, a line each."""
        return [
            f"{self.architecture}: {self.why}",
            *self.keys.lines("this adapter"),
            f"largest difference to ours when transformers runs it (float32): {self.far}",
        ]


def of_whole(config: Any, report: ExportReport, encoder_decoder: bool) -> str:
    """Card of a whole model."""
    code = RETRIEVAL
    if config.stage == "stage2":
        without = "" if encoder_decoder else '[:, inputs["input_ids"].shape[1] :]'
        settings = {
            "beams": config.llm.num_beams,
            "tokens": config.llm.caption_max_new_tokens,
            "at_least": config.llm.caption_min_new_tokens,
        }
        code = GENERATION.format(prompt=_quoted(config.llm.prompt), without_prompt=without, **settings)
        question = config.llm.vqa_prompt or PROMPTS["vqa_encoder_decoder" if encoder_decoder else "vqa_decoder_only"]
        code += f'# a question: text="{_quoted(question.format("what is this?"))}"\n'
    return _card(config, report, code, whole=True)


def of_untokenized(config: Any, report: ExportReport) -> str:
    """Card of a whole model whose Q-Former reads text and came without a tokenizer."""
    run = UNTOKENIZED_STAGE2 if config.stage == "stage2" else UNTOKENIZED_STAGE1
    return _card(config, report, UNTOKENIZED.format(auto=report.architecture, run=run), whole=True)


def of_qformer(config: Any, report: ExportReport, width: int) -> str:
    """Card of a Q-Former alone; `width` is Dv."""
    stage2 = config.stage == "stage2"
    instructed = config.stage == "stage2" and config.stage2.instructed
    queries, words = config.qformer.queries, "words.expand(len(features), -1, -1)"
    code = QFORMER.format(
        rest=REST,
        width=width,
        features=f"of {config.encoder.id or 'your encoder'}, block {config.encoder.block}, before its final norm",
        eps=config.qformer.feature_norm_eps,
        read=READ.format(prompt=_quoted(config.llm.prompt)) if config.stage == "stage2" and instructed else "",
        embeds=f"torch.cat([queries, {words}], 1)" if instructed else "queries",
        queries=queries,
        name="visual_prompt" if stage2 else "image_embeds",
        projection="language_projection" if stage2 else "vision_projection",
    )
    after = (
        f"`visual_prompt` float[B, {queries}, Dl] stands before the embedded text of `{config.llm.id}`: "
        "`inputs_embeds=torch.cat([visual_prompt, words], 1)`.\n"
        if config.stage == "stage2"
        else "`F.normalize(image_embeds, dim=-1)` are the contrastive embeddings, one a query.\n"
    )
    return _card(config, report, code) + "\n" + after


def of_visual_prompts(config: Stage2Part, encoder_decoder: bool, prompt: str, image: str, *, lora: bool = False) -> str:
    """Card of visual prompts, with an image of theirs as the example; `lora`: the folder has one of the language model."""
    values = {"llm": config.llm.id, "tokens": config.llm.caption_max_new_tokens}
    auto = "AutoModelForSeq2SeqLM" if encoder_decoder else "AutoModelForCausalLM"
    code = EMBEDDED.format(auto=auto, file=PROMPT_EMBEDS, image=_quoted(image), **values)
    return (
        f"# Visual prompts for `{config.llm.id}`\n\n`{VISUAL_PROMPTS}` holds float32[{config.qformer.queries}, Dl] by "
        f"image: what a Q-Former saw, in the language model's input space. `{PROMPT_EMBEDS}` holds float32[L, Dl] by image: "
        f'the visual prompt and the embedded text "{_quoted(prompt)}", as the language model reads them; for another text, '
        f"[visual prompt; text] with its embeddings.{LORA if lora else ''}\n\n```python{code}```\n"
        + ("" if encoder_decoder else SERVER.format(**values))
    )


def _card(config: Any, report: ExportReport, code: str, whole: bool = False) -> str:
    facts = [
        report.why,
        f"largest difference to the adapter it was made from, on one image in float32: {report.far}",
        *([PROCESSOR] if whole else []),
        *report.keys.lines("the adapter"),
    ]
    return card(f"A Q-Former as transformers' {report.architecture}", config, facts, code)


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
