"""The fused vocabulary-parallel linear + cross-entropy against torch's, to the last digits of float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from ds_seqpar.comm.exchange import Exchange
from ds_seqpar.groups import ParallelGroups
from ds_seqpar.layers import loss
from ds_seqpar.layers.loss import vocab_parallel_linear_cross_entropy
from ds_seqpar.layers.region import TokenRegion
from ds_seqpar.plan.heads import even_bounds

H, V = 6, 11  # 11 divides by no world here


def _softcap(x: Tensor) -> Tensor:
    return torch.tanh(x / 3.0) * 3.0


def _scale(x: Tensor) -> Tensor:
    return x / 1.7


TRANSFORMS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "none": (),
    "scale": (_scale,),
    "softcap": (_softcap,),
    "scale, softcap, shift": (_scale, _softcap, lambda x: x + 0.25),
    "to fp64": (lambda x: x.double(),),
}


@dataclass(frozen=True)
class Case:
    """One loss: `batch` x `seq` tokens, some of them ignored."""

    batch: int = 2
    seq: int = 5
    cut: bool = True
    bias: bool = True
    transforms: str = "none"
    chunk: int = 4
    ignored: str = "some"  # none, some, all
    ignore_index: int = -100
    dtype: torch.dtype = torch.float64
    weight_grad: bool = True
    hidden_grad: bool = True
    large: bool = False  # logits that overflow without subtraction of the maximum


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    tokens = case.batch * case.seq
    hidden, weight, bias = draw(tokens, H) * (500 if case.large else 1), draw(V, H), draw(V) if case.bias else None
    targets = torch.randint(0, V, (tokens,), generator=generator)
    targets[0], targets[-1] = 0, V - 1  # the first and the last row of the vocabulary
    if case.ignored == "some":
        targets[1::3] = case.ignore_index
    if case.ignored == "all":
        targets[:] = case.ignore_index
    return hidden, weight, bias, targets


def _run(case: Case) -> dict[str, Any]:
    """Absolute differences between this rank's part and torch's whole: the sum, the count, the gradients."""
    groups = ParallelGroups.around(dist.group.WORLD)
    rank, t = groups.tp_rank, groups.tp_size
    hidden, weight, bias, targets = _inputs(case)
    start, stop = even_bounds(V, t)[rank]
    region = TokenRegion(case.batch, case.seq, case.cut, groups, Exchange(groups.tp_group, groups.tp_cpu_group, True))

    mine = hidden.clone()
    if case.cut:
        padded = torch.cat(
            [hidden, hidden.new_full((t * region.rows - region.tokens, H), 9.0)]
        )  # dead rows are not zero
        mine = padded[rank * region.rows : (rank + 1) * region.rows].clone()
    mine.requires_grad_(case.hidden_grad)
    w = weight[start:stop].clone().requires_grad_(case.weight_grad)
    b = bias[start:stop].clone().requires_grad_(case.weight_grad) if bias is not None else None
    total, counted = vocab_parallel_linear_cross_entropy(
        mine, w, b, targets, region, vocab_start=start, vocab_size=V, chunk_tokens=case.chunk, ignore_index=case.ignore_index,
        transforms=TRANSFORMS[case.transforms],
    )  # fmt: skip
    wide = torch.promote_types(case.dtype, torch.float32)
    assert total.dtype is wide and total.shape == counted.shape == () and not counted.requires_grad

    leaves = [x.double().requires_grad_() for x in (hidden, weight, *([] if bias is None else [bias]))]
    logits = linear(leaves[0], leaves[1], leaves[2] if bias is not None else None)
    for transform in TRANSFORMS[case.transforms]:
        logits = transform(logits)
    expected = cross_entropy(logits, targets, ignore_index=case.ignore_index, reduction="sum")
    errors = {
        "total": float((total - expected).abs()) / max(1.0, float(expected)),
        "counted": float((counted - (targets != case.ignore_index).sum()).abs()),
    }
    if not (case.weight_grad or case.hidden_grad):
        assert not total.requires_grad
        return errors
    (total * 0.37).backward()  # a scale, as accumulation and the mean put one
    (expected * 0.37).backward()
    dhidden, dweight = leaves[0].grad, leaves[1].grad
    assert dhidden is not None and dweight is not None
    if case.hidden_grad:
        assert mine.grad is not None and mine.grad.dtype is case.dtype
        if case.cut:
            dhidden = torch.cat([dhidden, dhidden.new_zeros(t * region.rows - region.tokens, H)])
            dhidden = dhidden[rank * region.rows : (rank + 1) * region.rows]
        errors["dx"] = float((mine.grad - dhidden).abs().max())
    if case.weight_grad:
        assert w.grad is not None and w.grad.dtype is case.dtype
        errors["dw"] = float((w.grad - dweight[start:stop]).abs().max())
        if b is not None:
            dbias = leaves[2].grad
            assert b.grad is not None and dbias is not None
            errors["db"] = float((b.grad - dbias[start:stop]).abs().max())
    else:
        assert w.grad is None
    values = [torch.empty_like(total) for _ in range(t)]
    dist.all_gather(values, total.detach())
    assert all(torch.equal(v, values[0]) for v in values), "the loss must be equal bit for bit on every rank"
    return errors


CASES = [
    *(
        Case(transforms=name, cut=cut, bias=bias)
        for name in TRANSFORMS
        for cut in (True, False)
        for bias in (True, False)
    ),
    *(
        Case(chunk=chunk, cut=cut, seq=seq)
        for chunk in (1, 2, 3, 7, 10**9)
        for cut in (True, False)
        for seq in (1, 6, 7)
    ),
    *(Case(ignored=ignored, cut=cut) for ignored in ("none", "all") for cut in (True, False)),
    Case(batch=1, seq=1),
    Case(ignore_index=5),
    Case(ignore_index=-1),
    Case(large=True),
    Case(large=True, transforms="softcap"),
    Case(weight_grad=False),
    Case(hidden_grad=False),
    Case(weight_grad=False, cut=False),
    Case(hidden_grad=False, transforms="softcap"),
    Case(weight_grad=False, hidden_grad=False),
    Case(weight_grad=False, hidden_grad=False, transforms="softcap"),
]


def _run_all() -> dict[Case, dict[str, Any]]:
    return {case: _run(case) for case in CASES}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_loss_and_gradients_equal_torchs_in_float64(world: int) -> None:
    bad = {}
    for rank, results in enumerate(run_ranks(world, _run_all, deepspeed=False, timeout=120)):
        for case, errors in results.items():
            # Logits of a few thousand have 1e-12 of rounding of their own, and the gradient of dx is 500 times smaller.
            limit = 1e-9 if case.large else 1e-12
            bad |= {(rank, case, name): error for name, error in errors.items() if not error <= limit}
    assert not bad, f"differences above 1e-12: {bad}"


def _low_precision() -> dict[str, Any]:
    cases = [
        Case(dtype=torch.bfloat16),
        Case(dtype=torch.bfloat16, cut=False),
        Case(dtype=torch.float32, transforms="softcap"),
    ]
    return {str(case): (case.dtype, _run(case)) for case in cases}


def test_bf16_weights_give_an_fp32_loss() -> None:
    """The reference is float64 on the same rounded inputs. bf16 logits are rounded to 2^-9, and so are the gradients."""
    for results in run_ranks(2, _low_precision, deepspeed=False, timeout=60):
        for case, (dtype, errors) in results.items():
            limit = 3e-2 if dtype is torch.bfloat16 else 3e-6
            assert all(error <= limit for error in errors.values()), f"{case}: {errors}"


def _out_of_range(label: int) -> str:
    groups = ParallelGroups.around(dist.group.WORLD)
    hidden, weight, _, targets = _inputs(Case())
    start, stop = even_bounds(V, groups.tp_size)[groups.tp_rank]
    targets[4] = label
    try:
        vocab_parallel_linear_cross_entropy(
            hidden, weight[start:stop], None, targets, TokenRegion(2, 5, False, groups), vocab_start=start, vocab_size=V,
            chunk_tokens=4,
        )  # fmt: skip
    except IndexError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("label", [V, V + 1000, -1, -99])
def test_a_label_outside_the_vocabulary_raises_on_every_rank(label: int) -> None:
    for message in run_ranks(2, _out_of_range, label, deepspeed=False, timeout=60):
        assert message == f"label {label} is outside the vocabulary of {V}; use -100 to ignore a token"


def _largest_allocation() -> int:
    """Elements of the largest tensor that any operation of the loss returns."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if isinstance(x, Tensor):
                    self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
            return out

    groups = ParallelGroups.around(dist.group.WORLD)
    tokens, vocab, width = 512, 256, 4
    region = TokenRegion(1, tokens, True, groups, Exchange(groups.tp_group, groups.tp_cpu_group, True))
    hidden = torch.randn(region.rows, width, requires_grad=True)
    weight = torch.randn(vocab // groups.tp_size, width, requires_grad=True)
    with Largest() as largest:
        total, _ = vocab_parallel_linear_cross_entropy(
            hidden, weight, None, torch.zeros(tokens, dtype=torch.int64), region,
            vocab_start=groups.tp_rank * (vocab // groups.tp_size), vocab_size=vocab, chunk_tokens=16,
        )  # fmt: skip
        total.backward()
    return largest.elements


def _count_chunks(tokens: int, width: int, dtype: torch.dtype, trained: bool, transforms: str) -> tuple[int, float]:
    """How many products made logits, and how far the weight's gradient is from torch's, relatively."""
    made, plain = [], loss._chunk_loss

    def counted(logits: Tensor, *args: Any) -> Any:
        made.append(logits.shape)
        return plain(logits, *args)

    loss._chunk_loss = counted  # in this process, which is forked for the case
    groups = ParallelGroups.around(dist.group.WORLD)
    region = TokenRegion(1, tokens, True, groups, Exchange(groups.tp_group, groups.tp_cpu_group, True))
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(8, width, generator=generator).to(dtype).requires_grad_(trained)
    targets = torch.randint(0, 8, (tokens,), generator=generator)
    padded = torch.cat([hidden, hidden.new_full((groups.tp_size * region.rows - tokens, width), 9.0)])
    mine = padded[region.rows * groups.tp_rank :][: region.rows].clone().requires_grad_()
    start = 4 * groups.tp_rank
    local = weight.detach()[start : start + 4].clone().requires_grad_(trained)
    total, _ = vocab_parallel_linear_cross_entropy(
        mine, local, None, targets, region, vocab_start=start, vocab_size=8, chunk_tokens=4, transforms=TRANSFORMS[transforms]
    )  # fmt: skip
    if not trained:
        return len(made), 0.0
    total.backward()
    wide = weight.detach().double().requires_grad_()
    cross_entropy(hidden.double() @ wide.t(), targets, reduction="sum").backward()
    assert wide.grad is not None and local.grad is not None
    expected = wide.grad[start : start + 4]
    return len(made), float((local.grad.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("tokens", "width", "dtype", "trained", "transforms", "chunks"), [
    (8, 4, torch.bfloat16, True, "none", 1),  # 2 * 8 + 2 * 4 <= 2 * 4 + 4 * 4, the logits of a chunk and the wide sum of two
    (7, 4, torch.bfloat16, True, "none", 1),  # a dead row
    (10, 4, torch.bfloat16, True, "none", 3),
    (8, 4, torch.float32, True, "none", 2),  # nothing wider is summed
    (8, 4, torch.float16, True, "none", 2),  # a sum over tokens may overflow
    (8, 4, torch.bfloat16, False, "none", 2),
    (8, 4, torch.bfloat16, True, "softcap", 2),  # which keeps logits several times
])  # fmt: skip
def test_all_logits_are_made_at_once_where_chunks_would_take_as_much_memory(
    tokens: int, width: int, dtype: torch.dtype, trained: bool, transforms: str, chunks: int
) -> None:
    for made, error in run_ranks(2, _count_chunks, tokens, width, dtype, trained, transforms, deepspeed=False):
        assert made == chunks
        assert error < 0.02 if transforms == "none" else True


def _bf16_twice(keep: bool) -> dict[str, float]:
    """Relative errors of the gradients of 0.4 x the mean loss, once, or twice through one kept graph."""
    groups = ParallelGroups.around(dist.group.WORLD)
    region = TokenRegion(1, 12, True, groups, Exchange(groups.tp_group, groups.tp_cpu_group, True))
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, H, generator=generator).bfloat16() for n in (12, 8))
    targets = torch.randint(0, 8, (12,), generator=generator)
    targets[3] = -100
    mine = hidden[region.rows * groups.tp_rank :][: region.rows].clone().requires_grad_()
    start = 4 * groups.tp_rank
    local = weight[start : start + 4].clone().requires_grad_()
    total, counted = vocab_parallel_linear_cross_entropy(
        mine, local, None, targets, region, vocab_start=start, vocab_size=8, chunk_tokens=4096
    )
    loss = 0.4 * total / counted
    for again in [True, False] if keep else [False]:
        loss.backward(retain_graph=again)
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    (0.4 * (1 + keep) * cross_entropy(wide[0] @ wide[1].t(), targets)).backward()
    expected = wide[0].grad[region.rows * groups.tp_rank :][: region.rows], wide[1].grad[start : start + 4]
    found = mine.grad, local.grad
    return {
        name: float((a.double() - b).norm() / b.norm())
        for name, a, b in zip(("dx", "dw"), found, expected, strict=True)
    }


@pytest.mark.parametrize("keep", [False, True])
def test_bf16_gradients_are_scaled_once_for_each_backward(keep: bool) -> None:
    for errors in run_ranks(2, _bf16_twice, keep, deepspeed=False):
        assert max(errors.values()) < 0.02


def test_logits_of_a_chunk_are_the_largest_thing_that_ever_exists() -> None:
    for elements in run_ranks(2, _largest_allocation, deepspeed=False, timeout=60):
        assert elements <= max(16 * 128, 512 * 4), "logits of more than one chunk existed at once"
