"""One test for each private name of DeepSpeed that ds_seqpar/engine relies on; each fails, naming it, if it changed.

What DeepSpeed keeps privately may change in any release. These tests say which name, and what was expected of it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import deepspeed
import pytest
import torch
import torch.distributed as dist
from exactness import fresh_groups
from models import batches, tiny
from ranks import run_ranks
from torch import nn

import ds_seqpar
from ds_seqpar import engine as seam
from ds_seqpar.engine.arguments import plain_initialize


def _changed(name: str, expected: str) -> NoReturn:
    raise AssertionError(f"DeepSpeed {deepspeed.__version__} changed `{name}`: expected that {expected}")


def _must(true: object, name: str, expected: str) -> None:
    if not true:
        _changed(name, expected)


def _engine(optimizer: Any = torch.optim.SGD, **ds: Any) -> Any:
    fresh_groups()
    model = tiny("llama")
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True, "ds_seqpar": {"tp_size": 2}, **ds,
    }  # fmt: skip
    return deepspeed.initialize(model=model, optimizer=optimizer(model.parameters(), lr=0.1), config=config)[0]


def _init_tp_mesh_device() -> None:
    from deepspeed.utils import groups

    name = "groups._init_tp_mesh_device"
    function = getattr(groups, "_init_tp_mesh_device", None)
    _must(callable(function), name, "it exists")
    assert function is not None
    _must(
        "tensor_model_parallel_size" in inspect.signature(function).parameters,
        name,
        "it takes tensor_model_parallel_size",
    )
    fresh_groups()
    function(tensor_model_parallel_size=2)
    mine = dist.get_process_group_ranks(groups.get_tensor_model_parallel_group())
    first = dist.get_rank() // 2 * 2
    _must(mine == [first, first + 1], name, f"a tensor-parallel group holds consecutive ranks, not {mine}")
    theirs = dist.get_process_group_ranks(groups.get_data_parallel_group())
    _must(
        theirs == [dist.get_rank() % 2, dist.get_rank() % 2 + 2],
        name,
        f"a data-parallel group steps over it, not {theirs}",
    )


def _tensor_model_parallel_group() -> None:
    from deepspeed.utils import groups

    name = "groups._TENSOR_MODEL_PARALLEL_GROUP"
    _must(hasattr(groups, "_TENSOR_MODEL_PARALLEL_GROUP"), name, "it exists")
    fresh_groups()
    _must(groups._TENSOR_MODEL_PARALLEL_GROUP is None, name, "setting it to None forgets the group")
    groups._init_tp_mesh_device(tensor_model_parallel_size=2)
    kept = groups._TENSOR_MODEL_PARALLEL_GROUP
    _must(kept is groups.get_tensor_model_parallel_group(), name, "get_tensor_model_parallel_group() returns it")
    groups._init_tp_mesh_device(tensor_model_parallel_size=4)
    _must(groups._TENSOR_MODEL_PARALLEL_GROUP is kept, name, "the first size of a process stays")


def _ds_autotp_parsed() -> None:
    name = "model.ds_autotp_parsed"
    apply = getattr(deepspeed.DeepSpeedEngine, "_apply_autotp_partitioning", None)
    _must(apply is not None, name, "DeepSpeedEngine._apply_autotp_partitioning reads it")
    assert apply is not None
    model = nn.Linear(2, 2)
    model.ds_autotp_parsed = True  # type: ignore[assignment]
    try:
        apply(object(), model, object())  # anything it asks of the engine or the config fails
    except AttributeError as error:
        _changed(name, f"a model that has it is left alone ({error})")
    engine = _engine()
    planned = {name: p.local_shape for name, p in engine.seqpar_report.parameters().items()}
    shapes = {name: tuple(p.shape) for name, p in engine.module.named_parameters()}
    _must(all(planned[name] == shape for name, shape in shapes.items()), name, "DeepSpeed cuts nothing a second time")
    _must(
        engine.autotp_size() == 2 and engine.mpu is not None,
        name,
        "tensor_parallel.autotp_size still makes the groups its mpu",
    )


def _tensor_model_parallel() -> None:
    from deepspeed.runtime.utils import is_model_parallel_parameter

    name = "parameter.tensor_model_parallel"
    parameter = nn.Parameter(torch.zeros(2))
    _must(not is_model_parallel_parameter(parameter), name, "an untagged parameter is replicated")
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    _must(is_model_parallel_parameter(parameter), name, "a tagged parameter counts on every rank in the norm")
    parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
    _must(not is_model_parallel_parameter(parameter), name, "False is as good as no tag")


def _gather_replaced() -> tuple[list[str], nn.Parameter]:
    from deepspeed.module_inject.layers import GatherReplacedLayerParams

    calls: list[str] = []
    parameter = nn.Parameter(torch.zeros(2))
    parameter.ds_is_replaced_module = True  # type: ignore[attr-defined]
    parameter.gather_params = lambda parameters: calls.append(f"gather_params {len(parameters)}")  # type: ignore[attr-defined]
    parameter._tp_partition = lambda parameters: calls.append(f"_tp_partition {len(parameters)}")  # type: ignore[attr-defined]
    with GatherReplacedLayerParams([parameter], nn.Linear(1, 1), enabled=True):
        calls.append("body")
    return calls, parameter


def _ds_is_replaced_module() -> None:
    from deepspeed.module_inject.layers import GatherReplacedLayerParams

    name = "parameter.ds_is_replaced_module"
    _must(_gather_replaced()[0], name, "a parameter with it is gathered for saving")
    plain = nn.Parameter(torch.zeros(2))  # has no gather_params: to call one would raise
    with GatherReplacedLayerParams([plain], nn.Linear(1, 1), enabled=True):
        pass


def _gather_params() -> None:
    calls, _ = _gather_replaced()
    _must(calls[:1] == ["gather_params 1"], "gather_params", f"it is called with the parameters on entry, not {calls}")


def _tp_partition() -> None:
    calls, _ = _gather_replaced()
    _must(
        calls[1:] == ["body", "_tp_partition 1"],
        "_tp_partition",
        f"it is called with the parameters on exit, not {calls}",
    )


def _first_dataloader_check() -> None:
    name = "engine.first_dataloader_check"
    engine = _engine()
    check = getattr(engine, "first_dataloader_check", None)
    _must(check is not None and hasattr(check, "remove"), name, "it is a hook that can be removed")
    assert check is not None
    _must(
        check.id not in engine.module._forward_pre_hooks, name, "remove() took DeepSpeed's own data check off the model"
    )


def _train_batch_size() -> None:
    name = "engine._config.train_batch_size"
    engine = _engine()
    _must(hasattr(engine._config, "train_batch_size"), name, "it exists")
    _must(
        engine.train_batch_size() == 1 * 2 * 2,
        name,
        f"engine.train_batch_size() reads it, not {engine.train_batch_size()}",
    )
    engine._config.train_batch_size = 77
    _must(engine.train_batch_size() == 77, name, "engine.train_batch_size() reads it")


def _tput_timer() -> None:
    name = "engine.tput_timer.batch_size"
    engine = _engine()
    _must(getattr(engine.tput_timer, "batch_size", None) == 4, name, "it is the number of samples of a step")
    source = inspect.getsource(type(engine.tput_timer))
    _must("self.batch_size" in source, name, "the throughput timer counts with it")


def _moments_of(stage: int) -> Any:
    engine = _engine(zero_optimization={"stage": stage}, gradient_accumulation_steps=1, optimizer=torch.optim.AdamW)
    engine.backward(engine(**batches(1, 1)[0]).loss)
    engine.step()
    return engine


def _hp_mapping() -> None:
    name, numel = "parameter._hp_mapping", 0
    engine = _moments_of(1)
    for parameter in engine.module.parameters():
        fragment = getattr(parameter, "_hp_mapping", None)
        if fragment is None:
            continue
        numel += fragment.hp_fragment.numel()
        start, size = fragment.lp_fragment_address.start, fragment.lp_fragment_address.numel
        same = torch.equal(fragment.hp_fragment, parameter.detach().flatten()[start : start + size])
        _must(same, name, "lp_fragment_address says where hp_fragment lies in the parameter")
        _must(
            {"exp_avg", "exp_avg_sq"} <= set(fragment.optim_fragment), name, "optim_fragment holds the moments by name"
        )
    total = torch.tensor(numel)
    dist.all_reduce(total, group=seam.data_parallel_group())
    wanted = sum(p.numel() for p in engine.module.parameters())
    _must(int(total) == wanted, name, "the data-parallel ranks' fragments are the whole")


def _ds_tensor() -> None:
    engine = _moments_of(3)
    for parameter in engine.module.parameters():
        numel = parameter.ds_tensor.numel()
        fits = numel * 2 >= parameter.ds_numel > (numel - 1) * 2
        _must(fits, "parameter.ds_tensor", "it is an equal share of ds_numel for each data-parallel rank")


CONTRACT: dict[str, tuple[int, Callable[[], None]]] = {
    "groups._init_tp_mesh_device": (4, _init_tp_mesh_device),
    "groups._TENSOR_MODEL_PARALLEL_GROUP": (4, _tensor_model_parallel_group),
    "model.ds_autotp_parsed": (2, _ds_autotp_parsed),
    "parameter.tensor_model_parallel": (1, _tensor_model_parallel),
    "parameter.ds_is_replaced_module": (1, _ds_is_replaced_module),
    "gather_params": (1, _gather_params),
    "_tp_partition": (1, _tp_partition),
    "engine.first_dataloader_check": (2, _first_dataloader_check),
    "engine._config.train_batch_size": (4, _train_batch_size),
    "engine.tput_timer.batch_size": (4, _tput_timer),
    "parameter._hp_mapping": (4, _hp_mapping),
    "parameter.ds_tensor": (4, _ds_tensor),
}


@pytest.mark.parametrize("name", CONTRACT)
def test_deepspeed_still_keeps(name: str) -> None:
    world, check = CONTRACT[name]
    run_ranks(world, check, timeout=60)


def test_every_private_name_of_the_seam_has_a_test() -> None:
    """The list in the package's docstring is this file's list, and its code uses no other underscored name of DeepSpeed."""
    listed = re.findall(r"`([^`]+)`", (seam.__doc__ or "").partition("Private names")[2])
    assert sorted(listed) == sorted(CONTRACT)
    source = "".join(path.read_text() for path in Path(seam.__path__[0]).glob("*.py") if path.name != "__init__.py")
    used = set(re.findall(r"(?:ds_groups|engine|deepspeed|comm)\.(_[a-zA-Z]\w*)", source))
    known = {part for name in CONTRACT for part in name.split(".")}
    assert used <= known, f"undocumented private names: {used - known}"


def test_initialize_takes_its_arguments_by_the_names_that_the_seam_binds() -> None:
    names = list(inspect.signature(plain_initialize).parameters)
    for name in ("args", "model", "mpu", "config", "config_params"):
        _must(name in names, "deepspeed.initialize", f"it takes {name}")
    code = plain_initialize.__code__
    _must(
        list(code.co_varnames[: code.co_argcount]) == names,
        "deepspeed.initialize",
        "it is a plain function of positional names",
    )


def test_engine_takes_model_and_config_by_keyword() -> None:
    """What the check for an `initialize` imported too early reads."""
    import deepspeed as ds

    source = inspect.getsource(ds.initialize.__wrapped__)  # type: ignore[attr-defined]
    _must("DeepSpeedEngine(args=args,\n" in source, "DeepSpeedEngine.__init__", "initialize passes keywords")
    _must(
        "model=model," in source and "config=config," in source,
        "DeepSpeedEngine.__init__",
        "model= and config= are keywords",
    )


def test_load_ds_config_reads_a_path(tmp_path: Any) -> None:
    from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

    (tmp_path / "ds.json").write_text('{"ds_seqpar": {"tp_size": 2}}')
    _must(
        load_ds_config(str(tmp_path / "ds.json")) == {"ds_seqpar": {"tp_size": 2}}, "load_ds_config", "it reads a path"
    )
    (tmp_path / "twice.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(ValueError):
        load_ds_config(str(tmp_path / "twice.json"))


def _half_precision_norm() -> None:
    """The reason of a refusal: at ZeRO 0 with bf16, DeepSpeed leaves the shards of all ranks but the first out of the norm."""
    from deepspeed.runtime.utils import get_weight_norm

    parameter = nn.Parameter(torch.ones(3))
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.grad = torch.ones(3)
    mpu = SimpleNamespace(
        get_model_parallel_rank=dist.get_rank, get_model_parallel_world_size=dist.get_world_size,
        get_model_parallel_group=lambda: dist.group.WORLD,
    )  # fmt: skip
    norm = float(get_weight_norm(parameter.grad, mpu=mpu))
    if abs(norm - 6**0.5) < 1e-6:
        _changed("get_weight_norm", "gradients have no tag, so that _refuse_wrong_norm is needed; it can be removed")


def test_the_clipping_refusal_still_has_its_reason() -> None:
    run_ranks(2, _half_precision_norm, timeout=60)


def test_the_report_of_an_engine_is_public() -> None:
    assert {"initialize", "shard", "Report"} <= set(ds_seqpar.__all__)
