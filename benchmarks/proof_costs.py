"""What the proofs cost on this machine: `verify` on a model, and the replica check beside a training step.

    python benchmarks/proof_costs.py verify --model FOLDER [--dtype bfloat16]     or    --shape 1b (random weights, Llama's code)
    python benchmarks/proof_costs.py replicas --model FOLDER --seq 256 --steps 8

Both run on two ranks of the CPU and print one JSON line, which `--out FILE` also appends to a file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from harness.ranks import Ranks, import_once

SHAPES = {
    "1b": dict(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, tie_word_embeddings=False,
    ),
}  # fmt: skip
"""1b: TinyLlama-1.1B's."""


def _model(options: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    dtype = getattr(torch, options.dtype)
    if options.model is not None:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[options.shape]))
    torch.set_default_dtype(torch.float32)
    return model


def _verify(options: argparse.Namespace) -> dict[str, Any]:
    import torch.distributed as dist

    import ds_seqpar
    from ds_seqpar.checks.reference import Skeleton
    from ds_seqpar.engine import verified

    model = _model(options)
    parameters = sum(p.numel() for p in model.parameters())
    begun, before = time.monotonic(), time.process_time()
    skeleton = Skeleton(model, share=(dist.get_rank(), 2))
    copied = time.monotonic()
    ds_seqpar.shard(model, {"tp_size": 2})
    sharded, cpu = time.monotonic(), time.process_time()
    found = verified(model, skeleton, options.seq)
    done, used = time.monotonic(), time.process_time() - cpu
    if dist.get_rank() == 0:
        print(found, flush=True)
    return {
        "parameters": parameters, "tokens": found.tokens, "passed": found.passed, "checks": len(found.checks),
        "copying_and_checksums_s": round(copied - begun, 1), "sharding_s": round(sharded - copied, 1),
        "verification_s": round(done - sharded, 1), "verification_cpu_s_of_a_rank": round(used, 1),
        "cpu_s_of_a_rank_in_all": round(time.process_time() - before, 1),
        "peak_rss_gib_of_a_rank": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }  # fmt: skip


def _replicas(options: argparse.Namespace) -> dict[str, Any]:
    import deepspeed
    import torch

    from ds_seqpar.checks.replicas import ReplicaCheck

    model = _model(options).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9, "ds_seqpar": {"tp_size": 2, "replica_check_interval": 1},
    }  # fmt: skip
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    checks: list[float] = []
    plain = ReplicaCheck.check

    def timed(self: ReplicaCheck, step: int) -> None:
        begun = time.monotonic()
        plain(self, step)
        checks.append(time.monotonic() - begun)

    ReplicaCheck.check = timed  # type: ignore[method-assign]
    ids = torch.randint(0, model.config.vocab_size, (1, options.seq), generator=torch.Generator().manual_seed(0))
    steps = []
    for _ in range(options.steps):
        begun = time.monotonic()
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        steps.append(time.monotonic() - begun)
    step = statistics.median(steps[1:]) - statistics.median(checks[1:])
    check = statistics.median(checks[1:])
    return {
        "tokens": options.seq, "step_s": round(step, 3), "check_s": round(check, 5),
        "share_of_a_step_at_every_100": f"{check / 100 / step:.5%}",
    }  # fmt: skip


def _rank(options: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    result = _verify(options) if options.what == "verify" else _replicas(options)
    if dist.get_rank() == 0:
        line = {
            "date": datetime.date.today().isoformat(), "device": f"CPU, {os.cpu_count()} cores, 2 ranks, gloo",
            "torch": torch.__version__, "what": options.what, "model": options.model or options.shape, "dtype": options.dtype,
            **result, "load_of_the_machine": round(os.getloadavg()[0], 1), "command": " ".join(["python", *sys.argv]),
        }  # fmt: skip
        text = json.dumps(line)
        print(text, flush=True)
        if options.out is not None:
            with open(options.out, "a") as file:
                file.write(text + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["verify", "replicas"])
    parser.add_argument("--model", help="a Hugging Face checkpoint folder")
    parser.add_argument("--shape", choices=list(SHAPES), default="1b", help="random weights, where no model is given")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seq", type=int, default=17, help="tokens in a row (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps (%(default)s)")
    parser.add_argument("--out", type=Path, help="a file to which the line is appended")
    options = parser.parse_args()
    import_once(tiny=True)
    log = Path("/dev/stdout")
    ranks = Ranks(2, _rank, options, log=log)
    good = ranks.wait(3600)
    if not good:
        print(ranks.error(), file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
