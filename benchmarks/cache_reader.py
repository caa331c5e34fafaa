"""Reading a feature cache in random order: images and megabytes a second, cold and warm, and what memory it holds.

The peer is `safetensors.safe_open`, which maps the shards: its resident memory grows with every page read.

python benchmarks/cache_reader.py
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from safetensors import safe_open

from qformer.data.cache import FeatureCache

STAGE = Path(__file__).resolve().parents[1] / "stages" / "cache_features.py"


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path, help="write the figures there too")
    options.add_argument("--pictures", type=int, default=2000, help="of 257 tokens of 1408 each, 724 kB in bfloat16")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    args = options.parse_args(argv)
    count, shape = (24, (5, 16)) if args.tiny else (args.pictures, (257, 1408))
    with tempfile.TemporaryDirectory(prefix="qformer-bench-") as scratch:
        folder = Path(scratch)
        ids, seconds = write(folder, count, shape)
        size = sum(path.stat().st_size for path in (folder / "cache").iterdir())
        cache = FeatureCache(folder / "cache")
        cache.read(ids[0])
        before, rows = psutil.Process().memory_info().rss, {"cold": [], "warm": []}
        for round in range(args.rounds):
            random.Random(round).shuffle(ids)
            forget(folder / "cache")
            for how in rows:
                rows[how].append(read(cache, ids))
        grown = psutil.Process().memory_info().rss - before
        mapped = read_mapped(folder / "cache", shape[0]) - before - grown
    print(f"{count} pictures, {size / 1e6:.0f} MB in bfloat16, written in {seconds:.1f} s, one process")
    for how, taken in rows.items():
        speeds = sorted(count / s for s in taken)
        said = f"{speeds[len(speeds) // 2]:.0f} pictures/s ({speeds[0]:.0f} to {speeds[-1]:.0f})"
        print(f"  {how}: {said}, {speeds[len(speeds) // 2] * size / count / 1e6:.0f} MB/s")
    print(f"  resident memory grew by {grown / 1e6:.1f} MB; through safe_open by {mapped / 1e6:.1f} MB")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"pictures": count, "bytes": size, "seconds": rows, "grown": grown, "mapped": mapped}) + "\n"
        )


def write(folder: Path, count: int, shape: tuple[int, int]) -> tuple[list[str], float]:
    """A cache of random features; what its pictures are called, and the seconds that its writing took."""
    (folder / "arrays").mkdir()
    rng = np.random.default_rng(0)
    names = [f"{i:05d}" for i in range(count)]
    for name in names:
        np.save(folder / "arrays" / f"{name}.npy", rng.standard_normal(shape, dtype=np.float32).astype(np.float16))
    records = [{"image": str(folder / "arrays" / f"{n}.npy"), "caption": "a", "image_id": n} for n in names]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["encoder.loader=features", f"encoder.width={shape[1]}", f"data.train=[{folder / 'records.jsonl'}]"]
    start = time.perf_counter()
    subprocess.run([sys.executable, STAGE, *arguments, f"data.features={folder / 'cache'}"], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    return names, time.perf_counter() - start


def forget(folder: Path) -> None:
    """Ask the kernel to drop the pages of every file."""
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read(cache: FeatureCache, ids: list[str]) -> float:
    start = time.perf_counter()
    for name in ids:
        cache.read(name)
    return time.perf_counter() - start


def read_mapped(folder: Path, rows: int) -> int:
    """Read every shard through `safe_open`, an image at a time; the resident bytes of this process then."""
    files = [safe_open(path, "pt") for path in sorted(folder.glob("shard-*.safetensors"))]
    for tokens in [file.get_slice("tokens") for file in files]:
        for start in range(0, tokens.get_shape()[0], rows):
            tokens[start : start + rows].sum()
    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    main()
