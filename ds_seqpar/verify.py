"""`deepspeed --num_gpus N --module ds_seqpar.verify --model FOLDER`: does the sharded model compute what the unsharded one does?

One small batch, forward and backward, layer by layer; every value and every parameter's gradient. See docs/verify.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .checkpoint.loading import loading
from .checks.reference import Skeleton
from .config import KEY
from .engine import groups_of, shard, verified
from .errors import ConfigError, SeqParError
from .hf import auto_from_pretrained, saved_class

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ds_seqpar.verify", description=__doc__)
    parser.add_argument("--model", required=True, help="a Hugging Face checkpoint folder")
    parser.add_argument("--config", type=Path, help="a DeepSpeed JSON with the key (default: tp_size of all ranks)")
    parser.add_argument(
        "--seq", type=int, default=17, help="tokens in a row of the batch, which has 2 or 3 (%(default)s)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: what the JSON trains in")
    what = "each rank reads its own parts only; without it the whole model, so that the cuts are compared with it too"
    parser.add_argument("--parts", action="store_true", help=what)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher appends it
    return parser


def _ds_config(path: Path | None, world: int) -> dict[str, Any]:
    if path is None:
        return {"train_micro_batch_size_per_gpu": 1, KEY: {"tp_size": world}}
    try:
        config = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as problem:
        raise ConfigError(f"--config {path}: {problem}") from problem
    if not isinstance(config, dict) or KEY not in config:
        raise ConfigError(f'--config {path} has no "{KEY}" key: there is nothing to verify')
    return config


def _dtype(name: str | None, config: dict[str, Any]) -> torch.dtype:
    if name is None:
        half = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16"}
        on = (dtype for key, dtype in half.items() if isinstance(config.get(key), dict) and config[key].get("enabled"))
        name = next(on, "float32")
    return getattr(torch, name)  # type: ignore[no-any-return]


def _run(options: argparse.Namespace) -> bool:
    begun = time.monotonic()
    if options.seq < 1:
        raise ConfigError(f"--seq must be at least 1, not {options.seq}")
    if "RANK" not in os.environ:  # no launcher: a run of one rank
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    world = int(os.environ["WORLD_SIZE"])
    ds_config = _ds_config(options.config, world)
    found = groups_of({"train_micro_batch_size_per_gpu": 1, KEY: ds_config[KEY]})
    if found is None:
        raise ConfigError(f'"{KEY}.enabled" is false in {options.config}: there is nothing to verify')
    groups, config = found[0], dataclasses.replace(found[1], verify=False)
    load: dict[str, Any] = {"dtype": _dtype(options.dtype, ds_config)}
    model_class = saved_class(options.model)
    if options.parts:
        with loading({"train_micro_batch_size_per_gpu": 1, KEY: ds_config[KEY]}):
            model = auto_from_pretrained(options.model, model_class, load)
    else:
        model = auto_from_pretrained(options.model, model_class, load)
    skeleton = Skeleton(model, share=(groups.tp_rank, groups.tp_size), whole=not options.parts)
    shard(model, config)
    loaded = time.monotonic()
    verification = verified(model, skeleton, options.seq)
    if int(os.environ.get("RANK", 0)) == 0:
        took = time.monotonic()
        print(
            f"{verification}\n  loading and sharding {loaded - begun:.1f} s, verification {took - loaded:.1f} s",
            flush=True,
        )
    return verification.passed


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 if every check passed, 1 if one did not, 2 if nothing could be compared."""
    options = _parser().parse_args(argv)
    try:
        return 0 if _run(options) else 1
    except SeqParError as problem:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {problem}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
