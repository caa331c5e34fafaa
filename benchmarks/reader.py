"""Pictures a second that one process reads, shuffled and decoded, beside `datasets` and `webdataset` on the same tars.

python benchmarks/reader.py            JPEG of 640 x 480 to pixels of 224 x 224
python benchmarks/reader.py --bytes    the same without decoding: what the reader itself costs

Every side is one process. Its speed is told by the time a core worked for it, which other processes change less
than seconds; files are in the page cache. Ours draws any record at any time, in an order that a run can go on in exactly;
the peers stream through a shuffle buffer of 1000, `datasets, Arrow` reads at random from its copy of the data.
"""

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from sidebyside import Side, difference, parser, report
from sides.reading import write

OURS = ("ours", "ours, in blocks", "ours, files")
PEERS = ("datasets", "datasets, Arrow", "webdataset")


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, PEERS)
    options.add_argument("--bytes", action="store_true", help="read without decoding")
    args = options.parse_args(argv)
    args.threads = 1
    peers = [peer for peer in args.peer or PEERS if _is_there(peer)]
    shapes: dict[str, Any] = {"all": 24, "size": (64, 48), "tars": 2, "pictures": 24, "image_size": 32}
    if not args.tiny:
        shapes = {
            "all": 2048,
            "size": (640, 480),
            "tars": 4,
            "pictures": 2048 if args.bytes else 512,
            "image_size": 224,
        }
    with tempfile.TemporaryDirectory(prefix="qformer-bench-") as scratch:
        folder = Path(scratch)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        write(folder, shapes["all"], shapes["size"], shapes["tars"])
        sides = {name: _start(name, folder, args, shapes) for name in (*OURS, *peers)}
        for side in sides.values():
            side.answer()
        checks = {name: side.ask("check") for name, side in sides.items()}  # a warm-up as well
        for name in sides:
            if (apart := difference(checks["ours"], checks[name], name)) > 1e-5:
                raise SystemExit(f"{name} read other pictures than ours, apart by {apart:.2g}; nothing timed")
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for round in range(args.rounds):
            for name in list(sides) if round % 2 == 0 else reversed(sides):
                turns[name].append(sides[name].ask("step", round))
        for side in sides.values():
            side.close()
    speeds = {
        name: shapes["pictures"] / statistics.median(t["seconds"] for t in taken) for name, taken in turns.items()
    }
    report(args, "reading pictures" + (", not decoded" if args.bytes else ""), shapes, turns, {}, None,
           {"pictures_per_core_s": speeds})  # fmt: skip
    print("  pictures a second of a core's time: " + ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items()))


def _start(name: str, folder: Path, args: argparse.Namespace, shapes: dict[str, Any]) -> Side:
    own = folder / name.replace(", ", "-")
    own.mkdir()
    task = {"side": name, "folder": str(folder), "bytes": args.bytes, "threads": 1, "device": "cpu", **shapes}
    (own / "task.json").write_text(json.dumps(task))
    return Side("sides.reading", own)


def _is_there(peer: str) -> bool:
    package = peer.partition(",")[0]
    if importlib.util.find_spec(package) is None:
        print(f"{package} is not installed (pip install {package}); the others are timed without it")
        return False
    return True


if __name__ == "__main__":
    main()
