"""METEOR and SPICE, the programs that pycocoevalcap brings, in a process of their own: `python java_scores.py NAME OUT`.

pycocoevalcap calls whatever `java` the environment has and waits for it without end. Here a child process calls it, with
its own environment and its own time, and is ended with all that it began. The child imports nothing of qformer.
"""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

START_S = 300  # METEOR reads its paraphrases in 15 s of one core
DOWNLOAD_S = 1800  # SPICE's models are 400 MB
CAPTION_S = 0.5
# SPICE's libraries are older than the modules of Java.
OPENED = ("java.lang", "java.util", "java.math", "java.net", "java.text", "java.io", "java.nio", "java.util.concurrent")
JAVA_VARIABLES = {
    "JAVA_TOOL_OPTIONS": "-Dfile.encoding=UTF-8 -Dstdout.encoding=UTF-8",
    "JDK_JAVA_OPTIONS": " ".join(f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in OPENED),  # since Java 9
}


def score_by_java(
    name: str, predictions: Sequence[str], references: Sequence[Sequence[str]], java: str
) -> tuple[float, list[float]] | str:
    """The score of a corpus of tokenized captions by METEOR or SPICE, and each caption's; in words, why there is none."""
    with tempfile.TemporaryDirectory(prefix="qformer_") as folder:
        out = Path(folder) / "out.json"
        ours = {name: f"{os.environ.get(name, '')} {value}".strip() for name, value in JAVA_VARIABLES.items()}
        environment = os.environ | ours
        environment["PATH"] = os.pathsep.join([str(Path(java).parent), os.environ.get("PATH", "")])
        child = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), name, str(out)], env=environment, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        limit_s = START_S + CAPTION_S * len(predictions) + (DOWNLOAD_S if name == "SPICE" else 0)
        try:
            _, errors = child.communicate(json.dumps([predictions, references]).encode(), timeout=limit_s)
        except subprocess.TimeoutExpired:
            return f"not done after {limit_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)  # Java as well
            child.wait()
        if not out.is_file():
            lines = errors.decode(errors="replace").strip().splitlines()
            return lines[-1][:200] if lines else f"it ended with code {child.returncode}"
        corpus, each = json.loads(out.read_text())
        return corpus, each


def main() -> None:
    name, out = sys.argv[1:]
    predictions, references = json.load(sys.stdin)
    ours = dict(enumerate([text] for text in predictions))
    theirs = dict(enumerate([text.replace("|||", "") for text in texts] for texts in references))
    if name == "METEOR":
        from pycocoevalcap.meteor.meteor import Meteor

        corpus, each = Meteor().compute_score(theirs, ours)
    else:
        from pycocoevalcap.spice.spice import Spice

        socket.setdefaulttimeout(30)
        try:
            spice = Spice()
        except OSError as error:
            raise SystemExit(f"its models cannot be downloaded ({error})") from None
        corpus, parts = spice.compute_score(theirs, ours)
        each = [part["All"]["f"] for part in parts]
    each = [None if math.isnan(score) else float(score) for score in each]
    Path(out).write_text(json.dumps([float(corpus), each]))


if __name__ == "__main__":
    main()
