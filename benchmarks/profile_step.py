"""Profiles three steps of one arm: GPU time by class, exposed communication, idle time, the longest kernels and host ops.

python benchmarks/profile_step.py --arm seqpar --tokens 8192 --attention cudnn --out build/profile
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from harness.ranks import Ranks, import_once

STEPS, FREE_STEPS = 3, 5


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", nargs="+", default=["seqpar"], help="arms of compare.py (%(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", help="default 8192; tiny: 64")
    parser.add_argument("--layers", type=int, help="default 8; tiny: 2")
    parser.add_argument("--attention", choices=["flash", "cudnn", "default"], help="default cudnn; tiny: default")
    parser.add_argument("--recompute", choices=["none", "full"], default="none")
    parser.add_argument("--zero", type=int, choices=[0, 1], default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--free",
        action="store_true",
        help="steps one after another as compare.py runs them, every rank, the GPU's side alone",
    )
    parser.add_argument("--rows", type=int, default=40, help="kernels and host ops listed (%(default)s)")
    parser.add_argument("--trace", action="store_true", help="keep the chrome trace of rank 0 (.json.gz)")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds an arm may take (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="on the CPU over gloo; lists host ops only")
    parser.add_argument("--out", type=Path, default=Path("build/profile"))
    return parser.parse_args(argv)


def profile(case: Any, args: argparse.Namespace) -> None:
    """On a rank: warms up, profiles, and writes rank 0's trace and text."""
    import torch
    import torch.distributed as dist
    from arms import ARMS
    from harness.measure import WARMUP_STEPS, attention_kernel, device_of_rank
    from harness.weights import tokens_of
    from torch.profiler import ProfilerActivity, record_function

    device = device_of_rank()
    on_gpu = device.type == "cuda"
    tokens = tokens_of(case, device)

    def settle() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)

    def step() -> None:
        dist.barrier()
        settle()
        with record_function("forward_backward"):
            loss = workload.forward(tokens)
            workload.backward(loss)
            del loss
            settle()  # so that the window holds its kernels
        with record_function("optimizer"):
            workload.step()
            settle()

    with attention_kernel(case.attention):
        workload = ARMS[case.arm].build(case)
        for _ in range(WARMUP_STEPS):
            step()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(STEPS):
                step()
    if dist.get_rank() == 0:
        name = f"{case.arm}_{case.tokens}"
        profiler.export_chrome_trace(str(args.out / f"{name}.json"))
        table = profiler.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=args.rows, max_name_column_width=60
        )
        (args.out / f"{name}.host.txt").write_text(table)


def profile_free(case: Any, args: argparse.Namespace) -> None:
    """On a rank: the same without the host's side and without waiting, which hides how far the host is ahead; marks are kernels."""
    import torch
    import torch.distributed as dist
    from arms import ARMS
    from harness.measure import WARMUP_STEPS, attention_kernel, device_of_rank
    from harness.weights import tokens_of

    device = device_of_rank()
    tokens = tokens_of(case, device)
    workload = ARMS[case.arm].build(case)

    def steps(count: int) -> list[float]:
        dist.barrier()
        torch.cuda.synchronize(device)
        marks = []
        for _ in range(count):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.cuda._sleep(1)
            workload.backward(workload.forward(tokens))
            torch.cuda._sleep(1)
            end.record()
            workload.step()
            marks.append((start, end))
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) for start, end in marks]

    with attention_kernel(case.attention):
        steps(WARMUP_STEPS)
        plain = sorted(steps(FREE_STEPS))[FREE_STEPS // 2]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            steps(FREE_STEPS)
    name = args.out / f"{case.arm}_{case.tokens}.rank{dist.get_rank()}"
    profiler.export_chrome_trace(f"{name}.json")
    Path(f"{name}.ms").write_text(f"{plain}")


def free_text_of(case: Any, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The report of one arm over all ranks, and its figures by rank."""
    from harness.trace import between_marks, gpu_activities, stalls, summarise

    lines = [
        f"# {case.arm}, {case.tokens} tokens, {case.layers} layers, SDPA {case.attention}, steps one after another"
    ]
    figures: dict[str, Any] = {}
    for trace in sorted(args.out.glob(f"{case.arm}_{case.tokens}.rank*.json")):
        plain = trace.with_suffix(".ms")
        activities = gpu_activities(json.loads(trace.read_text())["traceEvents"])
        steps = between_marks(activities, "spin_kernel")[1:]  # the first has no step before it to hide the host behind
        middle = sorted(steps, key=lambda step: summarise(step)["span"])[len(steps) // 2]
        rank, figure = trace.stem.rsplit(".", 1)[1], summarise(middle)
        figures[rank] = {**figure, "unprofiled_ms": float(plain.read_text())}
        lines += ["", f"## {rank}: forward + backward, ms; {float(plain.read_text()):.2f} without the profiler"]
        lines += [f"{'first to last kernel':24}{figure['span']:9.2f}"]
        lines += [f"{kind:24}{ms:9.2f}  {figure['kernels'][kind]:6} launches" for kind, ms in figure["classes"].items()]
        lines += [f"{'exposed':24}{figure['exposed']:9.2f}", f"{'idle':24}{figure['idle']:9.2f}"]
        lines += ["nothing computes, ms (of it communication runs):"]
        lines += [
            f"  {s['ms']:7.3f} ({s['communication_ms']:6.3f}) {s['times']:4} x  after {s['after']}  before {s['before']}"
            for s in stalls(middle)[: args.rows]
        ]
        if args.trace:
            with open(trace, "rb") as source, gzip.open(f"{trace}.gz", "wb") as target:
                shutil.copyfileobj(source, target)
        trace.unlink()
        plain.unlink()
    return "\n".join(lines), figures


def text_of(case: Any, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The report of one arm, and its figures."""
    from harness.trace import gpu_activities, runtime_calls, summarise, windows

    name = f"{case.arm}_{case.tokens}"
    trace = args.out / f"{name}.json"
    events = json.loads(trace.read_text())["traceEvents"]
    activities = gpu_activities(events)
    lines = [
        f"# {case.arm}, {case.tokens} tokens, {case.layers} layers, SDPA {case.attention}, recompute {case.recompute}, rank 0"
    ]
    figures: dict[str, Any] = {}
    for part in ("forward_backward", "optimizer"):
        marks = windows(events, part)
        steps = [summarise([a for a in activities if start <= a.start < end]) for start, end in marks]
        steps = [step for step in steps if step]
        if not steps:
            continue
        middle = sorted(steps, key=lambda step: step["span"])[len(steps) // 2]
        figures[part] = middle
        lines += ["", f"## {part}, ms on the GPU (the median of {len(steps)} steps)"]
        lines += [f"{'first to last kernel':24}{middle['span']:9.2f}"]
        lines += [f"{kind:24}{ms:9.2f}  {middle['kernels'][kind]:6} launches" for kind, ms in middle["classes"].items()]
        lines += [
            f"{'communication ran':24}{middle['communication']:9.2f}",
            f"{'  of it exposed':24}{middle['exposed']:9.2f}  {100 * middle['exposed'] / middle['span']:.1f} % of the span",
            f"{'  hidden share':24}{100 * middle['hidden_share']:8.1f}%",
            f"{'idle':24}{middle['idle']:9.2f}  {100 * middle['idle'] / middle['span']:.1f} % of the span",
            "longest idle gaps, us:",
        ]
        lines += [f"  {gap['us']:8.1f}  after {gap['after']}  before {gap['before']}" for gap in middle["gaps"]]
        calls = runtime_calls(events, marks[-1])
        lines += ["host's CUDA calls in the last step:"]
        lines += [
            f"  {us / 1e3:8.2f} ms {count:6} x {call}"
            for call, (count, us) in sorted(calls.items(), key=lambda c: -c[1][1])[:12]
        ]
    lines += (
        ["", f"## the {args.rows} longest kernels, ms a step"] + _kernels(activities, args.rows) if activities else []
    )
    lines += ["", "## host operators, all steps", (args.out / f"{name}.host.txt").read_text()]
    if args.trace:
        with open(trace, "rb") as source, gzip.open(f"{trace}.gz", "wb") as target:
            shutil.copyfileobj(source, target)
    trace.unlink()
    (args.out / f"{name}.host.txt").unlink()
    return "\n".join(lines), figures


def _kernels(activities: Any, rows: int) -> list[str]:
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for activity in activities:
        totals[activity.name][0] += activity.duration / 1e3 / STEPS
        totals[activity.name][1] += 1 / STEPS
    longest = sorted(totals.items(), key=lambda item: -item[1][0])[:rows]
    return [f"{ms:9.3f}  {count:6.0f} x  {name[:150]}" for name, (ms, count) in longest]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import_once(args.tiny)
    from arms import ARMS
    from harness.case import Case

    args.out.mkdir(parents=True, exist_ok=True)
    good = True
    summary = args.out / "profile.jsonl"
    for arm in args.arm:
        for tokens in args.tokens or [64 if args.tiny else 8192]:
            case = Case(
                arm=arm,
                tokens=tokens,
                layers=args.layers or (2 if args.tiny else 8),
                attention=args.attention or ("default" if args.tiny else "cudnn"),
                recompute=args.recompute,
                dtype="float32" if args.tiny else "bfloat16",
                tiny=args.tiny,
                zero=args.zero,
            )
            world = 1 if ARMS[arm].one_rank else args.ranks
            ranks = Ranks(
                world,
                profile_free if args.free else profile,
                case,
                args,
                log=args.out / f"{arm}_{tokens}.log",
                environment=dict(ARMS[arm].environment),
            )
            if not ranks.wait(args.limit):
                good = False
                print(f"{arm}, {tokens} tokens: failed\n{ranks.error()}", flush=True)
                continue
            text, figures = (free_text_of if args.free else text_of)(case, args)
            (args.out / f"{arm}_{tokens}.txt").write_text(text + "\n")
            with open(summary, "a") as file:
                file.write(json.dumps({"arm": arm, "tokens": tokens, "attention": case.attention, **figures}) + "\n")
            print(text, flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
