"""TRL's trainers under the key log and train what they do without it: SFT packed, padding-free, completion-only; DPO."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import transformers.trainer  # before the ranks are forked
from models import tiny
from ranks import RankError, run_ranks

pytest.importorskip("trl", reason="install ds_seqpar[trl] to run this")
pytest.importorskip("datasets", reason="install ds_seqpar[trl] to run this")

sys.path.insert(0, str(Path(__file__).parent / "scripts"))
sys.path.insert(0, str(Path(__file__).parent))

import trl.trainer.utils
import trl_train
from same_run import assert_same_files, assert_same_log, deepspeed_json

from ds_seqpar_integrations import trl_online

assert transformers.trainer
STEPS: dict[str, Any] = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, learning_rate=1e-3, adam_epsilon=1e-4,
    max_grad_norm=0.5, include_num_input_tokens_seen="no",
)  # fmt: skip
LORA = {"r": 3, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"], "task_type": "CAUSAL_LM"}
# The groups of completions are larger than a rank's batch, so that their rewards must meet.
ONLINE = dict(num_generations=4, max_completion_length=6, num_iterations=2)
JOBS: dict[str, dict[str, Any]] = {
    "sft": {"trainer": "sft", "data": "text", "arguments": dict(max_length=12)},
    "packing": {"trainer": "sft", "data": "text", "arguments": dict(max_length=12, packing=True)},
    "padding_free": {"trainer": "sft", "data": "text", "arguments": dict(max_length=None, padding_free=True)},
    "completion_only": {
        "trainer": "sft",
        "data": "completion",
        "arguments": dict(max_length=12, completion_only_loss=True),
    },
    "dft": {"trainer": "sft", "data": "text", "arguments": dict(max_length=12, loss_type="dft")},
    "sft_lora": {
        "trainer": "sft",
        "data": "text",
        "arguments": dict(max_length=12),
        "lora": LORA,
        "checkpointing": True,
    },
    "dpo": {"trainer": "dpo", "data": "preference", "arguments": dict(max_length=12, beta=0.5)},
    "grpo": {"trainer": "grpo", "data": "prompt", "arguments": dict(**ONLINE, beta=0.1)},
    "grpo_lora": {"trainer": "grpo", "data": "prompt", "arguments": dict(**ONLINE, beta=0.1), "lora": LORA},
    "rloo": {"trainer": "rloo", "data": "prompt", "arguments": dict(**ONLINE, beta=0.1)},
    "dpo_synced": {
        "trainer": "dpo",
        "data": "preference",
        "arguments": dict(max_length=12, beta=0.5, sync_ref_model=True, ref_model_sync_steps=1),
    },
    "kto": {"trainer": "kto", "data": "judged", "arguments": dict(max_length=12, beta=0.5)},
    "dpo_precomputed": {
        "trainer": "dpo",
        "data": "preference",
        "arguments": dict(max_length=12, beta=0.5, precompute_ref_log_probs=True),
        "reference": False,
        "on_disk": True,
    },
    "dpo_lora": {  # B starts at zero, its gradients are small: AdamW would scale up their rounding without a larger epsilon
        "trainer": "dpo",
        "data": "preference",
        "arguments": dict(max_length=12, beta=0.5, adam_epsilon=1e-3),
        "lora": LORA,
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(folder)
    return str(folder)


def _on_rank(job: dict[str, Any], out: str) -> dict[str, Any]:
    return trl_train.run(job, Path(out))


def _run(world: int, job: dict[str, Any], out: Path, deepspeed: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    out.mkdir()
    if job.get("on_disk"):  # ranks meet in the data set's own folder
        trl_train.rows(job["data"], job.get("rows", 8)).save_to_disk(out / "rows")
        job = {**job, "disk": str(out / "rows")}
    arguments = {**STEPS, **job["arguments"], **({} if deepspeed is None else {"deepspeed": deepspeed})}
    return run_ranks(
        world, _on_rank, {**job, "arguments": arguments}, str(out), timeout=150, deepspeed=deepspeed is not None
    )


SLOW = {"dft", "dpo_precomputed", "dpo_synced", "kto", "dpo_lora", "padding_free", "grpo_lora", "rloo"}


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in JOBS])
def test_a_trl_trainer_on_two_ranks_is_the_one_process_run(model: str, tmp_path: Path, name: str) -> None:
    job = {"model": model, "rows": 24 if name == "packing" else 8, **JOBS[name]}
    alone = _run(1, job, tmp_path / "alone")[0]
    # Rewards of DPO, and a KL divergence, are differences of log-probabilities of some tens.
    absolute = 0.0 if job["trainer"] == "sft" else 5e-6
    for ours in _run(2, job, tmp_path / "mine", deepspeed_json()):
        assert_same_log(ours["log"], alone["log"], without=("total_flos",), absolute=absolute)
        _same_texts(ours["texts"], alone["texts"])
        generating = {"TokenShard.__getitem__", "ShardedLogits.__getitem__"} if job["data"] == "prompt" else set()
        assert set(ours["gathered"]) <= generating, "no logits, no hidden states are gathered whole in training"
    assert_same_files(tmp_path / "mine" / "saved", tmp_path / "alone" / "saved")


def _same_texts(mine: dict[str, list[Any]], theirs: dict[str, list[Any]]) -> None:
    """What was generated, and what each text was found to be worth."""
    assert (mine["prompt"], mine["completion"]) == (theirs["prompt"], theirs["completion"])
    assert mine["advantages"] == pytest.approx(theirs["advantages"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "stage"),
    [("grpo", 1), *(pytest.param(*x, marks=pytest.mark.slow) for x in (("grpo", 3), ("grpo_lora", 2), ("rloo", 2)))],
)
def test_groups_of_completions_are_rewarded_on_four_ranks_as_on_two_plain_ones(
    model: str, tmp_path: Path, name: str, stage: int
) -> None:
    """A group of completions spans two data-parallel ranks; each counts once, and draws as it does without the key."""
    job = {"model": model, **JOBS[name]}
    job["arguments"] = {**job["arguments"], "gradient_accumulation_steps": 1, "per_device_train_batch_size": 2}
    plain = _run(2, job, tmp_path / "plain", deepspeed_json(tp_size=None))
    for rank, ours in enumerate(_run(4, job, tmp_path / "mine", deepspeed_json(stage))):
        theirs = plain[rank // 2]
        assert_same_log(ours["log"], theirs["log"], without=("total_flos",), absolute=5e-6)
        _same_texts(ours["texts"], theirs["texts"])
        assert len(ours["texts"]["completion"]) == 4, "those of one generation"
    assert_same_files(tmp_path / "mine" / "saved", tmp_path / "plain" / "saved", also=("lm_head.weight",))


def _sizes(out: str) -> None:
    import ds_seqpar

    def config(kind: str = "grpo", **arguments: Any) -> Any:
        more = {**STEPS, "num_generations": 2, "deepspeed": deepspeed_json(), **arguments}
        return trl_train.TRAINERS[kind][0](output_dir=out, use_cpu=True, bf16=False, report_to=[], **more)

    for kind in ("grpo", "rloo"):
        for given in ({}, {"steps_per_generation": 2}, {"generation_batch_size": 2 * 2 * 2}):
            made = config(kind, **given)
            assert (made.generation_batch_size, made.steps_per_generation) == (8, 2), (kind, given)
            assert made.world_size == 4
        for option in ("use_vllm", "use_transformers_continuous_batching"):
            with pytest.raises(ds_seqpar.ConfigError, match=f"{option}=True .* set it to False"):
                config(kind, **{option: True})
    with pytest.raises(ValueError, match=r"divisible by the global batch size \(4\)"):
        config(generation_batch_size=6)


def test_generation_batches_are_sized_over_the_data_parallel_ranks(tmp_path: Path) -> None:
    run_ranks(4, _sizes, str(tmp_path), timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "grpo"])
def test_a_trl_trainer_evaluates_as_two_plain_ranks(model: str, tmp_path: Path, name: str) -> None:
    """An odd number of rows over two shares; GRPO generates and rewards them."""
    job = {"model": model, "evaluate": True, **JOBS[name]}
    more = dict(eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=2)
    job["arguments"] = {**job["arguments"], **more, "max_steps": 2}
    plain = _run(2, job, tmp_path / "plain", deepspeed_json(tp_size=None))
    assert any("eval_loss" in entry for entry in plain[0]["log"])
    for rank, ours in enumerate(_run(4, job, tmp_path / "mine", deepspeed_json())):
        assert_same_log(ours["log"], plain[rank // 2]["log"], without=("total_flos",), absolute=5e-6)
        _same_texts(ours["texts"], plain[rank // 2]["texts"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [x for x in JOBS if JOBS[x]["trainer"] in ("sft", "dpo")])
def test_a_trl_trainer_on_four_ranks_is_the_one_process_run(model: str, tmp_path: Path, name: str) -> None:
    job = {"model": model, "rows": 72, **JOBS[name]}  # no epoch ends, packed or not
    twice = {**job, "arguments": {**job["arguments"], "gradient_accumulation_steps": 4}}
    alone = _run(1, twice, tmp_path / "alone")[0]
    # Metrics are means of batches, and packed rows fill no last one.
    compared = ("loss", "grad_norm", "learning_rate", "step", *(["epoch"] if name != "packing" else []))
    without = tuple({"total_flos", "epoch", *alone["log"][0]} - set(compared))
    for ours in _run(4, job, tmp_path / "mine", deepspeed_json(2 if name == "dpo_precomputed" else 3)):
        assert_same_log(ours["log"], alone["log"], without=without, absolute=5e-6)
    assert_same_files(tmp_path / "mine" / "saved", tmp_path / "alone" / "saved")


def test_a_second_engine_over_a_partitioned_model_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"already has an engine at ZeRO 3.*\{\"stage\": 2\} or lower"):
        _run(2, {"model": model, **JOBS["dpo_precomputed"]}, tmp_path / "mine", deepspeed_json(3))


def test_distillation_is_refused_by_name(model: str, tmp_path: Path) -> None:
    job = {"model": model, "trainer": "distillation", "data": "prompt", "arguments": dict(max_completion_length=4)}
    with pytest.raises(RankError, match=r"DistillationTrainer multiplies by lm_head\.weight itself"):
        _run(2, job, tmp_path / "mine", deepspeed_json())


def _policy(family: str) -> None:
    """What GRPO and the like ask for: a temperature, and an entropy that has a gradient."""
    import torch
    from exactness import fresh_groups
    from models import batches
    from sharding import relative_error, same_loss_and_gradients

    import ds_seqpar

    fresh_groups()
    ours, theirs = (tiny(family, dtype=torch.float64).train() for _ in range(2))
    for of in (ours, theirs):
        trl.trainer.utils.add_fused_lm_head(of, temperature=0.7, outputs=("log_probs", "entropy", "mean_logits"))
    ds_seqpar.shard(ours, {"tp_size": 2, "loss_chunk_tokens": 4})
    batch = batches(1, 2)[0]
    mine, expected = (of(**batch, fused_lm_head=True) for of in (ours, theirs))
    assert torch.equal(mine.label_mask, expected.label_mask)
    for name in ("loss", "log_probs", "entropy", "mean_logits"):
        assert relative_error(getattr(mine, name).detach(), getattr(expected, name).detach()) < 1e-5, name
    same_loss_and_gradients(ours, theirs, lambda of: of(**batch).loss)  # without it, the model's own forward

    def objective(of: Any) -> Any:
        out = of(**batch, fused_lm_head=True)
        return (-out.log_probs - 0.1 * out.entropy).mean()

    same_loss_and_gradients(ours, theirs, objective, tolerance=1e-5)  # TRL accumulates in fp32


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_log_probabilities_of_a_policy_equal_trls_own(family: str) -> None:
    run_ranks(2, _policy, family, timeout=90)


def test_trl_still_keeps_the_forward_that_is_adopted(model: str) -> None:
    """`trl.trainer.utils._fused_forward`: the name, and what its closure holds."""
    import inspect

    from ds_seqpar_integrations import trl as adapter

    assert "`trl.trainer.utils._fused_forward`" in (adapter.__doc__ or "")
    plain = tiny("llama")
    trl.trainer.utils.add_fused_lm_head(plain, temperature=0.5, outputs=("log_probs", "entropy"))
    function = plain.forward.__func__
    assert (function.__globals__["__name__"], function.__code__.co_name) == ("trl.trainer.utils", "_fused_forward")
    settings = inspect.getclosurevars(function).nonlocals
    assert (settings["temperature"], settings["outputs"]) == (0.5, ("log_probs", "entropy"))
    assert {"cast_lm_head_to_fp32", "final_logit_softcapping", "logit_scale"} <= set(settings)
    fields = set(trl.trainer.utils.FusedCausalLMOutput.__dataclass_fields__)
    assert {"loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask"} <= fields


def test_trl_still_keeps_how_a_reference_model_follows() -> None:
    """`SyncRefModelCallback.sync_target_model`, and `_sync_target_model` that it calls on one rank."""
    import inspect

    from trl.trainer.callbacks import SyncRefModelCallback

    source = inspect.getsource(inspect.unwrap(SyncRefModelCallback.sync_target_model))
    assert "if deepspeed.comm.get_rank() == 0:\n" in source and "modifier_rank=0" in source
    assert source.count("SyncRefModelCallback._sync_target_model(model, target_model, alpha)") == 2


@pytest.mark.parametrize("name", trl_online.TRAINERS)
def test_trl_still_keeps_what_is_counted_over_data_parallel_ranks(name: str) -> None:
    """The names in the adapter's docstring, and what they do there."""
    import importlib
    import inspect

    config, trainer = trl_online.TRAINERS[name]
    init = inspect.getsource(getattr(importlib.import_module(f"trl.trainer.{name}_config"), config).__post_init__)
    assert init.count("self.world_size") == 1, (
        f"{config}.__post_init__ reads world_size once, before the sizes are known"
    )
    assert init.index("self.world_size") < init.index("self.steps_per_generation")
    module = importlib.import_module(f"trl.trainer.{name}_trainer")
    source = inspect.getsource(inspect.unwrap(getattr(module, trainer)._generate_and_score_completions))
    assert "self.accelerator.process_index * len(prompts)" in source and "self._calculate_rewards(" in source
    assert "rewards_per_func = gather(" in inspect.getsource(getattr(module, trainer)._calculate_rewards)
    assert "self.accelerator.reduce(" in inspect.getsource(inspect.unwrap(getattr(module, trainer)._compute_loss))
    assert "set_seed(args.seed, device_specific=True)" in inspect.getsource(getattr(module, trainer).__init__)
