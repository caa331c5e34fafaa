"""Captions and answers of an export by vLLM's engine, without a server; for vLLM's own environment, which needs no qformer.

    python stages/export.py runs/s2 --to transformers OUT
    python examples/serving/vllm_engine.py OUT one.jpg two.jpg                            # captions
    python examples/serving/vllm_engine.py OUT one.jpg --prompt "Question: what is this? Answer:"

Prints a line a picture. Greedy, as `load("runs/s2").caption(..., num_beams=1)`. See docs/serving.md.
"""

import argparse

from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", help="folder that stages/export.py wrote, Blip2ForConditionalGeneration")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--prompt", default="", help="text after the visual prompt; default: none")
    parser.add_argument("--max-tokens", type=int, default=30)
    parser.add_argument("--max-model-len", type=int, help="positions; default: as many as the language model has")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    from vllm import LLM, SamplingParams

    llm = LLM(args.export, dtype=args.dtype, max_model_len=args.max_model_len, max_num_seqs=8, enforce_eager=True)
    settings = SamplingParams(temperature=0, max_tokens=args.max_tokens, stop=["\n"])
    rows = [{"prompt": args.prompt, "multi_modal_data": {"image": Image.open(p)}} for p in args.pictures]
    for picture, output in zip(args.pictures, llm.generate(rows, settings), strict=True):
        print(f"{picture}: {output.outputs[0].text.strip()}")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
