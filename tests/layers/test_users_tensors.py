"""Trainable tensors of the user's inside the model: brought in by hooks or arguments, exact as on one process or refused by name."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from exactness import change_errors, engine_for, fresh_groups
from models import batches, device, tiny
from ranks import run_ranks
from sharding import full_gradients, relative_error
from torch import Tensor, nn
from transformers import AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ds_seqpar
from ds_seqpar import PlanError

HIDDEN, FAMILIES = 48, ("llama", "gpt_neox", "mixtral", "llama with LoRA")


class Own(nn.Module):
    """What the user trains: a vector, a scale, a module, and embeddings of a prompt."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.vector = nn.Parameter(torch.randn(HIDDEN, dtype=torch.float64) * 0.1)
        self.scale = nn.Parameter(torch.tensor(1.1, dtype=torch.float64))
        self.steer = nn.Linear(HIDDEN, HIDDEN).double()
        self.prompt = nn.Parameter(torch.randn(1, 3, HIDDEN, dtype=torch.float64) * 0.1)
        self.mask = nn.Parameter(torch.randn(1, 1, 7, 7, dtype=torch.float64) * 0.1)
        self.prefix = nn.Parameter(torch.randn(2, 3, 2, 8, dtype=torch.float64) * 0.1)
        self.to(device())


def _base(model: Any) -> Any:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, inner.base_model_prefix)


def _layer(model: Any) -> Any:
    return _base(model).layers[1]


def _attention(model: Any) -> Any:
    return getattr(_layer(model), "self_attn", None) or _layer(model).attention


def _embedding(model: Any) -> Any:
    return _base(model).get_input_embeddings()


def _final_norm(model: Any) -> Any:
    return getattr(_base(model), "norm", None) or _base(model).final_layer_norm


def _column(model: Any) -> Any:
    return getattr(_attention(model), "q_proj", None) or _attention(model).query_key_value


def _row(model: Any) -> Any:
    return getattr(_attention(model), "o_proj", None) or _attention(model).dense


def _after(change: Callable[[Any, Tensor], Tensor], at: Callable[[Any], nn.Module] = _layer) -> Callable[..., Any]:
    """A forward hook at `at(model)` that makes of its first output `change(own, output)`."""

    def use(model: Any, own: Own, batch: dict[str, Tensor]) -> Tensor:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return (change(own, output[0]), *output[1:]) if isinstance(output, tuple) else change(own, output)

        at(model).register_forward_hook(hook)
        return model(**batch).loss

    return use


def _before(model: Any, own: Own, batch: dict[str, Tensor], at: Callable[[Any], nn.Module] = _layer) -> Tensor:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not args:
            return (), {**kwargs, "hidden_states": kwargs["hidden_states"] * own.scale + own.vector}
        return (args[0] * own.scale + own.vector, *args[1:]), kwargs

    at(model).register_forward_pre_hook(hook, with_kwargs=True)
    return model(**batch).loss


def _after_the_base(model: Any, own: Own, batch: dict[str, Tensor]) -> Tensor:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        output["last_hidden_state"] = own.steer(output["last_hidden_state"])
        return output

    _base(model).register_forward_hook(hook)
    return model(**batch).loss


def _made_before(model: Any, own: Own, batch: dict[str, Tensor]) -> Tensor:
    steering = own.steer(own.vector)
    return _after(lambda own, x: x + steering)(model, own, batch)


def _penalised(model: Any, own: Own, batch: dict[str, Tensor]) -> Tensor:
    return _after(lambda own, x: x + own.vector)(model, own, batch) + own.vector.pow(2).sum()


def _kept_for_a_later_hook(model: Any, own: Own, batch: dict[str, Tensor]) -> Tensor:
    kept: list[Tensor] = []
    _base(model).layers[0].register_forward_hook(lambda m, a, out: kept.append(own.steer(_first(out))))
    return _after(lambda own, x: x + kept.pop())(model, own, batch)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _several(model: Any, own: Own, batch: dict[str, Tensor]) -> Tensor:
    _before(model, own, batch)
    _after(lambda own, x: x + own.steer(x), _final_norm)(model, own, batch)
    return _after(lambda own, x: x * own.scale + own.vector, lambda m: _layer(m).mlp)(model, own, batch)


def _everywhere(model: Any, own: Own, batch: dict[str, Tensor]) -> Tensor:
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * own.scale if isinstance(out, Tensor) and out.is_floating_point() else None
    )
    try:
        return model(**batch).loss
    finally:
        handle.remove()


def _prompt(model: Any, own: Own, batch: dict[str, Tensor]) -> Tensor:
    rows = len(batch["input_ids"])
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    whole = torch.cat([own.prompt.expand(rows, -1, -1), embeddings], dim=1)
    labels = torch.cat([batch["labels"].new_full((rows, 3), -100), batch["labels"]], dim=1)
    mask = torch.cat([batch["attention_mask"].new_ones(rows, 3), batch["attention_mask"]], dim=1)
    return model(inputs_embeds=whole, attention_mask=mask, labels=labels).loss


def _prompt_of_the_base(model: Any, own: Own, batch: dict[str, Tensor]) -> Tensor:
    return _base(model)(inputs_embeds=own.prompt * own.scale)[0].pow(2).mean()


def _mask(model: Any, own: Own, batch: dict[str, Tensor]) -> Tensor:
    causal = torch.full((7, 7), float("-inf"), dtype=torch.float64, device=device()).triu(1)
    # transformers' own auxiliary loss takes masks of two dimensions alone
    more = {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}
    return model(batch["input_ids"], attention_mask=own.mask + causal, labels=batch["labels"], **more).loss


def _mask_of_heads(model: Any, own: Own, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["input_ids"], attention_mask=own.mask.expand(2, 6, 7, 7), labels=batch["labels"]).loss


def _prefix(model: Any, own: Own, batch: dict[str, Tensor]) -> Tensor:
    cache = DynamicCache()
    for i in range(2):
        cache.update(own.prefix, own.prefix * own.scale, i)
    return model(batch["input_ids"], past_key_values=cache, labels=batch["labels"]).loss


def _legacy_prefix(model: Any, own: Own, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["input_ids"], past_key_values=((own.prefix, own.prefix),) * 2, labels=batch["labels"]).loss


def _unknown_argument(model: Any, own: Own, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, position_embeddings=[own.vector]).loss


def _whole_embeddings_of_a_hook(model: Any, own: Own, batch: dict[str, Tensor]) -> Tensor:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "input_ids": None, "inputs_embeds": own.prompt * own.scale}

    _base(model).register_forward_pre_hook(hook, with_kwargs=True)
    return model(input_ids=batch["input_ids"][:1, :3]).logits.pow(2).mean()


def _scaled_row(own: Own, x: Tensor) -> Tensor:
    return x * own.scale


EXACT: dict[str, Callable[[Any, Own, dict[str, Tensor]], Tensor]] = {
    "a vector after a layer": _after(lambda own, x: x + own.vector),
    "in place": _after(lambda own, x: x.add_(own.vector)),
    "a vector before a layer": _before,
    "a module of the user's": _after(lambda own, x: x + own.steer(x) * own.scale),
    "after attention": _after(lambda own, x: x + own.vector, _attention),
    "after an MLP": _after(lambda own, x: x + own.steer(x), lambda m: _layer(m).mlp),
    "before an MLP": functools.partial(_before, at=lambda m: _layer(m).mlp),
    "after a norm": _after(lambda own, x: x + own.vector, lambda m: _layer(m).input_layernorm),
    "after the embedding": _after(lambda own, x: x + own.vector, _embedding),
    "after the last norm": _after(lambda own, x: x + own.vector, _final_norm),
    "after the base model": _after_the_base,
    "made before the forward": _made_before,
    "with a penalty": _penalised,
    "kept for a later hook": _kept_for_a_later_hook,
    "several": _several,
    "a soft prompt": _prompt,
    "a soft prompt of the base model": _prompt_of_the_base,
    "a bias of attention": _mask,
}
ON_PARTS = {"queries": _after(_scaled_row, _column), "after a row-parallel linear": _after(lambda own, x: x + own.vector, _row)}
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "on all modules": (_everywhere, "hooks on all modules bring in a tensor of shape"),
    "rotary embeddings": (
        _after(lambda own, x: x * own.scale, lambda m: _base(m).rotary_emb), "hooks on rotary_emb bring in a tensor of shape []"
    ),
    "before the base model": (_whole_embeddings_of_a_hook, "hooks on the base model bring in"),
    "a bias of heads": (_mask_of_heads, "attention_mask [2, 6, 7, 7] needs a gradient: only one of shape [b, 1, q, k]"),
    "a prefix": (_prefix, "past_key_values.layers[0].keys [2, 3, 2, 8] needs a gradient: each rank's attention holds its own heads"),
    "a prefix of tuples": (_legacy_prefix, "past_key_values[0][0] [2, 3, 2, 8] needs a gradient: each rank's attention"),
    "an unknown argument": (_unknown_argument, "position_embeddings[0] [48] needs a gradient: what each rank's gradient"),
}  # fmt: skip


def _models(family: str, key: dict[str, Any], change: Callable[[Any], None] = lambda model: None) -> tuple[Any, Any]:
    fresh_groups()
    models = [tiny(family.partition(" ")[0], dtype=torch.float64, num_hidden_layers=2) for _ in range(2)]
    if "LoRA" in family:
        from peft import LoraConfig, get_peft_model

        for i, model in enumerate(models):
            torch.manual_seed(1)
            models[i] = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj"], init_lora_weights=False))
            models[i].double()
    for model in models:
        change(model)
    ds_seqpar.shard(models[0], {"tp_size": dist.get_world_size(), "loss_chunk_tokens": 4, **key})
    return models[0].train(), models[1].train()


def _without_hooks(model: nn.Module) -> None:
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for number in [n for n, hook in hooks.items() if hook.__module__ == __name__]:
                del hooks[number]


def _off(use: Callable[..., Tensor], models: tuple[Any, Any]) -> float:
    """How far the worst gradient is off, the user's and the model's, after two forwards; every rank's own."""
    losses, grads = [], []
    for i, model in enumerate(models):
        own = Own()
        model.zero_grad()
        for batch in batches(2, 2):
            loss = use(model, own, batch)
            loss.backward()
            _without_hooks(model)
        losses.append(loss.detach())
        grads.append({n: p.grad for n, p in own.named_parameters() if p.grad is not None})
        if i == 0:
            theirs = {n: g for n, g in full_gradients(model).items() if g is not None}
    assert grads[0].keys() == grads[1].keys() and grads[0]
    errors = [relative_error(losses[0], losses[1])]
    errors += [relative_error(g, grads[1][n]) for n, g in grads[0].items()]
    errors += [relative_error(theirs[n], p.grad) for n, p in models[1].named_parameters() if p.grad is not None and n in theirs]
    return max(map(float, errors))


def _outcomes(family: str, key: dict[str, Any], names: list[str]) -> dict[str, Any]:
    uses = {**EXACT, **ON_PARTS, **{name: use for name, (use, _) in REFUSED.items()}}
    found: dict[str, Any] = {}
    models = _models(family, key)
    for name in names:
        try:
            found[name] = _off(uses[name], models)
        except PlanError as problem:
            found[name] = str(problem)
            _without_hooks(models[0])
    return found


def _check(world: int, family: str, key: dict[str, Any], names: list[str]) -> None:
    for found in run_ranks(world, _outcomes, family, key, names, timeout=600):
        bad = {}
        for name, outcome in found.items():
            if name in REFUSED:
                right = isinstance(outcome, str) and outcome.startswith(REFUSED[name][1])
            elif name == "after a row-parallel linear" and key.get("sequence_parallel") is False:
                right = isinstance(outcome, str) and "cannot be told there" in outcome
            else:
                right = isinstance(outcome, float) and outcome < 1e-6
            if not right:
                bad[name] = outcome
        assert not bad, bad


@pytest.mark.parametrize("sequence_parallel", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_the_user_trains_inside_is_exact_or_refused(sequence_parallel: bool) -> None:
    _check(2, "llama", {"sequence_parallel": sequence_parallel}, [*EXACT, *ON_PARTS, *REFUSED])


def _of_the_model(family: str, key: dict[str, Any]) -> dict[str, float]:
    """What is trained is the model's own, registered on the whole model and on its base before sharding, and used by hooks alone."""

    def register(model: Any) -> None:
        own = Own()
        for holder in (model, _base(model)):
            holder.steer, holder.offset = copy.deepcopy(own.steer), nn.Parameter(own.vector.detach().clone())

    models = _models(family, key, register)
    for model in models:
        holders = (model, _base(model))
        for batch in batches(2, 2):

            def hook(module: nn.Module, args: Any, output: Any, holders: Any = holders) -> Any:
                x = _first(output)
                for holder in holders:
                    x = x + holder.steer(x) * 0.5 + holder.offset
                return (x, *output[1:]) if isinstance(output, tuple) else x

            _layer(model).register_forward_hook(hook)
            for module in (_layer(model).mlp, _layer(model).input_layernorm, _embedding(model), _final_norm(model)):
                module.register_forward_hook(hook)
            model(**batch).loss.backward()
            _without_hooks(model)
    mine = full_gradients(models[0])
    return {n: relative_error(mine[n], p.grad) for n, p in models[1].named_parameters()}


@pytest.mark.parametrize("sequence_parallel", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_parameters_of_the_model_that_hooks_alone_use(sequence_parallel: bool) -> None:
    for errors in run_ranks(2, _of_the_model, "llama", {"sequence_parallel": sequence_parallel}):
        assert len(errors) > 6 and max(errors.values()) < 1e-6, {n: e for n, e in errors.items() if not e < 1e-6}


def _refused_runs() -> dict[str, str]:
    """What each of several runs that cannot be exact says on this rank."""
    own, batch, said = Own(), batches(1, 2)[0], {}

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        return sdpa_attention_forward(module, query, key, value * own.scale, mask, **options)

    ALL_ATTENTION_FUNCTIONS.register("own", attention)
    AttentionMaskInterface.register("own", sdpa_mask)

    def run(name: str, prepare: Callable[[Any], Any], use: Callable[[Any], Any] = lambda model: model(**batch).loss.backward()) -> None:
        model = _models("llama", {})[0]
        prepare(model)
        try:
            use(model)
        except PlanError as problem:
            said[name] = str(problem)

    def on_one_rank(model: Any) -> None:
        _layer(model).register_forward_hook(lambda m, a, out: out + own.vector if dist.get_rank() else None)

    def reentrant(model: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        _layer(model).mlp.register_forward_hook(lambda m, a, out: out + own.vector)

    run("on one rank", on_one_rank)
    run("reentrant", reentrant)
    run("an attention function", lambda model: model.set_attn_implementation("own"))
    run("the head's weight", lambda model: _layer(model).register_forward_hook(
        lambda m, a, out: out + model.lm_head.weight[: HIDDEN, 0].sum()
    ))  # fmt: skip
    run("nothing", lambda model: model.enable_input_require_grads())
    run("only looking", lambda model: [m.register_forward_hook(lambda m, a, out: None) for m in model.modules()])
    return said


def test_what_cannot_be_exact_is_refused_on_every_rank() -> None:
    expected = {
        "on one rank": "hooks bring tensors that need gradients into the model on some ranks",
        "reentrant": "a hook stands on layers.1.mlp, and with reentrant checkpointing",
        "an attention function": "a tensor of shape [] needs a gradient and entered the model neither as an argument nor by a hook",
        "the head's weight": "a hook on layers.1 uses a parameter of the model that is cut, [101, 48]",
    }
    for said in run_ranks(2, _refused_runs, timeout=120):
        assert said.keys() == expected.keys(), said
        assert all(said[name].startswith(text) for name, text in expected.items()), said


def _engine(stage: int) -> dict[str, float]:
    """How far an accumulated step is off of what was registered on the model and is used by a hook."""
    fresh_groups()
    model, reference = tiny("llama").train(), tiny("llama").train()
    for m in (model, reference):
        own = Own().float()
        m.steer = own.steer
        if stage < 3:  # a parameter of the whole model's own is there while that runs, and not in a layer
            m.offset = own.vector

        def hook(module: nn.Module, args: Any, output: Tensor, m: Any = m) -> Tensor:
            return output + m.steer(output) + (m.offset if stage < 3 else 0.0)

        m.model.layers[1].register_forward_hook(hook)
    before = {n: p.detach().cpu().clone() for n, p in reference.named_parameters()}
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0), {"tp_size": 2}, stage, 1, 2)
    for batch in batches(2, 1):
        engine.backward(engine(**batch).loss)
        engine.step()
        (reference(**batch).loss / 2).backward()
    after = ds_seqpar.full_state_dict(engine)
    if dist.get_rank():
        return {}
    return change_errors(before, after, {n: -p.grad.cpu() for n, p in reference.named_parameters()})


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_engine_trains_what_is_registered_on_the_model_and_used_by_a_hook(stage: int) -> None:
    errors = run_ranks(2, _engine, stage, timeout=120)[0]
    assert "steer.weight" in errors and max(errors.values()) < 1e-5, errors


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_user_trains_inside_every_family(world: int, sequence_parallel: bool, recompute: str, family: str) -> None:
    names = [name for name in (*EXACT, *ON_PARTS) if (family, name) != ("gpt_neox", "queries")]
    _check(world, family, {"sequence_parallel": sequence_parallel, "recompute": recompute}, names)
