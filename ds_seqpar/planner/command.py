"""The commands `plan`, `calibrate` and `info`, and the script that completes them in a shell."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError, SeqParError
from .given import AUTO, read_ds_config, require_writable, write_whole

__all__ = [
    "calibrate_arguments",
    "info_arguments",
    "plan_arguments",
    "run_calibrate",
    "run_info",
    "run_plan",
    "size_in_bytes",
]

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}

MOST_BYTES = 2.0**60


def size_in_bytes(text: str) -> int:
    """80GiB, 141GB, 8e10 -> bytes. Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]{1,2})?)\s*([kmgt]?i?b?)\s*", text, re.I)
    unit = match[2].upper() if match else ""
    unit = f"{unit}B" if unit and not unit.endswith("B") else unit
    if match is None or unit not in _UNITS or not 0 < float(match[1]) * _UNITS[unit] <= MOST_BYTES:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of memory; write it as 80GiB or 141GB")
    if not unit and float(match[1]) < _UNITS["MB"]:
        raise argparse.ArgumentTypeError(f"{text!r} has no unit; write {match[1]}GiB or {match[1]}GB")
    return int(float(match[1]) * _UNITS[unit])


def _at_least_one(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1, in digits")
    return int(text)


def _sizes(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form hidden_size=4096")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `plan`."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a folder or config.json of a Hugging Face model, its name on the Hub, or a model type",
    )
    parser.add_argument(
        "--sizes",
        type=_sizes,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="fields of the model's config.json to replace, such as hidden_size=8192",
    )
    parser.add_argument("--seq", type=_at_least_one, required=True, help="tokens of a sequence, such as 8192")
    parser.add_argument("--gpus", type=_at_least_one, required=True, help="all GPUs of the run, over all nodes")
    parser.add_argument(
        "--nodes",
        type=_at_least_one,
        help="computers that the GPUs are in; within one they have NVLink (default: 8 GPUs a node)",
    )
    parser.add_argument(
        "--gpu-memory",
        type=size_in_bytes,
        default=size_in_bytes("80GiB"),
        help="memory of each GPU, such as 80GiB or 141GB (default: 80GiB)",
    )
    parser.add_argument(
        "--micro-batch",
        type=_at_least_one,
        help="sequences of a forward, DeepSpeed's train_micro_batch_size_per_gpu (default: --config's, else 1)",
    )
    parser.add_argument(
        "--zero",
        choices=["auto", "0", "1", "2", "3"],
        default="auto",
        help="ZeRO stage (default: --config's; without one 1, 2 and 3 are tried)",
    )
    parser.add_argument(
        "--lora",
        type=_at_least_one,
        metavar="RANK",
        help="train LoRA adapters of this rank on all linears instead of the weights",
    )
    parser.add_argument(
        "--offload-optimizer",
        action="store_true",
        help="DeepSpeed's offload_optimizer: fp32 weights and Adam's moments in the computers' memory",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="DS_JSON",
        help="your DeepSpeed JSON: its micro batch, accumulation, ZeRO section and ds_seqpar key are kept",
    )
    parser.add_argument(
        "--rates",
        help="speeds to predict times with: h200, h100, or a file of `calibrate` (default: this machine's, if calibrated, else h200)",
    )
    parser.add_argument("--write", type=Path, metavar="DS_JSON", help="write the DeepSpeed JSON of the best choice")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw memory, longest sequences and time as PNG files")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--rows", type=_at_least_one, default=12, help="choices to show (default: %(default)s)")


def _request(options: argparse.Namespace) -> Any:
    from ..hf import is_encoder, planned_config
    from .choices import Request

    ds_config: dict[str, Any] = {}
    if options.config is not None:
        ds_config, notes = read_ds_config(options.config)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    if options.offload_optimizer:
        if options.zero == "0":
            raise ConfigError("--offload-optimizer needs ZeRO: leave --zero 0 out, or use --zero 1, 2 or 3")
        section = ds_config.get("zero_optimization") or {}
        ds_config["zero_optimization"] = {**section, "offload_optimizer": {"device": "cpu"}}
    nodes = options.nodes or -(-options.gpus // 8)
    if options.nodes is None and options.gpus > 8 and options.gpus % 8:
        raise ConfigError(
            f"{options.gpus} GPUs do not fill nodes of 8; say how many computers they are in with --nodes"
        )
    stages: tuple[int, ...] = (1, 2, 3) if options.zero == "auto" else (int(options.zero),)
    if options.zero == "auto" and "stage" in (ds_config.get("zero_optimization") or {}):
        stages = (ds_config["zero_optimization"]["stage"],)
    micro_batch = ds_config.get("train_micro_batch_size_per_gpu")
    config = planned_config(options.model, dict(options.sizes))
    if is_encoder(config):
        raise ConfigError(
            f"model type {config.model_type!r} is an encoder or an encoder-decoder, which can be trained but not planned; `plan` knows "
            "causal language models"
        )
    return Request(
        config=config,
        seq=options.seq,
        gpus=options.gpus,
        nodes=nodes,
        gpu_memory=options.gpu_memory,
        micro_batch=options.micro_batch or (1 if micro_batch in (None, AUTO) else micro_batch),
        stages=stages,
        ds_config=ds_config,
        lora_rank=options.lora or 0,
    )


def run_plan(options: argparse.Namespace) -> int:
    """What fits on your GPUs, how fast it is, and the JSON for it; needs no GPU and loads no weights."""
    from .choices import choices_for
    from .rates import load_rates
    from .table import as_json, print_table

    def tell(what: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)

    try:
        if options.write is not None:
            require_writable(options.write)
        if options.plot is not None:
            require_writable(options.plot, folder=True)
        choices = choices_for(_request(options), load_rates(options.rates), tell, options.rows)
        tell("")
        if options.json:
            print(json.dumps(as_json(choices, options.rows), indent=2))
        else:
            print_table(choices, options.rows)
        if options.plot is not None:
            from .plots import draw

            for path in draw(choices, options.plot):
                print(f"wrote {path}", file=sys.stderr)
        if options.write is not None:
            best = choices.best
            if best is None:
                raise ConfigError(f"nothing fits, so {options.write} was not written")
            write_whole(options.write, json.dumps(choices.ds_config(best), indent=2) + "\n")
            print(f"wrote {options.write}", file=sys.stderr)
    except (SeqParError, OSError) as problem:
        print(f"error: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
    return 0


def calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `calibrate`."""
    parser.add_argument(
        "--out", type=Path, help="the file to write (default: in your cache folder, where `plan` looks)"
    )


def run_calibrate(options: argparse.Namespace) -> int:
    """Measures this machine's rates for `plan` in about a minute; on the CPU, if there is no GPU."""
    from dataclasses import asdict

    from .calibrate import calibrate
    from .rates import cache_file, save_rates

    path = options.out or cache_file()
    try:
        if options.out is not None:
            require_writable(path)
        rates = calibrate()
        save_rates(rates, path)
    except (SeqParError, OSError) as problem:
        print(f"error: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
    for name, value in asdict(rates).items():
        print(f"{name:28s} {value}")
    print(f"wrote {path}")
    return 0


def info_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `info`."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="also say what becomes of this model: a folder, config.json, name on the Hub or model type",
    )
    parser.add_argument(
        "--tp-size", type=_at_least_one, default=2, help="GPUs that MODEL is split over (default: %(default)s)"
    )
    parser.add_argument(
        "--sizes",
        type=_sizes,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="fields of the model's config.json to replace",
    )


def run_info(options: argparse.Namespace) -> int:
    """Versions, GPUs and how they are connected, what is fused here, what falls back and why; of a model, its plan."""
    from .info import machine, model_report

    try:
        print("\n".join(machine()))
        if options.model:
            print(model_report(options.model, dict(options.sizes), options.tp_size))
    except SeqParError as problem:
        print(f"error: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
    return 0
