"""PNG files of a plan: memory by kind against length, longest sequence against GPUs, where a step's time goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import Recompute, SeqParConfig
from ..errors import ConfigError, PlanError
from .choices import SEQPAR, Choice, Choices, choices_for
from .memory import estimate
from .step import trace_step

__all__ = ["draw"]

GIB = 2.0**30
KINDS = ("weights", "gradients", "optimizer", "held", "running")
MODES = (
    ("tensor parallel", False, Recompute.NONE),
    ("+ sequence parallel", True, Recompute.NONE),
    ("+ selective recompute", True, Recompute.SELECTIVE),
    ("full recompute", True, Recompute.FULL),
)


def draw(choices: Choices, folder: Path) -> list[Path]:
    """Writes the three pictures; needs matplotlib (pip install 'ds_seqpar[plan]')."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib; pip install 'ds_seqpar[plan]'") from None
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    choice = next((c for c in choices.all if c.strategy == SEQPAR), None)
    written = [_time(choices, folder / "time.png")]
    if choice is not None:
        written += [_memory(choices, choice, folder / "memory.png"), _longest(choices, choice, folder / "longest.png")]
    return written


def _memory(choices: Choices, choice: Choice, path: Path) -> Path:
    """A panel a mode: stacked GiB a rank at a quarter, half, once and twice the length that was asked for."""
    from matplotlib import pyplot

    request = choices.request
    lengths = [max(64, request.seq * n // 4) for n in (1, 2, 4, 8)]
    figure, axes = pyplot.subplots(1, len(MODES), figsize=(15, 4), sharey=True)
    zero = replace(request.zero, stage=choice.stage)
    for axis, (title, parallel, recompute) in zip(axes, MODES, strict=True):
        given = {"tp_size": choice.split, "sequence_parallel": parallel, "recompute": recompute.value}
        key = SeqParConfig.from_json({**(request.ds_config.get("ds_seqpar") or {}), **given})
        stacks: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for seq in lengths:
            try:
                trace = trace_step(
                    request.config,
                    key,
                    batch=request.micro_batch,
                    seq=seq,
                    dtype=request.dtype,
                    lora_rank=request.lora_rank,
                )
            except PlanError:
                continue
            m = estimate(trace, zero, request.gpus // choice.split)
            known = (m.weights + m.gathered, m.gradients, m.optimizer, m.held_bytes)
            for kind, nbytes in zip(KINDS, (*known, max(0, m.total - sum(known))), strict=True):
                stacks[kind].append(nbytes / GIB)
        _stacked(axis, [f"{seq / 1024:g}k" for seq in lengths], stacks)
        axis.axhline(request.gpu_memory / GIB, color="black", linestyle="--", linewidth=1)
        axis.set_title(f"{title}, tp {choice.split}", fontsize=10)
        axis.set_xlabel("tokens")
    axes[0].set_ylabel("GiB a GPU")
    axes[-1].legend(fontsize=8)
    return _save(figure, path)


def _stacked(axis: Any, names: list[str], stacks: dict[str, list[float]]) -> None:
    bottom = [0.0] * len(names)
    for kind, values in stacks.items():
        if len(values) == len(names):
            axis.bar(names, values, bottom=bottom, label=kind)
            bottom = [b + v for b, v in zip(bottom, values, strict=True)]


def _longest(choices: Choices, choice: Choice, path: Path) -> Path:
    """Longest sequence of a micro batch against GPUs, one line a way to recompute."""
    from matplotlib import pyplot

    request = choices.request
    figure, axis = pyplot.subplots(figsize=(6, 4))
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= max(8, request.gpus)]
    for recompute in Recompute:
        found = []
        for gpus in counts:
            nodes = max(1, gpus // 8)
            key = {"tp_size": min(8, gpus), "recompute": recompute.value}
            try:
                asked = replace(request, gpus=gpus, nodes=nodes, ds_config={**request.ds_config, "ds_seqpar": key})
                found.append(max((c.longest for c in choices_for(asked, choices.rates).all), default=0))
            except PlanError:
                found.append(0)
        axis.plot(counts, found, marker="o", label=f"recompute {recompute.value}")
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(n) for n in counts])
    axis.set_xlabel("GPUs")
    axis.set_ylabel("tokens of the longest sequence that fits")
    axis.legend(fontsize=8)
    return _save(figure, path)


def _time(choices: Choices, path: Path) -> Path:
    """Milliseconds of a step by kind, a bar for each choice."""
    from matplotlib import pyplot

    shown = choices.all[:8]
    names = [f"{c.name}\nZeRO {c.stage}, {c.recompute.value}\n{'fits' if c.fits else 'does not fit'}" for c in shown]
    stacks = {
        "GEMM": [c.time.gemm for c in shown],
        "attention": [c.time.attention for c in shown],
        "elementwise": [c.time.elementwise for c in shown],
        "exposed communication": [c.time.exposed for c in shown],
        "waits for the host": [c.time.host for c in shown],
        "data-parallel communication": [c.time.data_parallel for c in shown],
        "optimizer": [c.time.optimizer for c in shown],
    }
    scale = [c.split for c in shown]  # a GPU's time for one sequence of its own
    stacks = {kind: [v * s for v, s in zip(values, scale, strict=True)] for kind, values in stacks.items()}
    figure, axis = pyplot.subplots(figsize=(max(6, 1.4 * len(shown)), 4))
    _stacked(axis, names, stacks)
    axis.tick_params(axis="x", labelsize=7)
    axis.set_ylabel("GPU-ms for a micro batch")
    axis.legend(fontsize=8)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path
