"""Compares what the planner predicts with a run on one GPU at tp_size 1, through the DeepSpeed engine.

    python benchmarks/check_plan.py --tokens 8192 32768 --layers 4 --out build/check_plan

One JSON line a case in OUT/check_plan.jsonl: predicted and measured held, static and peak GiB and milliseconds, by the rates that
`--rates` names (a shipped name, or `calibrate`: measured first, and saved as OUT/rates.json). A process for each case.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--recompute", nargs="+", default=["none", "selective", "full"])
    parser.add_argument("--zero", type=int, nargs="+", default=[1])
    parser.add_argument("--rates", default="calibrate")
    parser.add_argument("--out", type=Path, default=Path("build/check_plan"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def predicted(case: dict[str, Any], rates_file: str) -> dict[str, Any]:
    """By the planner, in a process that has not touched torch.distributed."""
    from fit_rates import model

    from ds_seqpar.config import SeqParConfig
    from ds_seqpar.planner.memory import Zero, estimate
    from ds_seqpar.planner.rates import load_rates
    from ds_seqpar.planner.step import trace_step
    from ds_seqpar.planner.steptime import predict

    config, zero = model(), Zero(stage=case["zero"])
    config.num_hidden_layers = case["layers"]
    key = SeqParConfig.from_json({"tp_size": 1, "recompute": case["recompute"]})
    trace = trace_step(config, key, batch=1, seq=case["tokens"])
    memory = estimate(trace, zero, dp_size=1)
    time = predict(trace, load_rates(rates_file), zero, tp_size=1, dp_size=1, gpus_per_node=8)
    gib = 2.0**30
    return {
        "held_gib": memory.held_bytes / gib,
        "static_gib": memory.static / gib,
        "peak_gib": memory.peak / gib,
        "peak_step_gib": max(memory.peak, memory.peak_step) / gib,
        "outside_gib": memory.beside / gib,
        "fwd_bwd_ms": time.forward_backward,
        "host_ms": time.host,
        "step_ms": time.total,
    }


def measured(case: dict[str, Any]) -> dict[str, Any]:
    """By the benchmark's own clock and counters."""
    import os

    import torch
    import torch.distributed as dist
    from harness.case import Case
    from harness.measure import attention_kernel, measure
    from harness.weights import tokens_of

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    from arms import ARMS

    work = Case("seqpar", case["tokens"], case["layers"], "cudnn", case["recompute"], "bfloat16", zero=case["zero"])
    with attention_kernel("cudnn"):
        found = measure(ARMS["seqpar"].build(work), work, tokens_of(work, torch.device("cuda", 0)))
    return {**found, "device": torch.cuda.get_device_name(), "torch": torch.__version__}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    sys.path.insert(0, str(Path(__file__).parent))
    if args.case:
        print("RESULT " + json.dumps(measured(json.loads(args.case))))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    rates = args.rates
    if rates == "calibrate":
        rates = str(args.out / "rates.json")  # in a process of its own, whose memory on the GPU goes with it
        subprocess.run([sys.executable, "-m", "ds_seqpar", "calibrate", "--out", rates], check=True, timeout=240)
    for zero in args.zero:
        for tokens in args.tokens:
            for recompute in args.recompute:
                case = {"tokens": tokens, "layers": args.layers, "recompute": recompute, "zero": zero, "tp_size": 1}
                line = {**case, "predicted": predicted(case, rates), **_run(case)}
                with (args.out / "check_plan.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
    return 0


def _run(case: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    result = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if result is None:
        return {"status": "failed", "error": (done.stderr or done.stdout)[-2000:]}
    return {"status": "ok", "measured": json.loads(result.removeprefix("RESULT "))}


if __name__ == "__main__":
    sys.exit(main())
