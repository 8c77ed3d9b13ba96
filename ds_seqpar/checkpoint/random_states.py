"""A rank's random states: torch's, the current GPU's, Python's and NumPy's."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["RANDOM", "random_file", "random_states", "restore_random"]

RANDOM = "ds_seqpar_random_rank_"
"""How the names of their files begin."""


def random_file(rank: int) -> str:
    return f"{RANDOM}{rank}.pt"


def random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    if "numpy" in sys.modules:
        name, keys, position, has_gauss, gauss = sys.modules["numpy"].random.get_state()
        states["numpy"] = (str(name), keys.tolist(), int(position), int(has_gauss), float(gauss))
    return states


def restore_random(path: Path) -> None:
    states = torch.load(path, weights_only=True)
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "numpy" in states and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(states["numpy"])
