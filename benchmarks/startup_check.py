"""What `memory_check` says of a run on GPUs: trains the benchmark's model through the engine until the comparison is there.

python benchmarks/startup_check.py --tokens 8192 --layers 8 --out build/startup_check

Prints and writes OUT/startup_check.txt: the line that rank 0 logs, and the step after which it came.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

from harness.ranks import Ranks, import_once


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--recompute", choices=["none", "full"], default="none")
    parser.add_argument("--zero", type=int, choices=[0, 1, 2, 3], default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--limit", type=float, default=90.0, help="seconds (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/startup_check"))
    return parser.parse_args(argv)


def _is_it(line: str) -> bool:
    return "memory of the second step" in line or "memory is not compared" in line


def train(args: argparse.Namespace, path: Path) -> None:
    """On a rank: steps until all ranks have seen rank 0 say it."""
    import torch
    import torch.distributed as dist
    from arms import ARMS
    from harness.case import Case
    from harness.measure import attention_kernel, device_of_rank
    from harness.weights import tokens_of

    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("ds_seqpar").addHandler(Ear())
    case = Case("seqpar", args.tokens, args.layers, "cudnn", args.recompute, "bfloat16", zero=args.zero, tp=args.ranks)
    device = device_of_rank()
    begun, step = time.monotonic(), 0
    with attention_kernel("cudnn"):
        workload, tokens = ARMS["seqpar"].build(case), tokens_of(case, device)
        while time.monotonic() - begun < args.limit:
            step += 1
            workload.backward(workload.forward(tokens))
            workload.step()
            heard = torch.tensor(sum(map(_is_it, said)), device=device)
            dist.all_reduce(heard, op=dist.ReduceOp.MAX)
            if int(heard):
                break
    if dist.get_rank() == 0:
        about = f"{torch.cuda.get_device_name()} x {args.ranks}, {args.layers} layers, {args.tokens} tokens, recompute {args.recompute}"
        lines = [line for line in said if _is_it(line)] or ["nothing was said"]
        path.write_text("\n".join([f"{about}; after step {step}, {time.monotonic() - begun:.0f} s:", *lines, ""]))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import_once(tiny=False)
    args.out.mkdir(parents=True, exist_ok=True)
    path: Any = args.out / "startup_check.txt"
    path.unlink(missing_ok=True)
    good = Ranks(args.ranks, train, args, path, log=args.out / "startup_check.log").wait(args.limit + 60)
    print(path.read_text() if path.exists() else "the ranks failed; see the log", end="", flush=True)
    return 0 if good and path.exists() and "nothing was said" not in path.read_text() else 1


if __name__ == "__main__":
    sys.exit(main())
