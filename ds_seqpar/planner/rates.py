"""Measured rates of a GPU and its links: what turns counted work into time."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .given import write_whole

__all__ = ["HOST", "OLDER", "Rates", "cache_file", "load_rates", "save_rates"]

SHIPPED = Path(__file__).with_name("rates")
HOST = ("host_forward_us", "host_backward_us", "host_plain_us", "host_engine_us")
OLDER = "the host's times are the H100's, for this file has none: `python -m ds_seqpar calibrate` measures them"
Points = tuple[tuple[int, float], ...]
"""(tokens of a forward, rate) in rising order; between them by the logarithm of the tokens, beyond them as at the end."""


@dataclass(frozen=True)
class Rates:
    """`source` says where each figure is from. Causal attention counts half its square, here as in the count of work."""

    name: str
    source: str
    gemm_tflops: Points
    attention_forward_tflops: Points
    attention_backward_tflops: Points
    traffic_gb_per_s: float  # of everything that is no product and no attention
    peer_gb_per_s: float  # received by a GPU from its tensor-parallel group
    exposed_us_per_transfer: float  # of a transfer that overlaps; the rest of it hides
    optimizer_gb_per_s: float  # read and written by the optimizer's step
    # What Python takes to launch work, microseconds.
    host_forward_us: float  # an operation of ds_seqpar's layers in forward
    host_backward_us: float  # in backward
    host_plain_us: float  # an operation of transformers' own layers, either way: an assumption where it is shipped
    host_engine_us: float  # DeepSpeed's, for each trained parameter: of a micro batch, and again of a step
    node_gb_per_s: float = 40.0  # a GPU's share of the links between nodes: an assumption, 400 Gb/s at 80 %
    host_gb_per_s: float = (
        40.0  # the same of an offloaded optimizer, a GPU's share of the computer's memory: an assumption
    )

    def at(self, points: Points, tokens: int) -> float:
        """The rate of a forward of `tokens`."""
        if tokens <= points[0][0]:
            return points[0][1]
        for (t0, r0), (t1, r1) in pairwise(points):
            if tokens <= t1:
                return r0 + (r1 - r0) * math.log(tokens / t0) / math.log(t1 / t0)
        return points[-1][1]


def _shipped() -> dict[str, Rates]:
    return {path.stem: _read(path) for path in sorted(SHIPPED.glob("*.json"))}


def _read(path: Path) -> Rates:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(values, dict) or "gemm_tflops" not in values:
            raise TypeError("it holds no rates")
        known = {field.name for field in fields(Rates)}
        if unknown := set(values) - known:
            raise ConfigError(f"{path} has unknown fields {sorted(unknown)}; known fields: {sorted(known)}")
        for name, value in values.items():
            if name.endswith("_tflops"):
                values[name] = tuple((int(tokens), float(rate)) for tokens, rate in value)
        if not any(name in values for name in HOST):
            h100 = json.loads((SHIPPED / "h100.json").read_text())
            values |= {name: h100[name] for name in HOST} | {"source": f"{values.get('source', '')}; {OLDER}"}
        rates = Rates(**values)
        positive = [x for x in asdict(rates).values() if isinstance(x, float)]
        positive += [rate for p in vars(rates).values() if isinstance(p, tuple) for _, rate in p]
        if not all(x > 0 and math.isfinite(x) for x in positive):
            raise ConfigError(f"{path} holds a rate that is not positive")
        return rates
    except (OSError, TypeError, ValueError) as problem:
        if isinstance(problem, ConfigError):
            raise
        raise ConfigError(
            f"{path} is no file of rates (`python -m ds_seqpar calibrate` makes one): {problem}"
        ) from problem


def cache_file() -> Path:
    """Where `calibrate` saves and `plan` looks."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ds_seqpar" / "rates.json"


def load_rates(wanted: str | None = None) -> Rates:
    """By a shipped name or a file; without `wanted` what was calibrated on this machine, or H200's.

    Raises ConfigError if there are none of that name.
    """
    shipped = _shipped()
    if wanted is None:
        return _read(cache_file()) if cache_file().exists() else shipped["h200"]
    if wanted in shipped:
        return shipped[wanted]
    if Path(wanted).exists():
        return _read(Path(wanted))
    raise ConfigError(f"there are no rates {wanted!r}; use one of {sorted(shipped)}, or a file that `calibrate` made")


def save_rates(rates: Rates, path: Path) -> None:
    """Writes them as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(asdict(rates), indent=2) + "\n")
