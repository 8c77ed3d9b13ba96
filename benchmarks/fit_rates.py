"""Makes the rates that ds_seqpar ships: the H200's from the committed profiles of two, the H100's from a committed calibration.

    python benchmarks/fit_rates.py --out ds_seqpar/planner/rates

Products and attention: the counted work of a step over the time of its kernels in profile_8192 and profile_32768. Exposed
communication: parts. Peer rate: the copies of profile_32768. Optimizer: its bytes as `calibrate` timed them on one H200, and
DeepSpeed's loops over the parameters as what first_fast_paths' step minus forward + backward takes beyond that. None of these
files is what tests/planner checks step times against (compare, second_fast_paths, check_plan).

The host's times are fitted to the H100 runs in which it is the limit: the forward of one group of four at 8192 tokens, one rank at
512 tokens, and the engine against the plain loop in that group. No run on H200 was limited by its host, so its forward and
backward are taken from the H100's machine.
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
from ds_seqpar.planner.rates import OLDER, Rates, load_rates, save_rates
from ds_seqpar.planner.step import StepTrace, trace_step

PLAIN_US = 20.0  # an operation of transformers' own layers: an assumption
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
    picoseconds = json.loads((RESULTS / "2026-11-23_h200x1_calibrate.json").read_text())["optimizer_ps_per_parameter"]
    rate = 44 / picoseconds * 1e3  # what an optimizer's step was timed with then: 44 bytes a parameter
    loops = sum(optimizer) / len(optimizer) - moved / rate / 1e6
    return Rates(
        name="H200",
        source="two H200 (NVLink), torch 2.11, cuDNN attention, bf16, by benchmarks/fit_rates.py from benchmarks/results; between "
        "nodes an assumption, 400 Gb/s a GPU at 80 %; the host's forward and backward are the H100's",
        gemm_tflops=points("GEMM", "gemm_flops"),
        attention_forward_tflops=points("fprop", "attention_flops"),
        attention_backward_tflops=points("bprop", "attention_backward_flops"),
        traffic_gb_per_s=TRAFFIC,
        peer_gb_per_s=round(traces[32768].work.moved_bytes / times[32768]["peer copies"] / 1e6, 1),
        exposed_us_per_transfer=round(1e3 * parts["exposed_ms"] / parts["transfers"], 1),
        optimizer_gb_per_s=round(rate, 1),
        **host() | {"host_engine_us": round(1e3 * loops / traces[8192].trained_tensors, 1)},
    )


def host() -> dict[str, float]:
    """Microseconds that Python takes on the machine of four H100."""
    rows = [json.loads(line) for line in (RESULTS / "2026-11-27_h100x4_compare.jsonl").read_text().splitlines()]
    loop, engine = (
        next(r for r in rows if (r["arm"], r["tokens"]) == (arm, 8192)) for arm in ("seqpar_loop", "seqpar")
    )
    lines = (RESULTS / "2026-11-27_h100x1_one_rank.jsonl").read_text().splitlines()
    one_rank = next(row["fwd_bwd_ms"] for row in map(json.loads, lines) if row["tokens"] == 512)
    # Operations of the code that was measured (`launched`), which has become another: four ranks' forward, then one of two ranks'.
    forward = loop["forward_ms"] / 406
    backward = (one_rank - forward * 311) / 353
    around = (engine["fwd_bwd_ms"] - loop["fwd_bwd_ms"]) / 75
    found = {"host_forward_us": forward, "host_backward_us": backward, "host_engine_us": around}
    return {"host_plain_us": PLAIN_US} | {name: round(1e3 * ms, 1) for name, ms in found.items()}


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
    source = found.source.replace(f"; {OLDER}", "")
    return replace(
        found, name="H100", source=f"one H100 SXM: {source}; the host's times by benchmarks/fit_rates.py", **host()
    )


if __name__ == "__main__":
    sys.exit(main())
