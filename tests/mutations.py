"""Runs mutants and says who noticed. As a script it runs all of them and writes README.md beside it.

PYTHONPATH=. python tests/mutations.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  # sets the environment when this file is run as a script
import torch
import torch.distributed as dist
from exactness import compare_adamw, compare_sgd
from mutants import MUTANTS, Mutant
from ranks import run_ranks
from replicas import train_with_checks
from sharding import full_gradients, proven, relative_error, twins
from test_dropout import dropout_step, masks_of_parts_differ, masks_of_replicas_agree

from ds_seqpar import DataMismatchError
from ds_seqpar.layers.surgery import _sharded_class

__all__ = ["Outcome", "document", "examine"]

TABLE = Path(__file__).parent / "mutations.md"
TESTS = {
    "step": "tests/test_matrix.py, test_families.py, test_parity.py: an accumulated SGD step",
    "clipped steps": "tests/test_matrix.py: gradient norms of clipped AdamW steps",
    "replicas": "tests/checks/test_replicas.py: the replica check",
    "data guard": "tests/test_refusals.py: DataMismatchError",
    "nested data": "tests/layers/test_input_guard.py: DataMismatchError",
    "users' tensors": "tests/layers/test_users_tensors.py: gradients of what hooks and arguments bring in",
    "parameter hooks": "tests/test_parameter_hooks.py: weights after a step with hooks on parameters",
    "dropout apart": "tests/test_dropout.py: masks differ between ranks",
    "dropout alike": "tests/test_dropout.py: masks differ by head only",
}


@dataclass(frozen=True)
class Outcome:
    """What verify said ("" if it passed), and what the named check said ("" likewise), on one rank."""

    name: str
    verify: str
    check: str


def examine(names: list[str] | None) -> list[Outcome]:
    """Breaks one invariant after the other; None of a name stands for the control, nothing broken, of every mutant's model."""
    outcomes = []
    if names is None:
        seen: list[Any] = []
        for mutant in MUTANTS:
            case = (mutant.family, mutant.key, mutant.own, mutant.head, mutant.by)
            if case not in seen:
                seen.append(case)
                outcomes.append(Outcome(f"control: {case}", _verdict(mutant), _checked(mutant)))
        return outcomes
    for mutant in MUTANTS:
        if mutant.name in names:
            _sharded_class.cache_clear()  # classes hold the functions they were made of
            with mutant.patch():
                outcomes.append(Outcome(mutant.name, _verdict(mutant), _checked(mutant)))
    _sharded_class.cache_clear()
    return outcomes


def _verdict(mutant: Mutant) -> str:
    try:
        found = proven(mutant.family, mutant.key, **_with_head(mutant))
    except Exception as problem:
        return _refused(problem)
    first = found.first_difference
    if first is None:
        return ""
    kind = f", measured {first.measured}" if first.claimed != first.measured else ""
    return f"{first.module}: {first.what} off by {first.error:.0e}{kind}"


def _with_head(mutant: Mutant) -> dict[str, Any]:
    return {**mutant.own, "head": mutant.head} if mutant.head else mutant.own


def _refused(problem: Exception) -> str:
    text = str(problem).partition("\n")[0]
    return f"{type(problem).__name__}: {text[:80]}"


def _checked(mutant: Mutant) -> str:
    try:
        return CHECKS[mutant.by](mutant)
    except DataMismatchError as problem:
        return "" if mutant.by not in ("data guard", "step") else _refused(problem)
    except Exception as problem:
        return _refused(problem)


def _worst(errors: dict[str, float], names: Callable[[str], bool] = lambda _: True) -> str:
    bad = {name: error for name, error in errors.items() if names(name) and not error <= 1e-5}
    if not bad:
        return ""
    worst = max(bad, key=lambda name: bad[name] if bad[name] == bad[name] else float("inf"))
    return f"{worst} off by {bad[worst]:.0e}"


def _step(mutant: Mutant) -> str:
    return _worst(compare_sgd(mutant.family, 2, 1, key=mutant.key, own=_for_step(mutant), head=mutant.head))


def _for_step(mutant: Mutant) -> dict[str, Any]:
    return {**mutant.own, "dtype": torch.float32} if mutant.head else mutant.own


def _clipped(mutant: Mutant) -> str:
    return _worst(compare_adamw(mutant.family, 2, 1, key=mutant.key), lambda name: name.startswith("norm"))


def _replicas(mutant: Mutant) -> str:
    said = train_with_checks(1, None)
    return "" if said == "trained" else said.partition(",")[0]


def _dropout(key: dict[str, Any], judge: Callable[[Any, Any], None]) -> str:
    both: list[Any] = [None, None]
    dist.all_gather_object(both, dropout_step(key))
    try:
        judge(*both)
    except AssertionError as problem:
        return str(problem).partition("\n")[0][:80]
    return ""


def _nested(mutant: Mutant) -> str:
    model, _ = twins(mutant.family)
    try:
        model.seqpar.guard.check((), {"masks": {"full": torch.full((2,), float(dist.get_rank()))}}, seeds=False)
    except DataMismatchError:
        return ""
    return "masks['full'] of other ranks passed the guard"


def _users_tensors(mutant: Mutant) -> str:
    ids, trained = torch.arange(7).view(1, 7), []
    for model in twins(mutant.family):
        torch.manual_seed(1)
        vector, mask = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((48,), (1, 1, 7, 7)))
        model.model.layers[0].register_forward_hook(lambda module, args, out, vector=vector: out + vector)
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        trained.append({"a hook's vector": vector.grad, "a mask": mask.grad})
    return _worst({name: relative_error(mine, trained[1][name]) for name, mine in trained[0].items()})


def _parameter_hooks(mutant: Mutant) -> str:
    ids, (model, reference) = torch.arange(7).view(1, 7), twins(mutant.family)
    for one in (model, reference):
        one.get_input_embeddings().weight.register_hook(lambda grad: grad / grad.norm())
        one(ids, labels=ids).loss.backward()
    name = "model.embed_tokens.weight"
    return _worst({name: relative_error(full_gradients(model)[name], reference.get_parameter(name).grad)})


CHECKS: dict[str, Callable[[Mutant], str]] = {
    "step": _step,
    "data guard": _step,
    "clipped steps": _clipped,
    "replicas": _replicas,
    "nested data": _nested,
    "users' tensors": _users_tensors,
    "parameter hooks": _parameter_hooks,
    "dropout apart": lambda _: _dropout({}, masks_of_parts_differ),
    "dropout alike": lambda _: _dropout({"sequence_parallel": False}, masks_of_replicas_agree),
}

DOCUMENT = """# Mutations

Written by `python tests/mutations.py` from what it saw. Each line is an invariant of the sharded model that was broken by a
patch, on two ranks and tiny models in float32; who noticed, and what was said first. {count} mutants, {verify} of them noticed by
`verify`; it runs before an optimizer, without dropout and on one batch, so it cannot see the other {blind}, which other checks do.
Nothing was said of the {controls} controls: the same models and checks with nothing broken.

| broken | verify | noticed by | which said |
|---|---|---|---|
{rows}

{tests}
"""


def document(outcomes: list[Outcome], controls: int) -> str:
    """mutations.md."""
    by_name = {mutant.name: mutant for mutant in MUTANTS}
    rows = []
    for outcome in outcomes:
        mutant = by_name[outcome.name]
        verdict = outcome.verify or "cannot see it"
        rows.append(f"| {outcome.name} ({mutant.family}) | {verdict} | {mutant.by} | {outcome.check} |")
    tests = "\n".join(f"- {name}: {where}" for name, where in TESTS.items())
    seen = sum(mutant.verify for mutant in MUTANTS)
    return DOCUMENT.format(
        count=len(MUTANTS), verify=seen, blind=len(MUTANTS) - seen, controls=controls, rows="\n".join(rows), tests=tests
    )


def main() -> int:
    controls = run_ranks(2, examine, None, timeout=1200)[0]
    wrong = [outcome for outcome in controls if outcome.check or outcome.verify]
    outcomes = run_ranks(2, examine, [mutant.name for mutant in MUTANTS], timeout=2400)[0]
    unseen = [m.name for m, o in zip(MUTANTS, outcomes, strict=True) if not o.check or bool(o.verify) != m.verify]
    TABLE.write_text(document(outcomes, len(controls)))
    print(f"controls that were noticed: {wrong}\nmutants that were not noticed as said: {unseen}")
    return 1 if wrong or unseen else 0


if __name__ == "__main__":
    raise SystemExit(main())
