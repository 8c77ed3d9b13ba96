"""Hundreds of steps of a pretrained model, sharded over two ranks and unsharded, on the same rows: do the loss curves stay one?

    python benchmarks/long_run.py --model FOLDER --steps 500 --out build/long_run

Writes `losses.jsonl` (one line a step and arm, as they come), `curves.png` and `summary.json`; the exit status is 1 if the
curves are further apart, relatively, than --tolerance anywhere. An arm that was interrupted starts over; a complete one is kept.
Arms: `unsharded` is transformers' model and torch's AdamW in one process, `seqpar` the same through the DeepSpeed engine at ZeRO 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.ranks import Ranks, import_once

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
ARMS = {"unsharded": 1, "seqpar": 2}
WARMUP = 20


def _rows(options: argparse.Namespace) -> Any:
    """[steps * accumulation, seq] token ids of the standard library's source, the same for every arm."""
    from text_data import pack, split_documents, standard_library
    from transformers import AutoTokenizer

    training, _ = split_documents(standard_library())
    count = options.steps * options.accumulation
    return pack(training, AutoTokenizer.from_pretrained(options.model), options.seq, count, 0)


def _model(options: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).train()


def _optimizer(model: Any, options: argparse.Namespace) -> Any:
    import torch

    return torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def _rate(step: int, options: argparse.Namespace) -> float:
    return options.lr * min(1.0, (step + 1) / WARMUP) * (1.0 - 0.9 * step / options.steps)  # type: ignore[no-any-return]


def _unsharded(options: argparse.Namespace) -> Iterator[tuple[float, float]]:
    import torch

    model = _model(options)
    optimizer = _optimizer(model, options)
    for step, rows in enumerate(_rows(options).split(options.accumulation)):
        optimizer.param_groups[0]["lr"] = _rate(step, options)
        total = 0.0
        for row in rows.split(1):
            loss = model(input_ids=row, labels=row).loss
            (loss / options.accumulation).backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield total / options.accumulation, float(norm)


def _seqpar(options: argparse.Namespace) -> Iterator[tuple[float, float]]:
    import deepspeed

    import ds_seqpar  # noqa: F401  # the key below is looked for once this is imported

    model = _model(options)
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": options.accumulation, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
        "ds_seqpar": {"tp_size": 2, **json.loads(options.key)},
    }  # fmt: skip
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=_optimizer(model, options), config=config)
    for step, rows in enumerate(_rows(options).split(options.accumulation)):
        optimizer.param_groups[0]["lr"] = _rate(step, options)
        total = 0.0
        for row in rows.split(1):
            loss = engine(input_ids=row, labels=row).loss
            engine.backward(loss)
            engine.step()
            total += float(loss.detach())
        yield total / options.accumulation, float(engine.get_global_grad_norm())


def _run_arm(arm: str, options: argparse.Namespace) -> None:
    import torch.distributed as dist

    begun = time.monotonic()
    steps = _unsharded(options) if arm == "unsharded" else _seqpar(options)
    for step, (loss, norm) in enumerate(steps):
        if dist.get_rank() == 0:
            line = {"arm": arm, "step": step, "loss": loss, "grad_norm": norm, "s": round(time.monotonic() - begun, 1)}
            with open(_log(options, arm), "a") as file:
                file.write(json.dumps(line) + "\n")


def _log(options: argparse.Namespace, arm: str) -> Path:
    return options.out / f"{arm}.jsonl"  # type: ignore[no-any-return]


def _lines(options: argparse.Namespace, arm: str) -> list[dict[str, Any]]:
    path = _log(options, arm)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _report(options: argparse.Namespace) -> int:
    import torch
    from matplotlib.figure import Figure

    curves = {arm: _lines(options, arm) for arm in ARMS}
    pairs = list(zip(*curves.values(), strict=False))  # as far as both have come
    apart = [abs(mine["loss"] - theirs["loss"]) / theirs["loss"] for theirs, mine in pairs]
    norms = [abs(mine["grad_norm"] - theirs["grad_norm"]) / theirs["grad_norm"] for theirs, mine in pairs]
    summary = {
        "date": datetime.date.today().isoformat(), "device": f"CPU, {platform.machine()}, gloo", "torch": torch.__version__,
        "command": " ".join(["python", *sys.argv]), "steps": len(pairs), "tokens_a_step": options.seq * options.accumulation,
        "first_loss": pairs[0][0]["loss"], "last_losses": {arm: lines[len(pairs) - 1]["loss"] for arm, lines in curves.items()},
        "largest_relative_difference": max(apart), "at_step": apart.index(max(apart)),
        "largest_relative_difference_of_gradient_norms": max(norms), "tolerance": options.tolerance,
    }  # fmt: skip
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    with open(options.out / "losses.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for lines in curves.values() for line in lines[: len(pairs)])
    figure = Figure(figsize=(8, 6))
    losses, difference = figure.subplots(2, 1, sharex=True)
    for (arm, lines), style in zip(curves.items(), ("-", "--"), strict=True):
        losses.plot([line["loss"] for line in lines[: len(pairs)]], style, label=arm, linewidth=1)
    losses.set(
        ylabel="loss", title=f"{Path(options.model).name}, {options.seq * options.accumulation} tokens a step, fp32"
    )
    losses.legend()
    difference.semilogy([max(x, 1e-9) for x in apart], linewidth=1)
    difference.axhline(options.tolerance, color="red", linewidth=0.8)
    difference.set(xlabel="step", ylabel="relative difference")
    figure.savefig(options.out / "curves.png", dpi=100)
    print(json.dumps(summary, indent=1))
    return 0 if len(pairs) == options.steps and max(apart) <= options.tolerance else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face checkpoint folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seq", type=int, default=128, help="tokens in a row (%(default)s)")
    parser.add_argument("--accumulation", type=int, default=1, help="rows a step (%(default)s)")
    parser.add_argument("--lr", type=float, default=2e-5, help="peak learning rate (%(default)s)")
    parser.add_argument("--key", default="{}", help="JSON of further fields of the ds_seqpar key (%(default)s)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest relative difference (%(default)s)")
    parser.add_argument(
        "--arms", nargs="*", choices=list(ARMS), default=list(ARMS), help="which to run; none: report only"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    import_once(tiny=True)
    running = {}
    for arm in options.arms:
        if len(_lines(options, arm)) < options.steps:
            _log(options, arm).unlink(missing_ok=True)
            running[arm] = Ranks(ARMS[arm], _run_arm, arm, options, log=options.out / f"{arm}.log")
    failed = [arm for arm, ranks in running.items() if not ranks.wait(1e6)]
    for arm in failed:
        print(f"{arm} failed:\n{running[arm].error()}", file=sys.stderr)
    return 1 if failed else _report(options)


if __name__ == "__main__":
    raise SystemExit(main())
