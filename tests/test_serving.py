"""Servers of what we hand on: the chat API of a whole model, and a plain language model that is sent embeddings."""

import base64
import importlib.util
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from qformer.interop.export import export
from tests.test_asking import TEMPLATE
from tests.test_export import llama, of_transformers, picture, run_card, run_export, trained

REPO = Path(__file__).resolve().parent.parent
QUESTION = 'What colour is the "Square"?'


def example(name: str):
    """A script of examples/serving as a module."""
    path = REPO / "examples" / "serving" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return of_transformers(tmp_path_factory.mktemp("vit"), "ViT")


@pytest.fixture(scope="module", params=["opt", "t5"])
def served(request, tiny, vit, tmp_path_factory):
    """Ours, and its export as transformers loads it."""
    folder = tmp_path_factory.mktemp(request.param)
    ours = trained(folder, tiny, 2, vit, f"llm.id={getattr(tiny, request.param)}", "llm.prompt=a photo of")
    export(ours.model, ours.config, folder / "out")
    return ours, folder / "out"


def turn(text: str = "", image=None) -> dict:
    parts = [] if image is None else [{"type": "image", "image": image}]
    return {"role": "user", "content": [*parts, *([{"type": "text", "text": text}] if text else [])]}


def chat(out: Path, turns: list[dict], tokens: int) -> str:
    """What transformers' chat API writes."""
    processor = AutoProcessor.from_pretrained(out, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(out)
    inputs = processor.apply_chat_template(
        turns,
        chat_template=processor.tokenizer.chat_template,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    ids = model.generate(**inputs, max_new_tokens=tokens, num_beams=1)[0]
    ids = ids if model.config.text_config.is_encoder_decoder else ids[inputs["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True).strip()


def test_a_picture_alone_in_a_chat_is_captioned_as_ours_captions_it(served):
    ours, out = served
    expected = ours.caption([picture()], num_beams=1, max_new_tokens=6, min_new_tokens=0)[0]
    assert chat(out, [turn(image=picture())], 6) == expected != ""


def test_a_text_beside_a_picture_in_a_chat_is_a_question_cleaned_and_put_as_ours_puts_it(served):
    ours, out = served
    settings = {"num_beams": 1, "max_new_tokens": 5}
    first = ours.answer([picture(1)], [QUESTION], **settings)[0]
    assert chat(out, [turn(QUESTION, picture(1))], 5) == first
    turns = [turn(QUESTION, picture(1)), {"role": "assistant", "content": "red"}, turn("And the Dot?")]
    expected = ours.answer([picture(1)], ["And the Dot?"], history=[(QUESTION, "red")], **settings)[0]
    assert chat(out, turns, 5) == expected


def test_a_rendered_chat_is_the_prompt_of_ours_letter_by_letter(served):
    ours, out = served
    processor = AutoProcessor.from_pretrained(out)
    turns = [turn(QUESTION), {"role": "assistant", "content": "red"}, {"role": "user", "content": "is it * big?"}]
    (expected,) = ours._prompts("is it * big?", None, history=[(QUESTION, "red")], prompt=None)
    bos = "" if ours.model.llm.is_encoder_decoder else "</s>"
    assert processor.tokenizer.apply_chat_template(turns, tokenize=False) == bos + expected
    assert processor.tokenizer.apply_chat_template([turn()], tokenize=False) == bos + "a photo of"


# A plain language model


def test_the_bytes_sent_are_visual_prompt_and_embedded_text(tiny, tmp_path):
    ours = trained(tmp_path, tiny, 2, {}, f"llm.id={tiny.opt}", "llm.prompt=a photo of")
    llm = ours.model.llm
    rows = ours.model.prompt_embeds(ours.encode([picture(), picture(1)]), ["a photo of", "red"])
    for i, (prompt, row) in enumerate(zip(["a photo of", "red"], rows, strict=True)):
        sent = torch.load(io.BytesIO(base64.b64decode(example("prompt_embeds").encode(row))), weights_only=True)
        with torch.no_grad():
            visual = ours.model.visual_prompt(ours.encode([picture(i)]), [prompt])[0]
            words = llm.embed(llm.tokenizer(prompt, return_tensors="pt").input_ids)[0]
        assert sent.dtype == torch.float32
        assert torch.equal(sent, torch.cat([visual, words]))
        plain = AutoModelForCausalLM.from_pretrained(tiny.opt)
        ids = plain.generate(inputs_embeds=sent[None], max_new_tokens=6, eos_token_id=llm._stop_ids)
        expected = ours.caption([picture(i)], prompt, num_beams=1, max_new_tokens=6, min_new_tokens=0)[0]
        assert llm._text(ids[0].tolist()) == expected


def test_visual_prompts_of_a_chat_stand_inside_its_template(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "llm"
    llama(folder, tiny)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    ours = trained(tmp_path, tiny, 2, {}, f"llm.id={folder}", "llm.chat=true", "llm.prompt=what is red")
    picture().save(tmp_path / "one.png")
    run_export(tmp_path, tmp_path / "out", "--visual-prompts", tmp_path / "one.png")
    (row,) = load_file(tmp_path / "out" / "prompt_embeds.safetensors").values()
    (visual,) = load_file(tmp_path / "out" / "visual_prompts.safetensors").values()
    before = len(ours.model.llm._before("what is red"))
    assert before > 0
    assert torch.equal(row[before : before + len(visual)], visual)
    printed, _ = run_card(tmp_path / "out", monkeypatch)
    expected = ours.caption([picture()], num_beams=1, min_new_tokens=0)[0]
    assert printed.strip() == expected != ""
