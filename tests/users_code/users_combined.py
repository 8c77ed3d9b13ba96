"""Pieces of a user's code that can be put together in any number: terms of a loss, writes into the logits, hooks, frozen parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from users_recipes import BANNED, layers_of
from users_run import Recipe, Run

__all__ = ["FROZEN", "HOOKS", "TERMS", "WRITES", "Combination"]

Batch = dict[str, Tensor]

TERMS: dict[str, Callable[[Any, Batch], Tensor]] = {
    "the model's loss": lambda out, batch: out.loss,
    "cross entropy": lambda out, batch: cross_entropy(out.logits.transpose(1, 2), batch["input_ids"]),
    "log partition": lambda out, batch: out.logits.float().logsumexp(-1).pow(2).mean(),
    "last token": lambda out, batch: out.logits[:, -1].log_softmax(-1)[:, 3].mean(),
    "first layer": lambda out, batch: out.hidden_states[1].pow(2).mean(),
    "last state": lambda out, batch: out.hidden_states[-1][:, ::2].abs().sum(-1).mean(),
    "every state": lambda out, batch: torch.stack([h.mean() for h in out.hidden_states]).pow(2).sum(),
}
WRITES: dict[str, Callable[[Tensor], Any]] = {
    "scaled": lambda logits: logits.mul_(0.5),
    "banned": lambda logits: logits.__setitem__((..., BANNED), -5.0),
    "a view": lambda logits: logits.view(-1, 101)[1:4].add_(0.25),
    "a column": lambda logits: logits.select(-1, 7).zero_(),
}
HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "a layer's output": lambda model: layers_of(model)[0].register_forward_hook(_scale_output),
    "a layer's input": lambda model: layers_of(model)[1].register_forward_pre_hook(lambda m, args: (args[0] * 1.1, *args[1:])),
    "a layer's gradient": lambda model: layers_of(model)[1].register_full_backward_hook(
        lambda m, inputs, outputs: tuple(x if x is None else x * 0.5 for x in inputs)
    ),
    "one that looks": lambda model: layers_of(model)[1].register_forward_hook(lambda m, args, output: None),
}
FROZEN: dict[str, Callable[[nn.Module], Any]] = {
    "nothing": lambda model: None,
    "a layer": lambda model: layers_of(model)[0].requires_grad_(False),
    "norms": lambda model: [m.requires_grad_(False) for m in model.modules() if "Norm" in type(m).__name__],
}


def _scale_output(module: nn.Module, args: Any, output: Any) -> Any:
    return (output[0] * 0.9, *output[1:]) if isinstance(output, tuple) else output * 0.9


@dataclass(frozen=True)
class Combination:
    """Names of the pieces, in order; `batches` micro batches before the step, each with all of it; one by an engine."""

    kind: str
    way: str
    world: int
    key: tuple[tuple[str, Any], ...]
    terms: tuple[str, ...]
    writes: tuple[str, ...]
    hooks: tuple[str, ...]
    frozen: str
    batches: int

    def recipe(self) -> Recipe:
        """The combination as one recipe."""
        return Recipe(repr(self), self._run, before=FROZEN[self.frozen], key=dict(self.key))

    def _run(self, run: Run) -> None:
        for name in self.hooks:
            HOOKS[name](run.model)
        for batch in run.batches[: self.batches if self.way == "loop" else 1]:
            out = run(**batch, output_hidden_states=True)
            for name in self.writes:
                WRITES[name](out.logits)
            loss = torch.stack([TERMS[name](out, batch) for name in self.terms]).sum()
            run.see(f"loss {len(run.seen)}", loss)
            run.backward(loss)
