"""What cannot be done is refused in words, on every rank, in bounded time, with the model untouched."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from exactness import fresh_groups
from model_types import tiny_of
from models import batches, device, tiny
from ranks import ON_GPU, run_ranks
from sharding import full_gradients, relative_error, twins
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

import ds_seqpar
from ds_seqpar import ConfigError, DataMismatchError, PlanError, SeqParError

Outcome = tuple[str, str]
NO_SPECIAL: dict[str, Any] = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
SECONDS = 60.0


def _outcome(call: Callable[[], object]) -> Outcome:
    """(class of the error, its message); anything that ds_seqpar did not raise on purpose fails the test."""
    try:
        call()
    except SeqParError as error:
        return type(error).__name__, str(error)
    return "nothing", "was raised"


def _fingerprint(model: nn.Module) -> list[tuple[str, int, tuple[int, ...], float, type]]:
    """What "untouched" means: the same parameter objects with the same shapes and contents in modules of the same classes."""
    parameters = [
        (name, id(p), tuple(p.shape), float(p.detach().double().sum()), type(p)) for name, p in model.named_parameters()
    ]
    return parameters + [(name, id(m), (), 0.0, type(m)) for name, m in model.named_modules()]


def _config(tp: Any = 2, **ds: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 1, "ds_seqpar": {"tp_size": tp}, **ds}


def _through_both(model: Any, config: dict[str, Any], **arguments: Any) -> Outcome:
    """The outcome of deepspeed.initialize, which must be that of ds_seqpar.initialize."""
    fresh_groups()
    outcomes = {
        _outcome(lambda f=f: f(model=model, config=config, **arguments))
        for f in (deepspeed.initialize, ds_seqpar.initialize)
    }
    (outcome,) = outcomes
    return outcome


def _configurations() -> dict[str, Outcome]:
    model = tiny("llama")
    before = _fingerprint(model)
    trains = {"optimizer": {"type": "AdamW"}}  # an engine without one, such as a reference model's, clips nothing
    half = {"bf16": {"enabled": True}, **trains}
    cases: dict[str, dict[str, Any]] = {
        "tp_size": _config(3),
        "tp_size > world": _config(8),
        "autotp": _config(tensor_parallel={"autotp_size": 4}),
        "ulysses": _config(sequence_parallel_size=2),
        "clipping": _config(gradient_clipping=0.5, **half),
        "default clipping": _config(**half),
        "stage 0 clipping": _config(zero_optimization={"stage": 0}, gradient_clipping=1.0, **half),
        "fp16": _config(fp16={"enabled": True}, **trains),
        "batch": _config(train_batch_size=3),
        "batch of all": {
            **_config(train_batch_size=3, gradient_accumulation_steps=2),
            "train_micro_batch_size_per_gpu": 1,
        },
        "odd batch": {"train_batch_size": 5, "ds_seqpar": {"tp_size": 2}},
        "no batch": {"ds_seqpar": {"tp_size": 2}},
        "micro batch": {**_config(), "train_micro_batch_size_per_gpu": 0},
        "auto": {**_config(), "train_micro_batch_size_per_gpu": "auto"},
        "key": _config("2"),
        "unknown field": {**_config(), "ds_seqpar": {"tp_size": 2, "overlapp": "off"}},
    }
    outcomes = {name: _through_both(model, config) for name, config in cases.items()}
    outcomes["mpu"] = _through_both(model, _config(), mpu=SimpleNamespace(get_model_parallel_rank=lambda: 0))
    assert _fingerprint(model) == before
    return outcomes


CONFIGURATIONS = {
    "tp_size": '"ds_seqpar.tp_size": 3 does not divide the 4 ranks of this run; use a divisor of 4',
    "tp_size > world": '"ds_seqpar.tp_size": 8 does not divide the 4 ranks',
    "autotp": '"tensor_parallel.autotp_size": 4 and "ds_seqpar.tp_size": 2 contradict',
    "ulysses": '"sequence_parallel_size": 2 (Ulysses) cannot be combined with "ds_seqpar"; remove one',
    "clipping": '"gradient_clipping": 0.5',
    "default clipping": '"gradient_clipping": 1.0 (DeepSpeed\'s default is 1.0) with "bf16" at ZeRO stage 0',
    "stage 0 clipping": '"zero_optimization": {"stage": 1}, or "gradient_clipping": 0',
    "fp16": 'with "fp16" at ZeRO stage 0',
    "batch": '"train_batch_size": 3 is not micro batch 1 x accumulation 1 x data-parallel size 2',
    "batch of all": '"train_batch_size": 3 is not micro batch 1 x accumulation 2 x data-parallel size 2 (ranks / tp_size)',
    "odd batch": '"train_batch_size": 5 is not micro batch 2 x accumulation 1 x data-parallel size 2',
    "no batch": 'needs "train_micro_batch_size_per_gpu" or "train_batch_size"',
    "micro batch": '"train_micro_batch_size_per_gpu" must be an integer >= 1, not 0',
    "auto": "\"train_micro_batch_size_per_gpu\" must be an integer >= 1, not 'auto'",
    "key": "\"ds_seqpar.tp_size\" must be an integer >= 1, not '2'",
    "unknown field": "unknown field(s) ['overlapp']",
    "mpu": 'mpu= cannot be combined with "ds_seqpar"',
}


def _all_ranks_say(results: list[dict[str, Outcome]], error: type[SeqParError], expected: dict[str, str]) -> None:
    assert all(result == results[0] for result in results), f"the ranks disagree: {results}"
    assert set(results[0]) == set(expected)
    for name, (kind, message) in results[0].items():
        assert kind == error.__name__ and expected[name] in message, f"{name}: {kind}: {message}"


def test_configurations_that_cannot_work_are_refused_on_every_rank() -> None:
    _all_ranks_say(run_ranks(4, _configurations, timeout=SECONDS), ConfigError, CONFIGURATIONS)


class _Wrapper(nn.Module):
    """What DistributedDataParallel, FSDP and torch.compile look like from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def _quantized() -> PreTrainedModel:
    model = tiny("llama")
    model.hf_quantizer = SimpleNamespace()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return model


def _with_gradient() -> PreTrainedModel:
    model = tiny("llama")
    model(**batches(1, 1)[0]).loss.backward()
    return model


def _with_adapter() -> PreTrainedModel:
    """A module that owns parameters in a planned block, as PEFT's adapters do."""
    model = tiny("llama")
    model.model.layers[1].self_attn.q_proj.lora_A = nn.Linear(48, 4, bias=False)
    return model


def _mixing_tokens() -> PreTrainedModel:
    model = tiny("llama")

    class Mixer(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.mean(dim=1, keepdim=True)

    model.model.layers[0].post_attention_layernorm = Mixer(48)
    return model


def _pegasus_x() -> Any:
    sizes = dict(vocab_size=64, d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_layers=1, decoder_layers=1)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=0, decoder_start_token_id=0)
    return AutoModel.from_config(AutoConfig.for_model("pegasus_x", **sizes, **heads))


def _ibert() -> Any:
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return AutoModel.from_config(AutoConfig.for_model("ibert", **sizes))


def _encoder(model_type: str, **own: Any) -> Any:
    def build() -> Any:
        return tiny_of(model_type, **own)

    return build


def _on_meta() -> Any:
    return tiny("llama").to("meta")


def _under_zero_init() -> Any:
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        return tiny("llama", **NO_SPECIAL)


def _sharded() -> Any:
    model = tiny("llama")
    ds_seqpar.shard(model, {"tp_size": 2, "loss_chunk_tokens": 7})  # another key; for the same one it gets an engine
    return model


def _tensor_parallel_already() -> Any:
    model = tiny("llama")
    model._tp_size = 2
    return model


def _with_max_norm() -> Any:
    model = tiny("llama")
    model.model.embed_tokens.max_norm = 1.0
    return model


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "an encoder without a plan": (_ibert, "'ibert' has no tp_plan"),
    "seq2seq without a plan": (_pegasus_x, "'pegasus_x' is an encoder-decoder without a data file that names its stacks"),
    "layers skipped at random": (_encoder("bart", decoder_layerdrop=0.1), "decoder_layerdrop=0.1: layers are skipped"),
    "images dropped at random": (_encoder("dinov2", drop_path_rate=0.1), "drop_path_rate=0.1: a block's output is dropped"),
    "heads mixed with each other": (_encoder("deberta", talking_head=True), "talking_head=True cannot be sharded exactly"),
    "tokens in the last dimension": (
        _encoder("squeezebert", embedding_size=48, intermediate_size=48),
        "its layers hold tokens in the last dimension",
    ),
    "sequence cut in a layer": (
        _encoder("bert", chunk_size_feed_forward=2),
        "chunk_size_feed_forward=2 cuts the sequence",
    ),
    "quantized": (_quantized, "this llama model is quantized (bitsandbytes)"),
    "no Hugging Face model": (lambda: nn.Sequential(nn.Linear(4, 4)), "(transformers.PreTrainedModel), not Sequential"),
    "no model": (lambda: None, "(transformers.PreTrainedModel), not NoneType"),
    "wrapped": (
        lambda: _Wrapper(tiny("llama")),
        "the model is wrapped in _Wrapper; pass the Hugging Face model itself",
    ),
    "sharded": (_sharded, "already sharded by ds_seqpar"),
    "tensor parallel": (_tensor_parallel_already, "already tensor-parallel"),
    "zero.Init": (
        _under_zero_init,
        "was partitioned by zero.Init while the model was built; build the model outside it",
    ),
    "meta": (_on_meta, "is on the meta device; load the weights first"),
    "with a gradient": (_with_gradient, "already has a gradient"),
    "adapter": (_with_adapter, "layers.1.self_attn.q_proj.lora_A (Linear) owns parameters ['weight']"),
    "mixes tokens": (_mixing_tokens, "post_attention_layernorm (Mixer) owns parameters and mixes tokens"),
    "too few heads": (lambda: tiny("llama", num_attention_heads=1, num_key_value_heads=1), "num_attention_heads=1"),
    "small vocabulary": (lambda: tiny("llama", vocab_size=1, **NO_SPECIAL), "1 features cannot be cut over tp_size=2"),
    "max_norm": (_with_max_norm, "nn.Embedding(max_norm=1.0) cannot be cut by vocabulary"),
}


def _models() -> dict[str, Outcome]:
    outcomes = {}
    for name, (build, _) in MODELS.items():
        fresh_groups()
        model = build()
        before = _fingerprint(model) if isinstance(model, nn.Module) and name != "meta" else []
        outcomes[name] = _through_both(model, _config(train_batch_size=1))
        if before:
            assert _fingerprint(model) == before, f"{name}: the model was touched"
            assert name == "sharded" or not hasattr(model, "seqpar"), name
    return outcomes


def test_models_that_cannot_be_sharded_are_refused_and_left_untouched() -> None:
    results = run_ranks(2, _models, timeout=2 * SECONDS)
    _all_ranks_say(results, PlanError, {name: message for name, (_, message) in MODELS.items()})


def _renamed() -> list[str]:
    """A module that a newer transformers renamed: the plan's pattern has no match, so its block cannot be cut."""
    fresh_groups()
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.upward = layer.mlp.up_proj
        del layer.mlp.up_proj
    return ds_seqpar.shard(model, {"tp_size": 2}).remarks


def test_a_block_whose_plan_does_not_match_is_repeated_whole_and_said_to_be() -> None:
    for remarks in run_ranks(2, _renamed, timeout=SECONDS):
        assert sum("mlp is repeated whole by every rank: no plan says what becomes of" in r for r in remarks) == 2


def _second_model(tp_first: int, tp_second: int) -> tuple[Outcome, bool]:
    fresh_groups()
    ds_seqpar.shard(tiny("llama"), {"tp_size": tp_first})
    second = tiny("qwen3")
    before = _fingerprint(second)
    outcome = _outcome(lambda: ds_seqpar.shard(second, {"tp_size": tp_second}))
    return outcome, _fingerprint(second) == before


def test_two_models_in_one_process_must_have_one_tp_size() -> None:
    for (kind, message), untouched in run_ranks(4, _second_model, 2, 4, timeout=SECONDS):
        assert kind == "ConfigError" and untouched
        assert '"ds_seqpar.tp_size": 4' in message and "tensor-parallel groups of 2 for another model" in message
    for (kind, message), untouched in run_ranks(2, _second_model, 2, 2, timeout=SECONDS):
        assert (kind, message, untouched) == ("nothing", "was raised", False)


def _trains_beside_another() -> None:
    """Two sharded models of one size in turn, as a policy and its reference model: neither disturbs the other."""
    first, first_reference = twins("llama")
    second = tiny("qwen3", dtype=torch.float64)
    second_reference = tiny("qwen3", dtype=torch.float64)
    ds_seqpar.shard(second, {"tp_size": 2})
    batch = batches(1, 2)[0]
    losses = []
    for mine, beside in ((first, second), (first_reference, second_reference)):
        with torch.no_grad():
            teacher = beside(**batch).logits.softmax(-1)
        loss = -(teacher * mine(**batch).logits.log_softmax(-1)).sum(-1).mean()
        loss.backward()
        losses.append(float(loss.detach()))
    assert abs(losses[0] - losses[1]) < 1e-6
    gradients = full_gradients(first)
    for name, parameter in first_reference.named_parameters():
        assert relative_error(gradients[name], parameter.grad) <= 1e-6, name


def test_two_models_of_one_tp_size_work_side_by_side() -> None:
    run_ranks(2, _trains_beside_another, timeout=SECONDS)


ON_THE_CPU = pytest.mark.skipif(ON_GPU, reason="contents on a GPU are compared one forward later; run without a GPU")


def _bad_data(rank: int, batch: dict[str, Tensor], what: str) -> dict[str, Any]:
    changed = dict(batch)
    if rank == 0 or what == "none":
        return changed
    if what == "shape":
        changed = {name: x[:, :-1] for name, x in batch.items()}
    elif what == "rows":
        changed = {name: x[:1] for name, x in batch.items()}
    elif what == "content":
        changed["input_ids"] = batch["input_ids"].index_fill(1, torch.tensor([3], device=device()), 5)
    elif what == "labels":
        changed["labels"] = batch["labels"].index_fill(1, torch.tensor([3], device=device()), 5)
    elif what == "dtype":
        changed["input_ids"] = batch["input_ids"].int()
    elif what == "mask missing":
        del changed["attention_mask"]
    elif what == "mask None":
        changed["attention_mask"] = None
    elif what == "labels missing":
        del changed["labels"]
    elif what == "flag":
        changed["use_cache"] = False
    elif what == "embeddings":
        changed["inputs_embeds"] = torch.zeros(*changed.pop("input_ids").shape, 48, device=device())
    return changed


DATA = {
    "shape": "attention_mask",
    "rows": "attention_mask",
    "content": "input_ids",
    "labels": "labels",
    "dtype": "input_ids",
    "mask missing": "attention_mask",
    "mask None": "attention_mask",
    "labels missing": "labels",
    "flag": "use_cache",
    "embeddings": "input_ids",
}


def _mismatches() -> dict[str, Outcome]:
    model, _ = twins()
    rank, batch = torch.distributed.get_rank(), batches(1, 2)[0]
    outcomes = {}
    for training in (True, False):
        model.train(training)
        for what in DATA:
            outcome = _outcome(lambda what=what: model(**_bad_data(rank, batch, what)))
            assert outcomes.setdefault(what, outcome) == outcome
            model(**batch).loss.backward()  # the refusal left nothing behind
        outcome = _outcome(lambda: model(batch["input_ids"] + 3 * rank, labels=batch["labels"]))
        assert outcome[0] == "DataMismatchError" and outcome[1].startswith("argument 0 differs"), outcome
        inner = _outcome(lambda: model.model(**{**_bad_data(rank, batch, "content"), "labels": None}))
        assert inner[0] == "DataMismatchError" and inner[1].startswith("input_ids differs"), inner
    return outcomes


@ON_THE_CPU
def test_data_that_differ_within_a_tensor_parallel_group_are_named_on_every_rank() -> None:
    results = run_ranks(2, _mismatches, timeout=SECONDS)
    expected = {
        what: f"{argument} differs between the ranks of one tensor-parallel group: rank 0: "
        for what, argument in DATA.items()
    }
    _all_ranks_say(results, DataMismatchError, expected)
    assert (
        "rank 1: not given" in results[0]["mask missing"][1] and "shard the data by rank // 2" in results[0]["shape"][1]
    )


def _different_data_parallel_data() -> list[float]:
    """Data-parallel ranks have data of their own; the next engine forward after a mismatch elsewhere still works."""
    fresh_groups()
    model = tiny("llama")
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=_config())[
        0
    ]
    rank = torch.distributed.get_rank()
    batch = batches(2, 1)[rank // 2]
    bad = _outcome(lambda: engine(**_bad_data(rank % 2, batch, "content")))
    assert bad[0] == "DataMismatchError" and f"rank {rank // 2 * 2}: " in bad[1], bad
    losses = [float(engine(**batch).loss.detach())]
    return losses


@ON_THE_CPU
def test_only_the_ranks_of_one_group_must_agree() -> None:
    (a,), (b,), (c,), (d,) = run_ranks(4, _different_data_parallel_data, timeout=SECONDS)
    assert a == b != c == d


def _attentions() -> dict[str, Outcome]:
    model, _ = twins()
    batch = batches(1, 2)[0]
    outcomes = {"argument": _outcome(lambda: model(**batch, output_attentions=True))}
    model.set_attn_implementation("eager")
    outcomes["eager"] = _outcome(lambda: model(**batch, output_attentions=True))
    model.config.output_attentions = True
    outcomes["config"] = _outcome(lambda: model(**batch))
    model.config.output_attentions = False
    model(**batch).loss.backward()
    return outcomes


def test_attention_maps_are_refused_because_each_rank_has_its_own_heads() -> None:
    said = "output_attentions=True is not available"
    results = run_ranks(2, _attentions, timeout=SECONDS)
    _all_ranks_say(results, PlanError, {"argument": said, "eager": said, "config": said})


def _taken_before() -> Outcome:
    """`from deepspeed import initialize` above `import ds_seqpar` leaves the script with DeepSpeed's own function."""
    from ds_seqpar.engine.arguments import plain_initialize

    fresh_groups()
    model = tiny("llama")
    before = _fingerprint(model)
    config = _config(train_batch_size=2, zero_optimization={"stage": 1})
    outcome = _outcome(lambda: plain_initialize(model=model, config=config))
    assert _fingerprint(model) == before
    disabled = {**config, "ds_seqpar": {"enabled": False}}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = plain_initialize(
        model=model, optimizer=optimizer, config={**disabled, "zero_allow_untested_optimizer": True}
    )[0]
    assert not hasattr(engine.module, "seqpar")
    return outcome


def test_an_initialize_imported_before_ds_seqpar_is_refused_rather_than_silently_unsharded() -> None:
    for kind, message in run_ranks(2, _taken_before, timeout=SECONDS):
        assert kind == "ConfigError"
        assert "`initialize` was imported from deepspeed before ds_seqpar was; import ds_seqpar first" in message


def _frozen() -> None:
    """Frozen stays frozen; what was frozen at injection and is trained later gets its whole, summed gradient."""
    model, reference = tiny("llama", dtype=torch.float64), tiny("llama", dtype=torch.float64)
    names = [
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.self_attn.o_proj.bias",
        "model.layers.0.mlp.up_proj.weight",
    ]
    for m in (model, reference):
        for name in names:
            m.get_parameter(name).requires_grad_(False)
    fresh_groups()
    ds_seqpar.shard(model, {"tp_size": 2})
    batch = batches(1, 2)[0]
    for m in (model, reference):
        m.train()
        m(**batch).loss.backward()
        assert all(not m.get_parameter(name).requires_grad and m.get_parameter(name).grad is None for name in names)
        m.zero_grad()
        for name in names:
            m.get_parameter(name).requires_grad_(True)
    for _ in range(2):  # the second time the hook is on already: it must not sum twice
        for m in (model, reference):
            m(**batch).loss.backward()
        gradients = full_gradients(model)
        for name, parameter in reference.named_parameters():
            assert relative_error(gradients[name], parameter.grad) <= 1e-6, name
        assert all(gradients[name] is not None for name in names)
    for m in (model, reference):  # frozen again, and trained again
        m.zero_grad()
        for name in names:
            m.get_parameter(name).requires_grad_(False)
        m(**batch).loss.backward()
        for name in names:
            m.get_parameter(name).requires_grad_(True)
        m(**batch).loss.backward()
    gradients = full_gradients(model)
    for name, parameter in reference.named_parameters():
        assert relative_error(gradients[name], parameter.grad) <= 1e-6, name


def test_a_frozen_parameter_stays_frozen_and_one_unfrozen_later_is_summed() -> None:
    run_ranks(2, _frozen, timeout=SECONDS)


def _everything_frozen_but(trained: str) -> None:
    model, reference = tiny("llama", dtype=torch.float64), tiny("llama", dtype=torch.float64)
    for m in (model, reference):
        for name, parameter in m.named_parameters():
            parameter.requires_grad_(trained in name)
    fresh_groups()
    ds_seqpar.shard(model, {"tp_size": 2})
    for m in (model, reference):
        m.train()
        m(**batches(1, 2)[0]).loss.backward()
    gradients = full_gradients(model)
    for name, parameter in reference.named_parameters():
        assert relative_error(gradients[name], parameter.grad) <= 1e-6, f"{trained}: {name}"


def _partly_trained() -> None:
    for trained in ("embed_tokens", "norm", "k_proj", "bias", "layers.1.", "mlp.down_proj", "model.norm"):
        _everything_frozen_but(trained)


def test_any_part_of_the_model_can_be_trained_alone() -> None:
    run_ranks(2, _partly_trained, timeout=SECONDS)


def _optimizer_before(stage: int) -> None:
    fresh_groups()
    model = tiny("llama")
    identities = {name: id(p) for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    config = _config(gradient_clipping=0.0, zero_optimization={"stage": stage}, zero_allow_untested_optimizer=True)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    assert {name: id(p) for name, p in engine.module.named_parameters()} == identities
    before = ds_seqpar.full_state_dict(engine)
    batch = batches(1, 1)[0]
    engine.backward(engine(**batch).loss)
    engine.step()
    after = ds_seqpar.full_state_dict(engine)
    if torch.distributed.get_rank() == 0:
        still = [name for name in before if torch.equal(before[name], after[name])]
        assert not still, f"ZeRO {stage}: not trained by an optimizer that was made before: {still}"
    engine.destroy()


def _optimizers_before() -> None:
    for stage in (0, 1, 2, 3):
        _optimizer_before(stage)


def test_an_optimizer_made_before_injection_trains_every_parameter() -> None:
    run_ranks(2, _optimizers_before, timeout=SECONDS)
