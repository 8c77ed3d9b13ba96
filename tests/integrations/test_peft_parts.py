"""Adapters that are put on a model which was loaded in parts: the model is large, that is why they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
import transformers.trainer  # before the ranks are forked
from exactness import fresh_groups
from models import batches, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from ranks import RankError, run_ranks
from safetensors.torch import load_file
from sharding import relative_error
from torch import nn

import ds_seqpar
from ds_seqpar.checkpoint.gathering import gather_parameter
from ds_seqpar.hf import require_model

assert transformers.trainer
EAGER = {"experts_implementation": "eager"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linears": ("llama", dict(target_modules="all-linear")),
    "packed": ("phi3", dict(target_modules="all-linear")),
    "embedding": ("llama", dict(target_modules=["embed_tokens", "q_proj", "o_proj"])),
    "transposed": ("gpt2", dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "experts": (
        "mixtral",
        dict(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ),
    "copies": ("mistral", dict(target_modules=["v_proj", "down_proj"], modules_to_save=["lm_head", "embed_tokens"])),
}


def _adapted(model: Any, lora: dict[str, Any]) -> Any:
    """The PEFT model with its first values, as a seed gives them; B starts at zero, and is drawn here."""
    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, **lora)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and not parameter.any():
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.train()


def _config(**key: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True, "ds_seqpar": {"tp_size": dist.get_world_size(), **key},
    }  # fmt: skip


def _exact(folders: dict[str, str], cases: tuple[str, ...]) -> list[str]:
    wrong = []
    for case in cases:
        family, lora = CASES[case]
        fresh_groups()
        model = ds_seqpar.from_pretrained(folders[family], _config(), dtype=torch.float64, **EAGER)
        model, reference = _adapted(model, lora), _adapted(tiny(family, dtype=torch.float64), lora)
        for each in (model, reference):
            each.requires_grad_(True)
        ds_seqpar.shard(model, _config(verify=True)["ds_seqpar"])
        state, theirs = require_model(model).seqpar, dict(reference.named_parameters())
        loss, expected = model(**batches(1, 2)[0]).loss, reference(**batches(1, 2)[0]).loss
        loss.backward()
        expected.backward()
        errors = {"loss": relative_error(loss.detach(), expected.detach())}
        for name, parameter in model.named_parameters():
            cut = state.entries[id(parameter)].cut
            for what, mine, other in (("", parameter.detach(), theirs[name].detach()), (".grad", parameter.grad, theirs[name].grad)):
                if mine is None or other is None:
                    errors[name + what] = 0.0 if mine is None and (other is None or not other.any()) else 1.0
                    continue
                errors[name + what] = relative_error(mine if cut is None else gather_parameter(mine, cut, state.groups.tp_group), other)
        name, error = max(errors.items(), key=lambda item: item[1])
        wrong += [f"{case}: {name} {error:.1e}"] if not error <= 1e-6 else []
    return wrong


def _saved(tmp_path: Path, families: set[str], dtype: torch.dtype = torch.float64) -> dict[str, str]:
    for family in families:
        tiny(family, dtype=dtype).save_pretrained(tmp_path / family)
    return {family: str(tmp_path / family) for family in families}


def test_adapters_on_parts_are_those_of_the_unsharded_model(tmp_path: Path) -> None:
    folders = _saved(tmp_path, {family for family, _ in CASES.values()})
    assert run_ranks(2, _exact, folders, tuple(CASES)) == [[], []]


def _train(folder: str, out: str, stage: int) -> None:
    fresh_groups()
    lora = dict(target_modules=["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"])
    config = {**_config(), "zero_optimization": {"stage": stage}}
    model = _adapted(ds_seqpar.from_pretrained(folder, config), lora)
    reference = _adapted(tiny("llama"), lora)
    engine = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), config=config
    )[0]
    theirs = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.1)
    for batch in batches(2, 2):
        engine.backward(engine(**batch).loss)
        engine.step()
        reference(**batch).loss.backward()
        theirs.step()
        theirs.zero_grad()
    ds_seqpar.save_pretrained(engine, out)
    if dist.get_rank() == 0:
        again = PeftModel.from_pretrained(tiny("llama"), out)
        for (name, mine), (other, expected) in zip(again.named_parameters(), reference.named_parameters(), strict=True):
            assert name == other and relative_error(mine, expected) < 1e-5, name


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_adapters_trained_on_parts_are_saved_as_unsharded(tmp_path: Path, stage: int) -> None:
    folder = _saved(tmp_path, {"llama"}, torch.float32)["llama"]
    run_ranks(2, _train, folder, str(tmp_path / "adapter"), stage)
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")


def _refused(folder: str, what: str) -> None:
    fresh_groups()
    model = ds_seqpar.from_pretrained(folder, _config())
    if what == "resize":
        model.resize_token_embeddings(120)
    if what == "more":
        model.model.layers[0].mlp.extra = nn.Linear(2, 2)
    if what == "pissa":
        model = _adapted(model, dict(target_modules=["q_proj", "o_proj"], init_lora_weights="pissa"))
    if what == "seeds":
        torch.manual_seed(dist.get_rank())
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    ds_seqpar.shard(model, _config()["ds_seqpar"])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("resize", "resize_token_embeddings: .*make a checkpoint of the new size first"),
        ("more", r"model\.layers\.0\.mlp\.extra was added after the model was loaded in parts"),
        ("pissa", r"q_proj: a factor of adapter 'default' has shape .*PiSSA.*loaded whole"),
        ("seeds", r"q_proj\.lora_A.*differs between the ranks .*seed all ranks alike"),
    ],
)
def test_what_cannot_be_done_to_parts_is_refused_by_name(tmp_path: Path, what: str, message: str) -> None:
    folder = _saved(tmp_path, {"llama"}, torch.float32)["llama"]
    with pytest.raises(RankError, match=f"PlanError: .*{message}") as caught:
        run_ranks(2, _refused, folder, what)
    assert all("PlanError: " in (error or "") for error in caught.value.errors)
