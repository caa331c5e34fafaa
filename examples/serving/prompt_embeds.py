"""Ask a server of the plain language model about pictures, with our encoder and Q-Former as its client.

    vllm serve facebook/opt-2.7b --enable-prompt-embeds
    python examples/serving/prompt_embeds.py runs/s2 one.jpg two.jpg                      # captions
    python examples/serving/prompt_embeds.py runs/s2 one.jpg --question "what is this?"

The server holds the frozen language model as it is (decoder-only) and knows nothing of pictures: it is sent visual prompt
and embedded text. Greedy, so that it writes what `load("runs/s2").caption(..., num_beams=1)` writes. See docs/serving.md.
"""

import argparse
import base64
import io
import json
import urllib.error
import urllib.request
from typing import Any

import torch

from qformer.inference import load


def encode(embeds: torch.Tensor) -> str:
    """A row float[L, Dl] as the API takes it: torch's file format in base64."""
    buffer = io.BytesIO()
    torch.save(embeds.cpu().contiguous().clone(), buffer)  # a slice would bring all of what it was cut from
    return base64.b64encode(buffer.getvalue()).decode()


def complete(url: str, request: dict[str, Any], timeout: float = 60) -> str:
    """What the server writes, up to a line's end, as in training."""
    body = json.dumps({"temperature": 0, "stop": ["\n"], **request}).encode()
    headers = {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/v1/completions", body, headers), timeout=timeout
        ) as reply:
            text: str = json.load(reply)["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{url}: {error}: {error.read().decode()[:300]}") from None
    except OSError as error:
        raise SystemExit(f"{url}: {error}; start the server first") from None
    return text.strip()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="stage-2 adapter folder, or its run's")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--question", help="a question; default: captions")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="the model's name at the server; default: llm.id")
    args = parser.parse_args(argv)
    ours = load(args.adapter)
    model: Any = ours.model
    config: Any = ours.config
    if config.stage != "stage2":
        raise SystemExit(f"{args.adapter} is of stage 1; expected stage 2, with a language model")
    llm = config.llm
    prompt = ours.ask(args.question) if args.question else llm.prompt
    length = llm.vqa_max_new_tokens if args.question else llm.caption_max_new_tokens
    rows = model.prompt_embeds(ours.encode(args.pictures), [prompt] * len(args.pictures))
    for picture, embeds in zip(args.pictures, rows, strict=True):
        request = {"model": args.model or llm.id, "prompt_embeds": encode(embeds), "max_tokens": length}
        print(f"{picture}: {complete(args.url, request)}")


if __name__ == "__main__":
    main()
