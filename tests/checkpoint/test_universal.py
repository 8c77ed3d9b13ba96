"""A run goes on at another tp, dp, world and ZeRO stage, through DeepSpeed's own converter: state bit for bit, losses to 1e-5."""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.affine import ParamAffineMap
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from training import engine_at, optimizer_states, run, weights

import ds_seqpar
from ds_seqpar.checkpoint.gathering import part_of
from ds_seqpar.checkpoint.universal import affine_map, affine_maps, require_universal
from ds_seqpar.plan.cuts import Cut

BEFORE, AFTER = 3, 6
SLOW = pytest.mark.slow


@st.composite
def cuts(draw: Any) -> tuple[tuple[int, ...], Cut]:
    """Uneven, packed and copied cuts of tensors of one to three dimensions."""
    tp, copies, sections = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    parts: list[list[tuple[int, int]]] = [[] for _ in range(tp)]
    start = 0
    for _ in range(sections):
        for rank in range(tp):
            stop = start + draw(st.integers(1, 3))
            parts[rank].append((start, stop))
            start = stop
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape) - 1))
    shape[dim] = start
    return tuple(shape), Cut(dim, start, tuple(tuple(parts[rank]) for rank in range(tp) for _ in range(copies)))


@given(cuts())
@settings(max_examples=100, deadline=None)
def test_maps_say_where_every_element_lies(example: tuple[tuple[int, ...], Cut]) -> None:
    shape, cut = example
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    theirs = ParamAffineMap.from_dict(affine_map(shape, cut, len(cut.ranges)))
    theirs.validate_coverage()
    shards = {rank: part_of(whole, cut, rank) for rank in range(len(cut.ranges))}
    assert all(torch.equal(theirs.extract(whole, rank), shard) for rank, shard in shards.items())
    assert torch.equal(theirs.rebuild(shards), whole)


def test_maps_of_uncut_parameters_and_patterns() -> None:
    for shape in ((), (5,), (2, 3)):
        theirs = ParamAffineMap.from_dict(affine_map(shape, None, 3))
        theirs.validate_coverage()
        whole = torch.randn(shape)
        assert torch.equal(theirs.rebuild({rank: whole for rank in range(3)}), whole)
        with pytest.raises(ValueError, match="different data"):
            theirs.rebuild({0: whole, 1: whole, 2: whole + 1})
    a, b = affine_map((4,), None, 2), affine_map((6,), None, 2)
    assert set(affine_maps({"l.0.w": a, "l.1.w": a, "h.0.w": a, "h.1.w": b, "lm.w": b})) == {
        r"^l\.\d+\.w$", r"^h\.0\.w$", r"^h\.1\.w$", r"^lm\.w$",
    }  # fmt: skip


def _train(family: str, tp: int, stage: int, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    engine = engine_at(family, tp, stage, **options)
    run(engine, 0, BEFORE)
    engine.save_checkpoint(folder, client_state={"position": BEFORE})
    state = {"weights": weights(engine), "optimizer": optimizer_states(engine), "lr": engine.get_lr()}
    return state | {"losses": run(engine, BEFORE, AFTER)}


def _resume(family: str, sizes: list[tuple[int, int]], folder: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The same universal checkpoint at several (tp, ZeRO stage) in one process."""
    results = []
    for tp, stage in sizes:  # from other weights, so that what is not loaded shows
        engine = engine_at(family, tp, stage, seed=1, checkpoint={"load_universal": True}, **options)
        path, client_state = engine.load_checkpoint(folder)
        assert path is not None and client_state is not None and client_state["position"] == BEFORE
        state = {"weights": weights(engine), "optimizer": optimizer_states(engine), "lr": engine.get_lr()}
        results.append(state | {"losses": run(engine, BEFORE, AFTER), "dp": torch.distributed.get_world_size() // tp})
        engine.destroy()
    return results


def _convert(folder: Path) -> None:
    """What `python -m deepspeed.checkpoint.ds_to_universal` does, in this process."""
    tag = (folder / "latest").read_text()
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(folder / tag), output_folder=str(folder / "universal"), num_extract_workers=1,
            num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=False,
        )
    )  # fmt: skip


def _step_means(losses: list[list[float]], tp: int) -> torch.Tensor:
    """Mean loss of every step from each rank's micro batches: the same rows, however they lie over micro batches and ranks."""
    each = torch.tensor([losses[rank] for rank in range(0, len(losses), tp)], dtype=torch.float64)
    return each.view(len(each), AFTER - BEFORE, -1).mean((0, 2))


def _check(
    tmp_path: Path, family: str, source: tuple[int, int, int], targets: dict[int, list[tuple[int, int]]], **options: Any
) -> None:
    """`source`: (tp, dp, stage); `targets`: world -> (tp, stage) of each run that goes on."""
    tp, dp, stage = source
    before = run_ranks(tp * dp, _train, family, tp, stage, str(tmp_path), options)
    _convert(tmp_path)
    expected = before[0]
    for world, sizes in targets.items():
        ranks = run_ranks(world, _resume, family, sizes, str(tmp_path), options)
        for i, (new_tp, new_stage) in enumerate(sizes):
            what = f"{source} -> tp {new_tp}, world {world}, stage {new_stage}"
            for rank, results in enumerate(ranks):
                found = results[i]
                assert found["lr"] == expected["lr"], what
                names = expected["optimizer"] | (expected["weights"] if rank == 0 else {})
                for name in names:
                    part = "optimizer" if name in expected["optimizer"] else "weights"
                    assert torch.equal(found[part][name], expected[part][name]), f"{what}, rank {rank}: {name}"
            ours = _step_means([results[i]["losses"] for results in ranks], new_tp)
            theirs = _step_means([result["losses"] for result in before], tp)
            rtol = 2e-2 if options.get("dtype") == torch.bfloat16 else 1e-5  # the ranks' sums are rounded to bf16
            assert torch.allclose(ours, theirs, rtol=rtol, atol=0), f"{what}: {ours} {theirs}"


# Every size of the list (2->1, 1->2, 2->4, 4->2, 3->2), dp 1<->2, stage 1<->3; llama: tied, uneven; qwen3: copied kv heads at 4;
# phi3: packed; olmo2: norms that are cut; gpt_neox: interleaved, biases.
CASES = [
    ("llama", (2, 1, 1), {1: [(1, 3)], 4: [(2, 1), (4, 3)]}),
    ("phi3", (1, 1, 3), {2: [(2, 1), (1, 2), (2, 3)]}),
    ("qwen3", (4, 1, 3), {2: [(2, 1), (2, 3)]}),
]
ALL = [
    ("llama", (2, 2, 3), {1: [(1, 1), (1, 3)], 2: [(2, 1), (2, 3)], 4: [(2, 2), (4, 1)]}),
    ("qwen3", (2, 1, 1), {1: [(1, 1)], 4: [(4, 1), (4, 3), (2, 2)]}),
    ("qwen3", (4, 1, 1), {2: [(2, 1), (2, 3), (1, 1)], 1: [(1, 3)]}),
    ("phi3", (3, 1, 2), {2: [(2, 1), (2, 3)], 1: [(1, 2)]}),
    ("phi3", (3, 1, 3), {2: [(2, 1), (2, 3)], 1: [(1, 2)]}),
    ("olmo2", (2, 1, 1), {1: [(1, 3)], 4: [(4, 3), (2, 3), (2, 1)], 3: [(3, 1)]}),
    ("gpt_neox", (3, 1, 1), {2: [(2, 1), (2, 3)]}),
    ("gemma2", (1, 2, 1), {2: [(2, 1), (2, 3), (1, 3)]}),
    ("gemma3_text", (2, 1, 3), {1: [(1, 1)], 4: [(4, 1)]}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "source", "targets"), CASES)
def test_goes_on_at_another_size(
    tmp_path: Path, family: str, source: tuple[int, int, int], targets: dict[int, list[tuple[int, int]]]
) -> None:
    _check(tmp_path, family, source, targets)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "source", "targets"), ALL)
def test_goes_on_at_every_other_size(
    tmp_path: Path, family: str, source: tuple[int, int, int], targets: dict[int, list[tuple[int, int]]]
) -> None:
    _check(tmp_path, family, source, targets)


@pytest.mark.parametrize("source", [(2, 1, 2), (2, 1, 3)])
def test_frozen_parameters_come_along(tmp_path: Path, source: tuple[int, int, int]) -> None:
    _check(tmp_path, "llama", source, {1: [(1, 3), (1, 0)], 2: [(2, 1)]}, freeze=("norm", "embed", "q_proj"))


@pytest.mark.parametrize("source", [(2, 1, 1), pytest.param((1, 2, 3), marks=SLOW)])
def test_adapters_and_their_frozen_base_go_on(tmp_path: Path, source: tuple[int, int, int]) -> None:
    _check(tmp_path, "llama", source, {1: [(1, 3), (1, 0)], 2: [(2, 2), (2, 3)]}, lora=True)


EXPERTS = {"output_router_logits": False}  # its loss is of a whole micro batch, whose rows differ between sizes


@pytest.mark.parametrize("source", [(2, 1, 1), pytest.param((1, 1, 3), marks=SLOW)])
def test_experts_go_on(tmp_path: Path, source: tuple[int, int, int]) -> None:
    _check(tmp_path, "mixtral", source, {1: [(1, 1), (1, 3), (1, 0)], 2: [(2, 1), (2, 3)]}, own=EXPERTS)


# 2 -> 4, 4 -> 2 and 3 -> 2, each to both families of ZeRO stages; in the tests above tp 2 -> 1 and 1 -> 2.
WIDER: list[tuple[tuple[int, int, int], dict[int, list[tuple[int, int]]]]] = [
    ((2, 2, 3), {4: [(4, 1), (4, 3)]}),
    ((4, 1, 1), {2: [(2, 1), (2, 3)]}),
    ((3, 1, 3), {2: [(2, 1), (2, 3)]}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "targets"), WIDER)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {"own": EXPERTS}),
        ("gpt_oss", {"own": EXPERTS}),  # experts with biases, sinks of the heads
        ("deepseek_v3", {"own": EXPERTS}),  # latent attention, shared experts
        ("gpt2", {}),  # weights the other way around, learned positions
        ("llama", {"lora": True}),
        ("llama", {"freeze": ("norm", "embed", "q_proj")}),
        ("llama", {"dtype": torch.bfloat16}),
    ],
)
def test_every_kind_of_parameter_goes_on_at_more_ranks_and_at_fewer(
    tmp_path: Path,
    family: str,
    options: dict[str, Any],
    source: tuple[int, int, int],
    targets: dict[int, list[tuple[int, int]]],
) -> None:
    _check(tmp_path, family, source, targets, **options)


@pytest.mark.parametrize(
    ("family", "source"),
    [
        ("llama", (2, 1, 1)),
        pytest.param("qwen3", (4, 1, 3), marks=SLOW),
        pytest.param("phi3", (1, 2, 2), marks=SLOW),
    ],
)
def test_bfloat16_goes_on_with_its_master_weights(tmp_path: Path, family: str, source: tuple[int, int, int]) -> None:
    _check(tmp_path, family, source, {2: [(2, 0), (1, 1), (2, 2), (2, 3)]}, dtype=torch.bfloat16)


def test_stage_0_takes_what_other_stages_saved(tmp_path: Path) -> None:
    _check(tmp_path, "llama", (2, 1, 1), {1: [(1, 0)], 2: [(2, 0), (1, 0)]})


def _refusals(folder: str) -> dict[str, str]:
    messages = {}

    def refused(what: str, engine: Any, tag: str | None = "universal", **options: Any) -> None:
        with pytest.raises(ds_seqpar.CheckpointError) as caught:
            engine.load_checkpoint(folder, tag=tag, **options)
        messages[what] = str(caught.value)

    universal: dict[str, Any] = {"checkpoint": {"load_universal": True}}
    refused("weights alone", engine_at("llama", 2, 0, **universal), load_optimizer_states=False)
    refused("thawed", engine_at("llama", 2, 0, **universal), "frozen")
    refused("family", engine_at("qwen3", 2, 1, **universal))
    refused("width", engine_at("llama", 2, 1, own={"intermediate_size": 52}, **universal))
    refused("groups", engine_at("llama", 2, 3, groups=1, **universal))
    engine = engine_at("llama", 1, 3, **universal)
    for tag in ("unfinished", "lost", "foreign", "absent", "global_step3"):
        refused(tag, engine, tag)
    Path(folder, "latest_universal").unlink(missing_ok=True)
    torch.distributed.barrier()
    refused("no latest", engine, None)
    return messages


def test_universal_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    run_ranks(2, _train, "llama", 2, 1, str(tmp_path), {})
    _convert(tmp_path)
    for name in ("unfinished", "lost", "foreign", "frozen"):
        shutil.copytree(tmp_path / "universal", tmp_path / name)
    moment = "zero/model.layers.1.mlp.up_proj.weight/exp_avg.pt"
    (tmp_path / "unfinished" / moment).unlink()
    (tmp_path / "frozen" / "zero" / "model.norm.weight" / "exp_avg.pt").unlink()
    (tmp_path / "lost" / "zero" / "optimizer_state.pt").unlink()
    path = tmp_path / "foreign" / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    del state["ds_seqpar"]
    torch.save(state, path)
    first, second = run_ranks(2, _refusals, str(tmp_path))
    assert first == second
    for what, message in {
        "weights alone": "leave out load_optimizer_states=False",
        "thawed": "model.norm.weight was frozen in the run that saved",
        "family": "holds a llama model, this one is qwen3",
        "width": "mlp.gate_proj.weight has shape [50, 48] there and [52, 48] here",
        "groups": "holds 2 parameter groups of the optimizer, this run has 1",
        "unfinished": f"{moment} is missing",
        "lost": "optimizer_state.pt is missing",
        "foreign": "that ds_seqpar did not save",
        "absent": "there is no universal checkpoint",
        "global_step3": "is missing: the conversion was not finished",
        "no latest": "has no latest_universal, and no tag was given",
    }.items():
        assert message in first[what], f"{what}: {first[what]}"


def test_fp16_at_stage_0_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ds_seqpar.CheckpointError, match="no loss scale for fp16 at ZeRO stage 0; use stage 1, 2 or 3, or bf16"
    ):
        require_universal(tmp_path, {"zero_stage": 0, "dtype": "float16"}, [])


def _without_frozen(folder: str) -> list[str]:
    """Saves without what is frozen, loads into other weights; what was logged."""
    frozen = {"freeze": ("embed", "norm")}
    engine = engine_at("llama", 2, 1, **frozen)
    run(engine, 0, BEFORE)
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        _convert(Path(folder))
    torch.distributed.barrier()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ds_seqpar").addHandler(handler)
    other = engine_at("llama", 2, 1, seed=1, checkpoint={"load_universal": True}, **frozen)
    before = weights(other)
    other.load_checkpoint(folder)
    after = weights(other)
    assert all(torch.equal(x, before[n]) == ("embed" in n or "norm" in n or "lm_head" in n) for n, x in after.items())
    return [line for line in lines if "keep the values they have" in line]


def test_what_a_checkpoint_was_saved_without_is_said(tmp_path: Path) -> None:
    first, second = run_ranks(2, _without_frozen, str(tmp_path))
    assert len(first) == 1 and "6 frozen parameters keep the values they have (model.embed_tokens.weight" in first[0]
    assert not second
