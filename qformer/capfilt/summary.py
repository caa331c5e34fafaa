"""What was kept and what was dropped: counts, and examples with their images in one HTML file that needs no other."""

import json
from collections import Counter
from typing import Any

from qformer.capfilt.captions import SYNTHETIC, WEB, Caption, Judged
from qformer.capfilt.shards import Shards
from qformer.data import BrokenRecord, load_image
from qformer.files import atomic_file
from qformer.report.page import Card, Page, gallery, image_uri, quiet, soft, strong, table

EXAMPLES = 24  # of kept and of dropped captions
THUMBNAIL = 160  # pixels of the longer side
BINS = 10

Example = tuple[Judged, Caption]


def summarise(shards: Shards) -> dict[str, Any]:
    """Write summary.json and summary.html of finished shards; returns what the former holds."""
    counts: Counter[str] = Counter(records=shards.records_count, broken=0, with_captions=0)
    captions = {origin: Counter[str](kept=0) for origin in (WEB, SYNTHETIC)}
    matching = {origin: [0] * BINS for origin in (WEB, SYNTHETIC)}
    examples: dict[bool, list[Example]] = {True: [], False: []}
    per_shard = -(-EXAMPLES // shards.count)
    for number in range(shards.count):
        of_shard: dict[bool, list[Example]] = {True: [], False: []}
        for row in shards.read_scores(number):
            counts["broken"] += row.problem is not None
            counts["with_captions"] += bool(row.kept)
            for caption in row.captions:
                captions[caption.origin][caption.why or "kept"] += 1
                if caption.itm is not None:
                    matching[caption.origin][min(int(caption.itm * BINS), BINS - 1)] += 1
                of_shard[caption.why is None].append((row, caption))
        for kept, chosen in of_shard.items():
            examples[kept] += _spread(chosen, per_shard)
    summary = {**counts, "captions": captions, f"itm_in_{BINS}_bins": matching, "made_of": shards.made_of}
    with atomic_file(shards.folder / "summary.json") as scratch:
        scratch.write_text(json.dumps(summary, indent=1) + "\n")
    page = _page(shards, summary, {kept: _spread(chosen, EXAMPLES) for kept, chosen in examples.items()})
    page.write(shards.folder / "summary.html")
    return summary


def _spread(examples: list[Example], count: int) -> list[Example]:
    """At most `count` of them, evenly spread."""
    if len(examples) <= count:
        return examples
    return [examples[i * len(examples) // count] for i in range(count)]


def _page(shards: Shards, summary: dict[str, Any], examples: dict[bool, list[Example]]) -> Page:
    captions: dict[str, Counter[str]] = summary["captions"]
    reasons = list(dict.fromkeys(["kept", *(why for counter in captions.values() for why in counter)]))
    page = Page(
        "CapFilt",
        f"{summary['records']} records: {summary['with_captions']} keep a caption, {summary['broken']} have an image that "
        "cannot be read.",
    )
    counts = [[origin, *(counter[why] for why in reasons), counter.total()] for origin, counter in captions.items()]
    page.add("What became of the captions", table(["", *reasons, "all"], counts))
    bins = [f"{i / BINS:g} to {(i + 1) / BINS:g}" for i in range(BINS)]
    in_bins = [[origin, *numbers] for origin, numbers in summary[f"itm_in_{BINS}_bins"].items()]
    page.add("Probability of the matching head", table(["", *bins], in_bins))
    for kept, title in ((False, "Dropped"), (True, "Kept")):
        page.add(title, gallery(_card(shards, row, caption) for row, caption in examples[kept]))
    page.add("Made of", soft(json.dumps(shards.made_of)))
    return page


def _card(shards: Shards, row: Judged, caption: Caption) -> Card:
    scores = [
        f"{name} {value:.3f}" for name, value in (("itm", caption.itm), ("itc", caption.itc)) if value is not None
    ]
    lines = [caption.text, *([strong(caption.why)] if caption.why else []), quiet(", ".join([caption.origin, *scores]))]
    kind = "" if caption.why is None else "wrong"
    try:
        return Card(image_uri(load_image(shards.records[row.record]), THUMBNAIL), lines, kind)
    except BrokenRecord:  # a feature file, or an image that is no longer there
        return Card(None, [quiet(row.image), *lines], kind)
