"""A page of HTML that needs nothing outside itself: no script, no link, images inside.

    page = Page("Captions of photographs", "Trained in 3 minutes.")
    page.add("Captions", gallery([Card(image_uri(path, side=320), ["a dog on a beach"])]), note="Held-out images.")
    page.add("Retrieval", table(["", "recall@1"], [["image to text", 71.5]]))
    page.write(Path("report.html"))

Whoever makes a part gives plain strings, which are escaped; only what these functions return (`Html`) is markup.
"""

import base64
import io
import mimetypes
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qformer.files import atomic_file
from qformer.report.style import STYLE

if TYPE_CHECKING:
    from PIL import Image


class Html(str):
    """A string that is markup; every other string is text, and is escaped where it enters a page."""


class Card(NamedTuple):
    """An image with lines of text below it.

    Args:
        image: its data URI (`image_uri`); None for text alone.
        lines: from top to bottom.
        kind: "right" or "wrong" marks what is `strong` in it by colour, a wrong card by a frame as well.
        alt: what the image is, for those who cannot see it.
    """

    image: str | None
    lines: Sequence[str]
    kind: str = ""
    alt: str = ""


class Page:
    """A title, a lead below it, and sections in the order in which they are added."""

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self._parts: list[str] = [f"<h1>{markup(title)}</h1>\n", soft(lead) if lead else ""]

    def add(self, title: str, *parts: str, note: str = "") -> None:
        """Add a section; a plain string becomes a paragraph. One whose parts are all empty is left out.

        Args:
            note: what the section shows, below its title.
        """
        if any(parts):
            shown = [part if isinstance(part, Html) else paragraph(part) for part in parts if part]
            self._parts += [f"<h2>{markup(title)}</h2>\n", soft(note) if note else "", *shown]

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all; folders on the way are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as scratch:
            scratch.write_text(
                '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
                '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
                f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
                f"{''.join(self._parts)}</body>\n</html>\n",
                encoding="utf-8",
            )


def markup(value: object) -> Html:
    """`Html` as it is; anything else as escaped text, numbers at three digits after the point at most."""
    if isinstance(value, Html):
        return value
    return Html(escape(f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)))


def joined(parts: Iterable[str], between: str = "") -> Html:
    """Parts one after the other; plain strings are escaped."""
    return Html(markup(between).join(map(markup, parts)))


def paragraph(text: str) -> Html:
    """A paragraph."""
    return Html(f"<p>{markup(text)}</p>\n")


def soft(text: str) -> Html:
    """A paragraph that stands back."""
    return Html(f'<p class="soft">{markup(text)}</p>\n')


def strong(text: str) -> Html:
    """Words that stand out; in a card they have its colour."""
    return Html(f'<span class="strong">{markup(text)}</span>')


def quiet(text: str) -> Html:
    """Words that stand back."""
    return Html(f'<span class="soft">{markup(text)}</span>')


def heading(text: str) -> Html:
    """A heading inside a section."""
    return Html(f"<h3>{markup(text)}</h3>\n")


def definitions(pairs: Iterable[tuple[str, str]]) -> Html:
    """Terms, each with what it means."""
    return Html(f"<dl>{''.join(f'<dt>{markup(term)}</dt><dd>{markup(text)}</dd>' for term, text in pairs)}</dl>\n")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = "", words: bool = False) -> Html:
    """A table; the first cell of a row is its heading, None an empty cell. On a narrow screen it scrolls by itself.

    Args:
        words: cells are sentences: on the left, and broken into lines.
    """
    top = "".join(f'<th scope="col">{markup(name)}</th>' for name in head)
    body = "".join(f'<tr><th scope="row">{markup(first)}</th>{_cells(cells)}</tr>\n' for first, *cells in rows)
    titled = f"<caption>{markup(caption)}</caption>\n" if caption else ""
    return Html(
        f'<div class="wide"><table class="{"words" if words else "numbers"}">{titled}<thead><tr>{top}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def _cells(cells: Iterable[object]) -> str:
    return "".join(f"<td>{markup('' if cell is None else cell)}</td>" for cell in cells)


def gallery(cards: Iterable[Card], least: str = "9.5rem") -> Html:
    """Cards side by side, as many as fit; empty without any.

    Args:
        least: width of a card, in CSS units, below which fewer stand side by side.
    """
    shown = []
    for card in cards:
        image = f'<img alt="{escape(card.alt)}" src="{escape(card.image)}">' if card.image else ""
        lines = "<br>".join(map(markup, card.lines))
        shown.append(f'<figure class="{escape(card.kind)}">{image}<figcaption>{lines}</figcaption></figure>\n')
    return Html(f'<div class="gallery" style="--least: {escape(least)}">\n{"".join(shown)}</div>\n' if shown else "")


def picture(image: str, caption: str = "", alt: str = "") -> Html:
    """One image at its size, or as wide as the page where that is less: a plot, a map of attention.

    Args:
        image: its data URI (`image_uri`).
    """
    below = f"<figcaption>{markup(caption)}</figcaption>" if caption else ""
    return Html(f'<figure class="picture"><img alt="{escape(alt or caption)}" src="{escape(image)}">{below}</figure>\n')


def folded(title: str, content: str) -> Html:
    """What is shown on request: markup, or a text line by line as it is; empty without content."""
    shown = content if isinstance(content, Html) else f"<pre>{markup(content)}</pre>"
    return Html(f"<details><summary>{markup(title)}</summary>{shown}</details>\n" if content else "")


def image_uri(image: "Path | Image.Image", side: int | None = None) -> str:
    """An image as a data URI: a file as it is, one that is opened, or is to be made smaller, as JPEG.

    Args:
        side: pixels of the longer side at most.
    """
    if isinstance(image, Path) and side is None:
        return _uri(image.read_bytes(), mimetypes.guess_type(image.name)[0] or "image/png")
    from PIL import Image

    shown = (Image.open(image) if isinstance(image, Path) else image).convert("RGB")
    if side is not None:
        shown.thumbnail((side, side))
    content = io.BytesIO()
    shown.save(content, "JPEG", quality=85)
    return _uri(content.getvalue(), "image/jpeg")


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
