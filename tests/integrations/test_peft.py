"""LoRA under the key: every adapter's gradient is the unsharded PEFT model's, its traffic has the adapter's rank as width."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
import transformers.trainer  # before the ranks are forked
from exactness import fresh_groups
from models import batches, tiny
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from ranks import RankError, run_ranks
from safetensors.torch import load_file
from sharding import relative_error

import ds_seqpar
from ds_seqpar.checkpoint import export
from ds_seqpar.checkpoint.gathering import gather_parameter
from ds_seqpar.comm import collectives
from ds_seqpar.engine import weights
from ds_seqpar.hf import require_model

sys.path.insert(0, str(Path(__file__).parent / "scripts"))
sys.path.insert(0, str(Path(__file__).parent))

import hf_trainer
from same_run import assert_same_files, assert_same_log, deepspeed_json

assert transformers.trainer
RANK = 3


def _adapted(family: str, *, dtype: torch.dtype = torch.float64, own: dict[str, Any] | None = None, **lora: Any) -> Any:
    """A PEFT model whose adapters do something: B starts at zero otherwise."""
    model = tiny(family, dtype=dtype, **(own or {}))
    torch.manual_seed(3)
    settings: dict[str, Any] = {"target_modules": "all-linear", "r": RANK, "lora_alpha": 5, **lora}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.train()


def _errors(mine: Any, reference: Any) -> dict[str, float]:
    state = require_model(mine).seqpar
    theirs = dict(reference.named_parameters())
    errors = {}
    for name, parameter in mine.named_parameters():
        cut, grad = state.entries[id(parameter)].cut, parameter.grad
        whole = grad if cut is None or grad is None else gather_parameter(grad, cut, state.groups.tp_group)
        errors[name] = relative_error(whole, theirs[name].grad)
    return errors


def _gradients(family: str, key: dict[str, Any], train_base: bool, lora: dict[str, Any]) -> None:
    fresh_groups()
    model, reference = _adapted(family, **lora), _adapted(family, **lora)
    for each in (model, reference):
        each.requires_grad_(True) if train_base else None
    ds_seqpar.shard(model, {"tp_size": dist.get_world_size(), "loss_chunk_tokens": 4, **key})
    for batch in batches(3, 2):
        loss, expected = model(**batch).loss, reference(**batch).loss
        assert relative_error(loss.detach(), expected.detach()) < 1e-6
        loss.backward()
        expected.backward()
    errors = _errors(model, reference)
    bad = {name: error for name, error in errors.items() if not error <= 1e-6}  # norms compute in fp32
    assert not bad, bad
    trained = [name for name, p in reference.named_parameters() if p.grad is not None and float(p.grad.norm()) > 1e-9]
    assert trained and (train_base or all("lora_" in n or "modules_to_save" in n for n in trained))


KEYS = {
    "": {},
    "tp only": {"sequence_parallel": False},
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "family", ["llama", "phi3", *(pytest.param(x, marks=SLOW) for x in ("qwen3", "gemma2", "gpt_neox"))]
)
def test_every_adapters_gradient_equals_the_unsharded_models(family: str) -> None:
    run_ranks(2, _gradients, family, {}, False, {}, timeout=90)


@pytest.mark.parametrize("key", ["tp only", pytest.param("selective", marks=SLOW), "full"])
def test_modes_keep_the_adapters_gradients(key: str) -> None:
    run_ranks(2, _gradients, "llama", KEYS[key], False, {}, timeout=90)


@pytest.mark.parametrize(
    "lora",
    [
        dict(use_rslora=True, target_modules=["q_proj", "o_proj"]),
        dict(lora_bias=True),
        dict(target_modules=["embed_tokens", "v_proj", "down_proj"]),
        pytest.param(dict(target_modules=["embed_tokens"], lora_dropout=0.0), marks=SLOW),
    ],
    ids=["rslora", "bias", "embedding", "embedding alone"],
)
def test_kinds_of_lora_are_exact_with_the_base_trained_too(lora: dict[str, Any]) -> None:
    run_ranks(3, _gradients, "llama", {}, True, lora, timeout=90)


COPIES = ["lm_head", "embed_tokens", "norm", "input_layernorm", "up_proj"]


@pytest.mark.parametrize(
    ("family", "key", "tied"),
    [
        ("llama", {}, False),
        pytest.param("llama", {}, True, marks=SLOW),
        pytest.param("gemma2", {}, False, marks=SLOW),
        pytest.param("llama", {"sequence_parallel": False}, False, marks=SLOW),
        pytest.param("llama", {"recompute": "full"}, False, marks=SLOW),
    ],
)
def test_modules_that_are_trained_as_copies_keep_the_gradients(family: str, key: dict[str, Any], tied: bool) -> None:
    """`modules_to_save`: head, embedding, norms and a linear, each beside its frozen original."""
    lora = dict(target_modules=["q_proj", "down_proj"], modules_to_save=COPIES, own={"tie_word_embeddings": tied})
    run_ranks(2, _gradients, family, key, False, lora, timeout=90)


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize(
    ("family", "key", "lora"),
    [
        ("mixtral", {}, dict(target_parameters=EXPERTS)),
        ("deepseek_v3", {}, dict(target_parameters=EXPERTS, lora_bias=False)),
        pytest.param("gpt_oss", {}, dict(target_parameters=EXPERTS), marks=SLOW),
        pytest.param("qwen2_moe", {}, dict(lora_bias=True), marks=SLOW),
        pytest.param("mixtral", {"sequence_parallel": False}, dict(target_parameters=EXPERTS), marks=SLOW),
        pytest.param("mixtral", {"recompute": "full"}, dict(target_parameters=EXPERTS), marks=SLOW),
        pytest.param("deepseek_v3", {"recompute": "full"}, dict(target_parameters=EXPERTS), marks=SLOW),
    ],
)
def test_adapters_of_experts_and_latents_keep_the_gradients(
    family: str, key: dict[str, Any], lora: dict[str, Any]
) -> None:
    """Experts' parameters, shared experts and their gate, low-rank projections of latent attention."""
    run_ranks(2, _gradients, family, key, False, lora, timeout=90)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("mixtral", dict(target_parameters=EXPERTS)),
        ("llama", dict(target_modules=["embed_tokens", "v_proj", "down_proj"], use_rslora=True)),
        ("llama", dict(target_modules=["q_proj", "down_proj"], modules_to_save=COPIES)),
    ],
    ids=["experts", "embedding", "copies"],
)
def test_four_ranks_keep_the_adapters_gradients(family: str, lora: dict[str, Any]) -> None:
    run_ranks(4, _gradients, family, {}, False, lora, timeout=90)


def test_copied_kv_heads_keep_the_adapters_gradients() -> None:
    run_ranks(4, _gradients, "llama", {}, False, {}, timeout=90)


def _traffic(tp: int) -> None:
    fresh_groups()
    targets = ["embed_tokens", *(f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down"))]
    model = _adapted("llama", dtype=torch.float32, target_modules=targets)
    hidden, seq = 48, 8
    ds_seqpar.shard(model, {"tp_size": tp})
    widths: dict[str, Counter[int]] = {"forward": Counter(), "backward": Counter()}
    phase = "forward"
    plain = collectives._all_gather, collectives._reduce_scatter

    def all_gather(out: Any, x: Any, **kwargs: Any) -> Any:
        widths[phase][out.shape[-1]] += out.dim() == 2
        return plain[0](out, x, **kwargs)

    def reduce_scatter(out: Any, x: Any, **kwargs: Any) -> Any:
        widths[phase][x.shape[-1]] += x.dim() == 2
        return plain[1](out, x, **kwargs)

    saved: list[tuple[int, ...]] = []
    weights = {p.data_ptr() for p in model.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in weights:
            saved.append(tuple(x.shape))
        return x

    batch = batches(1, 2, seq)[0]
    collectives._all_gather, collectives._reduce_scatter = all_gather, reduce_scatter
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(**batch).loss
        phase = "backward"
        loss.backward()
    finally:
        collectives._all_gather, collectives._reduce_scatter = plain
    assert not require_model(model).seqpar_report.materialised
    layers, adapters, embeddings = 2, 7, 1
    # Two blocks a layer are entered and left at full width (the embedding and the loss come on top), adapters at width r.
    assert widths["forward"][RANK] == widths["backward"][RANK] == layers * adapters + embeddings
    full = widths["forward"][hidden], widths["backward"][hidden]
    # Backward: dy of o and down, dx of both blocks; no input is gathered again for a frozen weight's gradient. The first
    # block's input has no gradient but its adapters'.
    assert full[0] <= 4 * layers + 3 and full[1] <= 4 * layers + 1, full
    tokens = 2 * seq
    wide = [s for s in saved if torch.Size(s).numel() >= tokens * hidden and s[0] == tokens]
    assert not wide, f"whole inputs are kept: {wide}"


@pytest.mark.parametrize("tp", [2])
def test_adapters_communicate_at_the_width_of_their_rank(tp: int) -> None:
    run_ranks(tp, _traffic, tp, timeout=60)


EMBEDDING: dict[str, Any] = dict(target_modules=["embed_tokens", "v_proj", "down_proj"])
TRAINED_COPIES: dict[str, Any] = dict(
    target_modules=["v_proj", "down_proj"], modules_to_save=COPIES, own={"tie_word_embeddings": False}
)


def _kept_for_linears(train_base: bool) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of what the nodes of parallel linears and of the loss keep for backward, beside parameters."""
    fresh_groups()
    model = _adapted("llama", dtype=torch.float32, target_modules=["q_proj", "gate_proj"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(train_base or "lora_" in name)
    ds_seqpar.shard(model, {"tp_size": 2})
    loss = model(**batches(1, 2, 8)[0]).loss
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[str, list[tuple[int, ...]]] = {}
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [other for other, _ in node.next_functions]
        tensors = [x for x in getattr(node, "saved_tensors", ()) if x is not None and x.data_ptr() not in weights]
        kept.setdefault(node.name(), []).extend(tuple(x.shape) for x in tensors)
    return kept


def test_a_frozen_base_keeps_no_input_for_its_weights_gradients() -> None:
    frozen, trained = (run_ranks(2, _kept_for_linears, train, timeout=60)[0] for train in (False, True))
    tokens, layers, hidden, intermediate, attended = 2 * 8, 2, 48, 50, 64
    gate_and_up = [(2, tokens // 2, intermediate // 2)] * 2 * layers  # the activation's own inputs, also for dx
    shard, heads = (1, tokens // 2, hidden), (2, tokens // 2, attended // 2)
    norms = [shard] * (
        2 * layers - 1
    )  # inputs of the norms that the products are made of; the first one's gets no gradient
    assert frozen["ColumnParallelBackward"] == norms and frozen["RowParallelBackward"] == gate_and_up, frozen
    assert frozen["_LinearCrossEntropyBackward"] == [(tokens // 2, hidden), ()], "the gradient of the hidden states"
    assert trained["ColumnParallelBackward"] == [shard] * 2 * layers, "that the base does when it is trained"
    assert sorted(trained["RowParallelBackward"]) == sorted(gate_and_up + [heads] * layers)


def _merge(folder: str, stage: int, lora: dict[str, Any]) -> None:
    fresh_groups()
    own = lora.get("own", {})
    model, reference = _adapted("llama", dtype=torch.float32, **lora), _adapted("llama", dtype=torch.float32, **lora)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    config = {
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0, "ds_seqpar": {"tp_size": 2},
    }  # fmt: skip
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    theirs = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.1)
    for batch in batches(2, 2):
        engine.backward(engine(**batch).loss)
        engine.step()
        reference(**batch).loss.backward()
        theirs.step()
        theirs.zero_grad()
    with pytest.raises(ds_seqpar.CheckpointError, match=r"call ds_seqpar.save_pretrained\(engine, folder\)"):
        engine.module.save_pretrained(f"{folder}/wrong")
    with pytest.raises(ds_seqpar.PlanError, match="before the model is sharded"):
        engine.module.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    gathered = _recorded(weights, "whole_parameter")
    ds_seqpar.save_pretrained(engine, f"{folder}/adapter")
    # PEFT writes the table of an embedding that has an adapter.
    frozen = {id(p) for n, p in engine.module.named_parameters() if not (p.requires_grad or "embed_tokens" in n)}
    assert gathered and not frozen & {id(p) for p in gathered}, "saving adapters gathers nothing of the base"
    if stage < 3:
        with engine.module.disable_adapter(), torch.no_grad():
            plain = tiny("llama", **own)(**batches(1, 2)[0]).loss
            assert relative_error(engine.module(**batches(1, 2)[0]).loss, plain) < 1e-5
    merged = engine.module.merge_and_unload()
    ds_seqpar.save_pretrained(merged, f"{folder}/merged")
    if dist.get_rank() == 0:
        reference.save_pretrained(f"{folder}/their_adapter")
        again = PeftModel.from_pretrained(tiny("llama", **own), f"{folder}/adapter")
        for (name, mine), (other, expected) in zip(again.named_parameters(), reference.named_parameters(), strict=True):
            assert name == other and relative_error(mine, expected) < 1e-5, name
        reference.merge_and_unload().save_pretrained(f"{folder}/their_merged")


def _recorded(module: Any, name: str) -> list[Any]:
    """The first argument of every call of `module.name` from now on."""
    plain, calls = getattr(module, name), []

    def recording(first: Any, *rest: Any) -> Any:
        calls.append(first)
        return plain(first, *rest)

    setattr(module, name, recording)
    return calls


@pytest.mark.parametrize(
    ("stage", "lora"),
    [
        (1, dict(target_modules=["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"])),
        (3, EMBEDDING),
        pytest.param(0, EMBEDDING, marks=SLOW),
        pytest.param(2, EMBEDDING, marks=SLOW),
        (3, TRAINED_COPIES),
        pytest.param(1, TRAINED_COPIES, marks=SLOW),
    ],
    ids=["linears-1", "embedding-3", "embedding-0", "embedding-2", "copies-3", "copies-1"],
)
def test_adapters_are_saved_and_merged_as_unsharded(tmp_path: Path, stage: int, lora: dict[str, Any]) -> None:
    run_ranks(4 if stage == 3 else 2, _merge, str(tmp_path), stage, lora, timeout=90)
    mine, theirs = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("adapter", "their_adapter"))
    assert sorted(mine) == sorted(theirs)
    assert_same_files(tmp_path / "adapter", tmp_path / "their_adapter")
    assert_same_files(tmp_path / "merged", tmp_path / "their_merged")


# A's gradient is zero until B is not: AdamW would scale up its rounding without a larger epsilon.
ARGUMENTS: dict[str, Any] = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, learning_rate=1e-2, adam_epsilon=1e-3,
    max_grad_norm=0.5, save_strategy="no", eval_strategy="no", gradient_checkpointing=True,
)  # fmt: skip
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def _lora_job(folder: Path, **arguments: Any) -> dict[str, Any]:
    """A Trainer's job on a model that is saved in `folder`."""
    tiny("llama").save_pretrained(folder / "model")
    lora = {"r": 3, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    job = {"model": str(folder / "model"), "rows": 16, "lora": lora, "predict": False}
    return {**job, "arguments": {**ARGUMENTS, **arguments}}


@pytest.mark.parametrize(("stage", "world"), [pytest.param(1, 2, marks=SLOW), (3, 4)])
def test_the_trainer_trains_and_saves_lora_as_one_process(tmp_path: Path, stage: int, world: int) -> None:
    job = _lora_job(tmp_path)
    for name in ("alone", "mine"):
        (tmp_path / name).mkdir()
    one = {**job, "arguments": {**job["arguments"], "gradient_accumulation_steps": world}}
    alone = run_ranks(1, _on_rank, one, str(tmp_path / "alone"), deepspeed=False)[0]
    sharded = {**job, "arguments": {**job["arguments"], "deepspeed": deepspeed_json(stage)}}
    for ours in run_ranks(world, _on_rank, sharded, str(tmp_path / "mine"), timeout=120):
        assert_same_log(ours["log"], alone["log"], without=("total_flos",))
        if stage < 3:  # there the Trainer asks DeepSpeed for what is trained
            assert ours["gathered"] and all(ours["gathered"]), "saving adapters gathers nothing of the base"
    assert_same_files(tmp_path / "mine" / "saved", tmp_path / "alone" / "saved")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), [(1, 2), (3, 4)])
def test_the_trainer_resumes_lora_and_loads_the_best_adapter(tmp_path: Path, stage: int, world: int) -> None:
    saving: dict[str, Any] = dict(
        max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="logprob", greater_is_better=False,
    )  # fmt: skip
    sizes = {
        "alone": (1, {"gradient_accumulation_steps": world}),
        "mine": (world, {"deepspeed": deepspeed_json(stage)}),
    }

    def compare(resume: bool) -> None:
        runs = {}
        for name, (ranks, own) in sizes.items():
            job = _lora_job(tmp_path, **saving, **own)
            (tmp_path / name).mkdir(exist_ok=True)
            if resume:
                shutil.rmtree(tmp_path / name / "trainer" / "checkpoint-4")
            job = {**job, "resume": resume}
            runs[name] = run_ranks(ranks, _on_rank, job, str(tmp_path / name), timeout=120, deepspeed=ranks > 1)
        alone = runs["alone"][0]
        for ours in runs["mine"]:
            # A mean of batches' losses depends on how the rows are batched; on resuming, the Trainer's mean on the run.
            assert_same_log(ours["log"], alone["log"], without=("total_flos", "eval_loss", "train_loss"))
            assert (
                ours["events"] == alone["events"] == ["train_begin", *(f"step {i}" for i in range(1 + 2 * resume, 5))]
            )
            assert ours["state"]["best"] == alone["state"]["best"] == "checkpoint-2"
        assert_same_files(tmp_path / "mine" / "saved", tmp_path / "alone" / "saved")

    compare(resume=False)
    compare(resume=True)


def _on_rank(job: dict[str, Any], out: str) -> dict[str, Any]:
    gathered = _recorded(export, "whole_parameter")
    report = hf_trainer.run(job, Path(out))
    return {**report, "gathered": [p.requires_grad for p in gathered]}


def _refused(lora: dict[str, Any]) -> None:
    fresh_groups()
    model = tiny("llama")
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[]) if "ia3" in lora else LoraConfig(**lora)
    ds_seqpar.shard(get_peft_model(model, config), {"tp_size": 2})


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (dict(use_dora=True, target_modules=["q_proj"]), "DoRA.*use plain LoRA or rsLoRA"),
        (dict(target_modules=["lm_head"]), "lm_head.*leave it out of the adapter's target_modules"),
        (dict(target_modules=["q_proj"], modules_to_save=["mlp"]), "mlp is trained as a copy of a module with parts"),
        (dict(ia3=True), "peft.tuners.ia3.*which cannot be sharded"),
    ],
)
def test_what_is_not_exact_is_refused_by_name(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(RankError, match=message):
        run_ranks(2, _refused, lora, timeout=60)


def _quantized() -> None:
    """A model as bitsandbytes leaves it: transformers marks it, whatever its layers are."""
    from transformers import BitsAndBytesConfig

    fresh_groups()
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    model.base_model.model.hf_quantizer = object()
    model.base_model.model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    before = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(ds_seqpar.PlanError, match=r"\(bitsandbytes\).*QLoRA is not available: load the"):
        ds_seqpar.shard(model, {"tp_size": 2})
    assert before == {name: p.shape for name, p in model.named_parameters()}
    experts = get_peft_model(tiny("mixtral"), LoraConfig(target_modules=["q_proj"], target_parameters=EXPERTS))
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "ds_seqpar": {"tp_size": 2}}
    with pytest.raises(
        ds_seqpar.PlanError, match=r"experts has adapters of single parameters .* \{\"stage\": 2\} or lower"
    ):
        deepspeed.initialize(model=experts, config=config)


def test_quantized_bases_and_partitioned_experts_are_refused_by_name() -> None:
    run_ranks(2, _quantized, timeout=60)


DRAWS = 80
"""Losses whose mean is compared, with dropout."""


def _dropout() -> list[float]:
    """Off in evaluation; in training each rank drops its own rows, nothing is gathered, and whole factors stay replicas."""
    fresh_groups()
    model, reference = _adapted("llama", lora_dropout=0.5), _adapted("llama", lora_dropout=0.5)
    ds_seqpar.shard(model, {"tp_size": 2})
    batch = batches(1, 2)[0]
    with torch.no_grad():
        mine, theirs = model.eval()(**batch).loss, reference.eval()(**batch).loss
    assert relative_error(mine, theirs) < 1e-6
    torch.manual_seed(0)
    losses = []
    for _ in range(DRAWS):
        loss = model.train()(**batch).loss
        losses.append(float(loss.detach()))
    loss.backward()
    state = require_model(model).seqpar
    assert not state.materialised, dict(state.materialised)
    for parameter in model.parameters():
        if parameter.grad is not None and state.entries[id(parameter)].cut is None:
            everyone = [torch.empty_like(parameter.grad) for _ in range(2)]
            dist.all_gather(everyone, parameter.grad)
            assert torch.equal(*everyone)
    torch.manual_seed(1)
    with torch.no_grad():
        expected = [float(reference.train()(**batch).loss) for _ in range(DRAWS)]
    for spread in (torch.tensor(losses), torch.tensor(expected)):
        assert spread.std() > 0
    gap = abs(sum(losses) - sum(expected)) / DRAWS
    assert gap < 5 * (torch.tensor(losses).std() + torch.tensor(expected).std()) / DRAWS**0.5, (
        "the losses have another mean"
    )
    return losses


def test_adapter_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    first, second = run_ranks(2, _dropout, timeout=90)
    assert first == second


def _resumed(folder: str, stage: int) -> None:
    def engine_over(model: Any) -> Any:
        fresh_groups()
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
            "ds_seqpar": {"tp_size": 2},
        }
        trained = [p for p in model.parameters() if p.requires_grad]
        return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained, lr=0.05), config=config)[0]

    def step(engine: Any, batch: dict[str, torch.Tensor]) -> float:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        return float(loss)

    first, data = engine_over(_adapted("llama", dtype=torch.float32)), batches(4, 2)
    for batch in data[:2]:
        step(first, batch)
    first.save_checkpoint(folder)
    expected = [step(first, batch) for batch in data[2:]]
    other = _adapted("llama", dtype=torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    second = engine_over(other)
    path, _ = second.load_checkpoint(folder)
    assert path is not None
    assert [step(second, batch) for batch in data[2:]] == expected


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_adapters_resume_bit_for_bit(tmp_path: Path, stage: int) -> None:
    run_ranks(2, _resumed, str(tmp_path), stage)
