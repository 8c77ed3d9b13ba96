"""Makes the tables and pictures of docs/planning.md: what the planner recommends for three models on 8 to 1024 GPUs.

    python benchmarks/planning_tables.py --out docs

Predictions, not measurements. Writes OUT/planning_tables.md and OUT/planning.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_seqpar.hf import planned_config
from ds_seqpar.planner.choices import ALONE, SEQPAR, ULYSSES, Choice, Request, choices_for
from ds_seqpar.planner.rates import load_rates

MODELS = {
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "70B": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "405B": dict(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128),
}
COMMON = dict(num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=False)
GPUS = (8, 32, 64, 256, 1024)
LENGTHS = (8192, 32768, 131072)
MEMORY = 141_000_000_000  # an H200


def best_of(found: list[Choice], strategy: str) -> Choice | None:
    """The fastest that fits of one strategy."""
    return next((choice for choice in found if choice.fits and choice.strategy == strategy), None)


def cell(choice: Choice | None) -> str:
    """Tokens/s/GPU and how."""
    if choice is None:
        return "does not fit"
    split = f", {choice.split} a sequence" if choice.split > 1 else ""
    return f"{choice.tokens_per_s_per_gpu:.0f} (ZeRO {choice.stage}, {choice.recompute.value}{split})"


def rows() -> Iterator[tuple[str, int, int, list[Choice]]]:
    """(model, tokens, GPUs, choices)."""
    rates = load_rates("h200")
    for name, sizes in MODELS.items():
        config: Any = planned_config("llama", {**COMMON, **sizes})
        for seq in LENGTHS:
            traces: dict[Any, Any] = {}
            for gpus in GPUS:
                request = Request(config, seq, gpus, MEMORY, nodes=gpus // 8)
                yield name, seq, gpus, choices_for(request, rates, rows=0, traces=traces).all


def draw(found: list[tuple[str, int, int, list[Choice]]], path: Path) -> None:
    """Tokens/s/GPU of the best of each strategy against GPUs, a panel a model and length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(MODELS), len(LENGTHS), figsize=(13, 10), sharex=True)
    for i, model in enumerate(MODELS):
        for j, seq in enumerate(LENGTHS):
            axis = axes[i][j]
            for strategy in (SEQPAR, ALONE, ULYSSES):
                points = [(g, best_of(c, strategy)) for m, s, g, c in found if (m, s) == (model, seq)]
                fitting = [(g, c.tokens_per_s_per_gpu) for g, c in points if c is not None]
                axis.plot([g for g, _ in fitting], [v for _, v in fitting], marker="o", label=strategy)
            axis.set_title(f"{model}, {seq} tokens", fontsize=9)
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
    axes[0][0].legend(fontsize=8)
    axes[1][0].set_ylabel("predicted tokens/s/GPU")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    out = parser.parse_args(argv).out
    found = list(rows())
    lines = [
        "| model | tokens | GPUs | ds_seqpar | ZeRO-3 alone | Ulysses | recommended |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, seq, gpus, all_choices in found:
        first = all_choices[0]
        recommended = first.name if first.fits else "nothing fits"
        cells = [cell(best_of(all_choices, strategy)) for strategy in (SEQPAR, ALONE, ULYSSES)]
        lines.append(f"| {model} | {seq} | {gpus} | {' | '.join(cells)} | {recommended} |")
    (out / "planning_tables.md").write_text("# Predicted tokens/s/GPU\n\n" + "\n".join(lines) + "\n")
    draw(found, out / "planning.png")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
