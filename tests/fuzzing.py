"""Arbitrary keys, shapes and plans: each is refused in words or computed exactly. Never a hang, a bare traceback, a wrong number.

python tests/fuzzing.py --keys 1200 --shapes 700 --plans 300 --out benchmarks/results/DATE_fuzzing.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  # sets the environment when this file is run as a script
import torch
import torch.distributed as dist
from exactness import fresh_groups
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from models import device, tiny
from ranks import RankError, run_ranks
from sharding import full_gradients, relative_error

import ds_seqpar
from ds_seqpar import SeqParError
from ds_seqpar.config import SeqParConfig
from ds_seqpar.engine.arguments import translate
from ds_seqpar.plan.styles import Style

__all__ = ["Case", "cases", "outcomes", "settle"]

Case = dict[str, Any]
TOLERANCE = 1e-5
FIELDS = ("tp_size", "enabled", "sequence_parallel", "recompute", "loss_chunk_tokens", "overlap", "verify", "replica_check_interval",
    "timeout_s", "memory_check", "plan")  # fmt: skip

_json = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**12) | st.floats(allow_nan=False) | st.text(max_size=6)
    | st.sampled_from(["full", "none", "selective", "auto", "off", "whole"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=6), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
_mode = {
    "sequence_parallel": st.booleans(), "recompute": st.sampled_from(["none", "selective", "full"]),
    "loss_chunk_tokens": st.integers(1, 12), "overlap": st.sampled_from(["auto", "off"]),
}  # fmt: skip
_near = {
    "tp_size": st.integers(-1, 9), "recompute": st.sampled_from(["full", "none", "selective", "Full"]),
    "overlap": st.sampled_from(["auto", "off"]), "loss_chunk_tokens": st.integers(0, 99),
}  # fmt: skip
_right = st.fixed_dictionaries(
    {"tp_size": st.sampled_from([1, 2, 4])},
    optional={
        **_mode,
        "verify": st.booleans(),
        "replica_check_interval": st.integers(0, 9),
        "timeout_s": st.integers(0, 9),
        "memory_check": st.booleans(),
    },
)
_section = st.fixed_dictionaries({}, optional={name: _near.get(name, _json) | _json for name in FIELDS}) | _json
_right_beside: dict[str, st.SearchStrategy[Any]] = {
    "gradient_accumulation_steps": st.integers(1, 4), "train_batch_size": st.sampled_from([4, 8, 16]),
    "bf16": st.fixed_dictionaries({"enabled": st.booleans()}), "gradient_clipping": st.sampled_from([0.0, 1.0]),
    "zero_optimization": st.fixed_dictionaries({"stage": st.integers(0, 3)}), "sequence_parallel_size": st.none() | st.just(1),
}  # fmt: skip
_keys = (
    st.fixed_dictionaries({"ds_seqpar": _right, "train_micro_batch_size_per_gpu": st.integers(1, 4)}, optional=_right_beside)
    | st.fixed_dictionaries({"ds_seqpar": _right | _section, "train_micro_batch_size_per_gpu": st.integers(0, 4) | _json},
        optional={name: draw | _json for name, draw in _right_beside.items()}
        | {"tensor_parallel": st.fixed_dictionaries({"autotp_size": st.integers(0, 4)}) | _json})
)  # fmt: skip

_FAMILIES = ("llama", "qwen3", "gemma2", "gpt_neox", "phi3", "olmo2", "granite", "mistral")


@st.composite
def _shapes(draw: Any) -> Case:
    kv, group, half = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    family = draw(st.sampled_from(_FAMILIES))
    own = dict(
        num_key_value_heads=kv, num_attention_heads=kv * group, head_dim=2 * half, intermediate_size=draw(st.integers(1, 24)),
        vocab_size=draw(st.integers(4, 60)), num_hidden_layers=draw(st.integers(1, 2)), hidden_size=draw(st.integers(2, 20)) * 2,
        tie_word_embeddings=draw(st.booleans()), pad_token_id=draw(st.none() | st.just(0)),
    )  # fmt: skip
    if family == "gpt_neox":
        own |= dict(num_key_value_heads=None, head_dim=None, hidden_size=own["num_attention_heads"] * 2 * half)
    key = draw(st.fixed_dictionaries({}, optional=_mode))
    return {"family": family, "own": own, "key": key, "b": draw(st.integers(1, 3)), "s": draw(st.integers(1, 9)),
        "ignored": draw(st.sampled_from([0.0, 0.3, 1.0])), "padded": draw(st.booleans())}  # fmt: skip


_names = st.sampled_from([
    "model.layers.*.self_attn", "model.layers.*.mlp", "model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.k_proj",
    "model.layers.*.self_attn.v_proj", "model.layers.*.self_attn.o_proj", "model.layers.*.mlp.gate_proj", "model.layers.0.mlp.up_proj",
    "model.layers.*.mlp.up_proj", "model.layers.*.mlp.down_proj", "model.layers.1.mlp", "model.layers.*.input_layernorm", "model.norm",
    "model.embed_tokens", "lm_head", "model.layers.*", "model", "*", "nowhere", "model.layers.*.self_attn.q_norm", "",
])  # fmt: skip
_styles = st.sampled_from([style.value for style in Style]) | st.sampled_from(
    [
        "colwise:q",
        "colwise:kv",
        "packed_colwise:even,even",
        "rowwise:q",
        "packed_colwise:q,kv,kv",
        "colwise:nothing",
        "sideways",
        ":",
    ]
)
_plans = st.fixed_dictionaries({
    "family": st.sampled_from(["llama", "qwen3"]), "own": st.just({}), "b": st.just(2), "s": st.integers(1, 7),
    "ignored": st.just(0.3), "padded": st.booleans(),
    "key": st.fixed_dictionaries({"plan": st.dictionaries(_names, _styles, min_size=1, max_size=4)}, optional=_mode),
})  # fmt: skip
_KINDS: dict[str, st.SearchStrategy[Any]] = {"key": _keys, "shape": _shapes(), "plan": _plans}


def cases(kind: str, count: int, start: int = 0) -> list[Case]:
    """`count` cases, the same every time for one `start`."""
    found: list[Case] = []

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(_KINDS[kind])
    def collect(case: Case) -> None:
        found.append(case)

    while len(found) < count:
        before = len(found)
        collect()
        assert len(found) > before, "nothing new is drawn"
    return found[:count]


def settle(kind: str, case: Case) -> str:
    """ "exact", "accepted" (a key), or "refused: ..." on this rank; raises anything else."""
    try:
        return _key(case) if kind == "key" else _model(case)
    except SeqParError as problem:
        text = str(problem)
        assert len(text) > 20, f"an explanation, not {text!r}"
        return f"refused: {type(problem).__name__}: {text}"


def _key(case: Case) -> str:
    config = SeqParConfig.from_json(case["ds_seqpar"])
    if config.enabled:
        translated = translate(case, config)
        dp = dist.get_world_size() // config.tp_size
        micro, accumulation = (translated[n] for n in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"))
        assert "train_batch_size" not in case or micro * accumulation * dp == case["train_batch_size"]
    return "accepted"


def _model(case: Case) -> str:
    fresh_groups()
    try:
        model, reference = (tiny(case["family"], dtype=torch.float64, **case["own"]).train() for _ in range(2))
    except SeqParError:
        raise
    except Exception as problem:  # transformers will not build it
        return f"no model: {type(problem).__name__}"
    generator = torch.Generator().manual_seed(2)
    shape, vocab = (case["b"], case["s"]), model.config.vocab_size
    ids = torch.randint(0, vocab, shape, generator=generator)
    mask = torch.ones_like(ids)
    if case["padded"] and case["s"] > 2:
        mask[-1, -2:] = 0
    labels = ids.masked_fill(torch.rand(shape, generator=generator) < case["ignored"], -100)
    batch = {name: x.to(device()) for name, x in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()}
    expected = reference(**batch).loss
    expected.backward()
    ds_seqpar.shard(model, {"tp_size": dist.get_world_size(), **case["key"]})
    loss = model(**batch).loss
    loss.backward()
    mine = full_gradients(model)
    errors = {"loss": relative_error(loss.detach(), expected.detach())}
    errors |= {name: _error(mine[name], p.grad, reference) for name, p in reference.named_parameters()}
    bad = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    assert not bad, f"wrong numbers: {bad}"
    return "exact"


def _error(mine: Any, theirs: Any, reference: Any) -> float:
    """Relative; where theirs is rounding itself (a gradient that cancels), relative to the largest gradient."""
    error = relative_error(mine, theirs)
    if error <= TOLERANCE or mine is None or theirs is None:
        return error
    largest = max(float(p.grad.norm()) for p in reference.parameters() if p.grad is not None)
    return float((mine - theirs).norm()) / largest * 1e3 if largest else error


def outcomes(kind: str, drawn: list[Case]) -> list[str]:
    """Of every case, on one rank; what is neither exact nor refused is "WRONG: ..."."""
    found = []
    for case in drawn:
        try:
            found.append(settle(kind, case))
        except Exception as problem:
            found.append(f"WRONG: {type(problem).__name__}: {problem}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in ("keys", "shapes", "plans"):
        parser.add_argument(f"--{kind}", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    counted: Counter[str] = Counter()
    wrong, lines = 0, []
    for kind, count, worlds in (
        ("key", options.keys, (4,)), ("shape", options.shapes, (2, 3, 4)), ("plan", options.plans, (2, 3))
    ):  # fmt: skip
        for world in worlds:
            share = -(-count // len(worlds))
            begun = time.monotonic()
            drawn = cases(kind, share, options.seed + world) if share else []
            everyone = _on_ranks(world, kind, drawn)
            for case, said in zip(drawn, zip(*everyone, strict=True), strict=True):
                verdict = said[0] if len(set(said)) == 1 else f"WRONG: the ranks disagree: {said}"
                wrong += verdict.startswith("WRONG")
                counted[f"{kind}, {world} ranks: {verdict.partition(':')[0]}"] += 1
                lines.append(json.dumps({"kind": kind, "ranks": world, "case": case, "outcome": verdict[:160]}))
                if verdict.startswith("WRONG"):
                    print(lines[-1][:600], verdict[:3000], flush=True)
            print(f"{kind}, {world} ranks: {len(drawn)} cases in {time.monotonic() - begun:.0f} s", flush=True)
    summary = {"cases": sum(counted.values()), "wrong": wrong, **dict(sorted(counted.items()))}
    print(json.dumps(summary, indent=1))
    if options.out is not None:
        options.out.write_text("\n".join([json.dumps(summary), *lines]) + "\n")
    return 1 if wrong else 0


def _on_ranks(world: int, kind: str, drawn: list[Case], at_once: int = 100) -> Iterable[list[str]]:
    found: list[list[str]] = [[] for _ in range(world)]
    for start in range(0, len(drawn), at_once):
        part = drawn[start : start + at_once]
        try:
            everyone = run_ranks(world, outcomes, kind, part, timeout=900)
        except RankError as problem:
            if "connectFullMesh" not in str(problem):  # gloo's rendezvous on a busy machine, before any case
                raise
            everyone = run_ranks(world, outcomes, kind, part, timeout=900)
        for mine, more in zip(found, everyone, strict=True):
            mine += more
    return found


if __name__ == "__main__":
    raise SystemExit(main())
