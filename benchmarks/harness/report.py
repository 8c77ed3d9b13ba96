"""Which rows count, and the rows as a table and plots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .case import Case

__all__ = ["judge", "tolerances", "write_report"]

Row = dict[str, Any]

COLUMNS = [
    ("fwd_bwd_ms", "f+b ms", "{:.1f}"),
    ("step_ms", "step ms", "{:.1f}"),
    ("tokens_per_s_per_gpu", "tokens/s/GPU", "{:.0f}"),
    ("model_tflops_per_gpu", "TF/s/GPU", "{:.0f}"),
    ("held_gib", "held", "{:.2f}"),
    ("static_gib", "static", "{:.2f}"),
    ("peak_gib", "peak", "{:.2f}"),
    ("peak_minus_static_gib", "peak-", "{:.2f}"),
    ("outside_gib", "outside", "{:.2f}"),
]


def tolerances(dtype: str) -> tuple[float, float]:
    """Relative difference allowed in the first loss, and in the second, behind one AdamW step.

    The first holds the rounding of activations. AdamW's first step divides each gradient by its own size, so entries that
    are rounding noise move as far as the others, and the second loss feels it.
    """
    return (2e-4, 2e-3) if dtype == "bfloat16" else (1e-5, 1e-4)


def _group(row: Row) -> tuple[Any, ...]:
    return Case(**{f.name: row[f.name] for f in fields(Case)}).comparable()


def judge(rows: Sequence[Row]) -> None:
    """Turns rows whose losses differ from the others' into `void`, saying by how much.

    The measure is the unsharded model where it ran, otherwise the median of the arms. A row alone is not judged.
    """
    groups = defaultdict(list)
    for row in rows:
        if row["status"] in ("ok", "void"):
            row["status"] = "ok"
            row.pop("error", None)
            groups[_group(row)].append(row)
    for group in groups.values():
        whole = [row for row in group if row["arm"] == "unsharded"]
        for step, tolerance in enumerate(tolerances(group[0]["dtype"])):
            losses = sorted(row["losses"][step] for row in whole or group)
            expected = losses[len(losses) // 2]
            for row in group:
                difference = abs(row["losses"][step] - expected) / abs(expected)
                if not difference <= tolerance:  # NaN too
                    row["status"] = "void"
                    row["error"] = f"loss {step + 1} is {row['losses'][step]:.5f}, not {expected:.5f}"


def _title(key: tuple[str, str, int, str]) -> str:
    attention, recompute, layers, dtype = key
    return f"{layers} layers, {dtype}, SDPA {attention}, recompute {recompute}"


def _sections(rows: Sequence[Row]) -> dict[tuple[str, str, int, str], list[Row]]:
    sections = defaultdict(list)
    for row in rows:
        sections[row["attention"], row["recompute"], row["layers"], row["dtype"]].append(row)
    return sections


def _table(rows: Sequence[Row]) -> str:
    from arms import ARMS

    lines = []
    for tokens in sorted({row["tokens"] for row in rows}):
        lines += [f"{tokens} tokens", "", "| arm | " + " | ".join(name for _, name, _ in COLUMNS) + " | losses |"]
        lines += ["|---" * (len(COLUMNS) + 2) + "|"]
        for row in rows:
            if row["tokens"] != tokens:
                continue
            title = ARMS[row["arm"]].title if row["arm"] in ARMS else row["arm"]
            if row["status"] == "ok":
                values = [form.format(row[key]) if key in row else "" for key, _, form in COLUMNS]
                values.append(", ".join(f"{loss:.4f}" for loss in row["losses"]))
            else:
                text = f"{row['status']}: {row.get('error', '')}".replace("|", "/")
                values = [text] + [""] * len(COLUMNS)
            lines.append(f"| {title} | " + " | ".join(values) + " |")
        lines.append("")
    return "\n".join(lines)


def write_report(rows: Sequence[Row], folder: Path) -> str:
    """Writes table.md, and one PNG a section, into `folder`; returns the table."""
    parts = []
    ok = [row for row in rows if row["status"] == "ok"]
    if ok:
        versions = ", ".join(f"{name} {version}" for name, version in ok[0]["versions"].items())
        parts.append(f"{ok[0]['device']}; {versions}\n")
    for key, section in _sections(rows).items():
        parts += [f"## {_title(key)}\n", _table(section)]
        _plot(key, [row for row in section if row["status"] == "ok"], folder)
    text = "\n".join(parts)
    (folder / "table.md").write_text(text + "\n")
    return text


def _plot(key: tuple[str, str, int, str], rows: Sequence[Row], folder: Path) -> None:
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    from arms import ARMS
    from matplotlib import pyplot

    lengths = sorted({row["tokens"] for row in rows})
    shown = [
        ("fwd_bwd_ms", "forward + backward, ms"),
        ("held_gib", "held after forward, GiB"),
        ("peak_minus_static_gib", "peak minus static, GiB"),
    ]
    figure, axes = pyplot.subplots(len(lengths), len(shown), squeeze=False, constrained_layout=True, sharey="row",
                                   figsize=(14, 1.2 + 0.36 * len(rows)))  # fmt: skip
    for line, tokens in zip(axes, lengths):
        mine = [row for row in rows if row["tokens"] == tokens][::-1]
        names = [ARMS[row["arm"]].title if row["arm"] in ARMS else row["arm"] for row in mine]
        colors = ["tab:orange" if row["arm"].startswith("seqpar") else "tab:blue" for row in mine]
        for axis, (column, label) in zip(line, shown):
            bars = axis.barh(names, [row[column] for row in mine], color=colors)
            axis.bar_label(bars, fmt="%.4g", padding=2)
            axis.margins(x=0.15)
            axis.set_title(f"{tokens} tokens: {label}", fontsize=10)
    attention, recompute, layers, dtype = key
    figure.suptitle(f"{_title(key)}; {rows[0]['device']}")
    figure.savefig(folder / f"compare_{attention}_{recompute}_{layers}layers_{dtype}.png", dpi=110)
    pyplot.close(figure)
