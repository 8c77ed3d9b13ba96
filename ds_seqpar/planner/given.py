"""What a user gives `plan`, checked before the minutes of planning, and files written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..config import KEY, SeqParConfig
from ..errors import ConfigError

__all__ = ["read_ds_config", "require_writable", "write_whole"]

AUTO = "auto"
"""What the Hugging Face Trainer fills in."""
SECTIONS = ("zero_optimization", "bf16", "bfloat16", "fp16")
COUNTS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")


def read_ds_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A DeepSpeed JSON, and lines about what of it a plan takes otherwise than it stands there.

    Raises ConfigError, which names the field, for what DeepSpeed or the `ds_seqpar` key would not take.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise ConfigError(f"{path} is no JSON file: {problem}") from problem
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold a JSON object, such as {{}}, not {json.dumps(found)[:40]}")
    for name in SECTIONS:
        _require_object(found.get(name), f'{path}: "{name}"')
    for name in ("offload_optimizer", "offload_param"):
        value = (found.get("zero_optimization") or {}).get(name)
        _require_object(value, f'{path}: "zero_optimization.{name}"', such_as='{"device": "cpu"}')
    if KEY in found:
        SeqParConfig.from_json(found[KEY])
    return found, _counts(path, found)


def _require_object(value: Any, name: str, such_as: str = "{}") -> None:
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{name} must be an object such as {such_as}, not {json.dumps(value)}")


def _counts(path: Path, found: dict[str, Any]) -> list[str]:
    notes = []
    for name in COUNTS:
        value = found.get(name)
        if value == AUTO:
            if name != "train_batch_size":
                how = ", unless --micro-batch says otherwise" if name.startswith("train_micro") else ""
                notes.append(f'{path}: "{name}": "auto" is planned as 1{how}')
        elif value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(
                f'{path}: "{name}" must be a whole number of at least 1, or "auto", not {json.dumps(value)}'
            )
    total = found.get("train_batch_size")
    if total not in (None, AUTO):
        notes.append(
            f'{path}: "train_batch_size": {total} is left out: it depends on the choice (micro batch x accumulation x GPUs / GPUs a '
            "sequence); to keep it, set gradient_accumulation_steps"
        )
    for name, taken in (
        ("sequence_parallel_size", found.get("sequence_parallel_size")),
        ("tensor_parallel.autotp_size", (found.get("tensor_parallel") or {}).get("autotp_size")),
    ):
        if taken not in (None, 0, 1):
            notes.append(f'{path}: "{name}": {taken} is left out: the plan decides how a sequence is split')
    return notes


def require_writable(path: Path, *, folder: bool = False) -> None:
    """Raises ConfigError if `path` could not be written as a file (a folder, which may be made) later on."""
    if folder:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file; name a folder to write into")
        place = next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
    else:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; name a file, such as {path / 'out.json'}")
        place = path.absolute().parent
        if not place.is_dir():
            raise ConfigError(f"{path} cannot be written: there is no folder {place}; make it first")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{path} cannot be written: no permission in {place}")


def write_whole(path: Path, text: str) -> None:
    """Beside `path` first and then under its name, so that a file that is there stays whole. Raises ConfigError with the reason.

    A link stays a link: the file that it names is replaced.
    """
    target = path.resolve()
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_text(text)
        if target.exists():
            beside.chmod(target.stat().st_mode & 0o777)
        beside.replace(target)
    except OSError as problem:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"{path} was not written: {problem.strerror or problem}") from problem
