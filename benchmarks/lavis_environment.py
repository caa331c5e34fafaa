"""An environment for LAVIS beside ours: its Q-Former models, an old transformers that they import, and our torch.

python benchmarks/lavis_environment.py      # make .venv-lavis (a minute), if it is not there yet

LAVIS wants transformers 4.26 and dozens of packages that its Q-Former does not need: none of them is installed.
"""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / ".venv-lavis"
WITHOUT_DEPENDENCIES = [
    "salesforce-lavis==1.0.2",
    "transformers==4.26.1",
    "huggingface_hub==0.23.0",
    "tokenizers==0.13.3",
]
WITH_DEPENDENCIES = ["requests"]  # of huggingface_hub


def python() -> Path:
    """The environment's interpreter; the environment is made on first use.

    Raises: SystemExit when a package cannot be installed.
    """
    found = FOLDER / "bin" / "python"
    complete = FOLDER / "complete"
    if complete.is_file():
        return found
    if sys.version_info >= (3, 12):
        raise SystemExit("LAVIS needs tokenizers 0.13, which has no wheel for Python 3.12; use --peer transformers")
    print(f"making {FOLDER} ...", file=sys.stderr)
    venv.create(FOLDER, clear=True, with_pip=True)
    for packages, options in ((WITHOUT_DEPENDENCIES, ["--no-deps"]), (WITH_DEPENDENCIES, [])):
        done = subprocess.run(
            [found, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *options, *packages],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"pip cannot install {packages}: {done.stderr.strip()[-400:]}; use --peer transformers")
    # After its own packages it finds ours: both sides run the same torch.
    (site,) = (FOLDER / "lib").glob("python*/site-packages")
    (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    complete.touch()
    return found


if __name__ == "__main__":
    print(python())
