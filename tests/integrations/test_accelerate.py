"""A plain accelerate loop under the key: the same losses, norms, rates, gathered metrics and weights as without it."""

from __future__ import annotations

import functools
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from ranks import RankError, run_ranks
from transformers.trainer_utils import seed_worker

import ds_seqpar

sys.path.insert(0, str(Path(__file__).parent / "scripts"))
sys.path.insert(0, str(Path(__file__).parent))

import accelerate_loop
from hf_trainer import Rows, collate_at_random
from same_run import TOLERANCE, assert_same_files, deepspeed_json


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(folder)
    return str(folder)


def _on_rank(job: dict[str, Any], out: str) -> dict[str, Any]:
    return accelerate_loop.run(job, Path(out))


def _run(world: int, job: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    out.mkdir()
    return run_ranks(world, _on_rank, job, str(out), timeout=120, deepspeed=bool(job.get("deepspeed")))


def _close(mine: Any, theirs: Any, name: str) -> None:
    torch.testing.assert_close(
        torch.tensor(mine),
        torch.tensor(theirs),
        rtol=TOLERANCE,
        atol=TOLERANCE,
        msg=f"{name}: {mine} instead of {theirs}",
    )


def _same(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name in ("losses", "rates", "norms"):
        _close(mine[name], theirs[name], name)
    assert mine["tokens"] == theirs["tokens"] and mine["processes"] == theirs["processes"], "gather, reduce"
    assert mine["names"] == theirs["names"] and mine["type"] == theirs["type"]
    assert len(mine["predicted"]) == len(theirs["predicted"])
    for ours, expected in zip(mine["predicted"], theirs["predicted"], strict=True):
        for a, b in zip(ours, expected, strict=True):
            _close(a, b, "gather_for_metrics")


def _json(stage: int, tp_size: int | None = 2) -> dict[str, Any]:
    return deepspeed_json(stage, tp_size, gradient_clipping=0.5)


def test_two_ranks_do_what_one_process_does(model: str, tmp_path: Path) -> None:
    """Also after `save_state`, an epoch more, and `load_state`."""
    job = {"model": model, "accumulation": 2, "rows": 11}
    alone = _run(1, job, tmp_path / "alone")[0]
    for ours in _run(2, {**job, "deepspeed": _json(2)}, tmp_path / "mine"):
        _same(ours, alone)
    for name in ("saved", "weights"):
        assert_same_files(tmp_path / "mine" / name, tmp_path / "alone" / name)


@pytest.mark.parametrize("stage", [1, 3])
def test_four_ranks_do_what_two_plain_ones_do(model: str, tmp_path: Path, stage: int) -> None:
    """Two data-parallel shares: odd tails, schedulers stepped twice a step, rows of metrics once each, states saved and loaded."""
    job = {"model": model, "accumulation": 2, "rows": 13}
    plain = _run(2, {**job, "deepspeed": _json(1, None)}, tmp_path / "plain")
    for rank, ours in enumerate(_run(4, {**job, "deepspeed": _json(stage)}, tmp_path / "mine")):
        _same(ours, plain[rank // 2])
        assert len(ours["names"]) == 5
    assert_same_files(tmp_path / "mine" / "saved", tmp_path / "plain" / "saved", also=("lm_head.weight",))


OPTIMIZER = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "eps": 1e-4, "torch_adam": True}}
SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": dict.fromkeys(("total_num_steps", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto"),
}


@pytest.mark.slow
def test_an_optimizer_and_a_schedule_of_the_json_step_as_on_two_plain_ranks(model: str, tmp_path: Path) -> None:
    """accelerate's placeholders for both, whose steps it shares among all ranks."""
    job = {"model": model, "accumulation": 2, "rows": 13, "dummies": True}
    keys = {
        name: {**_json(1, tp_size), "optimizer": OPTIMIZER, "scheduler": SCHEDULER}
        for name, tp_size in (("plain", None), ("mine", 2))
    }
    plain = _run(2, {**job, "deepspeed": keys["plain"]}, tmp_path / "plain")
    assert len(set(plain[0]["rates"])) > 2, "warm, then less"
    for rank, ours in enumerate(_run(4, {**job, "deepspeed": keys["mine"]}, tmp_path / "mine")):
        _same(ours, plain[rank // 2])


def _late(model: str) -> None:
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState

    PartialState(cpu=True)
    plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 1})
    accelerator = Accelerator(deepspeed_plugin=plugin)
    plugin.deepspeed_config["ds_seqpar"] = {"tp_size": 2}
    with pytest.raises(ds_seqpar.ConfigError, match="after it was read; import ds_seqpar before"):
        accelerator.prepare(tiny("llama"))
    with pytest.raises(ds_seqpar.ConfigError, match="before ds_seqpar was imported"):
        from ds_seqpar_integrations import accelerate as adapter

        adapter.install()
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from ds_seqpar_integrations import hf_trainer

    early = HfDeepSpeedConfig({"zero_optimization": {"stage": 1}, "ds_seqpar": {"tp_size": 2}})
    del early.config["tensor_parallel"]  # as it is without the import
    with pytest.raises(ds_seqpar.ConfigError, match="TrainingArguments read a DeepSpeed config"):
        hf_trainer.install()


def test_a_key_that_comes_too_late_is_refused(model: str) -> None:
    run_ranks(2, _late, model, timeout=60)


def _batches_at_random(workers: int) -> list[list[int]]:
    """Two epochs' tokens where each process is seeded by its rank, as accelerate's `device_specific` does."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # data-loader workers are its children
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState
    from accelerate.utils import set_seed

    PartialState(cpu=True)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_json()))
    set_seed(3, device_specific=True)
    loader = torch.utils.data.DataLoader(
        Rows(8, 9), batch_size=2, collate_fn=collate_at_random, num_workers=workers,
        worker_init_fn=functools.partial(seed_worker, num_workers=workers, rank=accelerator.process_index),
    )  # fmt: skip
    loader = accelerator.prepare(loader)
    return [batch["input_ids"].flatten().tolist() for _ in range(2) for batch in loader]


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_ranks_that_are_seeded_apart_collate_alike_in_a_group_and_apart_between_groups(workers: int) -> None:
    a, b, c, d = run_ranks(4, _batches_at_random, workers, timeout=120)
    assert a == b and c == d and len(a) == len(c) == 4
    assert a[0] != a[2] and c[1] != c[3], "every epoch draws anew"


def _iterable(model: str) -> None:
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState
    from accelerate.utils import DataLoaderConfiguration

    PartialState(cpu=True)
    plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_json())
    accelerator = Accelerator(deepspeed_plugin=plugin, dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    accelerator.prepare(torch.utils.data.DataLoader(list(range(4))))


def test_dispatching_is_refused(model: str) -> None:
    with pytest.raises(RankError, match="dispatch_batches=True hands every rank the same batch"):
        run_ranks(2, _iterable, model, timeout=60)


def _alone(model: str) -> None:
    from accelerate import Accelerator, DeepSpeedPlugin

    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_json()))
    accelerator.prepare(torch.utils.data.DataLoader(list(range(4))))


def test_too_few_processes_are_refused(model: str) -> None:
    with pytest.raises(RankError, match="does not divide the 1 processes that accelerate knows of"):
        run_ranks(2, _alone, model, timeout=60)
