"""Invariants of the sharded model, each broken by a patch: what must not go unnoticed.

A mutant names what is broken, on which model it shows, and who must notice: `verify` (ds_seqpar.checks), `step` (the comparison
of an accumulated SGD step with the unsharded model's, which the tests of families, modes and the matrix make), and the checks of
what neither can see. The patches are made in the ranks, around building, sharding and training a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_seqpar import inject, parameter_hooks
from ds_seqpar.comm import collectives, regions, tokens
from ds_seqpar.comm.exchange import Exchange
from ds_seqpar.comm.regions import _GatherForPartial
from ds_seqpar.engine import sharding
from ds_seqpar.inject import _Injection
from ds_seqpar.kernels.addition import PassedGradient
from ds_seqpar.layers import (
    blocks,
    boundaries,
    fingerprints,
    hooked,
    loss,
    models,
    norm,
    partial,
    products,
    token_handles,
    token_operations,
)
from ds_seqpar.layers.blocks import SummedBlock, WholeBlock
from ds_seqpar.layers.embedding import VocabParallelEmbedding, _RowsOfVocabulary
from ds_seqpar.layers.guard import InputGuard
from ds_seqpar.layers.head import VocabParallelHead
from ds_seqpar.layers.linear import RowParallelLinear
from ds_seqpar.layers.loss import CausalLMLoss
from ds_seqpar.layers.models import ShardedModel
from ds_seqpar.layers.norm import FusedRMSNorm
from ds_seqpar.layers.partial import PartialGradients
from ds_seqpar.layers.random import ParallelRandom
from ds_seqpar.layers.region import TokenRegion
from ds_seqpar.layers.token_handles import TokenShard

__all__ = ["MUTANTS", "Mutant"]

Patch = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Mutant:
    """One broken invariant. `by`: the test whose check notices it; `verify`: whether verify must, or cannot by its nature."""

    name: str
    patch: Patch
    family: str = "llama"
    key: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    head: str = ""  # of model_types.HEADS
    by: str = "step"
    verify: bool = True


def _swap(owner: Any, name: str, make: Callable[[Any], Any]) -> Patch:
    """Replaces an attribute by make(original)."""

    def patch() -> AbstractContextManager[Any]:
        original = inspect.getattr_static(owner, name)
        if isinstance(original, staticmethod):
            return mock.patch.object(owner, name, staticmethod(make(original.__func__)))
        return mock.patch.object(owner, name, make(original))

    return patch


def _all(*patches: Patch) -> Patch:
    def patch() -> AbstractContextManager[Any]:
        stack = ExitStack()
        for one in patches:
            stack.enter_context(one())
        return stack

    return patch


def _identity(edge: Any) -> Any:
    return lambda x, group: x


# Sums of gradients -----------------------------------------------------------------------------------------------------


def _left_out(wrong: Callable[[nn.Parameter, tuple[int, ...]], bool]) -> Patch:
    """Gradients of the parameters that `wrong` picks are not summed over the group."""

    def make(add: Any) -> Any:
        def without(self: Any, parameter: nn.Parameter, *slots: int) -> None:
            if not wrong(parameter, slots):
                add(self, parameter, *slots)

        return without

    return _swap(PartialGradients, "add", make)


def _named(*ends: str) -> Patch:
    """Gradients of parameters by name are not summed."""
    wanted: set[int] = set()

    def make(run: Any) -> Any:
        def noting(self: Any) -> None:
            wanted.clear()  # an earlier model's addresses may be another parameter's by now, and on one rank only
            wanted.update(id(p) for n, p in self.model.named_parameters() if n.endswith(ends))
            run(self)

        return noting

    return _all(_swap(_Injection, "run", make), _left_out(lambda p, _: id(p) in wanted))


def _summed_twice(function: Any) -> Any:
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        owner, *once = function(ctx, *grads)
        return (owner, *(None if g is None else g * dist.get_world_size(ctx.owner.group) for g in once))

    return backward


def _after_accumulation() -> AbstractContextManager[Any]:
    def add(self: Any, parameter: nn.Parameter, slot: int = 0, slots: int = 1) -> None:
        parameter.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad, group=self.group))

    return mock.patch.object(PartialGradients, "add", add)


def _summed_at_the_leaf() -> AbstractContextManager[Any]:
    def add(self: Any, parameter: nn.Parameter, slot: int = 0, slots: int = 1) -> None:
        parameter.register_hook(lambda grad: self.total(parameter, grad, slot, slots))

    return mock.patch.object(PartialGradients, "add", add)


def _averaged(function: Any) -> Any:
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        owner, *sums = function(ctx, *grads)
        return (owner, *(None if g is None else g / dist.get_world_size(ctx.owner.group) for g in sums))

    return backward


# Cuts ------------------------------------------------------------------------------------------------------------------


def _border(part_of: Any) -> Any:
    def shifted(whole: Tensor, cut: Any, rank: int) -> Tensor:
        return part_of(whole.roll(1, cut.dim) if rank else whole, cut, rank)  # type: ignore[no-any-return]

    return shifted


def _crossed(*ends: str) -> Patch:
    """The ranks hold each other's part of some weights."""

    def make(resolve: Any) -> Any:
        def crossed(*args: Any, **kwargs: Any) -> Any:
            plan = resolve(*args, **kwargs)
            for name, module in plan.modules.items():
                if name.endswith(ends):
                    for key, cut in module.cuts.items():
                        module.cuts[key] = replace(cut, ranges=cut.ranges[::-1])
            return plan

        return crossed

    return _swap(inject, "plan_of", make)


def _untied(run: Any) -> Any:
    def untie(self: Any) -> None:
        run(self)
        embedding = self.model.get_submodule(self.facts.embedding)
        embedding.weight = nn.Parameter(embedding.weight.detach().clone())

    return untie


def _start(cls: type, by: int) -> Patch:
    """The vocabulary's part of the second rank is thought to begin elsewhere."""

    def make(call: Any) -> Any:
        def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.vocab_start += by * self.seqpar.groups.tp_rank
            try:
                return call(self, *args, **kwargs)
            finally:
                self.vocab_start -= by * self.seqpar.groups.tp_rank

        return moved

    return _swap(cls, "forward", make)


# Edges -----------------------------------------------------------------------------------------------------------------


def _scatter_as_split(backward: Any) -> Any:
    """A rank keeps its rows of its own gradient, and leaves the others' out."""

    class Split:
        def __init__(self, exchange: Any, count: int, width: int, like: Tensor) -> None:
            self.full, self.group = like.new_zeros((count, width)), exchange._group

        def parts(self) -> Any:
            yield slice(0, self.full.shape[0]), self.full

        def wait(self) -> Tensor:
            return tokens.own_rows(self.full, self.group)

        def addends(self) -> tuple[Tensor, None]:
            return self.wait(), None

    def wrong(ctx: Any, *grads: Tensor) -> Any:
        with mock.patch.object(Exchange, "scatter", lambda *args: Split(*args)):
            return backward(ctx, *grads)

    return wrong


def _in_backward(cls: Any, wrong: Callable[..., Any]) -> Patch:
    return _swap(cls, "backward", lambda _: wrong)


def _own_rows_only(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return tokens.own_rows(dy, ctx.group), None, None


def _own_rows_gathered(backward: Any) -> Any:
    """What a gather would give if the other ranks' rows were zero."""

    def only_own(exchange: Any, shard: Tensor, count: int) -> Any:
        full = shard.new_zeros((shard.shape[0] * dist.get_world_size(exchange._group), *shard.shape[1:]))
        full[shard.shape[0] * dist.get_rank(exchange._group) :][: shard.shape[0]] = shard
        return mock.Mock(whole=lambda: full[:count])

    def wrong(ctx: Any, *grads: Tensor) -> Any:
        with mock.patch.object(Exchange, "gather", only_own):
            return backward(ctx, *grads)

    return wrong


def _forgotten(self: Any, gradient: Tensor) -> None:
    """Nothing is handed on."""


def _reduced_again(backward: Any) -> Any:
    return lambda ctx, dy: backward(ctx, collectives.all_reduce(dy, dist.group.WORLD))


def _reversed_ranks(gather: Any) -> Any:
    def wrong(shard: Tensor, count: int, group: Any) -> Tensor:
        return torch.cat(gather(shard, shard.shape[0] * dist.get_world_size(group), group).split(shard.shape[0])[::-1])[
            :count
        ]

    return wrong


def _bias_before(forward: Any) -> Any:
    def before(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        output = forward(self, *args, **kwargs)
        times = self.seqpar.groups.tp_size - 1
        return output if self.bias is None else output + times * self.bias  # type: ignore[no-any-return]

    return before


def _dead_rows(padded: Any) -> Any:
    def at_the_front(x: Tensor, group: Any) -> Tensor:
        return padded(x, group).roll(1, 0) if x.shape[0] % dist.get_world_size(group) else x  # type: ignore[no-any-return]

    return at_the_front


def _unscaled(self: TokenShard, act: Any) -> TokenShard:
    return self


# Layers ----------------------------------------------------------------------------------------------------------------


def _other_epsilon(fuse: Any) -> Any:
    def fused(self: Any) -> None:
        fuse(self)
        for module in self.model.modules():
            if isinstance(module, FusedRMSNorm):
                module.fused_eps = 1e-3

    return fused


def _no_up(backward: Any) -> Any:
    def wrong(*args: Any) -> Any:
        dgate, dup, product = backward(*args)
        return dgate, torch.zeros_like(dup), product

    return wrong


def _remade_without_norm(backward: Any) -> Any:
    def wrong(ctx: Any, *dys: Tensor) -> Any:
        plain = products.rms_norm_into
        products.rms_norm_into = lambda out, x, *_: out.copy_(x.view(out.shape))  # type: ignore[assignment]
        try:
            return backward(ctx, *dys)
        finally:
            products.rms_norm_into = plain

    return wrong


def _whole_as_partial(forward: Any) -> Any:
    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(TokenRegion, "full_for_replicated", TokenRegion.full_for_partial):
            return forward(self, *args, **kwargs)

    return wrong


def _twice_reduced(forward: Any) -> Any:
    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    return wrong


def _groups_wrong(counts: Any) -> Any:
    """Query heads of the second rank look at the key/value heads in the other order."""

    def wrong(self: Any, block: Any, module: Any) -> None:
        counts(self, block, module)
        if self.state.groups.tp_rank and hasattr(module, "scaling"):
            module.scaling = module.scaling * 1.5

    return wrong


# Loss ------------------------------------------------------------------------------------------------------------------


def _divided(call: Any) -> Any:
    def wrong(self: Any, logits: Any, *args: Any, **kwargs: Any) -> Tensor:
        return call(self, logits, *args, **kwargs) / logits.state.groups.tp_size  # type: ignore[no-any-return]

    return wrong


def _own_statistics(gather: Any) -> Any:
    def wrong(x: Tensor, group: Any) -> Tensor:
        return x.expand(dist.get_world_size(group), *x.shape[1:]).clone()

    return wrong


def _counts_ignored(function: Any) -> Any:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        total, counted = function(*args, **kwargs)
        return total, counted + 1

    return wrong


def _without_transforms(function: Any) -> Any:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{**kwargs, "transforms": ()})

    return wrong


def _no_shift(call: Any) -> Any:
    def wrong(self: Any, logits: Any, labels: Tensor, *args: Any, **kwargs: Any) -> Any:
        return call(self, logits, labels, *args, **{**kwargs, "shift_labels": labels})

    return wrong


# What verify cannot see ------------------------------------------------------------------------------------------------


def _same_seeds(fork: Any) -> Any:
    def wrong(self: Any, seed: int, *, per_rank: bool) -> Any:
        return fork(self, seed, per_rank=False)

    return wrong


def _other_seeds(fork: Any) -> Any:
    def wrong(self: Any, seed: int, *, per_rank: bool) -> Any:
        return fork(self, seed, per_rank=True)

    return wrong


def _untagged(tag: Any) -> Any:
    def wrong(model: Any, *args: Any) -> None:
        tag(model, *args)
        for parameter in model.parameters():
            if getattr(parameter, "tensor_model_parallel", False):
                parameter.tensor_model_parallel = False

    return wrong


def _decays_on_one(step: Any) -> Any:
    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 1:
            self.param_groups[0]["weight_decay"] = 0.5
        return step(self, *args, **kwargs)

    return wrong


def _forgets_moment(step: Any) -> Any:
    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(self, *args, **kwargs)
        if dist.get_rank() == 1:
            for state in self.state.values():
                state["exp_avg_sq"] *= 0.5
        return result

    return wrong


def _draws_on_one(step: Any) -> Any:
    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 1:
            torch.rand(())
        return step(self, *args, **kwargs)

    return wrong


def _other_data(check: Any) -> Any:
    def wrong(self: Any, args: Any, kwargs: Any, **options: Any) -> Any:
        if dist.get_rank() == 1:
            kwargs = {**kwargs, "input_ids": kwargs["input_ids"].flip(0, 1)}
        return check(self, args, kwargs, **options)

    return wrong


def _optimizer(make: Callable[[Any], Any]) -> Patch:
    return _swap(torch.optim.AdamW, "step", make)


def _whole_for_replicated(original: Any) -> Any:
    def whole(self: Any, x: Any) -> Any:
        if isinstance(x, TokenShard) and torch.is_grad_enabled():
            return x.region.full_for_replicated(x.local())
        return original(self, x)

    return whole


def _nothing(original: Any) -> Any:
    return lambda self: None


def _as_given(original: Any) -> Any:
    return lambda left, right: (left, right)


UNTIED: dict[str, Any] = dict(tie_word_embeddings=False)
ONE_KV: dict[str, Any] = dict(num_key_value_heads=1, num_attention_heads=6)
PLAIN: dict[str, Any] = dict(sequence_parallel=False)
EXPERTS: dict[str, Any] = dict(experts=None, dtype=torch.float32, intermediate_size=56)

MUTANTS: tuple[Mutant, ...] = (
    Mutant("norm gradients are not summed", _named("layernorm.weight", "norm.weight")),
    Mutant("only the last norm's gradient is not summed", _named("model.norm.weight")),
    Mutant("norm gradients are summed twice", _swap(partial._SumGradients, "backward", _summed_twice)),
    Mutant("norm gradients are averaged", _swap(partial._SumGradients, "backward", _averaged)),
    Mutant("gradients are summed after accumulation", _after_accumulation),
    Mutant("gradients of row-parallel biases are not summed", _named("o_proj.bias", "down_proj.bias")),
    Mutant("q and k norms are left out of the sum", _named("q_norm.weight", "k_norm.weight"), "qwen3"),
    Mutant("copied key/value heads are not summed", _left_out(lambda _, slots: bool(slots)), "qwen2", own=ONE_KV),
    Mutant("a row-parallel bias is added before the reduce-scatter", _swap(RowParallelLinear, "forward", _bias_before)),
    Mutant("a slice begins one row early", _swap(inject, "part_of", _border)),
    Mutant("query heads are held by the other rank", _crossed("q_proj"), own=dict(num_key_value_heads=2)),
    Mutant("columns of o_proj belong to the other rank's heads", _crossed("o_proj"), own=dict(num_key_value_heads=2)),
    Mutant("gate and up are cut in different places", _crossed("up_proj"), own=dict(intermediate_size=52)),
    Mutant("a tied weight is two weights", _swap(_Injection, "run", _untied)),
    Mutant("the embedding's part begins elsewhere", _start(VocabParallelEmbedding, 1), own=UNTIED),
    Mutant("the head's part begins elsewhere", _start(VocabParallelHead, -1), own=UNTIED),
    Mutant("the backward of a block's gather is a split", _swap(products.ColumnParallel, "backward", _scatter_as_split)),
    Mutant("the backward of an experts' gather is a split", _in_backward(_GatherForPartial, _own_rows_only), "mixtral", own=EXPERTS),
    Mutant("the backward of the embedding's reduce-scatter keeps own rows", _swap(_RowsOfVocabulary, "backward", _own_rows_gathered)),
    Mutant("without sequence parallelism a backward reduces again", _swap(_RowsOfVocabulary, "backward", _reduced_again), key=PLAIN),
    Mutant("gathered rows stand in the order of other ranks", _swap(regions, "gather_rows", _reversed_ranks), "mixtral", own=EXPERTS),
    Mutant("dead rows stand at the front", _swap(tokens, "_padded", _dead_rows), "mixtral", own=EXPERTS),
    Mutant("a scaling of the embeddings is dropped", _swap(TokenShard, "_apply", lambda _: _unscaled), "granite"),
    Mutant("a norm has another epsilon", _swap(_Injection, "_fuse_norms", _other_epsilon)),
    Mutant("a product's up factor has no gradient", _swap(products, "gated_backward", _no_up)),
    Mutant("what rows get by their way past a block is lost", _swap(PassedGradient, "put", lambda _: _forgotten),
        own=dict(attention_bias=False, mlp_bias=False)),
    Mutant("a norm's output is made again without the norm", _swap(products.ColumnParallel, "backward", _remade_without_norm)),
    Mutant("one rank scales its attention otherwise", _swap(_Injection, "_local_counts", _groups_wrong)),
    Mutant("a cut norm's mean has no gradient from other ranks", _swap(norm, "copy_for_partial", _identity), "olmo2"),
    Mutant("a router's input is not shared out", _swap(blocks, "share_of_replicated", _identity), "mixtral", own=EXPERTS),
    Mutant("a router's choices have no gradient from other ranks", _swap(blocks, "copy_for_partial", _identity), "mixtral", own=EXPERTS),
    Mutant("experts are summed twice", _swap(SummedBlock, "forward", _twice_reduced), "mixtral", own=EXPERTS),
    Mutant("a repeated block's input gradient is summed", _swap(WholeBlock, "forward", _whole_as_partial),
        key={"plan": {"model.layers.*.mlp": "whole"}}),
    Mutant("the gradient of an encoder's output is a split", _swap(ShardedModel, "_whole", _whole_for_replicated), "bart",
        head="seq2seq-lm"),
    Mutant("every rank's gradient of a pooled token is whole", _swap(boundaries, "share_of_replicated", _identity), "bert",
        head="sequence-classification"),
    Mutant("a pooled token is seen by the rank that holds it", _swap(token_operations, "reduce_partial", _identity), "bert",
        head="sequence-classification"),
    Mutant("position biases belong to the other rank's heads", _crossed("relative_attention_bias"), "t5", head="seq2seq-lm"),
    Mutant("what every head is given whole has one rank's gradient", _swap(blocks, "copy_for_partial", _identity), "deberta",
        head="masked-lm"),
    Mutant("a block's input that its code adds to its output is gathered for its heads", _swap(token_handles, "_beside_rows", _as_given),
        "albert", key=PLAIN, head="masked-lm"),
    Mutant("a weight's gradient is summed whoever uses it", _summed_at_the_leaf, "neomme", head="masked-lm"),
    Mutant("the loss is divided by tp_size", _swap(CausalLMLoss, "__call__", _divided)),
    Mutant("the softmax is over a rank's own vocabulary", _swap(loss, "all_gather", _own_statistics)),
    Mutant("one label too many is counted", _swap(loss, "vocab_parallel_linear_cross_entropy", _counts_ignored)),
    Mutant("labels are not shifted", _swap(CausalLMLoss, "__call__", _no_shift)),
    Mutant("the loss forgets the cap of the logits", _swap(loss, "vocab_parallel_linear_cross_entropy", _without_transforms), "gemma2"),
    Mutant("dropout masks are equal on ranks that hold other tokens", _swap(ParallelRandom, "fork", _same_seeds),
        by="dropout apart", verify=False),
    Mutant("dropout masks differ where activations are replicated", _swap(ParallelRandom, "fork", _other_seeds), by="dropout alike",
        verify=False),
    Mutant("cut parameters are left out of the gradient norm", _swap(sharding, "tag", _untagged), by="clipped steps", verify=False),
    Mutant("the optimizer decays on one rank only", _optimizer(_decays_on_one), by="replicas", verify=False),
    Mutant("a moment is lost on one rank", _optimizer(_forgets_moment), by="replicas", verify=False),
    Mutant("random numbers are drawn on one rank only", _optimizer(_draws_on_one), by="replicas", verify=False),
    Mutant("one rank is given other data", _swap(InputGuard, "check", _other_data), by="data guard"),
    Mutant("containers of tensors are compared by their type", _swap(fingerprints, "_parts", lambda parts: lambda x: ([], True)),
        by="nested data", verify=False),
    Mutant("gradients that leave by hooks stay parts", _swap(hooked, "sum_leaving", lambda edge: lambda found, group: None),
        by="users' tensors", verify=False),
    Mutant("a trainable mask's gradient is that of a rank's heads", _swap(models, "with_edges", _identity), by="users' tensors",
        verify=False),
    Mutant("a parameter's hook sees a part of its gradient", _swap(parameter_hooks, "_with_whole", lambda _: lambda hook, *_: hook),
        by="parameter hooks", verify=False),
)  # fmt: skip
