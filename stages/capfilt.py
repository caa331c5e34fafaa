"""Write captions for web images and drop those that do not match, theirs and the web's (CapFilt).

python stages/capfilt.py web.jsonl --captioner runs/s2/adapter --filter runs/s1/adapter --out web2
python stages/capfilt.py 'web/*.tar' --filter runs/s1/adapter --out web2   # no new captions
python stages/capfilt.py web2/records.jsonl --captioner ... --filter ... --out web3   # round 2
accelerate launch stages/capfilt.py ...    # or the same line in every job of an array: they share

The same line goes on where it was stopped; when everything is there it does nothing.
"""

import argparse
from pathlib import Path

from qformer.config.help import HelpFormatter
from qformer.environment import prepare_environment


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("records", nargs="+", metavar="RECORDS", help="sources of records (docs/data.md)")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the records that are kept, scores, a summary"
    )
    parser.add_argument(
        "--captioner", help="adapter of stage 2 that writes captions; without it they are only filtered"
    )
    parser.add_argument("--filter", dest="filter_by", help="adapter of stage 1 that judges; without it all are kept")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest probability of a match that is kept (0.5)")
    parser.add_argument("--captions", type=int, default=1, help="captions written for each image (1)")
    parser.add_argument("--top-p", type=float, default=0.9, help="nucleus that captions are sampled from (0.9)")
    parser.add_argument(
        "--num-beams", type=int, help="write captions by a search with so many beams instead of sampling"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides, with the image's id, what is sampled (0)")
    parser.add_argument(
        "--cleaning", choices=("blip", "none"), default="blip", help="of captions before matching (blip)"
    )
    parser.add_argument(
        "--format", choices=("tar", "jsonl"), dest="form", help="default: tar if the sources hold images"
    )
    parser.add_argument("--root", help="folder that relative image paths start from; default: the record file's own")
    parser.add_argument("--limit", type=int, help="only the first so many records")
    parser.add_argument(
        "--shard-records", type=int, default=1000, help="records that a process claims at a time (1000)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (64)")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images (2)")
    parser.add_argument("--device", help="as cpu, cuda; default: the accelerator, if there is one")
    args = vars(parser.parse_intermixed_args(argv))
    # Only now what imports torch.
    prepare_environment()
    from qformer.capfilt.command import bootstrap
    from qformer.capfilt.judging import Method
    from qformer.launch import configure_logging, reported_errors

    with reported_errors():
        configure_logging(True)
        names = {"per_image": "captions", "top_p": "top_p", "num_beams": "num_beams", "seed": "seed"}
        names |= {"threshold": "threshold", "cleaning": "cleaning"}
        method = Method(**{field: args.pop(name) for field, name in names.items()})
        bootstrap(args.pop("records"), args.pop("out"), method=method, **args)


if __name__ == "__main__":
    main()
