"""The commands of the planner: step times against committed runs, choices, bad input, calibration, info, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from exactness import fresh_groups
from ranks import run_ranks
from test_memory import ENGINE, LOOP, RESULTS, case_of, h100_rows, llama_8b, new_rows, one_gpu_rows, rows, trace_of
from transformers import AutoConfig, AutoModelForCausalLM

from ds_seqpar.cli import COMMANDS, completion_script, main
from ds_seqpar.config import KEY, Recompute, SeqParConfig
from ds_seqpar.errors import ConfigError
from ds_seqpar.hf import planned_config
from ds_seqpar.planner import choices
from ds_seqpar.planner.given import write_whole
from ds_seqpar.planner.memory import Zero
from ds_seqpar.planner.rates import HOST, Rates, load_rates, save_rates
from ds_seqpar.planner.step import trace_step
from ds_seqpar.planner.steptime import StepTime, launched, predict

TINY = [
    "llama", "--sizes", "hidden_size=64", "intermediate_size=128", "num_hidden_layers=3", "num_attention_heads=4",
    "num_key_value_heads=2", "vocab_size=256", "head_dim=16",
]  # fmt: skip


def _predicted(row: dict[str, Any], rates: Rates, tp_size: int = 2, dp_size: int = 1) -> StepTime:
    trace = trace_of(row["layers"], row["tokens"], row["recompute"], row["arm"] != "seqpar_tp_only", tp_size)
    if row["arm"] in LOOP:  # no engine
        rates = replace(rates, host_engine_us=0.0)
    return predict(trace, rates, Zero(stage=row["zero"]), tp_size=tp_size, dp_size=dp_size, gpus_per_node=8)


# What went through the engine then waited for its timer and for copies of gradients; the plain loop did not.
H100 = h100_rows("seqpar_loop")
FITTED = [row for row in h100_rows("seqpar_loop", of=("h100x4_compare",)) if (row["tp"], row["tokens"]) == (4, 8192)]


@pytest.mark.parametrize("row", [row for row in H100 if row["tp"] == 2 or row["tokens"] > 8192] + FITTED, ids=case_of)
def test_step_times_of_two_and_four_h100_are_predicted(row: dict[str, Any]) -> None:
    """By the rates of another H100 and host times fitted to four H100 at 8192 tokens; nothing of two H100 is in either.

    Four GPUs at 8192 tokens wait for their host, which on another machine is another one: only the fitted runs are asked of.
    """
    time = _predicted(row, load_rates("h100"), row["tp"], row["ranks"] // row["tp"])
    off = 0.08 if row["tp"] == 2 or row in FITTED else 0.1
    assert time.forward_backward == pytest.approx(row["fwd_bwd_ms"], rel=off)
    if row["arm"] == "seqpar":
        assert time.total == pytest.approx(row["step_ms"], rel=off)


NEW = new_rows("seqpar", "seqpar_loop", "seqpar_tp_only")


@pytest.mark.parametrize("row", NEW, ids=case_of)
def test_step_times_of_the_code_as_it_is_are_predicted(row: dict[str, Any]) -> None:
    """Nothing of these runs is in the rates."""
    time = _predicted(row, load_rates(row["rates"]))
    assert time.forward_backward == pytest.approx(row["fwd_bwd_ms"], rel=0.08)
    if row["arm"] in ENGINE:
        assert time.total == pytest.approx(row["step_ms"], rel=0.08)


@pytest.mark.parametrize("row", [row for row in NEW if row["run"] == "2026-11-28_h200x2_compare"], ids=case_of)
def test_step_times_are_predicted_by_what_was_calibrated_there(row: dict[str, Any]) -> None:
    """`calibrate` on the machine of the run, the host on a rank of two included."""
    rates = load_rates(str(RESULTS / "2026-11-28_h200x2_calibrate.json"))
    assert "the host's launches" in rates.source.split(";")[0]
    time = _predicted(row, rates)
    assert time.forward_backward == pytest.approx(row["fwd_bwd_ms"], rel=0.05)
    if row["arm"] in ENGINE:
        assert time.total == pytest.approx(row["step_ms"], rel=0.05)


def test_the_step_time_of_32_layers_is_predicted() -> None:
    (row,) = map(json.loads, (RESULTS / "2026-11-28_h200x1_check_plan_32_layers.jsonl").read_text().splitlines())
    time = predict(
        trace_of(32, 8192, "full", True, 1), load_rates("h200"), Zero(stage=3), tp_size=1, dp_size=1, gpus_per_node=8
    )
    assert time.total == pytest.approx(row["measured"]["step_ms"], rel=0.1)


def test_one_rank_of_few_tokens_takes_its_hosts_time() -> None:
    """One of the runs that the host's times are fitted to: 512 tokens are 10 ms of a GPU's work."""
    row = json.loads((RESULTS / "2026-11-27_h100x1_one_rank.jsonl").read_text().splitlines()[0])
    time = _predicted(row | {"arm": "seqpar_loop", "recompute": "none", "zero": 0}, load_rates("h100"))
    assert time.forward_backward == pytest.approx(row["fwd_bwd_ms"], rel=0.05)
    assert time.host > 0.8 * time.forward_backward


def test_a_gpu_waits_for_its_host_as_far_as_the_host_is_behind() -> None:
    row = {"layers": 8, "tokens": 8192, "recompute": "none", "arm": "seqpar_loop", "zero": 0}
    h100, waits = load_rates("h100"), []
    for times in (0.0, 1.0, 2.0, 4.0):
        host = {name: times * getattr(h100, name) for name in ("host_forward_us", "host_backward_us")}
        waits.append(_predicted(row, replace(h100, **host)).host)
    assert waits[:2] == [0.0, 0.0] and 0 < waits[2] < waits[3]  # two GPUs at this length hide a host as it is
    forward, backward = (
        trace_of(8, 8192, "none", True, 4).forward_work,
        trace_of(8, 8192, "none", True, 4).backward_work,
    )
    behind = 4e-3 * (h100.host_forward_us * launched(forward, 4) + h100.host_backward_us * launched(backward, 4))
    host = {name: 4 * getattr(h100, name) for name in ("host_forward_us", "host_backward_us")}
    assert _predicted(row, replace(h100, **host), 4).forward_backward == pytest.approx(behind)


def test_layers_of_transformers_are_launched_at_a_rate_of_their_own() -> None:
    plain = trace_step(llama_8b(2), SeqParConfig.from_json({"tp_size": 1}), batch=1, seq=64, plain=True)
    rates = replace(load_rates("h100"), host_engine_us=0.0)
    common: dict[str, Any] = dict(tp_size=1, dp_size=1, gpus_per_node=8)
    found = [predict(plain, replace(rates, host_plain_us=us), Zero(stage=3), **common).host for us in (1e3, 2e3)]
    operations = plain.work.operations
    assert found[1] - found[0] == pytest.approx(operations, rel=1e-6) and operations > 100


def test_rates_saved_before_the_host_was_measured_still_load(tmp_path: Path) -> None:
    values = json.loads((RESULTS / "2026-11-27_h100x1_calibrate.json").read_text())
    assert not any(name.endswith("_us") and name.startswith("host") for name in values)
    (tmp_path / "old.json").write_text(json.dumps(values))
    rates = load_rates(str(tmp_path / "old.json"))
    assert rates.host_forward_us == pytest.approx(load_rates("h100").host_forward_us, rel=0.01)
    assert "the host's times are the H100's" in rates.source and "calibrate" in rates.source


def _long(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Short steps of those days took 10 ms more, which are gone: copies of gradients, a timer, an fp32 sum, launches."""
    return [row for row in found if row["tokens"] > 8192]


@pytest.mark.parametrize(
    "row",
    [
        *_long(rows(*ENGINE, *LOOP, of=("compare",))),
        *(row for row in _long(rows(*ENGINE, *LOOP, of=("second_fast_paths",))) if row["recompute"] == "full"),
    ],
    ids=lambda row: f"{row['arm']}-{row['tokens']}-{row['recompute']}",
)
def test_step_times_of_gpu_runs_are_predicted(row: dict[str, Any]) -> None:
    """By rates fitted to profiles of other runs; 65536 tokens, recompute and tp only are in none of those."""
    time = _predicted(row, load_rates("h200"))
    assert time.forward_backward == pytest.approx(row["fwd_bwd_ms"], rel=0.07)
    if row["arm"] in ENGINE:  # the loop's optimizer is not DeepSpeed's
        assert time.total == pytest.approx(row["step_ms"], rel=0.06)
        assert time.optimizer == pytest.approx(row["step_ms"] - row["fwd_bwd_ms"], rel=0.05)


def _calibrated_then() -> Rates:
    """What `calibrate` measured on one H200. It timed 44 bytes of an optimizer's step a parameter then, and named the time."""
    values = json.loads((RESULTS / "2026-11-23_h200x1_calibrate.json").read_text())
    picoseconds = values.pop("optimizer_ps_per_parameter")
    points = {name: tuple(map(tuple, value)) for name, value in values.items() if isinstance(value, list)}
    host = {name: getattr(load_rates("h100"), name) for name in HOST}
    return Rates(**(values | points | host), optimizer_gb_per_s=44 / picoseconds * 1e3)


@pytest.mark.parametrize("rates", [load_rates("h200"), _calibrated_then()], ids=["shipped", "calibrated"])
@pytest.mark.parametrize("row", _long(one_gpu_rows()), ids=lambda row: f"{row['tokens']}-{row['recompute']}")
def test_step_times_of_one_gpu_are_predicted(row: dict[str, Any], rates: Rates) -> None:
    """Nothing of these runs is in the shipped rates; the optimizer's part is its bytes at a rate."""
    trace = trace_of(row["layers"], row["tokens"], row["recompute"], True, 1)
    time = predict(trace, rates, Zero(stage=1), tp_size=1, dp_size=1, gpus_per_node=8)
    assert time.forward_backward == pytest.approx(row["fwd_bwd_ms"], rel=0.06)
    assert time.optimizer == pytest.approx(row["step_ms"] - row["fwd_bwd_ms"], rel=0.07)
    assert time.total == pytest.approx(row["step_ms"], rel=0.05)


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
    """What `plan --json` prints of two GPUs and 256 tokens: two choices if `more` says nothing else, as each takes some traces."""
    rows = () if "--rows" in more else ("--rows", "2")
    assert main(["plan", *TINY, "--seq", "256", "--gpus", "2", "--rates", "h200", "--json", *rows, *more]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_the_best_choice_fits_and_its_json_is_one_that_trains(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = tmp_path / "mine.json"
    given.write_text(json.dumps({KEY: {"tp_size": 2, "loss_chunk_tokens": 64}, "gradient_accumulation_steps": 3}))
    found = _plan(capsys, "--config", str(given), "--write", str(tmp_path / "ds.json"), "--rows", "12")
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
    """Memory as a step's own, or a backward's end, which no length changes, or as activations are, whichever is more."""

    def __init__(self, gpu_memory: int, step: int, end: int) -> None:
        self.request: Any = SimpleNamespace(seq=64, gpu_memory=gpu_memory, micro_batch=1, zero=Zero())
        self.step, self.end, self.key = step, end, {}

    def trace(self, strategy: str, split: int, recompute: Recompute, seq: int) -> Any:
        assert seq <= choices.MOST_TRACED * SeqParConfig.loss_chunk_tokens
        return seq

    def memory(self, trace: Any, zero: Zero, strategy: str, split: int) -> Any:
        peak = max(self.end, 1000 + 3 * trace)
        return SimpleNamespace(peak=peak, peak_step=self.step, beside=0, total=max(peak, self.step)), None


@pytest.mark.parametrize(
    ("step", "end", "gpu_memory", "longest"),
    [
        (10**6, 0, 10**5, 0),
        (10**5, 0, 5 * 10**5, 161_280),
        (10**6, 0, 10**7, 3_231_744),
        (10**5, 6 * 10**5, 2 * 10**6, 643_072),  # activations are more from 199,666 tokens on
        (10**5, 9 * 10**5, 2 * 10**6, 643_072),  # from 299,666 on: beyond TRACED
        (10**9, 0, 2 * 10**9, None),
    ],
)
def test_a_step_that_no_length_changes_does_not_make_any_length_fit(
    step: int, end: int, gpu_memory: int, longest: int | None
) -> None:
    """None: no length that is looked at changes the memory."""
    choice: Any = SimpleNamespace(strategy=choices.SEQPAR, split=2, recompute=Recompute.NONE, stage=1)
    found = _PlayedMemory(gpu_memory, step, end).longest(choice)
    if longest is None:
        assert found == choices.MOST_TOKENS
    else:
        assert found == longest
        assert found == 0 or max(step, end, 1000 + 3 * found) <= gpu_memory * (1 - choices.FREE)


def test_a_trace_leaves_nothing_behind_for_the_next() -> None:
    config = planned_config("llama", {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4})
    before = config.to_dict()
    first, second = (trace_step(config, SeqParConfig(tp_size=2), batch=1, seq=64) for _ in range(2))
    assert first == second and config.to_dict() == before


def test_the_table_names_what_was_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "--seq", "64", "--gpus", "8", "--rates", "h200", "--zero", "3", "--rows", "3"]) == 0
    out = capsys.readouterr().out
    assert "exposed: communication" in out and "host: the GPU waits" in out
    assert (
        "ds_seqpar 1 " in out
        and "best: " in out
        and "not planned: Ulysses" in out
        and "not planned: ds_seqpar 8" in out
    )


def test_the_table_says_when_the_host_is_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "--seq", "64", "--gpus", "2", "--rates", "h200", "--zero", "1", "--rows", "1"]) == 0
    assert "the host is the limit here" in capsys.readouterr().out
    shape = ["llama", "--sizes", "num_hidden_layers=2", "--gpus", "2", "--rates", "h200", "--rows", "1"]
    assert main(["plan", *shape, "--seq", "32768"]) == 0
    assert "the host is the limit" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nonesuch", "--seq", "64", "--gpus", "2"], "neither a folder"),
        (["t5", "--seq", "64", "--gpus", "2"], "t5"),
        (["dory", "--seq", "64", "--gpus", "2"], "dory"),
        (["meta-llama/Llama-3.1-8B", "--seq", "64", "--gpus", "2"], "gated"),
        ([*TINY, "--seq", "1000000000000", "--gpus", "2"], "beyond what can be planned"),
        ([*TINY, "--seq", "64", "--gpus", "12"], "--nodes"),
        ([*TINY, "--seq", "64", "--gpus", "6", "--nodes", "4"], "6 GPUs do not lie evenly on 4 nodes"),
        ([*TINY, "--seq", "64", "--gpus", "2", "--config", "TP3"], "3 does not divide the 2 GPUs"),
        ([*TINY, "--seq", "64", "--gpus", "2", "--config", "/nonexistent.json"], "no JSON file"),
        ([*TINY, "--seq", "64", "--gpus", "2", "--rates", "b300"], "there are no rates 'b300'"),
        ([*TINY, "--seq", "64", "--gpus", "2", "--gpu-memory", "1MiB", "--write", "OUT"], "nothing fits"),
        (["llama", "--sizes", "hidden_size=-8", "--seq", "64", "--gpus", "2"], "hidden_size=-8"),
        ([*TINY, "vocab_size=0", "--seq", "64", "--gpus", "2"], "vocab_size=0"),
        ([*TINY, "hidden_sise=64", "--seq", "64", "--gpus", "2"], "did you mean hidden_size?"),
        (["llama", "--sizes", "hidden_size=big", "--seq", "64", "--gpus", "2"], "expected int, got str"),
        (["bert", "--seq", "64", "--gpus", "2"], "encoder"),
        (["", "--seq", "64", "--gpus", "2"], "neither a folder"),
        (["./missing", "--seq", "64", "--gpus", "2"], "neither a folder"),
        ([*TINY, "--seq", "64", "--gpus", str(10**20)], "at most 1048576"),
        ([*TINY, "--seq", "64", "--gpus", "2", "--zero", "0", "--offload-optimizer"], "--zero 1, 2 or 3"),
        ([*TINY, "--seq", "64", "--gpus", "2", "--write", "/nonexistent/ds.json"], "no folder /nonexistent"),
        ([*TINY, "--seq", "64", "--gpus", "2", "--write", "FOLDER"], "is a folder"),
        ([*TINY, "--seq", "64", "--gpus", "2", "--plot", "TP3"], "is a file; name a folder"),
        ([*TINY, "--seq", "64", "--gpus", "2", "--rates", "TP3"], "holds no rates"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "tp3.json").write_text(json.dumps({KEY: {"tp_size": 3}}))
    names = {"TP3": str(tmp_path / "tp3.json"), "OUT": str(tmp_path / "out.json"), "FOLDER": str(tmp_path)}
    assert main(["plan", *(names.get(word, word) for word in argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    "more",
    [
        ["--gpu-memory", "80"],
        ["--gpu-memory", "1e400"],
        ["--gpu-memory", "80GBB"],
        ["--seq", "\u0663"],
        ["--seq", "0"],
        ["--seq", "-5"],
        ["--seq", "64", "--gpu-memory", "-80GiB"],
        ["--seq", "64", "--gpus", "0"],
    ],
)
def test_sizes_that_cannot_be_are_refused_by_the_command_line(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *TINY, "--gpus", "2", "--seq", "64", *more])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and repr(more[-1]) in error


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"broken', "no JSON file"),
        ("[]", "must hold a JSON object"),
        ('{"zero_optimization": 3}', '"zero_optimization" must be an object'),
        (
            '{"zero_optimization": {"offload_optimizer": "cpu"}}',
            '"zero_optimization.offload_optimizer" must be an object',
        ),
        ('{"zero_optimization": {"stage": 7}}', "must be 0, 1, 2 or 3, not 7"),
        ('{"gradient_accumulation_steps": 0}', '"gradient_accumulation_steps" must be a whole number'),
        ('{"train_micro_batch_size_per_gpu": "two"}', '"train_micro_batch_size_per_gpu" must be a whole number'),
        ('{"ds_seqpar": {"tp_size": 2, "wat": 1}}', "unknown field(s) ['wat']"),
    ],
)
def test_a_json_that_deepspeed_would_not_take_is_refused_by_its_field(
    text: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text(text)
    assert main(["plan", *TINY, "--seq", "64", "--gpus", "2", "--config", str(tmp_path / "ds.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error


def test_what_of_a_json_is_planned_otherwise_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "train_batch_size": 64,
        "sequence_parallel_size": 4, "tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": 1},
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(given))
    args = ["--config", str(tmp_path / "ds.json"), "--write", str(tmp_path / "out.json"), "--json", "--rows", "1"]
    assert main(["plan", *TINY, "--seq", "64", "--gpus", "2", "--rates", "h200", *args]) == 0
    notes = capsys.readouterr().err
    assert all(f'"{name}' in notes for name in given if name != "zero_optimization")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["train_micro_batch_size_per_gpu"] == 1 and written["gradient_accumulation_steps"] == "auto"
    assert not {"train_batch_size", "sequence_parallel_size"} & set(written) and written["tensor_parallel"] == {}


def test_a_stage_that_is_asked_for_is_the_stage_of_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    found = _plan(capsys, "--zero", "1", "--rows", "6")
    assert {choice["stage"] for choice in found["choices"]} == {1}
    assert "stage 1 was asked for" in found["refused"]["ZeRO alone"]


def test_a_file_that_is_there_stays_whole_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tmp_path / "ds.json"
    saved.write_text("mine")
    full = OSError(28, "No space left on device")

    def half(path: Path, text: str) -> int:
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise full

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(ConfigError, match=r"ds\.json was not written: No space left"):
        write_whole(saved, "a new one")
    with pytest.raises(ConfigError, match="not written"):
        save_rates(load_rates("h200"), saved)
    assert saved.read_text() == "mine" and list(tmp_path.iterdir()) == [saved]


def test_calibrate_says_that_it_cannot_write_before_it_measures(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ds_seqpar.planner.calibrate.calibrate", lambda: pytest.fail("measured for nothing"))
    assert main(["calibrate", "--out", str(tmp_path)]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err


def test_calibrate_on_the_cpu_makes_rates_that_plan_takes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    assert main(["calibrate", "--out", str(path)]) == 0
    capsys.readouterr()
    rates = load_rates(str(path))
    assert rates.name == "CPU" and "optimizer, the host's launches; " in rates.source
    assert "links between nodes, links to the host's memory and what DeepSpeed does" in rates.source
    shipped = load_rates("h200")
    for name in ("host_forward_us", "host_backward_us", "host_plain_us"):
        assert 1 < getattr(rates, name) < 5000 and getattr(rates, name) != getattr(shipped, name)
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
    asked = [*TINY, "--seq", "64", "--gpus", "1", "--rates", "h200", "--zero", "1", "--rows", "1", "--json"]
    command = [sys.executable, "-m", "ds_seqpar", "plan", *asked]
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
