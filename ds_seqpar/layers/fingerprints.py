"""What the arguments of a forward hold, however deep: every tensor and every plain value, by a path that names it."""

from __future__ import annotations

import dataclasses
import enum
import zlib
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["fingerprint", "gpu_hash", "has_readable_content", "leaves", "tensors_in"]

_PLAIN = (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.Size, type(None), np.ndarray, np.generic)
_DEPTH = 16  # an object that refers to itself in ever new copies


class _OwnHeads:
    """A tensor of a cache: this rank's heads, so that neither their number nor their values are the other ranks'."""

    def __init__(self, x: Tensor) -> None:
        self.tensor = x
        self.about = f"{x.dtype} {[*x.shape[:1], *x.shape[2:]]} beside the heads{_trained(x)}"


def _trained(x: Tensor) -> str:
    return " that needs a gradient" if x.requires_grad else ""


def leaves(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> tensor, plain value, or type of what holds neither.

    Of mappings, sequences, sets and dataclasses everything counts; of any other object its tensors do, since its plain
    attributes (a device, a time, a name) may be a rank's own. Caches of keys and values hold a rank's own heads.
    """
    return {path: x for name, value in inputs.items() for path, x in _leaves(name, value, _is_cache(name, value), ())}


def tensors_in(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of every tensor in `inputs`, caches included."""
    for path, x in leaves(inputs).items():
        if isinstance(x, Tensor):
            yield path, x
        elif isinstance(x, _OwnHeads):
            yield path, x.tensor


def _leaves(path: str, x: Any, cache: bool, around: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(x, Tensor):
        yield path, _OwnHeads(x) if cache else x
        return
    if isinstance(x, _PLAIN):
        yield path, x
        return
    if isinstance(x, list | tuple) and all(isinstance(part, _PLAIN) for part in x):
        yield path, list(map(fingerprint, x))
        return
    yield path, type(x)
    if id(x) in around or len(around) == _DEPTH:
        return
    around = (*around, id(x))
    cache = cache or _is_cache("", x)
    parts, whole = _parts(x)
    for name, part in parts:
        for inner, leaf in _leaves(path + name, part, cache, around):
            if whole or not isinstance(leaf, _PLAIN):
                yield inner, leaf


def _parts(x: Any) -> tuple[list[tuple[str, Any]], bool]:
    """(what stands in `x`, by how it is reached; whether its plain values count)."""
    if isinstance(x, Mapping):
        return [(f"[{key!r}]", value) for key, value in x.items()], True
    if isinstance(x, list | tuple):
        return [(f"[{i}]", value) for i, value in enumerate(x)], True
    if isinstance(x, Set):
        return [("{}", repr(sorted(map(repr, x))))], True
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        names = [field.name for field in dataclasses.fields(x)]
        return [(f".{name}", getattr(x, name, None)) for name in names], True
    if isinstance(x, nn.Module | type) or isinstance(x, Callable):  # type: ignore[arg-type]  # code, not data
        return [], False
    return [(f".{name}", value) for name, value in sorted(getattr(x, "__dict__", {}).items())], False


def _is_cache(name: str, x: Any) -> bool:
    return name in ("past_key_values", "cache_params") or hasattr(x, "get_seq_length")


def has_readable_content(x: Any) -> bool:
    """Whether `x` is a tensor that holds what it shows: no handle, fake or distributed tensor, no sparse or nested one."""
    return type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided and not (x.is_nested or x.is_meta)


def fingerprint(x: Any) -> str:
    """Type, shape and content of a leaf; a GPU's content is left out, see `gpu_hash`."""
    if isinstance(x, Tensor):
        about = f"{x.dtype} {list(x.shape)}{_trained(x)}"
        if x.device.type != "cpu" or not has_readable_content(x):
            return about
        plain = x.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        content = bytes(plain.view(torch.uint8).numpy()) if x.numel() else b""
        return f"{about} #{zlib.crc32(content):08x}"
    if isinstance(x, np.ndarray):
        content = repr(x.tolist()).encode() if x.dtype.hasobject else np.ascontiguousarray(x).tobytes()
        return f"{x.dtype} {list(x.shape)} #{zlib.crc32(content):08x}"
    if isinstance(x, _OwnHeads):
        return x.about
    said = x.__name__ if isinstance(x, type) else repr(x)
    return said if len(said) <= 120 else f"{said[:80]}... #{zlib.crc32(said.encode()):08x}"


def gpu_hash(x: Tensor) -> Tensor:
    """A number made of the content of `x`, on its device; nothing waits for it."""
    flat = x.detach().reshape(-1)
    if flat.dtype.is_complex:
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    if flat.dtype.is_floating_point:
        flat = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    if flat.numel() > 2**22:  # position by position only where it costs nothing
        return flat.sum(dtype=torch.int64)
    weights = torch.arange(1, flat.numel() + 1, device=flat.device, dtype=torch.int64)
    return (flat.to(torch.int64) * weights).sum()
