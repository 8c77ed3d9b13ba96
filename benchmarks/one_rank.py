"""What one rank of two computes, on one GPU, with a peer that is as late as you say.

    python benchmarks/one_rank.py --tokens 8192 32768 --late 0 50 --out build/one_rank

Collectives do nothing, a peer's memory is this GPU's own, and a barrier takes 4 us and as long again as the peer is late
(exponentially distributed about the mean of --late, from a seed). So the time is that of the products, the kernels and the copies
of a rank at tp_size 2, without NVLink and without a second GPU's share of power: for changes to compute and to the order of events,
not for claims about two GPUs. One JSON line a case; --trace adds where the GPU's time went.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from harness.ranks import import_once

SEED, WARMUP_STEPS = 0, 2


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--late", type=float, nargs="+", default=[0.0, 50.0], help="us, the mean; a case each")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=9, help="timed (%(default)s)")
    parser.add_argument("--trace", action="store_true", help="profile one step more")
    parser.add_argument("--out", type=Path, default=Path("build/one_rank"))
    return parser.parse_args(argv)


class Peer:
    """Stands in for the other rank: its memory, and how long it keeps a barrier waiting."""

    def __init__(self) -> None:
        self.late, self.waits, self.random = 0.0, 0, random.Random(SEED)
        self.cycles = 0.0  # of the GPU's clock in 1 us; to ask for it takes half a millisecond

    def begin(self, late: float) -> None:
        import torch

        self.late, self.waits, self.random = late, 0, random.Random(SEED)
        self.cycles = torch.cuda.get_device_properties(0).clock_rate / 1e3

    def wait(self) -> None:
        import torch

        self.waits += 1
        us = 4.0 + (self.random.expovariate(1.0 / self.late) if self.late else 0.0)
        torch.cuda._sleep(int(us * self.cycles))


def sharded_model(case: Any, peer: Peer) -> Any:
    """Rank 0's half of the benchmark's model, with `peer` where the other rank would be."""
    import torch
    import torch.distributed as dist
    from harness.weights import hf_model

    from ds_seqpar.config import SeqParConfig
    from ds_seqpar.groups import ParallelGroups
    from ds_seqpar.hf import causal_lm_loss, describe
    from ds_seqpar.inject import inject
    from ds_seqpar.layers.loss import CausalLMLoss
    from ds_seqpar.planner.stand_ins import AlikeInputs, OwnMemory

    model: Any = hf_model(case, torch.device("cuda", 0))
    loss = causal_lm_loss(model)
    groups = ParallelGroups(dist.group.WORLD, dist.group.WORLD, 2, 0)
    inject(model, describe(model), SeqParConfig.from_json({"tp_size": 2}), groups, has_values=False)
    model.seqpar.guard = AlikeInputs()
    model.seqpar.exchange.decide(OwnMemory(groups.tp_group, peer.wait))
    model.loss_function = CausalLMLoss(loss)
    return model.train()


def run_steps(model: Any, tokens: Any, count: int) -> list[float]:
    """Milliseconds of forward + backward on the GPU."""
    import torch

    marks = []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        end.record()
        model.zero_grad(set_to_none=True)
        marks.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]


def trace(model: Any, tokens: Any, path: Path) -> dict[str, Any]:
    """The profile of the middle one of three steps."""
    import torch
    from harness.trace import gpu_activities, summarise

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run_steps(model, tokens, 3)
    profiler.export_chrome_trace(str(path))
    activities = gpu_activities(json.loads(path.read_text())["traceEvents"])
    starts = [a.start for a in activities if "vectorized_gather" in a.name]  # the embedding
    return summarise([a for a in activities if starts[1] <= a.start < starts[2]])


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import_once(tiny=False)
    import torch
    import torch.distributed as dist
    from harness.case import Case
    from harness.measure import attention_kernel
    from harness.weights import tokens_of
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not torch.cuda.is_available():
        print("one_rank.py needs a GPU; compare.py --tiny runs on the CPU", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    torch.cuda.set_device(0)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    peer = Peer()
    case = Case("one_rank", 0, args.layers, "cudnn", "none", "bfloat16")
    with attention_kernel(case.attention):
        model = sharded_model(case, peer)
        for count in args.tokens:
            tokens = tokens_of(
                Case("one_rank", count, args.layers, "cudnn", "none", "bfloat16"), torch.device("cuda", 0)
            )
            for late in args.late:
                peer.begin(late)
                run_steps(model, tokens, WARMUP_STEPS)
                peer.begin(late)
                times = sorted(run_steps(model, tokens, args.steps))
                line = {
                    "tokens": count,
                    "layers": args.layers,
                    "late_us": late,
                    "fwd_bwd_ms": round(times[args.steps // 2], 2),
                }
                line |= {"barriers": peer.waits // args.steps}
                if args.trace:
                    line |= {"trace": trace(model, tokens, args.out / "trace.json")}
                with open(args.out / "one_rank.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
