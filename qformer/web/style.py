"""How the page looks: one style sheet and small pieces of HTML, every word of a visitor escaped."""

from collections.abc import Sequence
from html import escape

from qformer.web.desk import Candidate

CSS = """
.gradio-container { max-width: 1160px !important; margin: 0 auto !important; }
#head h1 { font-size: 1.6rem; font-weight: 650; letter-spacing: -0.01em; margin: 0.4rem 0 0.1rem; }
#head p { opacity: 0.8; margin: 0; }
#picture img { max-height: 26rem; object-fit: contain; }
.notice p { border-left: 3px solid var(--primary-500); background: var(--background-fill-secondary);
  border-radius: 4px; padding: 0.5rem 0.75rem; margin: 0; }
.notice p[role=alert] { border-color: #dc2626; }
.ranking { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.ranking caption { text-align: left; padding-bottom: 0.3rem; }
.ranking th { text-align: left; font-weight: 600; }
.prose .ranking, .prose .ranking tr { border: 0; }
.prose .ranking :is(th, td) { padding: 0.45rem 0.6rem; border: 0; border-bottom: 1px solid var(--border-color-primary);
  vertical-align: top; overflow-wrap: anywhere; background: none; }
.prose .ranking .value { white-space: nowrap; text-align: right; width: 8.5rem; }
.ranking .bar { height: 4px; border-radius: 2px; background: var(--primary-500); margin-top: 0.3rem; min-width: 1px; }
.ranking small { opacity: 0.8; }
.tiles .grid-wrap { min-height: 0 !important; max-height: none !important; padding-top: 2rem; }
.tiles .grid-container { grid-template-columns: repeat(auto-fill, minmax(5.6rem, 1fr)) !important; grid-auto-rows: auto !important; }
#hits .grid-container { grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)) !important; }
@media (max-width: 640px) {
  .gradio-container { padding: 0.5rem !important; }
  .prose .ranking :is(th, td) { padding: 0.4rem 0.3rem; }
}
"""


def heading(adapters: str) -> str:
    """The page's head, with the adapters it was started with."""
    return (
        f"<h1>Ask a picture</h1><p>{escape(adapters)}. The model does one thing at a time; others wait their turn.</p>"
    )


def notice(text: str, *, alert: bool = False) -> str:
    """A line that screen readers say when it appears; "" for none."""
    return f'<p role="{"alert" if alert else "status"}">{escape(text)}</p>' if text else ""


def ranking(candidates: Sequence[Candidate], heading: str) -> str:
    """Captions as a table, the best first."""
    rows = "".join(
        f"<tr><td>{number}</td><td>{escape(c.text)}<div class='bar' style='width:{100 * c.value:.1f}%'></div></td>"
        f"<td class='value'>{100 * c.value:.1f} %<br><small>{escape(c.detail)}</small></td></tr>"
        for number, c in enumerate(candidates, 1)
    )
    return (
        f"<table class='ranking'><caption>{escape(heading)}</caption><thead><tr><th scope='col'>#</th>"
        f"<th scope='col'>Text</th><th scope='col' class='value'>Fits</th></tr></thead><tbody>{rows}</tbody></table>"
    )
