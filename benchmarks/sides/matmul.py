"""How fast the machine multiplies matrices: what every share of peak is a share of."""

from pathlib import Path
from typing import Any

import torch


class Products:
    def __init__(self, side: int, task: dict[str, Any]) -> None:
        dtype, device = getattr(torch, task["dtype"]), task["device"]
        self.a, self.b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def step(self, round: int) -> dict[str, float]:
        self.a @ self.b
        return {"flop": 2.0 * len(self.a) ** 3}


def build(folder: Path, task: dict[str, Any]) -> Products:
    return Products((4096 if task["device"] == "cpu" else 8192) if task["encoder_width"] > 64 else 128, task)
