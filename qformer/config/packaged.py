"""What comes with the package, found by name wherever one stands: its configs and the small weights of Shapes.

A name is first a path from the current folder. In a clone's root that is all; in any other folder `configs/stage1.yaml`
and `qformer/shapes/weights/opt` are those of the package.
"""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

PACKAGE = Path(__file__).resolve().parents[1]
WEIGHTS = "qformer/shapes/weights/"
NAMES_WEIGHTS = ("encoder.id", "qformer.tokenizer", "llm.id")  # config keys


def find_config(name: str) -> Path:
    """The YAML file that `name` means; the path as it stands where there is none."""
    return next((path for path in (Path(name), PACKAGE / name) if path.is_file()), Path(name))


def config_names() -> list[str]:
    """The package's own configs, as `find_config` takes them: "configs/encoder/eva_g.yaml"."""
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("configs/**/*.yaml"))


def locate_weights(values: Any) -> Any:
    """Config values of OmegaConf in which weights that the current folder does not hold are named by their paths."""
    for key in NAMES_WEIGHTS:
        name = OmegaConf.select(values, key)
        scheme, _, folder = str(name).rpartition(":")
        if folder.startswith(WEIGHTS) and not Path(folder).exists() and (PACKAGE.parent / folder).exists():
            OmegaConf.update(values, key, f"{scheme}:{PACKAGE.parent / folder}".removeprefix(":"))
    return values


def portable(text: str) -> str:
    """A config as text that names the package's weights as `locate_weights` finds them on any machine."""
    return text.replace(f"{PACKAGE.parent}/{WEIGHTS}", WEIGHTS)
