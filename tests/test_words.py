"""Names say what they hold: none of the words that fit anything."""

import ast
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
VAGUE = {"found", "given", "said", "told", "own", "seen"}
NAMES = {ast.Name: "id", ast.arg: "arg", ast.Attribute: "attr"}


def test_no_variable_parameter_or_attribute_has_a_vague_name():
    files = [path for folder in ("qformer", "stages", "examples") for path in sorted((REPO / folder).rglob("*.py"))]
    assert len(files) > 100
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, NAMES.get(type(node), ""), None)
            assert name not in VAGUE, f"{path.relative_to(REPO)}, line {node.lineno}: {name} says nothing"
