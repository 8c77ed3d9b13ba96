"""Weight files read and written in pieces: no more of a file is in memory, or leaves the disk, than is asked for."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..plan.cuts import Cut

__all__ = [
    "DTYPE_NAMES", "LazyTensor", "MergedTensor", "PickledFile", "SafetensorsFile", "WeightFile", "as_bytes", "lazy_tensors",
    "writing",
]  # fmt: skip

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""torch's dtypes in the safetensors format."""


class WeightFile(Protocol):
    """A file that knows beforehand which tensors it will hold."""

    def write(self, name: str, tensor: Tensor) -> None:
        """Takes one of them, on the CPU."""

    def close(self) -> None:
        """Ends the file; raises CheckpointError if a tensor was never written."""


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, which it shares."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A body that calls torch.save on `path`. Raises CheckpointError with the file and the reason if it cannot be written.

    torch.save says where in its own code a disk was full, and not that it was; one more write asks the system.
    """
    try:
        yield
    except (OSError, RuntimeError) as problem:
        raise CheckpointError(f"{path} was not written: {_reason(path, problem)}") from problem


def _reason(path: Path, problem: Exception) -> str:
    refused = problem
    if not isinstance(problem, OSError):
        try:
            with open(path, "ab") as file:
                file.write(bytes(_PROBE))
                file.flush()
                os.fsync(file.fileno())
        except OSError as reason:
            refused = reason
    said = refused.strerror if isinstance(refused, OSError) else None
    return said or f"{type(refused).__name__}: {refused}"


_PROBE = 2**16


class SafetensorsFile:
    """A safetensors file whose tensors may come in any order; holds none of them."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Lays the file out. `tensors`: shapes and dtypes alone are read, so they may be on the meta device."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._missing, self._places, end = dict(tensors), {}, 0
        # The widest dtypes first: every tensor then starts at a multiple of its element's size.
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
            if tensor.dtype not in DTYPE_NAMES:
                raise CheckpointError(f"{name}: safetensors cannot hold {tensor.dtype}")
            start, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
            self._places[name] = start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._begin = 8 + len(text)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._write_at(memoryview(len(text).to_bytes(8, "little") + text), 0)
        os.ftruncate(self._file, self._begin + end)

    def write(self, name: str, tensor: Tensor) -> None:
        expected = self._missing.pop(name)
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise CheckpointError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not as it was laid out")
        self._write_at(as_bytes(tensor.contiguous()), self._begin + self._places[name])

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)
        if self._missing:
            raise CheckpointError(f"{next(iter(self._missing))} was not written")

    def _write_at(self, data: memoryview, offset: int) -> None:
        while data:
            done = os.pwrite(self._file, data, offset)
            data, offset = data[done:], offset + done


class PickledFile:
    """A file as torch.save writes it; holds its tensors until the last one came."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self._path, self._names, self._held = path, set(tensors), dict[str, Tensor]()

    def write(self, name: str, tensor: Tensor) -> None:
        self._held[name] = tensor.clone() if tensor._is_view() else tensor
        if self._held.keys() == self._names:
            with writing(self._path):
                torch.save(self._held, self._path)
            self._held = {}
            self._names = set()

    def close(self) -> None:
        if self._names:
            raise CheckpointError(f"{next(iter(self._names - self._held.keys()))} was not written")


@dataclass
class LazyTensor:
    """A tensor in a safetensors file. `tensor[...]` reads it, or, where it is cut, this rank's part and nothing else."""

    path: Path
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    cut: Cut | None = None
    rank: int = 0

    def get_shape(self) -> list[int]:
        """As the file has it, whole."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """In the words of the safetensors format."""
        return DTYPE_NAMES[self.dtype]

    def __getitem__(self, index: object) -> Tensor:
        if index is not Ellipsis:
            raise CheckpointError(f"a lazily read tensor is read as a whole, with [...], not {index!r}")
        dim, size = (0, self.shape[0] if self.shape else 1) if self.cut is None else (self.cut.dim, self.cut.size)
        if self.shape and self.shape[dim] != size:
            raise CheckpointError(
                f"{self.path}: dimension {dim} of a tensor of shape {list(self.shape)} should be {size}"
            )
        ranges = ((0, size),) if self.cut is None else self.cut.ranges[self.rank]
        held = sum(stop - start for start, stop in ranges)
        local = (*self.shape[:dim], held, *self.shape[dim + 1 :]) if self.shape else ()
        result = torch.empty(local, dtype=self.dtype)
        inner = math.prod(self.shape[dim + 1 :]) * result.element_size()
        outer = math.prod(self.shape[:dim])
        data, done = as_bytes(result), 0
        file = os.open(self.path, os.O_RDONLY)
        try:
            for block in range(outer):
                for start, stop in ranges:
                    length = (stop - start) * inner
                    self._read(file, data[done : done + length], self.begin + (block * size + start) * inner)
                    done += length
        finally:
            os.close(file)
        return result

    def _read(self, file: int, into: memoryview, offset: int) -> None:
        while into:
            count = os.preadv(file, [into], offset)
            if not count:
                raise CheckpointError(f"{self.path} is truncated")
            into, offset = into[count:], offset + count


@dataclass
class MergedTensor:
    """Tensors of a file that are one tensor of the model, as experts are: stacked in dimension 0, the stacks side by side in `dim`.

        stacks[i][e] [n_i, ...] -> the whole [E, sum of n_i, ...] for dim 1; `tensor[...]` reads this rank's part of it

    Beside the result one source's part is in memory.
    """

    stacks: list[list[LazyTensor]]
    dim: int = 1
    cut: Cut | None = None
    rank: int = 0

    def get_shape(self) -> list[int]:
        """Of the whole."""
        shape = [len(self.stacks[0]), *self.stacks[0][0].shape]
        shape[self.dim] = sum(stack[0].shape[self.dim - 1] for stack in self.stacks)
        return shape

    def get_dtype(self) -> str:
        """In the words of the safetensors format."""
        return self.stacks[0][0].get_dtype()

    @property
    def fits(self) -> bool:
        """False if it cannot be read so: sources of different shapes, or a cut that runs through the stacked dimension."""
        first = self.stacks[0]
        if not first or any(len(stack) != len(first) for stack in self.stacks) or self.dim > len(first[0].shape):
            return False
        for stack in self.stacks:
            if any(x.shape != stack[0].shape or x.dtype != first[0].dtype for x in stack):
                return False
            if any(a != b for d, (a, b) in enumerate(zip(stack[0].shape, first[0].shape)) if d != self.dim - 1):
                return False
        if self.cut is None:
            return True
        ranges = self.cut.ranges[self.rank]
        return self.cut.dim > 0 and all(a[1] <= b[0] for a, b in pairwise(ranges))

    def __getitem__(self, index: object) -> Tensor:
        shape = self.get_shape()
        if self.cut is not None:
            if shape[self.cut.dim] != self.cut.size:
                raise CheckpointError(
                    f"{self.stacks[0][0].path}: dimension {self.cut.dim} of {shape} should be {self.cut.size}"
                )
            shape[self.cut.dim] = self.cut.local_size(self.rank)
        result = torch.empty(shape, dtype=self.stacks[0][0].dtype)
        begin = place = 0
        for stack in self.stacks:
            size = stack[0].shape[self.dim - 1]
            part = self._part(begin, size)
            held = size if part is None or part.dim != self.dim - 1 else part.local_size(0)
            for expert, source in enumerate(stack):
                mine = replace(source, cut=part, rank=0)
                result[expert].narrow(self.dim - 1, place, held).copy_(mine[index])
            begin, place = begin + size, place + held
        return result

    def _part(self, begin: int, size: int) -> Cut | None:
        """What is read of each source of a stack that lies at `begin` of the whole."""
        if self.cut is None:
            return None
        ranges = self.cut.ranges[self.rank]
        if self.cut.dim != self.dim:
            return Cut(self.cut.dim - 1, self.cut.size, (ranges,))
        inside = ((max(start - begin, 0), min(stop - begin, size)) for start, stop in ranges)
        return Cut(self.dim - 1, size, (tuple((a, b) for a, b in inside if a < b),))


def lazy_tensors(path: Path) -> dict[str, LazyTensor]:
    """Name -> tensor of a safetensors file, of which only the header is read. Raises CheckpointError if it is damaged."""
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    size = path.stat().st_size
    with open(path, "rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise CheckpointError(f"{path} is truncated, or not a safetensors file")
        header = json.loads(file.read(length))
    found = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        start, stop = about["data_offsets"]
        if about["dtype"] not in dtypes:
            raise CheckpointError(f"{path}: {name} has dtype {about['dtype']}, which cannot be read in slices")
        if 8 + length + stop > size:
            raise CheckpointError(f"{path} is truncated: {name} ends at byte {8 + length + stop} of {size}")
        found[name] = LazyTensor(path, 8 + length + start, dtypes[about["dtype"]], tuple(about["shape"]))
    return found
