"""README and docs: every command can be run, every link leads somewhere, and no count stands there that rots."""

import re
import shlex
from pathlib import Path

import pytest

from qformer.config import Stage1Config, Stage2Config, load_config

REPO = Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text()
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"^(stages|configs|examples|benchmarks)/[\w./]+\.(py|yaml)$")


def blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)


def commands(text: str) -> list[list[str]]:
    """The words of every command in the code blocks, continued lines joined and comments left out."""
    lines = "".join(blocks(text)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(make|python|accelerate) ", line)]


def test_readme_has_130_lines_at_most():
    assert len(README.splitlines()) <= 130


def test_readme_names_both_make_commands_and_they_exist():
    targets = re.findall(r"^(\w+):", (REPO / "Makefile").read_text(), re.M)
    named = [words[1] for words in commands(README) if words[0] == "make"]
    assert named == ["demo", "test"]
    assert set(named) <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_by_commands_exist(page):
    paths = [word for words in commands(page.read_text()) for word in words if PATH.match(word)]
    assert [path for path in paths if not (REPO / path).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = [link.split("#")[0] for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize(("script", "config"), [("stages/stage1.py", Stage1Config), ("stages/stage2.py", Stage2Config)])
def test_readme_training_commands_are_whole_configs(script, config):
    launches = [words[words.index(script) + 1 :] for words in commands(README) if script in words]
    assert launches
    for arguments in launches:
        loaded = load_config(config, [str(REPO / word) if PATH.match(word) else word for word in arguments])
        assert loaded.run.dir.startswith("runs/")


def test_options_of_the_other_commands_are_in_their_stages():
    for words in commands(README):
        scripts = [word for word in words if word.startswith("stages/")]
        for script in scripts:
            options = [word for word in words[words.index(script) :] if word.startswith("--")]
            source = (REPO / script).read_text()
            assert [option for option in options if f'"{option}"' not in source] == [], script


def test_no_count_of_tests_in_prose():
    assert not [page.name for page in PAGES if re.search(r"\b\d[\d,]* tests\b|\btests: \d", page.read_text())]


def test_the_index_names_every_page():
    index = (REPO / "docs/README.md").read_text()
    assert [p.name for p in (REPO / "docs").glob("*.md") if p.name != "README.md" and f"({p.name})" not in index] == []
