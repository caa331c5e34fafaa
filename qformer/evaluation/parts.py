"""What a pass over a whole collection leaves on disk as it goes: a folder of small files, so that a stopped one goes on."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qformer.files import atomic_file, begin_folder, require_made_of


class Parts:
    """Files of tensors in one folder, each written whole or not at all.

    Args:
        made_of: what the parts depend on; a folder that was made of something else is refused.

    Raises: ValueError when the folder was made of something else, or is none of parts.
    """

    def __init__(self, folder: Path, made_of: dict[str, Any]):
        self.folder, self.made_of = folder, made_of
        require_made_of(folder, made_of, name=str(folder), fix="delete it or give another --answers")

    def begin(self) -> None:
        """Make the folder; for each process."""
        begin_folder(self.folder, self.made_of)

    def has(self, name: str) -> bool:
        """Whether there is such a part."""
        return self._path(name).is_file()

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a part; None where it is not there.

        Raises: ValueError when it cannot be read.
        """
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it") from None

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write a part; on disk when this returns."""
        with atomic_file(self._path(name)) as scratch:
            save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, scratch)

    def names(self, prefix: str) -> list[str]:
        """The parts whose names begin with `prefix`, in their order."""
        return sorted(path.stem for path in self.folder.glob(f"{prefix}*.safetensors"))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
