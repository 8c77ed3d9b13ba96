"""Measures the parts of a step: collectives, peer copies, GEMMs, attention kernels, what hides, and what stays exposed.

    python benchmarks/parts.py --tokens 8192 32768 --attention cudnn --out build/parts

One JSON line a figure, in OUT/parts.jsonl. `exposed` runs the ds_seqpar arm twice, with its collectives and with local
copies of the same shapes in their place.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.ranks import Ranks, import_once

PARTS = ("collectives", "peer", "gemm", "attention", "hidden", "exposed")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--mib", type=int, nargs="+", help="sizes of collectives and copies (default 64 256; tiny: 1)")
    parser.add_argument("--tokens", type=int, nargs="+", help="default 8192 32768; tiny: 64")
    parser.add_argument("--layers", type=int, help="of `exposed`: default 8; tiny: 2")
    parser.add_argument("--attention", choices=["flash", "cudnn", "default"], help="of `exposed`: default cudnn")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero", type=int, choices=[0, 1], default=1)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for all of it (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="on the CPU over gloo: a smoke test, no figures")
    parser.add_argument("--out", type=Path, default=Path("build/parts"))
    args = parser.parse_args(argv)
    args.mib = args.mib or ([1] if args.tiny else [64, 256])
    args.tokens = args.tokens or ([64] if args.tiny else [8192, 32768])
    args.layers = args.layers or (2 if args.tiny else 8)
    args.attention = args.attention or ("default" if args.tiny else "cudnn")
    return args


class Parts:
    """One rank's measurements; rank 0 writes them."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        import torch.distributed as dist
        from harness.case import LLAMA_8B, TINY
        from harness.measure import device_of_rank

        self.args, self.device = args, device_of_rank()
        self.on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.shape = TINY if args.tiny else LLAMA_8B

    def run(self) -> None:
        for part in self.args.parts:
            getattr(self, part)()

    def write(self, part: str, **figures: Any) -> None:
        if self.rank == 0:
            line = {"part": part, **{k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}}
            with open(self.args.out / "parts.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def random(self, *shape: int) -> Any:
        import torch

        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def time(self, function: Callable[[], Any], repeats: int = 10) -> float:
        """Milliseconds a call, back to back, the slowest rank's; the ranks start together."""
        import time

        import torch
        import torch.distributed as dist

        for _ in range(3):
            function()
        dist.barrier()
        if self.on_gpu:
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                function()
            end.record()
            torch.cuda.synchronize()
            ms = start.elapsed_time(end) / repeats
        else:
            begin = time.perf_counter()
            for _ in range(repeats):
                function()
            ms = (time.perf_counter() - begin) / repeats * 1e3
        value = torch.tensor(ms, dtype=torch.float64, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return float(value)

    def _gather_and_scatter(self, mib: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
        import torch.distributed as dist

        whole = self.random(mib * 2**20 // self.dtype.itemsize)
        part = whole.chunk(self.world)[self.rank].clone()
        return lambda: dist.all_gather_into_tensor(whole, part), lambda: dist.reduce_scatter_tensor(part, whole)

    def collectives(self) -> None:
        """Bus bandwidth of all-gather and reduce-scatter; the size is that of the whole tensor."""
        for mib in self.args.mib:
            for name, call in zip(("all_gather", "reduce_scatter"), self._gather_and_scatter(mib)):
                ms = self.time(call)
                self.write("collectives", name=name, mib=mib, ms=ms, gb_per_s=self._bus(mib, ms))

    def _bus(self, mib: int, ms: float) -> float:
        return mib * 2**20 * (self.world - 1) / self.world / ms / 1e6

    def _peer_copy(self, mib: int) -> Callable[[], Any]:
        """Reads the next rank's share of a symmetric buffer of `mib` MiB by cudaMemcpy, which takes a copy engine."""
        import torch
        import torch.distributed as dist
        import torch.distributed._symmetric_memory as symm_mem

        elements = mib * 2**20 // self.dtype.itemsize // self.world
        mine = symm_mem.empty(elements, dtype=self.dtype, device=self.device)
        mine.copy_(self.random(elements))
        handle = symm_mem.rendezvous(mine, dist.group.WORLD.group_name)  # type: ignore[union-attr]
        theirs = handle.get_buffer((self.rank + 1) % self.world, (elements,), self.dtype)
        target = torch.empty_like(mine)
        torch.cuda.synchronize()
        dist.barrier()
        self._keep = (mine, handle)
        return lambda: target.copy_(theirs)

    def peer(self) -> None:
        """Both ranks read from each other at once; GB/s each way, comparable with `collectives` at the same size."""
        if not self.on_gpu:
            self.write("peer", note="symmetric memory needs GPUs")
            return
        for mib in self.args.mib:
            ms = self.time(self._peer_copy(mib))
            self.write("peer", mib=mib, ms=ms, gb_per_s=self._bus(mib, ms))

    def _gemms(self) -> dict[str, tuple[int, int]]:
        """name -> this rank's (out, in) of the fused linears."""
        s, t = self.shape, self.world
        heads = s.head_dim * (s.heads + 2 * s.kv_heads) // t
        return {
            "qkv": (heads, s.hidden),
            "o": (s.hidden, s.heads * s.head_dim // t),
            "gate_up": (2 * s.intermediate // t, s.hidden),
            "down": (s.hidden, s.intermediate // t),
            "lm_head": (s.vocab // t, s.hidden),
        }

    def gemm(self) -> None:
        """TF/s of each linear's three products at this rank's size."""
        for tokens in self.args.tokens:
            for name, (out, width) in self._gemms().items():
                rows = min(tokens, 8192) if name == "lm_head" else tokens  # the loss runs in chunks
                x, w, dy = self.random(rows, width), self.random(out, width), self.random(rows, out)
                products = {"forward": lambda: x @ w.t(), "dgrad": lambda: dy @ w, "wgrad": lambda: dy.t() @ x}  # noqa: B023
                for kind, product in products.items():
                    ms = self.time(product)
                    self.write(
                        "gemm", name=name, product=kind, tokens=rows, ms=ms, tflops=2e-9 * rows * out * width / ms
                    )

    def attention(self) -> None:
        """TF/s of SDPA's kernels, causal counted half, at this rank's heads."""
        import torch
        from harness.measure import attention_kernel
        from torch.nn.functional import scaled_dot_product_attention

        heads, kv, dim = self.shape.heads // self.world, self.shape.kv_heads // self.world, self.shape.head_dim
        for tokens in self.args.tokens:
            q = self.random(1, tokens, heads, dim).transpose(1, 2).requires_grad_()
            k, v = (self.random(1, tokens, kv, dim).transpose(1, 2).requires_grad_() for _ in range(2))
            for kernel in ("flash", "cudnn") if self.on_gpu else ("default",):
                with attention_kernel(kernel):
                    run = lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: B023, E731
                    with torch.no_grad():
                        forward = self.time(run)
                    out = run()
                    dy = torch.randn_like(out)
                    backward = self.time(lambda: torch.autograd.grad(out, (q, k, v), dy, retain_graph=True))  # noqa: B023
                flops = 2.0 * tokens**2 * heads * dim  # two products, causal half
                self.write(
                    "attention", kernel=kernel, tokens=tokens, forward_ms=forward, backward_ms=backward,
                    forward_tflops=flops / forward / 1e9, backward_tflops=2.5 * flops / backward / 1e9,
                )  # fmt: skip

    def hidden(self) -> None:
        """Share of a transfer of [T, h] that hides behind the gate+up product on another stream."""
        import torch

        if not self.on_gpu:
            self.write("hidden", note="needs GPUs")
            return
        side = torch.cuda.Stream()
        out, width = self._gemms()["gate_up"]
        for tokens in self.args.tokens:
            x, w = self.random(tokens, width), self.random(out, width)
            mib = max(1, tokens * self.shape.hidden * self.dtype.itemsize // 2**20)
            gather, scatter = self._gather_and_scatter(mib)
            for name, transfer in (
                ("all_gather", gather),
                ("reduce_scatter", scatter),
                ("peer_copy", self._peer_copy(mib)),
            ):

                def both() -> None:
                    main = torch.cuda.current_stream()
                    side.wait_stream(main)
                    with torch.cuda.stream(side):
                        transfer()  # noqa: B023
                    x @ w.t()  # noqa: B023
                    main.wait_stream(side)

                alone, product, together = self.time(transfer), self.time(lambda: x @ w.t()), self.time(both)  # noqa: B023
                share = (alone + product - together) / alone
                self.write(
                    "hidden",
                    name=name,
                    tokens=tokens,
                    transfer_ms=alone,
                    gemm_ms=product,
                    both_ms=together,
                    share=share,
                )

    def exposed(self) -> None:
        """The step with its collectives and without; what they take alone; what of it is hidden."""
        import torch
        import torch.distributed as dist
        from arms import ARMS
        from harness.case import Case
        from harness.measure import attention_kernel, measure
        from harness.weights import tokens_of

        for tokens in self.args.tokens:
            case = Case(
                "seqpar", tokens, self.args.layers, self.args.attention, "none", str(self.dtype).removeprefix("torch."),
                self.args.tiny, self.args.zero,
            )  # fmt: skip
            with attention_kernel(case.attention):
                workload = ARMS["seqpar"].build(case)
                real = measure(workload, case, tokens_of(case, self.device))
                with local_stand_ins() as calls:
                    without = measure(workload, case, tokens_of(case, self.device))
            calls_a_step = {call: count / 7 for call, count in calls.items()}  # measure runs seven
            if not calls_a_step:
                raise RuntimeError(
                    "no collective of torch.distributed was seen in a step: its communication goes another way"
                )
            copies = transfers = 0.0
            if on_copy_engines := any(kind == "peer copy" for kind, _, _ in calls_a_step):
                peer_rate = 64 * 2**20 / 2 / self.time(self._peer_copy(64)) / 1e6
            for (kind, rows, bytes_), count in calls_a_step.items():
                if kind == "peer copy":  # beside the computation in both runs
                    transfers += count * bytes_ / peer_rate / 1e6
                    continue
                part = torch.zeros(bytes_ // self.dtype.itemsize // rows, device=self.device, dtype=self.dtype)
                whole = torch.zeros(part.numel() * rows, device=self.device, dtype=self.dtype)
                run = {
                    "all_gather": lambda: dist.all_gather_into_tensor(whole, part),  # noqa: B023
                    "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),  # noqa: B023
                    "all_reduce": lambda: dist.all_reduce(whole),  # noqa: B023
                }[kind]
                transfers += count * self.time(run, 5)
                copies += count * self.time(lambda: _copy(kind, whole, part), 5)  # noqa: B023
            took, left = real["fwd_bwd_ms"], without["fwd_bwd_ms"]
            exposed = took - (left - copies)
            self.write(
                "exposed", tokens=tokens, attention=case.attention, layers=case.layers, with_ms=took, without_ms=left,
                stand_ins_ms=copies, exposed_ms=exposed, exposed_share=exposed / took, transfers_ms=transfers,
                hidden_share=1 - exposed / transfers, transfers=sum(calls_a_step.values()), copy_engines=on_copy_engines,
            )  # fmt: skip
            workload.model.destroy()
            del workload


def _copy(kind: str, whole: Any, part: Any) -> None:
    """What a stand-in does: fills its output from what this rank holds."""
    if kind == "all_gather":
        whole.view(-1, part.numel()).copy_(part.view(1, -1).expand(whole.numel() // part.numel(), -1))
    elif kind == "reduce_scatter":
        part.view(-1).copy_(whole.view(-1)[: part.numel()])


class _Done:
    def wait(self, *args: Any) -> bool:
        return True


@contextmanager
def local_stand_ins() -> Iterator[Counter[tuple[str, int, int]]]:
    """Puts local copies in place of torch.distributed's collectives on floating-point tensors, wherever ds_seqpar holds them.

    Yields (kind, ranks, bytes of the whole tensor) -> calls.
    """
    import torch
    import torch.distributed as dist

    from ds_seqpar.comm import symmetric

    calls: Counter[tuple[str, int, int]] = Counter()

    def stays(x: Any, group: Any) -> bool:
        # What ranks agree on is no activation, and a group of one rank moves nothing.
        return x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or dist.get_world_size(group) == 1

    def two(kind: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(out: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            if stays(x, kwargs.get("group")):
                return plain(out, x, *args, **kwargs)
            whole, part = (out, x) if kind == "all_gather" else (x, out)
            calls[kind, whole.numel() // part.numel(), whole.numel() * whole.element_size()] += 1
            _copy(kind, whole, part)
            return _Done()

        return stand_in

    def reduce(plain: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if stays(tensor, kwargs.get("group")):
                return plain(tensor, *args, **kwargs)
            calls["all_reduce", 1, tensor.numel() * tensor.element_size()] += 1
            return _Done()

        return stand_in

    kinds = {"all_gather_into_tensor": "all_gather", "all_gather_single": "all_gather",
             "reduce_scatter_tensor": "reduce_scatter", "reduce_scatter_single": "reduce_scatter"}  # fmt: skip
    stand_ins = {
        getattr(dist, name): two(kind, getattr(dist, name)) for name, kind in kinds.items() if hasattr(dist, name)
    }
    stand_ins[dist.all_reduce] = reduce(dist.all_reduce)
    holders = [dist, *(module for name, module in sys.modules.items() if name.split(".")[0] == "ds_seqpar")]

    def of(slot: Any, rank: int, shape: Any, dtype: Any, offset: int = 0) -> Any:
        """A peer's memory is this rank's own: a copy that stays on the GPU, on the same stream."""
        own = slot.handle.rank
        if rank != own:
            made["peer copy", 1, math.prod(shape) * dtype.itemsize] += 1
        return plain_of(slot, own, shape, dtype, offset)

    def kept(slot: Any, key: Any, make: Any) -> Any:
        """The stand-ins' own views; each use of them copies what it copied when they were made."""
        made.clear()
        views = plain_kept(slot, ("stand-in", *key), make)
        calls.update(copies.setdefault((id(slot), key), Counter(made)))
        return views

    made: Counter[tuple[str, int, int]] = Counter()
    copies: dict[Any, Counter[tuple[str, int, int]]] = {}
    plain_of, plain_kept, plain_meet = symmetric.Slot.of, symmetric.Slot.kept, symmetric.SymmetricMemory._meet
    symmetric.Slot.kept = kept  # type: ignore[method-assign, assignment]
    symmetric.Slot.of = of  # type: ignore[method-assign, assignment]
    symmetric.SymmetricMemory._meet = lambda memory: None  # type: ignore[method-assign]
    places = [
        (holder, name, value)
        for holder in holders
        for name, value in list(vars(holder).items())
        if callable(value) and getattr(value, "__hash__", None) and value in stand_ins
    ]
    for holder, name, value in places:
        setattr(holder, name, stand_ins[value])
    try:
        yield calls
    finally:
        symmetric.Slot.of, symmetric.Slot.kept = plain_of, plain_kept  # type: ignore[method-assign]
        symmetric.SymmetricMemory._meet = plain_meet  # type: ignore[method-assign]
        for holder, name, value in places:
            setattr(holder, name, value)


def work(args: argparse.Namespace) -> None:
    """On a rank."""
    Parts(args).run()


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import_once(args.tiny)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "parts.jsonl"
    path.unlink(missing_ok=True)
    ranks = Ranks(args.ranks, work, args, log=args.out / "parts.log")
    good = ranks.wait(args.limit)
    print(path.read_text() if path.exists() else "nothing was measured", end="", flush=True)
    if not good:
        print(ranks.error() or f"longer than {args.limit:.0f} s", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
