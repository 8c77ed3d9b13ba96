"""Gradient hooks of the user's on parameters, before sharding or after: the weights move as the unsharded model's, or it is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from exactness import change_errors, engine_for, fresh_groups
from models import batches, tiny
from ranks import run_ranks
from sharding import full_gradients, relative_error
from torch import Tensor, nn

import ds_seqpar
from ds_seqpar import ConfigError, PlanError

ONE_KV = {"num_key_value_heads": 1}
NEW_ROWS = range(90, 101)


def _of_the_whole(grad: Tensor) -> Tensor:
    """Differs on parts."""
    return grad / (1e-3 + grad.norm())


def _in_place(grad: Tensor) -> None:
    grad[: len(grad) // 3] = 0.0


def _hooked(model: Any) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.register_hook(_in_place if number % 3 == 2 else _of_the_whole)


def _step_errors(family: str, stage: int, before: bool, own: dict[str, Any]) -> dict[str, float]:
    """SGD, lr 1, two micro batches: errors of the weights' changes on the first rank."""
    world = torch.distributed.get_world_size()
    model, reference = tiny(family, **own).train(), tiny(family, **own).train()
    start = {n: p.detach().cpu().clone() for n, p in reference.named_parameters()}
    if before:
        _hooked(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = engine_for(model, optimizer, {"tp_size": world, "loss_chunk_tokens": 4}, stage, 1, 2)
    if not before:
        _hooked(engine.module)
    _hooked(reference)
    for batch in batches(2, 1):
        engine.backward(engine(**batch).loss)
        engine.step()
        (reference(**batch).loss / 2).backward()
    after = ds_seqpar.full_state_dict(engine)
    engine.destroy()
    if torch.distributed.get_rank():
        return {}
    return change_errors(start, after, {n: -p.grad.cpu() for n, p in reference.named_parameters() if p.grad is not None})


def _steps(family: str, cases: list[tuple[int, bool]], own: dict[str, Any]) -> dict[tuple[int, bool], dict[str, float]]:
    return {case: _step_errors(family, *case, own) for case in cases}


def _all_exact(found: dict[Any, dict[str, float]]) -> None:
    wrong = {(case, name): e for case, errors in found.items() for name, e in errors.items() if not e < 1e-3}
    assert not wrong


def test_hooks_see_whole_gradients_at_every_stage() -> None:
    """Copied key/value heads, partial gradients of norms, and what ZeRO 3 holds in parts among them."""
    _all_exact(run_ranks(2, _steps, "llama", [(0, True), (1, False), (2, True), (3, False), (3, True)], ONE_KV)[0])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox", "mixtral", "gemma3_text"])
def test_hooks_see_whole_gradients_in_every_family(family: str, world: int) -> None:
    own = {"intermediate_size": 56} if family == "mixtral" else {}
    cases = [(stage, before) for stage in (0, 1, 2, 3) for before in (True, False)]
    _all_exact(run_ranks(world, _steps, family, cases, own, timeout=300)[0])


def _refusal(error: type[Exception], call: Any) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def _halve(parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


def _others() -> dict[str, Any]:
    """What else is promised, on one rank."""
    fresh_groups()
    found: dict[str, Any] = {}
    model = tiny("llama").train()
    model.model.norm.weight.register_post_accumulate_grad_hook(lambda p: None)
    found["from before"] = _refusal(PlanError, lambda: ds_seqpar.shard(model, {"tp_size": 2}))
    found["untouched"] = model.model.embed_tokens.weight.shape[0] == 101
    model, reference = tiny("llama").train(), tiny("llama").train()
    ds_seqpar.shard(model, {"tp_size": 2})
    weight, seen = model.model.embed_tokens.weight, []
    found["behind"] = _refusal(PlanError, lambda: weight.register_post_accumulate_grad_hook(lambda p: None))
    found["no such rows"] = _refusal(ConfigError, lambda: ds_seqpar.train_rows(weight, [101]))

    def of_a_part(grad: Tensor | nn.Parameter) -> None:
        seen.append(tuple(grad.shape))

    of_a_part.takes_parts = True  # type: ignore[attr-defined]
    down = model.model.layers[0].mlp.down_proj.weight
    down.register_hook(of_a_part)
    down.register_post_accumulate_grad_hook(of_a_part)
    gone = down.register_hook(lambda grad: grad * 0.0)
    gone.remove()
    for one in (model, reference):
        ds_seqpar.train_rows(one.model.embed_tokens.weight, NEW_ROWS)
        one.model.norm.weight.register_post_accumulate_grad_hook(_halve)
        one(**batches(1, 1)[0]).loss.backward()
    found["seen"] = seen == [tuple(down.shape)] * 2
    gradients = full_gradients(model)
    found["errors"] = {n: relative_error(gradients[n], p.grad) for n, p in reference.named_parameters()}
    found["others at rest"] = not gradients["model.embed_tokens.weight"][:90].any()
    return found


def test_what_is_refused_and_what_takes_parts() -> None:
    for found in run_ranks(2, _others):
        for refused in ("from before", "behind"):
            assert re.search("register_hook, which is shown the whole gradient", found[refused])
        assert "model.norm.weight" in found["from before"] and found["untouched"]
        assert "101 to 101 are not all among the 101 rows" in found["no such rows"]
        assert found["seen"] and found["others at rest"]
        assert max(found["errors"].values()) < 1e-4
