"""Every way in gives the same training; without the key nothing changes; the batch arithmetic counts data-parallel ranks."""

from __future__ import annotations

import base64
import copy
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from exactness import fresh_groups
from models import batches, device, tiny
from ranks import run_ranks
from torch import Tensor

import ds_seqpar

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests" / "scripts" / "plain_train.py"


def _config(tp: int | None = 2, **ds: Any) -> dict[str, Any]:
    key = {} if tp is None else {"ds_seqpar": {"tp_size": tp}}
    plain = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
    return {**plain, "zero_optimization": {"stage": 1}, **key, **ds}


def _two_steps(
    initialize: Callable[..., Any], positional: tuple[Any, ...] = (), **arguments: Any
) -> tuple[Any, list[Tensor]]:
    """(engine, losses and local weights after two steps) of a run started by `initialize`."""
    fresh_groups()
    model = tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    if positional:
        engine = initialize(*positional, model, optimizer, **arguments)[0]
    else:
        engine = initialize(model=model, optimizer=optimizer, **arguments)[0]
    values = []
    for batch in batches(2, 1):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        values.append(loss.detach())
    return engine, values + [p.detach().clone() for p in engine.module.parameters()]


def _ways_in() -> None:
    config = _config()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/ds.json"
        Path(path).write_text(json.dumps(config))
        encoded = base64.urlsafe_b64encode(json.dumps(config).encode()).decode()
        arguments = SimpleNamespace(deepspeed_config=path, local_rank=int(os.environ["LOCAL_RANK"]))
        ways: dict[str, dict[str, Any]] = {
            "dict": dict(config=config),
            "path": dict(config=path),
            "base64": dict(config=encoded),
            "config_params": dict(config_params=config),
            "config_params path": dict(config_params=path),
            "args.deepspeed_config": dict(args=arguments),
            "args without a config": dict(args=SimpleNamespace(local_rank=int(os.environ["LOCAL_RANK"])), config=config),
            "args with None": dict(args=SimpleNamespace(deepspeed_config=None), config=config),
        }
        before = copy.deepcopy(config)
        _, expected = _two_steps(deepspeed.initialize, config=config)
        for name, way in ways.items():
            for initialize in (deepspeed.initialize, ds_seqpar.initialize):
                engine, values = _two_steps(initialize, **way)
                assert engine.seqpar_report.tp_size == 2, name
                assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True)), name
                assert config == before, f"{name}: the caller's config was changed"
        engine, values = _two_steps(ds_seqpar.initialize, positional=(arguments,))
        assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True)), "positional"
        assert arguments.deepspeed_config == path


def test_every_way_in_gives_the_same_run() -> None:
    run_ranks(2, _ways_in, timeout=120)


def _results() -> None:
    """The four results are DeepSpeed's: engine, its optimizer, a data loader, a scheduler; a callable optimizer works too."""
    fresh_groups()
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # the loader has workers
    model = tiny("llama")
    rows = [{"input_ids": torch.full((5,), i + 3), "labels": torch.full((5,), i + 3)} for i in range(8)]
    config = _config(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 4}})
    engine, optimizer, loader, scheduler = deepspeed.initialize(
        model=model,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        model_parameters=model.parameters(),
        training_data=rows,
        config=config,
    )
    assert engine.optimizer is optimizer and scheduler is engine.lr_scheduler
    seen = []
    for batch in loader:
        loss = engine(**{name: x.to(device()) for name, x in batch.items()}).loss
        engine.backward(loss)
        engine.step()
        seen.append(int(batch["input_ids"][0, 0]) - 3)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, seen)
    assert everyone[0] == everyone[1] and everyone[2] == everyone[3], (
        f"the ranks of a group got different rows: {everyone}"
    )
    assert sorted(everyone[0] + everyone[2]) == list(range(8)), f"an epoch is every row once: {everyone}"


def test_deepspeeds_own_data_loader_gives_each_row_to_one_tensor_parallel_group() -> None:
    run_ranks(4, _results, timeout=60)


def _batch_sizes() -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    cases: list[tuple[tuple[int | None, int | None, int | None], tuple[int, int, int]]] = [
        ((None, 1, None), (2, 1, 1)),
        ((None, 3, 2), (12, 3, 2)),
        ((8, None, None), (8, 4, 1)),
        ((8, 2, None), (8, 2, 2)),
        ((8, None, 4), (8, 1, 4)),
        ((12, 3, 2), (12, 3, 2)),
    ]
    for stage in (1, 3):
        for given, (train, micro, accumulation) in cases if stage == 1 else cases[3:4]:
            fresh_groups()
            config = {**_config(zero_optimization={"stage": stage}), "train_micro_batch_size_per_gpu": None}
            config.update(dict(zip(names, given, strict=True)))
            config = {name: value for name, value in config.items() if value is not None}
            model = tiny("llama")
            engine = deepspeed.initialize(
                model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config
            )[0]
            assert engine.train_batch_size() == train, f"{given}: {engine.train_batch_size()}"
            assert (
                engine.train_micro_batch_size_per_gpu() == micro
                and engine.gradient_accumulation_steps() == accumulation
            )
            assert engine.tput_timer.batch_size == train and engine.dp_world_size == 2
            engine.destroy()


def test_batch_sizes_count_data_parallel_ranks() -> None:
    run_ranks(4, _batch_sizes, timeout=120)


def _tp_1() -> None:
    """tp_size 1 takes the same path, shards nothing away, and trains the same model."""
    engine, values = _two_steps(deepspeed.initialize, config=_config(1))
    assert engine.seqpar_report.tp_size == 1 and engine.module.seqpar.groups.tp_size == 1
    assert engine.train_batch_size() == dist.get_world_size()
    plain, expected = _two_steps(deepspeed.initialize, config=_config(None))
    assert not hasattr(plain, "seqpar_report")
    for mine, theirs in zip(values, expected, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world", [1, 2])
def test_tp_size_1_is_the_same_path_and_the_same_training(world: int) -> None:
    run_ranks(world, _tp_1, timeout=60)


def _without_the_key() -> None:
    """Also with the key disabled: DeepSpeed's own engine over the untouched model, equal bit for bit."""
    from ds_seqpar.engine.arguments import plain_initialize

    _, expected = _two_steps(plain_initialize, config=_config(None))
    for config in (_config(None), {**_config(None), "ds_seqpar": {"enabled": False}}):
        for initialize in (deepspeed.initialize, ds_seqpar.initialize):
            engine, values = _two_steps(initialize, config=config)
            assert (
                not hasattr(engine, "seqpar_report") and type(engine.module).__mro__[1].__name__ != "ShardedHeadModel"
            )
            assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))


def test_without_the_key_a_run_is_bit_equal() -> None:
    run_ranks(2, _without_the_key, timeout=60)


def _random_stream() -> None:
    for training in (True, False):
        model = tiny("llama").train(training)
        fresh_groups()
        ds_seqpar.shard(model, {"tp_size": 2})
        torch.manual_seed(4)
        before = torch.get_rng_state()
        model(**batches(1, 1)[0]).loss.backward()
        assert torch.equal(torch.get_rng_state(), before), (
            f"{training=}: the model has no dropout, yet it drew random numbers"
        )


def test_a_model_without_dropout_leaves_the_random_stream_alone() -> None:
    """A script that draws its data or its shuffling from torch's default generator must see the data of the unsharded run."""
    run_ranks(2, _random_stream, timeout=60)


def test_the_wrapped_initialize_looks_like_deepspeeds() -> None:
    import inspect

    from ds_seqpar.engine import patch
    from ds_seqpar.engine.arguments import plain_initialize

    assert inspect.signature(deepspeed.initialize) == inspect.signature(plain_initialize)
    assert deepspeed.initialize.__doc__ == plain_initialize.__doc__ and deepspeed.initialize.__name__ == "initialize"
    before = deepspeed.initialize, deepspeed.DeepSpeedEngine.__init__
    patch()
    assert (deepspeed.initialize, deepspeed.DeepSpeedEngine.__init__) == before, "patching twice wraps twice"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _environment(folder: Path, **more: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTHONPATH")
    }
    return {
        **kept, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/integrations", "MASTER_ADDR": "127.0.0.1",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **more,
    }  # fmt: skip


def _start(command: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=folder, env=_environment(folder, **environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


def _finished(process: subprocess.Popen[str], seconds: float) -> str:
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"no end after {seconds} s: {process.communicate()[0][-2000:]}")
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The user's script on one process without the key: as it is, and with ds_seqpar imported first."""
    config = _config(None, zero_optimization={"stage": 0})
    code = "import ds_seqpar, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    started = {}
    for name, start in {"plain": [str(SCRIPT)], "imported": ["-c", code, str(SCRIPT)]}.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "ds.json").write_text(json.dumps(config))
        command = [sys.executable, *start, "--deepspeed_config", "ds.json", "--out", str(folder)]
        port = str(_free_port())
        started[name] = folder, _start(command, folder, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_PORT=port)
    results = {}
    for name, (folder, process) in started.items():
        _finished(process, 120)
        results[name] = json.loads((folder / "rank0.json").read_text())
    return results


def test_importing_ds_seqpar_changes_nothing_without_the_key(alone: dict[str, dict[str, Any]]) -> None:
    plain, imported = alone["plain"], alone["imported"]
    assert not any("ds_seqpar" in name for name in plain["helpers"]) and "ds_seqpar.engine" in imported["helpers"]
    assert imported["hosts"] == plain["hosts"], "trainers are imported by whoever uses them"
    for what in ("losses", "digest", "random", "elements", "batch"):
        assert plain[what] == imported[what], what


@pytest.mark.skipif(not shutil.which("deepspeed"), reason="the deepspeed launcher is not on the PATH; install deepspeed")
def test_the_launcher_shards_a_script_that_never_heard_of_it(alone: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    assert "seqpar" not in SCRIPT.read_text()
    (tmp_path / "x.json").write_text(json.dumps(_config(2, zero_optimization={"stage": 1})))
    launch = [
        "deepspeed",
        "--num_gpus",
        "2",
        "--master_port",
        str(_free_port()),
        "--module",
        "ds_seqpar.run",
        str(SCRIPT),
    ]
    process = _start([*launch, "--deepspeed_config", "x.json", "--out", str(tmp_path)], tmp_path)
    output = _finished(process, 180)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    whole = alone["plain"]["elements"]
    for rank, result in enumerate(ranks):
        assert result["name"] == "__main__" and result["argv"][0] == str(SCRIPT)
        assert f"--local_rank={rank}" in result["argv"] and "--deepspeed_config" in result["argv"]
        assert whole * 0.45 < result["elements"] < whole * 0.6, "each rank holds about half of the model"
        assert result["batch"] == 1
        torch.testing.assert_close(
            torch.tensor(result["losses"]), torch.tensor(alone["plain"]["losses"]), rtol=1e-4, atol=0
        )
    assert ranks[0]["losses"] == ranks[1]["losses"]
    assert output.count("ds_seqpar: llama, tensor + sequence parallel, tp_size=2") == 1, "the report is logged once"


def test_run_names_a_missing_script_and_shows_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    from ds_seqpar.run import main

    for argv, code in ((["--help"], 0), ([], 2), (["--local_rank=1"], 2)):
        with pytest.raises(SystemExit) as stopped:
            main(list(argv))
        assert (
            stopped.value.code == code
            and "usage: deepspeed --num_gpus N --module ds_seqpar.run" in capsys.readouterr().out
        )
    with pytest.raises(ds_seqpar.ConfigError, match=r"there is no script 'nowhere\.py'"):
        main(["--local_rank=0", "nowhere.py"])
    main(["--version"])
    assert capsys.readouterr().out.strip() == ds_seqpar.__version__


def test_run_leaves_a_script_its_arguments_and_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_seqpar.run import main

    (tmp_path / "beside_the_script.py").write_text("VALUE = 3\n")
    (tmp_path / "script.py").write_text(
        "import sys, json, beside_the_script, pathlib\n"
        "pathlib.Path(sys.argv[-1]).write_text(json.dumps([__name__, __file__, beside_the_script.VALUE, *sys.argv]))\n"
    )
    for argv in (["--local_rank=1"], ["--local_rank", "1"], []):
        monkeypatch.setattr(sys, "argv", ["run.py"])
        monkeypatch.setattr(sys, "path", ["/elsewhere", *sys.path])
        out, script = str(tmp_path / "out.json"), str(tmp_path / "script.py")
        main([*argv, script, "-x", "--flag", out])
        assert json.loads(Path(out).read_text()) == ["__main__", script, 3, script, *argv, "-x", "--flag", out]
        sys.modules.pop("beside_the_script", None)
