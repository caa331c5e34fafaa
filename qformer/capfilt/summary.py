"""What was kept and what was dropped: counts, and examples with their images in one HTML file that needs no other."""

import base64
import html
import io
import json
from collections import Counter
from typing import Any

from qformer.capfilt.captions import SYNTHETIC, WEB, Caption, Judged
from qformer.capfilt.shards import Shards
from qformer.data import BrokenRecord, load_image
from qformer.files import atomic_file

EXAMPLES = 24  # of kept and of dropped captions
THUMBNAIL = 160  # pixels of the longer side
BINS = 10
STYLE = """body{font:15px/1.4 sans-serif;margin:2em auto;max-width:70em}table{border-collapse:collapse}
td,th{padding:.2em 1em;text-align:right;border-bottom:1px solid #ccc}td:first-child,th:first-child{text-align:left}
.cards{display:flex;flex-wrap:wrap;gap:1em}.card{width:170px}.card img{max-width:160px}.card p{margin:.3em 0}
.why{color:#a00}.num{color:#666;font-size:.85em}"""

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
    page = _page(shards, summary, {kept: _spread(chosen, EXAMPLES) for kept, chosen in examples.items()})
    for name, text in (("json", json.dumps(summary, indent=1) + "\n"), ("html", page)):
        with atomic_file(shards.folder / f"summary.{name}") as scratch:
            scratch.write_text(text)
    return summary


def _spread(examples: list[Example], count: int) -> list[Example]:
    """At most `count` of them, evenly spread."""
    if len(examples) <= count:
        return examples
    return [examples[i * len(examples) // count] for i in range(count)]


def _page(shards: Shards, summary: dict[str, Any], examples: dict[bool, list[Example]]) -> str:
    captions: dict[str, Counter[str]] = summary["captions"]
    reasons = list(dict.fromkeys(["kept", *(why for counter in captions.values() for why in counter)]))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *reasons, "all"))
    rows = "".join(
        f"<tr><td>{origin}</td>" + "".join(f"<td>{counter[why]}</td>" for why in reasons) + f"<td>{counter.total()}</td></tr>"
        for origin, counter in captions.items()
    )  # fmt: skip
    bins = "".join(f"<th>{i / BINS:g} to {(i + 1) / BINS:g}</th>" for i in range(BINS))
    matching = "".join(
        f"<tr><td>{origin}</td>{''.join(f'<td>{count}</td>' for count in bins_of)}</tr>"
        for origin, bins_of in summary[f"itm_in_{BINS}_bins"].items()
    )
    made_of = html.escape(json.dumps(shards.made_of))
    parts = [
        f"<!doctype html><meta charset=utf-8><title>CapFilt</title><style>{STYLE}</style><h1>CapFilt</h1>",
        f"<p>{summary['records']} records: {summary['with_captions']} keep a caption, {summary['broken']} have an image "
        f"that cannot be read.</p><table><tr>{head}</tr>{rows}</table>",
        f"<h2>Probability of the matching head</h2><table><tr><th></th>{bins}</tr>{matching}</table>",
    ]
    for kept, title in ((False, "Dropped"), (True, "Kept")):
        cards = "".join(_card(shards, row, caption) for row, caption in examples[kept])
        parts.append(f"<h2>{title}</h2><div class=cards>{cards}</div>")
    return "\n".join([*parts, f"<p class=num>{made_of}</p>\n"])


def _card(shards: Shards, row: Judged, caption: Caption) -> str:
    scores = [
        f"{name} {value:.3f}" for name, value in (("itm", caption.itm), ("itc", caption.itc)) if value is not None
    ]
    why = f"<p class=why>{html.escape(caption.why)}</p>" if caption.why else ""
    numbers = html.escape(", ".join([caption.origin, *scores]))
    return (
        f"<div class=card>{_thumbnail(shards, row)}<p>{html.escape(caption.text)}</p>{why}"
        f"<p class=num>{numbers}</p></div>"
    )


def _thumbnail(shards: Shards, row: Judged) -> str:
    try:
        image = load_image(shards.records[row.record])
    except BrokenRecord:  # a feature file, or an image that is no longer there
        return f"<p class=num>{html.escape(row.image)}</p>"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}">'
