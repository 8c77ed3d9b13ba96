"""A save is whole or not there, whoever dies in it; what does not fit is refused by name, on every rank, before it is loaded."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import tiny
from ranks import RankError, run_ranks
from training import engine_at, run, weights
from transformers import AutoModelForCausalLM

import ds_seqpar
from ds_seqpar.checkpoint import rendezvous
from ds_seqpar.checkpoint.offline import export_checkpoint

MODEL = "mp_rank_00_model_states.pt"
OPTIMIZER = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def _two_saves(folder: str) -> dict[str, torch.Tensor]:
    """A checkpoint after one step and another after two, of a llama at tp 2, ZeRO 1."""
    engine = engine_at("llama", 2, 1)
    run(engine, 0, 1)
    engine.save_checkpoint(folder, tag="first")
    run(engine, 1, 2)
    engine.save_checkpoint(folder, tag="second")
    return weights(engine)


def _swap(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside), second.rename(first), aside.rename(second)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _rewrite(path: Path) -> None:
    state = torch.load(path, weights_only=False)
    state["module"] = {n: x + 1 if x.is_floating_point() else x for n, x in state["module"].items()}
    torch.save(state, path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "swapped": (lambda c: _swap(c / MODEL, c / MODEL.replace("00", "01")), r"mp_rank_0\d_model_states.pt .*two ranks were swapped"),
    "swapped optimizer": (
        lambda c: _swap(c / OPTIMIZER, c / OPTIMIZER.replace("mp_rank_00", "mp_rank_01")),
        r"optim_states.pt .*swapped",
    ),
    "truncated": (lambda c: _truncate(c / OPTIMIZER), OPTIMIZER + " is truncated"),
    "padded": (lambda c: (c / MODEL).write_bytes(b"\0" * (c / MODEL).stat().st_size), MODEL + " is truncated or damaged"),
    "missing": (lambda c: (c / OPTIMIZER.replace("mp_rank_00", "mp_rank_01")).unlink(), "mp_rank_01_optim_states.pt is missing"),
    "mixed": (lambda c: shutil.copy(c.parent / "first" / MODEL, c / MODEL), MODEL + " .*belongs to another save"),
    "changed": (lambda c: _rewrite(c / MODEL), MODEL + " .*was changed"),
    "no manifest": (lambda c: (c / "ds_seqpar_manifest.json").unlink(), "no ds_seqpar_manifest.json: it is incomplete"),
    "no random state": (lambda c: (c / "ds_seqpar_random_rank_1.pt").unlink(), "ds_seqpar_random_rank_1.pt is missing"),
}  # fmt: skip


def _refusals(folder: str, tags: list[str]) -> dict[str, str]:
    """Tries everything that must be refused; returns the messages."""
    messages: dict[str, str] = {}

    def refused(what: str, engine: Any, **options: Any) -> None:
        before = weights(engine)
        with pytest.raises(ds_seqpar.CheckpointError) as caught:
            engine.load_checkpoint(folder, **options)
        messages[what] = str(caught.value)
        after = weights(engine)
        assert all(torch.equal(x, before[n]) for n, x in after.items()), f"{what}: refused, but something was loaded"

    engine = engine_at("llama", 2, 1, seed=1)
    for tag in tags:
        refused(tag, engine, tag=tag)
    refused("no such tag", engine, tag="third")
    engine.destroy()
    refused("tp", engine_at("llama", 1, 1), tag="second")
    refused("stage", engine_at("llama", 2, 3), tag="second")
    refused("precision", engine_at("llama", 2, 1, dtype=torch.bfloat16), tag="second")
    refused("family", engine_at("qwen3", 2, 1), tag="second")
    refused("width", engine_at("llama", 2, 1, own={"intermediate_size": 52}), tag="second")
    refused("depth", engine_at("llama", 2, 1, own={"num_hidden_layers": 1}), tag="second")
    return messages


def test_what_does_not_fit_is_refused_by_name_on_every_rank(tmp_path: Path) -> None:
    run_ranks(2, _two_saves, str(tmp_path))
    for name, (damage, _) in DAMAGE.items():
        shutil.copytree(tmp_path / "second", tmp_path / name)
        damage(tmp_path / name)
    first, second = run_ranks(2, _refusals, str(tmp_path), list(DAMAGE))
    assert first == second, "the ranks disagree"
    expected = {name: pattern for name, (_, pattern) in DAMAGE.items()} | {
        "no such tag": r"there is no checkpoint .*third; .*'first'.*'second'",
        "tp": r"saved at tp_size 2, this run has 1; convert it \(python -m deepspeed.checkpoint.ds_to_universal",
        "stage": "saved at ZeRO stage 1, this run has stage 3; convert it",
        "precision": "saved in float32, this run computes in bfloat16",
        "family": "holds a llama model, this one is qwen3",
        "width": r"mlp.gate_proj.weight has shape \[50, 48\] there and \[52, 48\] here",
        "depth": r"this model lacks model.layers.1",
    }
    for name, pattern in expected.items():
        assert re.search(pattern, first[name], re.DOTALL), f"{name}: {first[name]}"


def _code_in_a_file(folder: str) -> str:
    engine = engine_at("llama", 2, 1)
    engine.save_checkpoint(folder, client_state={"position": _Trap()})
    with pytest.raises(ds_seqpar.CheckpointError, match="may run code") as caught:
        engine.load_checkpoint(folder)
    return str(caught.value)


class _Trap:
    """Unpickling this writes a file."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("trap",))


def test_reading_a_checkpoint_never_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(
        "add_safe_globals" in message for message in run_ranks(2, _code_in_a_file, str(tmp_path / "checkpoints"))
    )
    assert not (tmp_path / "trap").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def _save_with_errors(folder: str) -> list[str]:
    """Each rank in turn cannot write one of its files; then the folder cannot be written at all."""
    engine = engine_at("llama", 2, 1)
    engine.save_checkpoint(folder, tag="good")
    messages = []
    for failing in (0, 1):
        plain = engine.checkpoint_engine.save

        def full(state: Any, path: str, failing: int = failing, plain: Any = plain) -> None:
            if dist.get_rank() == failing and "optim" in path:
                raise OSError(28, "No space left on device", path)
            plain(state, path)

        engine.checkpoint_engine.save = full
        with pytest.raises(
            ds_seqpar.CheckpointError, match=rf"No space left on device.*\(on rank {failing}\)"
        ) as caught:
            engine.save_checkpoint(folder, tag="bad")
        messages.append(str(caught.value))
        engine.checkpoint_engine.save = plain
        _out_of_memory_before_a_file(engine, folder, failing)
    Path(folder, "file").write_text("in the way")
    for options in ({"tag": "file/inside"}, {"client_state": {"ds_seqpar": 1}}):
        with pytest.raises(ds_seqpar.CheckpointError) as caught:
            engine.save_checkpoint(folder, **options)
        messages.append(str(caught.value))
    with pytest.raises(ds_seqpar.CheckpointError, match="different places") as caught:
        engine.save_checkpoint(folder, tag=f"of rank {dist.get_rank()}")
    assert engine.load_checkpoint(folder)[0] is not None, "the good one is the latest"
    return messages


def _out_of_memory_before_a_file(engine: Any, folder: str, failing: int) -> None:
    def full(**_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    if dist.get_rank() == failing:
        engine.module_state_dict = full
    began = time.monotonic()
    with pytest.raises(ds_seqpar.CheckpointError, match=rf"CUDA out of memory \(on rank {failing}\)"):
        engine.save_checkpoint(folder, tag="bad")
    assert time.monotonic() - began < 20, "the others waited for a rank that had said why"
    vars(engine).pop("module_state_dict", None)


def test_errors_surface_on_every_rank_and_leave_what_was_there(tmp_path: Path) -> None:
    first, second = run_ranks(2, _save_with_errors, str(tmp_path))
    assert first == second
    assert "file" in first[2] and "which is ours" in first[3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "good", "latest"], "something was left aside"
    assert (tmp_path / "latest").read_text() == "good"


def _refused_by_the_system(folder: str, unwritable: str) -> list[str]:
    """Rank 1 may write no file of its checkpoint's size, then rank 0; at last no rank may write into the folder."""
    engine = engine_at("llama", 2, 1)
    engine.save_checkpoint(folder, tag="good")
    ds_seqpar.save_pretrained(engine, f"{folder}/exported")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    messages = []

    def refused(call: Callable[[], object]) -> None:
        with pytest.raises(ds_seqpar.CheckpointError) as caught:
            call()
        messages.append(str(caught.value))

    for limited, call in (
        (1, lambda: engine.save_checkpoint(folder, tag="bad")),
        (0, lambda: ds_seqpar.save_pretrained(engine, f"{folder}/exported")),
        (0, lambda: ds_seqpar.save_pretrained(engine, f"{folder}/bad", safe_serialization=False)),
    ):
        if dist.get_rank() == limited:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1]))
        refused(call)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write everywhere
    refused(lambda: engine.save_checkpoint(unwritable, tag="bad"))
    refused(lambda: ds_seqpar.save_pretrained(engine, f"{unwritable}/bad"))
    os.seteuid(user)
    return messages


def test_what_the_system_refuses_is_said_on_every_rank_and_nothing_is_left(tmp_path: Path) -> None:
    unwritable = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    unwritable.chmod(0o555)
    try:
        first, second = run_ranks(2, _refused_by_the_system, str(tmp_path), str(unwritable))
    finally:
        unwritable.rmdir()
    assert first == second
    assert re.search(
        r"bad was not saved: .*/\.bad\.partial/.*\.pt was not written: File too large \(on rank 1\)", first[0]
    )
    assert "exported was not written: OSError: [Errno 27] File too large (on rank 0)" in first[1]
    assert re.search(r"pytorch_model.bin was not written: File too large \(on rank 0\)", first[2])
    assert all("Permission denied" in message and str(unwritable) in message for message in first[3:])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exported", "good", "latest"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "exported")


def _only_on(calling: int, call: str, folder: str) -> str | None:
    rendezvous.PATIENCE = timedelta(seconds=2)
    engine = engine_at("llama", 2, 1)
    calls: dict[str, Callable[[], object]] = {
        "engine.save_checkpoint": lambda: engine.save_checkpoint(folder),
        "engine.load_checkpoint": lambda: engine.load_checkpoint(folder),
        "ds_seqpar.save_pretrained": lambda: ds_seqpar.save_pretrained(engine, folder),
        "ds_seqpar.full_state_dict": lambda: ds_seqpar.full_state_dict(engine),
        "engine.save_16bit_model": lambda: engine.save_16bit_model(folder),
    }
    if dist.get_rank() != calling:
        time.sleep(6)
        return None
    with pytest.raises(ds_seqpar.CheckpointError) as caught:
        calls[call]()
    return str(caught.value)


@pytest.mark.parametrize("call", ["engine.save_checkpoint", "ds_seqpar.save_pretrained"])
def test_a_call_on_rank_0_alone_raises(tmp_path: Path, call: str) -> None:
    _check_lonely_call(tmp_path, 0, call)


@pytest.mark.slow
@pytest.mark.parametrize("calling", [0, 1])
@pytest.mark.parametrize(
    "call",
    ["engine.save_checkpoint", "engine.load_checkpoint", "ds_seqpar.save_pretrained", "ds_seqpar.full_state_dict",
     "engine.save_16bit_model"],
)  # fmt: skip
def test_a_call_on_some_ranks_raises(tmp_path: Path, calling: int, call: str) -> None:
    _check_lonely_call(tmp_path, calling, call)


def _check_lonely_call(tmp_path: Path, calling: int, call: str) -> None:
    message = run_ranks(2, _only_on, calling, call, str(tmp_path / "out"))[calling]
    assert message.startswith(f"{call} must be called on all 2 ranks, but rank {1 - calling} did not call it"), message
    assert not (tmp_path / "out").exists()


def _die_while_saving(folder: str, victim: int, delay: float, again: bool) -> None:
    engine = engine_at("llama", 2, 1)
    run(engine, 0, 3)
    if dist.get_rank() == victim:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    engine.save_checkpoint(folder, tag="second" if again else "third")
    time.sleep(0.2)  # a late moment: after the save
    os.kill(os.getpid(), signal.SIGKILL)


def _what_is_there(folders: list[str]) -> list[list[str]]:
    """For each folder, which checkpoints load, and of which step they are."""
    engine = engine_at("llama", 2, 1, seed=1)
    found = []
    for folder in folders:
        path, _ = engine.load_checkpoint(folder)
        state = [f"latest is {Path(str(path)).parent.name}", f"{engine.global_steps} steps"]
        for tag in ("first", "second", "third"):
            try:
                engine.load_checkpoint(folder, tag=tag)
                state.append(f"{tag} has {engine.global_steps}")
            except ds_seqpar.CheckpointError as error:
                assert "there is no checkpoint" in str(error) or "incomplete" in str(error)
                state.append(f"{tag} is not there")
        found.append(state)
    return found


def _kill_at_random(tmp_path: Path, moments: int, again: bool) -> None:
    """`again`: the save that is cut off replaces a checkpoint of the same name."""
    base = tmp_path / "base"
    run_ranks(2, _two_saves, str(base))
    duration = run_ranks(2, _how_long, str(tmp_path / "timing"))[0]
    dice = random.Random(5 + again)
    folders = []
    for moment in range(moments):
        folder = tmp_path / f"moment{moment}"
        shutil.copytree(base, folder)
        victim, delay = dice.randrange(2), dice.uniform(0.0, 1.2) * duration
        with pytest.raises(RankError, match="exit code -9"):
            run_ranks(2, _die_while_saving, str(folder), victim, delay, again)
        folders.append(str(folder))
    results = run_ranks(2, _what_is_there, folders)
    assert results[0] == results[1]
    outcomes = {tuple(state) for state in results[0]}
    # What was there holds 1 and 2 steps, what the dying run saves holds 3.
    allowed = {("latest is second", "2 steps", "first has 1", "second has 2", "third is not there")}
    if again:
        allowed |= {("latest is second", "3 steps", "first has 1", "second has 3", "third is not there")}
    else:
        allowed |= {
            ("latest is second", "2 steps", "first has 1", "second has 2", "third has 3"),
            ("latest is third", "3 steps", "first has 1", "second has 2", "third has 3"),
        }
    assert outcomes <= allowed, outcomes - allowed
    assert moments < 20 or len(outcomes) > 1, "every moment was too early, or too late"


def _how_long(folder: str) -> float:
    engine = engine_at("llama", 2, 1)
    run(engine, 0, 2)
    start = time.monotonic()
    engine.save_checkpoint(folder)
    return time.monotonic() - start


def test_kill_at_three_moments_of_a_save(tmp_path: Path) -> None:
    _kill_at_random(tmp_path, 3, again=False)


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_kill_at_twenty_moments_of_a_save(tmp_path: Path, again: bool) -> None:
    _kill_at_random(tmp_path, 20, again)


def _die_while_exporting(folder: str, victim: int, delay: float) -> None:
    engine = engine_at("llama", 2, 1, seed=2)
    if dist.get_rank() == victim:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    ds_seqpar.save_pretrained(engine, folder, max_shard_size=30_000)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


def _export(folder: str, seed: int) -> float:
    engine = engine_at("llama", 2, 1, seed=seed)
    start = time.monotonic()
    ds_seqpar.save_pretrained(engine, folder, max_shard_size=30_000)
    return time.monotonic() - start


@pytest.mark.slow
def test_kill_at_twenty_moments_of_an_export_over_another(tmp_path: Path) -> None:
    """What plain transformers loads afterwards is the old model or the new one, never some of both."""
    folder, dice, found = tmp_path / "exported", random.Random(5), []
    run_ranks(2, _export, str(tmp_path / "new"), 2)
    old, new = tiny("llama").state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path / "new").state_dict()
    for _ in range(20):
        duration = run_ranks(2, _export, str(folder), 0)[0]
        with pytest.raises(RankError, match="exit code -9"):
            run_ranks(2, _die_while_exporting, str(folder), dice.randrange(2), dice.uniform(0.0, 1.2) * duration)
        there = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        which = [all(torch.equal(x, state[name]) for name, x in there.items()) for state in (old, new)]
        assert sum(which) == 1, "neither the one nor the other"
        found.append(which[1])
    assert set(found) == {False, True}, "every moment was too early, or too late"


STEPS = ["before it is complete", "before the old one moves", "between the two renames"]


def _die_at(folder: str, step: str) -> None:
    """Rank 0 dies at a named step of putting the new checkpoint in the old one's place."""
    engine = engine_at("llama", 2, 1)
    run(engine, 0, 3)

    def die(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 0:
        plain, count = Path.rename, itertools.count()
        deadly = 1 + STEPS.index(step)  # the first takes the new folder out of the old one
        Path.rename = lambda self, to: die() if next(count) == deadly else plain(self, to)  # type: ignore[method-assign]
    engine.save_checkpoint(folder, tag="second")


@pytest.mark.parametrize("step", STEPS)
def test_a_replacement_cut_off_between_its_steps_is_ended_by_the_next(tmp_path: Path, step: str) -> None:
    run_ranks(2, _two_saves, str(tmp_path))
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(2, _die_at, str(tmp_path), step)
    complete = step != "before it is complete"
    assert (tmp_path / (".second.complete" if complete else ".second.partial")).is_dir()
    assert (tmp_path / "second").exists() == (step != "between the two renames")
    export_checkpoint(tmp_path, tmp_path / "exported")  # changes nothing there
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").config.model_type == "llama"
    shutil.rmtree(tmp_path / "exported")
    (state,) = run_ranks(2, _what_is_there, [str(tmp_path)])[0]
    steps = 3 if complete else 2
    assert state == ["latest is second", f"{steps} steps", "first has 1", f"second has {steps}", "third is not there"]
    run_ranks(2, _two_saves, str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "latest", "second"]
    assert json.loads((tmp_path / "second" / "ds_seqpar_manifest.json").read_text())["global_steps"] == 2
