"""Ask a frozen language model about an image it sees through a trained Q-Former.

python stages/ask.py runs/s2/adapter photo.jpg "what colour is the car?" "how many wheels?"
python stages/ask.py runs/s2/adapter photo.jpg "is it a dog?" --choose-from yes no
python stages/ask.py runs/s2/adapter photo.jpg "what colour?" --choose-from red blue --choose-by pmi
python stages/ask.py runs/s2/adapter photo.jpg        # a conversation; an empty line ends it
python stages/ask.py runs/s2/adapter left.jpg "are both cars red?" --also right.jpg
python stages/ask.py runs/s2/adapter clip.mp4 "what happens?"    # pip install 'qformer[video]'
"""

import argparse
import sys
from typing import Any

from qformer.config.help import HelpFormatter
from qformer.config.protocol import CHOOSE_BY, PMI
from qformer.environment import prepare_environment
from qformer.messages import EMPTY_ANSWER


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("adapter", help="stage 2's run folder or its adapter folder, or a hub id")
    parser.add_argument("picture", help="an image or a clip (or a feature file, if the adapter was trained on them)")
    parser.add_argument("question", nargs="*", help="questions; none = a conversation")
    parser.add_argument(
        "--also", action="append", default=[], help="one more image of the same question; may come again"
    )
    parser.add_argument("--sample", action="store_true", help="sample (nucleus 0.9) instead of beam search")
    parser.add_argument("--num-beams", type=int, help="beams of the search (default: llm.num_beams)")
    parser.add_argument("--device", help="where to run, e.g. cpu or cuda:1 (default: an accelerator if there is one)")
    parser.add_argument("--choose-from", nargs="+", metavar="ANSWER", help="take the likeliest of these answers")
    parser.add_argument(
        "--choose-by", choices=CHOOSE_BY,
        help="pmi = the one that the image makes likelier than the question alone, for models with a favourite answer",
    )  # fmt: skip
    parser.add_argument("--prompt", help="prompt of a question, {} in its place (default: llm.vqa_prompt)")
    args = parser.parse_args(argv)
    # Only now what imports torch.
    prepare_environment()
    from qformer.config import prompt_problem
    from qformer.conversation import answer_next
    from qformer.inference import load
    from qformer.launch import reported_errors, require_images

    with reported_errors():
        pictures = [args.picture, *args.also]
        require_images(pictures)
        if args.num_beams is not None and args.num_beams < 1:
            raise ValueError(f"--num-beams {args.num_beams}: expected 1 or more")
        if args.prompt is not None and (problem := prompt_problem(args.prompt or " ")):
            raise ValueError(f"--prompt {problem}")
        if args.choose_from and not args.question:
            raise ValueError("--choose-from: a conversation has no list of answers; expected a question before it")
        if args.choose_by and not args.choose_from:
            raise ValueError(
                f"--choose-by {args.choose_by}: an answer is written; name those to choose from, --choose-from"
            )
        model = load(args.adapter, args.device)
        generation: dict[str, Any] = {"do_sample": True, "num_beams": 1} if args.sample else {}
        generation |= {} if args.num_beams is None else {"num_beams": args.num_beams}
        if args.choose_from:
            pmi = args.choose_by == PMI
            for losses in model.rank([pictures], args.question, args.choose_from, prompt=args.prompt, pmi=pmi):
                _print(args.choose_from[int(losses.argmin())])
            return
        if args.question:
            for answer in model.answer([pictures], args.question, prompt=args.prompt, **generation):
                _print(answer)
            return
        _print(model.caption([pictures], **generation)[0])
        turns: list[tuple[str, str]] = []
        while question := _read_line():
            settings = {"prompt": args.prompt, **generation}
            _print(answer_next(model, pictures, question, turns=turns, settings=settings))


def _print(answer: str) -> None:
    print(answer, flush=True)
    if not answer:
        print(EMPTY_ANSWER, file=sys.stderr)


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    main()
