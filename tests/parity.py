"""One step of a planned model type, sharded and not: every parameter's gradient, accumulation 2."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  # sets the environment when this file is run as a script
import torch
import torch.distributed as dist
import transformers
from exactness import compare_sgd, fresh_groups
from model_types import (
    ALL,
    MULTIMODAL,
    NoModelError,
    batches_for,
    causal,
    heads_of,
    planned_types,
    tiny_config,
    tiny_of,
)
from ranks import RankError, run_ranks
from saving import saved
from sharding import full_gradients, relative_error
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import ds_seqpar
import ds_seqpar.cli
from ds_seqpar.errors import PlanError
from ds_seqpar.families import Family, family, has_data_file
from ds_seqpar.hf import describe

__all__ = ["KINDS", "ROUNDED", "TOLERANCE", "document", "measured", "parities", "parity", "step_under_deepspeed"]

TOLERANCE = 1e-5
KINDS = ("bert", "deepseek_v3", "gpt_neox", "gptj", "mixtral", "qwen2", "t5")
"""A type of each architecture, measured at more sizes: an encoder, latent attention, packed query, key and value, attention beside
the MLP, experts, grouped heads, an encoder-decoder."""

_ALIGNED: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 44},
    "gpt_oss": {"intermediate_size": 44},
    "deepseek_v3": {"moe_intermediate_size": 20},
}
"""Products over all experts want rows of 16 bytes: such as float32 has whole, and halves of them would not have."""
ROUNDED = {"lara_mini": 2e-5}
"""Tolerances of types whose code computes in float32 what a single rounding moves by more than TOLERANCE: weights that differ by
1e-8 move the gradient of lara_mini's `A_log`, a sum over all tokens of its delta rule, by 1.05e-5 without us."""
_PREDICTS = {"bert": "masked-lm", "t5": "seq2seq-lm"}


def _loss(model: Any, batch: dict[str, Any], head: str) -> Tensor:
    if head or causal(model.config):
        return model(**batch).loss  # type: ignore[no-any-return]
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch["input_ids"].flip(1)
    if "inputs_embeds" in inputs:  # the caller embeds, as the model around it does
        ids, embeddings = inputs.pop("input_ids"), [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
        if embeddings:
            inputs["inputs_embeds"] = inputs["inputs_embeds"] + embeddings[0](ids)
    last = model(**inputs).last_hidden_state
    weight = torch.linspace(-1.0, 1.0, last.numel(), dtype=last.dtype, device=last.device).view(last.shape)
    return (last * weight).square().mean() + (last * weight).mean()


def _with_gradients(batch: dict[str, Any]) -> dict[str, Any]:
    """Embeddings come from somewhere that is trained, too: their gradient must be whole on every rank.

    Copies: some models change what they are given in place.
    """
    return {
        n: x if not isinstance(x, Tensor) else x.clone().requires_grad_() if n == "inputs_embeds" else x.clone()
        for n, x in batch.items()
    }


def parity(
    model_type: str, seq: int = 7, head: str = "", key: dict[str, Any] | None = None, **own: Any
) -> dict[str, Any]:
    """The relative error of everything after one step of 3 x `seq` tokens twice, and what was planned; run on every rank.

    `head` is one of model_types.HEADS, or "" for none; `own` goes over the tiny config's values.
    """
    fresh_groups()
    model, reference = tiny_of(model_type, head=head, **own), tiny_of(model_type, head=head, **own)
    report = ds_seqpar.shard(model, {"tp_size": dist.get_world_size(), "loss_chunk_tokens": 4, **(key or {})})
    model.train(), reference.train()
    errors: dict[str, float] = {}
    for i, batch in enumerate(batches_for(2, 3, seq, model_type=model_type, head=head)):
        mine, theirs = _with_gradients(batch), _with_gradients(batch)
        loss, expected = _loss(model, mine, head) / 2, _loss(reference, theirs, head) / 2
        errors[f"loss {i}"] = relative_error(loss.detach(), expected.detach())
        loss.backward()
        expected.backward()
        if "inputs_embeds" in batch:
            errors[f"inputs {i}"] = relative_error(mine["inputs_embeds"].grad, theirs["inputs_embeds"].grad)
    errors |= _gradient_errors(full_gradients(model), reference)
    worst = max(errors, key=lambda name: errors[name])
    whole = {_starred(entry.why.partition(" ")[0]) for entry in report.entries if "is repeated whole" in entry.why}
    return {
        "error": errors[worst],
        "bad": {name: error for name, error in errors.items() if not error <= ROUNDED.get(model_type, TOLERANCE)},
        "cut": sum(entry.cut is not None for entry in report.parameters().values()),
        "whole": sorted(whole),
        "remarks": report.remarks,
        "materialised": dict(model.seqpar.materialised),
    }


def _gradient_errors(gradients: Mapping[str, Tensor | None], reference: torch.nn.Module) -> dict[str, float]:
    """Relative errors by name. What is zero but for rounding (of routers, norms and rotations in float32) must be so in both."""
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    nothing = 1e-8 * max(float(grad.norm()) for grad in expected.values() if grad is not None)
    errors = {}
    for name, grad in expected.items():
        mine = gradients[name]
        zero = grad is not None and mine is not None and max(float(grad.norm()), float(mine.norm())) <= nothing
        errors[name] = 0.0 if zero else relative_error(mine, grad)
    return errors


def parities(model_type: str, heads: tuple[str, ...], **options: Any) -> dict[str, dict[str, Any]]:
    """`parity` with each of the heads, "" for none, and what is wrong with what is `saved`; run on every rank."""
    results = {head: parity(model_type, head=head, **options) for head in heads}
    tolerance = ROUNDED.get(model_type, TOLERANCE)
    for head, result in results.items():
        if not options:
            try:
                result["saved"] = saved(model_type, head, _loss, tolerance)
            except Exception as problem:  # alike on every rank
                result["saved"] = f"{type(problem).__name__}: {problem}".splitlines()[0][:300]
    return results


def step_under_deepspeed(model_type: str, stage: int) -> dict[str, float]:
    """Names above the tolerance after an accumulated step at tp 2, in float32 throughout; run on any number of ranks."""
    own = {"experts": None, "dtype": torch.float32, **_ALIGNED.get(model_type, {})}
    head = _PREDICTS.get(model_type, "")
    errors = compare_sgd(model_type, 2, stage, micro=2 if head else 1, accumulation=2, head=head, own=own)
    return {name: error for name, error in errors.items() if not error <= 2 * TOLERANCE}


def measured(model_type: str, tp: int = 2, *, everywhere: bool = True) -> dict[str, Any]:
    """The line of the table for one type; AssertionError if it is neither exact nor refused by a PlanError.

    A type that fails in transformers itself, unsharded, is "not run".

    `everywhere`: a type of KINDS also at tp 4, and at tp 2 with two data-parallel ranks.
    """
    cls = CONFIG_MAPPING[model_type]
    if model_type in MULTIMODAL:  # its language model's plan is the one that counts
        cls = type(tiny_config(model_type).get_text_config())
    styles = set((getattr(cls, "base_model_tp_plan", None) or {}).values())
    data = family(model_type if has_data_file(model_type) else cls.model_type)
    origin = [name for name, there in (("transformers", styles), ("data file", data != Family())) if there]
    at = f"tp {tp}, accumulation 2" + (", images" if model_type in MULTIMODAL else "")
    line: dict[str, Any] = {"plan": " + ".join(origin), "at": at}
    if model_type in MULTIMODAL:
        line["plan"] += f" of {cls.model_type}"
    line["styles"] = sorted(styles | set(data.styles.values()))
    refusal = _refusal(model_type)
    if refusal:
        return {"status": "refused", "why": refusal, **line, "at": ""}
    try:
        heads = ("", *heads_of(model_type))
        results = run_ranks(tp, parities, model_type, heads, timeout=240)[0]
    except RankError as problem:
        last = (problem.errors[0] or "").strip().splitlines()[-1]
        if ".PlanError: " not in last:
            unsharded = run_ranks(1, _error_without_us, model_type)[0]
            if not unsharded:
                raise
            return {"status": "not run", "why": f"transformers' own model fails: {unsharded}", **line, "at": ""}
        return {"status": "refused", "why": last.partition(".PlanError: ")[2], **line, "at": ""}
    for head, result in results.items():
        name = f"{model_type} {head}".strip()
        assert not result["bad"], f"{name}: relative errors above {TOLERANCE}: {result['bad']}"
        assert result["cut"], f"{name}: nothing is cut"
    line["whole"] = results[""]["whole"]
    unsaved = {head: result["saved"] for head, result in results.items() if result["saved"]}
    line["saved"] = next(iter(unsaved.values()), "")
    if everywhere and model_type in KINDS:
        wide = run_ranks(4, parities, model_type, heads, timeout=600)[0]
        bad = {head: result["bad"] for head, result in wide.items() if result["bad"]}
        bad |= {
            f"rank {rank}": wrong
            for rank, wrong in enumerate(run_ranks(4, step_under_deepspeed, model_type, 1))
            if wrong
        }
        assert not bad, f"{model_type} on four ranks: {bad}"
        line["at"] = "tp 2 and 4, tp 2 with dp 2, accumulation 2"
    return {"status": "not saved" if unsaved else "exact", **line, **({"heads": list(heads[1:])} if len(heads) > 1 else {})}


def _error_without_us(model_type: str) -> str:
    """What the unsharded model raises; "" if it trains."""
    batch = batches_for(1, 3, 7, model_type=model_type)[0]
    try:
        _loss(tiny_of(model_type).train(), _with_gradients(batch), "").backward()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return ""


def _refusal(model_type: str) -> str:
    """Why the type is refused before a tiny model of it would be built; "" if it is not."""
    if family(model_type).refused:
        return family(model_type).refused
    try:
        tiny_config(model_type)
        with torch.device("meta"):
            describe(tiny_of(model_type, build_only=True))
    except PlanError as problem:
        return str(problem)
    except NoModelError as problem:
        return str(problem)
    return ""


def _starred(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def main() -> None:
    """Measures every type (or those named) and writes the results and the table in docs/families.md."""
    path = Path(ds_seqpar.families.__file__).parent / "results.json"
    results = json.loads(path.read_text())["types"]
    types = sys.argv[1:] or ALL
    for model_type in types:
        try:
            results[model_type] = measured(model_type)
        except Exception as problem:
            results.pop(model_type, None)
            print(f"NEITHER {model_type}: {str(problem).strip().splitlines()[-1][:300]}", flush=True)
            continue
        print(model_type, results[model_type]["status"], flush=True)
        content = {"transformers": transformers.__version__, "types": dict(sorted(results.items()))}
        path.write_text(json.dumps(content, indent=1) + "\n")
    importlib.reload(ds_seqpar.families)
    importlib.reload(ds_seqpar.cli)
    (Path(__file__).parents[1] / "docs" / "families.md").write_text(document())


def document() -> str:
    """docs/families.md."""
    results = ds_seqpar.families.RESULTS
    status = Counter(result["status"] for result in results.values())
    failing = f", {status['not run']} not run: transformers' own model fails" if status["not run"] else ""
    failing = (f", {status['not saved']} exact but not saved" if status["not saved"] else "") + failing
    return DOCUMENT.format(
        types=len(results),
        exact=status["exact"],
        refused=status["refused"],
        failing=failing,
        planned=len(planned_types()),
        planned_exact=sum(results.get(name, {}).get("status") == "exact" for name in planned_types()),
        version=ds_seqpar.families.MEASURED_WITH,
        table=ds_seqpar.cli.table(),
    )


DOCUMENT = """# Model types

Written by `python tests/parity.py` from what it measured; `python -m ds_seqpar families` prints the same table.

transformers {version} plans {planned} model types, of which {planned_exact} are exact here; this table holds them, types that have
a data file here instead, and vision-language models: {types} types, {exact} exact and saved, {refused} refused by name before anything
is changed{failing}.

Exact: a random model of two layers, sharded over two ranks, gives after two accumulated batches the loss and every parameter's
gradient of the unsharded model, each to a relative error of 1e-5 (lara_mini: 2e-5; float64, where rotary embeddings, norms and
routers of many types compute in float32). "Whole" names the blocks that every rank repeats on all tokens: exact, but not divided.
Of a model of several parts the language model is sharded, by the plan of the type that stands in the column; the rest of it, such
as a vision tower, is whole on every rank, and its gradients are compared too. A gradient of less than 1e-8 of the largest is zero
but for rounding, and must be in both.

An exact type is saved, too: after every weight has moved, the files of `ds_seqpar.save_pretrained` hold the tensors that transformers
writes of the unsharded model, to the bit; plain transformers and `ds_seqpar.loading` read them to a model with the unsharded loss, and
causal language models generate the same tokens. Other stages, the Trainer and `export` are compared for some types in tests/.

One type of each architecture is also measured at tp 4, and at tp 2 with two data-parallel
ranks under DeepSpeed (ZeRO 1, float32, the change of every weight to 2e-5). "With" names the heads that were measured beside the
causal language model's (or, for a type without one, beside the bare model's hidden states), each with its own loss in transformers.

{table}
"""


if __name__ == "__main__":
    main()
