"""README and docs: links and anchors lead somewhere, commands and configs are valid, Python runs, and no count rots.

A page in docs/ needs a line under `nav` in mkdocs.yml and one in docs/README.md; `make docs` builds the site of them.
"""

import importlib.util
import itertools
import os
import random
import re
import shlex
import subprocess
import sys
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml
from tiny import draw_scene, run_stage

from qformer.config import ConfigError, Stage1Config, Stage2Config, load_config, read_protocol

REPO = Path(__file__).resolve().parent.parent
PAGES = [
    REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "benchmarks/README.md", *sorted((REPO / "docs").glob("*.md")),
]  # fmt: skip
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"^(stages|configs|examples|benchmarks)/[\w./]+\.(py|yaml)$")
BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.S | re.M)
COMMANDS = ("make", "python", "accelerate")
MODULES = {"qformer.data.known": "qformer/data/known/__main__.py", "qformer.shapes.write": "qformer/shapes/write.py"}
ROOTS = {"stage1": (Stage1Config,), "stage2": (Stage2Config,), "capfilt": (), "evaluate": ()}
SECTIONS = {f.name: f.type for root in (Stage1Config, Stage2Config) for f in fields(root) if is_dataclass(f.type)}
KEYS = {f"{name}.{key.name}" for name, section in SECTIONS.items() for key in fields(section)}
KEY = re.compile(rf"`((?:{'|'.join(SECTIONS)})\.[a-z]\w*)(?:=([^`]*))?`")


def each_page(function):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPO).as_posix())(function)


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of these languages ("" for one that names none), without their indentation."""
    return [
        re.sub(rf"^{indent}", "", code, flags=re.M)
        for indent, language, code in BLOCK.findall(text)
        if language in languages
    ]


def prose(text: str) -> str:
    return BLOCK.sub("", text)


def commands(text: str) -> list[list[str]]:
    """The words of every command in the code blocks, continued lines joined and comments left out."""
    lines = "".join(blocks(text, "", "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.split(" ")[0].split("/")[-1] in COMMANDS]


def script_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The file of ours that a command runs, and its arguments."""
    for i, word in enumerate(words):
        if word.endswith(".py") and PATH.match(word):
            return word, words[i + 1 :]
        if words[i - 1] == "-m" and word != "qformer.launcher" and word.startswith("qformer."):
            return MODULES.get(word) or word.removeprefix("qformer.").replace(".", "/") + ".py", words[i + 1 :]
    return None


@cache
def options_of(script: str) -> set[str]:
    """The options that a stage's `--help` names; of other scripts, those in their source."""
    if not script.startswith("stages/"):
        return set(re.findall(r'"(--[\w-]+)"', (REPO / script).read_text())) | {"--help"}
    done = subprocess.run([sys.executable, REPO / script, "--help"], capture_output=True, text=True, timeout=60)
    return set(re.findall(r"--[\w-]+", done.stdout)) | {"--help"}


def slugs(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    names: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", prose(text), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        names.append(f"{slug}-{names.count(slug)}" if slug in names else slug)
    return set(names)


def check_keys(arguments: list[str], roots: tuple[type, ...]) -> None:
    """YAML files and key=value words must be valid in one of the stages' configs; values may be missing."""
    errors = []
    for root in roots:
        try:
            load_config(root, arguments, needed=())
            return
        except ConfigError as error:
            errors.append(str(error))
    raise AssertionError(f"{' '.join(arguments)}: {errors}")


@each_page
def test_links_and_anchors_lead_somewhere(page):
    for link in LINK.findall(prose(page.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(REPO), f"{page.name}: {link} leads out of the repository"
        assert not anchor or anchor in slugs(target.read_text()), f"{page.name}: {link} has no such heading"


@each_page
def test_files_and_options_of_commands_exist(page):
    for words in commands(page.read_text()):
        missing = [word for word in words if PATH.match(word) and not (REPO / word).is_file()]
        assert not missing, f"{page.name}: {missing}"
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (REPO / "Makefile").read_text(), re.M), words
        if (run := script_of(words)) is None:
            continue
        script, arguments = run
        assert (REPO / script).is_file(), f"{page.name}: {words}"
        used = {word.split("=")[0] for word in arguments if word.startswith("--")}
        assert used <= options_of(script), f"{page.name}: {script} has no {used - options_of(script)}"


@each_page
def test_configs_and_keys_of_commands_are_valid(page):
    for words in commands(page.read_text()):
        if (run := script_of(words)) is None or not run[0].startswith("stages/"):
            continue
        roots = ROOTS.get(Path(run[0]).stem, (Stage2Config, Stage1Config))
        settings = [word for word in run[1] if word.endswith(".yaml") or re.match(r"[a-z]\w*\.[\w.]+=", word)]
        there = [w for w in settings if not w.endswith(".yaml") or PATH.match(w)]
        if roots:
            check_keys([str(REPO / word) if PATH.match(word) else word for word in there], roots)


@each_page
def test_yaml_of_pages_loads(page, tmp_path):
    for i, text in enumerate(blocks(page.read_text(), "yaml")):
        file = tmp_path / f"{i}.yaml"
        file.write_text(text)
        values = yaml.safe_load(text)
        if "task" in values:
            read_protocol(str(file))
        else:
            check_keys([str(file)], (Stage2Config, Stage1Config))


@each_page
def test_keys_that_a_page_names_are_keys_of_the_config(page):
    for key, value in KEY.findall(prose(page.read_text())):
        package = REPO / key.replace(".", "/")
        if value and "..." not in value and key in KEYS:
            check_keys(re.split(r" (?=[a-z]\w*\.\w+=)", f"{key}={value}"), (Stage2Config, Stage1Config))
        elif not key.endswith((".yaml", ".json", ".jsonl", ".py")):
            assert key in KEYS or key == "qformer.load" or package.exists() or package.with_suffix(".py").exists(), key


@each_page
def test_python_of_pages_compiles(page):
    for code in blocks(page.read_text(), "python"):
        compile(code, page.name, "exec")


def test_python_of_pages_runs_on_a_tiny_model(tiny, tmp_path, monkeypatch):
    """All but adding.md's, which are files of the package. Pictures and clips have the names that the pages use."""
    monkeypatch.chdir(tmp_path)
    run_stage(1, tiny.stage1(tmp_path / "runs/s1"))
    run_stage(2, tiny.stage2(tmp_path / "runs/s2", "stage2.init_from=runs/s1/adapter"))
    codes = {
        page.relative_to(REPO).as_posix(): blocks(page.read_text(), "python")
        for page in PAGES
        if page.name != "adding.md"
    }
    ran = []
    for name, several in codes.items():
        import qformer

        space = {"model": qformer.load("runs/s2/adapter")} if several else {}
        for code in several:
            for picture in re.findall(r'"([\w/]+\.jpg)"', code):
                draw_scene(random.Random(0))[0].save(picture)
            for clip in re.findall(r'"([\w/]+\.mp4)"', code):
                write_clip(tmp_path / clip, [draw_scene(random.Random(i))[0] for i in range(4)])
            exec(compile(code, name, "exec"), space)
            ran.append(name)
    assert {"README.md", "docs/evaluation.md"} <= set(ran)


def write_clip(path: Path, frames: list) -> None:
    av = pytest.importorskip("av", reason="clips need the extra video (PyAV)")
    with av.open(str(path), "w") as clip:
        stream = clip.add_stream("mpeg4", rate=10)
        stream.width, stream.height = frames[0].size
        for frame in frames:
            clip.mux(stream.encode(av.VideoFrame.from_image(frame)))
        clip.mux(stream.encode())


def test_every_page_has_a_place_in_the_site_and_in_the_index():
    """A new page: a line under `nav` in mkdocs.yml, and a row in docs/README.md that says which question it answers."""
    placed = set(re.findall(r"[\w/]+\.md", str(yaml.safe_load((REPO / "mkdocs.yml").read_text())["nav"])))
    pages = {page.name for page in (REPO / "docs").glob("*.md")}
    assert pages - placed == set(), "put these pages under `nav` in mkdocs.yml, one line each"
    assert placed - pages == set(), "mkdocs.yml names pages that are not in docs/"
    index = (REPO / "docs/README.md").read_text()
    assert [page for page in sorted(pages - {"README.md"}) if f"({page})" not in index] == [], (
        "name them in docs/README.md"
    )


@each_page
def test_lists_tables_and_code_stand_apart_from_paragraphs(page):
    """GitHub takes a list right behind a paragraph for a list, the site for more of the paragraph."""
    lines = prose(page.read_text()).splitlines()
    apart = re.compile(r"[-*] |\d+\. |\|")
    for before, line in itertools.pairwise(lines):
        begins = apart.match(line) and not apart.match(before) and not before.startswith((" ", "#"))
        assert not (begins and before.strip()), f"{page.name}: put an empty line before {line[:60]!r}"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site as `make docs` builds it, where torch cannot be imported: docstrings are read from files."""
    pytest.importorskip("material", reason="the site needs the extra docs (mkdocs-material)")
    pytest.importorskip("mkdocstrings_handlers.python", reason="the site needs the extra docs (mkdocstrings-python)")
    out = tmp_path_factory.mktemp("site")
    code = "import sys; sys.modules['torch'] = None; from mkdocs.__main__ import cli; cli()"
    done = subprocess.run(
        [sys.executable, "-c", code, "build", "--strict", "--site-dir", str(out)],
        cwd=REPO, capture_output=True, text=True, timeout=200, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr + done.stdout
    return out


def test_the_site_fetches_nothing_from_elsewhere(site):
    """Links may lead elsewhere; scripts, styles, fonts and images are its own."""
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r"<(?:script|link|img|iframe|source|video)\b[^>]*(?:src|href)=\"?([^\"> ]+)", page.read_text()
        )
        assert [url for url in fetched if "//" in url] == [], page.name
        assert 'class="mermaid"' not in page.read_text(), f"{page.name}: the theme fetches what draws it"
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)[\s\"']*(?:https?:)?//", style.read_text()), style.name


def test_links_to_definitions_lead_to_their_lines(site):
    """What mkdocs does not check itself: links into the files that the site copies."""
    for page in site.glob("*.html"):
        for target, line in re.findall(r'href="?([^"#> ]+)#(L-0-\d+)', page.read_text()):
            assert f'"{line}"' in (page.parent / target).read_text(), f"{page.name}: {target}#{line}"


@each_page
def test_names_that_a_page_links_to_a_file_are_defined_there(page):
    """[`Class.method`](../qformer/file.py): the site leads to its line, so a name that moved fails here."""
    pytest.importorskip("mkdocs", reason="the site needs the extra docs (mkdocs-material)")
    spec = importlib.util.spec_from_file_location("hooks", REPO / "docs/hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    for name, path in re.findall(r"\[`([\w.]+)`\]\(([\w./]+\.py)\)", page.read_text()):
        assert name in hooks.definitions((page.parent / path).resolve()), f"{page.name}: {path} defines no {name}"


def test_docstrings_are_on_the_site(site):
    text = (site / "api.html").read_text()
    assert all(f'id="{name}"' in text for name in ("qformer.inference.load", "qformer.objectives.itc_loss"))
    assert "Rebuild a trained model from an adapter folder" in text


def test_no_count_of_tests_in_prose():
    assert not [page.name for page in PAGES if re.search(r"\b\d[\d,]* tests\b|\btests: \d", page.read_text())]
