"""Servers of what we hand on: the chat API of a whole model, and a plain language model that is sent embeddings."""

import base64
import contextlib
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from qformer.interop.export import export
from tests.test_asking import TEMPLATE
from tests.test_export import llama, of_transformers, picture, run_card, run_export, trained

REPO = Path(__file__).resolve().parent.parent
# Modules with weight and bias of Blip2ForConditionalGeneration over OPT in vLLM 0.32, by its own `named_parameters()`.
VLLM_MODULES = """
    vision_model.embeddings.patch_embedding vision_model.post_layernorm qformer.layernorm language_projection
    vision_model.encoder.layers.N.self_attn.qkv vision_model.encoder.layers.N.self_attn.projection
    vision_model.encoder.layers.N.layer_norm1 vision_model.encoder.layers.N.layer_norm2
    vision_model.encoder.layers.N.mlp.fc1 vision_model.encoder.layers.N.mlp.fc2
    qformer.encoder.layer.N.attention.attention.query qformer.encoder.layer.N.attention.attention.key
    qformer.encoder.layer.N.attention.attention.value qformer.encoder.layer.N.attention.output.dense
    qformer.encoder.layer.N.attention.output.LayerNorm qformer.encoder.layer.N.crossattention.attention.query
    qformer.encoder.layer.N.crossattention.attention.key qformer.encoder.layer.N.crossattention.attention.value
    qformer.encoder.layer.N.crossattention.output.dense qformer.encoder.layer.N.crossattention.output.LayerNorm
    qformer.encoder.layer.N.intermediate_query.dense qformer.encoder.layer.N.output_query.dense
    qformer.encoder.layer.N.output_query.LayerNorm language_model.model.decoder.final_layer_norm
    language_model.model.decoder.layers.N.self_attn.qkv_proj language_model.model.decoder.layers.N.self_attn.out_proj
    language_model.model.decoder.layers.N.self_attn_layer_norm language_model.model.decoder.layers.N.final_layer_norm
    language_model.model.decoder.layers.N.fc1 language_model.model.decoder.layers.N.fc2
"""
VLLM_TENSORS = """
    query_tokens vision_model.embeddings.class_embedding vision_model.embeddings.position_embedding
    language_model.model.decoder.embed_tokens.weight language_model.model.decoder.embed_positions.weight
"""
QUESTION = 'What colour is the "Square"?'


def example(name: str):
    """A script of examples/serving as a module."""
    path = REPO / "examples" / "serving" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def running(command: list[Any], log: Path, environment: dict[str, str], seconds: float) -> Iterator[str]:
    """A server that takes --host and --port and answers /health; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address, until = f"http://127.0.0.1:{port}", time.monotonic() + seconds
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            time.sleep(0.5)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


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


@pytest.mark.parametrize("served", ["opt"], indirect=True)
def test_an_export_holds_the_tensors_of_vllms_modules_and_no_other(served):
    expected = {f"{name}.{kind}" for name in VLLM_MODULES.split() for kind in ("weight", "bias")} | {
        *VLLM_TENSORS.split()
    }
    names = {re.sub(r"\.\d+\.", ".N.", name) for name in load_file(served[1] / "model.safetensors")}
    # vLLM puts these into one matrix, and ties the output layer to the embeddings itself.
    assert {re.sub(r"\b[qkv]_proj\b", "qkv_proj", name) for name in names} == expected


def post(address: str, request: dict) -> Any:
    body, headers = json.dumps(request).encode(), {"Content-Type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=60).read().decode()


def test_transformers_serve_writes_what_ours_writes(served, tmp_path):
    if not is_serve_available():
        pytest.skip("transformers serve needs fastapi, uvicorn, pydantic and openai, which are not installed")
    ours, out = served
    template = json.dumps({"chat_template": (out / "chat_template.jinja").read_text()})
    command = [Path(sys.executable).with_name("transformers"), "serve", out, "--device", "cpu"]
    command += ["--chat-template-kwargs", template]
    buffer = io.BytesIO()
    picture(1).save(buffer, "png")
    data = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": QUESTION}]
    request = {"model": str(out), "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 5}
    expected = ours.answer([picture(1)], [QUESTION], num_beams=1, max_new_tokens=5)[0]
    with running(command, tmp_path / "log", dict(os.environ), 300) as address:
        events = post(f"{address}/v1/chat/completions", request | {"stream": True}).splitlines()
        parts = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
        assert "".join(part["choices"][0]["delta"].get("content") or "" for part in parts).strip() == expected
        whole = json.loads(post(f"{address}/v1/chat/completions", request))["choices"][0]["message"]["content"]
        if not ours.model.llm.is_encoder_decoder:  # of those the server cuts off the answer: docs/serving.md
            assert whole.strip() == expected


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


def a_chat(folder: Path, tiny) -> Path:
    """A decoder-only model whose tokenizer has a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(llama(folder, tiny))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_visual_prompts_of_a_chat_stand_inside_its_template(tiny, tmp_path, monkeypatch):
    llm = a_chat(tmp_path / "llm", tiny)
    ours = trained(tmp_path, tiny, 2, {}, f"llm.id={llm}", "llm.chat=true", "llm.prompt=what is red")
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


def test_an_export_of_a_chat_says_that_its_visual_prompt_stands_elsewhere(tiny, vit, tmp_path):
    llm = a_chat(tmp_path / "llm", tiny)
    ours = trained(tmp_path, tiny, 2, vit, f"llm.id={llm}", "llm.chat=true", "llm.prompt=what is red")
    report = export(ours.model, ours.config, tmp_path / "out")
    assert any(note.startswith("llm.chat=true: here the visual prompt stands inside") for note in report.keys.notes)
    assert "--visual-prompts" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE  # its own
