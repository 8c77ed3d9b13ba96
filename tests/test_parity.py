"""Every model type against the unsharded model, as docs/families.md says; a type that transformers does not have yet."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exactness import compare_sgd, fresh_groups
from model_types import ALL, batches_for, tiny_of
from models import FAMILIES, batches, device
from parity import KINDS, ROUNDED, TOLERANCE, document, measured, parity, step_under_deepspeed
from ranks import RankError, run_ranks
from sharding import relative_error, same_loss_and_gradients
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import ds_seqpar
from ds_seqpar import cli
from ds_seqpar.families import MEASURED_WITH, RESULTS, TESTED

MOST_USED = (
    "bert",
    "deepseek_v3",
    "gemma3_text",
    "gpt2",
    "gpt_oss",
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)
TODAY = datetime.date.today().toordinal()
ROTATING = {TESTED[(5 * TODAY + i) % len(TESTED)] for i in range(5)}
SAMPLE = sorted({name for name in MOST_USED if name not in FAMILIES} | ROTATING)
"""On every run, beside the dense families, which test_families.py trains: the most used types, and five others every day."""


SAME_RELEASE = transformers.__version__ == MEASURED_WITH
OTHER_RELEASE = f"the table was written with transformers {MEASURED_WITH}, this is {transformers.__version__}"


def _as_written(model_type: str, *, everywhere: bool) -> None:
    if not SAME_RELEASE and model_type not in ALL:
        pytest.skip(OTHER_RELEASE)
    now = measured(model_type, everywhere=everywhere)  # in any release a type is exact, refused, or fails without us
    if now["status"] == "not run" and not SAME_RELEASE:
        pytest.skip(now["why"])
    if SAME_RELEASE:
        written = dict(RESULTS[model_type])
        assert now == (written if everywhere else written | {"at": now["at"]})


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_rotating_sample_of_types_is_as_the_table_says(model_type: str) -> None:
    _as_written(model_type, everywhere=False)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ALL)
def test_every_type_is_as_the_table_says(model_type: str) -> None:
    _as_written(model_type, everywhere=True)


@pytest.mark.skipif(not SAME_RELEASE, reason=OTHER_RELEASE)
def test_the_table_holds_every_planned_type_and_is_the_one_in_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(RESULTS) == ALL
    assert (Path(__file__).parents[1] / "docs" / "families.md").read_text() == document()
    cli.main(["families"])
    assert capsys.readouterr().out.strip() == cli.table()


WIDER = ("gpt_oss", "olmoe", "gpt2", "bloom", "gemma3", "qwen3_vl")
MORE_RANKS = [*((name, 3) for name in (*KINDS, *WIDER)), *((name, 4) for name in WIDER)]  # the table has KINDS at 4


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "tp"), MORE_RANKS)
def test_each_kind_at_more_ranks(model_type: str, tp: int) -> None:
    for result in run_ranks(tp, parity, model_type, timeout=600):
        assert not result["bad"]


HYBRIDS: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=None),
    "lfm2": dict(layer_types=["conv", "conv"]),
    "lfm3": dict(layer_types=["conv", "conv"]),
}


def _one_kind(model_type: str) -> dict[str, Any]:
    return parity(model_type, use_cache=False, **HYBRIDS[model_type])


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_a_hybrid_without_attention_is_divided_in_its_mlps(model_type: str) -> None:
    if model_type not in ALL:
        pytest.skip(OTHER_RELEASE)
    for result in run_ranks(2, _one_kind, model_type):
        assert not result["bad"] and result["cut"] == 2 * 3 + 2, "two layers' MLPs, the embedding and the head"


def _moved_by_rounding(model_type: str) -> float:
    """The largest relative change of a gradient where every weight of the unsharded model changes by about 1e-8 of itself."""
    gradients = []
    for noise in (0.0, 1e-8):
        model, generator = tiny_of(model_type).train(), torch.Generator().manual_seed(7)
        for parameter in model.parameters():
            parameter.data *= 1 + noise * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        for batch in batches_for(2, 3, 7, model_type=model_type):
            (model(**batch).loss / 2).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    return max(float(relative_error(gradients[1][name], grad)) for name, grad in gradients[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ROUNDED)
def test_a_wider_tolerance_is_what_one_rounding_moves(model_type: str) -> None:
    if model_type not in ALL:
        pytest.skip(OTHER_RELEASE)
    assert TOLERANCE < run_ranks(1, _moved_by_rounding, model_type)[0] < ROUNDED[model_type]


FALCONS: dict[str, dict[str, Any]] = {
    "multi-query": dict(multi_query=True, parallel_attn=True),
    "multi-query, heads that divide it": dict(multi_query=True, hidden_size=32, num_attention_heads=4, num_kv_heads=4),
    "multi-head, alibi, one block after the other": dict(multi_query=False, parallel_attn=False, alibi=True),
    "multi-head, rotary, biases": dict(multi_query=False, parallel_attn=True, bias=True),
    "grouped, alibi": dict(new_decoder_architecture=True, num_kv_heads=3, alibi=True),
}


def _falcon(own: dict[str, Any]) -> dict[str, Any]:
    return parity("falcon", 7, **{"new_decoder_architecture": False, "num_kv_heads": None, "alibi": False, **own})


@pytest.mark.parametrize("variant", FALCONS)
def test_every_falcon(variant: str) -> None:
    for result in run_ranks(2, _falcon, FALCONS[variant]):
        assert not result["bad"]
        whole = ["transformer.h.*.self_attention"] if "multi-query" in variant else []
        assert result["whole"] == whole


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("model_type", [*KINDS, "gpt_oss", "gpt2"])
def test_each_kind_with_data_parallel_ranks_under_deepspeed(model_type: str, stage: int) -> None:
    for bad in run_ranks(4, step_under_deepspeed, model_type, stage, timeout=600):
        assert not bad


def _padded_loss(model_type: str) -> dict[str, float]:
    """Loss, its auxiliary part and every gradient of a padded batch, against the unsharded model's."""
    fresh_groups()
    model, reference = tiny_of(model_type).train(), tiny_of(model_type).train()
    ds_seqpar.shard(model, {"tp_size": 2})
    batch = batches(1, 3, 7)[0]
    auxiliary = {"ours": model, "expected": reference}
    found = {name: float(m(**batch).aux_loss.detach()) for name, m in auxiliary.items()}
    batch_without = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    found["without the mask"] = float(reference(**batch_without).aux_loss.detach())
    same_loss_and_gradients(model, reference, lambda m: m(**batch).loss, tolerance=TOLERANCE)
    same_loss_and_gradients(model, reference, lambda m: m(**batch).aux_loss, tolerance=TOLERANCE)
    return found


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_the_auxiliary_loss_leaves_out_padding_as_the_unsharded_models_does(model_type: str) -> None:
    for found in run_ranks(2, _padded_loss, model_type):
        assert found["ours"] == pytest.approx(found["expected"], rel=1e-6)
        assert found["without the mask"] != pytest.approx(found["expected"], rel=1e-4), "padding must matter"


def _one_by_one(model_type: str) -> dict[str, float]:
    return compare_sgd(model_type, 1, 3, own={"dtype": torch.float32})


@pytest.mark.parametrize(
    "model_type",
    ["deepseek_v3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("jamba", "olmoe", "qwen3_next"))],
)
def test_experts_that_data_parallel_ranks_choose_apart_meet_under_zero_3(model_type: str) -> None:
    """Experts that run one after the other, as many as were chosen; ZeRO-3 gathers in the order of the calls before."""
    for errors in run_ranks(2, _one_by_one, model_type, timeout=60):
        assert not {name: error for name, error in errors.items() if not error <= 1e-5}


def _rows_of_experts(model_type: str) -> dict[str, list[int]]:
    """How many rows every expert that was chosen got, in order: sharded and not."""
    fresh_groups()
    seen: dict[str, list[int]] = {"ours": [], "expected": []}
    for which in seen:
        model = tiny_of(model_type).train()
        for name, module in model.named_modules():
            if name.endswith(".experts.act_fn"):
                module.register_forward_hook(lambda _, args, output, which=which: seen[which].append(args[0].shape[0]))
        if which == "ours":
            ds_seqpar.shard(model, {"tp_size": 2})
        model(**batches_for(1, 3, 7)[0]).loss.backward()
    return seen


@pytest.mark.parametrize(
    "model_type", ["mixtral", "gemma4_text"]
)  # gathered by the block around the experts, and by the experts
def test_rows_that_fill_up_the_shards_are_not_routed(model_type: str) -> None:
    for seen in run_ranks(2, _rows_of_experts, model_type):  # 21 tokens: 11 rows on each of two ranks
        assert seen["ours"] == seen["expected"] != []
        assert sum(seen["expected"]) % 21 == 0


class _MadeUpConfig(LlamaConfig):
    model_type = "made_up"


class _MadeUpMoeConfig(MixtralConfig):
    model_type = "made_up_moe"


class _MadeUp(LlamaForCausalLM):
    config_class = _MadeUpConfig


class _MadeUpMoe(MixtralForCausalLM):
    config_class = _MadeUpMoeConfig


def _made_up(seed: int, experts: bool) -> Any:
    sizes = dict(
        vocab_size=101, hidden_size=48, intermediate_size=50, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=8, num_local_experts=4, output_router_logits=True, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    config = (_MadeUpMoeConfig if experts else _MadeUpConfig)(**sizes)
    config._experts_implementation_internal = "eager"
    return (_MadeUpMoe if experts else _MadeUp)(config).double().to(device()).train()


def _check_made_up(experts: bool) -> list[str]:
    fresh_groups()
    model, reference = _made_up(0, experts), _made_up(0, experts)
    report = ds_seqpar.shard(model, {"tp_size": 2})
    same_loss_and_gradients(model, reference, lambda m: m(**batches_for(1, 3, 7)[0]).loss, tolerance=TOLERANCE)
    return report.remarks


@pytest.mark.parametrize("experts", [False, True])
def test_a_type_that_nobody_has_seen_works_by_its_plan_alone(experts: bool) -> None:
    for remarks in run_ranks(2, _check_made_up, experts):
        assert any("made_up" in r and "model types that are tested" in r for r in remarks)


def _check_users_plan(plan: dict[str, str]) -> None:
    fresh_groups()
    model, reference = tiny_of("glm4"), tiny_of("glm4")
    ds_seqpar.shard(model, {"tp_size": 2, "plan": plan})
    same_loss_and_gradients(
        model.train(), reference.train(), lambda m: m(**batches_for(1, 3, 7)[0]).loss, tolerance=TOLERANCE
    )
    return


def test_a_users_plan_goes_before_all_others() -> None:
    plan = {"model.layers.*.mlp.gate_up_proj": "packed_colwise:even,even", "model.layers.*.mlp.down_proj": "rowwise"}
    run_ranks(2, _check_users_plan, plan)
    run_ranks(2, _check_users_plan, {"model.layers.*.mlp": "whole"})
    embedding = {"model.embed_tokens": "replicate"}  # transformers' word for one that is cut all the same
    run_ranks(2, _check_users_plan, embedding)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"model.layers.*.mlp.gate_proj": "colwise"}, r"mlp\.gate_proj' \(the plan in .* matches no .*near it are \['model.*gate_up"),
        ({"model.layers.*.mlp.gate_up_proj": "sideways"}, r"style 'sideways' .*known styles"),
        ({"model.layers.*.mlp.gate_up_proj": "packed_colwise:q,up"}, r"unknown role\(s\) \['up'\]"),
        ({"model.layers.*.mlp.gate_up_proj": "colwise", "model.*.0.mlp.gate_up_proj": "colwise"}, r"matched by two plan patterns"),
        ({"model.layers.*.mlp.down_proj": "colwise"}, r"a block needs column-parallel and row-parallel linears, the plan names"),
    ],
)  # fmt: skip
def test_a_users_plan_that_does_not_fit_is_refused_before_anything_is_touched(
    plan: dict[str, str], message: str
) -> None:
    with pytest.raises(RankError, match=message) as caught:
        run_ranks(2, _check_users_plan, plan)
    assert all("PlanError" in (error or "") for error in caught.value.errors)
