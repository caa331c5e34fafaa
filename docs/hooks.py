"""The site (mkdocs.yml) beside the repository: a link that leaves docs/ leads to a copy of the file in the site.

A page outside of docs/, such as README.md, becomes a page; any other file is shown with its lines numbered, and
[`Class.method`](../qformer/file.py) leads to the line where that name is defined.
"""

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

REPO = Path(__file__).resolve().parent.parent
COPIES = "repository"  # where files from outside of docs/ stand in the site
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".cfg": "ini"}


def definitions(path: Path) -> dict[str, int]:
    """The line of every function, class and constant of a Python file: {"Stage1.forward": 120}."""
    lines: dict[str, int] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                lines[prefix + node.name] = node.lineno
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign):
                lines.update({prefix + t.id: node.lineno for t in node.targets if isinstance(t, ast.Name)})
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines[prefix + node.target.id] = node.lineno

    visit(ast.parse(path.read_text()).body, "")
    return lines


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages name outside of docs/, and what those pages name in turn."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    copied: set[str] = set()
    while waiting:
        page = waiting.pop()
        for _, target, _ in LINK.findall((REPO / page).read_text()):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            if path not in copied and not path.startswith("docs/") and (REPO / path).is_file():
                copied.add(path)
                files.append(_copy(path, config))
                waiting += [path] if path.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links from where a page stands in the repository to where it stands in the site."""
    site = page.file.src_uri
    place = site.removeprefix(f"{COPIES}/") if site.startswith(f"{COPIES}/") else f"docs/{site}"

    def turned(link: re.Match) -> str:
        label, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
        if "://" in target or not (REPO / path).is_file():
            return link[0]
        to = posixpath.relpath(
            path.removeprefix("docs/") if path.startswith("docs/") else _place(path), posixpath.dirname(site) or "."
        )
        if path.endswith(".py") and not anchor and (line := definitions(REPO / path).get(label.strip("`"))):
            html = posixpath.splitext(to)[0] + ".html"  # as HTML: mkdocs knows no anchors of a block of code
            return f'<a href="{html}#L-0-{line}">{label}</a>'
        return f"[{label}]({to}{anchor})"

    return LINK.sub(turned, markdown)


def _place(path: str) -> str:
    return f"{COPIES}/{path}" if path.endswith(".md") else f"{COPIES}/{path}.md"


def _copy(path: str, config: MkDocsConfig) -> File:
    text = (REPO / path).read_text()
    if not path.endswith(".md"):
        language = LANGUAGES.get(Path(path).suffix, "text")
        text = f'---\nsearch: {{exclude: true}}\n---\n# {path}\n\n````{language} linenums="1"\n{text}\n````\n'
    return File.generated(config, _place(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV)
