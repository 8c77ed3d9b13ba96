"""Runs every arm on the same weights, tokens, dtype and attention kernel; one JSON line a case, then a table and plots.

python benchmarks/compare.py --tokens 8192 32768 --attention cudnn --out build/compare
python benchmarks/compare.py --tiny --out build/compare_tiny
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from harness.ranks import Ranks, import_once

LEAK_GIB = 0.25  # memory that a finished case may leave behind before the next one gets fresh processes
AGAIN = 75  # exit code: give me fresh processes for the rest


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    from arms import ARMS
    from harness.case import SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="default: all; --list names them")
    parser.add_argument("--tokens", type=int, nargs="+", help="sequence lengths (default 8192 32768; tiny: 64)")
    parser.add_argument("--layers", type=int, help="default 8; tiny: 2")
    text = "SDPA's kernel, the same for all arms (default cudnn; tiny: default)"
    parser.add_argument("--attention", nargs="+", choices=["flash", "cudnn", "default"], help=text)
    parser.add_argument("--recompute", nargs="+", choices=["none", "full"], default=["none"])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default bfloat16; tiny: float32")
    parser.add_argument("--model", choices=list(SHAPES), default="8b", help="whose layers (%(default)s)")
    text = "ZeRO stages of ds_seqpar and AutoTP, a case each (default 1)"
    parser.add_argument("--zero", type=int, nargs="+", choices=[0, 1, 2, 3], default=[1], help=text)
    parser.add_argument("--ranks", type=int, default=2, help="GPUs, or gloo ranks (%(default)s)")
    text = "ranks that share a sequence, a case each (default: all of them); the groups are data parallel where the arm can"
    parser.add_argument("--tp", type=int, nargs="+", help=text)
    parser.add_argument("--seed", type=int, default=0)
    text = "timed steps of a case, after two to warm up: a number, or one for each of --tokens (default 5)"
    parser.add_argument("--steps", type=int, nargs="+", default=[5], help=text)
    parser.add_argument(
        "--limit", type=float, default=120.0, help="seconds a case may take, its start included (%(default)s)"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model on the CPU over gloo: a smoke test, no figures"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/compare"), help="folder of cases.jsonl, table.md, *.png, logs/"
    )
    parser.add_argument(
        "--append", action="store_true", help="keep the cases that OUT holds, and make the table of all"
    )
    parser.add_argument("--report-only", action="store_true", help="run nothing; table and plots of OUT/cases.jsonl")
    parser.add_argument("--list", action="store_true", help="names and titles of the arms")
    args = parser.parse_args(argv)
    uneven = [tp for tp in args.tp or [] if tp < 1 or args.ranks % tp]
    if uneven:
        parser.error(f"--tp {uneven}: {args.ranks} ranks do not divide into groups of so many")
    unknown = [name for name in args.arms or [] if name not in ARMS]
    if unknown:
        parser.error(f"unknown arms {unknown}; there are {list(ARMS)}")
    args.tokens = args.tokens or ([64] if args.tiny else [8192, 32768])
    if len(args.steps) not in (1, len(args.tokens)):
        parser.error(f"--steps {args.steps}: give one number, or one for each of --tokens {args.tokens}")
    args.steps = dict(zip(args.tokens, args.steps * (len(args.tokens) if len(args.steps) == 1 else 1), strict=True))
    return args


def cases_of(args: argparse.Namespace) -> dict[str, list[Any]]:
    """Arm -> its cases, smallest first."""
    from arms import ARMS
    from harness.case import Case

    tiny = args.tiny
    result: dict[str, list[Any]] = {}
    for arm in args.arms or ARMS:
        tps = (args.tp or [args.ranks]) if ARMS[arm].data_parallel else [args.ranks]
        zeros = args.zero if ARMS[arm].takes_zero else args.zero[:1]
        attentions = args.attention or (["default"] if tiny else ["cudnn"])
        lengths = sorted(args.tokens)
        result[arm] = [
            Case(
                arm=arm,
                tokens=tokens,
                layers=args.layers or (2 if tiny else 8),
                attention=attention,
                recompute=recompute,
                dtype=args.dtype or ("float32" if tiny else "bfloat16"),
                tiny=tiny,
                zero=zero,
                seed=args.seed,
                tp=tp,
                model=args.model,
            )
            for tp, zero, attention, recompute, tokens in product(tps, zeros, attentions, args.recompute, lengths)
        ]
    return result


def run_cases(cases: list[Any], spool: Path, steps: dict[int, int]) -> None:
    """On a rank: the cases, with `steps[tokens]` timed steps; rank 0 writes a line when one starts and its row when it is done."""
    import deepspeed
    import torch
    import torch.distributed as dist
    import transformers
    from arms import ARMS
    from harness.measure import attention_kernel, device_of_rank, measure
    from harness.weights import tokens_of

    device = device_of_rank()
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "transformers": transformers.__version__,
        },
    }

    def write(line: dict[str, Any]) -> None:
        if dist.get_rank() == 0:
            with open(spool, "a") as file:
                file.write(json.dumps(line) + "\n")

    for i, case in enumerate(cases):
        write({"started": i})
        begin = time.monotonic()
        torch.manual_seed(case.seed)
        with attention_kernel(case.attention):
            workload = ARMS[case.arm].build(case)
            built = time.monotonic()
            row = measure(workload, case, tokens_of(case, device), steps[case.tokens])
        row["build_s"], row["run_s"] = built - begin, time.monotonic() - built
        write({"done": i, "row": {**row, **facts}})
        if i + 1 < len(cases):
            if cases[i + 1].tp != case.tp:
                raise SystemExit(AGAIN)  # groups are made once in a process
            _let_go(workload)
            del workload
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                left = torch.tensor(torch.cuda.memory_allocated(device) / 2**30, device=device)
                dist.all_reduce(left, op=dist.ReduceOp.MAX)
                if float(left) > LEAK_GIB:
                    raise SystemExit(AGAIN)


def _let_go(workload: Any) -> None:
    """Drops what DeepSpeed keeps of an engine beyond its own lifetime."""
    from deepspeed.utils import groups

    if hasattr(workload.model, "destroy"):
        workload.model.destroy()
    for name in ("_TENSOR_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP"):
        setattr(groups, name, None)
    groups.mpu = None


def _lines(spool: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in spool.read_text().splitlines() if line.endswith("}")] if spool.exists() else []


def run_arm(name: str, cases: list[Any], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one arm. A case that fails is a row that says so; the cases after it get fresh processes."""
    from arms import ARMS

    arm = ARMS[name]
    log = args.out / "logs" / f"{name}.log"
    log.unlink(missing_ok=True)
    left = [] if arm.missing() else list(cases)
    if arm.missing():
        yield from ({**asdict(case), "status": "missing", "error": f"{arm.needs} is not installed"} for case in cases)
    while left:
        world = 1 if arm.one_rank else args.ranks
        spool = args.out / "logs" / f"{name}.spool"
        spool.unlink(missing_ok=True)
        ranks = Ranks(world, run_cases, left, spool, args.steps, log=log, environment=dict(arm.environment))
        done, timed_out = 0, False
        since = time.monotonic()
        while ranks.alive() and not ranks.failed() and not timed_out:
            time.sleep(0.05)
            for row in _rows(spool, left, done):
                yield row
                done, since = done + 1, time.monotonic()
            timed_out = time.monotonic() - since > args.limit
        again = _settle(ranks)
        for row in _rows(spool, left, done):
            yield row
            done += 1
        if done == len(left):
            break
        left = left[done:]
        if again and done:
            continue
        status, error = ("timeout", f"longer than {args.limit:.0f} s") if timed_out else _verdict(ranks.error())
        failed = left.pop(0)
        yield {**asdict(failed), "status": status, "error": error}
        if status == "oom":
            larger = [c for c in left if replace(c, tokens=failed.tokens) == failed]
            for case in larger:
                left.remove(case)
                yield {**asdict(case), "status": "oom", "error": f"not run: {failed.tokens} tokens did not fit"}


def _settle(ranks: Ranks) -> bool:
    """Gives the other ranks the time to fail on their own; True if the ranks asked for fresh processes."""
    deadline = time.monotonic() + 5.0
    while ranks.alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    ranks.end()
    return any(process.exitcode == AGAIN for process in ranks.processes)


def _rows(spool: Path, cases: list[Any], done: int) -> list[dict[str, Any]]:
    rows = [line["row"] for line in _lines(spool) if "row" in line][done:]
    return [{**asdict(case), "status": "ok", **row} for case, row in zip(cases[done:], rows)]


def _verdict(error: str) -> tuple[str, str]:
    lines = error.strip().splitlines() or ["ended without a word"]
    message = "\n".join(line for line in lines if not line.startswith(" "))  # not the source lines of the traceback
    return ("oom" if "out of memory" in message.lower() else "crash"), lines[-1][:300]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from arms import ARMS

    if args.list:
        for name, arm in ARMS.items():
            print(f"{name:22} {arm.title}")
        return 0
    from harness.report import judge, write_report

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "logs").mkdir(exist_ok=True)
    path = args.out / "cases.jsonl"
    rows = (
        [json.loads(line) for line in path.read_text().splitlines()]
        if path.exists() and (args.append or args.report_only)
        else []
    )
    if not args.report_only:
        if not args.append:
            path.unlink(missing_ok=True)
        begin = time.monotonic()
        import_once(args.tiny)
        for name, cases in cases_of(args).items():
            for row in run_arm(name, cases, args):
                rows.append(row)
                with open(path, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
        print(f"ran for {time.monotonic() - begin:.0f} s", flush=True)
    judge(rows)
    print(write_report(rows, args.out), flush=True)
    return 0 if any(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
