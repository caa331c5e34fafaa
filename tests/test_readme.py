"""README: its commands can be run and are whole configs; what holds for every page is in test_docs.py."""

import re

import pytest
from test_docs import PATH, REPO, commands

from qformer.config import Stage1Config, Stage2Config, load_config

README = (REPO / "README.md").read_text()


def test_readme_has_130_lines_at_most():
    assert len(README.splitlines()) <= 130


def test_readme_names_both_make_commands_and_they_exist():
    targets = re.findall(r"^(\w+):", (REPO / "Makefile").read_text(), re.M)
    named = [words[1] for words in commands(README) if words[0] == "make"]
    assert named == ["demo", "test"]
    assert set(named) <= set(targets)


@pytest.mark.parametrize(("script", "config"), [("stages/stage1.py", Stage1Config), ("stages/stage2.py", Stage2Config)])
def test_readme_training_commands_are_whole_configs(script, config):
    launches = [words[words.index(script) + 1 :] for words in commands(README) if script in words]
    assert launches
    for arguments in launches:
        loaded = load_config(config, [str(REPO / word) if PATH.match(word) else word for word in arguments])
        assert loaded.run.dir.startswith("runs/")
