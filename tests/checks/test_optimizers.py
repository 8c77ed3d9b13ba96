"""An optimizer that looks at more than an element is refused before it is given parts; one that does not trains as without sharding."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import transformers.optimization
from exactness import fresh_groups
from models import batches, tiny
from ranks import run_ranks
from torch import Tensor, nn
from torch.optim import Optimizer

import ds_seqpar
from ds_seqpar import ConfigError
from ds_seqpar.checks import optimizers
from ds_seqpar.checks.optimizers import check_named, check_optimizer


class _Plain(Optimizer):
    """A descent along what a function makes of each gradient."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def direction(self, parameter: Tensor, grad: Tensor) -> Tensor:
        return grad.sign()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * self.direction(parameter, parameter.grad))


class Trusting(_Plain):
    def direction(self, parameter: Tensor, grad: Tensor) -> Tensor:
        return grad * parameter.norm() / grad.norm()


class Centred(_Plain):
    def direction(self, parameter: Tensor, grad: Tensor) -> Tensor:
        return grad - grad.mean(-1, keepdim=True)


class ByRows(_Plain):
    def direction(self, parameter: Tensor, grad: Tensor) -> Tensor:
        return grad / grad.pow(2).mean(0, keepdim=True).sqrt()


class Clipping(_Plain):
    def direction(self, parameter: Tensor, grad: Tensor) -> Tensor:
        return grad * (1.0 / grad.norm()).clamp(max=1.0)


class Together(_Plain):
    """Scales by the norm of all its parameters' gradients."""

    def direction(self, parameter: Tensor, grad: Tensor) -> Tensor:
        known = [p.grad.norm() for group in self.param_groups for p in group["params"]]
        return grad / torch.stack(known).norm()


class NeedsMore(_Plain):
    def __init__(self, params: Any, needed: int) -> None:
        super().__init__(params)


def _parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(10, 4)), nn.Parameter(torch.randn(5))]


ALONE: list[Callable[[Any], Any]] = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    lambda p: torch.optim.AdamW(p, lr=0.0, fused=True, amsgrad=True),  # of a schedule that begins at 0
    lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 1e-6}, {"params": p[1:], "weight_decay": 0.0}], lr=torch.tensor(1e-3)),
    torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax, torch.optim.SparseAdam,
    torch.optim.Rprop, _Plain, lambda p: (lambda given: torch.optim.Adam(given)),
]  # fmt: skip
WHOLE: list[Callable[[Any], Any]] = [
    torch.optim.Adafactor, lambda p: torch.optim.Muon(p[:1]), torch.optim.LBFGS, transformers.optimization.Adafactor, Trusting, Centred,
    ByRows, Clipping, Together, lambda p: (lambda given: torch.optim.Muon(given)),
]  # fmt: skip


@pytest.mark.parametrize("make", ALONE)
def test_an_optimizer_that_treats_each_element_alone_is_let_through(make: Callable[[Any], Any]) -> None:
    assert check_optimizer(make(_parameters()), 2) == ""


@pytest.mark.parametrize("make", WHOLE)
def test_one_that_looks_at_more_is_refused(make: Callable[[Any], Any]) -> None:
    with pytest.raises(ConfigError, match="looks at whole parameters"):
        check_optimizer(make(_parameters()), 2)


@pytest.mark.parametrize("make", [torch.optim.Adafactor, lambda p: torch.optim.Muon(p[:1])])
def test_the_known_ones_are_measured_too(make: Callable[[Any], Any]) -> None:
    assert optimizers._measured(make(_parameters()), "it")[1] is False


def test_what_cannot_be_measured_is_remarked_and_nothing_is_drawn() -> None:
    needs_more = NeedsMore(_parameters(), 1)
    before = torch.random.get_rng_state()
    assert "NeedsMore treats each element" in check_optimizer(needs_more, 2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_names_in_the_json() -> None:
    for name in ("Adam", "AdamW", "Lion", "Adagrad", "SGD", "MuAdamW", None):
        check_named(name, 2)
    for name in ("Muon", "Lamb", "OneBitAdam", "ZeroOneAdam", "OneBitLamb", "Adafactor", "LBFGS"):
        with pytest.raises(ConfigError, match=name):
            check_named(name, 2)


def _said(call: Callable[[], Any]) -> str:
    try:
        call()
    except ConfigError as error:
        return str(error)
    return "nothing"


def _refused() -> SimpleNamespace:
    """What is said to an engine and to a loop of one's own, and whether the weights stayed as they were."""
    model = tiny("llama").train()
    config = {"train_micro_batch_size_per_gpu": 1, "ds_seqpar": {"tp_size": 2}, "zero_allow_untested_optimizer": True}
    said, whole = {}, [p.detach().clone() for p in model.parameters()]
    by_name = {**config, "optimizer": {"type": "Muon", "params": {"lr": 1e-3}}}
    fresh_groups()
    mine = torch.optim.Adafactor(model.parameters())
    said["engine"] = _said(lambda: deepspeed.initialize(model=model, optimizer=mine, config=config))
    said["made"] = _said(lambda: deepspeed.initialize(model=model, optimizer=torch.optim.Adafactor, config=config))
    said["json"] = _said(lambda: deepspeed.initialize(model=model, config=by_name))
    untouched = all(map(torch.equal, model.parameters(), whole))
    ds_seqpar.shard(model, {"tp_size": 2})
    model(**batches(1, 1)[0]).loss.backward()
    parts = [p.detach().clone() for p in model.parameters()]
    said["loop"] = _said(mine.step)
    said["again"] = _said(mine.step)
    untouched &= all(map(torch.equal, model.parameters(), parts))
    said["norms"] = _said(torch.optim.Adafactor([model.model.norm.weight]).step)
    said["adamw"] = _said(torch.optim.AdamW(model.parameters()).step)
    return SimpleNamespace(said=said, untouched=untouched)


def test_engines_and_loops_refuse_it_on_every_rank() -> None:
    for found in run_ranks(2, _refused):
        assert found.untouched
        for way in ("engine", "made", "loop", "again"):
            assert "Adafactor looks at whole parameters" in found.said[way], way
        assert "Muon looks at whole parameters" in found.said["json"]
        assert found.said["norms"] == found.said["adamw"] == "nothing"
