"""A chat template for exports, so that servers with a chat API prompt the model as we do: a picture alone asks for a
caption, a text beside it is a question.
"""

import json
import string

from qformer.data import clean_question
from qformer.language import FrozenLanguageModel

# Turns as `VisionLanguageModel.answer` writes its history; content is a text or a list of parts, by the server.
_TEMPLATE = string.Template("""\
{{- $bos -}}
{%- for message in messages -%}
{%- set words = namespace(text="") -%}
{%- if message["content"] is string -%}
{%- set words.text = message["content"] -%}
{%- else -%}
{%- for part in message["content"] if part["type"] == "text" -%}
{%- set words.text = words.text + part["text"] -%}
{%- endfor -%}
{%- endif -%}
{%- if message["role"] == "assistant" -%}
{{- " " + words.text + "\\n " -}}
{%- elif message["role"] == "user" -%}
{%- for mark in $marks -%}
{%- set words.text = words.text.replace(mark, "") -%}
{%- endfor -%}
{%- set question = (words.text | lower).split() | join(" ") -%}
{{- $question.replace("{}", question) if question else $caption -}}
{%- endif -%}
{%- endfor -%}
""")


def chat_template(llm: FrozenLanguageModel, prompt: str, vqa_prompt: str) -> str:
    """Jinja that writes what the language model reads behind the visual prompt.

    Args:
        llm: its BOS is written, since some servers add none to a rendered chat.
        prompt: of a caption.
        vqa_prompt: of a question, {} in its place.
    """
    tokenizer = llm.tokenizer
    bos = str(tokenizer.bos_token) if llm.facts.bos_ids == [tokenizer.bos_token_id] else ""
    marks = [mark for mark in string.punctuation if not clean_question(mark)]
    values = {"bos": bos, "marks": marks, "question": vqa_prompt, "caption": prompt}
    return _TEMPLATE.substitute({name: json.dumps(value, ensure_ascii=False) for name, value in values.items()})
