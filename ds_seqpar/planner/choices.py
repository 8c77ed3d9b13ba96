"""Every way to train a model on some GPUs that is worth naming, with its memory and its time, best first."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..config import KEY, Recompute, SeqParConfig
from ..errors import ConfigError, PlanError
from .memory import MemoryEstimate, Zero, estimate
from .rates import Rates
from .step import StepTrace, trace_step
from .steptime import StepTime, predict
from .trace import Segment

__all__ = ["ALONE", "SEQPAR", "ULYSSES", "Choice", "Choices", "Request", "choices_for"]

SEQPAR, ALONE, ULYSSES = "ds_seqpar", "ZeRO alone", "Ulysses"
TILE = 1 << 30
"""Bytes of logits that ALST's tiled loss has at a time; three copies of them exist at once."""
FREE = 0.03
"""Share of a GPU's memory left to fragmentation."""
SHORTEST = 64
MOST_TOKENS = 1 << 27
MOST_GPUS = 1 << 20
TRACED, MOST_TRACED = 64, 256
"""Chunks of the loss beyond which the longest sequence is found by a line, not by a trace; and where nothing rises until there."""


@dataclass(frozen=True)
class Request:
    """What a user has and wants. `key` is the `ds_seqpar` object of their JSON, where it names something."""

    config: Any
    seq: int
    gpus: int
    gpu_memory: int
    nodes: int = 1
    micro_batch: int = 1
    stages: tuple[int, ...] = (1, 2, 3)
    ds_config: dict[str, Any] = field(default_factory=dict)
    lora_rank: int = 0
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        """Raises ConfigError for sizes that cannot be."""
        for name in ("seq", "gpus", "nodes", "micro_batch", "gpu_memory"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name.replace('_', ' ')} must be at least 1, not {getattr(self, name)}")
        if self.seq * self.micro_batch > MOST_TOKENS:
            raise ConfigError(
                f"{self.micro_batch} x {self.seq} tokens a forward: more than 2^27 is beyond what can be planned"
            )
        if self.gpus % self.nodes:
            raise ConfigError(f"{self.gpus} GPUs do not lie evenly on {self.nodes} nodes; --gpus counts all of them")
        if self.gpus > MOST_GPUS:
            raise ConfigError(f"{self.gpus} GPUs are more than can be planned; at most {MOST_GPUS}")

    @property
    def gpus_per_node(self) -> int:
        """GPUs that share NVLink."""
        return self.gpus // self.nodes

    @property
    def zero(self) -> Zero:
        """The ZeRO settings of the JSON, whatever its stage."""
        half = self.dtype is not torch.float32
        return replace(Zero.from_json(self.ds_config), masters=half)


@dataclass(frozen=True)
class Choice:
    """One way, predicted."""

    strategy: str
    split: int  # GPUs that share a sequence: tp_size, or Ulysses' size
    dp_size: int
    stage: int
    recompute: Recompute
    memory: MemoryEstimate
    time: StepTime
    tokens_per_s_per_gpu: float
    fits: bool
    longest: int = 0

    @property
    def name(self) -> str:
        """As in a table."""
        if self.strategy == ALONE:
            return f"ZeRO-{self.stage} alone"
        return f"{self.strategy} {self.split}"


@dataclass(frozen=True)
class Choices:
    """All of them, those that fit first, the fastest first; `refused` says what could not be planned and why."""

    request: Request
    rates: Rates
    all: list[Choice]
    refused: dict[str, str]

    @property
    def best(self) -> Choice | None:
        """The fastest that fits."""
        return next((choice for choice in self.all if choice.fits), None)

    def ds_config(self, choice: Choice) -> dict[str, Any]:
        """The DeepSpeed JSON of a choice: the user's own with what the choice decides."""
        result = copy.deepcopy(self.request.ds_config)
        result["train_micro_batch_size_per_gpu"] = self.request.micro_batch
        result.pop("train_batch_size", None)
        result.setdefault("gradient_accumulation_steps", 1)
        if self.request.dtype is torch.bfloat16 and not (result.get("fp16") or {}).get("enabled"):
            result.setdefault("bf16", {"enabled": True})
        result.setdefault("gradient_clipping", 1.0)
        result["zero_optimization"] = {**(result.get("zero_optimization") or {}), "stage": choice.stage}
        result.pop("sequence_parallel_size", None)
        if "autotp_size" in (result.get("tensor_parallel") or {}):
            del result["tensor_parallel"]["autotp_size"]
        key = result.pop(KEY, {})
        if choice.strategy == SEQPAR:
            key.update(tp_size=choice.split)
            key.pop("recompute", None)
            if choice.recompute is not Recompute.NONE:
                key["recompute"] = choice.recompute.value
            result[KEY] = key
        elif choice.strategy == ULYSSES:
            result["sequence_parallel_size"] = choice.split
        return result


class _Planner:
    def __init__(
        self, request: Request, rates: Rates, tell: Callable[[str], None], traces: dict[Any, StepTrace | None]
    ) -> None:
        self.request, self.rates, self.tell = request, rates, tell
        self.key = dict(request.ds_config.get(KEY) or {})
        self.refused: dict[str, str] = {}
        self._traces = traces

    def sizes(self) -> list[int]:
        """Sizes of groups that share a sequence: within a node."""
        per_node = self.request.gpus_per_node
        wanted = self.key.get("tp_size")
        if wanted is not None:
            if per_node % wanted:
                raise ConfigError(
                    f'"{KEY}.tp_size": {wanted} does not divide the {per_node} GPUs of a node; use a divisor of {per_node}'
                )
            return [wanted]
        return [n for n in range(1, min(per_node, 64) + 1) if per_node % n == 0]

    def trace(self, strategy: str, split: int, recompute: Recompute, seq: int) -> StepTrace | None:
        """Of one rank; None (and a reason in `refused`) where it cannot be done."""
        name = (strategy, split, recompute, seq)
        if name not in self._traces:
            self.tell(f"{strategy} {split}, recompute {recompute.value}, {seq} tokens")
            try:
                self._traces[name] = self._trace(*name)
            except PlanError as problem:
                self.refused.setdefault(f"{strategy} {split}" if strategy == SEQPAR else strategy, str(problem))
                self._traces[name] = None
        return self._traces[name]

    def _trace(self, strategy: str, split: int, recompute: Recompute, seq: int) -> StepTrace:
        request = self.request
        key = {**self.key, "tp_size": split if strategy == SEQPAR else 1, "recompute": recompute.value}
        common: dict[str, Any] = dict(batch=request.micro_batch, dtype=request.dtype, lora_rank=request.lora_rank)
        if strategy == SEQPAR:
            return trace_step(request.config, SeqParConfig.from_json(key), seq=seq, **common)
        plain = SeqParConfig.from_json({"tp_size": 1, "recompute": recompute.value})
        if strategy == ALONE:
            return trace_step(request.config, plain, seq=seq, plain=True, **common)
        heads = getattr(request.config, "num_attention_heads", None)
        if not heads or heads % split:
            raise PlanError(f"Ulysses cannot spread {heads or 'no'} heads over {split} ranks")
        return _spread(trace_step(request.config, plain, seq=-(-seq // split), plain=True, **common), split, request)

    def memory(self, trace: StepTrace, zero: Zero, strategy: str, split: int) -> tuple[MemoryEstimate, int]:
        """And over how many ranks ZeRO partitions."""
        ranks = self.request.gpus // (split if strategy == SEQPAR else 1)
        return estimate(trace, zero, ranks), ranks

    def choices(self) -> Iterator[Choice]:
        """All that can be planned."""
        for strategy, split, recompute in self._ways():
            if strategy != SEQPAR and 3 not in self.request.stages:
                self.refused.setdefault(
                    strategy, f"it is planned at ZeRO 3, and stage {self.request.stages[0]} was asked for"
                )
                continue
            trace = self.trace(strategy, split, recompute, self.request.seq)
            if trace is None:
                continue
            for stage in self.request.stages if strategy == SEQPAR else (3,):
                yield self._choice(strategy, split, recompute, stage, trace)

    def _ways(self) -> Iterator[tuple[str, int, Recompute]]:
        asked = Recompute(self.key["recompute"]) if "recompute" in self.key else None
        for split in self.sizes():
            for recompute in (asked,) if asked else Recompute:
                yield SEQPAR, split, recompute
            if "tp_size" in self.key:
                continue
            for recompute in (Recompute.NONE, Recompute.FULL):
                yield (ALONE, 1, recompute) if split == 1 else (ULYSSES, split, recompute)

    def _choice(self, strategy: str, split: int, recompute: Recompute, stage: int, trace: StepTrace) -> Choice:
        request, zero = self.request, replace(self.request.zero, stage=stage)
        memory, ranks = self.memory(trace, zero, strategy, split)
        tp = split if strategy == SEQPAR else 1
        time = predict(trace, self.rates, zero, tp_size=split, dp_size=ranks, gpus_per_node=request.gpus_per_node)
        if tp == 1 and split > 1:  # Ulysses' ranks share a sequence, and all of them share the weights
            time = predict(
                trace, self.rates, zero, tp_size=split, dp_size=request.gpus, gpus_per_node=request.gpus_per_node
            )
        tokens = request.micro_batch * request.seq * zero.accumulation / split
        fits = memory.total <= request.gpu_memory * (1 - FREE)
        return Choice(
            strategy, split, request.gpus // split, stage, recompute, memory, time, tokens / time.total * 1e3, fits,
        )  # fmt: skip

    def longest(self, choice: Choice) -> int:
        """The most tokens a sequence can have, a multiple of SHORTEST; 0 if not even SHORTEST fit.

        What forward and backward need, and what the optimizer's step does, are each the highest of several straight lines in the
        tokens, so the line through a length that fits and one that does not meets the budget at a length that fits. Beyond TRACED
        chunks of the loss the line through that length and one a little shorter goes on, in whole chunks; the half might stand on
        a line that rises less.
        """
        request = self.request
        budget, zero = request.gpu_memory * (1 - FREE), replace(request.zero, stage=choice.stage)
        points: dict[int, MemoryEstimate] = {}
        most = MOST_TOKENS // request.micro_batch
        chunk: int = self.key.get("loss_chunk_tokens", SeqParConfig.loss_chunk_tokens)
        traced = TRACED * chunk

        def at(seq: int) -> bool:
            trace = self.trace(choice.strategy, choice.split, choice.recompute, seq)
            if trace is not None:
                points[seq] = self.memory(trace, zero, choice.strategy, choice.split)[0]
            return trace is not None

        if not (at(request.seq) and at(2 * request.seq)):
            return 0
        for _ in range(8):
            passes = {seq: memory.peak + memory.beside for seq, memory in points.items()}
            steps = {seq: memory.peak_step + memory.beside for seq, memory in points.items()}
            found = min(most, _meets(passes, budget), _meets(steps, budget)) // SHORTEST * SHORTEST
            if found in points or found < SHORTEST:
                return max(0, found)
            if found > traced:  # on the line that holds far out, which two short lengths may not be on
                ends = (traced, traced - 4 * chunk)
                far = [seq for seq in ends if seq > 2 * request.seq and seq not in points]
                if not far and traced < MOST_TRACED * chunk and len({points[s].peak for s in ends if s in points}) == 1:
                    traced *= 2  # what rises with the tokens is not the highest yet
                    continue
                if not far:
                    return found // chunk * chunk
                found = far[0]
            if not at(found):
                return 0
        return max((seq for seq, memory in points.items() if memory.total <= budget), default=0)


def _meets(points: Mapping[int, int], budget: float) -> int:
    """Where the line through the two points next to `budget` meets it."""
    order = sorted(points)
    over = next((i for i, seq in enumerate(order) if points[seq] > budget), len(order))
    low, high = order[max(0, min(over, len(order) - 1) - 1) :][:2]
    rise = points[high] - points[low]
    if rise <= 0:  # what does not depend on the tokens
        return MOST_TOKENS if points[high] <= budget else 0
    return int(low + (budget - points[low]) * (high - low) / rise)


def _spread(trace: StepTrace, split: int, request: Request) -> StepTrace:
    """A plain step over this rank's tokens as Ulysses runs it: attention over all tokens and its share of heads, ALST's tiled loss.

    q, k, v and the output change hands in every layer, forward and backward; nothing hides that.
    """
    config = request.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    passed = 2 * width * (config.num_attention_heads + max(kv, split)) * trace.tokens * trace.dtype_bytes

    def wider(segment: Segment) -> Segment:
        work = replace(
            segment.work,
            attention_flops=segment.work.attention_flops * split,
            attention_backward_flops=segment.work.attention_backward_flops * split,
        )
        if work.attention_flops or work.attention_backward_flops:
            times = bool(work.attention_flops) + bool(work.attention_backward_flops)
            work = replace(
                work,
                waited_bytes=work.waited_bytes + times * passed,
                waits=work.waits + 4 * times,
                operations=work.operations + 4 * times,
            )
        return Segment(segment.name, segment.peak, segment.grew, segment.gradients, work)

    segments = [wider(segment) for segment in trace.segments]
    for segment in segments:
        if segment.name in ("head", "backward head"):
            segment.peak = min(segment.peak, 3 * TILE + segment.gradients)
            if segment.name == "head":
                hidden = request.config.hidden_size * trace.tokens * trace.dtype_bytes
                segment.grew = Counter({"head and loss": min(segment.growth, 2 * hidden)})
            else:
                segment.grew = Counter({"head and loss": segment.gradients})
    return replace(trace, segments=segments, symmetric_bytes=0, tokens=trace.tokens)


def choices_for(
    request: Request,
    rates: Rates,
    tell: Callable[[str], None] = lambda _: None,
    rows: int = 12,
    traces: dict[Any, StepTrace | None] | None = None,
) -> Choices:
    """All choices; the first `rows` know the longest sequence, too.

    `traces` is filled, and read again by a call that differs in GPUs, nodes, memory or ZeRO alone.

    Raises:
        PlanError: nothing at all can be planned for this model.
    """
    planner = _Planner(request, rates, tell, {} if traces is None else traces)
    found = list(planner.choices())
    if not found:
        why = next(iter(planner.refused.values()), "there is no size of tensor-parallel groups")
        raise PlanError(why)
    best: dict[Any, Choice] = {}
    for choice in sorted(found, key=lambda c: (not c.fits, -c.tokens_per_s_per_gpu if c.fits else c.memory.total)):
        best.setdefault((choice.strategy, choice.split, choice.recompute), choice)  # one stage of each
    ranked = list(best.values())
    ranked = [replace(c, longest=planner.longest(c)) if i < rows else c for i, c in enumerate(ranked)]
    return Choices(request, rates, ranked, planner.refused)
