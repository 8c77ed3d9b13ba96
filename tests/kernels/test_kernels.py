"""Each fused kernel against the composition of torch operations it stands for, value and gradient."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, gelu, silu

from ds_seqpar.kernels import cross_entropy as ce
from ds_seqpar.kernels.addition import sum_into, sum_with
from ds_seqpar.kernels.adjacent import Room, copy_rows, parted
from ds_seqpar.kernels.dispatch import runs_fused
from ds_seqpar.kernels.gating import gated, gated_backward, known_activation
from ds_seqpar.kernels.lookup import rows_into, sums_of_rows
from ds_seqpar.kernels.rms_norm import rms_norm, rms_norm_gradients, rms_norm_into
from ds_seqpar.kernels.rotary import rotate

ACTS = {"silu": silu, "gelu": gelu, "gelu_tanh": lambda x: gelu(x, approximate="tanh")}


INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported
NO_TRITON = importlib.util.find_spec("triton") is None
ROUNDS = pytest.mark.skipif(INTERPRETING, reason="Triton's interpreter cuts off the bits that a GPU rounds to bf16")


@pytest.fixture(params=["torch", "triton"])
def device(request, monkeypatch):
    """torch's own path on the CPU, or the Triton kernels: on a GPU, or under their interpreter."""
    if request.param == "triton" and not (INTERPRETING or torch.cuda.is_available()):
        pytest.skip("no GPU; the test below runs the kernels under Triton's interpreter")
    monkeypatch.setattr("ds_seqpar.kernels.dispatch._has_triton", lambda: request.param == "triton")
    return "cuda" if request.param == "triton" and not INTERPRETING else "cpu"


@pytest.mark.skipif(
    NO_TRITON or INTERPRETING or torch.cuda.is_available(), reason="Triton is missing, or runs directly"
)
def test_the_triton_kernels_under_their_interpreter():
    interpreted = {
        "env": {**os.environ, "TRITON_INTERPRET": "1"}, "capture_output": True, "text": True, "timeout": 600, "check": False,
    }  # fmt: skip
    probe = subprocess.run([sys.executable, Path(__file__).with_name("interpreter.py")], **interpreted)
    if probe.returncode:
        pytest.skip(f"this Triton's interpreter does not run what its compiler does: {probe.stderr.splitlines()[-1]}")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__], **interpreted
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


def _randn(*shape, device, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("packed", [False, True])
def test_gating_equals_torch(device, act, packed):
    both = _randn(5, 2 * 1030, device=device)
    gate, up = both.chunk(2, dim=-1) if packed else (x.contiguous() for x in both.chunk(2, dim=-1))
    d = _randn(5, 1030, device=device, seed=1)
    wanted_gate, wanted_up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    wanted = ACTS[act](wanted_gate) * wanted_up
    wanted.backward(d)
    torch.testing.assert_close(gated(gate, up, act), wanted.detach())
    dgate, dup, product = gated_backward(d.clone(), gate, up, act)
    torch.testing.assert_close(dgate, wanted_gate.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dup, wanted_up.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(product, wanted.detach())


@pytest.mark.parametrize("width", [8, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_the_rows_of_an_id(device, width, dtype):
    """Runs of 1, 7, 8, 9, 16 and 40 equal ids: shorter than what the kernel takes at once, as long, and longer; and none."""
    count, left_out = 50, 5
    lengths = {0: 1, 3: 7, 4: 8, 17: 9, 48: 16, 49: 40, count: left_out}
    ids = torch.cat([torch.full((n,), i) for i, n in lengths.items()])
    ids = ids[torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(2))].to(device)
    dy = _randn(ids.numel(), width, device=device).to(dtype)
    dy[ids == count] = float("nan")
    wanted = torch.zeros(count + 1, width, dtype=torch.float64, device=device).index_add_(0, ids, dy.double())[:count]
    found = sums_of_rows(dy, ids, count)
    assert found.shape == (count, width) and found.dtype == dtype
    # The interpreter rounds towards zero; torch rounds at every sum on the CPU.
    once = dict(rtol=2**-7, atol=1e-5) if runs_fused(dy) else dict(rtol=0.05, atol=0.2)
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype is torch.float32 else once
    torch.testing.assert_close(found.double(), wanted, **tolerance)
    assert torch.equal(found, sums_of_rows(dy, ids, count))


@pytest.mark.parametrize("count", [0, 3])
def test_sums_over_no_rows_are_zero(device, count):
    ids = torch.empty(0, dtype=torch.long, device=device)
    found = sums_of_rows(torch.empty(0, 8, device=device), ids, count)
    assert torch.equal(found, torch.zeros(count, 8, device=device))


@pytest.mark.parametrize("rows", [0, 7])
@pytest.mark.parametrize("width", [3, 8, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_copies_of_rows_that_lie_apart(device, rows, width, dtype):
    x = _randn(rows, 2000, device=device).to(dtype)
    out = torch.full((rows, 1100), 5.0, device=device, dtype=dtype)
    copy_rows(out[:, 1 : 1 + width], x[:, 4 : 4 + width])
    assert torch.equal(out[:, 1 : 1 + width], x[:, 4 : 4 + width])
    assert bool((out[:, 0] == 5.0).all()) and bool((out[:, 1 + width :] == 5.0).all())


@pytest.mark.parametrize("width", [8, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_part_of_a_table(device, width, dtype):
    weight = _randn(5, width, device=device).to(dtype)
    ids = torch.tensor([0, 4, -1, 5, 2, 2, -9, 1 << 40], device=device)
    weight[3] = float("nan")  # nobody asks for it
    memory = torch.full((9, width), 7.0, dtype=dtype, device=device)
    rows_into(memory[1:], weight, ids)
    nothing = torch.zeros(width, dtype=dtype, device=device)
    expected = [weight[0], weight[4], nothing, nothing, weight[2], weight[2], nothing, nothing]
    assert torch.equal(memory[1:], torch.stack(expected)) and bool((memory[0] == 7).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaling_in_place_leaves_alone_what_is_multiplied_by_one(device, dtype):
    x = _randn(5, 16385, device=device).to(dtype)
    before = x.clone()
    for factor in (1.0, 1.0 + 2**-22):
        assert torch.equal(ce.scaled_(x, torch.tensor(factor, device=device)), before) or dtype is torch.float32
    torch.testing.assert_close(x, before)
    assert ce.scaled_(x, torch.tensor(0.37, device=device)) is x
    torch.testing.assert_close(x, ce.scaled(before, torch.tensor(0.37, device=device), dtype))
    assert torch.equal(ce.scaled_(x, torch.tensor(0.0, device=device)), torch.zeros_like(x))
    assert bool(ce.scaled_(x, torch.tensor(float("nan"), device=device)).isnan().all())


def test_activations_are_known_by_their_values():
    assert [known_activation(a) for a in ACTS.values()] == list(ACTS)
    assert known_activation(torch.nn.SiLU()) == "silu"
    assert known_activation(torch.relu) is None
    assert known_activation(lambda x: silu(1.001 * x)) is None


@pytest.mark.parametrize("width", [8, 24, 64])
@pytest.mark.parametrize("batched_tables", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_rotation_equals_rotate_half(device, width, batched_tables, transposed):
    b, n, s = 2, 9, 3
    x = _randn(b, s, n, width, device=device).transpose(1, 2) if transposed else _randn(b, n, s, width, device=device)
    cos = _randn(b if batched_tables else 1, s, width, device=device, seed=1)  # any numbers: halves need not be equal
    sin = _randn(b if batched_tables else 1, s, width, device=device, seed=2)
    wanted_x = x.clone().requires_grad_()
    half = torch.cat((-wanted_x[..., width // 2 :], wanted_x[..., : width // 2]), dim=-1)
    wanted = wanted_x * cos.unsqueeze(1) + half * sin.unsqueeze(1)
    dy = _randn(b, n, s, width, device=device, seed=3)
    wanted.backward(dy)
    x = x.requires_grad_()
    (got,) = rotate(cos, sin, x)
    got.backward(dy)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(x.grad, wanted_x.grad)
    assert got.stride() == x.stride()


@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_of_a_rotation_leave_the_room_that_its_inputs_had(device, batch):
    """Queries [.., 4 * 8] and keys [.., 2 * 8] of a memory that has two heads more."""
    s, d = 3, 8
    memory = _randn(batch * s, 8 * d, device=device)
    cos, sin = (_randn(1, s, d, device=device, seed=i) for i in (1, 2))
    flat = parted(memory, [4 * d, 2 * d], (batch, s))
    xs = [x.view(batch, s, -1, d).transpose(1, 2).requires_grad_() for x in flat]
    dys = [_randn(*x.shape, device=device, seed=3 + i) for i, x in enumerate(xs)]
    wanted = torch.autograd.grad(rotate(cos, sin, *xs), xs, dys)
    Room.offer(memory)
    got = torch.autograd.grad(rotate(cos, sin, *xs), xs, dys)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    values = _randn(batch * s, 2 * d, device=device, seed=5)
    columns = [g.transpose(1, 2).reshape(batch * s, -1) for g in got]
    assert {c.untyped_storage().data_ptr() for c in columns} == {got[0].untyped_storage().data_ptr()}  # no copies
    assert torch.equal(Room.filled([*columns, values]), torch.cat([*columns, values], dim=1))


@pytest.mark.parametrize("parts", [(37,), (20, 17), (4100, 30)])
def test_cross_entropy_over_parts_of_the_vocabulary(device, parts):
    n, vocabulary = 6, sum(parts)
    logits = 5 * _randn(n, vocabulary, device=device)
    logits[0] += 100  # a maximum must be taken out, or exp overflows
    targets = torch.tensor([0, vocabulary - 1, parts[0], -100, 3, 1]).clamp(max=vocabulary - 1).to(device)
    wanted = logits.clone().requires_grad_()
    losses = cross_entropy(wanted, targets, ignore_index=-100, reduction="none")
    losses.sum().backward()
    mine, locals_, start = [], [], 0
    for width in parts:
        mine.append(logits[:, start : start + width].contiguous())
        locals_.append(targets - start)
        start += width
    stats = torch.stack([ce.statistics(z, t) for z, t in zip(mine, locals_, strict=True)])
    apart = torch.stack([targets, targets.flip(0)], dim=1)[:, 0]  # as of a chunk of one row a rank
    mine_lost, log_sum, counted = ce.combined(stats, apart, -100)
    assert counted.tolist() == (targets != -100).float().tolist()
    torch.testing.assert_close(log_sum, logits.logsumexp(-1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(mine_lost, losses.detach(), rtol=1e-5, atol=1e-4)
    got = [ce.gradient_(z, t, log_sum, counted) for z, t in zip(mine, locals_, strict=True)]
    torch.testing.assert_close(torch.cat(got, -1), wanted.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_of_several_ranks_and_the_residual_are_summed_and_rounded_once(device, parts, residual, dtype):
    own, received = (
        _randn(*shape, device=device, seed=i).to(dtype) for i, shape in enumerate(((700, 3), (parts, 700, 3)))
    )
    more = _randn(1, 700, 3, device=device, seed=2).to(dtype).requires_grad_() if residual else None
    own.requires_grad_()
    wanted = own.detach().double() + received.double().sum(0) + (0 if more is None else more.detach()[0].double())
    got = sum_with(own, received if parts else None, more)
    dy = torch.ones_like(got)
    got.backward(dy)
    # Rounded once on a GPU; the interpreter cuts bf16 off, and torch's own path rounds every sum.
    once = torch.finfo(dtype).eps / 2 * (1 if device == "cuda" else 2 if INTERPRETING else 2 + parts)
    close = {"rtol": 1.01 * once, "atol": 1e-6 if dtype != torch.bfloat16 else 4 * once * (device != "cuda")}
    assert got.dtype == dtype and got.shape == ((1, 700, 3) if residual else (700, 3))
    torch.testing.assert_close(got.detach().double().view(700, 3), wanted, **close)
    assert torch.equal(own.grad, dy.view(700, 3)) and (more is None or torch.equal(more.grad, dy))
    if parts:
        memory = own.detach().clone()
        assert sum_into(memory, received) is memory
        torch.testing.assert_close(memory.double(), own.detach().double() + received.double().sum(0), **close)


def test_tokens_that_do_not_count_have_no_gradient_even_if_their_logits_overflowed(device):
    logits = torch.tensor([[float("inf"), 1.0], [2.0, 1.0]], device=device)
    targets = torch.tensor([-100, 0], device=device)
    log_sum = torch.tensor([float("inf"), 2.3132617], device=device)
    got = ce.gradient_(logits, targets, log_sum, torch.tensor([0.0, 1.0], device=device))
    assert got[0].tolist() == [0.0, 0.0]
    assert got[1].tolist() == pytest.approx([-0.268941, 0.268941], abs=1e-5)


@pytest.mark.parametrize("dtypes", [
    pytest.param((torch.bfloat16, torch.bfloat16), marks=ROUNDS), pytest.param((torch.float32, torch.bfloat16), marks=ROUNDS),
    (torch.float32, torch.float32),
])  # fmt: skip
def test_scaling_rounds_once(device, dtypes):
    x, factor = _randn(5, 1031, device=device).to(dtypes[0]), torch.tensor(1 / 3, device=device)
    wanted = (x.double() * factor.double()).to(dtypes[1])
    torch.testing.assert_close(ce.scaled(x, factor, dtypes[1]), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [0, 1, 700])
@pytest.mark.parametrize("width", [8, 96, 4097])
@pytest.mark.parametrize("frozen", [False, True])
def test_rms_norm_and_its_gradients(device, rows, width, frozen):
    x, weight, dy = (
        _randn(*shape, device=device, seed=i) for i, shape in enumerate(((1, rows, width), (width,), (1, rows, width)))
    )
    x[:, :1] *= 1e-3  # where the epsilon decides
    wanted_x, wanted_w = (t.double().requires_grad_() for t in (x, weight))
    wanted = wanted_x * torch.rsqrt(wanted_x.pow(2).mean(-1, keepdim=True) + 1e-5) * wanted_w
    wanted.backward(dy.double())
    x, weight = x.requires_grad_(), weight.requires_grad_(not frozen)
    got = rms_norm(x, weight, 1e-5)
    got.backward(dy)
    memory = torch.full((rows, width), -1.0, device=device)
    rms_norm_into(memory, x.detach(), weight.detach(), 1e-5)
    torch.testing.assert_close(got.detach(), wanted.detach().float(), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(memory, got.detach()[0], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(x.grad, wanted_x.grad.float(), rtol=1e-4, atol=1e-5)
    assert (weight.grad is None) == frozen
    if not frozen:
        torch.testing.assert_close(weight.grad, wanted_w.grad.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 700])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_norms_gradients_from_several_ranks_parts(device, rows, parts):
    x, weight, dy = (
        _randn(*shape, device=device, seed=i) for i, shape in enumerate(((1, rows, 96), (96,), (rows, 96)))
    )
    more = _randn(parts, rows, 96, device=device, seed=3)
    memory = torch.empty(rows, 96, device=device)
    root = rms_norm_into(memory, x, weight, 1e-5)
    dx, dweight = rms_norm_gradients(dy, more, x, weight, root, 1e-5, True)
    wide_x, wide_w = (t.double().requires_grad_() for t in (x, weight))
    (wide_x * torch.rsqrt(wide_x.pow(2).mean(-1, keepdim=True) + 1e-5) * wide_w).backward(
        (dy + more.sum(0)).double()[None]
    )
    torch.testing.assert_close(dx.view(x.shape), wide_x.grad.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dweight, wide_w.grad.float(), rtol=1e-4, atol=1e-4)
    assert rms_norm_gradients(dy, more, x, weight, root, 1e-5, False)[1] is None
    also = torch.full((rows + 1, 96), 7.0, device=device)
    beside = _randn(1, rows, 96, device=device, seed=4)
    sent, _ = rms_norm_gradients(dy, more, x, weight, root, 1e-5, True, beside, also[:rows])
    torch.testing.assert_close(sent.view(x.shape), dx.view(x.shape) + beside, rtol=1e-5, atol=1e-6)
    assert torch.equal(also[:rows], sent.view(rows, 96)) and bool((also[rows] == 7).all())


@ROUNDS
def test_rms_norm_rounds_its_weights_gradient_once(device):
    x, weight, dy = (
        _randn(*shape, device=device, seed=i).bfloat16() for i, shape in enumerate(((999, 64), (64,), (999, 64)))
    )
    weight.requires_grad_()
    rms_norm(x, weight, 1e-6).backward(dy)
    wide = weight.detach().double().requires_grad_()
    (x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6) * wide).backward(dy.double())
    torch.testing.assert_close(weight.grad.double(), wide.grad, rtol=2**-8, atol=2**-8 * float(wide.grad.abs().mean()))
