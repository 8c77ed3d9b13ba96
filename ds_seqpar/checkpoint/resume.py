"""`engine.save_checkpoint` and `engine.load_checkpoint` of a sharded model: whole or not there, and refused where they do not fit.

DeepSpeed writes and reads its own files. Around it: a save goes aside and is renamed when every rank has finished, a manifest
says what was saved, and a load compares it with the running model before anything is touched.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import CheckpointError
from ..hf import require_model, write_config
from ..layers.region import ShardingState
from . import manifest as manifests
from . import universal
from .files import writing
from .identity import identity_of, saved_optimizer
from .manifest import CONFIG_FOLDER, IDENTITY_KEY, MANIFEST
from .placing import recover, replacing
from .random_states import RANDOM, random_file, random_states, restore_random
from .rendezvous import agreed, everyones, from_first_rank, meet
from .restoring import count_steps_again, require_weights_alone, restore_frozen, restore_optimizer, weights_alone
from .trained import describe_optimizer, require_same_optimizer, require_same_scheduler
from .waiting import after, waiting_over_gloo

__all__ = ["load_checkpoint", "safe_reading", "save_checkpoint"]

Plain = Callable[..., Any]
LATEST = "latest"


def save_checkpoint(
    engine: Any,
    plain: Plain,
    save_dir: str | os.PathLike[str],
    tag: str | None = None,
    client_state: dict[str, Any] | None = None,
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
    *,
    comm: Any,
) -> bool:
    """DeepSpeed's `save_checkpoint` (`plain`), made whole or not at all. Call it on all ranks. `comm` is deepspeed.comm.

    Beside DeepSpeed's files it keeps every rank's random states (torch, the current GPU's, Python's, NumPy's) and a manifest.

    Raises:
        CheckpointError: on every rank, if any rank could not write; what `save_dir` held before is untouched.
    """
    group, rank = require_model(engine.module).seqpar.groups.world_cpu_group, dist.get_rank()
    meet("engine.save_checkpoint", group)
    root, name = Path(save_dir).resolve(), str(tag if tag is not None else f"global_step{engine.global_steps}")
    what = f"the checkpoint {root / name}"
    with agreed(f"{what} was not saved", group):
        target = _inside(root, name)
        _refuse_unfit(engine, client_state or {})
    where = everyones(str(target), group)
    with agreed(f"{what} was not saved", group):
        if len(set(where)) > 1:
            raise CheckpointError(f"the ranks were asked to save in different places: {sorted(set(where))}")
    identity = identity_of(engine) | {
        "save_id": from_first_rank(uuid.uuid4().hex, group),
        "without_frozen": exclude_frozen_parameters,
    }
    written: list[Path] = []
    with replacing(target.resolve(), _is_of_a_checkpoint, group, what) as aside:
        with agreed(f"{what} was not saved", group) as wait:
            with _recorded(engine, written) as problems, waiting_over_gloo(engine, comm, wait):
                plain(
                    str(aside.parent),
                    tag=aside.name,
                    client_state={**(client_state or {}), IDENTITY_KEY: identity},
                    save_latest=False,
                    exclude_frozen_parameters=exclude_frozen_parameters,
                )
            if problems:
                raise problems[0]
            mine = _files_of_this_rank(aside, written, identity)
        everything = everyones((mine, describe_optimizer(engine)), group)
        files = {name: about for each, _ in everything for name, about in each.items()}
        # Buffers of parts that are cut unevenly may differ from one tensor-parallel rank to the next.
        optimizers = [optimizer for _, optimizer in everything[: identity["tp_size"]]]
        with agreed(f"{what} was not saved", group):
            if rank == 0:
                for name in files:
                    if not (aside / name).is_file():
                        raise CheckpointError(
                            f"{aside / name}, which another rank wrote, is not visible here: use a folder that all see"
                        )
                (aside / CONFIG_FOLDER).mkdir()
                write_config(require_model(engine.module), aside / CONFIG_FOLDER)
                about = identity | {"files": files, "optimizers": optimizers}
                _write_durably(aside / MANIFEST, json.dumps(about, indent=1))
    with agreed(f"{what} was saved, but {root / LATEST} does not name it; load it by its tag", group):
        if rank == 0 and save_latest:
            _write_durably(root / LATEST, str(target.relative_to(root)))
    return True


def load_checkpoint(
    engine: Any,
    plain: Plain,
    load_dir: str | os.PathLike[str],
    tag: str | None = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: Callable[..., Any] | None = None,
    *,
    safe_classes: Sequence[Any] = (),
    write: Callable[[nn.Parameter, Tensor], None],
    comm: Any,
) -> tuple[str | None, dict[str, Any] | None]:
    """DeepSpeed's `load_checkpoint` (`plain`) of a checkpoint that fits this run. Call it on all ranks. `comm` is deepspeed.comm.

    Restores the random states too, unless the module alone is loaded. As DeepSpeed's, it returns (None, None) where `load_dir`
    has no `latest` and no tag is given.

    Raises:
        CheckpointError: on every rank, before anything is loaded: the checkpoint is missing, incomplete, damaged, mixed, of
            another model, was saved by a run of another size, or its optimizer stepped other parameters.
    """
    state: ShardingState = require_model(engine.module).seqpar
    group = state.groups.world_cpu_group
    meet("engine.load_checkpoint", group)
    options = dict(
        load_module_strict=load_module_strict,
        load_optimizer_states=load_optimizer_states,
        load_lr_scheduler_states=load_lr_scheduler_states,
        load_module_only=load_module_only,
        custom_load_fn=custom_load_fn,
    )
    if engine.load_universal_checkpoint():
        with safe_reading(safe_classes):
            return _load_universal(engine, plain, Path(load_dir).resolve(), tag, options, write, comm)
    found: Any = None
    what = f"no checkpoint was loaded from {load_dir}"
    with agreed(what, group):
        if dist.get_rank() == 0:
            folder = Path(load_dir).resolve()
            found = tag if tag is not None else _read_latest(folder / LATEST)
            if found is None:
                _warn_of_unnamed(folder)
            else:
                recover((folder / str(found)).resolve(), _is_of_a_checkpoint)
                found = str(found), manifests.read_manifest(folder / str(found))
    found = from_first_rank(found, group)
    if found is None:
        return plain(str(load_dir), tag=None, **options)  # type: ignore[no-any-return]
    tag, saved = found
    folder = Path(load_dir).resolve() / str(tag)
    with agreed(what, group):
        here = identity_of(engine)
        manifests.require_same_model(folder, saved, here)
        whole = load_optimizer_states and not load_module_only
        manifests.require_same_layout(folder, saved, here, optimizer=whole)
        manifests.require_files(folder, saved, _coordinates(state))
        _require_strictness(folder, saved, load_module_strict)
        if whole and (ours := describe_optimizer(engine)) is not None:
            with safe_reading(safe_classes):
                theirs = saved_optimizer(engine, folder, saved, state.groups.tp_rank)
            if theirs is not None:
                require_same_optimizer(folder, theirs, ours)
        if load_lr_scheduler_states and not load_module_only:
            require_same_scheduler(folder, saved, here)
        if not whole:
            require_weights_alone(engine, folder, custom_load_fn)
    wait = partial(everyones, None, group)
    with ExitStack() as stack:
        stack.enter_context(safe_reading(safe_classes))
        if not whole:
            # DeepSpeed is told to load the optimizer's states too, or at stage 3 it would look for weights in other places.
            options["load_optimizer_states"] = options["load_optimizer_states"] or here["zero_stage"] == 3
            stack.enter_context(weights_alone(engine, folder, saved, state, after(wait, write)))
        stack.enter_context(waiting_over_gloo(engine, comm, wait))
        path, client_state = plain(str(folder.parent), tag=folder.name, **options)
    state.generation += 1
    (client_state or {}).pop(IDENTITY_KEY, None)
    if whole and engine.optimizer is not None:
        count_steps_again(getattr(engine.optimizer, "optimizer", engine.optimizer))
    if whole and saved["dp_size"] == here["dp_size"]:
        restore_random(folder / random_file(dist.get_rank()))
    return path, client_state


def _load_universal(
    engine: Any, plain: Plain, load_dir: Path, tag: str | None, options: dict[str, Any],
    write: Callable[[nn.Parameter, Tensor], None], comm: Any,
) -> tuple[str | None, dict[str, Any] | None]:  # fmt: skip
    """Weights, optimizer, schedule and counters of a run of any size and ZeRO stage; random states stay this run's."""
    state: ShardingState = require_model(engine.module).seqpar
    group = state.groups.world_cpu_group
    named = dict(engine.module.named_parameters())
    frozen = {name: p for name, p in named.items() if not p.requires_grad}
    whole = options["load_optimizer_states"] and not options["load_module_only"]
    stage = engine.zero_optimization_stage()
    folder = load_dir
    with agreed(f"no checkpoint was loaded from {load_dir}", group):
        if dist.get_rank() == 0:
            found = tag if tag is not None else _read_latest(load_dir / f"{LATEST}_universal")
            if found is None:
                raise CheckpointError(f"{load_dir} has no {LATEST}_universal, and no tag was given")
            folder = load_dir / str(found)
            saved = universal.require_universal(folder, identity_of(engine), named.keys() - frozen.keys())
            universal.complete(folder, saved)
            if stage == 0 and not whole:
                raise CheckpointError(
                    f"{folder} is a universal checkpoint, which ZeRO stage 0 loads with the optimizer's states only; leave out "
                    "load_optimizer_states=False and load_module_only=True"
                )
            if whole:
                universal.require_groups(folder, len(engine.optimizer.param_groups))
    folder = from_first_rank(folder, group)
    wait = partial(everyones, None, group)
    with _without_optimizer(engine, options) if stage == 0 else nullcontext(), waiting_over_gloo(engine, comm, wait):
        path, client_state = plain(str(folder.parent), tag=folder.name, **options)
    if stage == 0:
        restore_optimizer(engine, folder, state)
    elif stage == 3 and whole:
        universal.repair_optimizer(engine.optimizer.optimizer, folder)
    lost = restore_frozen(frozen, folder, state, after(wait, write) if stage == 3 else write)
    if lost and dist.get_rank() == 0:
        logging.getLogger("ds_seqpar").warning(
            "%s was saved with exclude_frozen_parameters: %d frozen parameters keep the values they have (%s, ...)",
            folder, len(lost), lost[0],
        )  # fmt: skip
    state.generation += 1
    (client_state or {}).pop(IDENTITY_KEY, None)
    return path, client_state


@contextmanager
def _without_optimizer(engine: Any, options: dict[str, Any]) -> Iterator[None]:
    """DeepSpeed reads schedule and counters of a universal checkpoint at ZeRO stage 0, but knows nothing of its optimizer."""
    options["load_optimizer_states"] = False
    engine.optimizer.update_lp_params = lambda: None
    try:
        yield
    finally:
        del engine.optimizer.update_lp_params


@contextmanager
def safe_reading(classes: Sequence[Any]) -> Iterator[None]:
    """Makes every torch.load of the body, DeepSpeed's own included, read data only: tensors, plain values and `classes`.

    Raises CheckpointError for a file that holds anything else; torch.serialization.add_safe_globals lets a class of the
    user's own through.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    outside, os.environ[name] = os.environ.get(name), "1"
    try:
        with torch.serialization.safe_globals(list(classes)):
            yield
    except Exception as problem:
        if type(problem).__name__ == "UnpicklingError":
            raise CheckpointError(
                f"the checkpoint holds more than data, which may run code when it is read: {problem}; if you trust it, name the "
                "class with torch.serialization.add_safe_globals([...]) before loading"
            ) from problem
        raise
    finally:
        if outside is None:
            del os.environ[name]
        else:
            os.environ[name] = outside


def _inside(root: Path, tag: str) -> Path:
    """The folder of a tag, which may be nested ("run1/step5"). Raises CheckpointError for a tag that is not a place in `root`."""
    target = Path(os.path.normpath(root / tag))
    if target == root or root not in target.parents:
        raise CheckpointError(f"the tag {tag!r} names no folder in {root}; use a name such as global_step5 or run1/step5")
    if target == root / LATEST:
        raise CheckpointError(f"the tag {tag!r} is the name of the file that names the latest checkpoint; use another")
    return target


def _is_of_a_checkpoint(name: str) -> bool:
    """What DeepSpeed and we write in a checkpoint's folder; a user's own files beside it are not ours to remove."""
    return name in (MANIFEST, CONFIG_FOLDER, "offloaded_tensors") or name.endswith(_ENDINGS) or name.startswith(RANDOM)


_ENDINGS = ("_model_states.pt", "_optim_states.pt")


def _refuse_unfit(engine: Any, client_state: dict[str, Any]) -> None:
    if IDENTITY_KEY in client_state:
        raise CheckpointError(f"client_state may not hold {IDENTITY_KEY!r}, which is ours; rename the entry")
    if engine.checkpoint_engine.is_decoupled():
        raise CheckpointError(
            f"{type(engine.checkpoint_engine).__name__} writes in the background, so it is never known when all files are there; "
            'remove "checkpoint_engine" from the DeepSpeed config'
        )
    if engine.use_node_local_storage():
        raise CheckpointError(
            '"checkpoint": {"use_node_local_storage": true} is not available: all ranks must see one folder'
        )


def _require_strictness(folder: Path, saved: Mapping[str, Any], strict: bool) -> None:
    if strict and saved.get("without_frozen") and saved["frozen"]:
        raise CheckpointError(
            f"{folder} was saved with exclude_frozen_parameters and lacks {len(saved['frozen'])} frozen parameters "
            f"({saved['frozen'][0]}, ...); load with load_module_strict=False, which leaves them the values they have"
        )


def _warn_of_unnamed(folder: Path) -> None:
    """A run that starts from zero beside its own checkpoints says so."""
    found = sorted(str(path.parent.relative_to(folder)) for path in (*folder.glob(f"*/{MANIFEST}"), *folder.glob(f"*/*/{MANIFEST}")))
    if found:
        logging.getLogger("ds_seqpar").warning(
            "%s has no file %s, so nothing is loaded, but it holds %s; give one of them as tag", folder, LATEST, found
        )


def _coordinates(state: ShardingState) -> dict[str, int]:
    return {"tp_rank": state.groups.tp_rank, "dp_rank": dist.get_rank() // state.groups.tp_size}


@contextmanager
def _recorded(engine: Any, written: list[Path]) -> Iterator[list[Exception]]:
    """DeepSpeed's barriers inside a save must be reached by every rank, so what a rank cannot write is kept for later.

    Its recovery script merges data-parallel parts alone: beside files that are cut over a tensor-parallel group it would
    write wrong weights without a word, so it is left out.
    """
    problems: list[Exception] = []
    writer = engine.checkpoint_engine
    plain_save = writer.save

    def save(state_dict: Any, path: Any) -> None:
        try:
            with writing(Path(path)):
                plain_save(state_dict, path)
            written.append(Path(path))
        except Exception as problem:
            problems.append(problem)

    writer.save, engine._copy_recovery_script = save, lambda *_: None
    try:
        yield problems
    finally:
        del writer.save, engine._copy_recovery_script


def _files_of_this_rank(aside: Path, written: list[Path], identity: dict[str, Any]) -> dict[str, Any]:
    rank, t = dist.get_rank(), identity["tp_size"]
    own = aside / random_file(rank)
    with writing(own):
        torch.save(random_states(), own)
    files = {}
    for path in [*written, own]:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        files[path.name] = {
            "size": path.stat().st_size,
            "fingerprint": manifests.fingerprint(path),
            "tp_rank": rank % t,
            "dp_rank": rank // t,
        }
    return files


def _write_durably(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.partial")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _read_latest(path: Path) -> str | None:
    return path.read_text().strip() if path.is_file() else None
