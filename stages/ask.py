"""Ask a frozen language model about a picture it sees through a trained Q-Former.

python stages/ask.py runs/s2/adapter picture.jpg "what colour is the car?" "how many wheels?"
python stages/ask.py runs/s2/adapter picture.jpg        # a conversation; an empty line ends it
"""

import argparse
from pathlib import Path
from typing import Any

from qformer.config.help import HelpFormatter
from qformer.environment import prepare_environment


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("adapter", type=Path, help="adapter folder of stage 2")
    parser.add_argument("picture", help="a picture (or a feature file, if the adapter was trained on features)")
    parser.add_argument("question", nargs="*", help="questions; none = a conversation")
    parser.add_argument("--sample", action="store_true", help="sample (nucleus 0.9) instead of beam search")
    args = parser.parse_args(argv)
    # Only now what imports torch.
    prepare_environment()
    from qformer.inference import load
    from qformer.launch import reported_errors

    with reported_errors():
        if not Path(args.picture).is_file():
            raise ValueError(f"no picture {args.picture}")
        model = load(args.adapter)
        generation: dict[str, Any] = {"do_sample": True, "num_beams": 1} if args.sample else {}
        if args.question:
            for answer in model.answer([args.picture], args.question, **generation):
                print(answer)
            return
        print(model.caption([args.picture], **generation)[0])
        turns: list[str] = []
        while question := _read_line():
            answer = _answer(model, args.picture, question, turns, generation)
            print(answer)
            turns.append(f"{model.vqa_prompt.format(question)} {answer}\n")


def _answer(model: Any, picture: str, question: str, turns: list[str], generation: dict[str, Any]) -> str:
    """Answer with the conversation so far before the question; its oldest turns are forgotten when it grows too long."""
    from qformer.language import PromptTooLong

    while True:
        try:
            return model.answer([picture], [question], [" ".join(turns)], **generation)[0]
        except PromptTooLong:
            if not turns:
                raise
            del turns[0]


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    main()
