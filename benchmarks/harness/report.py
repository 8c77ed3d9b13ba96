"""Which rows count, and the rows as a table and plots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

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
    return Case(**{f.name: row[f.name] for f in fields(Case) if f.name in row}).comparable()


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


class Section(NamedTuple):
    """What the rows of one table have in common."""

    model: str
    layers: int
    dtype: str
    attention: str
    recompute: str

    @classmethod
    def of(cls, row: Row) -> Section:
        """The section of a row; rows from before there was a choice of models are of the 8B's."""
        return cls(row.get("model", "8b"), row["layers"], row["dtype"], row["attention"], row["recompute"])

    def __str__(self) -> str:
        layers = (
            f"{self.layers} layers" if self.model == "8b" else f"{self.layers} layers of {self.model.upper()}'s shape"
        )
        return f"{layers}, {self.dtype}, SDPA {self.attention}, recompute {self.recompute}"

    @property
    def file(self) -> str:
        """The name of its plot."""
        model = "" if self.model == "8b" else f"{self.model}_"
        return f"compare_{model}{self.attention}_{self.recompute}_{self.layers}layers_{self.dtype}.png"


def _sections(rows: Sequence[Row]) -> dict[Section, list[Row]]:
    sections = defaultdict(list)
    for row in rows:
        sections[Section.of(row)].append(row)
    return sections


def _name(row: Row) -> str:
    """The arm, and how it is laid out where it has a choice."""
    from arms import ARMS

    arm = ARMS.get(row["arm"])
    if arm is None:
        return str(row["arm"])
    tp, ranks = row.get("tp", 0), row.get("ranks", 0)
    layout = f", groups of {tp} x {ranks // tp}" if arm.data_parallel and tp and tp < ranks else ""
    return arm.title + layout + (f", ZeRO {row['zero']}" if arm.takes_zero and row["zero"] != 1 else "")


def _table(rows: Sequence[Row]) -> str:
    lines = []
    for tokens in sorted({row["tokens"] for row in rows}):
        lines += [f"{tokens} tokens", "", "| arm | " + " | ".join(name for _, name, _ in COLUMNS) + " | losses |"]
        lines += ["|---" * (len(COLUMNS) + 2) + "|"]
        for row in rows:
            if row["tokens"] != tokens:
                continue
            if row["status"] == "ok":
                values = [form.format(row[key]) if key in row else "" for key, _, form in COLUMNS]
                values.append(", ".join(f"{loss:.4f}" for loss in row["losses"]))
            else:
                text = f"{row['status']}: {row.get('error', '')}".replace("|", "/")
                values = [text] + [""] * len(COLUMNS)
            lines.append(f"| {_name(row)} | " + " | ".join(values) + " |")
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
        parts += [f"## {key}\n", _table(section)]
        _plot(key, [row for row in section if row["status"] == "ok"], folder)
    text = "\n".join(parts)
    (folder / "table.md").write_text(text + "\n")
    return text


def _plot(section: Section, rows: Sequence[Row], folder: Path) -> None:
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
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
        names = [_name(row) for row in mine]
        colors = ["tab:orange" if row["arm"].startswith("seqpar") else "tab:blue" for row in mine]
        for axis, (column, label) in zip(line, shown):
            bars = axis.barh(names, [row[column] for row in mine], color=colors)
            axis.bar_label(bars, fmt=lambda value: f"{value:.4g}" if value < 1e4 else f"{value:.0f}", padding=2)
            axis.margins(x=0.15)
            axis.set_title(f"{tokens} tokens: {label}", fontsize=10)
    gpus = sorted({row.get("ranks", 2) for row in rows if row["arm"] != "unsharded"})
    figure.suptitle(f"{section}; {'/'.join(map(str, gpus))} x {rows[0]['device']}")
    figure.savefig(folder / section.file, dpi=110)
    pyplot.close(figure)
