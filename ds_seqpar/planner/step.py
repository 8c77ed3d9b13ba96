"""One training step of a model, traced: builds it from its config without weights, shards it as the injection does, runs it.

Only layers that differ are run, each kind at most twice, and the last; the model is put together again from their figures.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as global_hooks

from ..config import Recompute, SeqParConfig
from ..errors import PlanError, SeqParError
from ..families import family
from ..groups import ParallelGroups
from ..hf import causal_lm_loss, describe, enable_full_recompute, masks_as_with_values, planned_model, with_layers
from ..inject import inject
from ..layers.loss import CausalLMLoss
from ..layers.region import ShardingState
from ..plan.resolve import resolve
from .chunks import few_chunks
from .stand_ins import AlikeInputs, ModelledExchange, NoRandom, as_on_gpu, fake_groups, truthful
from .trace import BLOCK, Segment, Tracker, Work

__all__ = ["LayerKinds", "StepTrace", "trace_step", "without_memory"]


def _backward(loss: Tensor) -> None:
    """As loss.backward(), which would leave the modes that stand in for a GPU while it runs."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


@dataclass(frozen=True)
class LayerKinds:
    """Which layers of a model are alike: `of[i]` is the kind of layer i, `kept` the layers that are traced."""

    of: tuple[int, ...]
    kept: tuple[int, ...]

    def representative(self, layer: int) -> int:
        """Which traced layer stands for `layer`: itself, or the second of its kind.

        The first and the last have other neighbours, and a layer's backward does a part of what the one below needs.
        """
        if layer in self.kept:
            return self.kept.index(layer)
        alike = [i for i, traced in enumerate(self.kept) if self.of[traced] == self.of[layer]]
        return alike[1]


@dataclass
class StepTrace:
    """What one rank holds and does in one step. Bytes and elements are this rank's.

    `segments`: "embedding", a forward for each traced layer, "head", "backward head", a backward for each, "backward embedding".
    """

    kinds: LayerKinds
    segments: list[Segment]
    around_parameters: int  # elements outside the layers
    layer_parameters: list[int]  # of each traced layer
    trainable_around: int
    trainable_layers: list[int]
    largest_parameter: int
    dtype_bytes: int
    symmetric_bytes: int
    tokens: int
    trained_tensors_around: int = 0
    trained_tensors_layers: list[int] = field(default_factory=list)  # of each traced layer
    plain: bool = False  # transformers' own layers
    remarks: list[str] = field(default_factory=list)

    @property
    def _n(self) -> int:
        return len(self.kinds.kept)

    @property
    def before(self) -> Segment:
        """Embedding, masks, position tables."""
        return self.segments[0]

    def forward(self, layer: int) -> Segment:
        """The forward of layer `layer` of the whole model."""
        return self.segments[1 + self.kinds.representative(layer)]

    @property
    def head(self) -> Segment:
        """Final norm, head and loss, whose gradients are made in forward."""
        return self.segments[1 + self._n]

    @property
    def backward_head(self) -> Segment:
        """The head's backward."""
        return self.segments[2 + self._n]

    def backward(self, layer: int) -> Segment:
        """The backward of layer `layer` of the whole model."""
        return self.segments[2 + 2 * self._n - self.kinds.representative(layer)]

    @property
    def after(self) -> Segment:
        """The embedding's backward."""
        return self.segments[-1]

    @property
    def num_layers(self) -> int:
        """Of the whole model."""
        return len(self.kinds.of)

    def _over_layers(self, figures: list[int]) -> int:
        return sum(figures[self.kinds.representative(i)] for i in range(self.num_layers))

    @property
    def parameters(self) -> int:
        """Elements of this rank's part of the whole model."""
        return self.around_parameters + self._over_layers(self.layer_parameters)

    @property
    def trainable(self) -> int:
        """Those of them that are trained."""
        return self.trainable_around + self._over_layers(self.trainable_layers)

    @property
    def trained_tensors(self) -> int:
        """Parameters by their number, not their size."""
        return self.trained_tensors_around + self._over_layers(self.trained_tensors_layers)

    @property
    def forward_work(self) -> Work:
        """Of the forward, the head's gradients in it."""
        return _sum(self.before, *map(self.forward, range(self.num_layers)), self.head)

    @property
    def backward_work(self) -> Work:
        """Of the backward."""
        return _sum(self.backward_head, *map(self.backward, range(self.num_layers)), self.after)

    @property
    def work(self) -> Work:
        """Of the whole step."""
        return self.forward_work.plus(self.backward_work)

    @property
    def held(self) -> dict[str, int]:
        """Bytes that live after the forward and did not before, by why."""
        total: dict[str, int] = {}
        for segment in (self.before, *(self.forward(i) for i in range(self.num_layers)), self.head):
            for why, nbytes in segment.grew.items():
                total[why] = total.get(why, 0) + nbytes
        return {why: nbytes for why, nbytes in total.items() if nbytes}


def _sum(*segments: Segment) -> Work:
    total = Work()
    for segment in segments:
        total = total.plus(segment.work)
    return total


def trace_step(
    config: Any,
    key: SeqParConfig,
    *,
    batch: int,
    seq: int,
    dtype: torch.dtype = torch.bfloat16,
    tp_rank: int = 0,
    on_gpu: bool = True,
    every_layer: bool = False,
    lora_rank: int = 0,
    plain: bool = False,
) -> StepTrace:
    """Traces forward and backward of [batch, seq] tokens on one rank.

    Args:
        config: a Hugging Face config; it stays as it is.
        on_gpu: as on a GPU that reads its peers' memory; otherwise as on the CPU over gloo (tests compare that with a run).
        every_layer: trace every layer instead of each kind twice.
        lora_rank: adapters of this rank on all linears of the blocks instead of training the weights; needs peft.
        plain: the unsharded model with transformers' own layers, what ZeRO alone and Ulysses run; `key` says the recompute.

    Raises:
        PlanError: the model cannot be sharded exactly, or its code asks for values while it runs.
    """
    with warnings.catch_warnings(), fake_groups(key.tp_size, tp_rank) as groups:
        warnings.simplefilter("ignore")  # of no use to who plans
        model = planned_model(config, dtype)
        if lora_rank:
            _adapt(model, lora_rank)
        kinds = _prune(model, key, every_layer)
        tracker = Tracker(BLOCK if on_gpu else 1)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        without_memory(model, mode)
        try:
            return _Run(model, key, groups, kinds, tracker, mode, on_gpu, plain).trace(batch, seq)
        except SeqParError:
            raise
        except Exception as problem:
            line = next((text for text in str(problem).splitlines() if text.strip()), "")
            raise PlanError(
                f"model type {config.model_type!r} cannot be traced, its code fails without values: "
                f"{type(problem).__name__}: {line[:300]}"
            ) from problem


def _adapt(model: Any, rank: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise PlanError("planning with LoRA needs peft; pip install 'ds_seqpar[peft]'") from None
    inject_adapter_in_model(
        LoraConfig(r=rank, target_modules="all-linear", lora_dropout=0.0), model, low_cpu_mem_usage=True
    )


def _prune(model: Any, key: SeqParConfig, every_layer: bool) -> LayerKinds:
    """Takes layers out of the model that are like others."""
    facts = describe(model)
    layers = resolve(facts, family(facts.data_file), key.tp_size, key.plan).layers
    lists: dict[str, list[int]] = {}
    for name in layers:
        parent, _, number = name.rpartition(".")
        lists.setdefault(parent, []).append(int(number))
    (parent, numbers) = next(iter(lists.items())) if len(lists) == 1 else ("", [])
    if not parent or numbers != list(range(len(numbers))):
        everything = tuple(range(len(layers)))
        return LayerKinds(everything, everything)
    signatures = [_signature(model, f"{parent}.{i}", i, len(numbers)) for i in numbers]
    first: dict[Any, int] = {}
    of = tuple(first.setdefault(s, len(first)) for s in signatures)
    kept = tuple(i for i in numbers if every_layer or of[:i].count(of[i]) < 2 or i == numbers[-1])
    with_layers(model, {parent: list(kept)})
    return LayerKinds(of, kept)


def _signature(model: Any, name: str, index: int, count: int) -> Any:
    """Everything that decides what a layer does, but its number."""
    parts = []
    for path, module in model.get_submodule(name).named_modules():
        shapes = tuple((k, tuple(p.shape), p.requires_grad) for k, p in module.named_parameters(recurse=False))
        own = tuple(
            (k, v)
            for k, v in sorted(vars(module).items())
            if isinstance(v, bool | int | float | str | None)
            and not k.startswith("_")
            and k not in ("layer_idx", "layer_id")
        )
        parts.append((path, type(module).__name__, shapes, own))
    lists = tuple(
        (k, repr(v[index])) for k, v in vars(model.config).items() if isinstance(v, list | tuple) and len(v) == count
    )
    return tuple(parts), lists


def without_memory(model: nn.Module, mode: FakeTensorMode | None = None) -> None:
    """Fake tensors on the CPU in place of meta tensors, tied ones still tied."""
    made: dict[int, Any] = {}
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)

    def fake(x: Tensor) -> Tensor:
        with mode:
            return torch.empty(x.shape, dtype=x.dtype, device="cpu")

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = made.setdefault(id(parameter), nn.Parameter(fake(parameter), parameter.requires_grad))
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), fake(buffer))
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                setattr(module, name, made.setdefault(id(value), fake(value)))


class _Run:
    def __init__(
        self,
        model: Any,
        key: SeqParConfig,
        groups: ParallelGroups,
        kinds: LayerKinds,
        tracker: Tracker,
        mode: FakeTensorMode,
        on_gpu: bool,
        plain: bool,
    ) -> None:
        self.model, self.key, self.kinds, self.tracker = model, key, kinds, tracker
        self.mode, self.on_gpu, self.plain = mode, on_gpu, plain
        facts = describe(model)
        loss = causal_lm_loss(model)
        if facts.head is None or loss is None:
            raise PlanError(f"model type {facts.model_type!r} has no causal-LM loss that could be planned")
        self.exchange = ModelledExchange(groups.tp_group, tracker)
        self.remarks: list[str] = []
        if not plain:
            self.remarks = inject(model, facts, key, groups, has_values=False).remarks
            model.loss_function = CausalLMLoss(loss)
            self._stand_in(model.seqpar)
        if key.recompute is Recompute.FULL:
            enable_full_recompute(model)
        plan = resolve(facts, family(facts.data_file), key.tp_size, key.plan)
        self.layers = [model.get_submodule(name) for name in plan.layers]
        self.labels = {id(layer): "residual stream" for layer in self.layers}
        for block in plan.blocks.values():
            self.labels[id(model.get_submodule(block.name))] = "attention" if block.has_heads else "MLP"
        for layer in self.layers:
            for child in layer.children():
                if "Norm" in type(child).__name__:
                    self.labels[id(child)] = "norms"
        self.labels[id(model.get_submodule(facts.embedding))] = "embedding"

    def _stand_in(self, state: ShardingState) -> None:
        state.guard, state.random = AlikeInputs(), NoRandom()  # type: ignore[assignment]
        if self.on_gpu:
            state.exchange = self.exchange  # type: ignore[assignment]
        else:
            state.exchange.decide(None)

    def trace(self, batch: int, seq: int) -> StepTrace:
        model, tracker = self.model, self.tracker
        model.train()
        tracker.exclude(*model.parameters(), *model.buffers())
        tracker.parameters = list(model.parameters())
        with ExitStack() as stack:
            stack.enter_context(self.mode)
            ids = torch.empty((batch, seq), dtype=torch.int64)
            stack.enter_context(truthful())
            stack.enter_context(masks_as_with_values())
            if self.on_gpu:
                stack.enter_context(as_on_gpu(tracker))
            stack.enter_context(few_chunks(tracker))
            stack.enter_context(tracker)
            tracker.exclude(ids)
            with self._hooks():
                tracker.begin("embedding")
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            tracker.begin("backward head")
            _backward(loss)
            del loss
            tracker.end()
        return self._result(batch * seq)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Segments and labels by the modules that run. Global hooks: modules with hooks of their own may take another path."""
        tracker, forward = self.tracker, True
        index = {id(layer): i for i, layer in enumerate(self.layers)}

        def before(module: nn.Module, args: Any) -> None:
            if forward and id(module) in index:
                tracker.begin(f"layer {index[id(module)]}")
                tensor = next((x for x in args if isinstance(x, Tensor)), None)
                if index[id(module)] == 0 and tensor is not None and tensor.requires_grad:
                    tensor.register_hook(lambda _: tracker.begin("backward embedding"))
            if id(module) in self.labels:
                tracker.enter_label(self.labels[id(module)])

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if id(module) in self.labels:
                tracker.leave_label()
            if forward and id(module) in index:
                number = index[id(module)]
                tensor = output[0] if isinstance(output, tuple) else output
                tensor.register_hook(lambda _: tracker.begin(f"backward {number}"))
                if number == len(self.layers) - 1:
                    tracker.begin("head")

        handles = [
            global_hooks.register_module_forward_pre_hook(before),
            global_hooks.register_module_forward_hook(after),
        ]
        tracker._labels[:] = ["head and loss"]
        try:
            yield
        finally:
            forward = False
            for handle in handles:
                handle.remove()

    def _result(self, tokens: int) -> StepTrace:
        n = len(self.layers)
        expected = 2 * n + 4
        if len(self.tracker.segments) == expected - 1:  # nothing below the layers is trained
            self.tracker.segments.append(Segment("backward embedding"))
        if len(self.tracker.segments) != expected:
            found = [segment.name for segment in self.tracker.segments]
            raise PlanError(f"the step of this model does not run layer by layer: {found}")

        def elements(module: nn.Module, trained: bool) -> int:
            return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)

        def tensors(module: nn.Module) -> int:
            return sum(p.requires_grad for p in module.parameters())

        layer_parameters = [elements(layer, False) for layer in self.layers]
        tensors_layers = [tensors(layer) for layer in self.layers]
        trainable_layers = [elements(layer, True) for layer in self.layers]
        everything = list(self.model.parameters())
        return StepTrace(
            kinds=self.kinds,
            segments=self.tracker.segments,
            around_parameters=sum(p.numel() for p in everything) - sum(layer_parameters),
            layer_parameters=layer_parameters,
            trainable_around=sum(p.numel() for p in everything if p.requires_grad) - sum(trainable_layers),
            trainable_layers=trainable_layers,
            largest_parameter=max(p.numel() for p in everything),
            dtype_bytes=max(p.element_size() for p in everything),
            symmetric_bytes=self.exchange.symmetric_bytes,
            tokens=tokens,
            trained_tensors_around=tensors(self.model) - sum(tensors_layers),
            trained_tensors_layers=tensors_layers,
            plain=self.plain,
            remarks=self.remarks,
        )
