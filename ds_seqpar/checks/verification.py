"""`"verify": true`: one small batch through the sharded model and through the unsharded one, every value and gradient compared.

    kind, by measurement    this rank's own gradient, before any sum over the group, is
    cut                     the whole gradient's part that this rank holds
    partial                 a term: the ranks' sum is the whole gradient
    replicated kv           a term: the sum over the ranks that hold the same part is that part of the whole gradient
    full                    the whole gradient

Legend: T = b*s tokens, t tp_size.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checkpoint.gathering import gather_parameter, part_of
from ..errors import VerificationError
from ..layers.blocks import ExpertsBlock, Router
from ..layers.boundaries import ShardedLayer
from ..layers.region import ShardingState
from ..plan.cuts import Cut, Kind
from ..plan.report import ParameterEntry
from ..plan.wrappers import unwrapped
from .comparison import Rounding, checksum
from .reference import Reference, Skeleton
from .sharded_run import ShardedRun

__all__ = ["Check", "Verification", "batch_for", "verify"]

_EXACT = ("shape and ties", "weight")
NONE = "none"
"""What a parameter measures as whose gradient is none of the four kinds."""


@dataclass
class Check:
    """One comparison. `error` and `allowed` are relative to the reference's norm; `ratio` is of the worst rank."""

    what: str
    module: str
    error: float
    allowed: float
    ratio: float
    claimed: str = ""
    measured: str = ""

    @property
    def passed(self) -> bool:
        """Within rounding, and of the kind that the Report claims."""
        return self.ratio <= 1.0 and self.claimed == self.measured


@dataclass
class Verification:
    """Every check in the order of execution, forward and then backward."""

    model_type: str
    tp_size: int
    tokens: int
    rounding: Rounding  # in layers
    outside: Rounding  # in the embedding, the head and the loss, whose sums run over the vocabulary
    checks: list[Check] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def first_difference(self) -> Check | None:
        """The first check, in the order of execution, that did not pass."""
        return next((check for check in self.checks if not check.passed), None)

    def require(self) -> None:
        """Raises VerificationError if a check did not pass."""
        first = self.first_difference
        if first is not None:
            failed = [check for check in self.checks if not check.passed]
            raise VerificationError(
                f"the sharded {self.model_type} model does not compute what the unsharded one does: {len(failed)} of "
                f"{len(self.checks)} checks failed, first {_line(first)}. Do not train with it; report it with this table\n{self}"
            )

    def __str__(self) -> str:
        """A table: a line for each distinct module (layers as one) and kind of value, its worst error; then what failed."""
        title = f"ds_seqpar verify: {self.model_type}, tp_size={self.tp_size}, {self.tokens} tokens, sharded against unsharded"
        rows: dict[tuple[str, str, str, str], list[Check]] = {}
        for check in self.checks:
            name = ".".join("*" if part.isdigit() else part for part in check.module.split("."))
            name = "all parameters" if check.passed and check.what in _EXACT else name
            rows.setdefault((name, check.what, check.claimed, check.measured), []).append(check)
        table = [("checks", "of", "value", "claimed", "measured", "worst error", "allowed", "")]
        for (name, what, claimed, measured), checks in rows.items():
            worst = max(checks, key=lambda c: c.ratio)
            verdict = "ok" if all(c.passed for c in checks) else "FAILED"
            table.append(
                (str(len(checks)), name, what, claimed, measured, f"{worst.error:.1e}", f"{worst.allowed:.1e}", verdict)
            )
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = [title, f"  rounding, {self.rounding}; outside the layers {self.outside.relative:.1e}"]
        lines += [
            "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        lines += [f"  note: {remark}" for remark in self.remarks]
        failed = [check for check in self.checks if not check.passed]
        lines += [f"  failed: {_line(check)}" for check in failed[:20]]
        lines.append(f"  {len(self.checks) - len(failed)} of {len(self.checks)} checks passed")
        return "\n".join(lines)


def _line(check: Check) -> str:
    kinds = f", claimed {check.claimed}, measured {check.measured}" if check.claimed != check.measured else ""
    return f"{check.module}: {check.what} is off by {check.error:.1e} ({check.allowed:.1e} allowed){kinds}"


def batch_for(model: Any, tp_size: int, seq: int) -> dict[str, Any]:
    """A few rows of `seq` random tokens: with padding, ignored labels, and a number of tokens that tp_size does not divide.
    Tokens that the config gives a meaning (an image's place, the end of a text) are left out, but for the end where an
    encoder-decoder classifies. Labels are for models that predict tokens; of others the outputs are made a loss.

    model: the Hugging Face model that will be called, or that a wrapper will call.
    """
    generator = torch.Generator().manual_seed(1)
    rows = 2 if tp_size % 3 == 0 else 3
    seq = max(4, seq + 1 if tp_size > 1 and rows * seq % tp_size == 0 else seq)
    special = {
        x for name, x in vars(model.config).items() if name.endswith(("token_id", "token_index")) and type(x) is int
    }
    ordinary = [i for i in range(unwrapped(model.get_input_embeddings()).num_embeddings) if i not in special] or [0]
    ids = torch.tensor(ordinary)[torch.randint(0, len(ordinary), (rows, seq), generator=generator)]
    mask = torch.ones_like(ids)
    mask[-1, seq - 2 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :2] = -100
    accepted = inspect.signature(type(model).forward).parameters
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.get_output_embeddings() is not None:
        batch["labels"] = labels
    elif model.config.is_encoder_decoder:
        end = model.config.eos_token_id
        ids[:, seq - 3] = end if isinstance(end, int) else ids[:, seq - 3]
        batch["decoder_input_ids"] = ids.flip(1)
    device = next(model.parameters()).device
    placed: dict[str, Any] = {name: x.to(device) for name, x in batch.items() if name in accepted}
    return placed | ({"use_cache": False} if "use_cache" in accepted else {})


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first weight that has one with a fraction."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def verify(model: nn.Module, inner: Any, skeleton: Skeleton, batch: Mapping[str, Any]) -> Verification:
    """Compares one forward and backward of `model`, sharded and before any engine, with those of `skeleton` unsharded.

    Gradients and random state are left as they were; dropout is off. Needs memory for one layer's whole weights and gradients
    (three times more where a wider dtype exists), and those of everything outside the layers. Collective over all ranks, each
    of which returns the same verdict.

    Args:
        model: what a user calls.
        inner: the Hugging Face model in it, which holds the Report.
    """
    state: ShardingState = inner.seqpar
    with _without_leaps(model, skeleton) as remark:
        found = _verify(model, inner, state, skeleton, batch)
    found.remarks += [remark] if remark else []
    return found


@contextmanager
def _without_leaps(model: nn.Module, skeleton: Skeleton) -> Iterator[str]:
    """In half precision a router's choice, and the side of a ReLU's kink, hang on rounding, and the other is another result:
    float32 for the time being.

    The way there and back changes no value. Gives a line for the table, "" where nothing had to be done.
    """
    dtypes = {x: x.dtype for x in (*model.parameters(), *model.buffers()) if x.dtype in (torch.bfloat16, torch.float16)}
    leaps = any(isinstance(module, Router | ExpertsBlock | nn.ReLU) for module in model.modules())
    if not (dtypes and leaps):
        yield ""
        return
    was = next(iter(dtypes.values()))
    for x in dtypes:
        x.data = x.data.float()
    skeleton.model.float()
    try:
        name = str(was).removeprefix("torch.")
        yield f"compared in float32: in {name} a choice of experts, or the side of a ReLU's kink, would hang on rounding"
    finally:
        for x, dtype in dtypes.items():
            x.data = x.data.to(dtype)


def _verify(
    model: nn.Module, inner: Any, state: ShardingState, skeleton: Skeleton, batch: Mapping[str, Any]
) -> Verification:
    tokens = batch["input_ids"].numel()
    inside = {id(p) for m in model.modules() if isinstance(m, ShardedLayer) for p in m.parameters()}
    sizes = {i: max(entry.shape, default=1) for i, entry in state.entries.items()}
    longest = max([tokens, *(size for i, size in sizes.items() if i in inside)])
    rounding, outside = Rounding(dtype_of(model), longest), Rounding(dtype_of(model), max(longest, *sizes.values()))
    found = Verification(inner.config.model_type, state.groups.tp_size, tokens, rounding, outside)
    counted, was_training = dict(state.materialised), model.training
    model.train()
    with torch.random.fork_rng(devices=None if torch.cuda.is_initialized() else []):
        run = ShardedRun.of(model, state, batch)
        keep = run.shares_state or bool(getattr(inner.config, "output_router_logits", False))
        comparison = _Comparison(model, state, run, found)
        comparison.structure(skeleton)
        skeleton.model.train()
        Reference(skeleton, run, comparison.fetch, comparison, keep=keep)(batch)
    if keep:
        found.remarks.append("layers share tensors beside their hidden states, so all weights were held whole at once")
    comparison.agree()
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    state.materialised.clear()
    state.materialised.update(counted)
    return found


@dataclass
class _Measured:
    """A check before the ranks agree; distances as multiples of what is allowed, on this rank."""

    what: str
    module: str
    at: tuple[int, int, int]  # where it stands in the order of execution
    error: float
    allowed: float
    ratio: float
    claimed: str = ""
    as_complete: float = 0.0
    as_term: float = 0.0


class _Comparison:
    """Receives what Reference finds on this rank; `agree` makes checks of it, by the worst rank."""

    def __init__(self, model: nn.Module, state: ShardingState, run: ShardedRun, found: Verification) -> None:
        self.model, self.state, self.run, self.found = model, state, run, found
        self.parameters = dict(model.named_parameters())
        self.measured: list[_Measured] = []
        self.sums: dict[str, Tensor] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.shared: set[str] = set()  # parameters that several modules hold

    def structure(self, skeleton: Skeleton) -> None:
        """Which parameters there are, of which shape, and which of them are one."""
        self.sums, self.dtypes = skeleton.sums, skeleton.dtypes
        self.shared = {name for name, tied in skeleton.ties.items() if len(tied) > 1}
        everywhere = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tied in skeleton.ties.items():
            parameter = everywhere.get(name)
            right = parameter is not None and all(everywhere.get(other) is parameter for other in tied)
            if right and name in skeleton.shapes:
                right = self.state.entries[id(parameter)].shape == skeleton.shapes[name]
            self._exact("shape and ties", name, right)

    def fetch(self, name: str) -> Tensor:
        """The whole weight, from the ranks' parts, checked against what it was before; collective."""
        parameter = self.parameters[name]
        cut = self.state.entries[id(parameter)].cut
        data = parameter.detach()
        whole = data.clone() if cut is None else gather_parameter(data, cut, self.state.groups.tp_group)
        self._exact(
            "weight", name, name not in self.sums or bool(checksum(whole.to(self.dtypes[name])) == self.sums[name])
        )
        return whole

    def _exact(self, what: str, name: str, right: bool) -> None:
        wrong = 0.0 if right else math.inf
        self.measured.append(_Measured(what, name, (0, 0, 0), wrong, 0.0, wrong))

    def tensor(
        self, what: str, module: str, at: tuple[int, int, int], mine: Tensor | None, theirs: Tensor | None, wide: Tensor | None = None
    ) -> None:  # fmt: skip
        """A value that every rank holds whole."""
        if mine is None or theirs is None or mine.numel() != theirs.numel():
            wrong = 0.0 if mine is theirs else math.inf
            self.measured.append(_Measured(what, module, at, wrong, 0.0, wrong))
            return
        exact = theirs if wide is None else wide
        size = _distance(exact)
        lost = 0.0 if wide is None else _distance(theirs, wide)
        allowed = self._rounding(wide).allowed(size, lost)
        self._within(_Measured(what, module, at, _distance(mine, exact), allowed, 0.0), size)

    def _rounding(self, wide: Tensor | None) -> Rounding:
        """What is computed inside a layer has a wider counterpart; what has none may stand outside."""
        return self.found.outside if wide is None else self.found.rounding

    def _within(self, measured: _Measured, size: float) -> None:
        measured.ratio = measured.error / measured.allowed if measured.allowed else math.inf if measured.error else 0.0
        measured.error, measured.allowed = (x / size if size else x for x in (measured.error, measured.allowed))
        self.measured.append(measured)

    def gradient(
        self, name: str, at: tuple[int, int, int], theirs: Tensor | None, wide: Tensor | None, largest: float
    ) -> None:
        """A parameter's gradient, on every rank that part of the whole which it holds; and its kind."""
        parameter = self.parameters[name]
        entry, mine, groups = self.state.entries[id(parameter)], parameter.grad, self.state.groups
        if mine is None or theirs is None:
            wrong = 0.0 if mine is theirs else math.inf
            self.measured.append(_Measured("gradient", name, at, wrong, 0.0, wrong, entry.kind))
            return
        exact = theirs if wide is None else wide
        if entry.cut is not None:
            theirs, exact = (_held(x, entry.cut, groups.tp_rank) for x in (theirs, exact))
        raw = self.run.raw.get(id(parameter), mine)
        size = _distance(exact)
        lost = 0.0 if wide is None else _distance(theirs, exact)
        rounding = self._rounding(wide)
        allowed = rounding.allowed(size, lost, largest)
        measured = _Measured("gradient", name, at, _distance(mine, exact), allowed, 0.0, entry.kind)
        summed = raw is not mine
        unsummed = allowed + rounding.relative * (_distance(raw) if summed else size)
        apart = _distance(raw, exact) if summed else measured.error
        measured.as_complete = apart / unsummed if unsummed else 0.0
        if entry.cut is None or entry.cut.copied:
            # Where several modules hold a parameter and each sums its own use, other uses may be complete: only the sum counts.
            by_use = name in self.shared and self.state.partial.sums_uses_of(parameter)
            total = mine if by_use else self._sum(raw, entry)
            measured.as_term = _distance(total, exact) / unsummed if unsummed else 0.0
        else:
            measured.as_term = math.inf
        self._within(measured, size)

    def _sum(self, raw: Tensor, entry: ParameterEntry) -> Tensor:
        groups = self.state.groups
        slot, slots = (0, 1) if entry.cut is None else entry.cut.slot(groups.tp_rank)
        total = raw.new_zeros((slots, *raw.shape), dtype=torch.promote_types(raw.dtype, torch.float32))
        total[slot] = raw
        dist.all_reduce(total, group=groups.tp_group)
        return total[slot]

    def agree(self) -> None:
        """Makes checks of what was measured, by the worst rank of all; collective."""
        rows = [[m.error, m.allowed, m.ratio, m.as_complete, m.as_term] for m in self.measured]
        worst = torch.tensor(rows, dtype=torch.float64).nan_to_num(nan=math.inf, posinf=math.inf)
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=self.state.groups.world_cpu_group)
        checks = []
        for m, (error, allowed, ratio, complete, term) in zip(self.measured, worst.tolist(), strict=True):
            kind = _kind(m.claimed, complete, term) if m.claimed else ""
            checks.append((m.at, Check(m.what, m.module, error, allowed, ratio, m.claimed, kind)))
        self.found.checks = [check for _, check in sorted(checks, key=lambda pair: pair[0])]


def _kind(claimed: str, as_complete: float, as_term: float) -> str:
    """The kind that was measured; the claimed one where several fit (a gradient of zeros, a group of one)."""
    kinds = [kind for kind, ratio in _KINDS if (as_term if ratio else as_complete) <= 1.0]
    if claimed in kinds:
        return claimed
    is_cut = claimed in (Kind.CUT, Kind.COPIED_KV)
    fitting = [kind for kind in kinds if (kind in (Kind.CUT, Kind.COPIED_KV)) == is_cut]
    return fitting[0] if fitting else NONE


_KINDS = ((Kind.CUT, False), (Kind.FULL, False), (Kind.PARTIAL, True), (Kind.COPIED_KV, True))
"""(kind, whether a rank's own gradient is a term of a sum)."""


def _held(whole: Tensor, cut: Cut, rank: int) -> Tensor:
    """A rank's part of a whole tensor, in the whole's memory where it is of one piece."""
    (start, stop), *others = cut.ranges[rank]
    return part_of(whole, cut, rank) if others else whole.narrow(cut.dim, start, stop - start)


def _distance(a: Tensor, b: Tensor | None = None) -> float:
    """|a - b|, or |a|, in float64; in pieces, because weights are large."""
    x, y = a.detach().reshape(-1), None if b is None else b.detach().reshape(-1)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for start in range(0, x.numel(), _PIECE):
        piece = x[start : start + _PIECE].double()
        total += (piece if y is None else piece - y[start : start + _PIECE].double()).square().sum()
    size = math.sqrt(float(total)) if torch.isfinite(total) else math.inf
    return size


_PIECE = 2**18
"""Elements whose float64 copies fit into a core's cache: six times faster than through memory."""
