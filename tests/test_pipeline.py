"""Exports in transformers' own pipeline, which is how many tools run a model of images and text."""

import pytest
from test_export import LLMS, picture, trained, vit
from transformers import pipeline

from qformer.interop.export import export

__all__ = ["vit"]  # a fixture


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_image_text_to_text_says_of_an_export_what_the_adapter_says(tiny, vit, tmp_path, name):
    ours = trained(tmp_path, tiny, 2, vit, f"llm.id={LLMS[name](tmp_path / 'llm', tiny)}")
    export(ours.model, ours.config, tmp_path / "out")
    ask = pipeline("image-text-to-text", model=str(tmp_path / "out"), device="cpu")
    prompt = ours.ask("what colour is the square?")
    (output,) = ask(
        images=[picture()], text=[prompt], max_new_tokens=5, generate_kwargs={"num_beams": 1}, return_full_text=False
    )
    (answer,) = ours.answer([picture()], ["what colour is the square?"], num_beams=1, max_new_tokens=5)
    assert output["generated_text"].strip() == answer
    assert answer
