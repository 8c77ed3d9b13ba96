"""Measures how fast this machine's host launches work, in a process of its own: it needs a process group, which planning must not find.

A narrow model takes forward and backward, so that the time until they return is Python's: one rank of two, whose collectives
return at once; on a GPU it copies from its own memory where it would from its peer's. The same model is traced, and its operations are
counted as those of a plan are.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..config import SeqParConfig
from ..groups import ParallelGroups
from ..hf import causal_lm_loss, describe, planned_config, planned_model
from ..inject import inject
from ..layers.loss import CausalLMLoss
from .stand_ins import AlikeInputs, OwnMemory, fake_groups
from .step import trace_step
from .steptime import launched

__all__ = ["HostRates", "measure_host"]

HostRates = dict[str, float]
"""`host_forward_us`, `host_backward_us` and `host_plain_us` of `Rates`."""
ANSWER = "MEASURED "
SIZES = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    vocab_size=512,
)  # fmt: skip
KEY = SeqParConfig(tp_size=2)
TOKENS = {"cuda": 8192, "cpu": 64}  # on a GPU so many that rows travel by copy engine, as in any long sequence
STEPS = 15
LIMIT_S = 180


def measure_host(on_gpu: bool) -> HostRates | None:
    """On the first GPU or the CPU; None if the process that measures fails."""
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(x for x in (root, os.environ.get("PYTHONPATH")) if x)
    if not on_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    ask = f"import sys; from {__name__} import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", ask, "cuda" if on_gpu else "cpu"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return None
    line = next((x for x in done.stdout.splitlines() if x.startswith(ANSWER)), None)
    return None if line is None else json.loads(line.removeprefix(ANSWER))


def _operations(plain: bool, device: torch.device) -> tuple[int, int]:
    """Of a forward and of a backward, as this process makes them: a transfer is one collective where there are no copy engines."""
    key = SeqParConfig(tp_size=1) if plain else KEY
    trace = trace_step(planned_config("llama", SIZES), key, batch=1, seq=TOKENS[device.type], plain=plain)
    if plain or device.type == "cuda":
        return launched(trace.forward_work, key.tp_size), launched(trace.backward_work, key.tp_size)
    return tuple(work.operations + work.moves for work in (trace.forward_work, trace.backward_work))  # type: ignore[return-value]


def _seconds(model: Any, device: torch.device) -> tuple[float, float]:
    """Until a forward and a backward return, medians; the device is idle when they begin."""
    ids = torch.zeros((1, TOKENS[device.type]), dtype=torch.int64, device=device)
    found = []
    for _ in range(STEPS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        forwarded = time.perf_counter()
        loss.backward()
        found.append((forwarded - begin, time.perf_counter() - forwarded))
    forward, backward = zip(*found[3:], strict=True)
    return statistics.median(forward), statistics.median(backward)


def _shard(model: Any, groups: ParallelGroups, device: torch.device) -> None:
    """As the engine does, without DeepSpeed, and without what the other rank would be asked."""
    loss = causal_lm_loss(model)
    assert loss is not None
    inject(model, describe(model), KEY, groups, has_values=False)
    model.seqpar.guard = AlikeInputs()
    on_gpu = device.type == "cuda"
    model.seqpar.exchange.decide(OwnMemory(groups.tp_group, lambda: torch.cuda._sleep(1)) if on_gpu else None)
    model.loss_function = CausalLMLoss(loss)


def _measure(device: torch.device) -> HostRates:
    counted = {plain: _operations(plain, device) for plain in (False, True)}  # before there is a process group
    model: Any = planned_model(planned_config("llama", SIZES), torch.bfloat16).to_empty(device=device).train()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    plain = sum(_seconds(model, device))
    model.zero_grad()
    with fake_groups(KEY.tp_size) as groups:
        _shard(model, groups, device)
        forward, backward = _seconds(model, device)
    return {
        "host_forward_us": 1e6 * forward / counted[False][0],
        "host_backward_us": 1e6 * backward / counted[False][1],
        "host_plain_us": 1e6 * plain / sum(counted[True]),
    }


def main(argv: list[str]) -> int:
    """Answers on standard output."""
    print(ANSWER + json.dumps(_measure(torch.device("cuda:0" if argv[0] == "cuda" else "cpu"))), flush=True)
    return 0
