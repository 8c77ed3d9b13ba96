"""The `ds_seqpar` object of a DeepSpeed JSON, read once into a frozen dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from .errors import ConfigError

__all__ = ["KEY", "Overlap", "Recompute", "SeqParConfig"]

KEY = "ds_seqpar"


class Recompute(str, Enum):
    """What is computed a second time in backward instead of being kept."""

    NONE = "none"
    SELECTIVE = "selective"  # MLP blocks: they keep their input shard alone; attention is kept
    FULL = "full"  # whole layers: each keeps its input shard alone


class Overlap(str, Enum):
    """Whether collectives run beside the matrix products that do not need them."""

    AUTO = "auto"
    OFF = "off"


@dataclass(frozen=True)
class SeqParConfig:
    """The checked contents of the `ds_seqpar` key; field for field what the README documents."""

    tp_size: int
    enabled: bool = True
    sequence_parallel: bool = True
    recompute: Recompute = Recompute.NONE
    loss_chunk_tokens: int = 4096
    overlap: Overlap = Overlap.AUTO
    verify: bool | None = None  # None: a model with a plan of the user's is verified, any other is not
    replica_check_interval: int = 0
    timeout_s: int = 0
    memory_check: bool = True
    plan: Mapping[str, str] = field(default_factory=dict)

    @property
    def verifies(self) -> bool:
        """Whether a small batch is compared with the unsharded model before training."""
        return bool(self.plan) if self.verify is None else self.verify

    @classmethod
    def from_json(cls, section: object) -> SeqParConfig:
        """Reads the value under the key; raises ConfigError naming the field, the value and the way out."""
        if not isinstance(section, Mapping):
            raise ConfigError(f'"{KEY}" must be an object such as {{"tp_size": 2}}, not {section!r}')
        known = [f.name for f in fields(cls)]
        unknown = [name for name in section if name not in known]
        if unknown:
            raise ConfigError(f'"{KEY}" has unknown field(s) {unknown}; known fields: {known}')
        values = dict(section)
        for name in ("enabled", "sequence_parallel", "verify", "memory_check"):
            _check(values, name, bool, "true or false")
        if values.get("enabled") is False:
            values.setdefault("tp_size", 1)
        if "tp_size" not in values:
            raise ConfigError(
                f'"{KEY}.tp_size" is missing: set it to the number of GPUs that share one model copy, e.g. 2'
            )
        for name, least in (("tp_size", 1), ("loss_chunk_tokens", 1), ("replica_check_interval", 0), ("timeout_s", 0)):
            _check(values, name, int, f"an integer >= {least}", least)
        if "plan" in values:
            values["plan"] = _plan(values["plan"])
        for name, enum in (("recompute", Recompute), ("overlap", Overlap)):
            if name in values:
                values[name] = _choice(name, values[name], enum)
        return cls(**values)


def _plan(plan: object) -> dict[str, str]:
    if isinstance(plan, Mapping) and plan and all(isinstance(x, str) and x for pair in plan.items() for x in pair):
        return dict(plan)
    example = '{"model.layers.*.attn.qkv": "packed_colwise:q,kv,kv"}'
    raise ConfigError(f'"{KEY}.plan" must be an object of patterns and styles, such as {example}, not {plan!r}')


def _check(values: dict[str, Any], name: str, kind: type, wanted: str, least: int | None = None) -> None:
    if name not in values:
        return
    value = values[name]
    wrong = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
    if wrong or (least is not None and value < least):
        raise ConfigError(f'"{KEY}.{name}" must be {wanted}, not {value!r}')


def _choice(name: str, value: object, enum: type[Enum]) -> Enum:
    names = [member.value for member in enum]
    if not isinstance(value, str) or value not in names:
        raise ConfigError(f'"{KEY}.{name}" must be one of {names}, not {value!r}')
    return enum(value)
