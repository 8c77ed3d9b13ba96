"""Fine-tune a causal language model with DeepSpeed; the `ds_seqpar` key of the JSON decides how it is sharded.

    deepspeed --num_gpus 2 examples/finetune.py --model FOLDER --deepspeed-config configs/zero1_tp2.json --out FOLDER

Trains on packed rows of text, reports held-out loss and a sample continuation before and after, and writes into --out:
checkpoint/ (an ordinary Hugging Face checkpoint), report.json, loss.png and held_out.json. Last, a new process loads
the checkpoint with plain transformers and must find the same held-out loss; otherwise the exit status is not zero.

A JSON without the key runs plain DeepSpeed. Where it has no "optimizer", torch's AdamW is used; where it has no
"scheduler", a linear warm-up and a cosine decay.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from text_data import DataError, pack, read_documents, split_documents, standard_library

if TYPE_CHECKING:
    import torch

__all__ = ["Job", "main"]


@dataclass(frozen=True)
class Job:
    """What was asked for, checked before anything heavy starts."""

    args: argparse.Namespace
    config: dict[str, Any]
    rank: int
    world_size: int

    @property
    def tp_size(self) -> int:
        section = self.config.get("ds_seqpar", {"enabled": False})
        return int(section.get("tp_size", 1)) if section.get("enabled", True) else 1

    @property
    def dp_size(self) -> int:
        return self.world_size // self.tp_size

    @property
    def micro_batch(self) -> int:
        return int(self.config["train_micro_batch_size_per_gpu"])

    @property
    def accumulation(self) -> int:
        return int(self.config.get("gradient_accumulation_steps", 1))

    @property
    def rows_per_step(self) -> int:
        return self.micro_batch * self.accumulation * self.dp_size

    @property
    def dtype_name(self) -> str:
        for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
            if self.config.get(name, {}).get("enabled"):
                return dtype
        return "float32"

    def say(self, text: str) -> None:
        """Prints on rank 0."""
        if self.rank == 0:
            print(text, flush=True)


def parse_job() -> Job:
    """Reads the command line and the JSON; a mistake in either ends the program with one line on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="local Hugging Face checkpoint folder")
    parser.add_argument("--deepspeed-config", type=Path, required=True, metavar="JSON", help="a DeepSpeed JSON file")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint/, report.json, loss.png")
    text = "files or folders of .txt, .md, .py, .jsonl; default: the source of Python's standard library"
    parser.add_argument("--text", type=Path, nargs="+", metavar="PATH", help=text)
    parser.add_argument("--jsonl-field", default="text", help="field of a JSONL line that is trained on (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (%(default)s)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a row (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate of the AdamW used (%(default)s)")
    parser.add_argument("--warmup-steps", type=int, default=3, help="steps of linear warm-up (%(default)s)")
    parser.add_argument("--held-out-rows", type=int, default=6, help="rows of the held-out loss (%(default)s)")
    parser.add_argument("--prompt", default='def read_lines(path):\n    """', help="text to continue, before and after")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens that continue it (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher appends it
    args = parser.parse_args()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        job = Job(args, _read_config(args.deepspeed_config), rank, world_size)
        _check(job)
    except ValueError as error:
        if rank == 0:
            parser.error(str(error))
        sys.exit(2)
    return job


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"--deepspeed-config: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("train_micro_batch_size_per_gpu"), int):
        raise ValueError(f'{path} needs "train_micro_batch_size_per_gpu": a number ("auto" is for the HF Trainer)')
    if not isinstance(config.get("ds_seqpar", {}), dict):
        raise ValueError(f'"ds_seqpar" in {path} must be an object such as {{"tp_size": 2}}')
    return config


def _check(job: Job) -> None:
    args = job.args
    if not (args.model / "config.json").is_file():
        raise ValueError(f"--model {args.model} is not a checkpoint folder: it holds no config.json")
    for name, least in (("steps", 1), ("seq_len", 2), ("held_out_rows", 1), ("warmup_steps", 0), ("new_tokens", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    longest = json.loads((args.model / "config.json").read_text()).get("max_position_embeddings")
    if longest is not None and args.seq_len > longest:
        raise ValueError(f"--seq-len {args.seq_len} is longer than the {longest} positions of {args.model}")
    if job.tp_size < 1 or job.world_size % job.tp_size:
        raise ValueError(f"{job.world_size} ranks cannot be grouped by tp_size {job.tp_size}: start a multiple of it")
    missing = [name for name in ("matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{missing} are missing; install them with: pip install 'ds_seqpar[examples]'")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is not a folder")


def load_rows(job: Job, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(training, held out) [n, seq_len] token ids, alike on every rank."""
    args = job.args
    documents = read_documents(args.text, args.jsonl_field) if args.text else standard_library()
    training, held_out = split_documents(documents)
    train_rows = pack(training, tokenizer, args.seq_len, args.steps * job.rows_per_step, args.seed)
    held_out_rows = pack(held_out, tokenizer, args.seq_len, args.held_out_rows, args.seed)
    if len(train_rows) < job.rows_per_step:
        raise DataError(f"{len(train_rows)} rows of {args.seq_len} tokens do not fill one step of {job.rows_per_step}")
    return train_rows, held_out_rows


def start_engine(job: Job) -> Any:
    """Loads the checkpoint and hands it to DeepSpeed, which ds_seqpar has wrapped."""
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM

    import ds_seqpar  # noqa: F401  this import is all that the key in the JSON needs

    _leave_cpu_kernel_unbuilt()
    deepspeed.init_distributed()
    model = AutoModelForCausalLM.from_pretrained(job.args.model, dtype=job.dtype_name)
    own: dict[str, Any] = {}
    if "optimizer" not in job.config:
        own["optimizer"] = torch.optim.AdamW(model.parameters(), lr=job.args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    if "scheduler" not in job.config:
        own["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_then_cosine(job))
    engine, *_ = deepspeed.initialize(model=model, config=job.config, **own)
    return engine


def _leave_cpu_kernel_unbuilt() -> None:
    """On the CPU DeepSpeed compiles a shared-memory all-reduce at start (a minute) that training never calls."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _warm_up_then_cosine(job: Job) -> Callable[[int], float]:
    """Learning rate factor of a step; the cosine ends at a tenth."""
    warm: int = job.args.warmup_steps
    steps: int = job.args.steps

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        done = min(1.0, (step - warm) / max(1, steps - warm))
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    return factor


def held_out_loss(model: Any, rows: torch.Tensor) -> float:
    """Mean loss over `rows`, one at a time; every rank takes part in every row."""
    import torch

    losses: list[float] = []
    model.eval()
    with torch.no_grad():
        for row in rows[:, None]:
            losses.append(model(input_ids=row, labels=row, use_cache=False).loss.item())
    model.train()
    return sum(losses) / len(losses)


def continuation(engine: Any, tokenizer: Any, job: Job) -> str:
    """The prompt, greedily continued; every rank takes part."""
    import torch

    if job.args.new_tokens == 0:
        return ""
    prompt = tokenizer(job.args.prompt, return_tensors="pt").to(engine.device)
    engine.eval()
    with torch.no_grad():
        tokens = engine.module.generate(
            input_ids=prompt.input_ids,
            attention_mask=prompt.attention_mask,
            max_new_tokens=job.args.new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    engine.train()
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def train(engine: Any, rows: torch.Tensor, job: Job) -> list[dict[str, float]]:
    """One entry a step: loss (mean over the whole batch), tokens/s of all ranks together, peak memory of a rank."""
    import torch
    from tqdm import tqdm

    steps: list[dict[str, float]] = []
    dp_rank, micro = job.rank // job.tp_size, job.micro_batch
    bar = tqdm(range(job.args.steps), desc="training", unit="step", disable=job.rank != 0, dynamic_ncols=True)
    for step in bar:
        start = time.perf_counter()
        total = torch.zeros((), device=engine.device)
        for turn in range(job.accumulation):
            first = step * job.rows_per_step + (turn * job.dp_size + dp_rank) * micro
            batch = rows[torch.arange(first, first + micro) % len(rows)].to(engine.device)
            loss = engine(input_ids=batch, labels=batch, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / job.accumulation
        torch.distributed.all_reduce(total)  # the ranks of a tensor-parallel group hold the same loss
        seconds = time.perf_counter() - start
        figures = {
            "loss": total.item() / job.world_size,
            "tokens_per_second": job.rows_per_step * job.args.seq_len / seconds,
            "peak_memory_gib": _peak_memory_gib(engine.device),
        }
        steps.append(figures)
        bar.set_postfix(
            loss=f"{figures['loss']:.3f}",
            tok_s=f"{figures['tokens_per_second']:.0f}",
            mem=f"{figures['peak_memory_gib']:.2f}GiB",
        )
    return steps


def _peak_memory_gib(device: torch.device) -> float:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def save(engine: Any, tokenizer: Any, folder: Path, job: Job) -> None:
    """Writes an ordinary Hugging Face checkpoint; every rank takes part."""
    import deepspeed

    import ds_seqpar

    if job.config.get("ds_seqpar", {"enabled": False}).get("enabled", True):
        ds_seqpar.save_pretrained(engine, folder, tokenizer=tokenizer)
        return
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        if job.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            engine.module.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


def write_report(report: dict[str, Any], out: Path) -> None:
    """report.json and loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    losses = [step["loss"] for step in report["steps"]]
    figure, axes = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    axes.plot(range(1, len(losses) + 1), losses, label="training")
    held_out = [report["held_out_loss_before"], report["held_out_loss_after"]]
    axes.plot([0, len(losses)], held_out, "o--", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=f"{report['model']}, tp_size {report['tp_size']}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(out / "loss.png", dpi=120)
    pyplot.close(figure)


def check_reload(report: dict[str, Any], out: Path) -> None:
    """Ends the program unless a new process with plain transformers finds the same held-out loss."""
    # Half precision rounds every activation, and the shards round in another order.
    tolerance = 1e-4 if report["saved_weights_dtype"] == "float32" else 1e-2
    command = [sys.executable, str(Path(__file__).with_name("evaluate.py")), "--model", str(out / "checkpoint")]
    command += ["--rows", str(out / "held_out.json"), "--dtype", report["saved_weights_dtype"]]
    command += ["--expect", str(report["saved_weights_loss"]), "--tolerance", str(tolerance)]
    if subprocess.run(command).returncode:
        sys.exit("the saved checkpoint, loaded with plain transformers, is not the model that was trained")


def main() -> None:
    begin = time.perf_counter()
    job = parse_job()
    out: Path = job.args.out
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.args.model)
    try:
        train_rows, held_out_rows = load_rows(job, tokenizer)
    except DataError as error:
        sys.exit(f"finetune.py: error: {error}" if job.rank == 0 else 2)
    out.mkdir(parents=True, exist_ok=True)

    import torch

    torch.manual_seed(job.args.seed)
    engine = start_engine(job)
    held_out_rows = held_out_rows.to(engine.device)
    job.say(f"{job.args.model.name}: tp_size {job.tp_size} x {job.dp_size}, {job.dtype_name} on {engine.device.type}")
    sample_before = continuation(engine, tokenizer, job)
    before = held_out_loss(engine, held_out_rows)
    job.say(f"before training: held-out loss {before:.4f}\n{sample_before}\n")
    steps = train(engine, train_rows, job)
    after = held_out_loss(engine, held_out_rows)
    sample_after = continuation(engine, tokenizer, job)
    job.say(f"\nafter {len(steps)} steps: held-out loss {after:.4f} (was {before:.4f})\n{sample_after}\n")
    save(engine, tokenizer, out / "checkpoint", job)
    saved_loss, saved_dtype = after, job.dtype_name
    if saved_dtype != "float32" and engine.zero_optimization_stage() < 3:
        # The same rounded weights in float32 arithmetic, so that the reloaded checkpoint can be held to a tight tolerance.
        saved_loss, saved_dtype = held_out_loss(engine.module.float(), held_out_rows), "float32"
        job.say(f"the saved weights in float32 arithmetic: held-out loss {saved_loss:.6f}")
    torch.distributed.barrier()
    del engine
    torch.distributed.destroy_process_group()
    if job.rank != 0:
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    report = {
        "model": job.args.model.name,
        "tp_size": job.tp_size,
        "dp_size": job.dp_size,
        "dtype": job.dtype_name,
        "seq_len": job.args.seq_len,
        "deepspeed_config": job.config,
        "held_out_loss_before": before,
        "held_out_loss_after": after,
        "saved_weights_loss": saved_loss,
        "saved_weights_dtype": saved_dtype,
        "sample_before": sample_before,
        "sample_after": sample_after,
        "steps": steps,
    }
    (out / "held_out.json").write_text(json.dumps(held_out_rows.tolist()))
    write_report(report, out)
    check_reload(report, out)
    print(f"wrote {out}/checkpoint, report.json and loss.png in {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
