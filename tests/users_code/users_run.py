"""One piece of a user's code, run on a model as it is and on the same model sharded, and what comes of the comparison.

A cell is a recipe (users_recipes.py), a model, a number of ranks and a way to train. It is "" if everything is equal: what the
recipe saw, every gradient, every weight after the step; "refused: ..." if ds_seqpar raised an error of its own, alike on every
rank; anything else is a fault.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from exactness import change_errors, engine_for, fresh_groups
from models import batches, tiny
from peft import LoraConfig, get_peft_model
from sharding import relative_error
from torch import Tensor

import ds_seqpar
from ds_seqpar import SeqParError
from ds_seqpar.checkpoint.gathering import gather_parameter
from ds_seqpar.hf import require_model

Plain = tuple["Run", dict[str, Tensor], dict[str, Tensor | None]]
__all__ = ["KINDS", "RECIPES", "WAYS", "Recipe", "Run", "cell", "outcome", "recipe"]

TOLERANCE = 1e-4  # everything is float32, and the faults that were found were of 1e-2 and more
LEARNING_RATE = 0.5


@dataclass
class Run:
    """What a user's code holds. `see` notes a value that must be the same; the step at the end is made for every recipe."""

    model: Any
    batches: list[dict[str, Tensor]]
    optimizer: torch.optim.Optimizer
    engine: Any = None
    seen: dict[str, Any] = field(default_factory=dict)

    def __call__(self, **batch: Any) -> Any:
        return (self.engine or self.model)(**batch)

    def backward(self, loss: Tensor, **options: Any) -> None:
        """As the trainer of this run does it."""
        if self.engine is None:
            loss.backward(**options)
        else:
            self.engine.backward(loss, **options)

    def see(self, name: str, value: Any) -> None:
        """Notes a number or tensor."""
        self.seen[name] = torch.as_tensor(value).detach().double().cpu().clone()

    def step(self) -> None:
        """One step of the optimizer, and no gradients after it."""
        if self.engine is not None:
            self.engine.step()
            return
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class Recipe:
    """`before`: what the user does to the model first, before it is sharded; `optimizer`: theirs, or SGD.

    `refused`: what the error says where the recipe is refused; by kind of model or way of training where it is refused there
    alone. `ways`: the ways to train that the recipe makes sense for; `key`: more of the ds_seqpar key.
    """

    name: str
    run: Callable[[Run], None]
    before: Callable[[Any], None] | None = None
    optimizer: Callable[[Iterator[torch.nn.Parameter]], torch.optim.Optimizer] | None = None
    refused: str | dict[str, str] = ""
    ways: tuple[str, ...] = ("loop", "engine")
    key: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("llama", "gpt_neox", "mixtral", "lora")

    def expected(self, kind: str, way: str) -> str:
        """What the refusal of this cell says; "" if it must be equal."""
        if isinstance(self.refused, str):
            return self.refused
        return self.refused.get(kind) or self.refused.get(way) or ""


RECIPES: dict[str, Recipe] = {}


def recipe(**options: Any) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    """Adds the function under its name."""

    def add(function: Callable[[Run], None]) -> Callable[[Run], None]:
        RECIPES[function.__name__] = Recipe(function.__name__, function, **options)
        return function

    return add


WAYS = ("loop", "engine")
KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny("llama"),
    "gpt_neox": lambda: tiny("gpt_neox"),
    "mixtral": lambda: tiny("mixtral", intermediate_size=56),
    "lora": lambda: _with_adapters(tiny("llama")),
}


def _with_adapters(model: Any) -> Any:
    torch.manual_seed(3)
    settings: dict[str, Any] = {"target_modules": "all-linear", "r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return adapted


def _prepared(one: Recipe, kind: str) -> tuple[Any, torch.optim.Optimizer]:
    model = KINDS[kind]().train()
    if one.before is not None:
        one.before(model)
    parameters = (p for p in model.parameters() if p.requires_grad)
    make = one.optimizer or (lambda trained: torch.optim.SGD(trained, lr=LEARNING_RATE))
    return model, make(parameters)


def _unsharded(one: Recipe, kind: str) -> Plain:
    """The plain run: what it saw, the weights' changes and the gradients before the step."""
    model, optimizer = _prepared(one, kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = Run(model, batches(3, 2), optimizer)
    one.run(run)
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    run.step()
    return run, {name: p.detach() - before[name] for name, p in model.named_parameters()}, gradients


def _sharded(one: Recipe, kind: str, way: str) -> Plain:
    """The same sharded over all ranks; weights before the step, gradients where the trainer leaves them."""
    fresh_groups()
    world = dist.get_world_size()
    key = {"tp_size": world, "loss_chunk_tokens": 4, **one.key}
    model, optimizer = _prepared(one, kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = None
    if way == "engine":
        engine = engine_for(model, optimizer, key, 1, 2, 1)
        model = engine.module
    else:
        ds_seqpar.shard(model, key)
    run = Run(model, batches(3, 2), optimizer, engine)
    one.run(run)
    gradients = {name: _whole(model, p, p.grad) for name, p in model.named_parameters()} if engine is None else {}
    run.step()
    return run, before, gradients


def _whole(model: Any, parameter: Any, tensor: Tensor | None) -> Tensor | None:
    state = require_model(model).seqpar
    cut = state.entries[id(parameter)].cut
    return tensor if cut is None or tensor is None else gather_parameter(tensor, cut, state.groups.tp_group)


def _differences(one: Recipe, kind: str, way: str, plain: Plain) -> dict[str, float]:
    theirs, changes, gradients = plain
    ours, before, found = _sharded(one, kind, way)
    assert ours.seen.keys() == theirs.seen.keys()
    errors = {f"saw {name}": relative_error(ours.seen[name], x) for name, x in theirs.seen.items()}
    nothing = 1e-6 * max((float(g.norm()) for g in gradients.values() if g is not None), default=0.0)
    for name, grad in found.items():
        expected = gradients[name]
        if expected is not None and grad is not None and max(float(expected.norm()), float(grad.norm())) <= nothing:
            continue  # zero but for rounding, in both
        errors[f"gradient of {name}"] = relative_error(grad, expected)
    for name, parameter in ours.model.named_parameters():
        after = _whole(ours.model, parameter, parameter.detach())
        assert after is not None
        (error,) = change_errors(before, {name: after}, {name: changes[name]}).values() if changes[name].any() else (
            0.0 if torch.equal(after, before[name]) else float("inf"),
        )
        errors[f"weight {name}"] = error
    if ours.engine is not None:
        ours.engine.destroy()
    return {name: error for name, error in errors.items() if not error <= TOLERANCE}


def cell(name: str, kind: str, way: str) -> str:
    """`outcome` of a recipe by its name."""
    return outcome(RECIPES[name], kind, way)


def outcome(one: Recipe, kind: str, way: str) -> str:
    """What came of it on this rank; see the head of this file."""
    try:
        torch.manual_seed(0)
        plain = _unsharded(one, kind)
    except Exception:
        return "the recipe itself fails: " + traceback.format_exc(limit=-6)
    try:
        torch.manual_seed(0)
        wrong = _differences(one, kind, way, plain)
    except SeqParError as refusal:
        return f"refused: {refusal}"
    except Exception:
        return "raised: " + traceback.format_exc(limit=-6)
    worst = sorted(wrong.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{what} off by {error:.1e}" for what, error in worst)
