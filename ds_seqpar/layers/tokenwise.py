"""A module proves that it treats each token alone before it is run on a shard of the tokens."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

__all__ = ["is_tokenwise"]


def is_tokenwise(module: nn.Module, hidden_size: int, like: Tensor | None = None) -> bool:
    """True if `module` maps [1, n, h] to [1, n, h'] (or several of them) row by row, for any n and any order of the rows.

    Measured on random rows with the module's own weights, in evaluation mode; the module is left as it was. A module whose
    weights have no values (on the meta device, or fake tensors) is measured with random ones. One without parameters is
    measured in the dtype of `like`. A copy on the CPU is measured first: a table that takes the rows for its indices raises an
    error there, which on a GPU ends the process. Only a kernel that takes a GPU's tensors alone is measured on one.
    """
    parameter = next(module.parameters(), like)
    assert parameter is not None, "a module without parameters needs a tensor that is like its inputs"
    device = parameter.device if parameter.is_cuda else None
    if parameter.is_meta or type(parameter.data) is not Tensor:
        module, device = _with_values(module), None
        parameter = next(module.parameters(), torch.empty(0))
    on_cpu = module if device is None else copy.deepcopy(module).to("cpu")
    try:
        found = _measured(on_cpu, hidden_size, parameter.to("cpu"))
    except IndexError:
        return False
    if found is None and any("forward" in vars(part) for part in module.modules()):
        device = device or _accelerator()
    if found is None and device is not None:
        like = torch.empty(0, dtype=parameter.dtype, device=device)
        found = _measured(copy.deepcopy(module).to(device), hidden_size, like)
    return bool(found)


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


@torch.no_grad()
def _measured(module: nn.Module, hidden_size: int, like: Tensor) -> bool | None:
    """None: the module cannot be called with hidden states of the dtype and on the device of `like`.

    Raises IndexError where it takes them for indices of a table.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 4, hidden_size, generator=generator).to(like.device, like.dtype)
    was_training = module.training
    module.eval()
    try:
        whole = module(rows)
        each = [_tensors(module(rows[:, i : i + 1])) for i in (3, 0, 2, 1)]
        singly = tuple(torch.cat(parts, dim=1) for parts in zip(*each, strict=True))
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None
    finally:
        module.train(was_training)
    ours, theirs = _tensors(whole), _tensors(singly)
    return bool(ours) and len(ours) == len(theirs) and all(map(_same_rows, ours, theirs))


def _with_values(module: nn.Module) -> nn.Module:
    """A copy of `module` on the CPU with random parameters; buffers are ones, which divide and multiply harmlessly."""
    generator = torch.Generator().manual_seed(1)
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        memo[id(parameter)] = nn.Parameter(values.to(parameter.dtype), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.ones(buffer.shape, dtype=buffer.dtype)
    return copy.deepcopy(module, memo)


def _tensors(output: object) -> list[torch.Tensor]:
    parts = output if isinstance(output, tuple) else (output,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _same_rows(whole: torch.Tensor, singly: torch.Tensor) -> bool:
    if whole.shape[:2] != (1, 4) or singly.shape != whole.shape:
        return False
    tolerance = 64 * torch.finfo(whole.dtype).eps if whole.is_floating_point() else 0.0
    return torch.allclose(whole[:, (3, 0, 2, 1)], singly, rtol=tolerance, atol=tolerance * float(whole.abs().max()))
