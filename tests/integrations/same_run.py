"""Compares a script's run under the key with the same script's run without it, figure by figure and file by file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

__all__ = ["assert_same_files", "assert_same_log", "deepspeed_json"]

# AdamW divides by sqrt(v): weights whose gradient is rounding noise take steps of noise, hence a tolerance above fp32's own.
TOLERANCE = 1e-5


def deepspeed_json(stage: int = 1, tp_size: int | None = 2, **more: Any) -> dict[str, Any]:
    """The JSON that the HF documentation recommends, everything "auto", with the key if `tp_size` is given."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    config = {**dict.fromkeys(names, "auto"), "zero_optimization": zero, **more}
    return config if tp_size is None else {**config, "ds_seqpar": {"tp_size": tp_size}}


def assert_same_log(
    mine: list[dict[str, Any]], theirs: list[dict[str, Any]], *, without: tuple[str, ...] = (), absolute: float = 0.0
) -> None:
    """Every logged figure of every step, to 1e-5 of it (or `absolute`, for differences of larger figures); counts exactly."""
    assert [sorted(set(entry) - set(without)) for entry in mine] == [sorted(set(x) - set(without)) for x in theirs]
    for ours, entry in zip(mine, theirs, strict=True):
        for name, value in entry.items():
            if name in without:
                continue
            if isinstance(value, float):
                assert abs(ours[name] - value) <= max(TOLERANCE * abs(value), absolute), (
                    f"step {entry['step']}: {name} {ours[name]} not {value}"
                )
            else:
                assert ours[name] == value, f"step {entry['step']}: {name} {ours[name]} instead of {value}"


def assert_same_files(mine: Path, theirs: Path, *, also: tuple[str, ...] = ()) -> None:
    """The same file names; JSON equal; every tensor equal to 1e-5 of its norm, in name, shape and dtype; `also` theirs alone."""
    names = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in mine.iterdir()) == names and names
    for name in names:
        if name.endswith(".json"):
            assert json.loads((mine / name).read_text()) == json.loads((theirs / name).read_text()), name
        if not name.endswith(".safetensors"):
            continue
        ours, expected = load_file(mine / name), load_file(theirs / name)
        assert sorted({*ours, *also}) == sorted({*expected, *also})
        for key, tensor in expected.items():
            if key in also:
                continue
            assert (ours[key].dtype, ours[key].shape) == (tensor.dtype, tensor.shape), key
            error = float((ours[key] - tensor).norm() / tensor.norm().clamp_min(torch.finfo(tensor.dtype).tiny))
            assert error <= TOLERANCE, f"{key}: relative error {error}"
