"""The commands of the planner: step times against committed runs, choices, bad input, calibration, info, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from exactness import fresh_groups
from ranks import run_ranks
from test_memory import ENGINE, LOOP, RESULTS, case_of, h100_rows, one_gpu_rows, rows, trace_of
from transformers import AutoConfig, AutoModelForCausalLM

from ds_seqpar.cli import COMMANDS, completion_script, main
from ds_seqpar.config import KEY, Recompute, SeqParConfig
from ds_seqpar.planner import choices
from ds_seqpar.planner.memory import Zero
from ds_seqpar.planner.rates import Rates, load_rates
from ds_seqpar.planner.steptime import predict

TINY = [
    "llama", "--sizes", "hidden_size=64", "intermediate_size=128", "num_hidden_layers=3", "num_attention_heads=4",
    "num_key_value_heads=2", "vocab_size=256", "head_dim=16",
]  # fmt: skip


@pytest.mark.parametrize("row", [row for row in h100_rows("seqpar", "seqpar_loop") if row["tp"] == 2], ids=case_of)
def test_step_times_of_two_and_four_h100_are_predicted(row: dict[str, Any]) -> None:
    """By the rates of another H100. Not the whole step at 8192 tokens, nor four ranks of one group: there the host is what is slow."""
    trace = trace_of(row["layers"], row["tokens"], row["recompute"], True)
    zero, dp_size = Zero(stage=row["zero"]), row["ranks"] // row["tp"]
    time = predict(trace, load_rates("h100"), zero, tp_size=2, dp_size=dp_size, gpus_per_node=8)
    assert time.forward_backward == pytest.approx(row["fwd_bwd_ms"], rel=0.10)
    if row["arm"] == "seqpar" and row["tokens"] > 8192:
        assert time.total == pytest.approx(row["step_ms"], rel=0.10)


@pytest.mark.parametrize(
    "row",
    [
        *rows(*ENGINE, *LOOP, of=("compare",)),
        *(row for row in rows(*ENGINE, *LOOP, of=("second_fast_paths",)) if row["recompute"] == "full"),
    ],
    ids=lambda row: f"{row['arm']}-{row['tokens']}-{row['recompute']}",
)
def test_step_times_of_gpu_runs_are_predicted(row: dict[str, Any]) -> None:
    """By rates fitted to profiles of other runs; 65536 tokens, recompute and tp only are in none of those."""
    trace = trace_of(row["layers"], row["tokens"], row["recompute"], row["arm"] != "seqpar_tp_only")
    time = predict(trace, load_rates("h200"), Zero(stage=1), tp_size=2, dp_size=1, gpus_per_node=8)
    assert time.forward_backward == pytest.approx(row["fwd_bwd_ms"], rel=0.10)
    if row["arm"] in ENGINE:  # the loop's optimizer is not DeepSpeed's
        assert time.total == pytest.approx(row["step_ms"], rel=0.10)
        assert time.optimizer == pytest.approx(row["step_ms"] - row["fwd_bwd_ms"], rel=0.05)


def _calibrated_then() -> Rates:
    """What `calibrate` measured on one H200. It timed 44 bytes of an optimizer's step a parameter then, and named the time."""
    values = json.loads((RESULTS / "2026-11-23_h200x1_calibrate.json").read_text())
    picoseconds = values.pop("optimizer_ps_per_parameter")
    points = {name: tuple(map(tuple, value)) for name, value in values.items() if isinstance(value, list)}
    return Rates(**(values | points), optimizer_gb_per_s=44 / picoseconds * 1e3)


@pytest.mark.parametrize("rates", [load_rates("h200"), _calibrated_then()], ids=["shipped", "calibrated"])
@pytest.mark.parametrize("row", one_gpu_rows(), ids=lambda row: f"{row['tokens']}-{row['recompute']}")
def test_step_times_of_one_gpu_are_predicted(row: dict[str, Any], rates: Rates) -> None:
    """Nothing of these runs is in the shipped rates; the optimizer's part is its bytes at a rate."""
    trace = trace_of(row["layers"], row["tokens"], row["recompute"], True, 1)
    time = predict(trace, rates, Zero(stage=1), tp_size=1, dp_size=1, gpus_per_node=8)
    assert time.forward_backward == pytest.approx(row["fwd_bwd_ms"], rel=0.10)
    assert time.optimizer == pytest.approx(row["step_ms"] - row["fwd_bwd_ms"], rel=0.12)
    assert time.total == pytest.approx(row["step_ms"], rel=0.10)


def test_the_shipped_rates_are_what_the_committed_profiles_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import fit_rates

    h200 = fit_rates.fit()
    for found in (h200, fit_rates.h100()):
        shipped = vars(load_rates(found.name.lower()))
        for name, value in vars(found).items():  # what a step reads and writes moves a little with the layers
            near = value if isinstance(value, str) else pytest.approx(_flat(value), rel=0.03)
            assert (shipped[name] if isinstance(value, str) else _flat(shipped[name])) == near, name


def _flat(rate: Any) -> list[float]:
    return [x for point in rate for x in point] if isinstance(rate, tuple) else [rate]


def _plan(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert main(["plan", *TINY, "--seq", "256", "--gpus", "2", "--rates", "h200", "--json", *more]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_the_best_choice_fits_and_its_json_is_one_that_trains(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = tmp_path / "mine.json"
    given.write_text(json.dumps({KEY: {"tp_size": 2, "loss_chunk_tokens": 64}, "gradient_accumulation_steps": 3}))
    found = _plan(capsys, "--config", str(given), "--write", str(tmp_path / "ds.json"))
    written = json.loads((tmp_path / "ds.json").read_text())
    best = found["best"]
    assert best["fits"] and best["split"] == 2 and best == found["choices"][0]
    key = SeqParConfig.from_json(written[KEY])
    assert (key.tp_size, key.loss_chunk_tokens, key.recompute) == (2, 64, Recompute(best["recompute"]))
    assert written["zero_optimization"]["stage"] == best["stage"] and written["bf16"]["enabled"]
    assert written["gradient_accumulation_steps"] == 3 and written["train_micro_batch_size_per_gpu"] == 1
    speeds = [choice["tokens_per_s_per_gpu"] for choice in found["choices"] if choice["fits"]]
    assert speeds == sorted(speeds, reverse=True)


def _losses_of(ds_config: dict[str, Any], sizes: dict[str, int]) -> list[float]:
    fresh_groups()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes), dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ds_config = {**ds_config, "zero_allow_untested_optimizer": True}  # torch's AdamW, which DeepSpeed has not tested
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)[0]
    losses, ids = [], torch.arange(64).view(1, 64)
    for _ in range(4):
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    assert engine.seqpar_report is not None
    return losses


def test_the_json_that_is_written_trains(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps({KEY: {"tp_size": 2}, "zero_optimization": {"stage": 1}}))
    _plan(capsys, "--config", str(tmp_path / "mine.json"), "--write", str(tmp_path / "ds.json"))
    sizes = {name: int(value) for name, _, value in (word.partition("=") for word in TINY[2:])}
    for losses in run_ranks(2, _losses_of, json.loads((tmp_path / "ds.json").read_text()), sizes):
        assert losses[-1] < 0.9 * losses[0]


def test_the_longest_sequence_fits_and_a_longer_one_does_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({KEY: {"tp_size": 2, "recompute": "none", "loss_chunk_tokens": 8192}}))
    common = ("--gpu-memory", "3.1GiB", "--zero", "1", "--config", str(tmp_path / "ds.json"))
    (choice,) = _plan(capsys, *common)["choices"]
    assert choice["fits"] and choice["longest"] > 1024
    for seq, fits in ((choice["longest"], True), (choice["longest"] * 11 // 10, False)):
        (choice,) = _plan(capsys, *common, "--seq", str(seq), "--rows", "1")["choices"]
        assert choice["fits"] is fits


class _PlayedMemory(choices._Planner):
    """Memory as a step's own, which no length changes, or as activations are, whichever is more."""

    def __init__(self, gpu_memory: int, step: int) -> None:
        self.request: Any = SimpleNamespace(seq=64, gpu_memory=gpu_memory, micro_batch=1, zero=Zero())
        self.step = step

    def trace(self, strategy: str, split: int, recompute: Recompute, seq: int) -> Any:
        assert seq <= choices.TRACED
        return seq

    def memory(self, trace: Any, zero: Zero, strategy: str, split: int) -> Any:
        return (SimpleNamespace(total=max(self.step, 1000 + 3 * trace)), None)


@pytest.mark.parametrize(
    ("step", "gpu_memory", "longest"),
    [(10**6, 10**5, 0), (10**6, 2 * 10**6, 646_272), (10**6, 10**7, 3_232_960), (10**9, 2 * 10**9, None)],
)
def test_a_step_that_no_length_changes_does_not_make_any_length_fit(
    step: int, gpu_memory: int, longest: int | None
) -> None:
    """None: no length that is looked at changes the memory."""
    choice: Any = SimpleNamespace(strategy=choices.SEQPAR, split=2, recompute=Recompute.NONE, stage=1)
    found = _PlayedMemory(gpu_memory, step).longest(choice)
    if longest is None:
        assert found == choices.MOST_TOKENS
    else:
        assert abs(found - longest) <= 64 and (
            found == 0 or max(step, 1000 + 3 * found) <= gpu_memory * (1 - choices.FREE)
        )


def test_the_table_names_what_was_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "--seq", "64", "--gpus", "8", "--rates", "h200", "--zero", "1"]) == 0
    out = capsys.readouterr().out
    assert (
        "ds_seqpar 2" in out and "best: " in out and "not planned: Ulysses" in out and "not planned: ds_seqpar 8" in out
    )


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nonesuch", "--seq", "64", "--gpus", "2"], "neither a folder"),
        (["t5", "--seq", "64", "--gpus", "2"], "t5"),
        (["mamba", "--seq", "64", "--gpus", "2"], "mamba"),
        (["meta-llama/Llama-3.1-8B", "--seq", "64", "--gpus", "2"], "gated"),
        ([*TINY, "--seq", "1000000000000", "--gpus", "2"], "beyond what can be planned"),
        ([*TINY, "--seq", "64", "--gpus", "12"], "--nodes"),
        ([*TINY, "--seq", "64", "--gpus", "6", "--nodes", "4"], "6 GPUs do not lie evenly on 4 nodes"),
        ([*TINY, "--seq", "64", "--gpus", "2", "--config", "TP3"], "3 does not divide the 2 GPUs"),
        ([*TINY, "--seq", "64", "--gpus", "2", "--config", "/nonexistent.json"], "no JSON file"),
        ([*TINY, "--seq", "64", "--gpus", "2", "--rates", "b300"], "there are no rates 'b300'"),
        ([*TINY, "--seq", "64", "--gpus", "2", "--gpu-memory", "1MiB", "--write", "OUT"], "nothing fits"),
        (["llama", "--sizes", "hidden_size=-8", "--seq", "64", "--gpus", "2"], ""),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "tp3.json").write_text(json.dumps({KEY: {"tp_size": 3}}))
    names = {"TP3": str(tmp_path / "tp3.json"), "OUT": str(tmp_path / "out.json")}
    assert main(["plan", *(names.get(word, word) for word in argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    "more", [["--seq", "0"], ["--seq", "-5"], ["--seq", "64", "--gpu-memory", "-80GiB"], ["--seq", "64", "--gpus", "0"]]
)
def test_sizes_that_cannot_be_are_refused_by_the_command_line(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *TINY, "--gpus", "2", *more])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and repr(more[-1]) in error


def test_calibrate_on_the_cpu_makes_rates_that_plan_takes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    assert main(["calibrate", "--out", str(path)]) == 0
    capsys.readouterr()
    rates = load_rates(str(path))
    assert rates.name == "CPU" and "links between nodes and the host are the H200's" in rates.source
    assert 0 < rates.gemm_tflops[-1][1] < 50 and 0 < rates.traffic_gb_per_s < 2000
    slow = _plan(capsys, "--rates", str(path))["best"]["time"]["total"]
    assert slow > _plan(capsys)["best"]["time"]["total"]


def test_info_says_what_falls_back_and_what_becomes_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", *TINY, "--tp-size", "2"]) == 0
    out = capsys.readouterr().out
    assert "torch " in out and "transport" in out and "fused" in out
    assert "ColumnParallelLinear: weight cut [128, 64]->[64, 64]" in out
    assert main(["info", "t5"]) == 2


def test_json_is_alone_on_standard_output() -> None:
    """DeepSpeed, too, writes there when it finds no accelerator and nobody has named one."""
    command = [
        sys.executable,
        "-m",
        "ds_seqpar",
        "plan",
        *TINY,
        "--seq",
        "64",
        "--gpus",
        "2",
        "--rates",
        "h200",
        "--json",
    ]
    named = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=named)
    assert json.loads(done.stdout)["best"]


def test_bash_completes_commands_and_options() -> None:
    script = completion_script("bash")
    ask = 'COMP_WORDS=(ds_seqpar {}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _ds_seqpar; echo "${{COMPREPLY[@]}}"'

    def completed(words: str) -> str:
        command = ["bash", "-c", f"{script}\n{ask.format(words)}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert set(completed("''").split()) == set(COMMANDS)
    assert completed("plan --gpu").split() == ["--gpus", "--gpu-memory"]


def test_help_shows_an_example_of_every_step() -> None:
    done = subprocess.run([sys.executable, "-m", "ds_seqpar", "--help"], capture_output=True, text=True, check=True)
    assert "plan my-checkpoint --seq 65536" in done.stdout and all(name in done.stdout for name in COMMANDS)


@pytest.mark.slow
def test_plots_are_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _plan(capsys, "--plot", str(tmp_path), "--rows", "2")
    for name in ("memory.png", "longest.png", "time.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
