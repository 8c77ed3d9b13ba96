"""Makes the rates that ds_seqpar ships: the H200's from the committed profiles of two, the H100's from a committed calibration.

    python benchmarks/fit_rates.py --out ds_seqpar/planner/rates

Products and attention: the counted work of a step over the time of its kernels in profile_8192 and profile_32768. Exposed
communication: parts. Peer rate: the copies of profile_32768. Optimizer: first_fast_paths, step minus forward + backward. None of
these files is what tests/planner checks step times against (compare, second_fast_paths).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.case import LLAMA_8B

from ds_seqpar.config import SeqParConfig
from ds_seqpar.hf import planned_config
from ds_seqpar.planner.memory import Zero
from ds_seqpar.planner.optimizer import step_bytes
from ds_seqpar.planner.rates import Rates, load_rates, save_rates
from ds_seqpar.planner.step import StepTrace, trace_step

RESULTS = Path(__file__).with_name("results")
DATE = "2026-11-23_h200x2"
LAYERS = 8
TRAFFIC = 2851.0
"""GB/s of elementwise kernels in those profiles: by the bytes that the layers of that day read and wrote, which today's do not."""


def model() -> Any:
    """The benchmark's config."""
    shape = LLAMA_8B
    return planned_config(
        "llama",
        dict(
            hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=LAYERS, head_dim=shape.head_dim,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocab, tie_word_embeddings=False,
        ),
    )  # fmt: skip


def milliseconds(tokens: int) -> dict[str, float]:
    """Kernel times of forward + backward: GEMM, elementwise, memcpy, peer copies, and attention's two kernels."""
    text = (RESULTS / f"{DATE}_profile_{tokens}.txt").read_text()
    found = {
        name: float(ms) for name, ms in re.findall(r"^(GEMM|elementwise|memcpy|peer copies)\s+([\d.]+)", text, re.M)[:4]
    }
    for name in ("fprop", "bprop"):
        match = re.search(rf"^\s*([\d.]+)\s+\d+ x\s+cudnn\S*{name}", text, re.M)
        if match is None:
            raise SystemExit(f"profile_{tokens} has no {name} kernel")
        found[name] = float(match[1])
    return found


def fit() -> Rates:
    """Rates of the H200."""
    sizes = (8192, 32768)
    key = SeqParConfig.from_json({"tp_size": 2})
    traces: dict[int, StepTrace] = {t: trace_step(model(), key, batch=1, seq=t) for t in sizes}
    times = {t: milliseconds(t) for t in sizes}

    def points(kernel: str, work: str) -> tuple[tuple[int, float], ...]:
        return tuple((t, round(getattr(traces[t].work, work) / times[t][kernel] / 1e9, 1)) for t in sizes)

    parts = json.loads((RESULTS / f"{DATE}_parts.jsonl").read_text().splitlines()[0])
    steps = [json.loads(line) for line in (RESULTS / f"{DATE}_first_fast_paths.jsonl").read_text().splitlines()]
    optimizer = [row["step_ms"] - row["fwd_bwd_ms"] for row in steps if row["arm"] == "seqpar"]
    moved = traces[8192].trainable * step_bytes(Zero(stage=1), 2)
    return Rates(
        name="H200",
        source="two H200 (NVLink), torch 2.11, cuDNN attention, bf16, by benchmarks/fit_rates.py from benchmarks/results; between "
        "nodes an assumption, 400 Gb/s a GPU at 80 %",
        gemm_tflops=points("GEMM", "gemm_flops"),
        attention_forward_tflops=points("fprop", "attention_flops"),
        attention_backward_tflops=points("bprop", "attention_backward_flops"),
        traffic_gb_per_s=TRAFFIC,
        peer_gb_per_s=round(traces[32768].work.moved_bytes / times[32768]["peer copies"] / 1e6, 1),
        exposed_us_per_transfer=round(1e3 * parts["exposed_ms"] / parts["transfers"], 1),
        optimizer_gb_per_s=round(moved * len(optimizer) / sum(optimizer) / 1e6, 1),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("ds_seqpar/planner/rates"))
    out = parser.parse_args(argv).out
    h200 = fit()
    save_rates(h200, out / "h200.json")
    save_rates(h100(), out / "h100.json")
    print(h200)
    return 0


def h100() -> Rates:
    """An H100 SXM, as `calibrate` measured it."""
    found = load_rates(str(RESULTS / "2026-11-27_h100x1_calibrate.json"))
    return replace(found, name="H100", source=f"one H100 SXM: {found.source}")


if __name__ == "__main__":
    sys.exit(main())
