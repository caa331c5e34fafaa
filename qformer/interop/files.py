"""Files of tensors that others wrote: safetensors, and pickles of which nothing but tensors is read."""

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from qformer.messages import one_line

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"  # as transformers calls them; the first is preferred
INDEX = ".index.json"


def read_pickle(file: Path, expected: str) -> Any:
    """What a file of `torch.save` holds, left on the disk until it is used where the format allows it.

    Args:
        expected: the end of an error.

    Raises: ValueError when it is damaged, or would run code.
    """
    try:
        with file.open("rb") as opened:
            in_pieces = opened.read(2) == b"PK"  # the zip format of today; that of 2020 and before is one long pickle
        return torch.load(file, map_location="cpu", weights_only=True, mmap=in_pieces)
    except pickle.UnpicklingError as error:
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{file} is a pickle that calls code ({code[1]}), not one of tensors alone; it was not run. {expected}"
            ) from None
        raise ValueError(f"{file} is no file of PyTorch, or a damaged one; {expected}") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file} {_damaged(error)}") from None


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of safetensors.

    Raises: ValueError when it is damaged.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} {_damaged(error)}") from None


def _damaged(error: Exception) -> str:
    return f"is damaged or incomplete ({one_line(error, 160)}); compare its size and download it again"


class Weights(Mapping[str, Tensor]):
    """The tensors that `save_pretrained` left in a folder by name, float32, each read from its shard when asked for.

    Raises: ValueError, on any access, when a file is missing, damaged, or would run code.
    """

    def __init__(self, folder: Path, source: str) -> None:
        self.source, self.opened = source, dict[Path, Any]()
        self.shards = self._shards(folder)
        for path in set(self.shards.values()):
            if not path.is_file():
                raise ValueError(f"{source} lacks {path.name}, which its index names; download it again")

    def _shards(self, folder: Path) -> dict[str, Path]:
        for file in (SAFETENSORS, PICKLE):
            index, whole = folder / f"{file}{INDEX}", folder / file
            if index.is_file():
                try:
                    return {name: folder / part for name, part in json.loads(index.read_text())["weight_map"].items()}
                except (ValueError, KeyError, AttributeError) as error:
                    raise ValueError(
                        f"{index} is no index of safetensors or pickles ({one_line(error)}); download it again"
                    ) from None
            if whole.is_file():
                return dict.fromkeys(self._open(whole).keys(), whole)
        raise ValueError(f"{self.source} has no {SAFETENSORS} and no {PICKLE}; expected the weights in one of them")

    def _open(self, path: Path) -> Any:
        if path in self.opened:
            return self.opened[path]
        if path.suffix == ".bin":
            tensors = read_pickle(path, f"expected what save_pretrained of transformers writes as {PICKLE}")
            if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
                raise ValueError(f"{path} holds no dictionary of tensors")
            return self.opened.setdefault(path, tensors)
        try:
            return self.opened.setdefault(path, safe_open(path, "pt"))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} cannot be read as safetensors ({one_line(error)}); it is damaged or incomplete"
            ) from None

    def __getitem__(self, name: str) -> Tensor:
        path = self.shards[name]
        opened = self._open(path)
        try:
            return (opened[name] if isinstance(opened, Mapping) else opened.get_tensor(name)).float()
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path} has no {name}, which its index names ({one_line(error)}); download it again"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self.shards

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)
