"""What `plan` prints: a table in the terminal, or JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .choices import Choice, Choices

__all__ = ["as_json", "print_table", "summary"]

GIB = 2.0**30
LEGEND = (
    "GiB a GPU: weights, gradients, optimizer; held: activations kept for backward; logits: what the loss needs; total: with CUDA and NCCL",
    "ms a step: products (GEMM), attention, elementwise; exposed: communication within a sequence's GPUs that nothing hides; host: the GPU "
    "waits for Python; DP: communication between data-parallel ranks",
    "way: ds_seqpar N, Ulysses N: N GPUs share a sequence; ZeRO-3 alone: none do. longest: the longest sequence that fits this way",
)
HOST_LIMITED = 0.2
"""Share of a step that the GPU waits, from which a user is told."""
COLUMNS = (
    "", "way", "ZeRO", "recompute", "weights", "grads", "optim", "held", "logits", "peak", "total GiB", "ms", "GEMM", "attn", "elem",
    "exposed", "host", "DP", "optim ms", "tok/s/GPU", "longest",
)  # fmt: skip


def _row(choice: Choice) -> tuple[str, ...]:
    m, t = choice.memory, choice.time
    gib = (m.weights + m.gathered, m.gradients, m.optimizer, m.held_bytes, m.logits, max(m.peak, m.peak_step), m.total)
    ms = (t.total, t.gemm, t.attention, t.elementwise, t.exposed, t.host, t.data_parallel, t.optimizer)
    return (
        "fits" if choice.fits else "no",
        choice.name,
        str(choice.stage),
        choice.recompute.value,
        *(f"{x / GIB:.1f}" for x in gib),
        *(f"{x:.0f}" for x in ms),
        f"{choice.tokens_per_s_per_gpu:.0f}",
        f"{choice.longest:,}" if choice.longest else "-",
    )


def summary(choices: Choices) -> list[str]:
    """Lines under the table."""
    lines = [*LEGEND, f"rates: {choices.rates.name} ({choices.rates.source})"]
    if choices.rates.name == "CPU":
        lines.append(
            "these are a CPU's rates, and so are the times: for GPUs use --rates h100 or h200, or calibrate on one"
        )
    lines += [f"not planned: {name}: {why}" for name, why in choices.refused.items()]
    best = choices.best
    if best is None:
        lines.append("nothing fits: more GPUs, a shorter sequence, --offload-optimizer, or --lora")
    else:
        held = ", ".join(
            f"{why} {nbytes / GIB:.2f}" for why, nbytes in sorted(best.memory.held.items(), key=lambda x: -x[1])
        )
        lines.append(
            f"best: {best.name}, ZeRO {best.stage}, recompute {best.recompute.value}; held GiB by kind: {held}"
        )
        if best.time.host > HOST_LIMITED * best.time.total:
            lines.append(
                f"the host is the limit here: in {best.time.host:.0f} of a step's {best.time.total:.0f} ms the GPU waits for Python to "
                "launch its work; longer sequences or a larger --micro-batch cost little"
            )
    return lines


def print_table(choices: Choices, rows: int = 12) -> None:
    """With rich where it is installed (pip install 'ds_seqpar[plan]'), else in plain text."""
    shown = [_row(choice) for choice in choices.all[:rows]]
    request = choices.request
    title = (
        f"{request.config.model_type}, {request.micro_batch} x {request.seq:,} tokens, {request.gpus} GPUs of "
        f"{request.gpu_memory / GIB:.4g} GiB on {request.nodes} node{'s' if request.nodes > 1 else ''}"
    )
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in (COLUMNS, *shown)) for i in range(len(COLUMNS))]
        print(title)
        for row in (COLUMNS, *shown):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    else:
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if i < 4 else "right", no_wrap=True)
        for choice, row in zip(choices.all, shown, strict=False):
            table.add_row(*row, style="bold green" if choice is choices.best else None if choice.fits else "dim")
        console = Console()
        console = console if console.is_terminal else Console(width=220)
        console.print(table)
    print("\n".join(summary(choices)))


def as_json(choices: Choices, rows: int = 12) -> dict[str, Any]:
    """Everything in the table, and the bytes behind it, for machines."""

    def one(choice: Choice) -> dict[str, Any]:
        values = asdict(choice)
        values["recompute"] = choice.recompute.value
        values["memory"] |= {"held_bytes": choice.memory.held_bytes, "total": choice.memory.total}
        values["time"] |= {"forward_backward": choice.time.forward_backward, "total": choice.time.total}
        return values | {"name": choice.name, "ds_config": choices.ds_config(choice)}

    best = choices.best
    return {
        "choices": [one(choice) for choice in choices.all[:rows]],
        "best": None if best is None else one(best),
        "refused": choices.refused,
        "rates": asdict(choices.rates),
    }
