"""Predicted memory against measured: held activations to the byte on the CPU, peaks of committed GPU runs within 5 %."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from model_types import tiny_of
from models import FAMILIES, tiny
from ranks import ON_GPU, live_tensors, run_ranks
from transformers import AutoConfig

import ds_seqpar
from ds_seqpar.config import SeqParConfig
from ds_seqpar.layers import loss
from ds_seqpar.planner.memory import Zero, estimate
from ds_seqpar.planner.step import StepTrace, trace_step

GIB = 2.0**30
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
_GROUPED = dict(experts=None, output_router_logits=False, dtype=torch.bfloat16)
"""Products of all experts at once, the default on GPUs, in the dtype that they know without values."""
OWN: dict[str, dict[str, Any]] = {
    "llama": dict(num_hidden_layers=4),
    "mixtral": dict(_GROUPED, intermediate_size=64),
    "qwen3_moe": dict(_GROUPED, moe_intermediate_size=32),
    "deepseek_v3": dict(_GROUPED, moe_intermediate_size=32, intermediate_size=64),
}


KINDS = ("llama", "qwen3", "gemma2", "olmo2", "gpt_neox", "gptj", "gpt2", "falcon", "bloom", "opt")


def _model(family: str) -> Any:
    own = dict(OWN.get(family, {}))
    model = tiny(family, **own) if family in FAMILIES else tiny_of(family, **{"dtype": torch.float32, **own})
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, parameter in model.named_parameters():  # as Hugging Face loads them
        if any(part in name for part in kept):
            parameter.data = parameter.data.float()
    return model


class _Saved:
    """Lives as long as the graph keeps what was saved."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _held(family: str, key: dict[str, Any], batch: int, seq: int) -> int:
    """Bytes of all storages that a forward leaves behind while its loss lives: saved for backward, or held by Python."""
    model = _model(family).train()
    ds_seqpar.shard(model, key)
    ids = torch.randint(3, 101, (batch, seq), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids, use_cache=False)  # fills what is kept for good
    there = {id(x): x for x in live_tensors()}  # kept, so that no new one gets its id
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    packed: list[weakref.ref[_Saved]] = []

    def pack(x: torch.Tensor) -> _Saved:
        saved = _Saved(x)
        packed.append(weakref.ref(saved))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    alive = [x for x in live_tensors() if id(x) not in there]
    saved = [found.tensor for found in (ref() for ref in packed) if found is not None]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (*alive, *saved)}
    assert loss.requires_grad
    generator = torch.get_rng_state().nbytes  # torch's checkpoint keeps the CPU's generator, on a GPU beside its memory
    return sum(nbytes for at, nbytes in storages.items() if at not in own and nbytes != generator)


def _compare(family: str, tp: int, key: dict[str, Any], batch: int = 2, seq: int = 16) -> None:
    model, key = _model(family), {"tp_size": tp, **key}
    config, dtype = copy.deepcopy(model.config), next(model.parameters()).dtype
    measured = run_ranks(tp, _held, family, key, batch, seq)
    for rank in (0, tp - 1):
        trace = trace_step(
            config, SeqParConfig.from_json(key), batch=batch, seq=seq, dtype=dtype, tp_rank=rank, on_gpu=False
        )
        assert sum(trace.held.values()) == measured[rank], f"rank {rank}: {trace.held}"


cpu_only = pytest.mark.skipif(ON_GPU, reason="compares with the CPU's kernels")


@cpu_only
@pytest.mark.parametrize(
    ("family", "tp", "key"),
    [
        ("llama", 2, {}),
        ("llama", 4, {"recompute": "selective"}),  # copied kv heads
        ("llama", 2, {"recompute": "full"}),
        ("qwen3", 2, {"sequence_parallel": False}),  # q and k norms
        ("gpt_neox", 2, {}),  # packed q, k, v; parallel block; gelu
        ("mixtral", 2, {}),
        ("deepseek_v3", 2, {}),
    ],
)
def test_held_activations_are_predicted_to_the_byte(family: str, tp: int, key: dict[str, Any]) -> None:
    _compare(family, tp, key)


@cpu_only
@pytest.mark.slow
@pytest.mark.parametrize(("tp", "family"), [(tp, f) for f in KINDS for tp in (2, 4) if (tp, f) != (4, "falcon")])
@pytest.mark.parametrize("key", [{}, {"recompute": "selective"}, {"recompute": "full"}, {"sequence_parallel": False}])
def test_held_activations_of_every_kind_of_layer(family: str, tp: int, key: dict[str, Any]) -> None:
    _compare(family, tp, key, batch=1 if family == "opt" else 3, seq=7)


@cpu_only
@pytest.mark.slow
@pytest.mark.parametrize("key", [{}, {"recompute": "selective"}, {"recompute": "full"}])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "phi3", "qwen3_moe"])
def test_held_activations_of_experts_and_latent_attention(family: str, key: dict[str, Any]) -> None:
    _compare(family, 2, key)


def rows(
    *arms: str, of: tuple[str, ...] = ("compare", "first_fast_paths", "second_fast_paths")
) -> list[dict[str, Any]]:
    """Of the committed comparisons on two H200, the successful ones of these arms."""
    return _rows_of([f"2026-11-23_h200x2_{name}" for name in of], arms)


NEW_RUNS = {
    "2026-11-28_h100x2_compare": "h100",
    "2026-11-28_h200x2_compare": "h200",
    "2026-11-28_h200x2_second_compare": "h200",
}
"""Run -> GPU; since gradients of one data-parallel rank stay where they are made."""
H100_RUNS = ("h100x2_compare", "h100x2_all_arms", "h100x4_compare", "h100x4_second_compare")


def h100_rows(*arms: str, of: tuple[str, ...] = H100_RUNS) -> list[dict[str, Any]]:
    """Of the committed comparisons on two and four H100, 8 and 32 layers."""
    return [row for row in _rows_of([f"2026-11-27_{name}" for name in of], arms) if row["model"] == "8b"]


def new_rows(*arms: str) -> list[dict[str, Any]]:
    """Of the comparisons on two GPUs with the code as it is; `rates` names the GPU, `run` the file."""
    return [row | {"rates": gpu, "run": name} for name, gpu in NEW_RUNS.items() for row in _rows_of([name], arms)]


def _rows_of(names: list[str], arms: tuple[str, ...]) -> list[dict[str, Any]]:
    found = [json.loads(line) for name in names for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
    return [row for row in found if row["status"] == "ok" and row["arm"] in arms]


def llama_8b(layers: int) -> Any:
    """The benchmark's model."""
    return AutoConfig.for_model(
        "llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip


@functools.cache
def trace_of(layers: int, tokens: int, recompute: str, sequence_parallel: bool, tp_size: int = 2) -> StepTrace:
    """A rank's step of the benchmark."""
    key = {"tp_size": tp_size, "recompute": recompute, "sequence_parallel": sequence_parallel}
    return trace_step(llama_8b(layers), SeqParConfig.from_json(key), batch=1, seq=tokens)


def one_gpu_rows() -> list[dict[str, Any]]:
    """Of the committed check on one H200: a case with what was measured."""
    lines = (RESULTS / "2026-11-23_h200x1_check_plan.jsonl").read_text().splitlines()
    return [row | row["measured"] | {"arm": "seqpar"} for row in map(json.loads, lines) if row["status"] == "ok"]


def _case(row: dict[str, Any]) -> str:
    return f"{row['arm']}-{row['tokens']}-{row['recompute']}"


ENGINE, LOOP = ("seqpar", "seqpar_tp_only"), ("seqpar_loop", "seqpar_plain")


def _twice_held(row: dict[str, Any]) -> int:
    """When these rows were measured, every recomputed layer held the input of its second norm, too."""
    return row["layers"] * row["tokens"] // 2 * 4096 * 2 if row["recompute"] == "full" else 0


def _zero(stage: int) -> Zero:
    """When these rows were measured, DeepSpeed copied gradients over one data-parallel rank, too."""
    return Zero(stage=stage, in_place=False)


@pytest.mark.parametrize("row", rows(*ENGINE, *LOOP), ids=_case)
def test_memory_of_gpu_runs_is_predicted(row: dict[str, Any]) -> None:
    trace = trace_of(row["layers"], row["tokens"], row["recompute"], row["arm"] != "seqpar_tp_only")
    # The plain loop keeps fp32 masters and moments of all its parameters, as ZeRO does over one data-parallel rank.
    memory = estimate(trace, _zero(1 if row["arm"] in ENGINE else 0), dp_size=1)
    extra = _twice_held(row) / GIB
    assert memory.held_bytes / GIB + extra == pytest.approx(row["held_gib"], rel=0.001)
    assert memory.static / GIB == pytest.approx(row["static_gib"], rel=0.01)
    if not extra:
        assert memory.peak / GIB == pytest.approx(row["peak_gib"], rel=0.05)
    if row["arm"] in ENGINE:  # the loop's optimizer converts a gradient at a time
        assert memory.peak_step / GIB <= row["peak_step_gib"] * 1.05
        assert max(memory.peak + extra * GIB, memory.peak_step) / GIB == pytest.approx(row["peak_step_gib"], rel=0.05)


def case_of(row: dict[str, Any]) -> str:
    """Such as seqpar-8192-none-tp2-dp1-zero1."""
    return f"{_case(row)}-tp{row['tp']}-dp{row['ranks'] // row['tp']}-zero{row['zero']}{row.get('rates', '')}"


@pytest.mark.parametrize("row", new_rows("seqpar", "seqpar_loop", "seqpar_tp_only"), ids=case_of)
def test_memory_where_gradients_stay_in_place_is_predicted(row: dict[str, Any]) -> None:
    trace = trace_of(row["layers"], row["tokens"], row["recompute"], row["arm"] != "seqpar_tp_only", row["tp"])
    memory = estimate(trace, Zero(stage=row["zero"] if row["arm"] in ENGINE else 0), dp_size=1)
    assert memory.held_bytes / GIB == pytest.approx(row["held_gib"], rel=0.002)
    assert memory.static / GIB == pytest.approx(row["static_gib"], rel=0.01)
    assert memory.peak / GIB == pytest.approx(row["peak_gib"], rel=0.03)
    if row["arm"] in ENGINE:
        assert max(memory.peak, memory.peak_step) / GIB == pytest.approx(row["peak_step_gib"], rel=0.03)


def test_memory_of_32_layers_on_one_gpu_is_predicted() -> None:
    """ZeRO 3 on one H200: what fits of the whole 8B model with AdamW's state."""
    (row,) = map(json.loads, (RESULTS / "2026-11-28_h200x1_check_plan_32_layers.jsonl").read_text().splitlines())
    measured, trace = row["measured"], trace_of(32, 8192, "full", True, 1)
    memory = estimate(trace, Zero(stage=3), dp_size=1)
    assert memory.held_bytes / GIB == pytest.approx(measured["held_gib"], rel=1e-5)
    assert memory.static / GIB == pytest.approx(measured["static_gib"], rel=0.005)
    assert memory.peak / GIB == pytest.approx(measured["peak_gib"], rel=0.02)
    assert max(memory.peak, memory.peak_step) / GIB == pytest.approx(measured["peak_step_gib"], rel=0.02)


@pytest.mark.parametrize("row", h100_rows("seqpar", "seqpar_loop"), ids=case_of)
def test_memory_of_two_and_four_gpus_is_predicted(row: dict[str, Any]) -> None:
    """Up to 131072 tokens, with data-parallel groups, and ZeRO-3, under which a forward leaves gathered weights behind."""
    trace = trace_of(row["layers"], row["tokens"], row["recompute"], True, row["tp"])
    stage = row["zero"] if row["arm"] == "seqpar" else 0
    memory = estimate(trace, _zero(stage), dp_size=row["ranks"] // row["tp"])
    if stage < 3:
        assert memory.held_bytes / GIB == pytest.approx(row["held_gib"], rel=0.002)
    assert memory.static / GIB == pytest.approx(row["static_gib"], rel=0.01)
    assert memory.peak / GIB == pytest.approx(row["peak_gib"], rel=0.03)
    if stage:  # the loop's optimizer converts a gradient at a time
        assert max(memory.peak, memory.peak_step) / GIB == pytest.approx(row["peak_step_gib"], rel=0.03)


@pytest.mark.parametrize("row", one_gpu_rows(), ids=_case)
def test_memory_of_one_gpu_is_predicted(row: dict[str, Any]) -> None:
    memory = estimate(trace_of(row["layers"], row["tokens"], row["recompute"], True, 1), _zero(1), dp_size=1)
    mask = 2 * row["tokens"]  # which the embedding held when these rows were measured
    assert (memory.held_bytes + mask) / GIB == pytest.approx(row["held_gib"], rel=1e-5)
    assert memory.static / GIB == pytest.approx(row["static_gib"], rel=0.005)
    assert memory.peak / GIB == pytest.approx(row["peak_gib"], rel=0.02)
    assert max(memory.peak, memory.peak_step) / GIB == pytest.approx(row["peak_step_gib"], rel=0.02)


@pytest.mark.parametrize(("hidden", "tokens"), [(4096, 8192), (2048, 6144), (8192, 16384)])
def test_logits_made_at_once_take_no_more_memory_than_chunks(
    hidden: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = llama_8b(1)
    config.hidden_size = hidden
    key = SeqParConfig.from_json({"tp_size": 2})
    at_once = trace_step(config, key, batch=1, seq=tokens).head
    monkeypatch.setattr("ds_seqpar.layers.loss._tokens_at_once", lambda weight, options, wants: options.chunk_tokens)
    chunked = trace_step(config, key, batch=1, seq=tokens).head
    assert at_once.growth == chunked.growth
    assert at_once.peak <= chunked.peak * 1.02  # beside the logits: rows of the hidden state


def test_whole_layers_recomputed_hold_their_input_shards_alone() -> None:
    key = SeqParConfig.from_json({"tp_size": 2, "recompute": "full"})
    held = trace_step(llama_8b(3), key, batch=1, seq=2048).held
    assert set(held) == {"embedding", "residual stream", "head and loss"}
    shard = 2048 // 2 * 4096 * 2
    assert held["residual stream"] == 3 * shard  # each layer's output; the first one's input is the embedding's


@pytest.mark.parametrize(
    ("family", "recompute"), [("llama", "none"), ("llama", "full"), ("gemma2", "none"), ("deepseek_v3", "none")]
)
def test_layers_left_out_are_like_those_that_are_traced(family: str, recompute: str) -> None:
    """Seven layers: one kind, two by turns, and a dense one before six of experts."""
    own = dict(OWN.get(family, {}), num_hidden_layers=7, attention_bias=False, mlp_bias=False)
    config = (tiny(family, **own) if family in FAMILIES else tiny_of(family, **own)).config
    key = SeqParConfig.from_json({"tp_size": 2, "recompute": recompute})
    few, every = (trace_step(config, key, batch=1, seq=64, every_layer=every) for every in (False, True))
    assert len(few.kinds.kept) < len(every.kinds.kept) == few.num_layers == every.num_layers == 7
    for figure in ("held", "parameters", "trainable", "trained_tensors"):
        assert getattr(few, figure) == getattr(every, figure), figure
    assert few.forward_work == every.forward_work
    for layer in range(7):
        assert few.backward(layer).work == every.backward(layer).work, layer
    # The sum of the norms' gradients, in `after`, is that of the traced layers: some kilobytes a layer.
    assert few.backward_head.work == every.backward_head.work
    assert few.after.work.operations == every.after.work.operations
    zero = Zero(stage=1)
    assert estimate(few, zero, dp_size=1) == estimate(every, zero, dp_size=1)


@pytest.mark.parametrize(
    ("family", "dtype", "seq", "key"),
    [
        ("llama", torch.float32, 256, {}),  # four chunks, none left out
        ("llama", torch.float32, 1001, {}),  # sixteen, of which the last is shorter
        ("llama", torch.bfloat16, 1001, {"sequence_parallel": False}),
        ("gemma2", torch.bfloat16, 320, {}),  # five; its logits have a softcap, so chunks keep more
    ],
)
def test_chunks_of_the_loss_that_do_not_run_count_as_those_that_do(
    family: str, dtype: torch.dtype, seq: int, key: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, runs = tiny(family).config, []
    asked = SeqParConfig.from_json({"tp_size": 2, "loss_chunk_tokens": 64, **key})
    plain = loss._chunk_loss
    monkeypatch.setattr("ds_seqpar.layers.loss._chunk_loss", lambda *given: (runs.append(1), plain(*given))[1])
    few = trace_step(config, asked, batch=1, seq=seq, dtype=dtype)
    assert len(runs) == 4
    monkeypatch.setattr("ds_seqpar.planner.step.few_chunks", lambda tracker: contextlib.nullcontext())
    every = trace_step(config, asked, batch=1, seq=seq, dtype=dtype)
    assert len(runs) == 4 + -(-seq // 64)
    assert few == every
